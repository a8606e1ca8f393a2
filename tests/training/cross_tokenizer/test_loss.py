"""The loss across tokenizers: against oracles, against itself in chunks, and with one tokenizer.

Random models and hand-made arrays; whether it teaches anything is tested in test_cross_tokenizer.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from aligned_pairs import Pair, aligned_targets
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.loading.output_head import rows_at_once
from conch_dna.training.cross_tokenizer.alignments import INDEX
from conch_dna.training.cross_tokenizer.loss import (
    ARRAYS,
    class_sum,
    columns_of_roots,
    combine,
    gather_roots,
    inner_log_probs,
    open_sum,
    with_reaching,
)
from conch_dna.training.cross_tokenizer.targets import AlignedTargets
from conch_dna.training.data.examples import KINDS, resolve_alignment
from conch_dna.training.head_loss import autodiff, chunked_loss, make_distillation_loss
from conch_dna.training.settings import KDConfig
from models import memory_of


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def arrays_of(
    targets: AlignedTargets, examples: list[Any], temperature: float = 2.0
) -> dict[str, mx.array]:
    batch = targets.collate(examples, temperature)
    return {name: mx.array(value) for name, value in batch.arrays.items()}


@pytest.fixture(scope="module")
def same_pair(tiny_teacher: Path, tiny_student: Path) -> Pair:
    return ModelSource(str(tiny_teacher)), ModelSource(str(tiny_student))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_one_tokenizer_needs_no_alignment(kind: str) -> None:
    assert resolve_alignment(kind, same=True) == INDEX


@pytest.mark.parametrize("kind", ["roots", "shared tokens"])
def test_with_one_tokenizer_distributions_are_compared_as_by_index(
    kind: str, same_pair: Pair, tmp_path: Path
) -> None:
    """By the code for different tokenizers itself; classes are compared at temperature 1."""
    temperature = 1.0 if kind == "roots" else 2.0
    teacher, source = same_pair
    student = source.load()
    examples, targets = aligned_targets((teacher, source), tmp_path, kind, top_k=32)
    of_teacher = [example.teacher for example in examples]
    by_index = targets.cache.collate(of_teacher, temperature)
    arrays = {name: mx.array(value) for name, value in by_index.arrays.items()}
    by_index_loss = make_distillation_loss(student, temperature=temperature, alpha=0.7)
    expected = by_index_loss(student.model, arrays)
    loss = targets.loss(
        student, KDConfig(temperature=temperature, alpha=0.7, loss_memory=memory_of(16, student))
    )
    got = loss(student.model, arrays_of(targets, examples, temperature))
    count = by_index.count
    for name in ("loss", "kd", "ce"):
        assert got[name].item() / count == pytest.approx(
            expected[name].item() / count, abs=1e-5, rel=1e-5
        )
    assert got["kd"].item() / count > 0.1, "the models must differ for this to say anything"


def test_classes_add_up_the_probabilities_of_their_members() -> None:
    random = np.random.default_rng(2)
    logits = 5 * random.normal(size=(6, 8))
    roots = np.array([0, 1, 1, 3, 0, 1, -1, 3])
    got = np.asarray(gather_roots(mx.array(logits.astype(np.float32)), roots), np.float64)
    for column in range(8):
        members = np.flatnonzero(roots == column) if roots[column] >= 0 else [column]
        if roots[column] not in (-1, column):
            assert np.isneginf(got[:, column]).all()
            continue
        expected = np.log(np.exp(logits[:, members]).sum(-1))
        np.testing.assert_allclose(got[:, column], expected, rtol=1e-5, atol=1e-5)


def test_a_class_hands_its_gradient_to_its_members_by_their_shares() -> None:
    random = np.random.default_rng(3)
    logits = 5 * random.normal(size=(6, 8))
    weights = random.normal(size=(6, 8))
    roots = np.array([0, 1, 1, 3, 0, 1, -1, 3])
    is_root = (roots == -1) | (roots == np.arange(8))

    def total(x: mx.array) -> mx.array:
        chosen = gather_roots(x, roots)[:, mx.array(np.flatnonzero(is_root))]
        return (chosen * mx.array(weights[:, is_root].astype(np.float32))).sum()

    gradient = mx.grad(total)(mx.array(logits.astype(np.float32)))
    expected = np.zeros_like(logits)
    for column in np.flatnonzero(is_root):
        members = np.flatnonzero(roots == column) if roots[column] >= 0 else [column]
        share = np.exp(logits[:, members])
        expected[:, members] = weights[:, [column]] * share / share.sum(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(gradient), expected, atol=1e-5)


def test_classes_keep_a_tiny_probability_and_a_finite_gradient() -> None:
    """A gap of 200 nats underflows as a probability; its logarithm must not."""
    logits = mx.array([[200.0, 0.0, 0.0, -300.0]])
    roots = np.array([0, 1, 1, 1])
    got = gather_roots(logits, roots)
    assert got[0, 1].item() == pytest.approx(0.0, abs=1.0)
    gradient = mx.grad(lambda x: gather_roots(x, roots)[0, 1])(logits)
    assert mx.isfinite(gradient).all().item()


def test_the_loss_is_put_together_as_the_formula_says() -> None:
    random = np.random.default_rng(3)
    gold = -np.abs(random.normal(size=6)) - 0.1
    teacher = np.array([-1.5, -0.2, 0.0])
    arrays = {
        "weights": mx.array([1.0, 1, 1, 1, 1, 0]),
        "chunk_index": mx.array([0, 0, 1, 3, 3, 3]),
        "chunk_log_probs": mx.array(teacher.astype(np.float32)),
        "chunk_weights": mx.array([1.0, 1, 0]),
    }
    sums = combine(
        mx.array(2.5),
        mx.array(gold.astype(np.float32)),
        arrays,
        KDConfig(alpha=0.6, soft_weight=0.5, chunk_weight=2.0, chunk_scale=10.0),
    )
    student = np.array([gold[0] + gold[1], gold[2]])
    p, q = np.exp(teacher[:2] / 10), np.exp(student / 10)
    chunks = 10 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    kd, ce = 0.5 * 2.5 + 2.0 * chunks, -gold[:5].sum()
    assert sums["chunks"].item() == pytest.approx(chunks, rel=1e-4)
    assert sums["kd"].item() == pytest.approx(kd, rel=1e-4)
    assert sums["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert sums["loss"].item() == pytest.approx(0.6 * kd + 0.4 * ce, rel=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_in_chunks_it_is_the_same_loss_and_gradient(
    kind: str,
    divergence: str,
    other_pair: Pair,
    tmp_path: Path,
) -> None:
    """The path that never holds all logits against MLX's own gradient through all of them."""
    teacher, source = other_pair
    student = source.load()
    examples, targets = aligned_targets((teacher, source), tmp_path, kind, top_k=32)
    arrays = arrays_of(targets, examples)
    config = KDConfig(divergence=divergence, loss_memory=memory_of(24, student))
    results = []
    for plain in (True, False):
        model = LanguageModel(source, student.model)
        if not plain:
            model.__dict__["output_head"] = None
        student.model.freeze()
        student.model.model.layers[0].unfreeze()
        loss = targets.loss(model, config)
        student.model.train()
        grad = nn.value_and_grad(student.model, lambda m, f=loss: f(m, arrays)["loss"])
        value, gradient = grad(student.model)
        results.append((value.item(), dict(tree_flatten(gradient))))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, expected in results[1][1].items():
        got = np.asarray(results[0][1][name])
        scale = np.abs(np.asarray(expected)).max()
        np.testing.assert_allclose(got, np.asarray(expected), atol=2e-4 * scale, err_msg=name)


