"""What only the folder store does: one writer, kills, full disks, graphs.

CONCH_DNA_KILLS says how often a writing process is killed; -s shows where.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conch_dna.errors import ConchError, FolderInUseError, NotWholeError
from conch_dna.sedimentation.embedders.contract import unit
from conch_dna.sedimentation.stores import edge as edge_store
from conch_dna.sedimentation.stores.contract import RAW
from conch_dna.sedimentation.stores.edge import MANIFEST, EdgeStore
from conch_dna.sedimentation.stores.open_store import open_store
from conch_dna.sedimentation.stores.state import sealed
from conch_dna.sedimentation.stores.stored_documents import ContentSum

D = 16
IDENTITY = {"student": "tiny-student", "digest": "d1", "dimension": D}
KILLS = int(os.environ.get("CONCH_DNA_KILLS", "8"))
SEED = 5


def rows_for(version: str, ids: list[int]) -> np.ndarray:
    """The vectors that these documents have in a version, known by its name alone."""
    name = zlib.crc32(version.encode())
    return unit(np.stack([np.random.default_rng([name, i]).normal(size=D) for i in ids]))


def fill(store: EdgeStore, first: int, count: int) -> None:
    ids = list(range(first, first + count))
    vectors = {name: rows_for(name, ids) for name in (RAW, *store.versions())}
    store.put(ids, [{"n": i} for i in ids], [f"digest {i}" for i in ids], vectors)


def build(store: EdgeStore, name: str) -> ContentSum:
    store.add_version(name, D)
    content = ContentSum()
    for page in store.pages(size=50):
        rows = rows_for(name, [int(i) for i in page.ids])
        store.put_version(name, page.ids, rows)
        content.add(page.ids, rows)
    return content


def activate(store: EdgeStore, name: str) -> None:
    content = build(store, name)
    store.activate(name, count=content.count, digest=content.hexdigest())


# A kill at any moment


WRITER = """
import sys
from pathlib import Path
from test_edge_store import IDENTITY, build, fill
from conch_dna.sedimentation.stores.edge import EdgeStore

def say(*words):
    print(*words, flush=True)

say("opening")
store = EdgeStore(Path(sys.argv[1]), IDENTITY)
number = max([int(name[1:]) for name in store.versions()], default=0)
while True:
    for _ in range(4):
        first = store.count()
        say("putting", first + 25)
        fill(store, first, 25)
        say("put", first + 25)
    number += 1
    name = f"v{number}"
    say("building", name)
    content = build(store, name)
    say("built", name)
    fill(store, store.count(), 5)
    late = store.get(list(range(store.count() - 5, store.count())), name)
    content.add(late.ids, late.vectors)
    say("activating", name)
    store.activate(name, count=content.count, digest=content.hexdigest())
    say("activated", name)
    for other in store.versions():
        if other not in (store.active, store.previous):
            say("dropping", other)
            store.drop_version(other)
    if number % 3 == 0:
        say("rolling", store.previous)
        store.rollback()
        say("rolled", store.active)
"""


# What the writer is at when it is killed, in turn.
STAGES = [
    "putting",
    "building",
    "activating",
    "rolling",
    "opening",
    "built",
    "activated",
    "dropping",
]


def run_and_kill(folder: Path, stage: str, times: int, after_s: float) -> list[list[str]]:
    """What a writing process said until it was killed, so long after it said this so often."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert writer.stdout is not None
    said: list[list[str]] = []
    try:
        while sum(words[0] == stage for words in said) < times:
            line = writer.stdout.readline()
            assert line, f"the writer ended by itself with {writer.wait()}"
            said.append(line.split())
        time.sleep(after_s)
    finally:
        writer.kill()
        rest, _ = writer.communicate()
    assert writer.returncode == -9
    return said + [line.split() for line in rest.splitlines()]


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """The same folder each time, so that later kills meet what earlier ones left."""
    folder = tmp_path / "db"
    moments = random.Random(SEED)
    acknowledged, active = 0, RAW
    places: Counter[str] = Counter()
    for kill in range(KILLS):
        stage = STAGES[kill % len(STAGES)]
        times = moments.randint(1, 6) if stage == "putting" else 1
        said = run_and_kill(folder, stage, times, moments.uniform(0, 0.02))
        may_be_active = {active}
        for word, *what in said:
            if word == "put":
                acknowledged = int(what[0])
            elif word in ("activating", "rolling"):
                may_be_active = {active, what[0]}
            elif word in ("activated", "rolled"):
                active = what[0]
                may_be_active = {active}
        places[said[-1][0]] += 1
        with EdgeStore(folder, IDENTITY) as store:
            count = store.count()
            assert count >= acknowledged
            assert store.active in may_be_active
            active = store.active
            manifest = json.loads((folder / MANIFEST).read_text())["versions"]
            assert manifest["building"] == {}
            assert store.versions() == list(manifest["kept"])
            for name in (RAW, *store.versions()):
                pages = list(store.pages(name))
                ids = [int(i) for page in pages for i in page.ids]
                assert sorted(ids) == list(range(count)), name
                for page in pages:
                    rows = rows_for(name, [int(i) for i in page.ids])
                    assert page.vectors.tobytes() == rows.tobytes(), name
                    assert page.payloads == [{"n": i} for i in page.ids]
            assert len(store.digests(range(count))) == count
            acknowledged = count
    print(f"{KILLS} kills, after: {dict(places)}; {acknowledged} documents, {active} active")
    assert acknowledged > 0


