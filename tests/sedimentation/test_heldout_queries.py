"""Held-out queries: what stands for their documents, and who ranks them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.adapter import PairSums, linear_adapter
from conch_dna.sedimentation.changes.heldout_queries import (
    Evidence,
    measures,
    rankings_of,
    teacher_agreement,
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
    whole = evidence.evaluate(rankings_of(store, queries.astype(np.float32), version=RAW)).ndcg
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
    raw, targets = student.documents(texts).vectors, helper.get_teacher_embeddings(texts)
    versions.build(
        "v0001", linear_adapter("ridge", PairSums.of(raw, targets)), {"documents": "adapted"}
    )
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


def corpus(rows: list[tuple[Any, str, str]]) -> Any:
    """What `Evidence.of_corpus` asks of a store, with these ids, titles and texts."""
    payloads = [{"title": title, "text": text} for _, title, text in rows]
    page = SimpleNamespace(ids=[each for each, _, _ in rows], payloads=payloads)
    return SimpleNamespace(pages=lambda version: [page])


def test_titles_find_their_documents_and_else_first_sentences() -> None:
    rows = [
        (1, "Reefs in cold water", "Coral grows slowly there. It needs light."),
        ("two", "", "A first sentence stands here. And then a second one."),
        (3, "Too short", "Does it? Yes, it surely does have one. And more of it."),
        (4, "A title without any text", ""),
        (5, "", "One sentence and nothing that could be found by it"),
        (6, "  ", "Only two. Though this has more words."),
    ]
    evidence = Evidence.of_corpus(corpus(rows), sample=10, seed=0)
    assert dict(zip(evidence.left_out, evidence.texts, strict=True)) == {
        1: "Reefs in cold water",
        "two": "A first sentence stands here.",
    }
    assert dict(zip(evidence.left_out, evidence.rests, strict=True)) == {
        1: "Coral grows slowly there. It needs light.",
        "two": "And then a second one.",
    }
    assert evidence.judgements == {str(n): {each: 1} for n, each in enumerate(evidence.left_out)}


def test_the_sample_does_not_depend_on_the_order_but_on_the_seed() -> None:
    rows: list[tuple[Any, str, str]] = [
        (n, f"Title of document {n}", "A text of some words.") for n in range(200)
    ]

    def evidence(rows: list[tuple[Any, str, str]], seed: int) -> Evidence:
        return Evidence.of_corpus(corpus(rows), sample=20, seed=seed)

    chosen = evidence(rows, 0)
    assert chosen == evidence(rows[::-1], 0)
    assert len(chosen.texts) == 20
    assert set(chosen.left_out) != set(evidence(rows, 1).left_out)
    grown = evidence([*rows, (200, "One more title here", "And its own text.")], 0)
    assert len({*grown.left_out} & {*chosen.left_out}) >= 19


def test_a_known_item_at_rank_r_counts_as_the_formula_says() -> None:
    rows: list[tuple[Any, str, str]] = [(7, "a b c", "g h i"), (8, "d e f", "j k l")]
    evidence = Evidence.of_corpus(corpus(rows), sample=2, seed=0)
    rankings = {7: [1, 2, 7], 8: [8, 1]}
    ndcg = evidence.evaluate([rankings[each] for each in evidence.left_out]).ndcg
    expected = {7: 1 / math.log2(4), 8: 1.0}
    assert ndcg.tolist() == pytest.approx([expected[each] for each in evidence.left_out])


def test_agreement_is_the_share_of_the_teachers_top() -> None:
    own = [["a", "b", "c", "d"], ["x", "y"], ["a", "b"]]
    teacher = [["b", "a", "e", "f"], ["p", "q"], ["a", "b"]]
    others = ["other"] * 3
    assert teacher_agreement(own, teacher, others, k=4).tolist() == [0.5, 0, 1]
    assert teacher_agreement(own, teacher, others, k=1).tolist() == [0, 0, 1]
    assert teacher_agreement([], [], []).tolist() == []


def test_agreement_leaves_the_querys_own_document_out_of_both() -> None:
    own, teacher = [["self", "a", "b", "c"]], [["self", "c", "d", "a"]]
    assert teacher_agreement(own, teacher, ["other"], k=2).tolist() == [0.5]
    assert teacher_agreement(own, teacher, ["self"], k=2).tolist() == [0]
    assert teacher_agreement(own, teacher, ["self"], k=3).tolist() == [2 / 3]
    assert teacher_agreement(own, [["self", "b"]], ["self"], k=10).tolist() == [0]


@pytest.mark.parametrize(
    ("teacher", "left_out", "k", "message"),
    [
        ([], ["b"], 10, "of 1 and 0 and 1 rankings"),
        ([["a"]], [], 10, "of 1 and 1 and 0 rankings"),
        ([["a"]], ["b"], 0, "agreement at 0"),
        ([["a"]], ["a"], 10, "query 1 names no document"),
    ],
)
def test_rankings_that_cannot_agree_are_refused(
    teacher: list[list[str]], left_out: list[str], k: int, message: str
) -> None:
    with pytest.raises(ConchError, match=message):
        teacher_agreement([["a"]], teacher, left_out, k=k)
