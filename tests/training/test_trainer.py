"""The loop on a toy whose optimum is known, and on a tiny random Llama with LoRA and dropout.

Knows neither teachers nor text. Gradients are checked where AdamW cannot hide their size: in its
first moment, which after one step is a tenth of the gradient.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conch_dna.checkpoints import DIGESTS, file_digest
from conch_dna.errors import ConchError, Interrupted, NonFiniteLossError
from conch_dna.language_model import named_arrays
from conch_dna.training.batches import Batch, Example, ExampleBatches, collate
from conch_dna.training.head_loss import cross_entropy_sums
from conch_dna.training.trainer import (
    Trainer,
    TrainerSettings,
    TrainingResult,
    learning_rate_schedule,
)

TIMES = ("tokens_per_second", "peak_memory_bytes")


# The toy: a point that is pulled towards a target


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = mx.zeros(2)
        self.frozen = mx.ones(3)
        self.freeze(keys=["frozen"], recurse=False)


def distance_sums(model: nn.Module, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Squared distance to the target, times the tokens that the batch stands for."""
    squared = ((model.place - arrays["target"]) ** 2).sum() * arrays["count"]
    return {"loss": squared, "half": squared / 2}


def pull(*target: float, count: int = 1, name: str = "example 1") -> Batch:
    arrays = {"target": np.array(target, np.float32), "count": np.array(count, np.float32)}
    return Batch(arrays, count, (name,))


class Pulls:
    """A stream that repeats a few batches."""

    def __init__(self, *batches: Batch, digest: str = "pulls") -> None:
        self.batches = batches
        self.digest = digest

    def batch(self, index: int) -> Batch:
        return self.batches[index % len(self.batches)]


def settings_of(**changes: Any) -> TrainerSettings:
    plain = {"num_iters": 6, "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 1e9}
    return TrainerSettings(**{**plain, "steps_per_eval": 1, **changes})


def toy(
    folder: Path,
    *,
    train: Sequence[Batch] = (pull(1.0, 1.0),),
    heldout: Sequence[Batch] = (pull(1.0, 1.0),),
    loss: Any = distance_sums,
    select_by: str = "loss",
    report: Callable[[str, dict[str, Any]], None] = lambda event, row: None,
    **settings: Any,
) -> Trainer:
    return Trainer(
        Point(),
        loss,
        Pulls(*train),
        list(heldout),
        settings_of(**settings),
        folder,
        select_by=select_by,
        report=report,
    )


def saved(folder: Path, step: int, name: str = "adapters") -> dict[str, mx.array]:
    return mx.load(str(folder / f"checkpoint_{step}" / f"{name}.safetensors"))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The tiny Llama: full, or with LoRA and dropout

VOCABULARY = 24


def tiny_llama(*, lora_dropout: float | None = None) -> nn.Module:
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(1)
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=24,
            num_attention_heads=2,
            num_key_value_heads=1,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
        )
    )
    if lora_dropout is not None:
        model.freeze()
        keys = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]
        config = {"rank": 4, "scale": 10.0, "dropout": lora_dropout, "keys": keys}
        linear_to_lora_layers(model, 2, config)
    mx.eval(model.parameters())
    return model


