"""Processes killed while they record or retrain: nothing that was acknowledged is lost.

Kills come at seeded random moments; CONCH_DNA_KILLS says how often, -s shows where.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conch_dna.checkpoints import verify_folder
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller

KILLS = int(os.environ.get("CONCH_DNA_KILLS", "3"))
DOMAIN = "tales"
RECORDING = """
import sys
from itertools import count
from pathlib import Path
from conch_dna.retraining.pipeline import TrainingPipeline
pipeline = TrainingPipeline(Path(sys.argv[1]), "embedded:student", max_records=1_000_000)
for number in count():
    text = f"{sys.argv[2]}.{number}"
    assert pipeline.record_correction("task", text, "x" * 5000, "better")
    print(text, flush=True)
"""
RETRAINING = """
import sys
from pathlib import Path
from conch_dna.generations.promotion import GateSettings
from conch_dna.generations.settings import EvolveConfig
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.settings import KDConfig
training = KDConfig(num_iters=10, steps_per_save=2, steps_per_eval=5, batch_size=4, lora_rank=4,
    max_tokens=8, val_fraction=0.25, learning_rate=3e-3)
gates = GateSettings(generalize_gain=-1.0, recall_margin=1.0, max_tone_drift=1.0)
config = EvolveConfig(training=training, gates=gates, answers=3, ema_decay=0.9, replay_share=0.2)
def report(event, row):
    print(row.get("name") or f"{event} {row.get('step', '')}", flush=True)
pipeline = TrainingPipeline(Path(sys.argv[1]), "embedded:student", ego="embedded:teacher",
    config=config, min_new=4)
if pipeline.should_retrain("tales").retrain:
    pipeline.retrain("tales", resume=True, report=report)
"""
# Behind which line of progress, and for at most how many seconds.
MOMENTS = [
    ("targets of", 0.5),
    ("step 3", 0.3),
    ("measuring the child", 1.0),
    ("measuring G000", 0.8),
    ("step 8", 0.5),
    ("measuring the child", 2.0),
]


def acknowledged(process: "subprocess.Popen[str]", after_s: float) -> list[str]:
    """What a process said before it was killed, some time after its first line."""
    assert process.stdout is not None
    said = [process.stdout.readline().strip()]
    timer = threading.Timer(after_s, process.kill)
    timer.start()
    # A line without its end was never said.
    said += [line.strip() for line in process.stdout if line.endswith("\n")]
    process.wait()
    timer.cancel()
    return [each for each in said if each]


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * KILLS)
def test_killed_while_recording_all_that_was_acknowledged_is_there(tmp_path: Path) -> None:
    """Two processes write to one file; each kill takes one of them."""
    draw = random.Random(3)
    pipeline = TrainingPipeline(tmp_path, "embedded:student", max_records=1_000_000)
    said: list[str] = []
    for number in range(KILLS):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", RECORDING, str(tmp_path), f"{number}-{name}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in ("a", "b")
        ]
        for process in writers:
            with process:
                said += acknowledged(process, draw.uniform(0, 0.5))
                assert process.returncode == -signal.SIGKILL
        found, problems = pipeline.buffer.read("task")
        kept = {each.messages[0]["content"] for each in found}
        print(f"kill {number}: {len(said)} said, {len(kept)} kept, {len(problems)} half lines")
        assert set(said) <= kept
        # More than was said is at most what each killed process was about to say.
        assert len(kept) <= len(said) + 2 * (number + 1)
        assert len(problems) <= 2 * (number + 1)
    assert pipeline.record_correction("task", "last", "x", "y")
    assert pipeline.buffer.read("task")[0][-1].messages[0]["content"] == "last"


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    config = KDConfig(
        num_iters=2, lora_rank=4, batch_size=4, max_tokens=8, output_dir=str(folder), seed=1
    )
    rows = [
        {"prompt": f"Once upon a time {n}", "completion": f" there were {n} cats."}
        for n in range(12)
    ]
    TrueKnowledgeDistiller("embedded:teacher", "embedded:student", config).distill_domain(
        DOMAIN, data=rows
    )
    pipeline = TrainingPipeline(folder, "embedded:student")
    for n in range(12):
        pipeline.record_correction(DOMAIN, f"How many balls are {n}?", "?", f" There are {n}.")
    return folder


def retraining(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", RETRAINING, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def whole_run(folder: Path) -> None:
    with retraining(folder) as process:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.timeout(300 + 60 * KILLS)
def test_killed_while_retraining_it_ends_as_one_that_was_not(adapters: Path) -> None:
    import shutil

    draw = random.Random(5)
    whole = adapters.parent / "whole"
    shutil.copytree(adapters, whole)
    whole_run(whole)
    wanted = TrainingPipeline(whole, "embedded:student").line(DOMAIN).path("G001")
    pipeline: Any = TrainingPipeline(adapters, "embedded:student")
    kills = 0
    for number in range(KILLS):
        text, most = MOMENTS[number % len(MOMENTS)]
        with retraining(adapters) as process:
            assert process.stdout is not None
            last = ""
            for last in process.stdout:
                if text in last:
                    break
            time.sleep(draw.uniform(0, most))
            process.kill()
            process.wait()
            kills += process.returncode == -signal.SIGKILL
        print(f"kill {number}: behind {last.strip()!r}, ended with {process.returncode}")
        # Experience that comes in the meantime is not lost, and not learned by the resumed one.
        assert pipeline.record_correction(DOMAIN, f"And {number}?", "?", " That too.")
        line = pipeline.line(DOMAIN)
        for name in line.generations():
            verify_folder(line.path(name))
        if "G001" in line.generations():
            break
    assert kills
    whole_run(adapters)
    line = pipeline.line(DOMAIN)
    assert line.problems() == [] and line.head in ("G001", "G002")
    files = [folder / "adapters.safetensors" for folder in (wanted, line.path("G001"))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(pipeline.buffer.read(DOMAIN)[0]) == 12 + number + 1
    counts = pipeline.should_retrain(DOMAIN).counts
    assert counts["used"] + counts["new"] == 12 + number + 1
