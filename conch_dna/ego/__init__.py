"""EGO: the big teacher as a service to the rest; see ``conch_dna.ego.model``.

This file imports nothing.
"""