def counting(count: int, *, seed: int = 0) -> list[Example]:
    """Texts in which every token is the one before plus 1; what counts differs in number."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(random.integers(6, 20))
        ids = (np.arange(length) + random.integers(VOCABULARY)) % VOCABULARY
        counted = np.arange(length) >= random.integers(1, 4)
        made.append(Example(ids.astype(np.int32), counted, f"example {number + 1}"))
    return made


def llama_trainer(
    folder: Path,
    *,
    model: nn.Module | None = None,
    report: Callable[[str, dict[str, Any]], None] = lambda event, row: None,
    data_seed: int = 0,
    **settings: Any,
) -> Trainer:
    """LoRA with dropout, two batches a step: all that a resume has to get right."""
    plain = {"num_iters": 7, "learning_rate": 3e-2, "accumulation_steps": 2, "warmup_iters": 2}
    return Trainer(
        model or tiny_llama(lora_dropout=0.3),
        cross_entropy_sums,
        ExampleBatches(counting(11), 2, seed=data_seed),
        [collate(counting(3, seed=9))],
        TrainerSettings(**{**plain, "steps_per_eval": 3, "steps_per_save": 2, **settings}),
        folder,
        report=report,
    )


def comparable(result: TrainingResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in result.history]


def same_parameters(first: nn.Module, second: nn.Module) -> bool:
    one, other = named_arrays(first.parameters()), named_arrays(second.parameters())
    return set(one) == set(other) and all(mx.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, TrainingResult]:
    """The run that stopped and resumed ones must equal to the bit."""
    trainer = llama_trainer(tmp_path_factory.mktemp("whole"))
    return trainer, trainer.run()


# Learning


@pytest.mark.slow
def test_the_loss_goes_down_on_texts_it_never_saw(tmp_path):
    trainer = Trainer(
        tiny_llama(),
        cross_entropy_sums,
        ExampleBatches(counting(40), 8, seed=0),
        [collate(counting(8, seed=9))],
        TrainerSettings(num_iters=60, learning_rate=3e-2, steps_per_eval=20),
        tmp_path,
    )
    result = trainer.run()
    heldout = [row["loss"] for row in result.history if row["split"] == "heldout"]
    assert heldout[0] > math.log(VOCABULARY)
    assert heldout[-1] < 0.2 * math.log(VOCABULARY)
    assert result.final["loss"] == heldout[-1]
    assert result.steps_run == 60
    assert [row["step"] for row in result.history if row["split"] == "heldout"] == [0, 20, 40, 60]


def test_a_step_leaves_the_frozen_base_as_it_was(uninterrupted):
    trainer, _ = uninterrupted
    before = named_arrays(tiny_llama(lora_dropout=0.3).parameters())
    after = named_arrays(trainer.model.parameters())
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    adapter = {name for name in before if name.endswith(("lora_a", "lora_b"))}
    assert changed == adapter and len(adapter) == 12
    assert len(before) > len(adapter)


def reference_gradient(model: nn.Module, examples: list[Example]) -> dict[str, mx.array]:
    """Gradient of the mean over all counted tokens, one example at a time, uncompiled."""
    tokens = sum(example.count for example in examples)

    def total(model: nn.Module) -> mx.array:
        parts = []
        for example in examples:
            arrays = {name: mx.array(v) for name, v in collate([example]).arrays.items()}
            parts.append(cross_entropy_sums(model, arrays)["loss"])
        return sum(parts) / tokens

    _, gradient = nn.value_and_grad(model, total)(model)
    return named_arrays(gradient)


class Fixed:
    """A stream of given batches."""

    digest = "fixed"

    def __init__(self, *groups: list[Example]) -> None:
        self.groups = groups

    def batch(self, index: int) -> Batch:
        return collate(self.groups[index % len(self.groups)])


def one_step(folder: Path, stream: Fixed, accumulation: int, **settings: Any) -> dict[str, Any]:
    trainer = Trainer(
        tiny_llama(),
        cross_entropy_sums,
        stream,
        [collate(counting(2))],
        settings_of(num_iters=1, learning_rate=1e-3, accumulation_steps=accumulation, **settings),
        folder,
    )
    result = trainer.run()
    optimizer = saved(folder, 1, "optimizer")
    moments = {n.removesuffix(".m"): v for n, v in optimizer.items() if n.endswith(".m")}
    (train,) = (row for row in result.history if row["split"] == "train")
    return {"parameters": saved(folder, 1), "gradient": moments, "train": train}


def test_accumulation_weights_tokens_not_batches(tmp_path):
    """Two batches of two examples give the gradient of one batch of four."""
    examples = counting(4)
    assert examples[0].count + examples[1].count != examples[2].count + examples[3].count
    whole = one_step(tmp_path / "whole", Fixed(examples), 1)
    parts = one_step(tmp_path / "parts", Fixed(examples[:2], examples[2:]), 2)
    expected = reference_gradient(tiny_llama(), examples)
    halves = [reference_gradient(tiny_llama(), half) for half in (examples[:2], examples[2:])]
    assert set(parts["gradient"]) == set(expected)
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        for run in (whole, parts):
            np.testing.assert_allclose(
                np.array(run["gradient"][name]) * 10, gradient, rtol=0, atol=1e-5 * scale
            )
        mean_of_means = (halves[0][name] + halves[1][name]) / 2
        assert np.abs(mean_of_means - gradient).max() > 1e-3 * scale
        # Adam divides a gradient near 0 by itself, so its rounding shows in the parameters.
        clear = np.abs(gradient) > 1e-4 * scale
        np.testing.assert_allclose(
            np.array(parts["parameters"][name])[clear],
            np.array(whole["parameters"][name])[clear],
            rtol=0,
            atol=1e-6,
        )
    assert parts["train"]["loss"] == pytest.approx(whole["train"]["loss"], rel=1e-6)
    assert parts["train"]["gradient_norm"] == pytest.approx(
        whole["train"]["gradient_norm"], rel=1e-5
    )


def test_large_gradients_are_scaled_down_and_small_ones_are_not(tmp_path):
    examples = counting(4)
    expected = reference_gradient(tiny_llama(), examples)
    norm = math.sqrt(sum(float((value**2).sum()) for value in expected.values()))
    for limit, factor in ((norm / 4, 0.25), (norm * 2, 1.0)):
        run = one_step(tmp_path / str(factor), Fixed(examples), 1, max_grad_norm=limit)
        assert run["train"]["gradient_norm"] == pytest.approx(norm, rel=1e-4)
        for name, gradient in expected.items():
            scale = np.abs(gradient).max()
            np.testing.assert_allclose(
                np.array(run["gradient"][name]) * 10, factor * gradient, atol=1e-4 * scale
            )


@pytest.mark.slow
def test_losses_are_reported_per_token_over_the_steps_since_the_last_report(tmp_path):
    """Two batches of 1 and 9 tokens whose losses per token are 2 and 18 at the start."""
    rows = []
    trainer = toy(
        tmp_path,
        train=[pull(1.0, 1.0, count=1), pull(3.0, 3.0, count=9)],
        heldout=[pull(1.0, 1.0, count=1), pull(3.0, 3.0, count=9)],
        learning_rate=1e-12,
        num_iters=2,
        steps_per_report=2,
        report=lambda event, row: rows.append((event, row)),
    )
    trainer.run()
    (train,) = (row for event, row in rows if event == "train")
    assert train["loss"] == pytest.approx((1 * 2 + 9 * 18) / 10)
    assert train["half"] == pytest.approx(train["loss"] / 2)
    heldout = [row for event, row in rows if event == "heldout"]
    assert [row["loss"] for row in heldout] == pytest.approx([16.4] * 3)
    steps = [row["loss"] for event, row in rows if event == "step"]
    assert steps == pytest.approx([2.0, 18.0])


# Schedule


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (4, 20), (1, 2), (10, 200)])
def test_the_learning_rate_warms_up_to_its_peak_and_falls_to_0(warmup, total):
    schedule = learning_rate_schedule(settings_of(num_iters=total, warmup_iters=warmup))
    rates = [float(schedule(mx.array(step))) for step in range(total + 1)]
    expected = [
        0.1 * (step + 1) / (warmup + 1)
        if step < warmup
        else 0.1 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        for step in range(total + 1)
    ]
    assert rates == pytest.approx(expected, abs=1e-7)
    assert rates[warmup] == pytest.approx(0.1) == max(expected)
    assert rates[total] == pytest.approx(0, abs=1e-7)


def test_the_rate_of_each_step_is_the_schedules(tmp_path):
    trainer = toy(tmp_path, num_iters=5, warmup_iters=2, steps_per_report=1)
    result = trainer.run()
    schedule = learning_rate_schedule(trainer.settings)
    used = [row["learning_rate"] for row in result.history if row["split"] == "train"]
    assert used == pytest.approx([float(schedule(mx.array(step))) for step in range(5)])


@pytest.mark.parametrize("total", [1, 3])
def test_a_warm_up_longer_than_the_run_does_no_harm(tmp_path, total):
    trainer = toy(tmp_path, num_iters=total, warmup_iters=50, steps_per_report=1)
    used = [r["learning_rate"] for r in trainer.run().history if r["split"] == "train"]
    assert used == pytest.approx([0.1 * (step + 1) / 51 for step in range(total)])


# The best step


def test_the_best_step_is_kept_when_the_heldout_loss_rises_again(tmp_path):
    """The point is pulled to 3 and passes the held-out target at 1 on its way."""
    trainer = toy(
        tmp_path,
        train=[pull(3.0, 3.0)],
        heldout=[pull(1.0, 1.0)],
        num_iters=30,
        steps_per_save=1,
        keep_checkpoints=99,
    )
    result = trainer.run()
    heldout = {row["step"]: row["loss"] for row in result.history if row["split"] == "heldout"}
    assert result.best_step == min(heldout, key=heldout.__getitem__)
    assert 0 < result.best_step < 30
    assert result.best_loss == heldout[result.best_step] < heldout[30]
    assert result.final["loss"] == heldout[30]
    kept = saved(tmp_path, result.best_step)["place"]
    assert mx.array_equal(trainer.model.place, kept)
    assert not mx.array_equal(kept, saved(tmp_path, 30)["place"])
    assert not trainer.model.training


def test_the_state_before_training_can_be_the_best(tmp_path):
    trainer = toy(tmp_path, train=[pull(3.0, 3.0)], heldout=[pull(-1.0, -1.0)])
    result = trainer.run()
    assert result.best_step == 0
    assert result.best_loss == pytest.approx(2.0)
    assert trainer.model.place.tolist() == [0.0, 0.0]


def test_the_last_step_can_be_the_best(tmp_path):
    trainer = toy(tmp_path)
    assert trainer.run().best_step == 6
    assert mx.array_equal(trainer.model.place, saved(tmp_path, 6)["place"])


def test_the_selecting_figure_decides(tmp_path):
    def two_goals(model: nn.Module, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        sums = distance_sums(model, arrays)
        return {**sums, "kd": ((model.place - 1.0) ** 2).sum() * arrays["count"]}

    chosen = {}
    for figure in ("loss", "kd"):
        trainer = toy(
            tmp_path / figure,
            train=[pull(3.0, 3.0)],
            heldout=[pull(3.0, 3.0)],
            loss=two_goals,
            select_by=figure,
            num_iters=30,
        )
        chosen[figure] = trainer.run().best_step
    assert chosen["kd"] < chosen["loss"] == 30


def test_a_run_without_heldout_batches_is_refused(tmp_path):
    with pytest.raises(ConchError, match="no held-out batches"):
        toy(tmp_path, heldout=())


def test_evaluations_come_at_the_start_on_their_steps_and_at_the_end(tmp_path):
    events = []
    toy(
        tmp_path,
        num_iters=7,
        steps_per_eval=3,
        steps_per_report=2,
        steps_per_save=5,
        report=lambda event, row: events.append((event, row.get("step"))),
    ).run()
    assert [step for event, step in events if event == "heldout"] == [0, 3, 6, 7]
    assert [step for event, step in events if event == "train"] == [2, 4, 6, 7]
    assert [step for event, step in events if event == "checkpoint"] == [5, 7]
    assert [step for event, step in events if event == "step"] == list(range(1, 8))


# Checkpoints and resuming


def test_the_last_three_checkpoints_are_kept(tmp_path):
    toy(tmp_path, num_iters=9, steps_per_save=2).run()
    assert checkpoints(tmp_path) == ["checkpoint_6", "checkpoint_8", "checkpoint_9"]
    toy(tmp_path, num_iters=2, steps_per_save=1).run()
    assert checkpoints(tmp_path) == ["checkpoint_1", "checkpoint_2"]
    toy(tmp_path, num_iters=2, steps_per_save=1, keep_checkpoints=1).run()
    assert checkpoints(tmp_path) == ["checkpoint_2"]


def test_a_new_run_removes_what_an_old_one_left(tmp_path):
    toy(tmp_path, num_iters=9, steps_per_save=2).run()
    result = toy(tmp_path, num_iters=1).run()
    assert result.steps_run == 1
    assert checkpoints(tmp_path) == ["checkpoint_1"]


def test_resuming_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    assert toy(tmp_path).run(resume=True).steps_run == 6


def interrupt_at(stop: int, events: list[Any] | None = None) -> Callable[..., None]:
    def report(event: str, row: dict[str, Any]) -> None:
        if events is not None:
            events.append((event, row))
        if event == "step" and row["step"] == stop:
            os.kill(os.getpid(), signal.SIGINT)

    return report


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6])
def test_a_stopped_and_resumed_run_is_the_same_to_the_bit(tmp_path, uninterrupted, stop):
    whole, expected = uninterrupted
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=rf"stopped after step {stop}; .*{tmp_path}.*--resume"):
        llama_trainer(tmp_path, report=interrupt_at(stop)).run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert f"checkpoint_{stop}" in checkpoints(tmp_path)
    mx.random.seed(12345)
    events: list[Any] = []
    trainer = llama_trainer(tmp_path, report=lambda event, row: events.append((event, row)))
    result = trainer.run(resume=True)
    path = tmp_path / f"checkpoint_{stop}"
    assert events[0] == ("resumed", {"step": stop, "path": str(path)})
    assert result.steps_run == 7 - stop
    assert same_parameters(trainer.model, whole.model)
    assert comparable(result) == comparable(expected)
    assert (result.best_step, result.best_loss) == (expected.best_step, expected.best_loss)
    for name in ("adapters", "optimizer", "random", "best"):
        file = f"checkpoint_7/{name}.safetensors"
        assert (tmp_path / file).read_bytes() == (whole.folder / file).read_bytes(), name


def test_dropout_and_data_order_are_there_to_be_resumed(tmp_path, uninterrupted):
    """Without them the test above would hold for a loop that resumes neither."""
    whole, _ = uninterrupted
    for changes in ({"seed": 1}, {"data_seed": 1}):
        other = llama_trainer(tmp_path / str(changes), **changes)
        other.run()
        assert not same_parameters(other.model, whole.model)


def test_resuming_a_finished_run_trains_nothing_and_keeps_the_best(tmp_path):
    arguments = {"train": [pull(3.0, 3.0)], "num_iters": 30}
    first = toy(tmp_path, **arguments)
    expected = first.run()
    again = toy(tmp_path, **arguments)
    result = again.run(resume=True)
    assert result.steps_run == 0
    assert 0 < result.best_step == expected.best_step < 30
    assert mx.array_equal(again.model.place, first.model.place)
    assert result.final == expected.final


def test_a_ctrl_c_in_the_last_step_changes_nothing(tmp_path):
    result = toy(tmp_path, report=interrupt_at(6)).run()
    assert result.steps_run == 6


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    handler = signal.getsignal(signal.SIGINT)

    def twice(event: str, row: dict[str, Any]) -> None:
        if event == "step" and row["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, report=twice, steps_per_save=3).run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoints(tmp_path) == ["checkpoint_3"]
    assert toy(tmp_path, steps_per_save=3).run(resume=True).steps_run == 3


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints 2, 4 and 5 of the Llama's run."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted):
        llama_trainer(folder, report=interrupt_at(5)).run()
    assert checkpoints(folder) == ["checkpoint_2", "checkpoint_4", "checkpoint_5"]
    return folder


@pytest.mark.parametrize("damaged", [[5], [5, 4], [5, 4, 2]])
@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json"])
def test_damaged_checkpoints_are_passed_over_with_a_warning(
    tmp_path, stopped, uninterrupted, damaged, file
):
    folder = shutil.copytree(stopped, tmp_path / "run")
    for step in damaged:
        data = (folder / f"checkpoint_{step}" / file).read_bytes()
        (folder / f"checkpoint_{step}" / file).write_bytes(data[:-3])
    events: list[Any] = []
    trainer = llama_trainer(folder, report=lambda event, row: events.append((event, row)))
    result = trainer.run(resume=True)
    warnings = [row["message"] for event, row in events if event == "warning"]
    assert len(warnings) == len(damaged)
    for message, step in zip(warnings, damaged, strict=True):
        assert f"checkpoint_{step} is not whole: {file}" in message
        assert "trying an older checkpoint" in message
    left = [step for step in (2, 4, 5) if step not in damaged]
    assert result.steps_run == 7 - max(left, default=0)
    assert same_parameters(trainer.model, uninterrupted[0].model)
    assert comparable(result) == comparable(uninterrupted[1])


def test_a_resumed_run_removes_the_checkpoint_that_the_killed_one_had_yet_to(tmp_path, stopped):
    folder = shutil.copytree(stopped, tmp_path / "run")
    shutil.copytree(folder / "checkpoint_2", folder / "checkpoint_1")
    there: list[list[str]] = []

    def look(event: str, row: dict[str, Any]) -> None:
        if event == "step":
            there.append(checkpoints(folder))

    llama_trainer(folder, report=look).run(resume=True)
    assert there[0] == ["checkpoint_2", "checkpoint_4", "checkpoint_5"]


def test_a_checkpoint_half_written_by_a_killed_process_is_removed(tmp_path, stopped):
    folder = shutil.copytree(stopped, tmp_path / "run")
    shutil.copytree(folder / "checkpoint_5", folder / ".writing-1-checkpoint_6")
    (folder / ".writing-1-checkpoint_6" / "state.json").unlink()
    assert llama_trainer(folder).run(resume=True).steps_run == 2
    assert checkpoints(folder) == ["checkpoint_5", "checkpoint_6", "checkpoint_7"]


def test_other_settings_or_data_are_refused_with_every_difference(tmp_path, stopped):
    folder = shutil.copytree(stopped, tmp_path / "run")
    trainer = llama_trainer(folder, learning_rate=0.5, seed=3, data_seed=4)
    with pytest.raises(ConchError) as caught:
        trainer.run(resume=True)
    message = str(caught.value)
    for part in ("learning_rate: was 0.03, now 0.5", "seed: was 0, now 3", "data: was '"):
        assert part in message
    assert "num_iters" not in message
    assert "choose another --output-dir" in message
    assert checkpoints(folder) == checkpoints(stopped)


def test_another_model_is_refused(tmp_path, stopped):
    folder = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(ConchError, match=r"made with other settings .*parameters: was"):
        llama_trainer(folder, model=tiny_llama()).run(resume=True)


# Another number of steps


CONSTANT: dict[str, Any] = {"schedule": "constant", "steps_per_report": 4}


def outcome(trainer: Trainer, *, resume: bool = False) -> tuple[TrainingResult, list[Any]]:
    result = trainer.run(resume=resume)
    return result, [comparable(result), result.best_step, named_arrays(trainer.model.parameters())]


def equal(one: list[Any], other: list[Any]) -> bool:
    return one[:2] == other[:2] and all(mx.array_equal(one[2][n], other[2][n]) for n in one[2])


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What 13 steps at a constant rate come to in one go."""
    return outcome(llama_trainer(tmp_path_factory.mktemp("long"), num_iters=13, **CONSTANT))[1]


