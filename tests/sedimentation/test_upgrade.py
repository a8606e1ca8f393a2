"""Another embedding model for a store: what is foretold, and the versions that go over to it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.cli import main
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.changes.forecast import Unread, chance_of_rank, expected_gain
from conch_dna.sedimentation.changes.heldout_queries import Evidence, best_documents
from conch_dna.sedimentation.changes.upgrades import bridge_of
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.stored_state import StorePlace
from conch_dna.sedimentation.stores.contract import RAW
from conch_dna.sedimentation.upkeep.verification import verified
from topic_models import DIMENSION, WORDS, documents, tables, write_models, write_static


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


def opened(
    models: dict[str, str], place: str | Path = ":memory:", to: str = "teacher", **settings: Any
) -> AntigravityEngine:
    config = ChelationConfig(training_mode="offline", **settings)
    return AntigravityEngine(place, models["student"], None, models[to], config=config)


def text_of(number: int) -> str:
    found = documents(number + 1)[number]
    return f"{found['title']} {found['text']}"


# Arithmetic


@pytest.mark.parametrize(("certain", "others"), [(0, 0.3), (2, 1.7), (8, 0.9), (3, 30.0)])
def test_gains_are_those_of_drawn_ranks(certain: int, others: float) -> None:
    ranks = 1 + certain + np.random.default_rng(0).poisson(others, 400_000)
    within = ranks <= 10
    gains = np.where(within, 1 / np.log2(ranks + 1), 0)
    assert expected_gain(certain, others) == pytest.approx(gains.mean(), abs=2e-3)
    assert chance_of_rank(certain, others) == pytest.approx(within.mean(), abs=2e-3)


def test_what_was_not_read_is_told_from_bridged_scores() -> None:
    """Scores about the bridged ones, the wider the nearer: the true number is known."""
    random = np.random.default_rng(1)
    bridged = random.normal(0.2, 0.1, size=(3, 20_000)).clip(-1, 1)
    slopes = np.array([[0.5], [0.8], [1.0]])
    wide = 0.03 + 0.1 * bridged.clip(0, 1)
    new = 0.1 + slopes * bridged + wide * random.normal(size=bridged.shape)
    told = np.ones((3, 2000), bool)
    unread = Unread(new=new[:, :2000], bridged=bridged[:, :2000], told=told)
    for at in range(2000, 20_000, 700):
        unread.add(bridged[:, at : at + 700])
    for number, share in enumerate((0.5, 0.99, 0.9995)):
        score = float(np.quantile(new[number], share))
        true = float((new[number, 2000:] > score).sum())
        assert unread.above(number, score) == pytest.approx(true, rel=0.2, abs=8)
    nothing = Unread(np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 3), bool))
    assert nothing.above(0, 0.1) == 0


def test_the_best_of_pages_are_the_best_of_all() -> None:
    random = np.random.default_rng(2)
    table, queries = random.normal(size=(50, 4)), random.normal(size=(3, 4))
    pages = [(list(range(at, at + 7))[: 50 - at], table[at : at + 7]) for at in range(0, 50, 7)]
    found = best_documents([*pages, ([], np.zeros((0, 4)))], queries, top_k=6)
    assert found == np.argsort(-(queries @ table.T), axis=1)[:, :6].tolist()


def test_a_bridge_takes_the_strength_that_fits_what_it_did_not_see() -> None:
    random = np.random.default_rng(3)

    def pairs(count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
        raw = random.normal(size=(count, 20))
        targets = raw @ mixing + noise * random.normal(size=(count, 30))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (raw, targets))  # type: ignore[return-value]

    mixing = random.normal(size=(20, 30))
    exact, noisy = (bridge_of(*pairs(30, noise), seed=0) for noise in (0.0, 20.0))
    assert exact.figures["strength"] == 0.01 and exact.figures["pairs"] == 30
    assert noisy.figures["strength"] > 0.01


# Versions


def test_documents_are_embedded_anew_and_queries_go_to_the_new_model(
    models: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "db"
    new = open_embedder(models["teacher"])
    with opened(models, place) as engine:
        engine.ingest(documents(200))
        result = engine.run_upgrade("reembed", 500)
        assert result.activated, result.reason
        assert (result.kind, result.documents) == ("reembed", 200)
        engine.ingest(documents(210))
        page = engine.store.get(["d7", "d205"], "v0001")
        wanted = new.documents([text_of(7), text_of(205)]).all_vectors()
        np.testing.assert_allclose(page.vectors, wanted, atol=1e-6)
    with AntigravityEngine(place, models["student"]) as engine:
        found = engine.run_inference(text_of(205))
        assert found.ids[0] == "d205" and found.scores[0] == pytest.approx(1, abs=1e-5)
        assert engine.versions.student("v0001").digest == new.digest
        assert engine.rollback() == RAW
    assert all(part.whole for part in verified(StorePlace(str(place), None, "documents", None)))


def test_a_bridge_leaves_documents_where_they_were_but_for_a_map(
    models: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "db"
    with opened(models, place) as engine:
        engine.ingest(documents(300))
        result = engine.run_upgrade("bridge", 120)
        assert result.activated, result.reason
        assert result.documents <= 120
        engine.ingest(documents(310))
        bridge = engine.versions.adapter("v0001")
        assert (bridge.in_dimension, bridge.out_dimension) == (20, DIMENSION)
        raw = engine.store.get(["d7", "d305"], RAW)
        page = engine.store.get(["d7", "d305"], "v0001")
        np.testing.assert_allclose(page.vectors, bridge.apply(raw.vectors), atol=1e-6)
        found = engine.run_inference(text_of(305))
        query = open_embedder(models["teacher"]).queries([text_of(305)]).all_vectors()[0]
        assert found.ids[0] == "d305"
        assert found.scores[0] == pytest.approx(float(query @ page.vectors[1]), abs=1e-5)
        with pytest.raises(ConchError, match="are not of one model, and no cycle moves"):
            engine.run_sedimentation_cycle(threshold=1)
        assert engine.run_offline_distillation().candidate == "v0002"
    assert all(part.whole for part in verified(StorePlace(str(place), None, "documents", None)))


def test_a_model_that_knows_less_is_refused(models: dict[str, str]) -> None:
    with opened(models, to="nothing") as engine:
        engine.ingest(documents(200))
        for way in ("bridge", "reembed"):
            result = engine.run_upgrade(way, 200)
            assert not result.activated and result.version == RAW
            assert "the lower bound must not be below" in result.reason


def test_what_a_cycle_learns_stays_with_the_new_model(models: dict[str, str]) -> None:
    settings: dict[str, Any] = {"collapse_percentile": 60.0, "top_k": 5, "threshold": 1}
    with opened(models, **settings) as engine:
        engine.ingest(documents(200))
        assert engine.run_upgrade("reembed", 500).activated
        engine.run_inferences([text_of(number) for number in range(80)])
        result = engine.run_sedimentation_cycle()
        if result.activated:
            own = engine.versions.own_student(result.version)
            assert own is not None and own.name == models["teacher"]
        assert result.candidate or "did not lower the loss" in result.reason


def test_a_model_that_went_is_named(models: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models["teacher"], tmp_path / "new")
    place = tmp_path / "db"
    with opened({**models, "teacher": str(tmp_path / "new")}, place) as engine:
        engine.ingest(documents(200))
        assert engine.run_upgrade("reembed", 500).activated
    shutil.rmtree(tmp_path / "new")
    with AntigravityEngine(place, models["student"]) as engine:
        with pytest.raises(ConchError, match="new' does not exist"):
            engine.run_inference(text_of(1))
        shutil.copytree(models["nothing"], tmp_path / "new")
        with pytest.raises(NotWholeError, match="is another student than version v0001"):
            engine.run_inference(text_of(1))
        assert engine.rollback() == RAW


# Forecasts


def test_what_is_foretold_is_what_comes(models: dict[str, str]) -> None:
    """Of all queries that the documents give, with half of the documents read."""
    with opened(models) as engine:
        engine.ingest(documents(600))
        told = engine.forecast_upgrade(150, 500, price=2.0)
        ways = {way.name: way for way in told.ways}
        assert 150 <= told.read <= 600 and told.documents == 600 and not told.judged
        assert [way.documents for way in told.ways] == [0, 150, 600]
        assert ways["reembed"].price == pytest.approx(1.2)
        assert ways["reembed"].agreement == (1.0, 1.0, 1.0)
        evidence = Evidence.of_corpus(engine.store, sample=500)
        assert told.queries == len(evidence.names) > 100
        assert engine.run_upgrade("reembed", 150).activated
        came = engine.held_out_quality()["nDCG@10"]
        assert ways["reembed"].ndcg.mean == pytest.approx(came, abs=0.03)
        assert ways["keep"].ndcg.mean < ways["bridge"].ndcg.mean < came
        assert ways["keep"].agreement.mean < ways["bridge"].agreement.mean < 1


def test_a_store_that_was_read_whole_is_known(models: dict[str, str]) -> None:
    """Nothing is left to foretell where the sample is the store."""
    queries = {f"q{number}": documents(400)[number]["title"] for number in range(0, 400, 10)}
    judgements = {f"q{number}": {f"d{number}": 1, "gone": 1} for number in range(0, 400, 10)}
    with opened(models) as engine:
        engine.ingest(documents(400))
        engine.set_judgements(queries, judgements)
        told = engine.forecast_upgrade(1000, 30)
        assert told.judged and (told.queries, told.read) == (30, 400)
        asked = engine._judged.sampled(30, seed=0)  # type: ignore[union-attr]
        helper = engine.helper
        assert helper is not None
        texts = [text_of(number) for number in range(400)]
        table = helper.get_teacher_embeddings(texts)
        scores = helper.get_teacher_embeddings(asked.texts, queries=True) @ table.T
        ids = [f"d{number}" for number in range(400)]
        rankings = [[ids[place] for place in np.argsort(-row)] for row in scores]
        wanted = asked.evaluate(rankings).ndcg.mean()
        assert told.ways[2].ndcg.mean == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "sample", "questions", "message"),
    [
        (300, 99, 50, "99 documents and the 50 held-out queries that the store gives are too few"),
        (300, 200, 19, "200 documents and the 19 held-out queries that the store gives are too"),
        (110, 200, 50, "the store has 77 documents to learn from, too few"),
    ],
)
def test_too_little_to_tell_from(
    models: dict[str, str], count: int, sample: int, questions: int, message: str
) -> None:
    with opened(models) as engine:
        engine.ingest(documents(count))
        with pytest.raises(ConchError, match=message):
            engine.forecast_upgrade(sample, questions)


def test_a_model_that_tells_nothing_apart_is_foretold_to_be_worth_nothing(
    models: dict[str, str], tmp_path: Path
) -> None:
    alike = write_static(tmp_path / "alike", np.ones((len(WORDS), 7)))
    with opened({**models, "alike": str(alike)}, to="alike") as engine:
        engine.ingest(documents(300))
        told = engine.forecast_upgrade(150, 60)
        assert told.ways[2].ndcg.high < 0.1
        assert told.ways[0].agreement.high < 0.2
        for price in (float("nan"), -1.0):
            with pytest.raises(ConchError, match="a price of"):
                engine.forecast_upgrade(150, 60, price=price)


# Versions of several models


def asymmetric(models: dict[str, str], teacher: str = "teacher") -> AntigravityEngine:
    config = ChelationConfig(training_mode="offline", space="asymmetric")
    return AntigravityEngine(
        models["place"], models["student"], None, models[teacher], config=config
    )


def test_a_teachers_documents_are_judged_and_joined_with_that_teacher_alone(
    models: dict[str, str], tmp_path: Path
) -> None:
    """With another one's vectors a worse version would pass, or a matrix not fit."""
    wider = write_static(tmp_path / "wider", np.ones((len(WORDS), 9)))
    models = {**models, "place": str(tmp_path / "db"), "wider": str(wider)}
    with asymmetric(models) as engine:
        engine.ingest(documents(200))
        assert engine.run_offline_distillation().activated
        told = engine.forecast_upgrade(120, 40)
        assert told.ways[0].ndcg.mean > 0.3
    for other in ("nothing", "wider"):
        with asymmetric(models, other) as engine:
            for change in (
                lambda engine=engine: engine.run_upgrade("bridge", 200),
                lambda engine=engine: engine.run_offline_distillation(),
                lambda engine=engine: engine.forecast_upgrade(120, 40),
                lambda engine=engine: engine.ingest(documents(210)),
            ):
                with pytest.raises(
                    ConchError, match=r"version v0001 carry the vectors of .*teacher"
                ):
                    change()
            assert engine.store.count() == 200 and engine.versions.active == "v0001"