@pytest.fixture(scope="module")
def other_pair(characters: ModelSource, tiny_student: Path) -> Pair:
    """A teacher that reads characters, for a student that reads BPE."""
    return characters, ModelSource(str(tiny_student))


def test_inside_a_token_the_student_is_what_its_tokens_add_up_to() -> None:
    """Outcomes add up over their tokens, among the tokens of their place alone.

    The second place's tokens are 300 nats below the first's: its shares must not be lost.
    """
    random = np.random.default_rng(4)
    logits = random.normal(size=(1, 6))
    logits[0, [3, 4]] -= 300
    rows = {
        "inner_tokens": mx.array([[0, 2, 5, 3, 4, 6]]),
        "inner_outcomes": mx.array([[0, 0, 1, 2, 3, 4]]),
        "inner_places": mx.array([[0, 0, 0, 1, 1, 2]]),
        "outcome_places": mx.array([[0, 0, 1, 1]]),
        "inner_log_probs": mx.zeros((1, 4)),
        "inner_blank": mx.zeros((1, 2)),
    }
    got = np.asarray(inner_log_probs(mx.array(logits.astype(np.float32)), rows, nothing=6))
    first, second = np.exp(logits[0, [0, 2, 5]]), np.exp(logits[0, [3, 4]] + 300)
    expected = [
        (first[0] + first[1]) / first.sum(),
        first[2] / first.sum(),
        *(second / second.sum()),
    ]
    np.testing.assert_allclose(np.exp(got[0]), expected, rtol=1e-4)


