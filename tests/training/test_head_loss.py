"""The chunked head loss against the float64 oracle and against dense differentiation by MLX.

Knows tiny random models. A divergence added to LOSSES is tested here as soon as the oracle
knows it; a new kind of head is one more entry of HEADS.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.models import llama

import oracle
from conch_dna import language_model
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.loading.output_head import rows_at_once
from conch_dna.losses import LOSSES
from conch_dna.training import head_loss
from conch_dna.training.adapters import adapter_tensors, attach_lora
from conch_dna.training.batches import collate
from conch_dna.training.data.outcomes import compress
from conch_dna.training.head_loss import (
    chunked_loss,
    cross_entropy_sums,
    distillation_sums,
    forward_kl_and_gradient,
    make_distillation_loss,
)
from conch_dna.training.settings import KDConfig
from models import make_model_folder, memory_of, random_examples

HEADS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "padded": {"vocab_size": 1600},
    "quantized": {"quantize": True, "hidden_size": 64},
}
Arrays = dict[str, mx.array]


def teacher_outcomes(
    random: np.random.Generator, count: int, vocabulary: int, k: int, t: float, spread: float = 2.0
) -> Arrays:
    logits = random.normal(0, spread, (count, vocabulary))
    kept = oracle.likeliest(logits, k)
    with np.errstate(divide="ignore"):
        log_probs = np.log(oracle.outcomes(logits, kept, t)).astype(np.float32)
    return {"kept_ids": mx.array(kept.astype(np.int32)), "teacher_log_probs": mx.array(log_probs)}


def random_targets(count: int, vocabulary: int, *, k: int, t: float, spread: float = 2.0) -> Arrays:
    """Targets of which every fourth row is padding, and labels inside and outside the K."""
    random = np.random.default_rng(0)
    targets = teacher_outcomes(random, count, vocabulary, k, t, spread)
    labels = random.integers(0, vocabulary, count)
    labels[::2] = np.asarray(targets["kept_ids"])[::2, 0]
    weights = (np.arange(count) % 4 != 3).astype(np.float32)
    return {**targets, "labels": mx.array(labels), "weights": mx.array(weights)}


def expected_rows(
    logits: np.ndarray, targets: Arrays, *, t: float, alpha: float, divergence: str = "forward_kl"
) -> dict[str, np.ndarray]:
    """The oracle's weighted figures per token; the same teacher as the code's, to the bit."""
    numbers = {name: np.asarray(value) for name, value in targets.items()}
    teacher = np.exp(numbers["teacher_log_probs"].astype(np.float64))
    kd = oracle.kd_rows(logits, numbers["kept_ids"], teacher, t, divergence) * numbers["weights"]
    ce = oracle.cross_entropy(logits, numbers["labels"]) * numbers["weights"]
    return {"loss": alpha * kd + (1 - alpha) * ce, "kd": kd, "ce": ce}


def assert_sums(found: Arrays, rows: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert set(found) == set(rows)
    for name, value in found.items():
        error = oracle.worst_relative_error(value.item(), rows[name].sum())
        assert error < tolerance, f"{name}: {error}"


def random_logits(
    count: int, vocabulary: int, *, spread: float = 2.0, extreme: bool = False
) -> np.ndarray:
    random = np.random.default_rng(7)
    logits = random.normal(0, spread, (count, vocabulary))
    if extreme:
        logits += random.choice([-100.0, 0.0, 100.0], (count, vocabulary))
    return logits.astype(np.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("t", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("k", [1, 6, 23, 24])
def test_closed_form_against_the_oracle(k: int, t: float, alpha: float) -> None:
    targets = random_targets(8, 24, k=k, t=t, spread=2 * t)
    for extreme in (False, True):
        logits = random_logits(8, 24, spread=2 * t, extreme=extreme)
        found, gradient = forward_kl_and_gradient(
            mx.array(logits), targets, temperature=t, alpha=alpha
        )
        assert_sums(found, expected_rows(logits, targets, t=t, alpha=alpha))
        expected = oracle.slope(
            lambda x: expected_rows(x, targets, t=t, alpha=alpha)["loss"], logits
        )
        assert oracle.error_of_gradient(np.asarray(gradient), expected) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("k", [6, 24])
def test_closed_form_against_autodiff(k: int, dtype: mx.Dtype) -> None:
    targets = random_targets(8, 24, k=k, t=2.0)
    logits = mx.array(random_logits(8, 24)).astype(dtype)
    options = {"temperature": 2.0, "alpha": 0.7}
    found, gradient = forward_kl_and_gradient(logits, targets, **options)
    dense = distillation_sums(logits, targets, divergence="forward_kl", **options)
    expected = mx.grad(
        lambda x: distillation_sums(x, targets, divergence="forward_kl", **options)["loss"]
    )(logits.astype(mx.float32))
    for name in dense:
        assert found[name].item() == pytest.approx(dense[name].item(), rel=1e-6)
    assert gradient.dtype == mx.float32
    np.testing.assert_allclose(np.asarray(gradient), np.asarray(expected), rtol=1e-4, atol=1e-6)


def test_closed_form_of_a_student_that_excludes_all_but_the_kept() -> None:
    targets = random_targets(2, 6, k=3, t=1.0)
    targets["labels"] = targets["kept_ids"][:, 0]
    targets["teacher_log_probs"] = mx.log(mx.array([[0.5, 0.3, 0.2, 0.0]] * 2))
    logits = np.full((2, 6), -np.inf, np.float32)
    np.put_along_axis(logits, np.asarray(targets["kept_ids"]), 1.0, axis=-1)
    found, gradient = forward_kl_and_gradient(mx.array(logits), targets, temperature=1.0, alpha=0.7)
    assert_sums(found, expected_rows(logits, targets, t=1.0, alpha=0.7))
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("divergence", sorted(LOSSES))
@pytest.mark.parametrize("k", [6, 24])
def test_distillation_sums_against_the_oracle(divergence: str, k: int) -> None:
    targets = random_targets(8, 24, k=k, t=2.0)
    logits = random_logits(8, 24)
    options = {"temperature": 2.0, "alpha": 0.7, "divergence": divergence}
    value, gradient = mx.value_and_grad(lambda x: distillation_sums(x, targets, **options)["loss"])(
        mx.array(logits)
    )
    rows = partial(expected_rows, targets=targets, t=2.0, alpha=0.7, divergence=divergence)
    assert_sums(distillation_sums(mx.array(logits), targets, **options), rows(logits))
    assert value.item() == pytest.approx(rows(logits)["loss"].sum(), rel=1e-5)
    expected = oracle.slope(lambda x: rows(x)["loss"], logits)
    assert oracle.error_of_gradient(np.asarray(gradient), expected) < 1e-5


def test_total_is_alpha_kd_plus_the_rest_cross_entropy() -> None:
    targets = random_targets(8, 24, k=6, t=2.0)
    logits = mx.array(random_logits(8, 24))
    sums = distillation_sums(logits, targets, temperature=2.0, alpha=0.3, divergence="jsd")
    mixed = 0.3 * sums["kd"].item() + 0.7 * sums["ce"].item()
    assert sums["loss"].item() == pytest.approx(mixed, rel=1e-6)


@pytest.mark.parametrize("chunk", [0, 1, 5, 7, 20, 1000])
def test_chunks_give_what_all_at_once_gives(chunk: int) -> None:
    random = np.random.default_rng(3)
    weight = mx.array(random.normal(0, 1, (90, 16)).astype(np.float32))
    hidden = mx.array(random.normal(0, 1, (20, 16)).astype(np.float32))
    targets = random_targets(20, 90, k=8, t=2.0)
    rule = partial(forward_kl_and_gradient, temperature=2.0, alpha=0.7)

    def total(states: mx.array) -> mx.array:
        sums = chunked_loss(lambda x: x @ weight.T, states, targets, rule, chunk).sums
        return sums["loss"] * 3.0  # an optimiser's scale has to reach the gradient

    value, gradient = mx.value_and_grad(total)(hidden)
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    rows = partial(expected_rows, targets=targets, t=2.0, alpha=0.7)
    assert value.item() == pytest.approx(3 * rows(logits)["loss"].sum(), rel=1e-5)
    by_logits = oracle.slope(lambda x: rows(x)["loss"], logits)
    expected = 3 * by_logits @ np.asarray(weight, np.float64)
    assert oracle.error_of_gradient(np.asarray(gradient), expected) < 1e-5


def load(folder: Path) -> LanguageModel:
    return ModelSource(str(folder)).load()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("heads")
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return {
        name: make_model_folder(parent / name, seed=5, **{**small, **changes})
        for name, changes in HEADS.items()
    }


def with_adapter(student: LanguageModel) -> LanguageModel:
    """Attach LoRA whose second matrix is not 0, so that every part of it has a gradient."""
    attach_lora(student, KDConfig(lora_rank=2))
    random = np.random.default_rng(11)
    moved = [
        (name, mx.array(random.normal(0, 0.05, value.shape).astype(np.float32)))
        for name, value in adapter_tensors(student.model).items()
    ]
    student.model.update(tree_unflatten(moved))
    return student


def batch_arrays(student: LanguageModel, *, k: int = 16, t: float = 2.0) -> Arrays:
    """A padded batch of random texts with a random teacher's outcomes."""
    examples = random_examples(4, student.vocabulary_size, seed=1)
    arrays = {name: mx.array(value) for name, value in collate(examples).arrays.items()}
    random = np.random.default_rng(2)
    rows = len(arrays["labels"])
    return {**arrays, **teacher_outcomes(random, rows, student.vocabulary_size, k, t)}


