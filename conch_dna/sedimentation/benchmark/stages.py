"""The stages of a benchmark: which queries are asked, what an engine answers, one cycle.

Knows an engine, a collection's queries and judgements; nothing of rows, files or which modes are
compared. To divide queries otherwise: another function that gives a `QuerySplit`. To measure
another stage: a function here that gives its result and its seconds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.benchmark.collections import Collection
from conch_dna.sedimentation.changes.heldout_queries import Evidence, rankings_of
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import DocumentId
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.results import ChangeResult
from conch_dna.sedimentation.retrieval import (
    RECALL_AT,
    Evaluation,
    Judgements,
    rrf,
    weights_of,
    word_index,
)

QUERY_EMBEDDING = "query_embedding"


@dataclass(frozen=True, kw_only=True)
class QuerySplit:
    """Which queries are asked in cycles, and which are evaluated; no text is in both.

    Attributes:
        cycles: Names of each cycle's queries.
        texts: Name to text of these.
        evaluated: Name to text.
        repeated: Queries left out because one on the other side has the same text.
    """

    cycles: list[list[str]]
    texts: dict[str, str]
    evaluated: dict[str, str]
    repeated: int


def split_queries(
    collection: Collection, *, cycles: int, queries_per_cycle: int, seed: int
) -> QuerySplit:
    """Divide judged queries; where the collection has `others`, all cycle queries are of those.

    Args:
        collection: Its queries, and others.
        cycles: How many parts.
        queries_per_cycle: Of each part.
        seed: Of the choice.

    Raises:
        ConchError: More than half of the judged queries would be asked, or there are not so many
            others, or fewer than 2 are left to evaluate.
    """
    count = cycles * queries_per_cycle
    source = collection.others or collection.queries
    names = list(source)
    most, what = len(names) // 2, f"half of the {len(names)} judged ones"
    if collection.others:
        texts = {_plain(text) for text in collection.queries.values()}
        names = [name for name in names if _plain(source[name]) not in texts]
        most, what = len(names), "those of the other split"
    if count > most:
        each = most // cycles
        remedy = f"give --queries-per-cycle {each} or less" if each else f"give --cycles {most}"
        raise ConchError(
            f"{cycles} cycles of {queries_per_cycle} queries ask {count}, but at most {most} may "
            f"be asked, {what}: {remedy}"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    cycle_names = [names[number] for number in order[:count]]
    texts = {_plain(source[name]) for name in cycle_names}
    evaluated = {
        name: text for name, text in collection.queries.items() if _plain(text) not in texts
    }
    if len(evaluated) < 2:
        raise ConchError(
            f"{len(evaluated)} of {len(collection.queries)} judged queries are left to evaluate, "
            "and an interval needs 2: ask fewer queries in cycles"
        )
    left = len(names) if collection.others else count + len(evaluated)
    return QuerySplit(
        cycles=[
            cycle_names[start : start + queries_per_cycle]
            for start in range(0, count, queries_per_cycle)
        ],
        texts={name: source[name] for name in cycle_names},
        evaluated=evaluated,
        repeated=len(source) - left,
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def fused_rankings(
    dense: Sequence[Sequence[DocumentId]],
    words: Sequence[Sequence[DocumentId]],
    config: ChelationConfig,
) -> list[list[DocumentId]]:
    """Both rankings of each query as one, by `retrieval.rrf`."""
    k, weights = config.rrf_k, weights_of(config.fusion_share)
    return [
        [each for each, _ in rrf([one, other], k=k, top_k=RECALL_AT, weights=weights)]
        for one, other in zip(dense, words, strict=True)
    ]


def answers(
    engine: AntigravityEngine, queries: Sequence[str]
) -> tuple[list[list[DocumentId]], dict[str, float]]:
    """The 100 best documents of each query as the engine's active version has them.

    They are not asked of the engine itself, whose log would keep them: then they would be learned
    from in the next cycle.

    Returns:
        Ids, best first; and the seconds of QUERY_EMBEDDING (student and adapter) and the search.
    """
    began = time.perf_counter()
    version = engine.versions.active
    vectors = engine.versions.embed([version], queries, queries=True, what="queries")[version]
    embedded = time.perf_counter()
    rankings = rankings_of(engine.store, vectors, version=version)
    if engine.config.fusion == "rrf":
        by_words = word_index(engine.store).rankings(queries)
        rankings = fused_rankings(rankings, by_words, engine.config)
    return rankings, {
        QUERY_EMBEDDING: embedded - began,
        "evaluation_search": time.perf_counter() - embedded,
    }


def evaluate_engine(
    engine: AntigravityEngine, queries: Mapping[str, str], judgements: Judgements
) -> Evaluation:
    """NDCG@10 and recall@100 of what an engine's active version answers, on its whole store.

    Nothing of it is logged, so that a cycle never learns from queries that were evaluated.

    Args:
        engine: With its documents; its fusion counts.
        queries: Name to text; those without a relevant document do not count.
        judgements: Name to grades of documents; all of them make the ideal ranking.

    Raises:
        ConchError: No query has a relevant document, or the student cannot embed one.
    """
    evidence = Evidence.judged(queries, judgements)
    rankings, _ = answers(engine, evidence.texts)
    return evidence.evaluate(rankings)


def run_training_cycle(
    engine: AntigravityEngine,
    queries: Sequence[str],
    *,
    threshold: int | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
) -> ChangeResult:
    """Ask queries and let the engine learn once; its gate decides.

    In the mode "offline" the first cycle is the distillation of all documents, with the
    configuration's own rate and epochs; every later one, and every one of the other modes, learns
    from the documents whose neighbourhoods collapsed.

    Args:
        engine: With its documents.
        queries: Texts, none of which may be evaluated afterwards.
        threshold: Collapsed neighbourhoods a document must be in; None for the configuration's,
            as the others.
        learning_rate: Of the residual adapter.
        epochs: Most passes over the pairs.

    Raises:
        ConchError: A query has no text, the store is empty, or a setting is out of its range.
    """
    engine.run_inferences(list(queries))
    distilled = any(entry["kind"] == "distillation" for entry in engine.gate_history())
    if engine.config.training_mode == "offline" and not distilled:
        return engine.run_offline_distillation()
    return engine.run_sedimentation_cycle(threshold, learning_rate, epochs)
