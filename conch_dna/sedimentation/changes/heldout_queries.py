"""Held-out queries of a store, and what two versions of its vectors make of them.

Knows a store, embedders and the gate's measures; decides nothing. To judge by another measure: an
entry of what `measures` gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.changes.gate import pseudo_queries, teacher_agreement
from conch_dna.sedimentation.changes.versions import OF_TEACHER
from conch_dna.sedimentation.documents import TEXT, TITLE, DocumentId, embedded_text
from conch_dna.sedimentation.retrieval import (
    NDCG_AT,
    RECALL_AT,
    Evaluation,
    Judgements,
    evaluate_rankings,
)
from conch_dna.sedimentation.stores.contract import RAW, VectorStore

if TYPE_CHECKING:
    from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
    from conch_dna.sedimentation.changes.versions import Versions
    from conch_dna.sedimentation.embedders.contract import Embedder

QUERIES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Queries that nothing was fitted to.

    Attributes:
        names: Of the queries `[Q]`.
        texts: Their texts `[Q]`.
        judgements: Grades by name and document.
        left_out: The document that each was taken from, where they are pseudo-queries.
        rests: What stands for that document while the gate looks: its text without the query.
    """

    names: list[str]
    texts: list[str]
    judgements: Judgements
    left_out: list[DocumentId] = field(default_factory=list)
    rests: list[str] = field(default_factory=list)

    @property
    def pseudo(self) -> bool:
        """Whether nobody judged them."""
        return bool(self.left_out)

    @classmethod
    def judged(cls, queries: Mapping[str, str], judgements: Judgements) -> "Evidence":
        """Of queries with judgements; those without a relevant document are left out.

        Args:
            queries: Name to text.
            judgements: Name to grades of documents.

        Raises:
            ConchError: No query has a text and a relevant document.
        """
        names = [
            name
            for name in queries
            if any(grade > 0 for grade in judgements.get(name, {}).values())
        ]
        if not names:
            raise ConchError(
                f"none of {len(queries)} queries has a relevant document among the judgements: "
                "give queries and judgements of the same names"
            )
        return cls(
            names=names,
            texts=[queries[name] for name in names],
            judgements={name: judgements[name] for name in names},
        )

    @classmethod
    def of_corpus(cls, store: VectorStore, *, sample: int, seed: int) -> "Evidence":
        """Pseudo-queries of a store's own documents; see `gate.pseudo_queries`."""
        documents = (
            (each, str(payload.get(TITLE, "")), str(payload.get(TEXT, "")))
            for page in store.pages(RAW)
            for each, payload in zip(page.ids, page.payloads, strict=True)
        )
        made = pseudo_queries(documents, sample=sample, seed=seed)
        names = [str(number) for number in range(len(made.queries))]
        return cls(
            names=names,
            texts=made.queries,
            judgements=made.judgements,
            left_out=made.documents,
            rests=made.rests,
        )


def rankings_of(
    store: VectorStore, vectors: np.ndarray, *, version: str, top_k: int = RECALL_AT
) -> list[list[DocumentId]]:
    """The best documents of each query `[Q, D]`, ids only, a part of the queries at a time."""
    found: list[list[DocumentId]] = []
    for start in range(0, len(vectors), QUERIES_AT_ONCE):
        part = vectors[start : start + QUERIES_AT_ONCE]
        found += [hits.ids for hits in store.search(part, version=version, top_k=top_k)]
    return found


def evaluated(evidence: Evidence, rankings: Sequence[Sequence[DocumentId]]) -> Evaluation:
    """The quality of rankings, query by query."""
    named = dict(zip(evidence.names, rankings, strict=True))
    return evaluate_rankings(named, evidence.judgements)


