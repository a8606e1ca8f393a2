"""What a cycle or a distillation fits an adapter to, by the training mode.

Knows a store, its log, its versions and a teacher's helper; decides nothing about what becomes
active. Linear adapters are solved from sums, so that memory does not grow with the store; a
residual one is trained on pairs in memory. To add a mode: its name in `config.TRAINING_MODES`, and
what it asks for in `adapter_from_log`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.screen.progress import Report, silent
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter, PairSums, linear_adapter
from conch_dna.sedimentation.adapters.residual import fit_residual
from conch_dna.sedimentation.adapters.teacher_alignment import (
    fit_alignment,
    generate_hybrid_targets,
    scheduled_weights,
)
from conch_dna.sedimentation.adapters.token_table import MOST_TEXTS, TablePairs
from conch_dna.sedimentation.changes.chelation_log import ChelationLog
from conch_dna.sedimentation.changes.collapse import (
    homeostatic_targets,
    is_within,
    noise_centres,
    sample_rank,
    sampled,
)
from conch_dna.sedimentation.changes.hubs import HUBS, Hubs, held_back, hubs_of
from conch_dna.sedimentation.changes.teacher_distillation import (
    TeacherDistillationHelper,
    targets_with_fallback,
)
from conch_dna.sedimentation.changes.versions import ADAPTED, OF_TEACHER, Versions
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import DocumentId, embedded_text, embedded_texts
from conch_dna.sedimentation.embedders.contract import Embedded
from conch_dna.sedimentation.embedders.static_folder import with_table
from conch_dna.sedimentation.stores.contract import RAW, Page, VectorStore

# Pairs on which a distillation brings the two spaces together before they are mixed.
ALIGNED_PAIRS = 20_000
# Documents on which a cycle does, for each dimension.
ALIGNED_EACH = 2
# Documents that are to stay where they are, for each that is to move, and at least so many.
ANCHORS_EACH, ANCHORS = 4, 2000
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
        student: Who embeds the version's texts, if not the store's student; see `Versions.build`.
        embed: Gives the vectors of documents from their texts, where they go through no adapter.
        change: What becomes of documents' vectors before they are written; see `Versions.build`.
        steps: How many targets came from each step of the fallback chain.
        reasons: Why steps of that chain were left.
    """

    adapter: EmbeddingAdapter
    origin: dict[str, Any]
    documents: int
    student: Any = None
    embed: Callable[[list[str]], Embedded] | None = None
    change: Callable[[list[DocumentId], np.ndarray], np.ndarray] | None = None
    steps: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def adapter_from_teacher(
    store: VectorStore,
    helper: TeacherDistillationHelper,
    config: ChelationConfig,
    *,
    without: Callable[[DocumentId], bool],
    trained: Any = None,
    report: Report = silent,
) -> LearnedAdapter:
    """From the raw vectors to the teacher's targets of all documents but those held out.

    At `teacher_weight` 1, and in the asymmetric space, the targets are the teacher's vectors in
    its own space. Between 0 and 1 they are normalize((1 − a) student + a teacher), the teacher
    brought into the student's space first.

    Args:
        store: Its payloads hold the texts.
        helper: The teacher.
        config: Kind of adapter, weight, and the settings of an offline training.
        without: Whether a document is held out.
        trained: The store's student, a model2vec `StaticModel`, if its table is to be fitted, to
            MOST_TEXTS documents at most, in place of an adapter.
        report: Gets the phase, and ("advance", …) for each page; see `progress.Progress`.

    Raises:
        ConchError: No document had a target, the weight is 0, or the teacher cannot be used.
    """
    weight = 1.0 if config.space == "asymmetric" else config.teacher_weight
    if weight == 0:
        raise ConchError(
            "teacher_weight is 0: the teacher would teach nothing; give a weight up to 1"
        )
    alignment = None if weight == 1 else _first_pairs_alignment(store, helper, without)
    report("phase", {"name": "learning", "total": store.count(RAW), "unit": "documents"})
    sums: PairSums | None = None
    table = TablePairs(trained) if trained is not None else None
    if table is not None and (count := store.count(RAW)) > MOST_TEXTS:
        without = _also_without(without, MOST_TEXTS / count)
    skipped, reasons = 0, []
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for texts, rows, embedded in _teacher_pairs(store, helper, without, report):
        if embedded.errors:
            skipped += len(embedded.errors)
            reasons.append(next(iter(embedded.errors.values())))
        if not embedded.kept:
            continue
        targets = embedded.vectors
        if alignment is not None:
            targets = generate_hybrid_targets(rows, alignment.apply(targets), weight)
        sums = sums or PairSums(rows.shape[1], targets.shape[1])
        sums.add(rows, targets)
        if table is not None:
            table.add(texts, targets)
        elif config.adapter == "residual":
            pairs.append((rows, targets))
    if sums is None:
        raise ConchError(
            f"the teacher could embed none of {store.count(RAW)} documents"
            + (f": {reasons[0]}" if reasons else "; ingest some first")
        )
    student = None
    if table is not None:
        report("phase", {"name": f"fitting the table to {len(table):,} documents"})
        student = with_table(trained, table.solve(config.table_strength))
        figures = {"pairs": len(table), "strength": config.table_strength}
        adapter = replace(EmbeddingAdapter.identity(sums.out_dimension), figures=figures)
    else:
        strength, rank = config.ridge_strength, config.rank
        adapter = linear_adapter(config.adapter, sums, strength=strength, rank=rank)
    if pairs:
        rate, epochs = config.offline_learning_rate, config.offline_epochs
        offline = replace(config, learning_rate=rate, epochs=epochs)
        raw, targets = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        adapter = fit_residual(adapter, raw, targets, offline)
    return LearnedAdapter(
        adapter=adapter,
        origin={
            "documents": OF_TEACHER if config.space == "asymmetric" else ADAPTED,
            **_teacher_origin(helper),
        },
        documents=sums.pairs,
        student=student,
        steps={"teacher": sums.pairs, "skipped": skipped},
        reasons=reasons,
    )


