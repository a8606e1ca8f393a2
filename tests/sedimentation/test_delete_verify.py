"""Documents are forgotten whole, and whatever a store keeps is compared with its digest."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from qdrant_client import models as shapes

from conch_dna.checkpoints import FolderLock
from conch_dna.cli import main
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.changes.chelation_log import EVENTS_FILE, ChelationLog
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.retrieval import WordFusion
from conch_dna.sedimentation.stores import server as server_store
from conch_dna.sedimentation.stores.contract import RAW, Hits, VectorStore
from conch_dna.sedimentation.stores.ledger import LEDGER
from conch_dna.sedimentation.stores.open_store import LOG, VECTORS, open_store
from conch_dna.sedimentation.stores.state import sealed
from conch_dna.sedimentation.stores.stored_documents import key_of
from qdrant_over_http import QdrantOverHttp
from topic_models import documents, write_models

D = 4
IDENTITY = {"student": "tiny-student", "digest": "d1", "dimension": D}
pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
GIVEN: list[Any] = list(documents(120))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def built(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder store with an active version, a log and a gate history."""
    folder = tmp_path_factory.mktemp("built") / "db"
    config = ChelationConfig(collapse_percentile=60.0, log_queries=True, top_k=5)
    with AntigravityEngine(
        folder, models["student"], "offline", models["teacher"], 1.0, config=config
    ) as engine:
        engine.ingest(GIVEN)
        assert engine.run_offline_distillation().activated
        engine.run_inferences([each["title"] for each in GIVEN[:40]])
        assert len(engine.log) > 5
    return folder


@pytest.fixture
def db(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "db"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["sediment", *map(str, arguments)])