def test_a_document_that_only_the_first_student_knows(
    models: dict[str, str], tmp_path: Path
) -> None:
    """It is an error of its own at ingest, and is named where every document is embedded."""
    _, table = tables()
    wide = write_static(tmp_path / "wide", table, more=["extra"])
    extra = {"id": "e", "text": "extra extra"}
    with opened({**models, "student": str(wide)}) as engine:
        engine.ingest([*documents(200), extra])
        with pytest.raises(ConchError, match=r"document 'e' could not be embedded: .*Delete"):
            engine.run_upgrade("reembed", 200)
        assert engine.run_upgrade("bridge", 150).activated
        assert engine.forecast_upgrade(150, 40).documents == 201
        engine.delete(["e"])
        assert engine.run_upgrade("reembed", 200).version == "v0003"
        result = engine.ingest([documents(202)[200], extra, documents(202)[201]])
        assert result.added == 2 and list(result.errors) == ["e"]


def test_judgements_of_other_documents_are_no_evidence(models: dict[str, str]) -> None:
    queries = {f"q{number}": documents(40)[number]["title"] for number in range(40)}
    foreign: dict[str, dict[Any, int]] = {each: {f"foreign-{each}": 1} for each in queries}
    with opened(models) as engine:
        engine.ingest(documents(200))
        engine.set_judgements(queries, foreign)
        for change in (
            lambda: engine.run_upgrade("bridge", 200),
            lambda: engine.forecast_upgrade(120, 40),
            lambda: engine.held_out_quality(),
        ):
            with pytest.raises(ConchError, match="none of 40 judged queries has a relevant"):
                change()
        some = {each: {f"d{number}": 1} for number, each in enumerate(queries) if number < 25}
        engine.set_judgements(queries, {**foreign, **some})
        assert engine.forecast_upgrade(120, 40).queries == 25


