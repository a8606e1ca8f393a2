"""Neurons behind OpenAI's chat API."""