def dense_loss(student: LanguageModel, **options: Any) -> Callable[[nn.Module, Arrays], Arrays]:
    """What the module as a whole computes, differentiated by MLX, written independently."""

    def loss(model: nn.Module, arrays: Arrays) -> Arrays:
        logits = model(arrays["inputs"])[..., : student.vocabulary_size]
        logits = logits.reshape(-1, student.vocabulary_size)[arrays["positions"]]
        return distillation_sums(logits, arrays, **options)

    return loss


def value_and_gradients(
    student: LanguageModel, loss: Callable[[nn.Module, Arrays], Arrays], arrays: Arrays
) -> tuple[Arrays, Arrays]:
    # As in a step of the trainer: evaluation asks for no gradient, and none is prepared for it.
    student.model.train()
    sums = loss(student.model, arrays)
    _, gradients = nn.value_and_grad(student.model, lambda: loss(student.model, arrays)["loss"])()
    return sums, named_arrays(gradients)


def logits_of_counted(student: LanguageModel, arrays: Arrays) -> np.ndarray:
    logits = np.asarray(student.model(arrays["inputs"]).astype(mx.float32))
    rows = logits.reshape(-1, logits.shape[-1])[np.asarray(arrays["positions"])]
    return rows[:, : student.vocabulary_size]