def teacher_rankings(
    store: VectorStore,
    helper: "TeacherDistillationHelper",
    queries: Sequence[str],
    *,
    top_k: int,
) -> list[list[DocumentId]]:
    """What the teacher itself finds, a page of documents at a time; its vectors are cached.

    Raises:
        ConchError: The teacher cannot embed a query, or none of the documents.
    """
    own = helper.get_teacher_embeddings(list(queries), queries=True)
    scores = np.full((len(own), 0), -np.inf, np.float32)
    ids: np.ndarray = np.empty((len(own), 0), object)
    for page in store.pages(RAW):
        found = helper.embed([embedded_text(payload) for payload in page.payloads])
        if not found.kept:
            continue
        names = np.empty(len(found.kept), object)
        names[:] = [page.ids[number] for number in found.kept]
        scores = np.concatenate([scores, own @ found.vectors.T], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(names, (len(own), len(names)))], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        scores = np.take_along_axis(scores, best, axis=1)
        ids = np.take_along_axis(ids, best, axis=1)
    if not ids.shape[1]:
        raise ConchError("the teacher could embed none of the documents: see its errors")
    return [list(row) for row in ids]


def measures(
    versions: "Versions",
    evidence: Evidence,
    student: "Embedder",
    names: tuple[str, str],
    helper: "TeacherDistillationHelper | None" = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The gate's figures of two versions, query by query.

    Args:
        versions: Of the store where both are.
        evidence: The queries; none of them give no measure.
        student: Embeds them.
        names: The active version and the candidate.
        helper: The teacher: without judgements its agreement counts too.

    Returns:
        Name of the measure to figures before and after.
    """
    if not evidence.names:
        return {}
    store = versions.store
    raw = student.queries(evidence.texts).all_vectors(what="held-out queries")
    queries = [versions.adapter(name).apply(raw) for name in names]
    rankings = [
        rankings_of(store, vectors, version=name)
        for vectors, name in zip(queries, names, strict=True)
    ]
    shown = rankings
    if evidence.pseudo:
        rests = student.documents(evidence.rests).all_vectors(what="held-out documents")
        shown = []
        for vectors, name in zip(queries, names, strict=True):
            if versions.origin(name)["documents"] == OF_TEACHER:
                assert helper is not None
                own = helper.get_teacher_embeddings(evidence.rests)
            else:
                own = versions.adapter(name).apply(rests)
            shown.append(_with_rests(store, evidence, vectors, own, version=name))
    before, after = (evaluated(evidence, found).ndcg for found in shown)
    found = {f"nDCG@{NDCG_AT}": (before, after)}
    if evidence.pseudo and helper is not None:
        own_rankings = teacher_rankings(store, helper, evidence.texts, top_k=NDCG_AT + 1)
        shares = [
            teacher_agreement(each, own_rankings, left_out=evidence.left_out) for each in rankings
        ]
        found["teacher agreement"] = (shares[0], shares[1])
    return found


def _with_rests(
    store: VectorStore,
    evidence: Evidence,
    queries: np.ndarray,
    rests: np.ndarray,
    *,
    version: str,
) -> list[list[DocumentId]]:
    """Rankings in which the held-out documents stand with their rests' vectors `[Q, E]`.

    Asks for enough documents that 10 others are among them, whatever the held-out ones do.
    """
    held_out = {each: number for number, each in enumerate(evidence.left_out)}
    wanted = NDCG_AT + min(len(held_out), RECALL_AT)
    found: list[list[DocumentId]] = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[start : start + QUERIES_AT_ONCE]
        scores = part @ rests.T
        hits = store.search(part, version=version, top_k=wanted)
        for row, own in zip(hits, scores, strict=True):
            others = [
                (float(score), each)
                for each, score in zip(row.ids, row.scores, strict=True)
                if each not in held_out
            ]
            best = np.argsort(-own, kind="stable")[:RECALL_AT]
            both = [*others, *((float(own[n]), evidence.left_out[n]) for n in best)]
            both.sort(key=lambda pair: -pair[0])
            found.append([each for _, each in both])
    return found
