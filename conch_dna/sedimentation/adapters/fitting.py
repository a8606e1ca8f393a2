"""What an adapter learns from a store: pairs of raw vectors and targets, a page at a time.

Knows a store's pages, a teacher's helper and adapters; nothing of gates, logs or versions. Linear
adapters are solved from sums, so that memory does not grow with the store; a residual one is
trained on pairs in memory. To add a kind of adapter: a branch in `_solved`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.progress import Report, silent
from conch_dna.sedimentation.adapters.adapter import Adapter
from conch_dna.sedimentation.adapters.closed_forms import PairSums
from conch_dna.sedimentation.adapters.residual import fit_residual
from conch_dna.sedimentation.adapters.teacher_alignment import (
    blend,
    fit_alignment,
    scheduled_weight,
)
from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import DocumentId, embedded_text
from conch_dna.sedimentation.stores.contract import RAW, VectorStore

# Pairs on which the two spaces are brought together before they are mixed.
ALIGNED_PAIRS = 20_000


@dataclass
class Taught:
    """Pairs that a pass over a store gave.

    Attributes:
        documents: How many had a target.
        skipped: How many the teacher could not embed.
        reasons: Why, the first of each page.
        report: Gets ("advance", …) for each page; see `progress.Progress`.
    """

    documents: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)
    report: Report = field(default=silent, repr=False)

    @property
    def steps(self) -> dict[str, int]:
        """How many documents each step of the fallback chain served."""
        return {"teacher": self.documents, "skipped": self.skipped}


def teacher_pairs(
    store: VectorStore,
    helper: TeacherDistillationHelper,
    taught: Taught,
    *,
    without: Sequence[DocumentId] = (),
    size: int = 1000,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Raw vectors `[n, D]` and the teacher's `[n, E]`, a page at a time.

    Args:
        store: Its payloads hold the texts.
        helper: The teacher.
        taught: Counts.
        without: Documents that are held out.
        size: Of a page.
    """
    held_out = set(without)
    for page in store.pages(RAW, size=size):
        rows = [number for number, each in enumerate(page.ids) if each not in held_out]
        found = helper.embed([embedded_text(page.payloads[number]) for number in rows])
        if found.errors:
            taught.skipped += len(found.errors)
            taught.reasons.append(next(iter(found.errors.values())))
        kept = [rows[number] for number in found.kept]
        taught.documents += len(kept)
        taught.report("advance", {"by": len(page.ids)})
        if kept:
            yield page.vectors[kept], found.vectors


def fit_to_teacher(
    store: VectorStore,
    helper: TeacherDistillationHelper,
    config: ChelationConfig,
    *,
    without: Sequence[DocumentId] = (),
    learning_rate: float,
    epochs: int,
    batch_size: int,
    report: Report = silent,
) -> tuple[Adapter, Taught]:
    """An adapter from the raw vectors to the teacher's targets of the same documents.

    At `teacher_weight` 1, and in the asymmetric space, the targets are the teacher's vectors in
    its own space. Between 0 and 1 they are normalize((1 − a) student + a teacher), the teacher
    brought into the student's space first.

    Raises:
        ConchError: No document had a target, the weight is 0, or the teacher cannot be used.
    """
    weight = 1.0 if config.space == "asymmetric" else config.teacher_weight
    if weight == 0:
        raise ConchError(
            "teacher_weight is 0: the teacher would teach nothing; give a weight up to 1"
        )
    alignment = None if weight == 1 else _alignment(store, helper, without)
    report("phase", {"name": "learning", "total": store.count(RAW), "unit": "documents"})
    taught = Taught(report=report)
    dimension = int(store.identity["dimension"])
    sums: PairSums | None = None
    kept: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for rows, vectors in teacher_pairs(store, helper, taught, without=without):
        targets = vectors if alignment is None else blend(rows, alignment.apply(vectors), weight)
        sums = sums or PairSums(dimension, targets.shape[1])
        sums.add(rows, targets)
        if config.adapter == "residual":
            kept[0].append(rows)
            kept[1].append(targets)
    if sums is None:
        raise ConchError(
            f"the teacher could embed none of {store.count(RAW)} documents"
            + (f": {taught.reasons[0]}" if taught.reasons else "; ingest some first")
        )
    adapter = _solved(sums, config)
    if config.adapter == "residual":
        adapter = fit_residual(
            adapter,
            np.concatenate(kept[0]),
            np.concatenate(kept[1]),
            hidden=config.hidden,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            held_out=config.held_out,
            patience=config.patience,
            seed=config.seed,
        )
    return adapter, taught


def _solved(sums: PairSums, config: ChelationConfig) -> Adapter:
    """The linear adapter, on which a residual one stands."""
    figures = {"pairs": sums.pairs, "strength": config.ridge_strength}
    if config.adapter == "procrustes":
        return Adapter.from_matrix("procrustes", sums.rotation(), {"pairs": sums.pairs})
    if config.adapter == "low_rank":
        start = np.eye(sums.in_dimension + 1, sums.out_dimension)
        if sums.in_dimension != sums.out_dimension:
            raise ConchError(
                f"a low-rank adapter from {sums.in_dimension} to {sums.out_dimension} dimensions "
                "has no identity to stand on: use a ridge"
            )
        matrix = sums.low_rank(config.rank, start=start, strength=config.ridge_strength)
        return Adapter.from_matrix("low_rank", matrix, {**figures, "rank": config.rank})
    return Adapter.from_matrix("ridge", sums.ridge(strength=config.ridge_strength), figures)


def _alignment(
    store: VectorStore,
    helper: TeacherDistillationHelper,
    without: Sequence[DocumentId],
) -> Adapter:
    """Teacher's space to student's, from the first pairs of the store."""
    rows: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    for own, others in teacher_pairs(store, helper, Taught(), without=without):
        rows.append(own)
        vectors.append(others)
        if sum(map(len, rows)) >= ALIGNED_PAIRS:
            break
    if not rows:
        raise ConchError("the teacher could embed none of the documents: ingest some first")
    return fit_alignment(np.concatenate(vectors), np.concatenate(rows))


def scheduled_weights(config: ChelationConfig, epochs: int) -> list[float]:
    """The teacher's share of each epoch of a cycle."""
    return [
        scheduled_weight(
            config.teacher_weight_schedule,
            config.teacher_weight,
            config.teacher_weight_end,
            epoch,
            epochs,
        )
        for epoch in range(epochs)
    ]
