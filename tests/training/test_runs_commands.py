"""`conch-dna runs` and `conch-dna compare`, on folders as a distillation leaves them."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from conch_dna.checkpoints import write_folder
from conch_dna.cli import main
from conch_dna.training.settings import KDConfig

RESULT = "adapters_kd/kd_result.json"
TEACHER, STUDENT = (
    "mlx-community/Qwen2.5-7B-Instruct-4bit",
    "mlx-community/Qwen2.5-3B-Instruct-4bit",
)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments], env={"COLUMNS": "80"})


def refused(*arguments: object) -> str:
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").rstrip()


def figures(kl: float) -> dict[str, Any]:
    return {"kl_nats": kl, "chunk_kl_nats": None, "cross_entropy": 2.5, "top1_agreement": 0.5}


def finished(
    folder: Path,
    *,
    kl: float = 0.25,
    verdict: str = "better",
    metadata: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A folder of a run that has ended."""
    config = KDConfig(**settings).to_json()
    made_by = {"teacher": TEACHER, "student": STUDENT, "config": config, "best_step": 50}
    digests = {"teacher_digest": "t", "heldout_digest": "h", "data_digest": "d"}
    found = {"verdict": verdict, "figure": "kl_nats", "difference": kl - 0.5, "interval": None}
    result = {
        "domain": folder.name,
        "evaluation": {"before": figures(0.5), "after": figures(kl), "verdict": found},
        "metadata": {**made_by, **digests, **(metadata or {})},
        "timestamp": "2026-11-29T10:00:00+00:00",
        "training_time_seconds": 12.5,
    }
    write_folder(folder / "adapters_kd", documents={"kd_result.json": result})
    begun(folder, finished=True, num_iters=config["num_iters"])
    return folder


def begun(folder: Path, *, num_iters: int = 200, **more: Any) -> Path:
    """A folder of a run that has begun."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"teacher": TEACHER, "student": STUDENT, "num_iters": num_iters}
    document = {"identity": identity, "finished": False, "adapter": "adapters_kd", **more}
    (folder / "run.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder with a run of each kind, and what is none."""
    finished(tmp_path / "support")
    finished(
        tmp_path / "runs" / "slow" / "support", run="slow", kl=0.6, verdict="worse", num_iters=400
    )
    (begun(tmp_path / "stories") / "checkpoint_50").mkdir()
    begun(tmp_path / "debug", failed="the loss is nan at step 3")
    now = {"pid": os.getpid(), "host": socket.gethostname(), "since": "now"}
    (begun(tmp_path / "task") / "run.lock.json").write_text(json.dumps(now))
    (tmp_path / "memory" / "adapters_kd").mkdir(parents=True)
    (tmp_path / "shared" / "soft_targets").mkdir(parents=True)
    (tmp_path / "kd_summary.json").write_text("{}")
    return tmp_path


class TestRuns:
    def test_every_run_is_listed_within_80_columns(self, output):
        result = command("runs", output, "--json", output / "runs.json")
        assert result.exit_code == 0
        rows = {
            (row["domain"], row["run"]): row
            for row in json.loads((output / "runs.json").read_text())
        }
        assert {key: row["state"] for key, row in rows.items()} == {
            ("debug", ""): "FAILED",
            ("memory", ""): "UNREADABLE",
            ("stories", ""): "unfinished",
            ("support", ""): "finished",
            ("support", "slow"): "finished",
            ("task", ""): "running",
        }
        assert (rows["stories", ""]["steps"], rows["stories", ""]["planned"]) == (50, 200)
        lines = result.stdout.splitlines()
        assert max(map(len, lines)) <= 80
        for shown in ("Qwen2.5-3B-Instruct-4bit", "50 of 200", "400 steps", "2026-11-29", "WORSE"):
            assert shown in result.stdout
        assert "0.5000 to 0.2500" in result.stdout
        failed, unreadable = result.stderr.splitlines()
        assert failed == f"{output}/debug is FAILED: the loss is nan at step 3"
        assert unreadable.startswith(f"{output}/memory is UNREADABLE: {output}/memory/run.json")

    @pytest.mark.parametrize(
        "content",
        [
            '{"identity": {}, "finished": false}',
            '{"finished": true, "identity": {"teacher": "t", "student": "s", "num_iters": 1}, '
            '"adapter": "../.."}',
            "[" * 100_000,
        ],
    )
    def test_what_cannot_be_read_is_named(self, tmp_path, content):
        begun(tmp_path / "s")
        (tmp_path / "s" / "run.json").write_text(content)
        result = command("runs", tmp_path)
        assert result.exit_code == 0
        assert "UNREADABLE" in result.stdout
        assert result.stderr.startswith(f"{tmp_path}/s is UNREADABLE: {tmp_path}/s/run.json")

    def test_a_run_without_its_adapter_is_not_whole(self, tmp_path):
        run = finished(tmp_path / "s")
        documents = {
            "kd_result.json": json.loads((run / RESULT).read_text()),
            "evaluation.json": {},
        }
        write_folder(run / "adapters_kd", documents=documents)
        assert "finished" in command("runs", tmp_path).stdout
        (run / "adapters_kd" / "evaluation.json").unlink()
        result = command("runs", tmp_path)
        assert "NOT WHOLE" in result.stdout and "finished" not in result.stdout
        assert result.stderr == (
            f"{run} is NOT WHOLE: {run}/adapters_kd is not whole: evaluation.json is missing\n"
        )
        assert "is NOT WHOLE" in refused("compare", run, finished(tmp_path / "t"))

    def test_the_runs_of_a_sweep_stand_with_their_domain(self, output):
        sweep = output / "support-sweep"
        for name in ("alpha-1", "alpha-0.5"):
            finished(sweep / name / "support")
        (sweep / "shared" / "support" / "answers").mkdir(parents=True)
        (sweep / "sweep.json").write_text("{}")
        command("runs", output, "--json", output / "r.json")
        rows = [(row["domain"], row["run"]) for row in json.loads((output / "r.json").read_text())]
        names = ["", "slow", "support-sweep/alpha-0.5", "support-sweep/alpha-1"]
        assert rows == [
            ("debug", ""),
            ("memory", ""),
            ("stories", ""),
            *(("support", name) for name in names),
            ("task", ""),
        ]
        assert command("runs", sweep).stdout.count("finished") == 2
        assert max(map(len, command("runs", output).stdout.splitlines())) <= 80

    def test_a_folder_without_runs_is_refused(self, tmp_path):
        assert "holds no run: make one with" in refused("runs", tmp_path)
        assert "there is no folder" in refused("runs", tmp_path / "none")

    def test_one_run_by_its_own_folder(self, output):
        assert command("runs", output / "support").stdout.count("finished") == 1


