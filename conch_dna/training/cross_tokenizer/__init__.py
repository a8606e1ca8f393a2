"""A teacher with another tokenizer: which tokens, texts and classes of tokens belong together."""