def test_a_constant_rate_stays_after_the_warm_up(tmp_path):
    trainer = toy(tmp_path, warmup_iters=2, steps_per_report=1, schedule="constant")
    used = [row["learning_rate"] for row in trainer.run().history if row["split"] == "train"]
    assert used == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("planned", [7, 5, 6])
def test_a_finished_run_that_is_extended_is_a_longer_run_to_the_bit(tmp_path, thirteen, planned):
    """Silent failure: its last evaluation, off the beat, chooses the step; moments are lost."""
    outcome(llama_trainer(tmp_path, num_iters=planned, **CONSTANT))
    events: list[Any] = []
    longer = llama_trainer(
        tmp_path, num_iters=13, report=lambda *event: events.append(event), **CONSTANT
    )
    result, found = outcome(longer, resume=True)
    assert equal(found, thirteen)
    assert result.steps_run == 13 - planned
    (extension,) = result.extensions
    told = f"planned with {planned} steps and now has 13: its rate is constant, so that it is what"
    assert told in extension.pop("told")
    assert extension == {"step": planned, "planned": planned, "num_iters": 13}
    names = [event for event, _ in events]
    assert names.index("resumed") < names.index("message")


def test_a_stopped_run_can_be_made_longer_and_shorter(tmp_path, thirteen):
    with pytest.raises(Interrupted):
        llama_trainer(tmp_path, num_iters=9, report=interrupt_at(5), **CONSTANT).run()
    longer = llama_trainer(tmp_path, num_iters=20, report=interrupt_at(11), **CONSTANT)
    with pytest.raises(Interrupted):
        longer.run(resume=True)
    result, found = outcome(llama_trainer(tmp_path, num_iters=13, **CONSTANT), resume=True)
    assert equal(found, thirteen)
    steps = [(one["step"], one["planned"], one["num_iters"]) for one in result.extensions]
    assert steps == [(5, 9, 20), (11, 20, 13)]


