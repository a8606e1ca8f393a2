"""Who is in memory when a teacher scores what its student has just said.

Knows a student in training and its teacher's source; nothing of batches. Who is there when is what
`fit.memory_estimate.takes_turns` says.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.screen.presentation import bytes_text
from conch_dna.training.adapters import make_trainable
from conch_dna.training.fit.memory_estimate import (
    bytes_of_weights,
    machine_memory,
    takes_turns,
)
from conch_dna.training.settings import KDConfig

ONE, BOTH = "one", "both"


def chosen_residency(
    teacher: ModelSource, student: LanguageModel, config: KDConfig, *, say: Callable[[str], None]
) -> str:
    """Whether teacher and student stay in memory together, or take turns.

    Args:
        teacher: Not loaded yet.
        student: In memory.
        config: `resident` and `full`.
        say: Gets what was chosen, and why.

    Raises:
        ConchError: They are to take turns, and every weight of the student is trained.
    """
    if config.resident == ONE and config.full:
        raise ConchError(
            "resident is one, but with --full every weight of the student is trained and stays in "
            "memory: leave out --full, or use --resident both"
        )
    if config.resident != "auto":
        return config.resident
    together = bytes_of_weights(student) + (teacher.weight_bytes or 0)
    memory, whose = machine_memory()
    fits = not takes_turns(together, memory, config)
    say(
        f"teacher and student {'stay in memory together' if fits else 'take turns in memory'}: "
        f"their weights take {bytes_text(together)} of {bytes_text(memory)} {whose}"
    )
    return BOTH if fits else ONE


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Whatever draws random numbers meanwhile, those behind are what they would have been.

    Loading a model draws some, and a run that goes on may find no need to load it.
    """
    random_state: Any = mx.random.state
    high, low = np.asarray(random_state[0]).tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


@contextmanager
def parked(student: LanguageModel, config: KDConfig) -> Iterator[None]:
    """Give back the memory of a student's frozen weights for a while.

    They are read again from the model's files afterwards, so nothing is written. What is trained
    stays.

    Args:
        student: In training; its adapter as `make_trainable` makes it with these settings.
        config: Those settings.
    """
    trained = named_arrays(student.model.trainable_parameters())
    frozen = [n for n in named_arrays(student.model.parameters()) if n not in trained]
    nothing = mx.zeros((0,))
    student.model.update(tree_unflatten([(name, nothing) for name in frozen]))
    gc.collect()
    mx.clear_cache()
    try:
        yield
    finally:
        fresh = student.source.load()
        make_trainable(fresh, config)
        again = named_arrays(fresh.model.parameters())
        student.model.update(tree_unflatten([(name, again[name]) for name in frozen]))
