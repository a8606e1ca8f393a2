"""What a cycle or a distillation teaches an adapter, by the training mode.

Knows a store, its log, its versions and a teacher's helper; decides nothing about what becomes
active. To add a mode: a branch in `cycle_adapter`, and its name in `config.TRAINING_MODES`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.progress import Report, silent
from conch_dna.sedimentation.adapters.adapter import Adapter
from conch_dna.sedimentation.adapters.closed_forms import sums_of
from conch_dna.sedimentation.adapters.fitting import fit_to_teacher, scheduled_weights
from conch_dna.sedimentation.adapters.residual import fit_residual
from conch_dna.sedimentation.adapters.teacher_alignment import blend, fit_alignment
from conch_dna.sedimentation.changes.chelation_log import ChelationLog
from conch_dna.sedimentation.changes.collapse import homeostatic_targets, noise_centres, sampled_ids
from conch_dna.sedimentation.changes.fallback_targets import STEPS, targets_with_fallback
from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
from conch_dna.sedimentation.changes.versions import ADAPTED, OF_TEACHER, Versions
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import DocumentId, embedded_text
from conch_dna.sedimentation.stores.contract import RAW, VectorStore

# Documents that are to stay where they are, for each that is to move, and at least so many.
ANCHORS_EACH, ANCHORS = 4, 200
# Documents that the teacher's space is brought into the version's by, for each dimension.
ALIGNED_EACH = 2
# Of the linear correction's ridge.
STRENGTHS = (0.1, 1.0, 10.0, 100.0)


class NothingToLearn(Exception):
    """Why there is nothing for an adapter to learn."""


@dataclass(frozen=True, kw_only=True)
class LearnedAdapter:
    """An adapter and where it comes from.

    Attributes:
        adapter: From raw vectors.
        origin: For its folder; `documents` says what the documents carry.
        documents: How many it learned from.
        steps: How many targets came from each step of the fallback chain.
        reasons: Why steps of that chain were left.
    """

    adapter: Adapter
    origin: dict[str, Any]
    documents: int
    steps: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def distilled_adapter(
    store: VectorStore,
    helper: TeacherDistillationHelper,
    config: ChelationConfig,
    *,
    without: Sequence[DocumentId],
    report: Report = silent,
) -> LearnedAdapter:
    """From a teacher's vectors of all documents but those held out; see `fit_to_teacher`."""
    adapter, taught = fit_to_teacher(
        store,
        helper,
        config,
        without=without,
        learning_rate=config.offline_learning_rate,
        epochs=config.offline_epochs,
        batch_size=config.batch_size,
        report=report,
    )
    teacher = helper.teacher
    return LearnedAdapter(
        adapter=adapter,
        origin={
            "documents": OF_TEACHER if config.space == "asymmetric" else ADAPTED,
            "teacher": teacher.name,
            "teacher_digest": teacher.digest,
        },
        documents=taught.documents,
        steps=taught.steps,
        reasons=taught.reasons,
    )


def cycle_adapter(
    store: VectorStore,
    versions: Versions,
    log: ChelationLog,
    helper: TeacherDistillationHelper | None,
    config: ChelationConfig,
    *,
    without: Sequence[DocumentId],
) -> LearnedAdapter:
    """From the documents that were logged in collapsed neighbourhoods often enough.

    A linear correction of the active adapter, and a residual network on top of it, are taught to
    move them and to leave a sample of the others, so that the same map still serves every document
    and the queries; of both is kept what lowers the loss of held-out pairs. In baseline mode
    a document is pushed away from its noise centre; in offline mode it goes to the teacher's
    vector; in hybrid mode to the blend of both, by the schedule of the teacher's weight. All of it
    happens in the space of the active version, from raw vectors.

    Raises:
        NothingToLearn: No document was logged so often since this version became active.
        ConchError: The active version's documents carry a teacher's vectors.
    """
    active = versions.active
    if versions.origin(active)["documents"] == OF_TEACHER:
        raise ConchError(
            f"the documents of version {active} carry the teacher's vectors, which no cycle moves: "
            "roll back to a symmetric version first"
        )
    held_out = set(without)
    logged = log.documents_logged(at_least=config.threshold, version=active)
    chosen = [each for each in logged if each not in held_out]
    if not chosen:
        raise NothingToLearn(
            f"no document was in {config.threshold} or more collapsed neighbourhoods of version "
            f"{active}: {len(log)} events are in the log; ask more queries, or lower the threshold"
        )
    adapter = versions.adapter(active)
    moved, texts, raw, centres = _logged(store, log, adapter, chosen, active)
    own = adapter.apply(raw)
    steps = dict.fromkeys(STEPS, 0)
    reasons: list[str] = []
    weights = scheduled_weights(config, config.epochs)
    modes = {"baseline": (True, False), "offline": (False, True), "hybrid": (True, True)}
    pushes, asks = modes[config.training_mode]

    def pushed(rows: np.ndarray) -> np.ndarray:
        found, still = homeostatic_targets(rows, centres, push=config.homeostatic_push)
        # Rows on their centre have no direction; the chain takes them on.
        found[still] = np.nan
        return found

    alignment = _alignment(store, adapter, helper, held_out, config) if asks and helper else None

    def made(helper: TeacherDistillationHelper | None, push: bool) -> Any:
        return targets_with_fallback(
            texts,
            own,
            helper=helper,
            homeostatic=pushed if push else None,
            alignment=alignment,
        )

    first = made(helper if asks else None, pushes)
    steps.update(first.counts)
    reasons += first.reasons
    without_teacher = made(None, pushes).targets if asks and pushes else first.targets
    anchors = _anchors(store, {*moved, *held_out}, config)
    rows = np.concatenate([raw[first.kept], anchors])
    stay = adapter.apply(anchors)

    def targets_of(epoch: int) -> np.ndarray:
        targets = first.targets
        if asks and pushes:
            targets = blend(without_teacher, first.targets, weights[epoch])
        elif asks:
            targets = blend(own[first.kept], first.targets, weights[epoch])
        return np.concatenate([targets, stay])

    start = corrected(adapter, rows, targets_of(config.epochs - 1), config)
    grown = fit_residual(
        start,
        rows,
        targets_of,
        hidden=config.hidden,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        held_out=config.held_out,
        patience=config.patience,
        seed=config.seed,
    )
    if not grown.figures["best_epoch"]:
        # The network added nothing: what stands without it is faster, and can be exported.
        grown = start
    if grown is adapter:
        raise NothingToLearn(
            f"training on {len(chosen)} documents did not lower the loss of held-out pairs: ask "
            "more queries first, or change the learning rate, the epochs or the teacher's weight"
        )
    origin: dict[str, Any] = {
        "documents": ADAPTED,
        "on": active,
        "threshold": config.threshold,
        "events": len(log),
    }
    if asks and helper is not None:
        origin |= {"teacher": helper.teacher.name, "teacher_digest": helper.teacher.digest}
    return LearnedAdapter(
        adapter=grown, origin=origin, documents=len(moved), steps=steps, reasons=reasons
    )


