"""Conversations as a model reads them, through its tokenizer's chat template or plainly."""