def assert_same_gradients(found: Arrays, expected: Arrays, tolerance: float = 1e-4) -> None:
    assert set(found) == set(expected) and found
    for name in expected:
        assert mx.abs(expected[name]).max().item() > 0, f"{name} has no gradient to compare"
        error = oracle.error_of_gradient(np.asarray(found[name]), np.asarray(expected[name]))
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_loss_and_adapter_gradient_of_every_kind_of_head(
    folders: dict[str, Path], head: str, divergence: str
) -> None:
    student = with_adapter(load(folders[head]))
    assert student.output_head is not None
    arrays = batch_arrays(student)
    options = {"temperature": 2.0, "alpha": 0.7, "divergence": divergence}
    chunked = make_distillation_loss(student, memory=memory_of(50, student), **options)
    sums, gradients = value_and_gradients(student, chunked, arrays)
    rows = expected_rows(
        logits_of_counted(student, arrays),
        {name: arrays[name] for name in ("kept_ids", "teacher_log_probs", "labels", "weights")},
        t=2.0,
        alpha=0.7,
        divergence=divergence,
    )
    assert_sums(sums, rows)
    _, expected = value_and_gradients(student, dense_loss(student, **options), arrays)
    assert all(name.endswith(("lora_a", "lora_b")) for name in gradients)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("apart", [True, False])
