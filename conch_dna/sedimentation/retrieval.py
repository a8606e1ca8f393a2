"""Rankings: their quality by judgements, the fusion of several, and one by words (BM25).

Knows ids, grades and the texts of a store; nothing of vectors, models or gates. To add a measure:
a field of `Evaluation` and pytrec_eval's name for it in `evaluate_rankings`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.documents import DocumentId, embedded_texts
from conch_dna.sedimentation.stores.contract import RAW, Hits, VectorStore
from conch_dna.sedimentation.stores.filters import Where, conditions_of, matches

# Query to ids, best first; query to id to grade.
Rankings = Mapping[str, Sequence[DocumentId]]
Judgements = Mapping[str, Mapping[DocumentId, int]]
NDCG_AT = 10
RECALL_AT = 100
# Documents of each ranking that are fused.
FUSED = 100


def dcg_at_k(grades: Sequence[float], k: int = NDCG_AT) -> float:
    """Σ grade / log2(rank + 1) over the first k, ranks from 1; grades below 0 count as 0.

    Args:
        grades: Of the documents of a ranking, best first.
        k: How many count.

    Raises:
        ConchError: k is below 1.

    >>> dcg_at_k([1, 0, 1])
    1.5
    """
    if k < 1:
        raise ConchError(f"k is {k}: it must be 1 or more")
    return sum(max(grade, 0) / math.log2(rank + 2) for rank, grade in enumerate(grades[:k]))


def ndcg_at_k(
    ranking: Sequence[DocumentId], judgements: Mapping[DocumentId, float], k: int = NDCG_AT
) -> float:
    """DCG of a ranking over that of the best one of all judged documents, retrieved or not.

    Args:
        ranking: Ids, best first; a document without a judgement counts 0.
        judgements: All grades of the query.
        k: How many documents count.

    Returns:
        Between 0 and 1; 0 where no document is relevant.

    Raises:
        ConchError: k is below 1, or an id stands in the ranking twice.

    >>> ndcg_at_k(["a"], {"a": 1, "never found": 1})
    0.6131471927654584
    """
    _refuse_repeated(ranking, "the ranking")
    ideal = dcg_at_k(sorted(judgements.values(), reverse=True), k)
    gain = dcg_at_k([judgements.get(each, 0) for each in ranking], k)
    return gain / ideal if ideal else 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """How good rankings are, query by query.

    Attributes:
        queries: Their ids `[Q]`, in the order of the judgements.
        ndcg: nDCG@10 `[Q]`, float64 between 0 and 1.
        recall: Recall@100 `[Q]`, float64 between 0 and 1.
    """

    queries: list[str]
    ndcg: np.ndarray
    recall: np.ndarray

    def to_json(self) -> dict[str, float | int]:
        """The means, with how many queries they are of."""
        return {
            "ndcg_at_10": float(self.ndcg.mean()),
            "recall_at_100": float(self.recall.mean()),
            "queries": len(self.queries),
        }


def with_relevant(judgements: Judgements) -> Judgements:
    """The queries that have a relevant document, one whose grade is above 0."""
    return {
        query: grades
        for query, grades in judgements.items()
        if any(grade > 0 for grade in grades.values())
    }


def evaluate_rankings(rankings: Rankings, judgements: Judgements) -> Evaluation:
    """nDCG@10 and recall@100 of every judged query, by pytrec_eval.

    The order of a ranking is what counts, not its scores, so that ties are not broken again. Every
    judged query counts; one whose ranking is empty counts 0.

    Args:
        rankings: Ids, best first, at least 100 of them where the corpus has as many.
        judgements: Grades; documents above 0 are relevant. Ids are compared as text.

    Raises:
        ConchError: No query is judged, a judged query has no ranking, a document stands in a
            ranking twice, or a query has no relevant document.
    """
    import pytrec_eval

    if not judgements:
        raise ConchError("there are no judged queries: nothing can be evaluated")
    if missing := [query for query in judgements if query not in rankings]:
        raise ConchError(
            f"{len(missing)} of {len(judgements)} judged queries have no ranking, such as "
            f"{missing[0]!r}: rank every judged query"
        )
    grades: Judgements = {
        query: {str(each): int(grade) for each, grade in row.items()}
        for query, row in judgements.items()
    }
    relevant = with_relevant(grades)
    if bare := [query for query in grades if query not in relevant]:
        raise ConchError(
            f"query {bare[0]!r} has no relevant document, so it says nothing of a ranking: leave "
            f"such queries out ({len(bare)} of {len(grades)})"
        )
    runs = {}
    for query in grades:
        ids = [str(each) for each in rankings[query]]
        _refuse_repeated(ids, f"the ranking of query {query!r}")
        runs[query] = {each: float(len(ids) - place) for place, each in enumerate(ids)}
    names = f"ndcg_cut_{NDCG_AT}", f"recall_{RECALL_AT}"
    evaluator = pytrec_eval.RelevanceEvaluator(grades, set(names))
    figures = evaluator.evaluate({query: run for query, run in runs.items() if run})
    rows = [figures.get(query, dict.fromkeys(names, 0.0)) for query in grades]
    ndcg, recall = (np.array([row[name] for row in rows]) for name in names)
    return Evaluation(queries=list(grades), ndcg=ndcg, recall=recall)


def _refuse_repeated(ranking: Sequence[DocumentId], what: str) -> None:
    if len(set(ranking)) != len(ranking):
        twice = next(each for each in ranking if list(ranking).count(each) > 1)
        raise ConchError(f"{twice!r} stands in {what} more than once")


def rrf(
    rankings: Sequence[Sequence[DocumentId]],
    *,
    k: int = 60,
    top_k: int | None = None,
    weights: Sequence[float] | None = None,
) -> list[tuple[DocumentId, float]]:
    """Reciprocal rank fusion: Σ w / (k + rank) over the rankings, ranks from 1 (Cormack 2009).

    Args:
        rankings: Of one query, each best first.
        k: How little the first ranks stand out; above 0.
        top_k: How many to give; all where it is None.
        weights: One of each ranking; 1 of each where None. What only those name that weigh nothing
            comes last.

    Returns:
        Ids with their scores, best first; of equal ones that first which a ranking names first.

    Raises:
        ConchError: k is not above 0, or an id stands in a ranking twice.

    >>> rrf([["a", "b"], ["b", "c"]], k=1)[0]
    ('b', 0.8333333333333333)
    """
    if k <= 0:
        raise ConchError(f"the constant of reciprocal rank fusion is {k}: it must be above 0")
    scores: dict[DocumentId, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        _refuse_repeated(ranking, "a ranking")
        for rank, each in enumerate(ranking, start=1):
            scores[each] = scores.get(each, 0.0) + weight / (k + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])[:top_k]


def weights_of(share: float) -> tuple[float, float]:
    """What `rrf` is given for a dense ranking and BM25's; 1 of each at equal shares."""
    return 2 * share, 2 * (1 - share)


