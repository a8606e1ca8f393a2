"""Generations: a child of two frozen teachers that replaces its parent only if it is better.

This file imports nothing until a public name is asked for, so that ``python -m
conch_dna.generations`` starts at once and runs no module twice.
"""

import importlib
from typing import Any

_HOMES = {
    "EMA": "conch_dna.training.optimizer.ema",
    "EvolveConfig": "conch_dna.generations.settings",
    "Line": "conch_dna.generations.line",
    "TeacherStudentTrainer": "conch_dna.generations.evolve",
    "blend_teacher_predictions": "conch_dna.generations.blending",
    "calculate_confidence": "conch_dna.generations.blending",
    "create_replay_buffer": "conch_dna.generations.replay",
    "disagreement_regularizer": "conch_dna.generations.blending",
    "ensemble_inference": "conch_dna.generations.ensemble",
    "init_line": "conch_dna.generations.data",
    "jensen_shannon_divergence": "conch_dna.generations.blending",
    "mask_taboo_tokens": "conch_dna.generations.taboo",
    "smart_target_selection": "conch_dna.generations.blending",
    "train_generation_with_teachers": "conch_dna.generations.evolve",
    "validate_student_vs_teachers": "conch_dna.generations.promotion",
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
