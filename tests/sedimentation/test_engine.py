"""The engine from documents to better vectors: real stores and static models of made-up topics.

What a map can learn is known there, so a good teacher must pass the gate and a bad one must not.
"""

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch_dna.errors import ConchError, FolderInUseError, NotWholeError
from conch_dna.sedimentation import engine as engine_module
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter
from conch_dna.sedimentation.changes.heldout_queries import is_reserved, measures
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.intake import Intake
from conch_dna.sedimentation.results import ChangeResult
from conch_dna.sedimentation.stores.contract import RAW
from topic_models import (
    DIMENSION,
    STUDENT_DIMENSION,
    WORDS,
    documents,
    write_models,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


def opened(
    models: dict[str, str],
    location: str | Path = ":memory:",
    mode: str = "offline",
    teacher: str = "teacher",
    weight: float = 1.0,
    **settings: Any,
) -> AntigravityEngine:
    named = None if mode == "baseline" and settings.get("space") is None else models[teacher]
    config = ChelationConfig(**settings)
    return AntigravityEngine(location, models["student"], mode, named, weight, config=config)


@pytest.fixture(params=["memory", "folder"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return ":memory:" if request.param == "memory" else str(tmp_path / "db")


# Documents in, documents out


def test_documents_are_found_by_their_own_words(models: dict[str, str], location: str) -> None:
    given = documents(60)
    given[3]["id"] = 3  # type: ignore[assignment]
    given[3]["payload"] = {"year": 1999}  # type: ignore[assignment]
    with opened(models, location, "baseline") as engine:
        result = engine.ingest(given)
        assert (result.added, result.documents, result.errors) == (60, 60, {})
        found = engine.run_inference(f"{given[3]['title']} {given[3]['text']}", top_k=3)
        assert found.ids[0] == 3 and len(found.ids) == 3
        assert found.scores == sorted(found.scores, reverse=True)
        assert found.scores[0] == pytest.approx(1, abs=1e-5)
        assert found.payloads[0]["year"] == 1999
        assert found.payloads[0]["text"] == given[3]["text"]
        assert found.version == RAW
        only = engine.run_inference(given[4]["title"], where={"year": 1999})
        assert only.ids == [3] and only.collapsed is None


def test_what_is_there_is_not_embedded_again(models: dict[str, str], location: str) -> None:
    with opened(models, location, "baseline") as engine:
        engine.ingest(documents(30))
        again = engine.ingest(documents(40))
        assert (again.added, again.unchanged, again.documents) == (10, 30, 40)
        changed = [{**documents(1)[0], "payload": {"seen": True}}]
        assert engine.ingest(changed).updated == 1
        assert engine.store.get(["d0"]).payloads[0]["seen"] is True
        other = [{**documents(1)[0], "text": WORDS[0]}]
        with pytest.raises(ConchError, match="'d0' is there with another text: give it another"):
            engine.ingest(other)
        assert engine.ingest(other, replace_changed=True).updated == 1
        assert engine.store.count() == 40


def test_the_same_id_twice_with_other_texts_is_refused(models: dict[str, str]) -> None:
    with opened(models, mode="baseline") as engine:
        twice = [{"id": "a", "text": WORDS[0]}, {"id": "a", "text": WORDS[1]}]
        with pytest.raises(ConchError, match="'a' is there with another text"):
            engine.ingest(twice)
        assert engine.ingest([twice[0], dict(twice[0])]).unchanged == 1


def test_a_stream_of_any_length_is_taken_a_batch_at_a_time(models: dict[str, str]) -> None:
    """Were it read whole first, nothing would be stored when it breaks."""

    def breaking() -> Iterator[dict[str, str]]:
        yield from documents(50)
        raise OSError("the source broke")

    with opened(models, mode="baseline", batch_size=20) as engine:
        with pytest.raises(OSError, match="the source broke"):
            engine.ingest(breaking())
        # Eight first, then twenty at a time.
        assert engine.store.count() == 48
        assert engine.ingest(documents(50)).added == 2


def test_what_a_slow_model_made_is_durable_after_seconds(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of two seconds a document: batches of eight, then of what five seconds allow."""
    with opened(models, mode="baseline", batch_size=100) as engine:
        sizes, now = [], [0.0]
        monkeypatch.setattr("time.perf_counter", lambda: now[0])
        take_in = Intake.take_in

        def slow(self: Intake, part: Any) -> None:
            take_in(self, part)
            sizes.append(len(part))
            now[0] += 2.0 * len(part)

        monkeypatch.setattr(Intake, "take_in", slow)
        assert engine.ingest(documents(12)).added == 12
        assert sizes == [8, 2, 2]


def test_a_text_that_cannot_be_embedded_is_an_error_of_its_own(models: dict[str, str]) -> None:
    """A word that the student does not know has no vector: never a zero vector."""
    with opened(models, mode="baseline") as engine:
        result = engine.ingest([{"id": "a", "text": WORDS[0]}, {"id": "b", "text": "unheard"}])
        assert (result.added, list(result.errors)) == (1, ["b"])
        assert engine.store.count() == 1


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"id": "bad", "text": f"{WORDS[1]} \ud800"}, "lone surrogate"),
        ({"id": "bad", "text": WORDS[1], "payload": {"n": np.float32(1)}}, "of type float32"),
        ({"id": "bad", "text": WORDS[1], "payload": {"n": nested(64)}}, "more than 64 levels"),
        ({"id": "bad", "text": WORDS[1], "payload": {"n": nested(5000)}}, "more than 64 levels"),
    ],
)
def test_what_a_store_could_not_give_back_is_an_error_of_its_own(
    wrong: dict[str, Any], reason: str, models: dict[str, str], location: str
) -> None:
    """Payloads of 123 levels were acknowledged, and no document could be read any more."""
    deep = {"id": "deep", "text": WORDS[2], "payload": {"n": nested(63)}}
    with opened(models, location, "baseline") as engine:
        result = engine.ingest([{"id": "a", "text": WORDS[0]}, wrong, deep])
        assert (result.added, list(result.errors)) == (2, ["bad"])
        assert reason in result.errors["bad"]
        assert engine.store.get(["deep"]).payloads[0]["n"] == nested(63)
        unnamed = engine.ingest(["half \ud800", WORDS[3]])
        assert (unnamed.added, list(unnamed.errors)) == (1, ["document 1"])


@pytest.mark.parametrize("query", ["", "  \n"])
def test_a_query_of_white_space_is_refused(query: str, models: dict[str, str]) -> None:
    with opened(models, mode="baseline") as engine:
        engine.ingest(documents(3))
        with pytest.raises(ConchError, match="query 1 is only white space"):
            engine.run_inference(query)
        with pytest.raises(ConchError, match="top_k is 0"):
            engine.run_inference(WORDS[0], top_k=0)


# Learning from a teacher


def learned_from(count: int) -> int:
    """How many of so many documents are not reserved for the gate's queries."""
    return sum(not is_reserved(each["id"]) for each in documents(count))


@dataclass(frozen=True)
class Learned:
    """A store that has learned from a good teacher, for tests that copy it or only look."""

    folder: Path
    before: float
    after: float
    result: ChangeResult


@pytest.fixture(scope="module")
def learned(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Learned]:
    stores = {}
    fresh = documents(60, seed=5)
    for space in ("symmetric", "asymmetric"):
        folder = tmp_path_factory.mktemp("learned") / space
        with opened(models, folder, space=space) as engine:
            engine.ingest(documents(400))
            before = _quality(engine, fresh)
            result = engine.run_offline_distillation()
            stores[space] = Learned(folder, before, _quality(engine, fresh), result)
    return stores


@pytest.mark.parametrize("space", ["symmetric", "asymmetric"])
def test_a_good_teacher_passes_the_gate_and_helps(
    space: str, learned: dict[str, Learned], models: dict[str, str], tmp_path: Path
) -> None:
    """Judged by queries of new documents' topics, which neither fit nor gate has seen."""
    made = learned[space]
    result = made.result
    assert result.activated, result.reason
    assert result.version == "v0001"
    assert result.documents == result.steps["teacher"] == learned_from(400)
    assert set(result.seconds) == {"queries", "fit", "rewrite", "gate", "activation"}
    assert result.figures["nDCG@10"]["interval"][0] >= -0.005
    assert made.after > made.before + 0.05
    shutil.copytree(made.folder, tmp_path / "db")
    with opened(models, tmp_path / "db", space=space) as engine:
        assert engine.versions.active == "v0001"
        assert engine.store.get(["d0"], "v0001").vectors.shape[1] == DIMENSION
        assert engine.rollback() == RAW
        assert _quality(engine, documents(60, seed=5)) == pytest.approx(made.before)


def _quality(engine: AntigravityEngine, queries: list[dict[str, str]]) -> float:
    """Share of the 10 nearest documents that have a topic of the query's."""

    def topics(text: str) -> set[str]:
        return {word.split("word")[0] for word in text.split()}

    found = engine.run_inferences([query["title"] for query in queries], 10)
    shares = [
        np.mean([bool(topics(query["title"]) & topics(p["title"])) for p in result.payloads])
        for query, result in zip(queries, found, strict=True)
    ]
    return float(np.mean(shares))


def test_a_teacher_that_knows_nothing_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    with opened(models, tmp_path / "db", teacher="nothing", space="asymmetric") as engine:
        engine.ingest(documents(200))
        before = engine.run_inference(documents(1)[0]["title"])
        result = engine.run_offline_distillation()
        assert not result.activated and result.candidate == "v0001"
        assert "the lower bound must not be below" in result.reason
        assert engine.versions.active == RAW and engine.store.versions() == []
        assert engine.run_inference(documents(1)[0]["title"]) == before
        assert list((engine.state / "versions").iterdir()) == []
        (entry,) = engine.gate_history()
        assert entry["passed"] is False and entry["candidate"] == "v0001"
        assert engine.run_offline_distillation().candidate == "v0002", "no name is used twice"


@pytest.fixture
def slow_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every version answers every query by 0.003 worse than the one before."""

    def made_up(versions: Any, evidence: Any, names: Any, helper: Any) -> Any:
        losses = [0.0 if name == RAW else 0.003 * int(name[1:]) for name in names]
        return {"nDCG@10": [np.full(len(evidence.texts), 0.5 - loss) for loss in losses]}

    monkeypatch.setattr(engine_module, "measures", made_up)


@pytest.mark.usefixtures("slow_decline")
def test_small_losses_cannot_add_up(models: dict[str, str]) -> None:
    """Each is within the margin of the version before; the second is not of the raw vectors."""
    with opened(models) as engine:
        engine.ingest(documents(120))
        first = engine.run_offline_distillation()
        assert first.activated and set(first.figures) == {"nDCG@10"}
        second = engine.run_offline_distillation()
        assert not second.activated and engine.versions.active == "v0001"
        found = {name: each["difference"] for name, each in second.figures.items()}
        assert found == pytest.approx({"nDCG@10": -0.003, "nDCG@10 against raw": -0.006})
        assert set(engine.gate_history()[-1]["figures"]) == set(found)


def test_every_change_is_judged_by_queries_of_its_own(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def noted(versions: Any, evidence: Any, *rest: Any) -> Any:
        asked.append(evidence.texts)
        return measures(versions, evidence, *rest)

    monkeypatch.setattr(engine_module, "measures", noted)
    with opened(models, gate_queries=10) as engine:
        engine.ingest(documents(200))
        results = [engine.run_offline_distillation() for _ in range(4)]
        assert len({text for texts in asked for text in texts}) == 40
        assert [each.questions["note"] for each in results] == [""] * 4
        again = [engine.run_offline_distillation() for _ in range(3)][-1]
        assert again.questions["used_before"] == 1
        assert again.questions["note"] in again.reasons
        assert engine.gate_history()[-1]["questions"] == again.questions
        engine.held_out_quality()
        assert asked[-1] in asked[:-1], "asked again, for they are what the history tells of"


def test_a_change_tells_how_far_it_is(models: dict[str, str]) -> None:
    with opened(models) as engine:
        engine.ingest(documents(120))
        told: list[tuple[str, dict[str, Any]]] = []
        engine.report = lambda event, row: told.append((event, row))
        engine.run_offline_distillation()
    phases = [row for event, row in told if event == "phase"]
    assert [row["name"] for row in phases] == ["learning", "rewriting", "asking held-out queries"]
    assert [row["total"] for row in phases] == [120, 120, 0]
    assert sum(row["by"] for event, row in told if event == "advance") == 240


def test_a_blend_stays_in_the_students_space(models: dict[str, str]) -> None:
    with opened(models, weight=0.5) as engine:
        engine.ingest(documents(300))
        result = engine.run_offline_distillation()
        assert result.activated, result.reason
        assert engine.store.get(["d0"], "v0001").vectors.shape[1] == STUDENT_DIMENSION


def test_a_residual_adapter_is_trained_on_top(models: dict[str, str]) -> None:
    with opened(models, adapter="residual") as engine:
        engine.ingest(documents(300))
        result = engine.run_offline_distillation(batch_size=50, learning_rate=0.002, epochs=3)
        assert result.fit["loss_after"] <= result.fit["loss_before"]
        assert result.fit["batch_size"] == 50 and result.fit["learning_rate"] == 0.002


@pytest.mark.parametrize("space", ["symmetric", "asymmetric"])
def test_new_documents_get_the_vectors_of_every_version(
    space: str, learned: dict[str, Learned], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(learned[space].folder, tmp_path / "db")
    with opened(models, tmp_path / "db", space=space) as engine:
        whole = engine.store.get(["d1"], "v0001").vectors
        engine.ingest(documents(410))
        assert engine.store.count("v0001") == engine.store.count() == 410
        twin = [{**documents(2)[1], "id": "twin"}]
        engine.ingest(twin)
        np.testing.assert_allclose(engine.store.get(["twin"], "v0001").vectors, whole, atol=1e-6)


def test_judgements_take_the_place_of_pseudo_queries(models: dict[str, str]) -> None:
    with opened(models) as engine:
        given = documents(200)
        engine.ingest(given)
        queries = {f"q{n}": each["title"] for n, each in enumerate(given[:40])}
        engine.set_judgements(queries, {f"q{n}": {given[n]["id"]: 1} for n in range(40)})
        result = engine.run_offline_distillation()
        assert set(result.figures) == {"nDCG@10"}
        assert result.figures["nDCG@10"]["queries"] == 40
        assert result.documents == 200
        with pytest.raises(ConchError, match="none of 1 queries has a relevant document"):
            engine.set_judgements({"q": "text"}, {"other": {"d1": 1}})


# The log of collapsed neighbourhoods, and cycles


def test_collapsed_neighbourhoods_are_logged_and_survive(
    models: dict[str, str], tmp_path: Path
) -> None:
    settings = {"collapse_percentile": 60.0}
    with opened(models, tmp_path / "db", "baseline", **settings) as engine:
        engine.ingest(documents(100))
        found = engine.run_inferences([each["title"] for each in documents(30)])
        collapsed = [result for result in found if result.collapsed]
        assert collapsed and len(collapsed) < 30
        assert all(each.dispersion < 1 for each in found)  # type: ignore[operator]
        assert len(engine.log) == len(collapsed)
        events = list(engine.log.events())
        assert events[0].neighbourhood == collapsed[0].ids
    with opened(models, tmp_path / "db", "baseline", **settings) as engine:
        assert list(engine.log.events()) == events
        assert (engine.state / "null-raw.json").is_file()
        again = engine.run_inference(documents(1)[0]["title"])
        assert again.dispersion == pytest.approx(found[0].dispersion)


@pytest.mark.parametrize("mode", ["baseline", "hybrid", "offline"])
def test_a_cycle_is_judged_like_any_change(mode: str, models: dict[str, str]) -> None:
    """A push alone does not help these vectors and is refused; a teacher does."""
    with opened(models, mode=mode, weight=0.5, collapse_percentile=95.0) as engine:
        engine.ingest(documents(200))
        engine.run_inferences([each["title"] for each in documents(200)])
        result = engine.run_sedimentation_cycle(threshold=1, learning_rate=0.002, epochs=5)
        assert (result.kind, result.mode, result.candidate) == ("cycle", mode, "v0001")
        assert result.documents == learned_from(200), "those that the gate asks for are held out"
        assert result.fit["loss_after"] < result.fit["loss_before"]
        source = "homeostatic" if mode == "baseline" else "teacher"
        assert result.steps == {**dict.fromkeys(result.steps, 0), source: learned_from(200)}
        assert result.activated == (mode != "baseline"), result.reason
        assert engine.versions.active == ("v0001" if result.activated else RAW)
        quiet = engine.run_sedimentation_cycle(threshold=10_000)
        assert quiet.candidate is None
        assert "no document was in 10000 or more collapsed neighbourhoods" in quiet.reason


def test_few_logged_documents_are_not_what_the_teacher_is_aligned_on(
    models: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Fewer than the teacher's dimensions, all of one crowd, they would turn its space anyhow."""
    with opened(models, mode="hybrid", weight=0.5, collapse_percentile=95.0) as engine:
        engine.ingest(documents(200))
        engine.run_inferences([documents(1)[0]["title"]])
        result = engine.run_sedimentation_cycle(threshold=1)
        assert result.candidate is None or 0 < result.documents < 24
        assert "the teacher is aligned on" not in caplog.text


def test_a_second_cycle_stands_on_the_first(models: dict[str, str]) -> None:
    with opened(models, mode="hybrid", weight=0.5, collapse_percentile=95.0) as engine:
        engine.ingest(documents(200))
        titles = [each["title"] for each in documents(200)]
        engine.run_inferences(titles)
        assert engine.run_sedimentation_cycle(threshold=1).activated
        quiet = engine.run_sedimentation_cycle(threshold=1)
        assert "of version v0001" in quiet.reason, "events of other vectors do not count"
        engine.run_inferences(titles)
        second = engine.run_sedimentation_cycle(threshold=1)
        if second.candidate:
            assert engine.gate_history()[-1]["against"] == "v0001"


def test_no_cycle_moves_a_teachers_vectors(
    learned: dict[str, Learned], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(learned["asymmetric"].folder, tmp_path / "db")
    with (
        opened(models, tmp_path / "db", space="asymmetric") as engine,
        pytest.raises(ConchError, match="are not of one model, and no cycle moves either"),
    ):
        engine.run_sedimentation_cycle()


def test_baseline_never_opens_the_teacher(models: dict[str, str]) -> None:
    engine = AntigravityEngine(":memory:", models["student"], "baseline", "no/such-teacher")
    with engine:
        assert engine.helper is None
        with pytest.raises(ConchError, match="offline distillation needs a teacher"):
            engine.run_offline_distillation()


# Fusion


def test_words_and_vectors_are_fused(models: dict[str, str]) -> None:
    with opened(models, mode="baseline", fusion="rrf") as engine:
        given = documents(150)
        given[7] = {**given[7], "payload": {"kind": "x"}}  # type: ignore[dict-item]
        engine.ingest(given)
        found = engine.run_inference(f"{given[7]['title']} {given[7]['text']}", 5)
        assert found.ids[0] == "d7"
        assert found.scores[0] == pytest.approx(2 / 61)
        assert engine.run_inference(given[8]["title"], 5, where={"kind": "x"}).ids == ["d7"]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training_mode": "online"}, r"use one of baseline, offline, hybrid"),
        ({"training_mode": "hybrid"}, r"training_mode hybrid .* needs a teacher: give"),
        ({"training_mode": "offline", "teacher_model_name": "/no/such"}, r"does not exist"),
        ({"config": ChelationConfig(space="asymmetric")}, r"asymmetric space needs a teacher"),
    ],
)
def test_an_engine_that_cannot_work_is_refused(
    arguments: dict[str, Any], message: str, models: dict[str, str]
) -> None:
    with pytest.raises(ConchError, match=message):
        AntigravityEngine(":memory:", models["student"], **arguments)


def test_a_store_of_another_student_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    with opened(models, tmp_path / "db", "baseline") as engine:
        engine.ingest(documents(3))
    with pytest.raises(ConchError, match=rf"with student {models['student']}, not"):
        AntigravityEngine(tmp_path / "db", models["teacher"])
    with opened(models, tmp_path / "db", "baseline") as engine:
        assert engine.store.count() == 3


def test_one_writer_at_a_time(models: dict[str, str], tmp_path: Path) -> None:
    with (
        opened(models, tmp_path / "db", "baseline"),
        pytest.raises(FolderInUseError, match="is in use by process"),
    ):
        opened(models, tmp_path / "db", "baseline")


def test_an_engine_that_is_gone_leaves_no_model_in_memory(models: dict[str, str]) -> None:
    engine = opened(models, batch_size=7)
    engine.ingest(documents(20))
    assert engine.helper is not None
    engine.helper.load_teacher_model()
    kept = [weakref.ref(engine.student.model), weakref.ref(engine.helper.teacher.embedder.model)]
    with opened(models, batch_size=9) as other:
        assert other.student.model is engine.student.model
        assert (engine.student.batch_size, other.student.batch_size) == (7, 9)
    engine.close()
    del engine, other
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_an_empty_store_learns_nothing(models: dict[str, str]) -> None:
    with opened(models) as engine, pytest.raises(ConchError, match="the store is empty: ingest"):
        engine.run_offline_distillation()


def test_an_active_version_without_its_adapter_is_found_out(
    learned: dict[str, Learned], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(learned["symmetric"].folder, tmp_path / "db")
    shutil.rmtree(tmp_path / "db" / "versions" / "v0001")
    with pytest.raises(NotWholeError, match="the adapter of version v0001 is missing"):
        opened(models, tmp_path / "db")


@pytest.mark.parametrize("content", ["[" * 200_000, "[1]", "{}", '{"a":' * 900])
@pytest.mark.parametrize(
    "name",
    ["gate_history.jsonl", "null-v0001.json", "vectors/manifest.json", "chelation/a", "adapter"],
)
def test_a_damaged_file_is_told_in_one_line(
    name: str, content: str, learned: dict[str, Learned], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(learned["symmetric"].folder, tmp_path / "db")
    places = {"chelation/a": "chelation/chelation_events.jsonl"}
    path = (
        tmp_path / "db" / places.get(name, name.replace("adapter", "versions/v0001/adapter.json"))
    )
    path.write_text(f"{content}\n")

    def use() -> None:
        with opened(models, tmp_path / "db") as engine:
            engine.run_inference(documents(1)[0]["title"])
            engine.gate_history()

    with pytest.raises(ConchError) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_store_is_refused(
    learned: dict[str, Learned], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(learned["symmetric"].folder, tmp_path / "db")
    folder = tmp_path / "db" / "versions" / "v0001"
    own = EmbeddingAdapter.load(folder)
    EmbeddingAdapter.identity(7).save(folder, {"documents": "adapted"})
    with (
        opened(models, tmp_path / "db") as engine,
        pytest.raises(NotWholeError, match="maps vectors of 7 dimensions, but the store has"),
    ):
        engine.run_inference(documents(1)[0]["title"])
    own.save(folder, {"documents": "other"})
    with (
        opened(models, tmp_path / "db") as engine,
        pytest.raises(NotWholeError, match="does not say what the version's documents carry"),
    ):
        engine.held_out_quality()


def test_a_teachers_version_is_judged_with_its_teacher_only(
    learned: dict[str, Learned], models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(learned["asymmetric"].folder, tmp_path / "db")
    with (
        opened(models, tmp_path / "db", "baseline") as engine,
        pytest.raises(ConchError, match=r"carry the vectors of .*: give that teacher"),
    ):
        engine.held_out_quality()


# Killed at any moment

# Before each step the worker waits to be told to go on, so that a kill can be aimed at it.
WORKER = """
import itertools, sys
sys.path.insert(0, {tests!r})
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.engine import AntigravityEngine
from topic_models import documents
engine = AntigravityEngine({db!r}, {student!r}, "offline", {teacher!r}, 1.0,
                           config=ChelationConfig(batch_size=10, gate_queries=40))
def said(*words):
    print(*words, flush=True)
    sys.stdin.readline()
said("open")
count = engine.store.count()
for start in range(count, count + 40, 10):
    engine.ingest(documents(start + 10)[start:])
    said("acknowledged", start + 10)
for number in itertools.count():
    result = engine.run_offline_distillation()
    said("changed", result.activated, result.version)
    if number % 3 == 2 and engine.store.previous:
        engine.rollback()
        said("back", engine.versions.active)
"""
KILLS = int(os.environ.get("CONCH_DNA_KILLS", "3"))
# Steps of the worker up to its last ingest, and how long each and each later one takes, at most.
INGESTS, INGEST_S, CHANGE_S = 5, 0.02, 0.6


@pytest.mark.slow
def test_a_killed_process_leaves_the_old_or_the_new_version_whole(
    models: dict[str, str], tmp_path: Path
) -> None:
    """CONCH_DNA_KILLS says how often; -s shows where. The moments are seeded.

    Of kills in the same step none before a change is acknowledged, none behind it: what is active
    is whole, and answers held-out queries as well as the history says of it.
    """
    random = np.random.default_rng(3)
    db = tmp_path / "db"
    tests = str(Path(__file__).parents[1])
    script = WORKER.format(tests=tests, db=str(db), **models)
    acknowledged, compared = 0, 0
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        steps = int(random.integers(1, 2 * INGESTS))
        last = ""
        for _ in range(steps):
            last = process.stdout.readline().strip()
            assert last, "the worker ended by itself"
            if last.startswith("acknowledged"):
                acknowledged = int(last.split()[1])
            process.stdin.write("\n")
            process.stdin.flush()
        time.sleep(float(random.uniform(0, INGEST_S if steps < INGESTS else CHANGE_S)))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().splitlines()
        if rest and rest[-1].startswith("acknowledged"):
            acknowledged = int(rest[-1].split()[1])
        process.wait()
        process.stdin.close()
        process.stdout.close()
        with opened(models, db, batch_size=10, gate_queries=40) as engine:
            assert engine.store.count() >= acknowledged
            wanted = [each["id"] for each in documents(acknowledged)]
            assert len(engine.store.get(wanted).ids) == acknowledged
            active = engine.versions.active
            assert engine.store.count(active) == engine.store.count()
            if wanted:
                page = engine.store.get(wanted, active)
                raw = engine.store.get(wanted)
                np.testing.assert_allclose(
                    page.vectors, engine.versions.adapter(active).apply(raw.vectors), atol=1e-6
                )
            assert set(engine.store.versions()) <= {active, engine.store.previous}
            kept = {path.name for path in (engine.state / "versions").iterdir()}
            assert kept == set(engine.store.versions())
            found = recorded_and_measured(engine)
            if found:
                assert found[1] == pytest.approx(found[0], abs=1e-6)
                compared += 1
            print(f"kill {kill}: behind {[last, *rest][-1]!r}, active {active}, nDCG {found}")
    print(f"{KILLS} kills, nDCG compared behind {compared}, {acknowledged} documents acknowledged")


def recorded_and_measured(engine: AntigravityEngine) -> tuple[float, float] | None:
    """The active version's nDCG@10 in the gate's history, and now; None where documents joined."""
    active, count = engine.versions.active, engine.store.count()
    for entry in reversed(engine.gate_history()):
        names = {"after": entry["candidate"], "before": entry["against"]}
        for when, name in names.items():
            if name == active and entry["documents"] == count:
                return entry["figures"]["nDCG@10"][when], engine.held_out_quality()["nDCG@10"]
    return None
