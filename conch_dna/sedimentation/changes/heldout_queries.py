"""Held-out queries of a store, and what versions of its vectors make of them.

Knows a store, embedders and rankings; decides nothing. To judge by another measure: an entry of
what `measures` gives.
"""

import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.changes.collapse import is_within, sample_rank
from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
from conch_dna.sedimentation.changes.versions import OF_TEACHER, Versions
from conch_dna.sedimentation.documents import TEXT, TITLE, DocumentId, embedded_texts
from conch_dna.sedimentation.retrieval import (
    NDCG_AT,
    RECALL_AT,
    Evaluation,
    Judgements,
    evaluate_rankings,
    with_relevant,
)
from conch_dna.sedimentation.stores.contract import RAW, VectorStore

QUERIES_AT_ONCE = 256
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Less than this names no document; less than this of a text is not worth finding.
FEWEST_WORDS = 3
# Documents that queries are taken from, of all; the others are learned from.
RESERVED_SHARE = 0.25
# Fewer unused queries than this share of what the documents could give, and all are used again.
FEWEST_UNUSED = 0.5


class Place(NamedTuple):
    """Where a query stands in the order in which a store's own are drawn.

    Attributes:
        lap: How often all of them were used before.
        number: Of the query in its document: a title, then each sentence.
        rank: Of the document, by its id alone, so that no setting brings a used query back.
    """

    lap: int = 0
    number: int = 0
    rank: str = ""


FIRST = Place()


def is_reserved(identifier: DocumentId) -> bool:
    """Whether a document is for queries and never learned from: a quarter are, by their ids."""
    return is_within(sample_rank(identifier, seed=0), RESERVED_SHARE)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Queries that nothing was fitted to.

    Attributes:
        names: Of the queries `[Q]`.
        texts: Their texts `[Q]`.
        judgements: Grades by name and document.
        left_out: The document that each was taken from, where they are pseudo-queries.
        rests: What stands for that document while the gate looks: its text without the query.
        start: Behind which place they were drawn, where they are pseudo-queries.
        last: The place of the last of them.
    """

    names: list[str]
    texts: list[str]
    judgements: Judgements
    left_out: list[DocumentId] = field(default_factory=list)
    rests: list[str] = field(default_factory=list)
    start: Place | None = None
    last: Place | None = None

    @property
    def pseudo(self) -> bool:
        """Whether nobody judged them."""
        return self.start is not None

    def holds_out(self, identifier: DocumentId) -> bool:
        """Whether a document must not be learned from."""
        return self.pseudo and is_reserved(identifier)

    @classmethod
    def judged(cls, queries: Mapping[str, str], judgements: Judgements) -> "Evidence":
        """Of queries with judgements; those without a relevant document are left out.

        Args:
            queries: Name to text.
            judgements: Name to grades of documents.

        Raises:
            ConchError: No query has a text and a relevant document.
        """
        relevant = with_relevant({name: judgements.get(name, {}) for name in queries})
        if not relevant:
            raise ConchError(
                f"none of {len(queries)} queries has a relevant document among the judgements: "
                "give queries and judgements of the same names"
            )
        texts = [queries[name] for name in relevant]
        return cls(names=list(relevant), texts=texts, judgements=relevant)

    def within(self, store: VectorStore) -> "Evidence":
        """The queries of which the store holds a relevant document.

        Raises:
            ConchError: There are none.
        """
        relevant = [
            {each for each, grade in self.judgements[name].items() if grade > 0}
            for name in self.names
        ]
        there = store.digests(sorted(set().union(*relevant), key=str)).keys()
        kept = [number for number, each in enumerate(relevant) if each & there]
        if not kept:
            raise ConchError(
                f"none of {len(self.names)} judged queries has a relevant document in the store: "
                "give judgements of its documents"
            )
        return self._part(kept)

    def _part(self, numbers: Sequence[int]) -> "Evidence":
        names = [self.names[number] for number in numbers]
        return Evidence(
            names=names,
            texts=[self.texts[number] for number in numbers],
            judgements={each: self.judgements[each] for each in names},
        )

    def sampled(self, count: int, *, seed: int) -> "Evidence":
        """At most so many of judged queries, in their order; others are drawn already."""
        if self.pseudo:
            return self
        order = np.random.default_rng(seed).permutation(len(self.names))[:count]
        return self._part(sorted(order.tolist()))

    @classmethod
    def of_corpus(cls, store: VectorStore, *, sample: int, start: Place = FIRST) -> "Evidence":
        """Pseudo-queries of a store's reserved documents: known items, to be found by their titles.

        When all titles of three words are used, each sentence is a query. What they are worth: a
        document that holds its query's words is found by any vectors that keep words, and a
        student's raw ones would look perfect. So its `rests`, the text without the title or
        sentence, is what stands for it while the gate looks, before and after alike, and must have
        three words too. Beside the figure goes `teacher_agreement`, which leaves the query's own
        document out.

        Args:
            store: Its payloads hold titles and texts; one pass over them, or two.
            sample: Most queries to make, one a document. Which is decided by ids, not by their
                order in the store.
            start: The place behind which to begin: that of the last query that was used. Where too
                few are left behind it, a lap begins in which all are used again.
        """

        def drawn(start: Place) -> list[_Query]:
            queries = (
                query
                for page in store.pages(RAW)
                for identifier, payload in zip(page.ids, page.payloads, strict=True)
                if (query := _next_query(identifier, payload, start)) is not None
            )
            return heapq.nsmallest(sample, queries, key=lambda each: each.place)

        chosen = drawn(start)
        if len(chosen) < sample:
            again = drawn(Place(start.lap + 1))
            if len(chosen) < FEWEST_UNUSED * len(again):
                chosen = again
        names = [str(number) for number in range(len(chosen))]
        left_out = [each.document for each in chosen]
        return cls(
            names=names,
            texts=[each.text for each in chosen],
            judgements={name: {each: 1} for name, each in zip(names, left_out, strict=True)},
            left_out=left_out,
            rests=[each.rest for each in chosen],
            start=start,
            last=chosen[-1].place if chosen else start,
        )

    def evaluate(self, rankings: Sequence[Sequence[DocumentId]]) -> Evaluation:
        """The quality of rankings, one of each query in their order."""
        named = dict(zip(self.names, rankings, strict=True))
        return evaluate_rankings(named, self.judgements)


class _Query(NamedTuple):
    place: Place
    document: DocumentId
    text: str
    rest: str


def _next_query(identifier: DocumentId, payload: Mapping[str, Any], start: Place) -> _Query | None:
    """A reserved document's first query behind a place; None where it has none."""
    rank = sample_rank(identifier, seed=0)
    if not is_within(rank, RESERVED_SHARE):
        return None
    number = start.number if rank > start.rank else start.number + 1
    parts = _query_and_rest(payload, number)
    return parts and _Query(Place(start.lap, number, rank), identifier, *parts)