class TestCompare:
    def test_settings_and_figures_that_differ_stand_beside_each_other(self, output):
        one, other = output / "support", output / "runs" / "slow" / "support"
        result = command("compare", one, other, "--json", output / "c.json")
        assert result.exit_code == 0
        compared = json.loads((output / "c.json").read_text())
        assert compared["settings"] == {"num_iters": [200, 400]}
        assert compared["figures"] == {
            "verdict": ["better", "worse"],
            "difference": [-0.25, pytest.approx(0.1)],
            "KL after": [0.25, 0.6],
        }
        assert compared["warnings"] == [] and result.stderr == ""
        runs, tables = result.stdout.splitlines()[:2], result.stdout.splitlines()[2:]
        assert runs == [f"run 1: {one}", f"run 2: {other}"]
        assert max(map(len, tables)) <= 80

    @pytest.mark.parametrize(
        ("metadata", "warning"),
        [
            ({"heldout_digest": "x"}, "warning: what was held out differs: the figures are of"),
            ({"heldout_digest": None}, "warning: what was held out is not recorded of every run"),
            ({"teacher_digest": "x"}, "warning: the teachers differ: KL and agreement are to"),
            ({"resumed": True}, "warning: a run was resumed: its seconds are those of its last"),
        ],
    )
    def test_figures_that_do_not_mean_the_same_are_said_to_be_such(
        self, tmp_path, metadata, warning
    ):
        runs = [finished(tmp_path / "a"), finished(tmp_path / "b", metadata=metadata)]
        result = command("compare", *runs)
        assert result.exit_code == 0
        assert result.stderr.startswith(warning) and result.stderr.count("\n") == 1

    def test_runs_judged_by_different_figures_are_said_to_be_such(self, tmp_path):
        runs = [finished(tmp_path / "a"), finished(tmp_path / "b", kl=0.6)]
        path = runs[1] / RESULT
        result = json.loads(path.read_text())
        result["evaluation"]["verdict"] |= {"figure": "cross_entropy", "difference": -0.7}
        write_folder(runs[1] / "adapters_kd", documents={"kd_result.json": result})
        done = command("compare", *runs, "--json", tmp_path / "c.json")
        assert done.stderr.startswith(
            "warning: the runs were judged by different figures (kl_nats, cross_entropy): their"
        )
        compared = json.loads((tmp_path / "c.json").read_text())["figures"]
        assert compared["difference, of what judged it"] == [-0.25, -0.7]
        assert compared["KL difference"] == [-0.25, pytest.approx(0.1)]
        assert "difference" not in compared

    def test_four_runs_with_long_names_stand_in_80_columns_whole(self, tmp_path):
        runs = [
            finished(tmp_path / f"temperature-{n}_learning-rate-0.0001" / "support", kl=n / 9)
            for n in range(4)
        ]
        lines = command("compare", *runs).stdout.splitlines()
        assert lines[:4] == [f"run {number}: {run}" for number, run in enumerate(runs, 1)]
        assert max(map(len, lines[4:])) <= 80
        heading = next(line for line in lines if line.startswith("┃"))
        assert heading.replace("┃", " ").split() == ["run", "1", "run", "2", "run", "3", "run", "4"]

    def test_a_folder_of_several_runs_is_not_one(self, output):
        message = refused("compare", output, output / "support")
        assert message.startswith(f"{output} holds 6 runs: give the folders of those that you mean")
        assert f"{output}/runs/slow/support" in message

    def test_equal_runs(self, tmp_path):
        runs = [finished(tmp_path / part / "a") for part in ("x", "y")]
        assert command("compare", *runs).stdout == "neither settings nor figures differ\n"

    def test_what_is_not_finished_is_refused_by_name(self, output):
        message = refused("compare", output / "support", output / "debug", output / "stories")
        assert message == (
            f"only finished runs can be compared: {output}/debug is FAILED (the loss is nan at "
            f"step 3); {output}/stories is unfinished"
        )
        assert "give two or more folders" in refused("compare", output / "support")
