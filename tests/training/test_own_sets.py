"""A run on a folder as mlx-lm has it: its own validation set, and a test set measured at the end.

Runs take seconds, so most tests look at one run.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result

from conch_dna.training.cli import distill
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import stored_rows

ANIMALS = ["cat", "dog", "bird", "fox", "frog", "pig", "bear", "duck", "cow", "hen", "goat", "boy"]
SETS = {
    "train": [{"text": f"Once upon a time there was a {animal}."} for animal in ANIMALS],
    "valid": [{"text": f"One day, the {animal} ran home."} for animal in ANIMALS[:7]],
    "test": [{"text": f"A {animal} sat in the sun all day."} for animal in ANIMALS[:6]],
}
SETTINGS = """
iters: 4
batch_size: 2
learning_rate: 3.0e-3
num_layers: -1
steps_per_report: 2
steps_per_eval: 2
save_every: 2
warmup_iters: 1
top_k: 8
"""


class Finished(NamedTuple):
    options: list[str]
    result: Result
    folder: Path

    @property
    def evaluation(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.folder / "adapters_kd/evaluation.json").read_text()
        )
        return found


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def run(*options: str, text: str | None = None) -> Result:
    return CliRunner().invoke(distill, list(options), input=text)


@pytest.fixture(scope="module")
def base(
    tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Options of a small run, without data and place."""
    file = tmp_path_factory.mktemp("settings") / "lora.yaml"
    file.write_text(SETTINGS + f"model: {tiny_student}\n")
    return ["--config", str(file), "--teacher", str(tiny_teacher), "--domain", "s"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, records in SETS.items():
        (folder / f"{name}.jsonl").write_text(lines(records))
    return folder


@pytest.fixture(scope="module")
def finished(base: list[str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    output = tmp_path_factory.mktemp("out")
    options = [*base, "--data", str(data), "--output-dir", str(output)]
    result = run(*options)
    assert result.exit_code == 0, result.output
    return Finished(options, result, output / "s")


def test_the_validation_set_is_what_is_held_out(finished):
    heldout = (finished.folder / "adapters_kd" / "heldout.jsonl").read_text()
    assert heldout == lines(SETS["valid"])
    metadata = json.loads((finished.folder / "adapters_kd/kd_result.json").read_text())["metadata"]
    assert (metadata["train_examples"], metadata["heldout_examples"]) == (12, 7)
    assert (metadata["test_examples"], metadata["own_heldout"]) == (6, True)
    assert finished.evaluation["verdict"]["examples"] == 7


def test_the_test_set_has_figures_and_a_verdict_of_its_own(finished):
    evaluation = finished.evaluation
    test = evaluation["test"]
    assert test.keys() == evaluation.keys() - {"test", "breakdown"}
    assert test["verdict"]["examples"] == 6 and len(test["verdict"]["interval"]) == 2
    assert test["before"]["tokens"] == test["after"]["tokens"] != evaluation["before"]["tokens"]
    assert "s, test set: the student is " in finished.result.stdout
    assert finished.result.stdout.count("of the gap closed") == 2
    notes = [line for line in finished.result.stderr.splitlines() if line.startswith("note: ")]
    assert ["leaves out what is not as in mlx-lm" in note for note in notes] == [True]


def test_resuming_it_returns_at_once_and_another_test_set_is_another_run(finished, data, tmp_path):
    again = run(*finished.options, "--resume")
    assert again.exit_code == 0 and "s is already finished" in again.stderr
    other = tmp_path / "other.jsonl"
    other.write_text(lines(SETS["test"][1:]))
    message = run(*finished.options, "--resume", "--test-data", str(other)).stderr
    assert "was made with other settings: data" in message


@pytest.mark.slow
def test_the_same_records_have_the_same_figures_in_both_sets(tiny_teacher, tiny_student, tmp_path):
    """Whatever measures the test set measures what is held out."""
    config = KDConfig(num_iters=4, batch_size=2, top_k=8, output_dir=str(tmp_path))
    distiller = TrueKnowledgeDistiller(str(tiny_teacher), str(tiny_student), config)
    sets = {"valid_data": SETS["valid"], "test_data": SETS["valid"]}
    evaluation = distiller.train_with_kd(SETS["train"], "s", **sets).evaluation
    test = evaluation.pop("test")
    del evaluation["breakdown"]
    assert test == evaluation


def test_a_dry_run_counts_what_the_teacher_will_compute(finished):
    result = run(*finished.options, "--dry-run")
    assert result.exit_code == 0, result.output
    cells = [line.split("│") for line in result.stdout.splitlines() if line.count("│") > 2]
    rows = {row[1].strip(): row[2].strip() for row in cells}
    assert rows["examples"] == "19, of which 7 held out; 6 to test"
    tokens = stored_rows(finished.folder / "soft_targets")
    assert rows["teacher's tokens to compute"] == str(tokens)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_test_set_that_chooses_the_step_is_refused(base, data, tmp_path, more):
    valid = str(data / "valid.jsonl")
    options = [*base, "--output-dir", str(tmp_path), "--valid-data", valid, "--test-data", valid]
    result = run(*options, "--data", "-", *more, text=lines(SETS["train"]))
    assert result.exit_code == 2
    assert (
        "error: the test set is among the validation set, which chooses the step" in result.stderr
    )


@pytest.fixture
def leaking(data: Path, tmp_path: Path) -> list[str]:
    path = tmp_path / "leaking.jsonl"
    path.write_text(lines([*SETS["valid"][:2], SETS["train"][3]]))
    return ["--data", str(data), "--valid-data", str(path), "--output-dir", str(tmp_path / "out")]


def test_records_that_are_learned_and_judge_are_named_before_the_teacher_works(base, leaking):
    result = run(*base, *leaking, "--dry-run")
    assert result.exit_code == 0, result.output
    assert (
        "warning: 3 held-out examples cannot show a gain, it takes 6: give more --valid-data"
        in (result.stderr)
    )
    assert "warning: 1 of 3 validation examples ask what training examples ask too" in result.stderr
    assert "3 (training example 4)" in result.stderr


def test_the_teachers_own_answers_can_be_judged_by_a_set(base, data, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"The {animal}" for animal in ANIMALS))
    sets = ["--prompts", str(prompts), "--valid-data", str(data), "--test-data", str(data)]
    result = run(*base, *sets, "--output-dir", str(tmp_path), "--dry-run", "--max-tokens", "10")
    assert result.exit_code == 0, result.output
    assert "19, of which 7 held out; 6 to test" in result.stdout


@pytest.mark.slow
def test_a_test_set_that_is_not_better_fails_a_required_gain(base, data, tmp_path):
    options = [*base, "--data", str(data / "train.jsonl"), "--output-dir", str(tmp_path)]
    short = tmp_path / "short.jsonl"
    short.write_text(lines(SETS["test"][:2]))
    result = run(*options, "--test-data", str(short), "--require-gain", "--iters", "1")
    assert result.exit_code == 1, result.output
    assert "s, test set: the student is NOT SHOWN TO BE BETTER" in result.stdout