def corrected(
    adapter: Adapter, rows: np.ndarray, targets: np.ndarray, config: ChelationConfig
) -> Adapter:
    """The adapter with the best linear correction, or itself where none is better.

    The correction is a ridge on top of it, with the one of STRENGTHS that has the lowest loss,
    1 − mean cosine, on pairs held out by the seed; then fitted to all pairs.

    Args:
        adapter: Of any kind; a residual one is left as it is.
        rows: Raw vectors `[N, D]`.
        targets: `[N, E]`.
        config: Share of held-out pairs, and seed.
    """
    held_out = int(config.held_out * len(rows))
    if adapter.kind == "residual" or not 0 < held_out < len(rows):
        return adapter
    order = np.random.default_rng(config.seed).permutation(len(rows))
    judged, taught = order[:held_out], order[held_out:]

    def loss(candidate: Adapter) -> float:
        return float(1 - (candidate.apply(rows[judged]) * targets[judged]).sum(axis=1).mean())

    def fitted(places: np.ndarray, strength: float) -> Adapter:
        sums = sums_of(rows[places], targets[places])
        rank = min(sums.in_dimension + 1, sums.out_dimension)
        matrix = sums.low_rank(rank, start=adapter.matrix, strength=strength)
        figures = {"pairs": len(places), "strength": strength}
        return Adapter.from_matrix("ridge", matrix, figures)

    losses = {strength: loss(fitted(taught, strength)) for strength in STRENGTHS}
    best = min(losses, key=lambda strength: losses[strength])
    before = loss(adapter)
    if losses[best] >= before:
        return adapter
    found = fitted(order, best)
    figures = {**found.figures, "loss_before": before, "loss_after": losses[best]}
    return replace(found, figures=figures)


def _logged(
    store: VectorStore,
    log: ChelationLog,
    adapter: Adapter,
    chosen: Sequence[DocumentId],
    version: str,
) -> tuple[list[DocumentId], list[str], np.ndarray, np.ndarray]:
    """Ids, texts, raw vectors and noise centres (in the version's space) of logged documents."""
    page = store.get(list(chosen), RAW)
    neighbourhoods = [event.neighbourhood for event in log.events(version=version)]
    wanted = set(page.ids)
    neighbourhoods = [members for members in neighbourhoods if wanted & set(members)]
    members = list(dict.fromkeys(each for ids in neighbourhoods for each in ids))
    crowd = store.get(members, RAW)
    vectors = dict(zip(crowd.ids, adapter.apply(crowd.vectors), strict=True))
    centres = noise_centres(neighbourhoods, page.ids, vectors)
    texts = [embedded_text(payload) for payload in page.payloads]
    return page.ids, texts, page.vectors, centres


def _alignment(
    store: VectorStore,
    adapter: Adapter,
    helper: TeacherDistillationHelper,
    held_out: set[DocumentId],
    config: ChelationConfig,
) -> Adapter | None:
    """The teacher's space to the version's, by a sample of the corpus.

    The logged documents alone are few, and all of one crowd. None where the teacher cannot be
    asked, which the fallback chain will say.
    """
    others = (each for page in store.pages(RAW) for each in page.ids if each not in held_out)
    try:
        wider = max(helper.teacher.dimension, adapter.out_dimension)
        ids = sampled_ids(others, sample=ALIGNED_EACH * wider, seed=config.seed)
        page = store.get(ids, RAW)
        found = helper.embed([embedded_text(payload) for payload in page.payloads])
    except ConchError:
        return None
    if not found.kept:
        return None
    return fit_alignment(found.vectors, adapter.apply(page.vectors[found.kept]))


def _anchors(store: VectorStore, moved: set[DocumentId], config: ChelationConfig) -> np.ndarray:
    """Raw vectors of a sample of the documents that are to stay, `[n, D]`."""
    others = (each for page in store.pages(RAW) for each in page.ids if each not in moved)
    count = max(ANCHORS, ANCHORS_EACH * len(moved))
    ids = sampled_ids(others, sample=count, seed=config.seed)
    if not ids:
        return np.zeros((0, int(store.identity["dimension"])), np.float32)
    return store.get(ids, RAW).vectors
