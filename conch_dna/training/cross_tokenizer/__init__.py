"""A teacher with another tokenizer: which tokens, texts and classes belong together."""
