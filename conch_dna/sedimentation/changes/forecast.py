"""What another embedding model would be worth to a store, told from a sample of its documents.

Knows a store, a model and held-out queries; writes nothing. Three ways are compared: to keep what
answers now, to let queries go to the new model and bring the old vectors to it by a map (bridge),
and to embed all documents anew.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.metrics import paired_interval
from conch_dna.screen.progress import Report, silent
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter
from conch_dna.sedimentation.changes.collapse import sampled
from conch_dna.sedimentation.changes.heldout_queries import (
    Evidence,
    best_documents,
    measures,
    rankings_of,
)
from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
from conch_dna.sedimentation.changes.upgrades import bridge_of, bridged_unseen
from conch_dna.sedimentation.changes.versions import OF_TEACHER, Versions
from conch_dna.sedimentation.documents import DocumentId, embedded_texts
from conch_dna.sedimentation.embedders.contract import Embedder
from conch_dna.sedimentation.retrieval import NDCG_AT, dcg_at_k
from conch_dna.sedimentation.stores.contract import RAW, Page

FEWEST_SAMPLED, FEWEST_QUERIES = 100, 20
# Documents of each query's old and bridged rankings that the new model reads.
NEAR = 10
# Bins of bridged scores, from -1 to 1; and where, in standard deviations from a query's mean,
# another spread about them begins, if it is told by as many pairs.
BINS, STEPS, FEWEST_LEFT = 800, (0.0, 1.0, 2.0, 3.0), 50
# Documents by which the new model's pace is taken.
TIMED = 32


class Outlook(NamedTuple):
    """What is expected of a figure: its mean, and a 95% interval that resamples queries."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to go, and what comes of it.

    Attributes:
        name: "keep", "bridge" or "reembed".
        ndcg: Of held-out queries.
        agreement: Share of the new model's own ten best documents among its ten best.
        documents: How many the new model must read.
        seconds: How long that takes here.
        price: What it costs.
    """

    name: str
    ndcg: Outlook
    agreement: Outlook
    documents: int
    seconds: float
    price: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What was foretold, and from how much.

    Attributes:
        model: The new one.
        ways: Keep, bridge, reembed.
        documents: Of the store.
        read: How many of them the new model read for this.
        queries: Held-out queries that were asked.
        judged: Whether they have judgements; else they were made from documents.
        per_thousand: Seconds and price of 1,000 documents.
    """

    model: str
    ways: list[Way]
    documents: int
    read: int
    queries: int
    judged: bool
    per_thousand: tuple[float, float]