def test_a_cosine_is_laid_anew_and_says_so(tmp_path):
    plain = {"warmup_iters": 2, "steps_per_report": 1}
    toy(tmp_path, num_iters=6, **plain).run()
    result = toy(tmp_path, num_iters=12, **plain).run(resume=True)
    used = [row["learning_rate"] for row in result.history if row["split"] == "train"]
    schedules = [learning_rate_schedule(settings_of(num_iters=steps, **plain)) for steps in (6, 12)]
    expected = [float(schedules[step >= 6](mx.array(step))) for step in range(12)]
    assert used == pytest.approx(expected)
    assert (
        "the cosine is laid anew over 12 steps, with a rate of 0.065 at step 7"
        in (result.extensions[0]["told"])
    )


@pytest.mark.parametrize("steps", [3, 5])
def test_no_fewer_steps_than_are_taken(tmp_path, stopped, steps):
    folder = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(ConchError, match=f"5 steps are taken already, and --iters is {steps}"):
        llama_trainer(folder, num_iters=steps).run(resume=True)


def test_how_often_it_reports_and_saves_may_change(tmp_path, stopped, uninterrupted):
    folder = shutil.copytree(stopped, tmp_path / "run")
    trainer = llama_trainer(folder, steps_per_save=1, steps_per_report=1)
    assert not trainer.run(resume=True).extensions
    assert same_parameters(trainer.model, uninterrupted[0].model)


