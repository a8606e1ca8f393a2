"""Several processes of mlx.launch over loopback: the losses of one, one writer, and a lost one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.training.batches import ExampleBatches
from conch_dna.training.machines.ranks.leading import run_teacher
from conch_dna.training.machines.ranks.teacher import arrays_of_examples, examples_of
from conch_dna.training.settings import KDConfig
from models import ANIMALS, random_examples

STEPS = 8
RECORDS = [
    {"prompt": f"One day a {animal}", "completion": f" saw a red {thing} and ran home. " * (1 + n)}
    for n, animal in enumerate(ANIMALS)
    for thing in ("ball", "bug", "hat")
]
OPTIONS = ["--domain", "owls", "--teacher", "embedded:teacher", "--student", "embedded:student"]
OPTIONS += ["--iters", str(STEPS), "--batch-size", "4", "--warmup-iters", "2"]
OPTIONS += ["--steps-per-report", "1", "--steps-per-eval", "4", "--steps-per-save", "3"]
OPTIONS += ["--learning-rate", "0.002"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def arguments(place: Path, *more: str) -> list[str]:
    data = place.parent / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    return ["distill", *OPTIONS, "--data", str(data), "--output-dir", str(place), *more]


def alone(place: Path, *more: str) -> None:
    """A run by this process, which has all libraries by now."""
    found = CliRunner().invoke(main, arguments(place, *more))
    assert found.exit_code == 0, found.output


def started(
    place: Path, count: int, *more: str, lost_at: str = ""
) -> subprocess.CompletedProcess[str]:
    """A run of several processes; the second is killed when the run says a text."""
    script = place.parent / "start.sh"
    # The second process notes its number, which stays when it becomes the command.
    script.write_text(
        f'[ "$MLX_RANK" = 1 ] && echo $$ > {place.parent}/second\nexec "$@"\n', "utf-8"
    )
    launcher = Path(sys.executable).parent / "mlx.launch"
    command = [str(launcher), "-n", str(count), "-p", str(free_port()), "bash", str(script)]
    command += [sys.executable, "-m", "conch_dna", *arguments(place, *more)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
    with subprocess.Popen(
        command,
        # From an empty input the launcher reads again and again.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if lost_at and line.startswith(lost_at):
                os.kill(int((place.parent / "second").read_text()), 9)
                lost_at = ""
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, "".join(lines), "")


def rows_of(place: Path) -> list[dict[str, Any]]:
    log = json.loads((place / "owls" / "adapters_kd" / "training_log.json").read_text())
    return [row for row in log if row["split"] in ("train", "heldout")]


def require_same(one: Path, several: Path) -> None:
    """The same figures at every step: to 2e-4 of their size, after as many updates."""
    first, second = rows_of(one), rows_of(several)
    assert len(first) == len(second) > STEPS
    for before, after in zip(first, second, strict=True):
        for name in {"loss", "kd", "ce", "kl", "gradient_norm"} & before.keys():
            assert after[name] == pytest.approx(before[name], rel=2e-4), (name, before["step"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "more"),
    [
        (2, []),
        (3, ["--accumulation-steps", "2", "--dora"]),
        (2, ["--on-policy", "0.5", "--rollout-tokens", "8", "--rollouts", "4"]),
        (2, ["--alpha", "0"]),
        (2, ["--targets", "sampled", "--target-draws", "6"]),
        (2, ["--alignment", "roots"]),
        (2, ["--shard-teacher"]),
    ],
    ids=["two", "three", "on-policy", "cross-entropy", "sampled", "roots", "sharded"],
)
def test_the_losses_are_those_of_one_process(tmp_path, count, more):
    alone(tmp_path / "one", *(option for option in more if option != "--shard-teacher"))
    several = started(tmp_path / "several", count, *more)
    assert several.returncode == 0, several.stdout
    require_same(tmp_path / "one", tmp_path / "several")
    files = [
        sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
        for place in (tmp_path / "one", tmp_path / "several")
    ]
    assert files[0] == files[1] or "--shard-teacher" in more
    # One process speaks; on a busy machine it says more than once what it is at.
    said = [line for line in several.stdout.splitlines() if "evaluating the adapter" in line]
    assert len([line for line in said if "still at work" not in line]) == 1, said


@pytest.mark.slow
def test_a_lost_process_leaves_a_state_from_which_one_goes_on(tmp_path):
    alone(tmp_path / "one")
    lost = started(tmp_path / "several", 3, lost_at="step 5:")
    errors = [line for line in lost.stdout.splitlines() if line.startswith("error:")]
    assert lost.stdout.count("Traceback") == 0, lost.stdout
    mine = [line for line in errors if "of the 3 processes was lost" in line and "after" in line]
    assert len(mine) == 1, lost.stdout
    assert "go on with --resume" in mine[0]
    saved = sorted((tmp_path / "several" / "owls").glob("checkpoint_*"))
    assert saved and not (tmp_path / "several" / "owls" / "adapters_kd").exists()
    alone(tmp_path / "several", "--resume")
    require_same(tmp_path / "one", tmp_path / "several")


@pytest.mark.slow
def test_what_cannot_be_shared_is_one_line(tmp_path):
    found = started(tmp_path / "several", 2, "--batch-size", "1")
    assert "a batch of 1 cannot be dealt out to 2 processes" in found.stdout
    assert "Traceback" not in found.stdout


def test_other_commands_are_one_process_s_work(monkeypatch):
    monkeypatch.setenv("MLX_RANK", "0")
    found = CliRunner().invoke(main, ["runs", "models"])
    assert found.exit_code == 2 and "start it by itself" in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_teacher_is_shared_out_among_several_only():
    with pytest.raises(ConchError, match="there is only this one: leave it out"):
        run_teacher("embedded:teacher", KDConfig(shard_teacher=True))


def test_parts_of_a_batch_are_the_batch():
    examples = random_examples(9, 50)
    stream = ExampleBatches(examples, 5, seed=1)
    whole, parts = stream.batch(3), stream.parts(3, 2)
    assert sum(part.count for part in parts) == whole.count
    assert sorted(name for part in parts for name in part.names) == sorted(whole.names)
    labels = [np.sort(part.arrays["labels"][: part.count]) for part in parts]
    np.testing.assert_array_equal(
        np.sort(np.concatenate(labels)), np.sort(whole.arrays["labels"][: whole.count])
    )


def test_examples_are_the_same_behind_a_message():
    examples = random_examples(5, 50)
    again = examples_of(arrays_of_examples(examples))
    assert [each.digest for each in again] == [each.digest for each in examples]
