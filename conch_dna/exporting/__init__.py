"""Leaving the house: a distilled adapter as a model or a file that other programs open."""
