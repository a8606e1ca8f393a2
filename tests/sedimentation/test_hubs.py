"""Documents that are near to everything: found and held back, and nothing done without any."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter
from conch_dna.sedimentation.adapters.residual import fit_residual
from conch_dna.sedimentation.changes.heldout_queries import is_reserved
from conch_dna.sedimentation.changes.hubs import held_back, hubs_of
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.stored_state import StorePlace
from conch_dna.sedimentation.stores.contract import RAW
from conch_dna.sedimentation.upkeep.verification import verified
from topic_models import WORDS, documents, write_models, write_static

HUBS, DIMENSION, GENERAL = 40, 60, 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Besides those of topics a student whose words share a direction, that of some words alone."""
    folder = tmp_path_factory.mktemp("models")
    random = np.random.default_rng(3)
    shared = random.normal(size=DIMENSION) / np.sqrt(DIMENSION)
    table = random.normal(size=(len(WORDS), DIMENSION)) / np.sqrt(DIMENSION) + shared
    general = random.normal(size=(GENERAL, DIMENSION)) / np.sqrt(DIMENSION)
    table[:GENERAL] = shared + 0.2 * general
    return {**write_models(folder), "shared": str(write_static(folder / "shared", table))}


def opened(
    models: dict[str, str], place: str | Path = ":memory:", *, student: str = "shared", **more: Any
) -> AntigravityEngine:
    return AntigravityEngine(place, models[student], config=ChelationConfig(**more))


def papers(count: int) -> list[dict[str, str]]:
    """Documents of words of their own, two of which stand in their titles among others."""
    random = np.random.default_rng(7)
    found = []
    for number in range(count):
        words = [str(each) for each in random.choice(WORDS[GENERAL:], 8, replace=False)]
        others = [str(each) for each in random.choice(WORDS[GENERAL:], 4)]
        title, text = " ".join([*words[:2], *others]), " ".join(words)
        found.append({"id": f"d{number}", "title": title, "text": text})
    return found


def planted() -> list[dict[str, str]]:
    """Documents of general words alone."""
    texts = (" ".join(WORDS[: 3 + number % 9]) for number in range(HUBS))
    return [{"id": f"hub{n}", "title": "", "text": text} for n, text in enumerate(texts)]


def share_of_hubs(engine: AntigravityEngine) -> float:
    """How much of the answers to titles are planted documents."""
    found = engine.run_inferences([each["title"] for each in papers(100)])
    return float(np.mean([str(each).startswith("hub") for row in found for each in row.ids]))


def test_scaled_products_and_unit_length() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(3, 5)).astype(np.float32)
    vectors[:, -1] = 0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = held_back(["a", "b", "c"], vectors, {"b": 0.6})
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    query = np.append(random.normal(size=4), 0)
    np.testing.assert_allclose(rows @ query, vectors @ query * [1, 0.6, 1], atol=1e-6)


@pytest.mark.parametrize("kind", ["identity", "ridge", "residual"])
def test_a_wider_adapter_maps_the_same(kind: str) -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(40, 6)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    adapter = EmbeddingAdapter.identity(6)
    if kind != "identity":
        adapter = EmbeddingAdapter.from_matrix("ridge", random.normal(size=(7, 4)))
    if kind == "residual":
        targets = adapter.apply(rows)[:, ::-1].copy()
        adapter = fit_residual(adapter, rows, targets, ChelationConfig(epochs=4, hidden=5))
    wide = adapter.widened()
    assert wide.out_dimension == adapter.out_dimension + 1
    found = wide.apply(rows)
    np.testing.assert_allclose(found[:, :-1], adapter.apply(rows), atol=1e-6)
    assert not found[:, -1].any()


def test_planted_hubs_are_found_and_held_back(models: dict[str, str], tmp_path: Path) -> None:
    with opened(models, tmp_path / "db") as engine:
        engine.ingest([*papers(400), *planted()])
        before = share_of_hubs(engine)
        found = hubs_of(engine.versions, neighbours=10, seed=0, without=is_reserved)
        assert set(found.shares) >= {f"hub{number}" for number in range(HUBS)}
        assert all(0 < share < 1 for share in found.shares.values())
        assert found.skew_after < found.skew
        result = engine.run_sedimentation_cycle()
        assert result.activated, result.reason
        assert result.documents == len(found.shares) == result.fit["hubs"]
        assert result.figures["nDCG@10"]["interval"][0] > 0
        assert share_of_hubs(engine) < before / 4
        # What is held back is so once.
        again = engine.run_sedimentation_cycle(threshold=100)
        assert again.candidate is None and "no document was in" in again.reason
        engine.ingest(papers(410))
        page = engine.store.get(["d405", "hub0"], result.version)
        raw = engine.store.get(["d405", "hub0"], RAW)
        np.testing.assert_allclose(page.vectors[0][:-1], raw.vectors[0], atol=1e-6)
        share = np.linalg.norm(page.vectors[1][:-1])
        assert share == pytest.approx(found.shares["hub0"], abs=1e-5)
    with opened(models, tmp_path / "db") as engine:
        assert share_of_hubs(engine) < before / 4
        assert engine.delete(["hub0"]).deleted == ["hub0"]
    assert all(
        part.whole for part in verified(StorePlace(str(tmp_path / "db"), None, "documents", None))
    )


def test_without_hubs_nothing_is_done(models: dict[str, str]) -> None:
    with opened(models, student="student") as engine:
        engine.ingest(documents(400))
        found = hubs_of(engine.versions, neighbours=10, seed=0)
        assert not found.shares and found.skew == found.skew_after
        assert engine.run_sedimentation_cycle().candidate is None


def test_a_model_is_not_asked_again_for_what_the_store_holds(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with AntigravityEngine(
        ":memory:", models["student"], "offline", models["teacher"], 1.0
    ) as engine:
        engine.ingest(documents(200))
        assert engine.run_upgrade("reembed", 200).activated
        own = engine.versions.own_student("v0001")
        assert own is not None

        def never(*_: object, **__: object) -> None:
            raise AssertionError("it was asked")

        monkeypatch.setattr(own, "_embed", never)
        assert hubs_of(engine.versions, neighbours=10, seed=0).asking == 200


def test_a_small_store_has_none(models: dict[str, str]) -> None:
    """Every document is near to all others where there are but a few."""
    with opened(models) as engine:
        engine.ingest(papers(9))
        none = hubs_of(engine.versions, neighbours=10, seed=0, without=lambda identifier: True)
        assert (none.shares, none.asking) == ({}, 0)
        assert not hubs_of(engine.versions, neighbours=10, seed=0).shares
        engine.ingest(planted()[:3])
        assert not hubs_of(engine.versions, neighbours=10, seed=0).shares


def test_a_later_cycle_keeps_them_back(models: dict[str, str]) -> None:
    settings: dict[str, Any] = {"collapse_percentile": 60.0, "threshold": 1, "gate_margin": 0.05}
    with opened(models, **settings) as engine:
        engine.ingest([*papers(300), *planted()])
        first = engine.run_sedimentation_cycle()
        assert first.activated, first.reason
        engine.run_inferences([each["title"] for each in papers(120)])
        second = engine.run_sedimentation_cycle()
        assert second.candidate == "v0002", second.reason
        assert second.activated, second.reason
        shares = [
            np.linalg.norm(engine.store.get(["hub0"], each).vectors[0][:-1])
            for each in ("v0001", "v0002")
        ]
        assert shares[0] < 0.999 and shares[1] < 0.999
