"""A run that is killed again and again ends with the bytes of one that was never stopped.

The command runs in processes of its own, which are killed at seeded random moments of their work
(their start-up writes nothing). CONCH_DNA_KILLS says how often; -s shows where.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.training.cli import distill

KILLS = int(os.environ.get("CONCH_DNA_KILLS", "5"))
SEED = 20
STEPS = 40
ANIMALS = ["cat", "dog", "bird", "fox", "frog", "pig", "bear", "duck", "cow", "hen", "goat", "boy"]
# Share of the kills that each stage gets; by their durations some would get none.
STAGES = {"answers": 0.2, "targets": 0.15, "evaluation": 0.1, "training": 0.35, "final stage": 0.2}
# A phase of plain progress, and the stage that begins with it.
PHASES = {
    "the teacher answers": 0,
    "the teacher's targets": 1,
    "evaluating the student": 2,
    "training": 3,
    "evaluating the adapter": 4,
}


class Moment(NamedTuple):
    """A place in a run's work: the last progress that was shown, and the time since."""

    stage: int
    step: int
    after_s: float


class Killed(NamedTuple):
    """What became of a process that was to be killed."""

    stage: int
    step: int
    exit_code: int
    shown: str


class Work:
    """A command in a process of its own, and what its progress says of where it is."""

    def __init__(self, options: list[str]) -> None:
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "conch_dna", "distill", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=inherited | {"HF_HUB_OFFLINE": "1"},
        )
        self.place = (-1, 0)
        self.lines: list[str] = []

    def follow(self) -> bool:
        """Wait for a line of progress; False at the end of them."""
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        if not line:
            return False
        self.lines.append(line.rstrip("\n"))
        stage, step = self.place
        if found := re.match(r"s: ([^:]+?)(:|$)", self.lines[-1]):
            stage, step = PHASES.get(found[1], stage), 0
        elif found := re.match(r"(?:going on from )?step (\d+)", self.lines[-1]):
            step = int(found[1])
        self.place = (stage, step)
        return True

    def follow_to(self, stage: int, step: int) -> bool:
        """Wait until the work has come so far; False if it ends before."""
        while self.place < (stage, step):
            if not self.follow():
                return False
        return True

    def end(self) -> tuple[int, str]:
        """Wait for the end; the exit code and everything that was shown."""
        while self.follow():
            pass
        return self.process.wait(), "\n".join(self.lines)

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def timeline(options: list[str]) -> list[Moment]:
    """When a run that nobody stops showed its progress; `after_s` counts from the first."""
    moments: list[Moment] = []
    began = 0.0
    with Work(options) as work:
        while work.follow():
            now = time.monotonic()
            began = began or now
            moments.append(Moment(*work.place, now - began))
        assert work.process.wait() == 0, work.lines
    moments.append(Moment(len(STAGES), 0, time.monotonic() - began))
    return moments


def moment_at(moments: list[Moment], share: float) -> Moment:
    """The moment at which a share of all kills of the run of a timeline has taken place."""
    stage, weights = 0, list(STAGES.values())
    while share >= weights[stage] and stage < len(weights) - 1:
        share -= weights[stage]
        stage += 1
    begin, end = (min(m.after_s for m in moments if m.stage >= s) for s in (stage, stage + 1))
    # The last stage ends with the process, some time after the last file was written.
    length = (end - begin) * (0.8 if stage == len(weights) - 1 else 1.0)
    second = begin + length * min(1.0, share / weights[stage])
    last = max(moment for moment in moments if moment.stage == stage and moment.after_s <= second)
    return last._replace(after_s=second - last.after_s)


def kill_at(options: list[str], moment: Moment) -> Killed:
    """Start or resume the work and send SIGKILL at a moment, unless it ends before.

    A process that is faster than the clean one was is killed where the next stage begins.
    """
    with Work([*options, "--resume"]) as work:
        work.follow_to(moment.stage, moment.step)
        timer = threading.Timer(moment.after_s, work.process.kill)
        timer.start()
        work.follow_to(max(moment.stage, work.place[0]) + 1, 0)
        timer.cancel()
        if work.place[0] < len(STAGES) - 1:
            work.process.kill()
        code, shown = work.end()
        return Killed(*work.place, code, shown)


def place(stage: int, step: int) -> str:
    return f"{list(STAGES)[stage]}, step {step}" if step else list(STAGES)[stage]


def adapter_in(output: Path) -> bytes:
    return (output / "s" / "adapters_kd" / "adapters.safetensors").read_bytes()


def same(first: bytes, second: bytes, folder: Path) -> bool:
    """Equal bytes; on a GPU, whose sums may change their order, equal within rounding."""
    if not mx.metal.is_available():
        return first == second
    arrays = []
    for number, content in enumerate((first, second)):
        path = folder / f"{number}.safetensors"
        path.write_bytes(content)
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        arrays.append({name: np.asarray(value) for name, value in loaded.items()})
    names = arrays[0].keys() == arrays[1].keys()
    return names and all(np.allclose(arrays[0][n], arrays[1][n], atol=1e-4) for n in arrays[0])


