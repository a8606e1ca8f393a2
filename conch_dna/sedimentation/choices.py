"""Names that settings choose from, for whoever shows them before anything heavy is loaded.

Knows names only. What each means is where it is used: adapter.py and teacher_alignment.py.
"""

KINDS = ("identity", "ridge", "procrustes", "low_rank", "residual")
"""Kinds of adapters."""

SCHEDULES = ("constant", "linear", "cosine", "step")
"""How the teacher's weight changes over the epochs of a cycle."""