def forecast(
    versions: Versions,
    helper: TeacherDistillationHelper,
    evidence: Evidence,
    *,
    sample: int,
    price: float,
    seed: int,
    report: Report = silent,
) -> Forecast:
    """Compare the three ways on held-out queries.

    What answers now is measured, and so is a bridge, since it is fitted to the sample and maps
    vectors that are there. What all documents would be worth under the new model is not: it reads
    the sample, and of each query the documents nearest by the other two. Of the others the bridged
    scores are known. How the new model's scores lie about those is told by what it has read, under
    bridges that did not see it: a line for each query, and what is left over in all of them, by how
    near a document is. So it is told how many of the others stand above a document, on average;
    their number is taken as Poisson-distributed.

    Args:
        versions: Of the store.
        helper: The new model, whose vectors are cached.
        evidence: Held-out queries.
        sample: Documents drawn at random, which the bridge is fitted to.
        price: Of 1,000 documents.
        seed: Of the draw and of resampling.
        report: Gets the phases; see `progress.Progress`.

    Raises:
        ConchError: Too few documents or queries to tell anything, or a model cannot be used.
    """
    store, active = versions.store, versions.active
    count = store.count(RAW)
    if not 0 <= price < math.inf:
        raise ConchError(f"a price of {price} is none: give what 1,000 documents cost, or 0")
    versions.require(active, helper.teacher)
    if sample < FEWEST_SAMPLED or len(evidence.names) < FEWEST_QUERIES:
        raise ConchError(
            f"{sample:,} documents and the {len(evidence.names)} held-out queries that the store "
            f"gives are too few to tell from: it takes {FEWEST_SAMPLED} and {FEWEST_QUERIES}"
        )
    drawn = sampled(store, sample=sample, seed=seed, without=evidence.holds_out)
    if len(drawn.ids) < FEWEST_SAMPLED:
        raise ConchError(
            f"the store has {len(drawn.ids):,} documents to learn from, too few to tell from: it "
            f"takes {FEWEST_SAMPLED}"
        )
    report("phase", {"name": f"{len(drawn.ids):,} sampled documents by the new model"})
    pace = _pace(helper.only, drawn)
    known = _Known(helper)
    drawn = known.read(drawn)
    targets = known.vectors
    bridge = bridge_of(drawn.vectors, targets, seed=seed)
    queries = helper.get_teacher_embeddings(evidence.texts, queries=True)
    old = versions.embed([active], evidence.texts, queries=True, what="held-out queries")[active]
    kept = rankings_of(store, old, version=active, top_k=NEAR + 1)
    bridged = best_documents(_mapped(store, bridge), queries, top_k=NEAR + 1)
    wanted = {each for row in (*kept, *bridged) for each in row}
    wanted |= {each for row in evidence.judgements.values() for each in row}
    missing = sorted((each for each in wanted if each not in known.places), key=str)
    there = store.get([*store.digests(missing)], RAW)
    report("phase", {"name": f"{len(there.ids):,} documents near queries by the new model"})
    there = known.read(there)

    strength = float(bridge.figures["strength"])
    unseen = bridged_unseen(drawn.vectors, targets, strength=strength, seed=seed)
    if there.ids:
        unseen = np.concatenate([unseen, bridge.apply(there.vectors)])
    table = queries @ known.vectors.T
    # Judged ones were not chosen by their bridged scores alone.
    told = np.ones(table.shape, bool)
    for row, name in zip(told, evidence.names, strict=True):
        row[[known.places[each] for each in evidence.judgements[name] if each in known.places]] = 0
    unread = Unread(new=table, bridged=queries @ unseen.T, told=told)
    for _, vectors in _mapped(store, bridge, known.places):
        unread.add(queries @ vectors.T)
    scores = _Scores(known, queries, table, unread)
    bridged_rests = new_rests = None
    if evidence.pseudo:
        raw = versions.embed([RAW], evidence.rests, queries=False, what="documents")[RAW]
        bridged_rests = bridge.apply(raw)
        new_rests = helper.get_teacher_embeddings(evidence.rests)
    # Where it is no teacher's, its agreement would take all documents.
    of_teacher = versions.origin(active)["documents"] == OF_TEACHER
    own_helper = helper if of_teacher else None
    keep = measures(versions, evidence, [active], own_helper)[f"nDCG@{NDCG_AT}"][0]
    figures = {
        "keep": (keep, scores.agreement(kept, evidence)),
        "bridge": (
            _bridged_ndcg(store, bridge, queries, evidence, bridged_rests),
            scores.agreement(bridged, evidence),
        ),
        "reembed": (scores.ndcg(evidence, new_rests), np.ones(len(queries))),
    }
    read = {"keep": 0, "bridge": len(drawn.ids), "reembed": count}
    ways = [
        Way(
            name=name,
            ndcg=_outlook(ndcg, seed),
            agreement=_outlook(agreement, seed),
            documents=read[name],
            seconds=read[name] * pace,
            price=read[name] * price / 1000,
        )
        for name, (ndcg, agreement) in figures.items()
    ]
    return Forecast(
        model=helper.teacher.name,
        ways=ways,
        documents=count,
        read=len(known.places),
        queries=len(queries),
        judged=not evidence.pseudo,
        per_thousand=(1000 * pace, price),
    )


def _outlook(figures: np.ndarray, seed: int) -> Outlook:
    bounds = paired_interval(figures, np.zeros(len(figures)), confidence=0.95, seed=seed)
    return Outlook(float(figures.mean()), *bounds)


