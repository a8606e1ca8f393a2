"""A copy of a store: whole, verified, a store again; and what is refused."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conch_dna.checkpoints import FolderLock
from conch_dna.cli import main
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.upkeep import snapshot as module
from topic_models import documents, write_models


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["sediment", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("store")
    models = write_models(folder / "models")
    with AntigravityEngine(
        folder / "db", models["student"], "offline", models["teacher"], 1.0
    ) as engine:
        engine.ingest(documents(150))
        assert engine.run_offline_distillation().activated
        engine.run_inference(documents(1)[0]["title"])
    return folder / "db", models


@pytest.fixture
def place(store: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    shutil.copytree(store[0], tmp_path / "db")
    return tmp_path / "db"


def test_a_copy_is_a_store_with_all_that_was_there(
    store: tuple[Path, dict[str, str]], place: Path, tmp_path: Path
) -> None:
    copy, figures = tmp_path / "backups" / "one", tmp_path / "f.json"
    code, said = run("snapshot", place, copy, "--json", figures)
    assert code == 0 and "verified" in said, said
    assert json.loads(figures.read_text())["bytes"] > 10_000
    assert [path.name for path in copy.parent.iterdir()] == ["one"]
    assert run("delete", place, "d0")[0] == 0
    answers = []
    for where in (place, copy):
        with AntigravityEngine(where, store[1]["student"]) as engine:
            found = engine.run_inference(documents(1)[0]["title"], top_k=150)
            answers.append((engine.store.count(), found.version, "d0" in found.ids))
    assert answers == [(149, "v0001", False), (150, "v0001", True)]
    assert run("verify", copy)[0] == 0
    # And back again.
    shutil.rmtree(place)
    assert run("snapshot", copy, place)[0] == 0
    assert run("verify", place)[0] == 0


def test_places_that_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for copy, message in ((tmp_path / "there", "is there"), (place / "in", "in the store itself")):
        code, said = run("snapshot", place, copy)
        assert code == 2 and message in said, said
    code, said = run("snapshot", tmp_path / "nowhere", tmp_path / "copy")
    assert code == 2 and "holds no store yet" in said, said
    code, said = run("snapshot", "http://127.0.0.1:1", tmp_path / "copy")
    assert code == 2 and "server's own snapshots" in said, said
    with FolderLock(place):
        code, said = run("snapshot", place, tmp_path / "copy")
    assert code == 2 and "is in use" in said, said
    assert not (tmp_path / "copy").exists()


def test_a_store_that_is_not_whole_is_not_copied(place: Path, tmp_path: Path) -> None:
    path = place / "versions" / "v0001" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    code, said = run("snapshot", place, tmp_path / "copy")
    assert code == 2 and "is not whole: adapter of version v0001" in said, said
    assert not (tmp_path / "copy").exists()


def test_a_full_disk_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Any, target: Path, **_: Any) -> None:
        target.mkdir()
        (target / "half").write_text("h")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copytree", full)
    code, said = run("snapshot", place, tmp_path / "copy")
    assert code == 2 and "No space left" in said and "Free some disk space" in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db"]