# Losses that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    good = pull(1.0, 1.0, name="example 1")
    trainer = toy(
        tmp_path,
        train=[good, good, pull(bad, 1.0, name="example 7")],
        steps_per_save=1,
    )
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.run()
    message = str(caught.value)
    assert f"the loss is {bad} " in message
    assert "at step 3 on example 7;" in message
    assert f"checkpoint is {tmp_path / 'checkpoint_2'}" in message
    assert "Lower the learning rate" in message
    assert checkpoints(tmp_path) == ["checkpoint_1", "checkpoint_2"]


def test_all_examples_of_the_step_are_named_and_a_missing_checkpoint_said(tmp_path):
    trainer = toy(
        tmp_path,
        train=[pull(1.0, 1.0, name="example 4"), pull(math.nan, 1.0, name="example 2")],
        accumulation_steps=2,
    )
    with pytest.raises(NonFiniteLossError, match=r"step 1 on example 4, example 2; .* none yet"):
        trainer.run()


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    def kinked(model: nn.Module, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        return {"loss": mx.sqrt((model.place**2).sum()) + 0 * arrays["target"].sum()}

    with pytest.raises(NonFiniteLossError, match=r"the loss is 0\.0 and the gradient norm nan"):
        toy(tmp_path, loss=kinked).run()


def test_a_heldout_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"held-out figures at step 0 .*nan"):
        toy(tmp_path, heldout=[pull(math.nan, 0.0)]).run()