def _pace(embedder: Embedder, page: Page) -> float:
    """Seconds that a model takes for a document, after a first one that loads it."""
    texts = embedded_texts(page.payloads[: TIMED + 1])
    embedder.documents(texts[:1])
    began = time.perf_counter()
    embedder.documents(texts[1:])
    return (time.perf_counter() - began) / max(1, len(texts) - 1)


class _Known:
    """Documents that the new model has read."""

    def __init__(self, helper: TeacherDistillationHelper) -> None:
        self.helper = helper
        self.places: dict[DocumentId, int] = {}
        self._rows: list[np.ndarray] = []

    def read(self, page: Page) -> Page:
        """Embed documents; gives those that could be, in their order."""
        embedded = self.helper.embed(embedded_texts(page.payloads))
        kept = [page.ids[number] for number in embedded.kept]
        self._rows.append(embedded.vectors)
        for each in kept:
            self.places[each] = len(self.places)
        payloads = [page.payloads[number] for number in embedded.kept]
        return Page(kept, page.vectors[embedded.kept], payloads)

    @property
    def vectors(self) -> np.ndarray:
        """`[K, E]` in the order of `places`."""
        return np.concatenate(self._rows)


def _mapped(
    store: Any, bridge: EmbeddingAdapter, without: Iterable[DocumentId] = ()
) -> Iterator[tuple[list[DocumentId], np.ndarray]]:
    """The bridged vectors of all documents but some, a page at a time."""
    left_out = set(without)
    for page in store.pages(RAW):
        rows = [number for number, each in enumerate(page.ids) if each not in left_out]
        yield [page.ids[number] for number in rows], bridge.apply(page.vectors[rows])


def _bridged_ndcg(
    store: Any,
    bridge: EmbeddingAdapter,
    queries: np.ndarray,
    evidence: Evidence,
    rests: np.ndarray | None,
) -> np.ndarray:
    """What a bridge would be worth, query by query; held-out documents stand as their rests."""

    def pages() -> Iterator[tuple[list[DocumentId], np.ndarray]]:
        yield from _mapped(store, bridge, evidence.left_out)
        if rests is not None:
            yield evidence.left_out, rests

    return evidence.evaluate(best_documents(pages(), queries, top_k=NDCG_AT)).ndcg


class _Scores:
    """What the new model makes of queries, as far as it has read the documents.

    Args:
        known: Documents that it has read.
        queries: Its vectors of the queries `[Q, E]`.
        table: Their products with those of the documents `[Q, K]`.
        unread: What is known of the others.
    """

    def __init__(
        self, known: _Known, queries: np.ndarray, table: np.ndarray, unread: "Unread"
    ) -> None:
        self.known = known
        self.queries = queries
        self.table = table
        self.unread = unread

    def ndcg(self, evidence: Evidence, rests: np.ndarray | None) -> np.ndarray:
        """Expected nDCG@10, query by query `[Q]`; held-out documents stand as their rests."""
        places, table = dict(self.known.places), self.table
        if rests is not None:
            left_out = set(evidence.left_out)
            stay = [place for each, place in places.items() if each not in left_out]
            table = np.concatenate([table[:, stay], self.queries @ rests.T], axis=1)
            places = {each: len(stay) + n for n, each in enumerate(evidence.left_out)}
        found = np.zeros(len(table))
        for number, name in enumerate(evidence.names):
            grades = {each: grade for each, grade in evidence.judgements[name].items() if grade > 0}
            row = table[number]
            for each, grade in grades.items():
                if each in places:
                    score = row[places[each]]
                    certain = above_in(row, score)
                    found[number] += grade * expected_gain(
                        certain, self.unread.above(number, score)
                    )
            found[number] /= dcg_at_k(sorted(grades.values(), reverse=True))
        return np.minimum(found, 1.0)

    def agreement(self, rankings: Sequence[Sequence[DocumentId]], evidence: Evidence) -> np.ndarray:
        """Expected share of the new model's ten best among the ten best of rankings `[Q]`.

        A document that a query was taken from does not count.
        """
        left_out: Sequence[DocumentId | None] = evidence.left_out or [None] * len(rankings)
        shares = np.zeros(len(rankings))
        for number, (ranking, own) in enumerate(zip(rankings, left_out, strict=True)):
            row = self.table[number]
            top = [each for each in ranking if each != own][:NDCG_AT]
            for each in top:
                # The new model cannot read every document.
                if each not in self.known.places:
                    continue
                score = row[self.known.places[each]]
                certain = above_in(row, score)
                if own in self.known.places and row[self.known.places[own]] > score:
                    certain -= 1
                shares[number] += chance_of_rank(certain, self.unread.above(number, score))
            shares[number] /= max(1, len(top))
        return shares


