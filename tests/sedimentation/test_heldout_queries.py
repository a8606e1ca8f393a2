"""Held-out queries: what stands for their documents, and who ranks them."""

from pathlib import Path

import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.adapter import fit_ridge
from conch_dna.sedimentation.changes.heldout_queries import (
    Evidence,
    evaluated,
    measures,
    rankings_of,
    teacher_rankings,
)
from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
from conch_dna.sedimentation.changes.versions import Versions
from conch_dna.sedimentation.documents import read_documents
from conch_dna.sedimentation.embedders.contract import Embedder
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.stores.contract import RAW, VectorStore
from conch_dna.sedimentation.stores.open_store import open_store
from topic_models import documents, tables, write_static


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, TeacherDistillationHelper]:
    folder = tmp_path_factory.mktemp("models")
    teacher, student = tables()
    helper = TeacherDistillationHelper(str(write_static(folder / "teacher", teacher)))
    return open_embedder(str(write_static(folder / "student", student))), helper


@pytest.fixture
def store(models: tuple[Embedder, TeacherDistillationHelper]) -> VectorStore:
    student, _ = models
    given = list(read_documents(documents(60)))
    identity = {"student": "s", "digest": "d", "dimension": student.dimension}
    made = open_store(":memory:", identity=identity)
    vectors = student.documents([each.embedded for each in given]).vectors
    made.put(
        [each.id for each in given],
        [each.stored for each in given],
        [each.digest for each in given],
        {RAW: vectors},
    )
    return made


def test_the_rest_of_a_document_stands_for_it(
    models: tuple[Embedder, TeacherDistillationHelper], store: VectorStore, tmp_path: Path
) -> None:
    """Against float64: all documents, those held out without their titles."""
    student, helper = models
    versions = Versions(store, tmp_path, student.dimension)
    evidence = Evidence.of_corpus(store, sample=15, seed=0)
    assert evidence.pseudo and len(evidence.rests) == 15
    found = measures(versions, evidence, student, (RAW, RAW), helper)
    assert set(found) == {"nDCG@10", "teacher agreement"}
    before, after = found["nDCG@10"]
    np.testing.assert_array_equal(before, after)
    texts = {each["id"]: f"{each['title']} {each['text']}" for each in documents(60)}
    texts |= dict(zip(evidence.left_out, evidence.rests, strict=True))
    names = list(texts)
    table = student.documents(list(texts.values())).vectors.astype(np.float64)
    queries = student.queries(evidence.texts).vectors.astype(np.float64)
    for row, wanted, figure in zip(queries @ table.T, evidence.left_out, before, strict=True):
        rank = 1 + int((row > row[names.index(wanted)]).sum())
        expected = 1 / np.log2(rank + 1) if rank <= 10 else 0.0
        assert figure == pytest.approx(expected, abs=1e-6)
    whole = evaluated(evidence, rankings_of(store, queries.astype(np.float32), version=RAW)).ndcg
    assert whole.mean() > before.mean(), "with their titles in them they are found too easily"


def test_a_teachers_rankings_are_those_of_all_its_vectors(
    models: tuple[Embedder, TeacherDistillationHelper], store: VectorStore
) -> None:
    _, helper = models
    queries = [each["title"] for each in documents(8, seed=3)]
    found = teacher_rankings(store, helper, queries, top_k=7)
    texts = [f"{each['title']} {each['text']}" for each in documents(60)]
    scores = helper.get_teacher_embeddings(queries) @ helper.get_teacher_embeddings(texts).T
    for row, ids in zip(scores, found, strict=True):
        best = np.sort(row)[::-1][:7]
        got = [row[int(str(each)[1:])] for each in ids]
        np.testing.assert_allclose(got, best, atol=1e-6)


def test_a_candidates_queries_go_through_its_own_adapter(
    models: tuple[Embedder, TeacherDistillationHelper], store: VectorStore, tmp_path: Path
) -> None:
    student, helper = models
    versions = Versions(store, tmp_path, student.dimension)
    texts = [f"{each['title']} {each['text']}" for each in documents(60)]
    raw, taught = student.documents(texts).vectors, helper.get_teacher_embeddings(texts)
    versions.build("v0001", fit_ridge(raw, taught), {"documents": "adapted"})
    evidence = Evidence.of_corpus(store, sample=15, seed=0)
    before, after = measures(versions, evidence, student, (RAW, "v0001"), None)["nDCG@10"]
    assert not np.array_equal(before, after)


def test_only_queries_with_a_relevant_document_are_evidence() -> None:
    queries = {"a": "one", "b": "two", "c": "three"}
    found = Evidence.judged(queries, {"a": {"d": 1}, "b": {"d": 0}})
    assert (found.names, found.texts, found.pseudo) == (["a"], ["one"], False)
    with pytest.raises(ConchError, match="none of 3 queries has a relevant document"):
        Evidence.judged(queries, {"x": {"d": 1}})


def test_no_queries_are_no_evidence(
    models: tuple[Embedder, TeacherDistillationHelper], store: VectorStore, tmp_path: Path
) -> None:
    student, helper = models
    versions = Versions(store, tmp_path, student.dimension)
    none = Evidence(names=[], texts=[], judgements={})
    assert measures(versions, none, student, (RAW, RAW), helper) == {}