def _query_and_rest(payload: Mapping[str, Any], number: int) -> tuple[str, str] | None:
    """A document's query of a number, from 0, and its text without it.

    None where it has not so many of enough words.
    """
    title, text = (str(payload.get(name, "")).strip() for name in (TITLE, TEXT))
    sentences = _SENTENCE_END.split(text)
    lengths = [len(each.split()) for each in sentences]
    if len(title.split()) >= FEWEST_WORDS and sum(lengths) >= FEWEST_WORDS:
        if not number:
            return title, text
        number -= 1
    usable = [
        place
        for place, words in enumerate(lengths)
        if FEWEST_WORDS <= words <= sum(lengths) - FEWEST_WORDS
    ]
    if number >= len(usable):
        return None
    place = usable[number]
    rest = [title, *sentences[:place], *sentences[place + 1 :]]
    return sentences[place], " ".join(filter(None, rest))


def rankings_of(
    store: VectorStore, vectors: np.ndarray, *, version: str, top_k: int = RECALL_AT
) -> list[list[DocumentId]]:
    """The best documents of each query `[Q, D]`, ids only, a part of the queries at a time."""
    rankings: list[list[DocumentId]] = []
    for start in range(0, len(vectors), QUERIES_AT_ONCE):
        part = vectors[start : start + QUERIES_AT_ONCE]
        rankings += [hits.ids for hits in store.search(part, version=version, top_k=top_k)]
    return rankings


def teacher_rankings(
    store: VectorStore, helper: TeacherDistillationHelper, queries: Sequence[str], *, top_k: int
) -> list[list[DocumentId]]:
    """What the teacher itself finds, a page of documents at a time; its vectors are cached.

    Raises:
        ConchError: The teacher cannot embed a query, or none of the documents.
    """
    own = helper.get_teacher_embeddings(list(queries), queries=True)

    def pages() -> Iterator[tuple[list[DocumentId], np.ndarray]]:
        for page in store.pages(RAW):
            embedded = helper.embed(embedded_texts(page.payloads))
            yield [page.ids[number] for number in embedded.kept], embedded.vectors

    rankings = best_documents(pages(), own, top_k=top_k)
    if rankings and not rankings[0]:
        raise ConchError("the teacher could embed none of the documents: see its errors")
    return rankings


def best_documents(
    pages: Iterable[tuple[Sequence[DocumentId], np.ndarray]], queries: np.ndarray, *, top_k: int
) -> list[list[DocumentId]]:
    """The documents nearest to each query; see `best_scores`."""
    return best_scores(pages, queries, top_k=top_k)[0]