def above_in(row: np.ndarray, score: float) -> int:
    """How many of scores stand above one that is among them; of equal ones half do."""
    return int((row > score).sum() + ((row == score).sum() - 1) // 2)


class Unread:
    """How many documents that a model has not read it would score above others.

    Args:
        new: Its scores of documents that it has read, `[Q, K]`.
        bridged: The bridge's of the same, `[Q, K]`.
        told: Which of these pairs tell how its scores lie about the bridge's, `[Q, K]`.
    """

    def __init__(self, new: np.ndarray, bridged: np.ndarray, told: np.ndarray) -> None:
        count = np.maximum(told.sum(axis=1, keepdims=True), 1)

        def mean(rows: np.ndarray) -> np.ndarray:
            return np.asarray((rows * told).sum(axis=1, keepdims=True) / count)

        self.centre = mean(bridged)
        self.spread = np.sqrt(np.maximum(mean((bridged - self.centre) ** 2), 1e-12))
        standard = (bridged - self.centre) / self.spread
        self.level, self.slope = mean(new), mean((new - mean(new)) * standard)
        left = new - self.level - self.slope * standard
        groups = np.searchsorted(STEPS, standard)
        # A group of few takes what is left over in the one before.
        self.left: list[np.ndarray] = []
        for group in range(len(STEPS) + 1):
            found = np.sort(left[told & (groups == group)])
            self.left.append(found if len(found) >= FEWEST_LEFT or not group else self.left[-1])
        self.edges = np.linspace(-1, 1, BINS + 1)
        self.counts = np.zeros((len(new), BINS))

    def add(self, bridged: np.ndarray) -> None:
        """Count documents by their bridged scores `[Q, m]`."""
        places = np.clip(np.searchsorted(self.edges, bridged) - 1, 0, BINS - 1)
        for counts, row in zip(self.counts, places, strict=True):
            counts += np.bincount(row, minlength=BINS)

    def above(self, number: int, score: float) -> float:
        """How many are expected above a score of a query, by its number."""
        bins = np.flatnonzero(self.counts[number])
        middles = (self.edges[bins] + self.edges[bins + 1]) / 2
        standard = (middles - self.centre[number]) / self.spread[number]
        needed = score - self.level[number] - self.slope[number] * standard
        groups = np.searchsorted(STEPS, standard)
        expected = 0.0
        for group in np.unique(groups):
            here, left = groups == group, self.left[group]
            # Of equal ones half stand above.
            both = (np.searchsorted(left, needed[here], side=side) for side in ("left", "right"))
            shares = 1 - sum(both) / max(1, 2 * len(left))
            expected += float(self.counts[number, bins[here]] @ shares)
        return expected


def expected_gain(certain: int, others: float) -> float:
    """Mean of 1 / log2(rank + 1) within the first ten.

    Args:
        certain: How many stand above.
        others: Mean of how many more do, Poisson-distributed.

    >>> expected_gain(0, 0.0), expected_gain(2, 0.0), expected_gain(10, 0.0)
    (1.0, 0.5, 0.0)
    """
    chances = enumerate(_poisson(others, NDCG_AT - certain))
    return sum((chance / math.log2(certain + more + 2) for more, chance in chances), 0.0)


def chance_of_rank(certain: int, others: float) -> float:
    """Chance to be among the first ten, with as many above as `expected_gain` says."""
    return sum(_poisson(others, NDCG_AT - certain), 0.0)


def _poisson(mean: float, count: int) -> Iterator[float]:
    """Chances of 0, 1, … count − 1."""
    chance = math.exp(-mean)
    for number in range(max(0, count)):
        yield chance
        chance *= mean / (number + 1)