def _teacher_pairs(
    store: VectorStore,
    helper: TeacherDistillationHelper,
    held_out: Callable[[DocumentId], bool],
    report: Report = silent,
) -> Iterator[tuple[list[str], np.ndarray, Embedded]]:
    """Texts, raw vectors `[n, D]` and the teacher's of the same documents, a page at a time."""
    for page in store.pages(RAW):
        rows = [number for number, each in enumerate(page.ids) if not held_out(each)]
        texts = [embedded_text(page.payloads[number]) for number in rows]
        embedded = helper.embed(texts)
        report("advance", {"by": len(page.ids)})
        raw = page.vectors[[rows[number] for number in embedded.kept]]
        yield [texts[number] for number in embedded.kept], raw, embedded


def _also_without(without: Callable[[DocumentId], bool], share: float) -> Callable[..., bool]:
    """What leaves out so many documents more that about this share of all is left."""

    def left_out(identifier: DocumentId) -> bool:
        return without(identifier) or not is_within(sample_rank(identifier, seed=1), share)

    return left_out


def _first_pairs_alignment(
    store: VectorStore, helper: TeacherDistillationHelper, held_out: Callable[[DocumentId], bool]
) -> EmbeddingAdapter:
    """Teacher's space to student's, from the first pairs of the store."""
    raw: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    for _, rows, embedded in _teacher_pairs(store, helper, held_out):
        raw.append(rows)
        vectors.append(embedded.vectors)
        if sum(map(len, raw)) >= ALIGNED_PAIRS:
            break
    if not any(map(len, raw)):
        raise ConchError("the teacher could embed none of the documents: ingest some first")
    return fit_alignment(np.concatenate(vectors), np.concatenate(raw))


