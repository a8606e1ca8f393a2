"""Runs of a domain in their folders: the stages, what is told of them, how they compare."""