def test_before_the_first_step_no_learning_rate_is_to_blame(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"No step was taken yet, so .* another kind"):
        toy(tmp_path, heldout=[pull(math.nan, 0.0)]).run()
    trainer = toy(tmp_path, heldout=[pull(1.0, 1.0)])
    trainer.model.place = mx.full(trainer.model.place.shape, mx.nan)
    with pytest.raises(NonFiniteLossError, match=r"yet: weight place of the model is NaN; use one"):
        trainer.run()


def test_a_kind_of_model_without_a_gradient_is_told_in_one_line(tmp_path):
    def loss(model, arrays):
        raise ValueError("[Primitive::vjp] Not implemented\nfor Scan.")

    batch = pull(1.0, 1.0)
    trainer = Trainer(
        Point(), loss, Pulls(batch), [batch], settings_of(), tmp_path, heldout_loss=distance_sums
    )
    with pytest.raises(ConchError, match=r"of the kind \w+ cannot take a training step here: \[P"):
        trainer.run()


# Processes that are stopped for real

SCRIPT = """
    import sys
    from pathlib import Path
    sys.path[:0] = sys.argv[2:4]
    import conch_dna
    from conch_dna.errors import Interrupted
    from test_trainer import llama_trainer

    def report(event, row):
        print(event, row.get("step"), flush=True)
        if event == "step":
            sys.stdin.readline()

    try:
        llama_trainer(Path(sys.argv[1]), report=report).run(resume=True)
    except Interrupted:
        sys.exit(130)
"""