def _teacher_origin(helper: TeacherDistillationHelper) -> dict[str, str]:
    return {"teacher": helper.teacher.name, "teacher_digest": helper.teacher.digest}


def adapter_from_log(
    versions: Versions,
    log: ChelationLog,
    helper: TeacherDistillationHelper | None,
    config: ChelationConfig,
    *,
    without: Callable[[DocumentId], bool],
) -> LearnedAdapter:
    """From hubs, or the documents that were logged in collapsed neighbourhoods often enough.

    In baseline mode hubs that are not held back yet are, and nothing else is learned then. Else a
    linear correction of the active adapter, and a residual network on top of it, are taught to move
    the logged documents and to leave a sample of the others, so that the same map serves every
    document and the queries; of both is kept what lowers the loss of held-out pairs. In baseline
    mode a document is pushed away from its noise centre; in offline mode it goes to the teacher's
    vector; in hybrid mode to the mean of both, by the schedule of the teacher's weight. Targets lie
    in the space of the active version; the adapter maps raw vectors to them. Hubs that were held
    back stay so.

    Raises:
        NothingToLearn: No document was logged so often since this version became active.
        ConchError: The active version's documents carry a teacher's vectors.
    """
    store, active = versions.store, versions.active
    if versions.origin(active)["documents"] != ADAPTED:
        raise ConchError(
            f"queries and documents of version {active} are not of one model, and no cycle moves "
            "either: roll back to a symmetric version first"
        )
    known, hubs = versions.origin(active).get(HUBS), None
    if known or config.training_mode == "baseline":
        hubs = hubs_of(versions, neighbours=config.top_k, seed=config.seed, without=without)
        if config.training_mode == "baseline" and hubs.shares and known != hubs.digest:
            return _without_hubs(versions, hubs)
    logged = log.documents_logged(at_least=config.threshold, version=active)
    chosen = [each for each in logged if not without(each)]
    if not chosen:
        raise NothingToLearn(
            f"no document was in {config.threshold} or more collapsed neighbourhoods of version "
            f"{active}: {len(log)} events are in the log; ask more queries, or lower the threshold"
        )
    adapter = versions.adapter(active)
    page = store.get(chosen, RAW)
    own = versions.before_adapter(active, page)
    current = adapter.apply(own)
    teacher = None if config.training_mode == "baseline" else helper
    push = partial(
        homeostatic_targets,
        centres=_noise_centres(versions, log, page),
        push=config.homeostatic_push,
    )
    chain = targets_with_fallback(
        embedded_texts(page.payloads),
        current,
        helper=teacher,
        homeostatic=None if config.training_mode == "offline" else push,
        alignment=_sample_alignment(versions, teacher, without, config) if teacher else None,
    )
    weights = scheduled_weights(config)
    moving, count = set(chosen), max(ANCHORS, ANCHORS_EACH * len(chosen))
    still = partial(sampled, store, sample=count, seed=config.seed)
    anchors = versions.before_adapter(
        active, still(without=lambda each: each in moving or without(each))
    )
    rows = np.concatenate([own[chain.kept], anchors])
    stay = adapter.apply(anchors)

    def targets_of(epoch: int) -> np.ndarray:
        targets = chain.targets
        if teacher is not None:
            targets = generate_hybrid_targets(chain.without_teacher, targets, weights[epoch])
        return np.concatenate([targets, stay])

    start = corrected(adapter, rows, targets_of(config.epochs - 1), config)
    learned = fit_residual(start, rows, targets_of, config)
    if not learned.figures["best_epoch"]:
        # The network added nothing: what stands without it is faster, and can be exported.
        learned = start
    if learned is adapter:
        raise NothingToLearn(
            f"training on {len(chosen)} documents did not lower the loss of held-out pairs: ask "
            "more queries first, or change the learning rate, the epochs or the teacher's weight"
        )
    return LearnedAdapter(
        adapter=learned,
        origin={
            "documents": ADAPTED,
            "on": active,
            "threshold": config.threshold,
            "events": len(log),
            **({HUBS: known} if known else {}),
            **(_teacher_origin(teacher) if teacher else {}),
        },
        documents=len(chosen),
        student=versions.student_to_keep(active),
        change=partial(held_back, shares=hubs.shares) if known and hubs else None,
        steps=chain.counts,
        reasons=chain.reasons,
    )


