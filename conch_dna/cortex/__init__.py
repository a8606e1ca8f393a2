"""CORTEX: one resident student with an adapter per domain."""

"""CORTEX: one small resident model with an adapter for each domain.

Imports nothing, so that `python -m conch_dna.cortex.<module>` runs every module once.
"""
