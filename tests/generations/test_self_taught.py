"""A child that teaches itself: who scores its answers, what a stop changes, what is refused.

The line is of a tiny random model; that it learns something of use is not asked here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.cli import main
from conch_dna.errors import ConchError, Interrupted
from conch_dna.generations.evolve import train_generation_with_teachers as evolve
from conch_dna.generations.line import Line
from conch_dna.generations.settings import EvolveConfig
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.data.records import json_lines
from conch_dna.training.data.sources import with_demonstrations
from conch_dna.training.data.views import with_own_answer
from conch_dna.training.runs.on_policy.own_teacher import OwnTeacher
from lines import copied, quick_config, sums
from watching import Said

TRAINING = {"num_iters": 6, "rollout_tokens": 6, "rollouts": 4, "force": True}
OPEN = {"generalize_gain": -1.0, "recall_margin": 1.0, "max_tone_drift": 9.0}
IDS = mx.array([[5, 9, 3, 7]])


def config_of(**changes: Any) -> EvolveConfig:
    training = {**TRAINING, **changes.pop("training", {})}
    changes = {"replay_share": 0.25, **changes}
    return quick_config(method="sdft", training=training, gates=OPEN, **changes)


def shown(seed: int, count: int = 16) -> list[Any]:
    return list(map(with_own_answer, sums(seed, count)))


@pytest.fixture
def line(tiny_line: Line, tmp_path: Path) -> Line:
    return copied(tiny_line, tmp_path)


def tensors(line: Line, name: str) -> dict[str, mx.array]:
    found = mx.load(str(line.path(name) / "adapters.safetensors"))
    assert isinstance(found, dict)
    return found


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[n], other[n]) for n in one)


def test_the_parent_teaches_on_the_childs_own_answers(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ModelSource(line.base("G002")["model"])
    parent = ModelSource(base.model_id, adapter=line.adapter("G002")).load()
    said: list[np.ndarray] = []
    real = OwnTeacher.speaking

    @contextmanager
    def speaking(self: OwnTeacher) -> Iterator[LanguageModel]:
        with real(self) as model:
            said.append(np.array(model.logits(IDS)))
            yield model

    monkeypatch.setattr(OwnTeacher, "speaking", speaking)
    outcome = evolve(line, shown(4), config_of())
    assert outcome.promoted and line.head == "G003"
    assert len(said) == len(outcome.metrics["rounds"]) > 1
    for logits in said:
        assert np.allclose(logits, parent.logits(IDS), atol=1e-5)
    manifest = line.manifest("G003")
    assert manifest["teachers"] == [{"role": "parent", "path": "G002"}]
    assert manifest["training_params"]["method"] == "sdft"
    assert (line.path("G003") / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert not same(tensors(line, "G003"), tensors(line, "G002"))
    assert line.problems() == []


def test_the_manifest_asks_for_the_same_again(line: Line) -> None:
    evolve(line, shown(4), config_of())
    again = EvolveConfig.from_manifest(line.manifest("G003"), source="G003")
    assert again == config_of()


def test_the_adapter_says_what_it_was_taught_without(line: Line) -> None:
    systems = {"teacher_system": "Be brief.", "student_system": "none"}
    evolve(line, sums(4, 16), config_of(training=systems))
    document = json.loads((line.path("G003") / "adapter_config.json").read_text())
    assert document["conch_dna"]["config"] == systems


def test_a_stop_changes_no_bit(tiny_line: Line, tmp_path: Path) -> None:
    lines = [copied(tiny_line, tmp_path / name) for name in "ab"]
    # The average is of all steps, so that the last one counts.
    training = {"steps_per_save": 1, "teacher_ema": 0.5, "on_policy": 1.0}
    config = config_of(training=training, replay_share=0.0)
    evolve(lines[0], shown(4), config)

    def stop(event: str, row: dict[str, Any]) -> None:
        if event == "within" and row["text"].startswith("round 1"):
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        evolve(lines[1], shown(4), config, report=stop)
    evolve(lines[1], shown(4), config, resume=True)
    assert same(*(tensors(each, "G003") for each in lines))


def test_a_child_that_does_not_pass_is_archived(line: Line) -> None:
    config = config_of()
    gates = quick_config(gates={**OPEN, "generalize_gain": 0.9}).gates
    strict = EvolveConfig(**{**vars(config), "gates": gates})
    outcome = evolve(line, shown(4), strict)
    assert not outcome.promoted and outcome.name.startswith("FAILED-G003-")
    assert line.head == "G002"


def test_demonstrations_that_do_not_help_are_refused_before_it_trains(line: Line) -> None:
    # A random model makes no use of what it reads.
    config = config_of(training={"force": False, "val_fraction": 0.25})
    with pytest.raises(ConchError, match=r"not shown to help: cross-entropy .* --force"):
        evolve(line, shown(4, 24), config)
    assert line.head == "G002"


def test_without_replay_all_is_its_own(line: Line) -> None:
    said = Said()
    evolve(line, shown(4), config_of(replay_share=0.0), report=said)
    assert any(text.startswith("6 of 6 batches are the student's own") for text in said)


def test_new_texts_stand_in_for_too_few_replayed_ones(line: Line) -> None:
    said = Said()
    evolve(line, shown(4), config_of(replay_size=2), report=said)
    assert any(text.startswith("2 replayed examples cannot fill a batch") for text in said)


def test_a_parent_that_reads_no_more_is_refused(line: Line) -> None:
    config = config_of(training={"force": False})
    with pytest.raises(ConchError, match="reads nothing that the student does not: give --demon"):
        evolve(line, sums(4, 16), config)


def test_what_was_only_shown_to_a_parent_is_not_replayed(line: Line) -> None:
    evolve(line, shown(4), config_of())
    assert "context" in (line.path("G003") / "data.jsonl").read_text()
    # Records of which the teacher reads more would be refused with this.
    config = quick_config(training={"train_on_prompt": True}, replay_share=0.5)
    assert evolve(line, sums(5, 16), config).promoted


def test_a_file_of_demonstrations_is_part_of_the_request(line: Line, tmp_path: Path) -> None:
    path = tmp_path / "shown.jsonl"
    path.write_text(json_lines(sums(9, 2)))
    evolve(line, sums(4, 16), config_of(demonstrations=str(path)))
    manifest = line.manifest("G003")
    assert manifest["training_params"]["demonstrations"] == str(path)
    assert "context" in (line.path("G003") / "data.jsonl").read_text()
    command = ["generations", "show", line.name, "--root", str(line.folder.parent), "G003"]
    result = CliRunner().invoke(main, command, env={"COLUMNS": "300"})
    assert "its own answers of at most 6 tokens" in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"on_policy": 0.5}}, "on_policy is of --method sdft, not of two_teachers"),
        ({"training": {"student_system": "none"}}, "student_system is of --method sdft"),
        ({"training": {"select_by": "kl"}}, "select_by is of --method sdft"),
        ({"demonstrations": "answer"}, "demonstrations is of --method sdft"),
        ({"method": "sdft", "critic": False}, "critic is of --method two_teachers, not of sdft"),
        (
            {"method": "sdft", "gamma": 0.1, "taboo_words": ("a",)},
            "gamma is of --method two_teachers, not of sdft; taboo_words is of",
        ),
        (
            {"method": "sdft", "training": {"teacher_ema": 0.9, "on_policy": 1.0}},
            "teacher_ema is 0.9 and replay_share 0.3: .* use replay_share 0",
        ),
    ],
)
def test_settings_of_the_other_method_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConchError, match=message):
        quick_config(**changes)


def made(**parts: Any) -> EvolveConfig:
    params = {"training_params": {"method": "sdft", **parts.pop("params", {})}, **parts}
    return EvolveConfig.from_manifest(params, source="a test")


def test_all_but_what_is_replayed_are_its_own_answers() -> None:
    assert made().distillation.on_policy == pytest.approx(0.9)
    assert made(stabilizers={"replay_share": 0.25}).distillation.on_policy == 0.75
    follows = made(params={"teacher_ema": 0.9})
    assert (follows.replay_share, follows.distillation.on_policy) == (0.0, 1.0)
    assert made().training.temperature == 1.0


@pytest.mark.parametrize("name", ["teacher_ema", "rollouts"])
def test_a_manifest_of_two_teachers_is_told_whose_a_setting_is(name: str) -> None:
    with pytest.raises(ConchError, match=f"{name} is of --method sdft, not of two_teachers$"):
        EvolveConfig.from_manifest({"training_params": {name: 0.5}}, source="a test")


def run(line: Line, data: Path, *more: str) -> Any:
    parts = ["generations", "evolve", line.name, "--root", str(line.folder.parent)]
    return CliRunner().invoke(main, [*parts, "--data", str(data), *more])


def test_the_command(line: Line, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json_lines(sums(4, 16)))
    steps = ["--iters", "4", "--batch-size", "4", "--rollout-tokens", "6", "--max-tokens", "6"]
    refused = run(line, data, "--demonstrations", "answer")
    assert "demonstrations is of --method sdft" in refused.output
    options = [
        "--lora-rank",
        "8",
        "--lora-keys",
        "all",
        "--method",
        "sdft",
        "--demonstrations",
        "answer",
        "--force",
        *steps,
    ]
    result = run(line, data, *options)
    assert "of its own" in result.output, result.output
    assert f"HEAD of {line.name} is" in result.output


def test_demonstrations_that_would_not_be_shown_are_named(tmp_path: Path) -> None:
    path = tmp_path / "shown.jsonl"
    system = {"role": "system", "content": "Be brief."}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for record, what in (
        ({"messages": [system, *turns]}, "a system prompt"),
        ({"prompt": "a", "completion": "b", "context": "c"}, "context"),
    ):
        path.write_text(json_lines([record]))
        with pytest.raises(ConchError, match=rf"shown\.jsonl: demonstration 1 has {what}, which"):
            with_demonstrations({"data": sums(1, 2)}, str(path))
