"""Generations: a child of two frozen teachers that replaces its parent only if it is better.

This file imports nothing, so that ``python -m conch_dna.generations`` starts at once.
"""
