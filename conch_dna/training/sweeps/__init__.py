"""Sweeps: one domain distilled with many settings over one cache, compared on what was held out."""