class BM25:
    """Ranking by words: Lucene's BM25 by bm25s, English stop words left out, Snowball stems.

    Args:
        ids: Of the documents, in the order of the texts.
        texts: Their texts; those without a word are never found.
        k1: How soon more of the same word stops counting.
        b: How much a long text is held back, between 0 and 1.

    Raises:
        ConchError: There are no documents with words, ids and texts differ in number, or an id
            stands there twice.
    """

    def __init__(
        self, ids: Iterable[DocumentId], texts: Iterable[str], *, k1: float = 1.5, b: float = 0.75
    ) -> None:
        import bm25s

        self.ids = list(ids)
        _refuse_repeated(self.ids, "the corpus")
        words = self._words(list(texts))
        if len(words) != len(self.ids):
            raise ConchError(f"{len(self.ids)} ids came with {len(words)} texts: give one for each")
        if not any(words):
            raise ConchError("no document has a word that BM25 could find: give texts")
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b)
        self._index.index(words, show_progress=False)

    def search(
        self, queries: Sequence[str], *, top_k: int = 10
    ) -> list[list[tuple[DocumentId, float]]]:
        """The best documents of each query.

        Args:
            queries: Texts.
            top_k: Most documents for each.

        Returns:
            For each query ids with scores above 0, best first; fewer than top_k, or none, where
            fewer documents share a word with it.

        Raises:
            ConchError: top_k is below 1.
        """
        if top_k < 1:
            raise ConchError(f"top_k is {top_k}: it must be 1 or more")
        most = min(top_k, len(self.ids))
        results: list[list[tuple[DocumentId, float]]] = []
        for words in self._words(list(queries)):
            results.append([])
            if known := [word for word in words if word in self._index.vocab_dict]:
                hits = self._index.retrieve([known], k=most, show_progress=False)
                scored = zip(hits.documents[0], hits.scores[0], strict=True)
                results[-1] += [(self.ids[at], float(score)) for at, score in scored if score > 0]
        return results

    def rankings(self, queries: Sequence[str], *, top_k: int = FUSED) -> list[list[DocumentId]]:
        """`search` without the scores, as many documents as are fused."""
        return [[each for each, _ in hits] for hits in self.search(queries, top_k=top_k)]

    @staticmethod
    def _words(texts: list[str]) -> list[list[str]]:
        import bm25s
        import Stemmer

        words: Any = bm25s.tokenize(
            texts,
            stopwords="en",
            stemmer=Stemmer.Stemmer("english"),
            return_ids=False,
            show_progress=False,
        )
        return list(words)


def word_index(store: VectorStore) -> BM25:
    """BM25 over the documents of a store."""
    ids: list[DocumentId] = []
    texts: list[str] = []
    for page in store.pages(RAW):
        ids += page.ids
        texts += embedded_texts(page.payloads)
    return BM25(ids, texts)


@dataclass(eq=False)
class WordFusion:
    """Fuses the dense ranking of a query with BM25's, by reciprocal rank.

    Attributes:
        store: Its payloads hold the texts.
        k: Constant of reciprocal rank fusion.
        share: Of the dense ranking; the rest is BM25's.
    """

    store: VectorStore
    k: int
    share: float = 0.5
    _words: tuple[int, BM25] | None = field(default=None, init=False)

    def fused(self, query: str, hits: Hits, top_k: int, where: Where | None = None) -> Hits:
        """The best documents by both rankings; scores are sums of reciprocal ranks, float64.

        Args:
            query: Its text.
            hits: The dense ranking, FUSED long where there are as many.
            top_k: How many to give.
            where: The filter that the dense ranking had.
        """
        # Made anew at the first query after a write.
        revision = self.store.revision
        if self._words is None or self._words[0] != revision:
            self._words = revision, word_index(self.store)
        (by_words,) = self._words[1].rankings([query])
        payloads = dict(zip(hits.ids, hits.payloads, strict=True))
        page = self.store.get([each for each in by_words if each not in payloads], RAW)
        payloads.update(zip(page.ids, page.payloads, strict=True))
        conditions = conditions_of(where)
        by_words = [each for each in by_words if matches(payloads[each], conditions)]
        both, weights = [hits.ids, by_words], weights_of(self.share)
        scores = dict(rrf(both, k=self.k, top_k=top_k, weights=weights))
        return Hits(
            ids=list(scores),
            scores=np.array(list(scores.values())),
            payloads=[payloads[each] for each in scores],
        )
