"""Sedimentation: an embedding store that learns, each change judged by a gate.

This file imports nothing until a public name is asked for, so that ``python -m
conch_dna.sedimentation`` starts at once and runs no module twice.
"""

import importlib
from typing import Any

_HOMES = {
    "AntigravityEngine": "conch_dna.sedimentation.engine",
    "ChangeResult": "conch_dna.sedimentation.results",
    "ChelationConfig": "conch_dna.sedimentation.config",
    "InferenceResult": "conch_dna.sedimentation.results",
    "IngestResult": "conch_dna.sedimentation.results",
    "TeacherDistillationHelper": "conch_dna.sedimentation.changes.teacher_distillation",
    "create_distillation_helper": "conch_dna.sedimentation.changes.teacher_distillation",
    "generate_hybrid_targets": "conch_dna.sedimentation.adapters.teacher_alignment",
    "open_embedder": "conch_dna.sedimentation.embedders.open_embedder",
    "open_store": "conch_dna.sedimentation.stores.open_store",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *_HOMES})
