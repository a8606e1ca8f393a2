"""Ratios that benchmark scripts find, and all of them in one table: `make bench` ends with it."""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import sys
from collections.abc import Sequence
from pathlib import Path

from _setting import spread
from rich.console import Console

from conch_dna.checkpoints import NotWholeError, read_json, write_json
from conch_dna.screen.presentation import text_table

FILE = Path("models/benchmark_ratios.json")


def note_ratio(name: str, values: Sequence[float], wanted: str) -> str:
    """Keep a ratio for the table, and give it as text."""
    try:
        known = read_json(FILE, needs={})
    except NotWholeError:
        known = {}
    write_json(FILE, {**known, name: {"values": list(values), "wanted": wanted}})
    return spread(values, 2)


def main() -> None:
    """Print what was kept, or forget it all."""
    if sys.argv[1:] == ["forget"]:
        FILE.unlink(missing_ok=True)
        return
    try:
        known = read_json(FILE, needs={})
    except NotWholeError:
        known = {}
    rows = [(name, spread(row["values"], 2), row["wanted"]) for name, row in known.items()]
    Console(width=120).print(text_table("Ratios", ("", "measured", "wanted"), rows))


if __name__ == "__main__":
    main()
