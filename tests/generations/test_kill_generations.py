"""A generation whose process is killed again and again is the one of a process that was not.

Kills come at seeded random moments behind a line of progress, promotion among them. CONCH_DNA_KILLS
says how often; -s shows where.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conch_dna.checkpoints import verify_folder
from conch_dna.generations.line import Line

KILLS = int(os.environ.get("CONCH_DNA_KILLS", "5"))
# Behind which line, and for at most how many seconds.
MOMENTS = [
    ("targets of", 0.5),
    ("measuring G000", 0.8),
    ("step 0:", 0.2),
    ("step 4:", 0.3),
    ("step 8:", 0.3),
    ("step 12:", 0.5),
    ("measuring the child", 0.6),
    ("measuring the child", 1.2),
]
CONFIG = """
stabilizers: {ema_decay: 0.9, replay_share: 0.2}
evaluation: {answers: 3}
training_params: {num_iters: 12, steps_per_save: 2, steps_per_eval: 4, batch_size: 4,
  lora_keys: all, lora_rank: 4, max_tokens: 8, val_fraction: 0.25, learning_rate: 3e-3}
gates: {generalize_gain: -1.0, recall_margin: 1.0, max_tone_drift: 1.0}
"""


def command(folder: Path, *arguments: str) -> list[str]:
    root = ("--root", str(folder / "lines"))
    return [sys.executable, "-m", "conch_dna.generations", *arguments, *root]


def evolving(folder: Path, name: str) -> list[str]:
    data, config = str(folder / "new.jsonl"), str(folder / "evolve.yaml")
    return command(folder, "evolve", name, "--data", data, "--manifest", config, "--resume")


def begun(folder: Path, name: str) -> Line:
    data = str(folder / "old.jsonl")
    first = command(folder, "init", name, "--model", "embedded:student", "--data", data)
    subprocess.run(first, check=True, capture_output=True, timeout=120)
    return Line(folder / "lines", name)


def killed_behind(words: list[str], text: str, after_s: float) -> tuple[bool, str]:
    """Whether SIGKILL came before the end, and the last line of progress until then."""
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        last = ""
        for last in process.stderr:
            if text in last:
                break
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return process.returncode == -signal.SIGKILL, last.strip()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_anywhere_the_line_is_whole_and_ends_the_same(tmp_path: Path) -> None:
    for name, word in (("old", "cat"), ("new", "ball")):
        rows = [
            {"prompt": f"Once upon a time {n}", "completion": f" there were {n} {word}s."}
            for n in range(16)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "evolve.yaml").write_text(CONFIG)
    whole = begun(tmp_path, "whole")
    subprocess.run(evolving(tmp_path, "whole"), check=True, capture_output=True, timeout=300)
    random.seed(7)
    kills, lines = 0, [begun(tmp_path, "killed")]
    for number in range(KILLS):
        text, most = MOMENTS[number * len(MOMENTS) // KILLS]
        line = lines[-1]
        if line.head == "G001":
            # That one came to its end before all kills were spent.
            line = begun(tmp_path, f"killed-{number}")
            lines.append(line)
        was_killed, last = killed_behind(
            evolving(tmp_path, line.name), text, random.uniform(0, most)
        )
        kills += was_killed
        print(f"kill {number}: {'killed' if was_killed else 'ended'} behind {last!r}")
        assert line.head in ("G000", "G001")
        for generation in line.generations():
            verify_folder(line.path(generation))
    assert kills >= KILLS // 2
    for line in lines:
        subprocess.run(evolving(tmp_path, line.name), check=True, capture_output=True, timeout=300)
        assert line.head == "G001" and line.generations() == ["G000", "G001"]
        assert line.problems() == []
        both = [each.path("G001") for each in (whole, line)]
        figures = [json.loads((path / "metrics.json").read_text())["scores"] for path in both]
        assert figures[0] == figures[1]
        tensors = [(path / "adapters.safetensors").read_bytes() for path in both]
        assert tensors[0] == tensors[1], "to the last bit"
