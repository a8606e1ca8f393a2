"""Held-out queries: what stands for their documents, and who ranks them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.adapters.adapter import PairSums, linear_adapter
from conch_dna.sedimentation.changes import heldout_queries
from conch_dna.sedimentation.changes.draws import account_of, draw_about, next_draw
from conch_dna.sedimentation.changes.heldout_queries import (
    Evidence,
    is_reserved,
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
    versions = Versions(store, tmp_path, student.dimension, student)
    evidence = Evidence.of_corpus(store, sample=15)
    assert evidence.pseudo and len(evidence.rests) == 15
    found = measures(versions, evidence, (RAW, RAW), helper)
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
    versions = Versions(store, tmp_path, student.dimension, student)
    texts = [f"{each['title']} {each['text']}" for each in documents(60)]
    raw, targets = student.documents(texts).vectors, helper.get_teacher_embeddings(texts)
    versions.build(
        "v0001", linear_adapter("ridge", PairSums.of(raw, targets)), {"documents": "adapted"}
    )
    evidence = Evidence.of_corpus(store, sample=15)
    before, after = measures(versions, evidence, (RAW, "v0001"), None)["nDCG@10"]
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
    versions = Versions(store, tmp_path, student.dimension, student)
    none = Evidence(names=[], texts=[], judgements={})
    assert measures(versions, none, (RAW, RAW), helper) == {}


def corpus(rows: list[tuple[Any, str, str]]) -> Any:
    """What `Evidence.of_corpus` asks of a store, with these ids, titles and texts."""
    payloads = [{"title": title, "text": text} for _, title, text in rows]
    page = SimpleNamespace(ids=[each for each, _, _ in rows], payloads=payloads)
    return SimpleNamespace(pages=lambda version: [page])


@pytest.fixture
def all_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every document were for queries, so that a few tell everything."""
    monkeypatch.setattr(heldout_queries, "RESERVED_SHARE", 1)


@pytest.mark.usefixtures("all_reserved")
def test_titles_find_their_documents_and_else_sentences() -> None:
    rows = [
        (1, "Reefs in cold water", "Coral grows slowly there. It needs light."),
        ("two", "", "A first sentence stands here. And then a second one."),
        (3, "Too short", "Does it? Yes, it surely does have one. And more of it."),
        (4, "A title without any text", ""),
        (5, "", "One sentence and nothing that could be found by it"),
        (6, "  ", "Only two. Though this has more words."),
    ]
    evidence = Evidence.of_corpus(corpus(rows), sample=10)
    assert dict(zip(evidence.left_out, evidence.texts, strict=True)) == {
        1: "Reefs in cold water",
        "two": "A first sentence stands here.",
        3: "Yes, it surely does have one.",
    }
    assert dict(zip(evidence.left_out, evidence.rests, strict=True)) == {
        1: "Coral grows slowly there. It needs light.",
        "two": "And then a second one.",
        3: "Too short Does it? And more of it.",
    }
    assert evidence.judgements == {str(n): {each: 1} for n, each in enumerate(evidence.left_out)}
    assert evidence.last is not None
    then = Evidence.of_corpus(corpus(rows), sample=10, start=evidence.last)
    assert dict(zip(then.left_out, zip(then.texts, then.rests, strict=True), strict=True)) == {
        1: ("Coral grows slowly there.", "Reefs in cold water It needs light."),
        "two": ("And then a second one.", "A first sentence stands here."),
        3: ("And more of it.", "Too short Does it? Yes, it surely does have one."),
    }


Rows = list[tuple[Any, str, str]]


def rows_of(count: int, *, sentences: int = 2) -> Rows:
    """Documents with a title and sentences that no other has."""
    return [
        (n, f"Title of document {n}", " ".join(f"Text {n} says {s}." for s in range(sentences)))
        for n in range(count)
    ]


def test_a_draw_depends_on_the_ids_alone() -> None:
    rows = rows_of(400)
    chosen = Evidence.of_corpus(corpus(rows), sample=20)
    assert chosen == Evidence.of_corpus(corpus(rows[::-1]), sample=20)
    assert len(chosen.texts) == 20 and all(map(is_reserved, chosen.left_out))
    grown = Evidence.of_corpus(corpus(rows_of(401)), sample=20)
    assert len({*grown.left_out} & {*chosen.left_out}) >= 19


