"""What a benchmark script states beside its figures: machine, versions, commit; and its data."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from conch_dna.loading.blas import blas_state  # noqa: E402

LONGEST = 240
SHARED = TESTS.parents[1] / "shared" / "data"


def print_setting(title: str) -> None:
    """Print what the figures below were taken on."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.check_output(command, cwd=TESTS, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "no git"
    load = os.getloadavg()[0]
    print(title)
    print(
        f"  {platform.platform()}, {os.cpu_count()} cores, load {load:.1f}, "
        f"Python {platform.python_version()}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, "
        f"BLAS {blas_state()}, commit {commit}"
    )


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Median, lowest and highest of some figures."""
    low, high = min(values), max(values)
    middle = statistics.median(values)
    return f"{middle:.{digits}f} (n = {len(values)}, {low:.{digits}f} to {high:.{digits}f})"


def shared_data() -> Path:
    """The folder of real models and texts, or the end of the script where it is absent."""
    if not SHARED.is_dir():
        print("skipped: ../shared/data is not here")
        sys.exit(0)
    return SHARED


def stories(name: str, count: int) -> list[dict[str, str]]:
    """The first records of a TinyStories file."""
    path = shared_data() / "text" / "tinystories" / f"{name}.jsonl"
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def short_stories(count: int, *, words: int = 3, longest: int = LONGEST) -> list[dict[str, str]]:
    """Beginnings of stories as a few words of prompt and the rest, cut between words.

    Args:
        count: How many at most.
        words: Of a prompt.
        longest: Bytes of a text.
    """
    records = []
    for record in stories("train", 4 * count):
        text = " ".join(record["text"].split())[:longest].rsplit(" ", 1)[0]
        if longest - 90 < len(text.encode()) <= longest:
            parts = text.split(" ")
            prompt, rest = " ".join(parts[:words]), " " + " ".join(parts[words:])
            records.append({"prompt": prompt, "completion": rest, "finish_reason": "length"})
    return records[:count]