def test_the_first_loss_runs_the_model_as_often_as_the_next(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """Else its first trace draws more for dropout, and a resumed run ends otherwise."""
    student = with_adapter(load(folders["tied"]))
    arrays = batch_arrays(ModelSource(str(folders["tied"])).load())
    if not apart:
        monkeypatch.setattr(language_model, "OutputHead", Mock(side_effect=ValueError))
    loss = make_distillation_loss(student, temperature=2.0, alpha=0.7)
    calls = []
    body = llama.LlamaModel.__call__
    monkeypatch.setattr(
        llama.LlamaModel, "__call__", lambda *given, **how: calls.append(1) or body(*given, **how)
    )
    for expected in (1, 2):
        loss(student.model, arrays)
        assert len(calls) == expected


@pytest.mark.parametrize("divergence", sorted(LOSSES))
def test_every_divergence_in_chunks(folders: dict[str, Path], divergence: str) -> None:
    student = with_adapter(load(folders["tied"]))
    arrays = batch_arrays(student, t=1.5)
    options = {"temperature": 1.5, "alpha": 1.0, "divergence": divergence}
    chunked = make_distillation_loss(student, memory=memory_of(33, student), **options)
    sums, gradients = value_and_gradients(student, chunked, arrays)
    dense, expected = value_and_gradients(student, dense_loss(student, **options), arrays)
    for name in dense:
        assert sums[name].item() == pytest.approx(dense[name].item(), rel=1e-5)
    assert_same_gradients(gradients, expected)


def test_padding_of_the_batch_contributes_nothing(folders: dict[str, Path]) -> None:
    student = with_adapter(load(folders["tied"]))
    arrays = batch_arrays(student)
    padding = arrays["weights"] == 0
    assert padding.any().item()
    other = {
        **arrays,
        "positions": mx.where(padding, 17, arrays["positions"]),
        "labels": mx.where(padding, 99, arrays["labels"]),
        "teacher_log_probs": mx.where(
            padding[:, None], arrays["teacher_log_probs"][:, ::-1], arrays["teacher_log_probs"]
        ),
    }
    loss = make_distillation_loss(
        student, temperature=2.0, alpha=0.7, memory=memory_of(40, student)
    )
    sums, gradients = value_and_gradients(student, loss, arrays)
    sums_other, gradients_other = value_and_gradients(student, loss, other)
    for name in sums:
        assert sums_other[name].item() == pytest.approx(sums[name].item(), rel=1e-6)
    assert_same_gradients(gradients_other, gradients, 1e-5)
    assert loss(student.model, {**arrays, "weights": mx.zeros_like(arrays["weights"])})[
        "loss"
    ].item() == pytest.approx(0, abs=1e-9)


def test_padded_rows_of_the_head_take_no_part(folders: dict[str, Path]) -> None:
    student = load(folders["padded"])
    tokens = student.source.token_count
    assert student.vocabulary_size == tokens < 1600
    arrays = batch_arrays(student)
    loss = make_distillation_loss(student, temperature=2.0, alpha=0.7)
    student.model.freeze()
    before = loss(student.model, arrays)
    weight = student.model.model.embed_tokens.weight
    weight[tokens:] = 40.0 * weight[tokens:] + 5.0
    after = loss(student.model, arrays)
    assert mx.argmax(student.model(arrays["inputs"]), axis=-1).max().item() >= tokens
    for name in before:
        assert after[name].item() == pytest.approx(before[name].item(), rel=1e-6)


class SoftCapped(llama.Model):
    """A Llama that squeezes its logits between -2 and 2 after the head, as Gemma does."""

    def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return 2.0 * mx.tanh(super().__call__(inputs, *args, **kwargs) / 2.0)


@pytest.mark.parametrize("apart", [True, False])
def test_a_soft_cap_is_part_of_the_loss(folders: dict[str, Path], apart: bool) -> None:
    """In chunks, and where the head cannot be taken apart from the body."""
    plain = load(folders["tied"])
    capped = SoftCapped(plain.model.args)
    capped.update(plain.model.parameters())
    capped.eval()
    student = with_adapter(LanguageModel(plain.source, capped))
    without_cap = plain.output_head
    assert without_cap is not None and without_cap.is_last
    assert student.output_head is not None and not student.output_head.is_last
    arrays = batch_arrays(student)
    states = student.body(arrays["inputs"])
    assert mx.array_equal(student.head(states), student.logits(arrays["inputs"]))
    uncapped = without_cap.logits(states, student.vocabulary_size)
    assert mx.abs(uncapped - student.logits(arrays["inputs"])).max().item() > 0.1
    if not apart:
        student.__dict__["output_head"] = None
    options = {"temperature": 2.0, "alpha": 0.7, "divergence": "forward_kl"}
    loss = make_distillation_loss(student, memory=memory_of(30, student), **options)
    sums, gradients = value_and_gradients(student, loss, arrays)
    targets = {n: arrays[n] for n in ("kept_ids", "teacher_log_probs", "labels", "weights")}
    rows = expected_rows(logits_of_counted(student, arrays), targets, t=2.0, alpha=0.7)
    assert_sums(sums, rows)
    _, expected = value_and_gradients(student, dense_loss(student, **options), arrays)
    assert_same_gradients(gradients, expected, 1e-6)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_trained_head_gets_its_gradient(folders: dict[str, Path], head: str) -> None:
    """The chunked path would leave the head without one and train on, silently wrong."""
    student = load(folders[head])
    student.model.unfreeze()
    arrays = batch_arrays(student)
    options = {"temperature": 2.0, "alpha": 0.7, "divergence": "forward_kl"}
    loss = make_distillation_loss(student, memory=memory_of(16, student), **options)
    _, gradients = value_and_gradients(student, loss, arrays)
    _, expected = value_and_gradients(student, dense_loss(student, **options), arrays)
    assert_same_gradients(gradients, expected, 1e-5)


@pytest.mark.parametrize("k", [16, 1536])
@pytest.mark.parametrize("divergence", sorted(LOSSES))
def test_identical_teacher_and_student(folders: dict[str, Path], divergence: str, k: int) -> None:
    """KL and its gradient are 0 where a cross-entropy in its place would not be."""
    student = with_adapter(load(folders["tied"]))
    assert student.vocabulary_size == 1536
    arrays = batch_arrays(student)
    logits = mx.array(logits_of_counted(student, arrays))
    stored = compress(logits, arrays["labels"], top_k=k, temperatures=(1.0, 2.0))
    at_t = stored["kept_log_probs"] / 2.0 - stored["log_normalizer"][:, 1:]
    outcomes = mx.concatenate([at_t, stored["log_rest"][:, 1:]], axis=-1)
    arrays = {**arrays, "kept_ids": stored["kept_ids"], "teacher_log_probs": outcomes}
    loss = make_distillation_loss(
        student, temperature=2.0, alpha=1.0, divergence=divergence, memory=memory_of(48, student)
    )
    sums, gradients = value_and_gradients(student, loss, arrays)
    tokens = arrays["weights"].sum().item()
    assert abs(sums["kd"].item() / tokens) < 1e-6
    if divergence == "total_variation":
        return  # a corner: its derivative there is a sign of rounding errors
    assert max(mx.abs(g).max().item() for g in gradients.values()) / tokens < 1e-6


def test_a_student_in_half_precision(folders: dict[str, Path]) -> None:
    student = load(folders["tied"])
    student.model.set_dtype(mx.bfloat16)
    with_adapter(student)
    arrays = batch_arrays(student)
    options = {"temperature": 2.0, "alpha": 0.7, "divergence": "forward_kl"}
    loss = make_distillation_loss(student, memory=memory_of(50, student), **options)
    sums, gradients = value_and_gradients(student, loss, arrays)
    dense, expected = value_and_gradients(student, dense_loss(student, **options), arrays)
    assert sums["loss"].dtype == mx.float32
    assert sums["loss"].item() == pytest.approx(dense["loss"].item(), rel=1e-4)
    in_float32 = [
        {name: value.astype(mx.float32) for name, value in tree.items()}
        for tree in (gradients, expected)
    ]
    assert_same_gradients(*in_float32, tolerance=0.03)


def test_cross_entropy_of_a_batch(folders: dict[str, Path]) -> None:
    student = load(folders["untied"])
    arrays = batch_arrays(student)
    rows = oracle.cross_entropy(logits_of_counted(student, arrays), np.asarray(arrays["labels"]))
    expected = (rows * np.asarray(arrays["weights"])).sum()
    assert cross_entropy_sums(student.model, arrays)["loss"].item() == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.slow
def test_compiled_as_the_trainer_compiles_it(folders: dict[str, Path]) -> None:
    student = with_adapter(load(folders["tied"]))
    arrays = batch_arrays(student)
    loss = make_distillation_loss(
        student, temperature=2.0, alpha=0.7, memory=memory_of(50, student)
    )
    plain = value_and_gradients(student, loss, arrays)
    step = nn.value_and_grad(student.model, lambda a: loss(student.model, a)["loss"])
    value, gradients = mx.compile(step, inputs=[student.model.state])(arrays)
    assert value.item() == pytest.approx(plain[0]["loss"].item(), rel=1e-5)
    assert_same_gradients(named_arrays(gradients), plain[1])


def wide_student(capped: bool, tokens: int) -> LanguageModel:
    """A small body with a vocabulary of size, a few rows of which are padding."""
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=1,
        rms_norm_eps=1e-5,
        vocab_size=tokens + 9,
    )
    model = (SoftCapped if capped else llama.Model)(arguments)
    mx.eval(model.parameters())
    return LanguageModel(SimpleNamespace(token_count=tokens), model)  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("capped", [True, False])