@pytest.fixture(params=["folder", "memory", "http"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VectorStore]:
    if request.param == "http":
        with QdrantOverHttp() as over, open_store(over.url, identity=IDENTITY) as opened:
            yield opened
    else:
        place = tmp_path / "store" if request.param == "folder" else ":memory:"
        with open_store(place, identity=IDENTITY) as opened:
            yield opened


def put(store: VectorStore, ids: list[Any], shift: int = 0) -> None:
    rows = np.eye(D, dtype=np.float32)[[(n + shift) % D for n in range(len(ids))]]
    payloads = [{"text": f"words of {each!r}", "n": n + 0.1} for n, each in enumerate(ids)]
    vectors = dict.fromkeys((RAW, *store.versions()), rows)
    store.put(ids, payloads, [f"d{each}" for each in ids], vectors)


def activate(store: VectorStore, name: str) -> None:
    store.add_version(name, D)
    for page in store.pages():
        store.put_version(name, page.ids, page.vectors)
    store.activate(name, count=store.count(), digest=store.digest(name))


# Deletion


def test_a_deleted_document_is_in_no_version_and_not_in_the_sums(store: VectorStore) -> None:
    put(store, ["a", 1, "1", "b"])
    activate(store, "v1")
    activate(store, "v2")
    before = store.revision
    store.delete([1, "a", "a"])
    assert store.revision > before and not store.damage()
    for name in (RAW, "v1", "v2"):
        assert store.count(name) == 2
        (page,) = store.pages(name)
        assert set(page.ids) == {"1", "b"}
        hits = store.search(np.eye(D, dtype=np.float32), version=name, top_k=9)
        assert all(set(each.ids) == {"1", "b"} for each in hits)
    assert set(store.digests(["a", 1, "1", "b"])) == {"1", "b"}
    assert store.rollback() == "v1"
    put(store, ["a", 1], shift=2)
    assert store.count("v2") == 4 and not store.damage()
    store.delete(["a", 1, "1", "b"])
    assert store.count() == 0 and not store.damage()
    put(store, ["c"])
    store.delete([])
    assert store.count("v1") == 1


def test_an_unknown_id_deletes_nothing(store: VectorStore) -> None:
    put(store, ["a", 1])
    before = store.revision
    with pytest.raises(ConchError, match="has no document '1', 'x': nothing was deleted"):
        store.delete(["a", "1", "x"])
    assert (store.count(), store.revision) == (2, before)


def test_words_do_not_find_what_was_deleted(store: VectorStore) -> None:
    put(store, ["whale", "coral"])
    words, none = WordFusion(store, k=60), Hits([], np.zeros(0, np.float32), [])
    assert words.fused("whale", none, 3).ids == ["whale"]
    store.delete(["whale"])
    put(store, ["tides"])
    assert words.fused("whale", none, 3).ids == []


def test_the_log_forgets_neighbourhoods_that_name_a_document(tmp_path: Path) -> None:
    log = ChelationLog(tmp_path / "log", rotate_bytes=600, keep_queries=True)
    for number in range(9):
        log.append(
            query=f"query {number}",
            version=RAW,
            student_digest="s",
            dispersion=0.1,
            threshold=0.2,
            neighbourhood=[number, str(number), "other"],
        )
    assert log.forget([3, "8"]) == 2 and len(log) == 7
    events = list(log.events())
    assert [each.query for each in events] == [f"query {n}" for n in (0, 1, 2, 4, 5, 6, 7)]
    assert [each.number for each in events] == list(range(1, 8))
    half = tmp_path / "log" / "chelation_events.half-8"
    half.write_text('{"neighbourhood": [3, "sec')
    assert log.forget([3]) == 0 and not half.exists()
    again = ChelationLog(tmp_path / "log")
    again.append(
        query="more",
        version=RAW,
        student_digest="s",
        dispersion=0.1,
        threshold=0.2,
        neighbourhood=["other"],
    )
    assert len(list(again.events())) == 8
    assert "query 3" not in "".join(p.read_text() for p in (tmp_path / "log").glob("*.jsonl"))
    assert log.forget(["other"]) == 8 and len(ChelationLog(tmp_path / "log")) == 0


def test_a_name_of_thousands_of_digits_is_no_document(db: Path) -> None:
    result = run("delete", db, "9" * 5000)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1


def logged(db: Path) -> str:
    """A document that the log names."""
    return str(next(ChelationLog(db / LOG).events()).neighbourhood[0])


def test_a_deletion_on_the_command_line(db: Path, tmp_path: Path) -> None:
    name = logged(db)
    result = run("delete", db, name, "no such")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ") and "'no such'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    figures = tmp_path / "deleted.json"
    result = run("delete", db, name, "--json", figures)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["deleted"] == [name] and found["documents"] == 119 and found["events"] > 0
    assert not any(name in each.neighbourhood for each in ChelationLog(db / LOG).events())
    assert run("verify", db).exit_code == 0
    assert run("delete", db, name).exit_code == 2
    with FolderLock(db):
        result = run("delete", db, logged(db))
    assert result.exit_code == 2 and "is in use by process" in result.stderr


def test_a_number_is_meant_where_no_text_is_so_called(
    models: dict[str, str], tmp_path: Path
) -> None:
    with AntigravityEngine(tmp_path / "db", models["student"], "baseline") as engine:
        rows = [{**GIVEN[n], "id": name} for n, name in enumerate([7, "8", 9, "9", -3])]
        engine.ingest(rows)
        assert engine.delete([-3]).deleted == [-3]
    assert run("delete", tmp_path / "db", "7", "8").exit_code == 0
    result = run("delete", tmp_path / "db", "9")
    assert result.exit_code == 2 and "two documents" in result.stderr


KILLED = """
import os, signal, sys
from pathlib import Path
from conch_dna.sedimentation.changes.chelation_log import ChelationLog
from conch_dna.sedimentation.stored_state import StorePlace
from conch_dna.sedimentation.stores.edge import EdgeStore
from conch_dna.sedimentation.upkeep import deletion

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

folder, stage, name = sys.argv[1:]
with StorePlace(folder, None, "documents", None).opened() as opened:
    if stage == "before the documents":
        EdgeStore._remove = die
    elif stage == "before the log":
        opened.store.also_forget = die
    elif stage == "within the log":
        rename = os.rename
        def last(source, target):
            rename(source, target)
            if ".writing-old-" in str(target):
                die()
        os.rename = last
    elif stage == "after the log":
        EdgeStore._end = die
    deletion.delete(opened.store, opened.log, [name])
    die()
"""


@pytest.mark.parametrize(
    "stage",
    ["before the documents", "before the log", "within the log", "after the log", "acknowledged"],
)
def test_a_killed_deletion_is_finished_by_the_next_opening(stage: str, db: Path) -> None:
    name = logged(db)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(db), stage, name], check=False)
    assert killed.returncode == -signal.SIGKILL
    result = run("status", db)
    assert result.exit_code == 0, result.output
    told = "recovered: the deletion of 1 documents was cut off" in result.stderr
    assert told == (stage != "acknowledged")
    log = ChelationLog(db / LOG)
    assert len(log) and not any(name in each.neighbourhood for each in log.events())
    with open_store(db / VECTORS) as store:
        assert store.count() == 119 and not store.digests([name])
    assert run("verify", db).exit_code == 0


