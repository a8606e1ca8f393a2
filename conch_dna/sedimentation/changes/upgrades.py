"""Another embedding model for a store: a map between the two, or all documents anew.

Knows a store's pages and a model's helper; decides nothing about what becomes active.
"""

from collections.abc import Callable

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.screen.progress import Report, silent
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter, PairSums
from conch_dna.sedimentation.changes.collapse import sampled
from conch_dna.sedimentation.changes.cycles import LearnedAdapter
from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
from conch_dna.sedimentation.changes.versions import ADAPTED, BRIDGED, Versions
from conch_dna.sedimentation.documents import DocumentId, embedded_texts
from conch_dna.sedimentation.stores.contract import RAW

WAYS = ("bridge", "reembed")
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
FOLDS, FEWEST_PAIRS = 5, 20


def bridge_of(raw: np.ndarray, targets: np.ndarray, *, seed: int) -> EmbeddingAdapter:
    """The ridge from a store's raw vectors to another model's.

    Its strength is the one of STRENGTHS that is best for pairs that bridges did not see.

    Args:
        raw: Unit `[N, D]`, N at least 5.
        targets: Of the same documents, unit `[N, E]`.
        seed: Of what they do not see.
    """

    def nearness(strength: float) -> float:
        mapped = bridged_unseen(raw, targets, strength=strength, seed=seed)
        return float((mapped * targets).sum(axis=1).mean())

    return _fitted(raw, targets, max(STRENGTHS, key=nearness))


def bridged_unseen(
    raw: np.ndarray, targets: np.ndarray, *, strength: float, seed: int
) -> np.ndarray:
    """Vectors `[N, E]` of pairs by bridges that were fitted to the others, a fifth at a time.

    Args:
        raw: Unit `[N, D]`, N at least 5.
        targets: Unit `[N, E]`.
        strength: Of the ridges.
        seed: Of which go together.
    """
    order = np.random.default_rng(seed).permutation(len(raw))
    mapped = np.zeros_like(targets)
    for part in np.array_split(order, FOLDS):
        others = np.setdiff1d(order, part)
        mapped[part] = _fitted(raw[others], targets[others], strength).apply(raw[part])
    return mapped


def _fitted(raw: np.ndarray, targets: np.ndarray, strength: float) -> EmbeddingAdapter:
    matrix = PairSums.of(raw, targets).ridge(strength=strength)
    figures = {"pairs": len(raw), "strength": strength}
    return EmbeddingAdapter.from_matrix("ridge", matrix, figures)


def upgraded(
    versions: Versions,
    helper: TeacherDistillationHelper,
    way: str,
    *,
    sample: int,
    seed: int,
    without: Callable[[DocumentId], bool],
    report: Report = silent,
) -> LearnedAdapter:
    """A version whose queries go to another model.

    Args:
        versions: Of the store.
        helper: The other model, whose vectors are cached, so that what was embedded stays.
        way: "bridge": documents keep their raw vectors, brought to the model's by a map that is
            fitted to a sample. "reembed": the model reads them all.
        sample: Documents of the bridge.
        seed: Of the sample.
        without: Whether a document is held out.
        report: Gets the phase; see `progress.Progress`.

    Raises:
        ConchError: The model cannot be used, or cannot embed a document.
    """
    store = versions.store
    origin = {"teacher": helper.teacher.name, "teacher_digest": helper.teacher.digest}
    if way == "bridge":
        report("phase", {"name": "a sample by the new model"})
        page = sampled(store, sample=sample, seed=seed, without=without)
        embedded = helper.embed(embedded_texts(page.payloads))
        if len(embedded.kept) < FEWEST_PAIRS:
            raise ConchError(
                f"{len(embedded.kept)} documents are too few to fit a bridge to, it takes "
                f"{FEWEST_PAIRS}: ingest more first, or give another model"
            )
        return LearnedAdapter(
            adapter=bridge_of(page.vectors[embedded.kept], embedded.vectors, seed=seed),
            origin={"documents": BRIDGED, **origin},
            documents=len(embedded.kept),
            student=helper.only,
        )
    return LearnedAdapter(
        adapter=EmbeddingAdapter.identity(helper.teacher.dimension),
        origin={"documents": ADAPTED, **origin},
        documents=store.count(RAW),
        student=helper.only,
        embed=helper.embed,
    )