def best_scores(
    pages: Iterable[tuple[Sequence[DocumentId], np.ndarray]], queries: np.ndarray, *, top_k: int
) -> tuple[list[list[DocumentId]], np.ndarray]:
    """The documents nearest to each query, from pages of ids and vectors that are in no store.

    Args:
        pages: Ids, and their vectors `[n, E]`.
        queries: `[Q, E]`.
        top_k: How many of each.

    Returns:
        Ids, best first, and their scores `[Q, top_k]`, fewer where there are no more.
    """
    scores = np.full((len(queries), 0), -np.inf, np.float32)
    ids: np.ndarray = np.empty((len(queries), 0), object)
    for found, vectors in pages:
        if not len(found):
            continue
        names = np.empty(len(found), object)
        names[:] = found
        scores = np.concatenate([scores, queries @ vectors.T], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(names, (len(queries), len(names)))], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        scores = np.take_along_axis(scores, best, axis=1)
        ids = np.take_along_axis(ids, best, axis=1)
    return [list(row) for row in ids], scores


def teacher_agreement(
    rankings: Sequence[Sequence[DocumentId]],
    teacher: Sequence[Sequence[DocumentId]],
    left_out: Sequence[DocumentId],
    *,
    k: int = NDCG_AT,
) -> np.ndarray:
    """Which share of the teacher's own top k a ranking has in its top k, query by query.

    Args:
        rankings: Of the vectors to judge, `[Q]` lists, best first; at least k + 1 long where the
            corpus has as many.
        teacher: Of the teacher's vectors of the same documents and queries.
        left_out: One document of each query that does not count: the one that a pseudo-query was
            taken from.
        k: How many documents count; fewer where the teacher's ranking is shorter.

    Returns:
        float64 `[Q]` between 0 and 1.

    Raises:
        ConchError: There are not as many of each, k is below 1, or a teacher's ranking is empty.
    """
    lengths = [len(rankings), len(teacher), len(left_out)]
    if len(set(lengths)) > 1 or k < 1:
        raise ConchError(
            f"agreement at {k} of {' and '.join(map(str, lengths))} rankings: k must be 1 or "
            "more, and every query needs one of each"
        )
    shares = np.zeros(len(rankings))
    for number, (ranking, best, own) in enumerate(zip(rankings, teacher, left_out, strict=True)):
        wanted = [each for each in best if each != own][:k]
        if not wanted:
            raise ConchError(f"the teacher's ranking of query {number + 1} names no document")
        top = [each for each in ranking if each != own][: len(wanted)]
        shares[number] = len(set(wanted) & set(top)) / len(wanted)
    return shares


def measures(
    versions: Versions,
    evidence: Evidence,
    names: Sequence[str],
    helper: TeacherDistillationHelper | None = None,
) -> dict[str, list[np.ndarray]]:
    """The gate's figures of versions, query by query.

    Args:
        versions: Of the store where they are.
        evidence: The queries; none of them give no measure.
        names: The versions, such as the active one and a candidate.
        helper: The teacher: without judgements its agreement counts too.

    Returns:
        Name of the measure to the figures `[Q]` of each version.
    """
    if not evidence.names:
        return {}
    store = versions.store
    queries = versions.embed(names, evidence.texts, queries=True, what="held-out queries")
    rankings = [rankings_of(store, queries[name], version=name) for name in names]
    with_rests = rankings
    if evidence.pseudo:
        of_teacher = [name for name in names if versions.origin(name)["documents"] == OF_TEACHER]
        rests = versions.embed(
            [name for name in names if name not in of_teacher],
            evidence.rests,
            queries=False,
            what="held-out documents",
        )
        with_rests = []
        for name in names:
            if name in of_teacher:
                versions.require(name, helper.teacher if helper else None)
                assert helper is not None
                own = helper.get_teacher_embeddings(evidence.rests)
            else:
                own = rests[name]
            with_rests.append(_with_rests(store, evidence, queries[name], own, version=name))
    figures = {f"nDCG@{NDCG_AT}": [evidence.evaluate(each).ndcg for each in with_rests]}
    if evidence.pseudo and helper is not None:
        best = teacher_rankings(store, helper, evidence.texts, top_k=NDCG_AT + 1)
        figures["teacher agreement"] = [
            teacher_agreement(each, best, evidence.left_out) for each in rankings
        ]
    return figures


def _with_rests(
    store: VectorStore, evidence: Evidence, queries: np.ndarray, rests: np.ndarray, *, version: str
) -> list[list[DocumentId]]:
    """Rankings in which the held-out documents stand with their rests' vectors `[Q, E]`.

    Asks for enough documents that 10 others are among them, whatever the held-out ones do.
    """
    held_out = set(evidence.left_out)
    most = NDCG_AT + min(len(held_out), RECALL_AT)
    rankings: list[list[DocumentId]] = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[start : start + QUERIES_AT_ONCE]
        hits = store.search(part, version=version, top_k=most)
        for row, own in zip(hits, part @ rests.T, strict=True):
            scored = zip(row.ids, row.scores.tolist(), strict=True)
            both = [(score, each) for each, score in scored if each not in held_out]
            best = np.argsort(-own, kind="stable")[:RECALL_AT]
            both += [(float(own[number]), evidence.left_out[number]) for number in best]
            both.sort(key=lambda pair: -pair[0])
            rankings.append([each for _, each in both])
    return rankings