@pytest.mark.parametrize("stage", ["no manifest", "not renamed", "nothing"])
def test_a_kill_while_a_store_is_made_leaves_one_that_opens(tmp_path: Path, stage: str) -> None:
    """The states between the steps of making a store, made by hand: they last microseconds."""
    folder = tmp_path / "db"
    EdgeStore(folder, IDENTITY).close()
    if stage != "nothing":
        (folder / "shard").rename(folder / ".writing-shard")
    if stage == "no manifest":
        (folder / MANIFEST).unlink()
    with EdgeStore(folder, IDENTITY) as store:
        fill(store, 0, 3)
    assert not list(folder.glob(".writing-*"))
    with EdgeStore(folder) as store:
        assert store.count() == 3


def test_documents_written_between_versions_survive_the_deletion_of_one(tmp_path: Path) -> None:
    """Edge replays its log by names: without a flush before the deletion, 25 of these were lost."""
    program = """
import os, signal, sys
from pathlib import Path
from test_edge_store import IDENTITY, build, fill
from conch_dna.sedimentation.stores.edge import EdgeStore
store = EdgeStore(Path(sys.argv[1]), IDENTITY)
fill(store, 0, 25)
build(store, "v1")
fill(store, 25, 25)
store.drop_version("v1")
store.add_version("v1", 3)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "db")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        check=False,
    )
    assert ended.returncode == -9
    with EdgeStore(tmp_path / "db") as store:
        assert store.count() == 50
        assert store.versions() == []


def half_deleted(folder: Path) -> str:
    """A store killed between two parts of a deletion, which last microseconds; its manifest.

    Edge has taken v2 out of its segments, but not yet out of its configuration.
    """
    with EdgeStore(folder, IDENTITY) as store:
        fill(store, 0, 5)
        activate(store, "v1")
        build(store, "v2")
    files = (folder / "shard" / "edge_config.json", folder / MANIFEST)
    before = {path: path.read_text() for path in files}
    with EdgeStore(folder, IDENTITY) as store:
        assert store.versions() == ["v1"]
    for path, text in before.items():
        path.write_text(text)
    return before[folder / MANIFEST]


def test_a_half_deleted_version_is_told_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half_deleted(tmp_path)
    with EdgeStore(tmp_path, IDENTITY) as store:
        assert (store.versions(), store.count(), store.count("v1")) == (["v1"], 5, 5)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"opened {tmp_path} without version v2, whose deletion")
    assert "could not be opened: " in said
    with EdgeStore(tmp_path, IDENTITY) as store:
        assert store.count() == 5
    assert len(caplog.records) == 1


def test_nothing_else_is_tried_where_no_version_was_under_way(tmp_path: Path) -> None:
    """The same shard with a manifest that names no unfinished version is damaged, not half-done."""
    manifest = json.loads(half_deleted(tmp_path))
    manifest["versions"]["building"] = {}
    del manifest["digest"]
    (tmp_path / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ConchError, match=r"the store in .* could not be opened: "):
        EdgeStore(tmp_path, IDENTITY)


def test_every_reason_is_told_where_no_configuration_opens_a_store(tmp_path: Path) -> None:
    half_deleted(tmp_path)
    for path in (tmp_path / "shard").rglob("segment.json"):
        path.write_text("{}")
    with pytest.raises(ConchError) as caught:
        EdgeStore(tmp_path, IDENTITY)
    for what in ("", " without version v2", " with version v2"):
        assert f"could not be opened{what}: " in str(caught.value)


# One writer


def test_a_second_process_gets_one_line(tmp_path: Path) -> None:
    program = """
import sys
from conch_dna.errors import FolderInUseError
from conch_dna.sedimentation.stores.open_store import open_store
try:
    open_store(sys.argv[1])
except FolderInUseError as error:
    print(error)