def start(folder: Path) -> subprocess.Popen:
    here = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), folder, here, here.parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def feed(process: subprocess.Popen, stop: str, number: signal.Signals) -> None:
    """Let a waiting process take steps until it has printed `stop`; then send the signal."""
    for line in process.stdout:
        if line.strip() == stop:
            process.send_signal(number)
        if line.startswith("step"):
            try:
                process.stdin.write("\n")
                process.stdin.flush()
            except BrokenPipeError:
                return


@pytest.mark.slow
def test_a_process_that_is_killed_and_then_interrupted_ends_at_the_same_bits(
    tmp_path, uninterrupted
):
    """Checkpoints come every two steps; kill -9 within the fourth step loses the third."""
    with start(tmp_path) as process:
        feed(process, "step 3", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert "checkpoint_2" in checkpoints(tmp_path) and "checkpoint_3" not in checkpoints(tmp_path)
    with start(tmp_path) as process:
        assert process.stdout.readline() == "resumed 2\n"
        feed(process, "step 5", signal.SIGINT)
    assert process.returncode == 130
    stopped = sorted(checkpoints(tmp_path))[-1]
    assert stopped in ("checkpoint_5", "checkpoint_6")
    trainer = llama_trainer(tmp_path)
    assert trainer.run(resume=True).steps_run == 7 - int(stopped.removeprefix("checkpoint_"))
    assert same_parameters(trainer.model, uninterrupted[0].model)
    file = "checkpoint_7/adapters.safetensors"
    assert (tmp_path / file).read_bytes() == (uninterrupted[0].folder / file).read_bytes()


def test_state_is_json_that_people_can_read(stopped):
    state = json.loads((stopped / "checkpoint_4" / "state.json").read_text())
    assert state["step"] == 4 and state["next_batch"] == 8
    assert state["identity"]["learning_rate"] == 3e-2
    assert [row["step"] for row in state["history"] if row["split"] == "heldout"] == [0, 3]


def test_the_whole_model_is_evaluated_without_dropout(uninterrupted):
    """Held-out figures do not move with the random state."""
    trainer, result = uninterrupted
    first = next(row["loss"] for row in result.history if row["split"] == "heldout")
    model = tiny_llama(lora_dropout=0.3)
    model.eval()
    arrays = {n: mx.array(v) for n, v in trainer.heldout_batches[0].arrays.items()}
    expected = cross_entropy_sums(model, arrays)["loss"].item() / trainer.heldout_batches[0].count
    assert first == pytest.approx(expected, rel=1e-6)
    assert (
        dict(tree_flatten(model.trainable_parameters())).keys()
        == named_arrays(trainer.model.trainable_parameters()).keys()
    )


@pytest.mark.parametrize("state", ["[]", "7", "{}", '{"step": "two"}', "[" * 200_000])
def test_a_checkpoint_whose_state_has_another_form_is_passed_over(tmp_path, state):
    messages: list[str] = []

    def report(event: str, row: dict[str, Any]) -> None:
        messages.extend([row["message"]] if event == "warning" else [])

    def trainer() -> Trainer:
        settings = settings_of(num_iters=4, steps_per_save=2)
        batches = Pulls(pull(1, 2))
        heldout = [pull(1, 2)]
        return Trainer(Point(), distance_sums, batches, heldout, settings, tmp_path, report=report)

    trainer().run()
    folder = tmp_path / "checkpoint_4"
    (folder / "state.json").write_text(state)
    digests = json.loads((folder / DIGESTS).read_text())
    digests["state.json"] = file_digest(folder / "state.json")
    (folder / DIGESTS).write_text(json.dumps(digests))
    assert trainer().run(resume=True).steps_run == 2
    assert len(messages) == 1 and "trying an older checkpoint" in messages[0]
