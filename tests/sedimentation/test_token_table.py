"""A static student's own table, fitted to a teacher: the closed form, and versions that have one.

The table is compared with another way to the same least squares; versions are of made-up topics.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.adapters.export import export_sentence_transformer
from conch_dna.sedimentation.adapters.token_table import MAP_STRENGTH, TablePairs, token_vectors
from conch_dna.sedimentation.changes import cycles
from conch_dna.sedimentation.changes import versions as versions_module
from conch_dna.sedimentation.changes.versions import origin_of
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.embedders.local import static_model
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.embedders.static_folder import with_table, write_static
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.stored_state import StorePlace
from conch_dna.sedimentation.stores.contract import RAW
from conch_dna.sedimentation.upkeep.verification import verified
from topic_models import DIMENSION, WORDS, documents, write_models
from topic_models import write_static as write_words

STRENGTH = 0.3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


def opened(
    models: dict[str, str], place: str | Path = ":memory:", **more: Any
) -> AntigravityEngine:
    settings = {"train_student": True, "training_mode": "offline", "teacher_weight": 1.0, **more}
    teacher = models["teacher"]
    return AntigravityEngine(
        place, models["student"], None, teacher, config=ChelationConfig(**settings)
    )


def texts_of(count: int, seed: int = 0) -> list[str]:
    return [f"{each['title']} {each['text']}" for each in documents(count, seed)]


def vectors_of(name: str, texts: list[str]) -> np.ndarray:
    return open_embedder(name).documents(texts).all_vectors()


# The table


def test_the_table_is_that_of_least_squares(models: dict[str, str]) -> None:
    """Another way to it: rows of counts, and a row for each token that holds it back."""
    texts = texts_of(40)
    texts[3] += f" {WORDS[0]} {WORDS[0]}"
    student = static_model(open_embedder(models["student"]))
    targets = vectors_of(models["teacher"], texts)
    pairs = TablePairs(student)
    for part in (slice(0, 25), slice(25, 40)):
        pairs.add(texts[part], targets[part])
    assert len(pairs) == 40
    found = pairs.solve(STRENGTH)

    table = token_vectors(student).astype(np.float64)
    counts = np.zeros((40, len(table)))
    for row, text in zip(counts, texts, strict=True):
        for word in text.split():
            row[student.tokenizer.token_to_id(word)] += 1
    counts /= np.linalg.norm(counts @ table, axis=1, keepdims=True)
    rows = counts @ table
    held = np.sqrt(MAP_STRENGTH) * np.eye(rows.shape[1])
    zeros = np.zeros((rows.shape[1], DIMENSION))
    mapped, *_ = np.linalg.lstsq(np.vstack([rows, held]), np.vstack([targets, zeros]))
    idf = np.log(1 + 40 / (1 + (counts > 0).sum(axis=0)))
    scale = ((counts * idf) ** 2).sum(axis=1).mean()
    back = np.diag(np.sqrt(STRENGTH * scale) / idf)
    wanted, *_ = np.linalg.lstsq(
        np.vstack([counts, back]), np.vstack([targets, back @ (table @ mapped)])
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_token_of_no_text_goes_where_the_map_takes_it(models: dict[str, str]) -> None:
    student = static_model(open_embedder(models["student"]))
    seen = [" ".join(WORDS[start : start + 6]) for start in range(0, 144, 6)]
    targets = vectors_of(models["teacher"], seen)
    pairs = TablePairs(student)
    pairs.add(seen, targets)
    table, own = pairs.solve(STRENGTH), token_vectors(student)
    unseen = np.arange(146, len(table))
    mapped, *_ = np.linalg.lstsq(own[unseen], table[unseen])
    np.testing.assert_allclose(own[unseen] @ mapped, table[unseen], atol=1e-4)
    learned = np.arange(1, 145)
    assert np.abs(own[learned] @ mapped - table[learned]).max() > 0.05


def test_no_texts_give_no_table(models: dict[str, str]) -> None:
    student = static_model(open_embedder(models["student"]))
    with pytest.raises(ConchError, match="no texts to fit a table"):
        TablePairs(student).solve(1.0)


def test_a_student_with_another_table_reads_the_same_tokens(
    models: dict[str, str], tmp_path: Path
) -> None:
    student = static_model(open_embedder(models["student"]))
    table = np.random.default_rng(1).normal(size=(len(WORDS) + 1, 5)).astype(np.float32)
    digest = write_static(with_table(student, table), tmp_path / "other", {"teacher": "made up"})
    other = open_embedder(str(tmp_path / "other"))
    assert (other.digest, other.dimension) == (digest, 5)
    wanted = table[1:4].sum(axis=0)
    found = other.documents([" ".join([*WORDS[:3], "unknown"])]).all_vectors()[0]
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted), atol=1e-6)


# Versions


def test_it_comes_nearer_to_the_teacher_than_a_map(models: dict[str, str]) -> None:
    """The student bends each word by a noise of its own, which no map takes out."""
    figures = {}
    for trained in (False, True):
        with opened(models, train_student=trained) as engine:
            engine.ingest(documents(400))
            result = engine.run_offline_distillation()
            assert result.activated, result.reason
            figures[trained] = result.figures["teacher agreement"]["after"]
    assert figures[True] > figures[False] + 0.05


def test_documents_and_queries_go_through_its_own_table(
    models: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "db"
    with opened(models, place) as engine:
        engine.ingest(documents(200))
        assert engine.run_offline_distillation().activated
        own = engine.versions.own_student("v0001")
        assert own is not None and own.dimension == DIMENSION
        engine.ingest(documents(220))
        page = engine.store.get(["d7", "d210"], "v0001")
        texts = texts_of(220)
        both = own.documents([texts[7], texts[210]]).all_vectors()
        np.testing.assert_allclose(page.vectors, both, atol=1e-6)
        asked = engine.run_inference(texts[210])
        assert asked.ids[0] == "d210" and asked.scores[0] == pytest.approx(1, abs=1e-5)
    with opened(models, place, training_mode="baseline") as engine:
        again = engine.run_inference(texts[210])
        assert (again.ids, again.scores) == (asked.ids, asked.scores)
        assert engine.rollback() == RAW
        assert engine.run_inference(texts[210]).version == RAW
    assert all(part.whole for part in verified(StorePlace(str(place), None, "documents", None)))


def test_a_query_reads_no_file_of_its_version_again(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(folder: Path) -> dict[str, Any]:
        read.append(folder)
        return origin_of(folder)

    monkeypatch.setattr(versions_module, "origin_of", counted)
    with opened(models) as engine:
        engine.ingest(documents(200))
        assert engine.run_offline_distillation().activated
        engine.run_inference(WORDS[0])
        before = len(read)
        engine.run_inferences(WORDS[1:4])
        assert before and len(read) == before


def test_queries_alone_go_through_it_where_documents_are_the_teachers(
    models: dict[str, str],
) -> None:
    with opened(models, space="asymmetric") as engine:
        engine.ingest(documents(300))
        result = engine.run_offline_distillation()
        assert result.activated, result.reason
        page = engine.store.get(["d7"], result.version)
        wanted = vectors_of(models["teacher"], [texts_of(8)[7]])
        np.testing.assert_allclose(page.vectors, wanted, atol=1e-6)
        assert engine.run_inference(texts_of(8)[7]).ids[0] == "d7"


def test_a_cycle_on_top_keeps_the_table(models: dict[str, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"collapse_percentile": 60.0, "top_k": 5, "threshold": 1}
    with opened(models, tmp_path / "db", **settings) as engine:
        engine.ingest(documents(200))
        assert engine.run_offline_distillation().activated
        first = engine.versions.own_student("v0001")
        engine.run_inferences(texts_of(80, seed=4))
        result = engine.run_sedimentation_cycle()
        assert result.candidate == "v0002", result.reason
        if result.activated:
            second = engine.versions.own_student("v0002")
            assert first is not None and second is not None
            np.testing.assert_array_equal(
                static_model(first).embedding, static_model(second).embedding
            )
        kept = {path.name for path in (tmp_path / "db" / "versions").iterdir()}
        names = [engine.versions.active, *filter(None, [engine.store.previous])]
        assert kept == {f"{name}{end}" for name in names if name != RAW for end in ("", "-student")}


def test_a_store_of_more_documents_learns_from_a_sample(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycles, "MOST_TEXTS", 100)
    with opened(models) as engine:
        engine.ingest(documents(400))
        result = engine.run_offline_distillation()
    # A quarter of the documents is for queries.
    assert 50 < result.documents < 100


def test_a_student_that_is_no_table_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    from tiny_embedders import make_tiny_teacher

    other = {**models, "student": str(make_tiny_teacher(tmp_path / "transformer"))}
    with opened(other) as engine:
        engine.ingest(documents(20))
        with pytest.raises(
            ConchError, match=r"only the table of a static student .* leave --train"
        ):
            engine.run_offline_distillation()


def test_it_leaves_as_one_model(models: dict[str, str], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    with opened(models) as engine:
        engine.ingest(documents(200))
        version = engine.run_offline_distillation().version
        student = engine.versions.student(version)
        adapter = engine.versions.adapter(version)
        export_sentence_transformer(student.model, adapter, tmp_path / "out")  # type: ignore[attr-defined]
        texts = texts_of(5)
        wanted = engine.versions.embed([version], texts, queries=True)[version]
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


# Damage


def store_with_a_table(models: dict[str, str], place: Path) -> Path:
    with opened(models, place) as engine:
        engine.ingest(documents(200))
        assert engine.run_offline_distillation().activated
    return place / "versions" / "v0001-student"


def test_what_a_killed_process_left_goes(models: dict[str, str], tmp_path: Path) -> None:
    folder = store_with_a_table(models, tmp_path / "db")
    shutil.copytree(folder, folder.with_name("v0002-student"))
    with opened(models, tmp_path / "db") as engine:
        assert engine.recovered == ["version v0002 was not finished: its student is removed"]
        assert engine.run_inference(WORDS[0]).version == "v0001"
    assert not folder.with_name("v0002-student").exists()


@pytest.mark.parametrize("damage", ["missing", "altered", "another"])
def test_a_damaged_table_is_named(models: dict[str, str], tmp_path: Path, damage: str) -> None:
    folder = store_with_a_table(models, tmp_path / "db")
    if damage == "altered":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    else:
        shutil.rmtree(folder)
    if damage == "another":
        write_words(folder, np.ones((len(WORDS), DIMENSION)))
    messages = {"missing": "is missing", "altered": "altered", "another": "is another student"}
    parts = verified(StorePlace(str(tmp_path / "db"), None, "documents", None))
    named = {part.name: part.detail for part in parts if not part.whole}
    assert set(named) == {"student of version v0001"}
    assert messages[damage] in named["student of version v0001"]
    with (
        opened(models, tmp_path / "db") as engine,
        pytest.raises(NotWholeError, match=messages[damage]),
    ):
        engine.run_inference(WORDS[0])
