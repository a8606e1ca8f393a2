"""The store's revision, and what is cached by it: words, the gate's questions, the null."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.retrieval import WordFusion
from conch_dna.sedimentation.stores.contract import RAW, Hits, VectorStore
from conch_dna.sedimentation.stores.open_store import open_store
from qdrant_over_http import QdrantOverHttp
from topic_models import documents, write_models

D = 4
IDENTITY = {"student": "tiny-student", "digest": "d1", "dimension": D}
pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(params=["folder", "memory", "http"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VectorStore]:
    if request.param == "http":
        with QdrantOverHttp() as over, open_store(over.url, identity=IDENTITY) as opened:
            yield opened
    else:
        place = tmp_path / "db" if request.param == "folder" else ":memory:"
        with open_store(place, identity=IDENTITY) as opened:
            yield opened


def put(store: VectorStore, *texts: str, first: int = 0) -> None:
    ids = list(range(first, first + len(texts)))
    rows = np.eye(D, dtype=np.float32)[[n % D for n in ids]]
    vectors = dict.fromkeys((RAW, *store.versions()), rows)
    store.put(ids, [{"text": text} for text in texts], list(texts), vectors)


def test_every_write_raises_it_and_no_reading_does(store: VectorStore) -> None:
    seen = [store.revision]

    def raised() -> bool:
        seen.append(store.revision)
        return seen[-1] > seen[-2]

    put(store, "a", "b")
    assert raised()
    put(store, "c", "d")
    assert raised() and store.count() == 2
    store.add_version("v1", D)
    store.put_version("v1", [0, 1], np.eye(D, dtype=np.float32)[:2])
    assert raised()
    store.search(np.eye(D, dtype=np.float32)[:1], version="v1", top_k=1)
    list(store.pages())
    store.put([], [], [], {RAW: np.zeros((0, D)), "v1": np.zeros((0, D))})
    assert not raised()


def test_it_outlives_the_process(tmp_path: Path) -> None:
    with open_store(tmp_path / "db", identity=IDENTITY) as store:
        put(store, "a")
        before = store.revision
    with open_store(tmp_path / "db") as store:
        assert store.revision == before
        put(store, "b")
        assert store.revision > before


def test_another_process_is_noticed() -> None:
    with (
        QdrantOverHttp() as over,
        open_store(over.url, identity=IDENTITY) as writer,
        open_store(over.url) as reader,
    ):
        put(writer, "whale")
        words = WordFusion(reader, k=60)
        none = Hits([], np.zeros(0, np.float32), [])
        assert words.fused("whale", none, 3).ids == [0]
        put(writer, "coral")
        assert words.fused("whale", none, 3).ids == []
        assert words.fused("coral", none, 3).ids == [0]
        put(writer, "tides", first=1)
        assert words.fused("tides", none, 3).ids == [1] and reader.count() == 2


def changed(given: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Documents of the same ids with the texts of others."""
    return [{**new, "id": old["id"]} for old, new in zip(given, other, strict=True)]


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_changed_texts_make_words_and_null_anew(
    kind: str, models: dict[str, str], tmp_path: Path
) -> None:
    location = tmp_path / "db" if kind == "folder" else ":memory:"
    given: list[Any] = list(documents(120))
    old, new = given[:60], changed(given[:60], given[60:])
    settings = ChelationConfig(fusion="rrf", top_k=5, collapse_sample=40)
    with AntigravityEngine(location, models["student"], "baseline", config=settings) as engine:
        engine.ingest(old)
        engine.run_inference(old[0]["title"])
        null = (engine.state / "null-raw.json").read_text()
        engine.ingest(new, replace_changed=True)
        assert engine.store.count() == 60
        best = engine.run_inference(f"{new[7]['title']} {new[7]['text']}").ids[0]
        assert best == old[7]["id"]
        assert (engine.state / "null-raw.json").read_text() != null


def test_one_changed_document_is_a_change(models: dict[str, str]) -> None:
    given: list[Any] = list(documents(40))
    settings = ChelationConfig(fusion="rrf", top_k=5)
    with AntigravityEngine(":memory:", models["student"], "baseline", config=settings) as engine:
        engine.ingest(given)
        engine.run_inference(given[0]["title"])
        before = json.loads((engine.state / "null-raw.json").read_text())
        engine.ingest(
            [{"id": given[0]["id"], "text": f"{given[1]['text']} zygomorphic"}],
            replace_changed=True,
        )
        assert engine._fusion.fused("zygomorphic", Hits([], np.zeros(0), []), 3).ids
        engine.run_inference(given[0]["title"])
        after = json.loads((engine.state / "null-raw.json").read_text())
        assert before["null"] != after["null"]


def test_another_sample_calibrates_the_null_anew(models: dict[str, str], tmp_path: Path) -> None:
    given: list[Any] = list(documents(40))
    for sample in (20, 30):
        config = ChelationConfig(top_k=5, collapse_sample=sample)
        with AntigravityEngine(
            tmp_path / "db", models["student"], "baseline", config=config
        ) as engine:
            engine.ingest(given)
            engine.run_inference(given[0]["title"])
            null = json.loads((engine.state / "null-raw.json").read_text())["null"]
            assert null["sample"] == sample