def test_a_server_finishes_a_deletion_that_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_store, "RETRY_WAITS_S", ())
    with QdrantOverHttp() as over:
        with open_store(over.url, identity=IDENTITY) as store:
            put(store, ["a", "b"])
            activate(store, "v1")
            remove = store._client.delete

            def lost(name: str, **options: Any) -> Any:
                if name.endswith("v1"):
                    raise KeyboardInterrupt
                return remove(name, **options)

            store._client.delete = lost  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                store.delete(["a"])
        forgotten: list[Any] = []
        with open_store(over.url) as store:
            store.also_forget = forgotten.extend
            assert store.recover() == ["the deletion of 1 documents was cut off: it is finished"]
            assert forgotten == ["a"]
            assert (store.count(), store.count("v1"), store.damage()) == (1, 1, {})
            assert store.recover() == []


def test_a_write_cut_off_is_counted_in(store: VectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, ["a", "b"])
    activate(store, "v1")
    for cut_before in (True, False):
        write = type(store)._write

        def broken(
            self: Any, *given: Any, write: Any = write, cut_before: bool = cut_before
        ) -> None:
            if not cut_before:
                write(self, *given)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(type(store), "_write", broken)
            with pytest.raises(KeyboardInterrupt):
                put(store, ["b", "c"], shift=2)
        (line,) = store.recover()
        assert line.startswith("a write of 2 documents was cut off")
        assert store.damage() == {} and store.count() == (2 if cut_before else 3)


# Verification


def test_a_whole_store_verifies(db: Path, tmp_path: Path) -> None:
    figures = tmp_path / "verify.json"
    result = run("verify", db, "--json", figures)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["whole"]
    assert [each["name"] for each in found["parts"]] == [
        "chelation log",
        "null of version v0001",
        "teacher vectors",
        "gate history",
        "store",
        "documents",
        "vectors of version raw",
        "vectors of version v0001",
        "adapter of version v0001",
    ]
    assert "NOT WHOLE" not in result.stdout


def alter_bytes(folder: Path, old: np.ndarray, new: np.ndarray) -> None:
    """On the disk, wherever these numbers stand."""
    hits = 0
    for path in folder.rglob("*"):
        if path.is_file() and old.tobytes() in (content := path.read_bytes()):
            path.write_bytes(content.replace(old.tobytes(), new.tobytes()))
            hits += 1
    assert hits


def alter_vectors(db: Path, version: str) -> None:
    with open_store(db / VECTORS) as store:
        page = store.get([GIVEN[0]["id"], GIVEN[1]["id"]], version)
    alter_bytes(db / VECTORS / "shard", page.vectors[0], page.vectors[1])


def alter_payload(db: Path) -> None:
    """As damage would, past the store's account."""
    with open_store(db / VECTORS) as store:
        page = store.get([GIVEN[0]["id"]])
        update = store._edge.UpdateOperation  # type: ignore[attr-defined]
        text = {"text": page.payloads[0]["text"] + "."}
        store._shard.update(update.set_payload([KEY], text))  # type: ignore[attr-defined]
        store._flush()


KEY = key_of(GIVEN[0]["id"])


def zero_digests(db: Path) -> None:
    """With a digest of its own that fits, so that only the zeros are wrong."""
    path = db / VECTORS / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest["versions"]["contents"]["v0001"]["digest"] = "0" * 64
    path.write_text(json.dumps(sealed(manifest)))


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def without_last_line(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-1])