def command(teacher: Path, student: Path, prompts: Path, output: Path) -> list[str]:
    settings = {
        "domain": "s",
        "teacher": teacher,
        "student": student,
        "prompts": prompts,
        "output-dir": output,
        "iters": STEPS,
        "learning-rate": 2e-4,
        "warmup-iters": 4,
        "batch-size": 2,
        "accumulation-steps": 2,
        "lora-dropout": 0.1,
        "max-tokens": 40,
        "generation-batch-size": 2,
        "val-fraction": 0.25,
        "steps-per-report": 1,
        "steps-per-eval": 4,
        "steps-per-save": 3,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


class Clean(NamedTuple):
    """A run that nobody stopped."""

    teacher: Path
    student: Path
    prompts: Path
    adapter: bytes
    moments: list[Moment]

    def options(self, output: Path) -> list[str]:
        return command(self.teacher, self.student, self.prompts, output)


@pytest.fixture(scope="module")
def clean(
    tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Clean:
    """Two such runs: the first compiles MLX's kernels, so only the second has its usual times."""
    folder = tmp_path_factory.mktemp("clean")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"Once there was a little {animal} who" for animal in ANIMALS))
    first, second = (
        command(tiny_teacher, tiny_student, prompts, folder / name) for name in ("first", "second")
    )
    result = CliRunner().invoke(distill, first)
    assert result.exit_code == 0, result.output
    moments = timeline(second)
    adapter = adapter_in(folder / "second")
    assert same(adapter_in(folder / "first"), adapter, folder)
    # An adapter that training left as it began would be the same after any number of kills.
    text = (folder / "second" / "s" / "adapters_kd" / "kd_result.json").read_text()
    best = re.search(r'"best_step": (\d+)', text)
    assert best
    assert int(best[1]) > STEPS // 2
    return Clean(tiny_teacher, tiny_student, prompts, adapter, moments)


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_runs_end_with_the_bytes_of_one_that_was_not(clean, tmp_path):
    """Every --resume goes on from what a kill left behind, until the next one.

    A run that ends before its last kills is followed by another one.
    """
    draw = random.Random(SEED)
    names = list(STAGES)
    finished = 0
    hit: Counter[str] = Counter()
    output = tmp_path / "run0"
    for number in range(KILLS):
        target = moment_at(clean.moments, (number + draw.random()) / KILLS)
        killed = kill_at(clean.options(output), target)
        # The timeline is that of a busier or quieter moment of the machine: aim nearer and nearer.
        for _ in range(4):
            if killed.exit_code != 0:
                break
            assert same(adapter_in(output), clean.adapter, tmp_path)
            finished += 1
            output = tmp_path / f"run{finished}"
            target = target._replace(after_s=target.after_s / 2)
            killed = kill_at(clean.options(output), target)
        assert killed.exit_code == -signal.SIGKILL, killed.shown
        hit[names[killed.stage]] += 1
        print(
            f"kill {number + 1:2}: aimed {target.after_s:4.2f} s after "
            f"{place(target.stage, target.step)}, hit after {place(killed.stage, killed.step)}"
        )
    print(f"runs: {finished + 1}; kills by stage:", dict(hit))
    with Work([*clean.options(output), "--resume"]) as work:
        code, shown = work.end()
    assert code == 0, shown
    assert same(adapter_in(output), clean.adapter, tmp_path)
    assert not [*output.rglob(".writing-*")]
    left = {path.name for path in (output / "s").iterdir()}
    assert "candidate" not in left
    assert len([name for name in left if name.startswith("checkpoint_")]) <= 3
    assert len(hit) > 1, "all kills fell into one stage"


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_a_message_and_can_be_resumed(clean, tmp_path):
    """Once before there is a checkpoint, and once in training, where the step is finished first."""
    options = [*clean.options(tmp_path), "--resume"]
    with Work(options) as work:
        assert work.follow_to(0, 0)
        work.process.send_signal(signal.SIGINT)
        code, shown = work.end()
    assert code == 130, shown
    assert shown.splitlines()[-1] == "stopped; the same command with --resume goes on"
    with Work(options) as work:
        assert work.follow_to(3, 5)
        work.process.send_signal(signal.SIGINT)
        code, shown = work.end()
    assert code == 130, shown
    found = re.fullmatch(
        rf"stopped after step (\d+); its state is in {re.escape(str(tmp_path))}/s\. "
        r"Add --resume to go on",
        shown.splitlines()[-1],
    )
    assert found, shown
    assert 5 <= int(found[1]) < STEPS
    with Work(options) as work:
        code, shown = work.end()
    assert code == 0, shown
    assert f"going on from step {found[1]} (" in shown
    assert same(adapter_in(tmp_path), clean.adapter, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_operation_keeps_what_it_acknowledged_and_ends_the_same(tmp_path):
    """A few moments of the benchmark, which is run with a hundred."""
    script = Path(__file__).parent / "benchmarks" / "kill_moments.py"
    figures = tmp_path / "figures.json"
    command = [sys.executable, script, "--moments", "14", "--seed", str(SEED), "--json", figures]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    operations = json.loads(figures.read_text())["operations"]
    assert [each["kills"] for each in operations.values()] == [1] * 14
    assert not [fault for each in operations.values() for fault in each["faults"]]
