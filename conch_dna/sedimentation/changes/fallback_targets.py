"""Targets for every text that can have one: the documents' chain of ever more modest sources.

Knows a teacher's helper and vectors; nothing of stores, gates or training. It is the one place
where a failure is gone on from, so each is logged with its reason and counted in the result.
To add a step: its name in STEPS, in its order, and a branch in `targets_with_fallback`.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.adapter import Adapter
from conch_dna.sedimentation.adapters.teacher_alignment import aligned, check_weight, rows_of
from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
from conch_dna.sedimentation.embedders.contract import unit

logger = logging.getLogger(__name__)

# What a target was made of, best first.
STEPS = ("teacher", "homeostatic", "unchanged", "skipped")


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetsMade:
    """Targets in the student's space, and how each came about.

    Attributes:
        targets: Unit float32 `[n, D]`.
        kept: Which text each row belongs to, counted from 0.
        steps: For each text the one of STEPS that gave its target, or `skipped`.
        reasons: Why a step was left, in the order of the log.
    """

    targets: np.ndarray
    kept: list[int]
    steps: list[str]
    reasons: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """How many texts each step served; every step is named."""
        found = Counter(self.steps)
        return {step: found[step] for step in STEPS}


def targets_with_fallback(
    texts: Sequence[str],
    current_embeddings: Any,
    *,
    helper: TeacherDistillationHelper | None = None,
    homeostatic: Callable[[np.ndarray], np.ndarray] | None = None,
    teacher_weight: float = 1.0,
    alignment: Adapter | None = None,
) -> TargetsMade:
    """Targets by the documents' chain: teacher, homeostatic, unchanged, critical log and skip.

    All lie in the student's space, so that rows of different steps may be trained on together.
    A row of the teacher is normalize((1 − a) own + a teacher), own the homeostatic target where
    there is one, else the student's vector. A step that is not given is no failure; each that
    fails is logged with its reason.

    Args:
        texts: N of them.
        current_embeddings: The student's raw vectors `[N, D]`.
        helper: The teacher; None in baseline mode, in which it is never loaded.
        homeostatic: Gives targets `[n, D]` for rows `[n, D]`; a row that is not finite has none.
        teacher_weight: a, between 0 and 1; at 0 the teacher is not asked.
        alignment: See `generate_distillation_targets`.

    Raises:
        ConchError: Weight or shapes do not fit; nothing else, since that is what the chain is for.
    """
    check_weight(teacher_weight)
    current = rows_of(texts, current_embeddings)
    reasons: list[str] = []
    targets = np.zeros_like(current)
    usable = np.isfinite(current).all(axis=1) & (current != 0).any(axis=1)
    targets[usable] = current[usable]
    steps = np.where(usable, "unchanged", "skipped").astype(object)

    if homeostatic is not None and usable.any():
        rows, found = _homeostatic_rows(homeostatic, current[usable], reasons)
        places = np.flatnonzero(usable)[found]
        targets[places], steps[places] = rows[found], "homeostatic"
    if helper is not None and teacher_weight > 0:
        places, rows = _teacher_rows(helper, texts, current, usable, alignment, reasons)
        if len(places):
            own = unit(targets[places])
            mixed = (1 - teacher_weight) * own + teacher_weight * rows
            found = np.linalg.norm(mixed, axis=1) > 0
            if not found.all():
                _leave("teacher", int((~found).sum()), len(texts), "it cancels out", reasons)
            targets[places[found]], steps[places[found]] = mixed[found], "teacher"

    kept = np.flatnonzero(steps != "skipped")
    made = TargetsMade(
        targets=unit(targets[kept], what="targets"),
        kept=kept.tolist(),
        steps=steps.tolist(),
        reasons=reasons,
    )
    if made.counts["skipped"]:
        reason = f"{made.counts['skipped']} of {len(texts)} texts have no usable vector at all"
        reasons.append(reason)
        logger.critical("%s: they are skipped", reason)
    return made


def _leave(step: str, count: int, of: int, reason: object, reasons: list[str]) -> None:
    text = f"{step} gave no target for {count} of {of} texts: {reason}"
    reasons.append(text)
    logger.warning("%s; the next step of the chain takes them", text)


def _homeostatic_rows(
    homeostatic: Callable[[np.ndarray], np.ndarray], current: np.ndarray, reasons: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Targets of the rows, and which rows have one."""
    try:
        rows = np.asarray(homeostatic(current.copy()), np.float32)
        if rows.shape != current.shape:
            raise ConchError(f"its targets have shape {list(rows.shape)}")
    except ConchError as error:
        _leave("homeostatic", len(current), len(current), error, reasons)
        return current, np.zeros(len(current), bool)
    found = np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1)
    if not found.all():
        _leave("homeostatic", int((~found).sum()), len(current), "not finite or zero", reasons)
    return rows, found


def _teacher_rows(
    helper: TeacherDistillationHelper,
    texts: Sequence[str],
    current: np.ndarray,
    usable: np.ndarray,
    alignment: Adapter | None,
    reasons: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the texts that the teacher could embed, and its vectors in the student's space."""
    nothing = np.zeros(0, int), np.zeros((0, current.shape[1]), np.float32)
    asked = np.flatnonzero(usable)
    if not len(asked):
        return nothing
    try:
        found = helper.embed([texts[number] for number in asked.tolist()])
        if found.errors:
            first = next(iter(found.errors.values()))
            _leave("teacher", len(found.errors), len(asked), first, reasons)
        if not found.kept:
            return nothing
        places = asked[found.kept]
        return places, aligned(found.vectors, current[places], alignment)
    except ConchError as error:
        _leave("teacher", len(asked), len(asked), error, reasons)
        return nothing