def test_a_quarter_of_the_documents_is_reserved() -> None:
    reserved = sum(is_reserved(each) for n in range(5000) for each in (n, f"d{n}"))
    assert 2300 < reserved < 2700
    evidence = Evidence.of_corpus(corpus(rows_of(20)), sample=2)
    assert [evidence.holds_out(n) for n in range(20)] == [is_reserved(n) for n in range(20)]
    judged = Evidence.judged({"a": "one"}, {"a": {0: 1}})
    assert not any(judged.holds_out(n) for n in range(20)), "no query is made from them"


def decisions(store: Any, changes: int, sample: int) -> list[dict[str, Any]]:
    """The history of changes whose every draw is the next one, with the draw's texts."""
    history: list[dict[str, Any]] = []
    for number in range(changes):
        evidence = next_draw(store, history, sample=sample)
        names = {"candidate": f"v{number + 1}", "against": f"v{number}", "passed": True}
        account = json.loads(json.dumps(account_of(evidence, history)))
        history.append({**names, "questions": account, "asked": evidence.texts})
    return history


def test_no_query_is_asked_twice_where_there_are_more() -> None:
    """400 documents, of which about 100 are reserved, with three queries each: 15 draws of 20."""
    store = corpus(rows_of(400))
    history = decisions(store, 13, 20)
    asked = [text for each in history for text in each["asked"]]
    assert len(asked) == len(set(asked)) == 260
    assert asked[0].startswith("Title") and asked[-1].startswith("Text")
    assert [each["questions"]["note"] for each in history] == [""] * 13
    assert draw_about(store, history, "v3", sample=20).texts == history[3]["asked"]
    assert draw_about(store, history, "v99", sample=20).texts not in [e["asked"] for e in history]


def test_documents_that_join_and_go_bring_no_used_query_back() -> None:
    history = decisions(corpus(rows_of(400)), 2, 20)
    used = {text for each in history for text in each["asked"]}
    for rows in (rows_of(600), rows_of(400)[7:]):
        assert not used & {*next_draw(corpus(rows), history, sample=20).texts}


def test_where_all_queries_were_used_they_are_asked_again_and_it_is_said() -> None:
    history = decisions(corpus(rows_of(100, sentences=1)), 3, 100)
    first, second, third = history
    assert first["questions"]["used_before"] == 0 and first["questions"]["note"] == ""
    assert second["asked"] == first["asked"] == third["asked"]
    assert [each["questions"]["used_before"] for each in (second, third)] == [1, 2]
    count = len(first["asked"])
    assert second["questions"]["note"] == (
        "the documents have too few unused queries left: these "
        f"{count} were asked once before, so that the gate's confidence is less than it says"
    )
    assert "were asked 2 times before" in third["questions"]["note"]


def test_judged_queries_that_come_again_are_said_to() -> None:
    judged = Evidence.judged({"a": "one", "b": "two"}, {"a": {0: 1}, "b": {1: 1}})
    account = account_of(judged, [])
    assert (account["used_before"], account["note"]) == (0, "")
    about = {"candidate": "v1", "against": "raw", "passed": True}
    history = [{**about, "questions": account}]
    again = account_of(judged, history)
    assert again["used_before"] == 1
    assert "judged queries are the same for every change: these 2 were asked once" in again["note"]
    other = Evidence.judged({"a": "one", "b": "three"}, {"a": {0: 1}, "b": {1: 1}})
    assert account_of(other, history)["note"] == ""
    drawn = account_of(next_draw(corpus(rows_of(20)), history, sample=5), history)
    assert "version v1, which judgements let pass, may have learned from" in drawn["note"]


@pytest.mark.parametrize(
    "questions",
    [{"source": "documents", "start": [0, 0, ""]}, {"source": "documents", "last": 3}],
)
def test_a_history_without_its_draws_is_refused(questions: dict[str, Any]) -> None:
    history = [{"candidate": "v1", "against": "raw", "passed": True, "questions": questions}]
    with pytest.raises(NotWholeError, match="history does not say which queries were asked"):
        next_draw(corpus(rows_of(20)), history, sample=5)


@pytest.mark.usefixtures("all_reserved")
def test_a_known_item_at_rank_r_counts_as_the_formula_says() -> None:
    rows: list[tuple[Any, str, str]] = [(7, "a b c", "g h i"), (8, "d e f", "j k l")]
    evidence = Evidence.of_corpus(corpus(rows), sample=2)
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