@pytest.mark.parametrize("divergence", sorted(LOSSES))
def test_the_loss_keeps_to_its_memory(divergence: str, capped: bool, compiled: bool) -> None:
    """Whatever the head and the divergence; what the loss takes is made of logits and their kind.

    It grew with the number of chunks while a chunk's sums could wait for the last chunk's end.
    """
    vocabulary, count, budget = 16_000, 192, 24
    student = wide_student(capped, vocabulary)
    rows = rows_at_once(budget, vocabulary)
    assert 5 < count / rows < 10
    arrays = random_targets(count, 64, k=8, t=2.0)
    arrays |= {"inputs": mx.ones((1, count), mx.int32), "positions": mx.arange(count)}
    options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.7, "divergence": divergence}
    loss = make_distillation_loss(with_adapter(student), memory=budget, **options)
    step = nn.value_and_grad(student.model, lambda batch: loss(student.model, batch)["loss"])
    student.model.train()
    if compiled:
        state = [student.model.state]
        step = mx.compile(step, inputs=state, outputs=state)
        mx.eval(step(arrays))
    mx.eval(arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(arrays))
    peak = (mx.get_peak_memory() - before) / 1e6
    assert 0.4 * budget < peak < budget


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_evaluation_goes_forward_only(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, divergence: str
) -> None:
    """The held-out sums are those of a training step to the bit, and no gradient is computed."""
    student = load(folders["tied"])
    arrays = batch_arrays(student)
    loss = make_distillation_loss(
        student, temperature=2, alpha=0.7, divergence=divergence, memory=memory_of(16, student)
    )
    student.model.train()
    trained = loss(student.model, arrays)
    student.model.eval()
    monkeypatch.setattr(head_loss, "_pulled_back", lambda *arguments: pytest.fail("a gradient"))
    evaluated = loss(student.model, arrays)
    assert {name: value.item() for name, value in evaluated.items()} == {
        name: value.item() for name, value in trained.items()
    }