def _without_hubs(versions: Versions, hubs: Hubs) -> LearnedAdapter:
    """The active version with its hubs held back; another dimension takes what they lose."""
    active = versions.active
    adapter = versions.adapter(active)
    if HUBS not in versions.origin(active):
        adapter = adapter.widened()
    return LearnedAdapter(
        adapter=replace(adapter, figures={**adapter.figures, **hubs.figures()}),
        origin={"documents": ADAPTED, "on": active, HUBS: hubs.digest},
        documents=len(hubs.shares),
        student=versions.student_to_keep(active),
        change=partial(held_back, shares=hubs.shares),
    )


def corrected(
    adapter: EmbeddingAdapter, rows: np.ndarray, targets: np.ndarray, config: ChelationConfig
) -> EmbeddingAdapter:
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
    judging, training = order[:held_out], order[held_out:]

    def loss(candidate: EmbeddingAdapter) -> float:
        return float(1 - (candidate.apply(rows[judging]) * targets[judging]).sum(axis=1).mean())

    def fitted(places: np.ndarray, strength: float) -> EmbeddingAdapter:
        sums = PairSums.of(rows[places], targets[places])
        rank = min(sums.in_dimension + 1, sums.out_dimension)
        matrix = sums.low_rank(rank, start=adapter.matrix, strength=strength)
        figures = {"pairs": len(places), "strength": strength}
        return EmbeddingAdapter.from_matrix("ridge", matrix, figures)

    losses = {strength: loss(fitted(training, strength)) for strength in STRENGTHS}
    best = min(losses, key=lambda strength: losses[strength])
    before = loss(adapter)
    if losses[best] >= before:
        return adapter
    ridge = fitted(order, best)
    figures = {**ridge.figures, "loss_before": before, "loss_after": losses[best]}
    return replace(ridge, figures=figures)


def _noise_centres(versions: Versions, log: ChelationLog, page: Page) -> np.ndarray:
    """Of logged documents, in the space of the active version, whose events they are of."""
    chosen, active = set(page.ids), versions.active
    events = [event.neighbourhood for event in log.events(version=active)]
    events = [members for members in events if chosen & set(members)]
    members = list(dict.fromkeys(each for members in events for each in members))
    crowd = versions.store.get(members, RAW)
    rows = versions.adapter(active).apply(versions.before_adapter(active, crowd))
    vectors = dict(zip(crowd.ids, rows, strict=True))
    return noise_centres(events, page.ids, vectors)


def _sample_alignment(
    versions: Versions,
    helper: TeacherDistillationHelper,
    held_out: Callable[[DocumentId], bool],
    config: ChelationConfig,
) -> EmbeddingAdapter | None:
    """The teacher's space to the version's, by a sample of the corpus.

    The logged documents alone are few, and all of one crowd. None where the teacher cannot be
    asked, which the fallback chain will say.
    """
    adapter = versions.adapter(versions.active)
    try:
        wider = max(helper.teacher.dimension, adapter.out_dimension)
        count = ALIGNED_EACH * wider
        page = sampled(versions.store, sample=count, seed=config.seed, without=held_out)
        embedded = helper.embed(embedded_texts(page.payloads))
    except ConchError:
        return None
    if not embedded.kept:
        return None
    own = versions.before_adapter(versions.active, page)
    return fit_alignment(embedded.vectors, adapter.apply(own[embedded.kept]))
