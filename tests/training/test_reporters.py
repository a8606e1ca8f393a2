"""Figures in other programs: each tested with its own files where it is installed, offline."""

from pathlib import Path
from typing import Any

import pytest

from conch_dna.errors import ConchError
from conch_dna.training.runs import reporters
from conch_dna.training.runs.reporters import REPORTERS, Reporting, parse_names

BEFORE, AFTER = {"kl_nats": 0.5, "tokens": 9}, {"kl_nats": 0.25, "tokens": 9, "chunk_kl_nats": None}
EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("phase", {"name": "training"}),
    ("train", {"step": 1, "loss": 2.0, "tokens_per_second": 100.0}),
    ("heldout", {"step": 2, "loss": 1.5, "kl": 0.4, "best_step": 2}),
    (
        "result",
        {"step": 2, "evaluation": {"before": BEFORE, "after": AFTER, "test": {"after": AFTER}}},
    ),
]


def run_of(folder: Path) -> tuple[str, dict[str, Any]]:
    folder.mkdir()
    return "run", {"folder": str(folder), "config": {"seed": 0, "alpha": 0.5}}


class Heard:
    """A report that remembers."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.warnings: list[str] = []

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        self.events.append(event)
        self.warnings += [row["message"]] if event == "warning" else []


def tell(names: str, folder: Path) -> Heard:
    heard = Heard()
    with Reporting(heard, parse_names(names), "tests") as report:
        for event, row in [run_of(folder), *EVENTS]:
            report(event, row)
    return heard


def test_names_are_checked_before_anything_runs(monkeypatch):
    assert parse_names("") == ()
    with pytest.raises(ConchError, match="report_to is slate: use one or more of tensorboard"):
        parse_names("slate")
    monkeypatch.setitem(REPORTERS, "wandb", "no_such_package")
    with pytest.raises(ConchError, match=r"whose package .*: pip install 'conch-dna\[wandb\]'"):
        parse_names("wandb")
    monkeypatch.setitem(REPORTERS, "wandb", "json")
    assert parse_names(" WandB, wandb,") == ("wandb",)


def test_a_folder_of_a_packages_name_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "runs_of_wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(REPORTERS, "wandb", "runs_of_wandb")
    with pytest.raises(ConchError, match="package is not here"):
        parse_names("wandb")


@pytest.mark.parametrize("moment", ["begin", "log", "close"])
def test_one_that_fails_is_told_of_once_and_left_alone(moment, monkeypatch, tmp_path):
    class Broken:
        def __init__(self, *given: Any) -> None:
            if moment == "begin":
                raise RuntimeError("the disk\nis full")

        def log(self, figures: dict[str, float], step: int) -> None:
            if moment == "log":
                raise ValueError("the disk is full")

        def close(self) -> None:
            if moment == "close":
                raise OSError("the disk is full")

    monkeypatch.setattr(reporters, "_TensorBoard", Broken)
    monkeypatch.setitem(REPORTERS, "tensorboard", "json")
    heard = tell("tensorboard", tmp_path / "run")
    assert heard.warnings == [
        "tensorboard failed, and gets no more figures of this run: the disk is full"
    ]
    assert [event for event in heard.events if event != "warning"] == [
        "run",
        *(event for event, _ in EVENTS),
    ]


def test_tensorboard_reads_the_figures(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    from tensorboardX.proto.event_pb2 import Event

    assert tell("tensorboard", tmp_path / "run").warnings == []
    (path,) = (tmp_path / "run" / "tensorboard").glob("events.*")
    content, found = path.read_bytes(), {}
    while content:
        # A record: its length, a checksum of that, the event, a checksum of it.
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        content = content[12 + length + 4 :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found[value.tag, event.step] = value.simple_value
    assert found["train/loss", 1] == 2.0 and found["train/tokens_per_second", 1] == 100.0
    assert found["heldout/loss", 2] == 1.5
    assert found["final/before/kl_nats", 2] == 0.5 and found["test/after/kl_nats", 2] == 0.25
    assert ("final/after/chunk_kl_nats", 2) not in found


def test_wandb_keeps_the_figures_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    heard = tell("wandb", tmp_path / "first")
    again = tell("wandb", tmp_path / "second")
    assert heard.warnings == again.warnings == []
    for name in ("first", "second"):
        (run,) = (tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb")
        content = run.read_bytes()
        assert b"heldout/kl" in content and b"final/after/kl_nats" in content
        assert b"tests" in content


def test_swanlab_keeps_the_figures_offline(tmp_path, monkeypatch):
    pytest.importorskip("swanlab", reason="the extra `swanlab` is not installed")
    monkeypatch.setenv("SWANLAB_MODE", "local")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "home"))
    heard = tell("swanlab", tmp_path / "run")
    assert heard.warnings == []
    files = [path for path in (tmp_path / "run" / "swanlog").rglob("*") if path.is_file()]
    assert files