def test_a_boundary_that_longer_tokens_reach_over_counts_as_far_as_the_token_ended() -> None:
    """Against probabilities in float64; in the second row nothing reaches over."""
    random = np.random.default_rng(6)
    logits = random.normal(size=(3, 5))
    student = log_softmax(random.normal(size=(2, 3)))
    rows = {
        "over_own": mx.array([1, 5]),
        "over_tokens": mx.array([[0, 3, 4], [5, 5, 5]]),
        "over_columns": mx.array([[1, 1, 2], [2, 2, 2]]),
    }
    before = np.exp(logits[0])
    total = before[[0, 1, 3, 4]].sum()
    expected = np.exp(student)
    expected[0] *= before[1] / total
    expected[0, 1] += (before[0] + before[3]) / total
    expected[0, 2] += before[4] / total
    both = [mx.array(x.astype(np.float32)) for x in (logits, student)]
    got = np.exp(np.asarray(with_reaching(*both, rows, nothing=5)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_boundaries_keep_a_finite_gradient_where_nothing_can_follow() -> None:
    """A column that stands for no token, and a token that reaches over to nothing kept."""
    rows = {
        "over_own": mx.array([1, 2]),
        "over_tokens": mx.array([[0, 3], [3, 3]]),
        "over_columns": mx.array([[2, 2], [2, 2]]),
    }
    student = mx.array([[0.0, -mx.inf, -1.0], [-mx.inf, -0.5, -mx.inf]])
    logits = mx.array([[200.0, 0.0, -300.0]] * 3)

    def total(x: mx.array) -> mx.array:
        found = with_reaching(x, student, rows, nothing=3)
        return mx.where(found == -mx.inf, 0.0, found).sum()

    gradient = mx.grad(total)(logits)
    assert mx.isfinite(gradient).all().item()
    found = with_reaching(logits, student, rows, nothing=3)
    assert not mx.isnan(found).any().item()
    assert np.isneginf(np.asarray(found)[[0, 1], [1, 0]]).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_classes_keep_to_their_memory(compiled: bool) -> None:
    tokens, count, budget, top_k = 12_000, 96, 24, 32
    random = np.random.default_rng(6)
    head = mx.array(random.normal(size=(tokens, 16)).astype(np.float32))
    hidden = mx.array(random.normal(size=(count, 16)).astype(np.float32))
    roots = random.integers(-1, tokens // 3, tokens)
    roots[: tokens // 3] = np.arange(tokens // 3)
    none = mx.full((count, 8), tokens, dtype=mx.int32)
    kept = np.argsort(random.random((count, tokens // 3)), axis=1)[:, :top_k]
    rows = {
        "kept_ids": mx.array(kept.astype(np.int32)),
        "teacher_log_probs": mx.full((count, top_k + 1), -float(np.log(top_k + 1))),
        "labels": mx.array(random.integers(0, tokens, count).astype(np.int32)),
        **{name: mx.ones(count) for name in ("weights", "soft_weights")},
        "inner_known": mx.zeros(count),
        "inner_log_probs": mx.full((count, 4), -mx.inf),
        "inner_blank": mx.zeros((count, 2)),
        "outcome_places": mx.full((count, 4), 2, dtype=mx.int32),
        "inner_tokens": none,
        "inner_outcomes": mx.full((count, 8), 4, dtype=mx.int32),
        "inner_places": mx.full((count, 8), 2, dtype=mx.int32),
        "over_own": none[:, 0],
        "over_tokens": none,
        "over_columns": mx.full((count, 8), top_k, dtype=mx.int32),
    }

    def soft(logits: mx.array, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        options: Any = {"divergence": "forward_kl", "nothing": tokens, "roots": roots}
        return {"loss": class_sum(logits, arrays, **options)}

    def total(states: mx.array) -> mx.array:
        chunk = rows_at_once(budget, tokens, ARRAYS)
        assert count / chunk > 5
        options: dict[str, Any] = {"with_gold": True, "before": 1}
        rule = autodiff(soft)
        found = chunked_loss(lambda x: x @ head.T, states, rows, rule, chunk, **options)
        return found.sums["loss"] - found.gold.sum()

    step = mx.compile(mx.value_and_grad(total)) if compiled else mx.value_and_grad(total)
    mx.eval(step(hidden), head, rows)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(hidden))
    assert 0.4 * budget < (mx.get_peak_memory() - before) / 1e6 < budget


def test_what_classes_leave_open_is_taught_by_the_text() -> None:
    """Rows of a known class pay for the token in it, others for the token, inner ones nothing."""
    random = np.random.default_rng(5)
    logits = random.normal(size=(4, 5))
    labels = np.array([2, 3, 1, 0])
    roots = np.array([0, 1, 1, 1, -1])
    rows = {
        "labels": mx.array(labels),
        "weights": mx.array([1.0, 1, 1, 0]),
        "soft_weights": mx.array([1.0, 0, 1, 0]),
        "inner_known": mx.array([0.0, 0, 1, 0]),
    }
    log_probs = log_softmax(logits)
    within = np.log(np.exp(log_probs[0, [1, 2, 3]]).sum()) - log_probs[0, 2]
    expected = within - log_probs[1, 3]
    scores = mx.array(logits.astype(np.float32))
    columns = mx.array(columns_of_roots(roots, 5)[labels])
    classes = mx.take_along_axis(gather_roots(scores, roots), columns[:, None], axis=-1)
    got = open_sum(scores, classes, rows).item()
    assert got == pytest.approx(expected, rel=1e-5)
