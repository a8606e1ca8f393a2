"""Lines that several test files of generations look at, or copy."""

import gc
from pathlib import Path
from typing import Any

import pytest

from conch_dna.generations.data import init_line
from conch_dna.generations.evolve import train_generation_with_teachers as evolve
from conch_dna.generations.line import Line
from lines import config_of, quick_config, stories, sums


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Line, list[Any]]:
    """A line of three generations, and the outcomes of the last two."""
    line = Line(tmp_path_factory.mktemp("lines"), "tales")
    init_line(line, "embedded:student", stories(0), config=config_of())
    messages: list[str] = []

    def report(event: str, row: dict[str, Any]) -> None:
        if event == "message":
            messages.append(row["message"])

    outcomes = [
        evolve(line, sums(1), config_of(), report=report),
        evolve(line, stories(2) + sums(3), config_of(gates={"generalize_gain": -0.05})),
    ]
    return line, [*outcomes, messages]


@pytest.fixture(scope="session")
def tiny_line(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Line:
    """A line of three generations of a tiny random model."""
    line = Line(tmp_path_factory.mktemp("lines"), "tiny")
    init_line(line, str(tiny_student), stories(0, 16), config=quick_config())
    for seed in (1, 2):
        assert evolve(line, sums(seed, 16), quick_config()).promoted
    # The libraries' own objects, looked through at each release of a model, take a third of the
    # time of a tiny generation.
    gc.collect()
    gc.freeze()
    return line


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations without the picture of their learning, which takes longer than tiny ones do."""

    def nothing(path: Path, **options: Any) -> None:
        path.write_bytes(b"")

    monkeypatch.setattr("conch_dna.generations.evolve.draw_learning", nothing)
