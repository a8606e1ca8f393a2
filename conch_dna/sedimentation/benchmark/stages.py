"""What a benchmark does with an engine: evaluate it, and let it run one cycle.

Knows an engine and judgements; nothing of rows, files or which modes are compared. To measure
another stage: a function here that gives its result and its seconds.
"""

import time
from collections.abc import Mapping, Sequence

from conch_dna.sedimentation.changes.heldout_queries import Evidence, evaluated, rankings_of
from conch_dna.sedimentation.documents import DocumentId, embedded_text
from conch_dna.sedimentation.engine import FUSED, AntigravityEngine
from conch_dna.sedimentation.results import ChangeResult
from conch_dna.sedimentation.retrieval import BM25, RECALL_AT, Evaluation, Judgements, rrf
from conch_dna.sedimentation.stores.contract import RAW

QUERY_EMBEDDING = "query_embedding"


def words_of(engine: AntigravityEngine) -> BM25:
    """BM25 over the documents of an engine's store."""
    ids: list[DocumentId] = []
    texts: list[str] = []
    for page in engine.store.pages(RAW):
        ids += page.ids
        texts += [embedded_text(payload) for payload in page.payloads]
    return BM25(ids, texts)


def word_rankings(words: BM25, queries: Sequence[str]) -> list[list[DocumentId]]:
    """The 100 best documents of each query by words, ids only."""
    return [[each for each, _ in found] for found in words.search(queries, top_k=FUSED)]


def fused_rankings(
    dense: Sequence[Sequence[DocumentId]], words: Sequence[Sequence[DocumentId]], *, k: int
) -> list[list[DocumentId]]:
    """Both rankings of each query as one, by `retrieval.rrf`."""
    return [
        [each for each, _ in rrf([one, other], k=k, top_k=RECALL_AT)]
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
    raw = engine.student.queries(queries).all_vectors(what="queries")
    vectors = engine.versions.adapter(version).apply(raw)
    embedded = time.perf_counter()
    found = rankings_of(engine.store, vectors, version=version)
    if engine.config.fusion == "rrf":
        by_words = word_rankings(words_of(engine), queries)
        found = fused_rankings(found, by_words, k=engine.config.rrf_k)
    return found, {
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
    found, _ = answers(engine, evidence.texts)
    return evaluated(evidence, found)


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
        threshold: See `AntigravityEngine.run_sedimentation_cycle`; None for the configuration's.
        learning_rate: Likewise.
        epochs: Likewise.

    Raises:
        ConchError: A query has no text, the store is empty, or a setting is out of its range.
    """
    engine.run_inferences(list(queries))
    distilled = any(entry["kind"] == "distillation" for entry in engine.gate_history())
    if engine.config.training_mode == "offline" and not distilled:
        return engine.run_offline_distillation()
    return engine.run_sedimentation_cycle(threshold, learning_rate, epochs)