"""
    folder = tmp_path / "db"
    with EdgeStore(folder, IDENTITY) as store:
        fill(store, 0, 2)
        second = subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"{folder} is in use by process {os.getpid()} on " in second.stdout
        assert "wait for it to end, or choose another folder" in second.stdout
        assert second.stdout.count("\n") == 1
        with pytest.raises(FolderInUseError, match="is in use by process"):
            EdgeStore(folder, IDENTITY)
        assert store.count() == 2
    EdgeStore(folder, IDENTITY).close()


def test_a_refused_opening_leaves_the_folder_free(tmp_path: Path) -> None:
    EdgeStore(tmp_path, IDENTITY).close()
    with pytest.raises(ConchError, match="with student tiny-student, not other"):
        EdgeStore(tmp_path, {**IDENTITY, "student": "other", "digest": "d2"})
    EdgeStore(tmp_path, IDENTITY).close()


# Disks and damage


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EdgeStore(tmp_path / "db", IDENTITY) as store:
        fill(store, 0, 5)
        activate(store, "v1")
        monkeypatch.setattr(edge_store, "SPARE_BYTES", 2**62)
        for call in (
            lambda: fill(store, 5, 5),
            lambda: store.put_version("v1", [0], rows_for("v1", [0])),
        ):
            with pytest.raises(ConchError, match=r"is full: \d+ MiB are free and .* needed. Noth"):
                call()
        monkeypatch.undo()
        assert (store.count(), store.count("v1"), store.active) == (5, 5, "v1")
        fill(store, 5, 5)
    monkeypatch.setattr(edge_store, "SPARE_BYTES", 2**62)
    with pytest.raises(ConchError, match=r"the disk of .* is full"):
        EdgeStore(tmp_path / "new", IDENTITY)
    monkeypatch.undo()
    with EdgeStore(tmp_path / "new", IDENTITY) as store:
        assert store.count() == 0


def test_a_manifest_that_cannot_be_written_leaves_the_active_version(tmp_path: Path) -> None:
    with EdgeStore(tmp_path, IDENTITY) as store:
        fill(store, 0, 5)
        activate(store, "v1")
        content = build(store, "v2")
        # Stands where the manifest is written before it is renamed.
        obstacle = tmp_path / f".writing-{os.getpid()}-{MANIFEST}"
        obstacle.mkdir()
        with pytest.raises(ConchError, match=r"cannot write .*manifest.json.* v1 stays active"):
            store.activate("v2", count=5, digest=content.hexdigest())
        assert (store.active, store.previous, store.versions()) == ("v1", RAW, ["v1", "v2"])
        obstacle.rmdir()
        store.activate("v2", count=5, digest=content.hexdigest())
        assert (store.active, store.previous) == ("v2", "v1")


def test_damage_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "db"
    with EdgeStore(folder, IDENTITY) as store:
        fill(store, 0, 5)
        activate(store, "v1")
    good = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(good[:-20])
    with pytest.raises(NotWholeError, match="cannot be read as a manifest"):
        EdgeStore(folder)
    (folder / MANIFEST).write_text(good.replace('"format": 2', '"format": 9'))
    with pytest.raises(ConchError, match="has format 9, but only 1 and 2 are known"):
        EdgeStore(folder)
    for old, new in (
        ('"v1"', '"v2"'),
        ('"count": 5', '"count": 6'),
        ('"revision": ', '"revision": 1'),
    ):
        (folder / MANIFEST).write_text(good.replace(old, new))
        with pytest.raises(NotWholeError, match=r"manifest\.json is not whole: its digest is "):
            EdgeStore(folder)
    manifest = json.loads(good)
    del manifest["digest"]
    manifest["versions"]["contents"]["v1"]["count"] = 6
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(NotWholeError, match="version v1 holds 5 vectors for 6 documents"):
        EdgeStore(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(NotWholeError, match=r"has documents but no manifest.json"):
        EdgeStore(folder, IDENTITY)
    (folder / MANIFEST).write_text(good)
    with EdgeStore(folder) as store:
        assert (store.active, store.count("v1")) == ("v1", 5)
    shutil.rmtree(folder / "shard")
    with pytest.raises(ConchError, match=r"the store in .* could not be opened: "):
        EdgeStore(folder)


def test_a_store_without_digests_gets_them_when_it_is_opened(tmp_path: Path) -> None:
    with EdgeStore(tmp_path, IDENTITY) as store:
        fill(store, 0, 5)
        activate(store, "v1")
        contents = store._state.contents
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["digest"], manifest["versions"]["contents"], manifest["versions"]["writing"]
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    with EdgeStore(tmp_path) as store:
        assert store._state.contents == contents and not store.damage()


# Graphs


def test_graphs_are_built_from_the_threshold_on_and_found_with(tmp_path: Path) -> None:
    store = open_store(tmp_path / "db", identity=IDENTITY, exact_below=600)
    assert isinstance(store, EdgeStore)
    with store:
        fill(store, 0, 599)
        assert not store.index()
        fill(store, 599, 401)
        assert store.index()
        assert store._shard.info().indexed_vectors_count >= 1000
        activate(store, "v1")
        fill(store, 1000, 100)
        assert store.index()
        ids = list(range(1100))
        queries = rows_for("queries", list(range(50)))
        for name in (RAW, "v1"):
            cosines = queries.astype(np.float64) @ rows_for(name, ids).T.astype(np.float64)
            best = [set(row[:10].tolist()) for row in np.argsort(-cosines)]
            exact = store.search(queries, version=name, top_k=10, exact=True)
            assert [set(hits.ids) for hits in exact] == best
            found = store.search(queries, version=name, top_k=10)
            shares = [len(set(hits.ids) & b) / 10 for hits, b in zip(found, best, strict=True)]
            assert np.mean(shares) > 0.95
            content = ContentSum()
            content.add(ids, rows_for(name, ids))
            assert store.digest(name) == content.hexdigest()
    with EdgeStore(tmp_path / "db") as store:
        assert (store.count(), store.count("v1"), store.active) == (1100, 1100, "v1")