def other_log(folder: Path, length: int) -> bytes:
    log = ChelationLog(folder)
    for number in range(length):
        log.append(
            query=f"query {number}",
            version=RAW,
            student_digest="s",
            dispersion=0.1,
            threshold=0.2,
            neighbourhood=[number],
        )
    return log.path.read_bytes()


def as_format_1(content: bytes) -> bytes:
    manifest = json.loads(content)
    del manifest["digest"], manifest["versions"]["contents"], manifest["versions"]["writing"]
    return json.dumps({**manifest, "format": 1}).encode()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "active vectors": (lambda db: alter_vectors(db, "v0001"), "vectors of version v0001"),
    "raw vectors": (lambda db: alter_vectors(db, RAW), "vectors of version raw"),
    "document": (alter_payload, "documents"),
    "zeroed digests": (zero_digests, "vectors of version v0001"),
    "manifest": (
        lambda db: rewrite(
            db / VECTORS / "manifest.json",
            lambda b: b.replace(b'"previous": "raw"', b'"previous": null'),
        ),
        "store",
    ),
    "no manifest": (lambda db: (db / VECTORS / "manifest.json").unlink(), "store"),
    "adapter": (
        lambda db: rewrite(
            next((db / "versions" / "v0001").glob("*.safetensors")), lambda b: b[:-1] + b"\x01"
        ),
        "adapter of version v0001",
    ),
    "zeroed digests of the adapter": (
        lambda db: rewrite(
            db / "versions" / "v0001" / "digests.json",
            lambda b: json.dumps(dict.fromkeys(json.loads(b), "0" * 64)).encode(),
        ),
        "adapter of version v0001",
    ),
    "no adapter": (lambda db: shutil.rmtree(db / "versions" / "v0001"), "adapter of version v0001"),
    "log": (
        lambda db: rewrite(db / LOG / EVENTS_FILE, lambda b: b.replace(b"0.", b"1.", 1)),
        "chelation log",
    ),
    "gate history": (
        lambda db: rewrite(
            db / "gate_history.jsonl", lambda b: b.replace(b'"passed": true', b'"passed": false')
        ),
        "gate history",
    ),
    "decisions gone": (lambda db: (db / "gate_history.jsonl").unlink(), "gate history"),
    "log cut": (lambda db: rewrite(db / LOG / EVENTS_FILE, without_last_line), "chelation log"),
    "log gone": (lambda db: shutil.rmtree(db / LOG), "chelation log"),
    "log of another store": (
        lambda db: rewrite(
            db / LOG / EVENTS_FILE, lambda b: other_log(db.parent / "other", b.count(b"\n"))
        ),
        "chelation log",
    ),
    "decision cut": (
        lambda db: rewrite(db / "gate_history.jsonl", without_last_line),
        "gate history",
    ),
    "decisions without digests": (
        lambda db: rewrite(
            db / "gate_history.jsonl",
            lambda b: b"".join(
                json.dumps({**json.loads(line), "digest": None, "reason": "other"}).encode() + b"\n"
                for line in b.splitlines()
            ).replace(b', "digest": null', b""),
        ),
        "gate history",
    ),
    "format 1": (
        lambda db: rewrite(db / VECTORS / "manifest.json", as_format_1),
        "store",
    ),
    "null": (
        lambda db: rewrite(
            db / "null-v0001.json", lambda b: b.replace(b'"threshold": 0.', b'"threshold": 1.')
        ),
        "null of version v0001",
    ),
    "teacher vectors": (
        lambda db: rewrite(
            next((db / "teacher_vectors").rglob("*.safetensors")), lambda b: b[:-1] + b"\x01"
        ),
        "teacher vectors",
    ),
    "no ledger": (lambda db: (db / LEDGER).unlink(), "ledger"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_whole_is_named(kind: str, db: Path, tmp_path: Path) -> None:
    damage, name = DAMAGE[kind]
    damage(db)
    figures = tmp_path / "verify.json"
    result = run("verify", db, "--json", figures)
    assert result.exit_code == 1, result.output
    parts = json.loads(figures.read_text())["parts"]
    assert [each["name"] for each in parts if not each["whole"]] == [name]
    assert f"not whole: {name}: " in result.stderr and "NOT WHOLE" in result.stdout
    assert not any("\n" in each["detail"] for each in parts)
    if kind == "document":
        assert f"Altered: {GIVEN[0]['id']!r}" in result.stderr


def test_floats_that_come_back_with_another_last_bit_are_no_damage(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    sizes = 10.0 ** draws.integers(-20, 20, 400)
    numbers = [*(draws.normal(size=400) * sizes).tolist(), -0.0, 1e22, 5e-324, 0.1]
    rows = np.tile(np.eye(D, dtype=np.float32), (len(numbers) // D, 1))
    with open_store(tmp_path / "db", identity=IDENTITY) as store:
        ids = list(range(len(rows)))
        payloads = [{"x": each, "inside": [{"y": each}]} for each in numbers]
        store.put(ids, payloads, ["d"] * len(ids), {RAW: rows})
        assert [page["x"] for page in store.get(ids).payloads] != numbers
        assert not store.damage()
    with open_store(tmp_path / "db") as store:
        assert not store.damage()
        store.delete(ids[::2])
        assert not store.damage()


def test_several_things_are_all_named(db: Path) -> None:
    for kind in ("log", "adapter", "document", "active vectors"):
        DAMAGE[kind][0](db)
    result = run("verify", db)
    named = {line.split(": ")[1] for line in result.stderr.splitlines()}
    assert named == {DAMAGE[k][1] for k in ("log", "adapter", "document", "active vectors")}


@pytest.mark.parametrize("kind", ["raw vectors", "zeroed digests"])
def test_rollback_and_export_compare_what_they_use(kind: str, db: Path, tmp_path: Path) -> None:
    DAMAGE[kind][0](db)
    # Rolling back leads to the raw ones.
    asked = ("rollback", db) if kind == "raw vectors" else ("export", db, tmp_path / "model")
    result = run(*asked)
    assert result.exit_code == 2 and "are not whole" in result.stderr, result.output
    assert not (tmp_path / "model").exists()
    with open_store(db / VECTORS) as store:
        assert store.active == "v0001"


def test_a_rollback_reads_the_adapter_that_it_leads_to(db: Path) -> None:
    assert run("rollback", db).exit_code == 0
    DAMAGE["adapter"][0](db)
    result = run("rollback", db)
    assert result.exit_code == 2 and "is not whole" in result.stderr


def test_there_is_nothing_to_verify_where_there_is_no_store(tmp_path: Path) -> None:
    result = run("verify", tmp_path / "none")
    assert result.exit_code == 2 and "holds no store yet" in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_server_is_verified(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with QdrantOverHttp() as over:
        with AntigravityEngine(over.url, models["student"], "baseline") as engine:
            engine.ingest(GIVEN[:20])
        assert run("verify", over.url).exit_code == 0
        assert run("delete", over.url, GIVEN[3]["id"]).exit_code == 0
        assert run("verify", over.url).exit_code == 0
        over.local.set_payload("documents_raw", {"title": "other"}, points=[KEY])
        result = run("verify", over.url)
        assert result.exit_code == 1 and f"Altered: {GIVEN[0]['id']!r}" in result.stderr
        (hit,) = over.local.retrieve("documents_raw", [KEY], with_vectors=True)
        vector = (np.array(hit.vector) * -1).tolist()
        over.local.update_vectors("documents_raw", [shapes.PointVectors(id=KEY, vector=vector)])
        assert "not whole: vectors of version raw" in run("verify", over.url).stderr


def test_damage_is_told_by_the_store_itself(store: VectorStore) -> None:
    put(store, ["a", "b"])
    activate(store, "v1")
    assert store.damage() == {}
    store._fill("v1", [key_of("a")], -np.eye(D, dtype=np.float32)[:1])
    assert list(store.damage()) == ["v1"]
    with pytest.raises(NotWholeError, match=r"the vectors of version v1 in .* are not whole: 2"):
        store.check("v1")