# The command


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["sediment", *map(str, arguments)])
    return result.exit_code, result.output


def test_it_is_foretold_done_and_taken_back(models: dict[str, str], tmp_path: Path) -> None:
    place, texts = tmp_path / "db", tmp_path / "docs.jsonl"
    texts.write_text("".join(json.dumps(each) + "\n" for each in documents(300)))
    assert run("ingest", place, texts, "--model", models["student"])[0] == 0
    figures = tmp_path / "told.json"
    upgrade = ("upgrade", place, "--to", models["teacher"], "--sample", 150)
    code, said = run(*upgrade, "--price", 0.5, "--json", figures)
    assert code == 0, said
    assert "reembed" in said and "1,000 documents" in said and "0.50" in said
    told = json.loads(figures.read_text())
    assert [way["name"] for way in told["ways"]] == ["keep", "bridge", "reembed"]
    code, said = run(*upgrade, "--do", "bridge")
    assert code == 0 and "active: v0001" in said, said
    code, said = run("status", place)
    shown = " ".join(said.replace("│", " ").split())
    assert code == 0 and "queries to" in shown and "documents' vectors bridged" in shown, said
    code, said = run("export", place, tmp_path / "out")
    assert code == 0, said
    assert run("rollback", place)[0] == 0
    code, said = run("upgrade", place, "--to", models["nothing"], "--do", "reembed")
    assert code == 1 and "REFUSED" in said, said
    config = tmp_path / "store.yaml"
    config.write_text("train_student: true\n")
    distill = ("distill", place, "--teacher", models["teacher"], "--config", config)
    code, said = run(*distill, "--json", figures)
    assert code == 0 and json.loads(figures.read_text())["fit"]["strength"] == 0.2, said
    code, said = run("upgrade", place, "--to", tmp_path / "nowhere")
    assert code == 2 and "does not exist" in said, said
