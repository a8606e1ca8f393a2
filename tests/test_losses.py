"""Losses against the float64 oracle: values, gradients, masks, properties and refusals.

Knows no model. A divergence added to LOSSES is tested here as soon as the oracle knows it.
"""

import math

import hypothesis.extra.numpy as arrays
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from conch_dna.losses import (
    LOSSES,
    compute_ce_loss,
    compute_kd_loss,
    forward_kl,
    generalised_jsd,
    kept_and_rest,
    log_softmax,
    log_sum_exp,
    sum_last,
    token_cross_entropy,
)

TEMPERATURES = (0.5, 1.0, 2.0, 10.0)
DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def as_numpy(value: mx.array) -> np.ndarray:
    return np.asarray(value.astype(mx.float32))


def random_pair(shape: tuple[int, ...], *, seed: int = 0, spread: float = 3.0) -> list[mx.array]:
    random = np.random.default_rng(seed)
    return [mx.array(random.normal(0, spread, shape).astype(np.float32)) for _ in range(2)]


def extreme_pair() -> list[mx.array]:
    """Logits at -100, 0 and 100, so tokens that one model is sure of are excluded by the other."""
    random = np.random.default_rng(1)
    pair = [random.choice([-100.0, 0.0, 100.0], (4, 40)) + random.normal(0, 1, (4, 40))]
    pair.append(np.roll(pair[0], 1, axis=-1) + random.normal(0, 1, (4, 40)))
    return [mx.array(part.astype(np.float32)) for part in pair]


def cases() -> dict[str, list[mx.array]]:
    pair = random_pair((2, 3, 50))
    return {
        "random": pair,
        "vocabulary of 32,000": random_pair((2, 32_000), seed=2),
        "gaps of 100": extreme_pair(),
        "bfloat16": [part.astype(mx.bfloat16) for part in pair],
        "float16": [part.astype(mx.float16) for part in pair],
    }


def expected_rows(teacher: mx.array, student: mx.array, t: float, name: str) -> np.ndarray:
    p, q = oracle.softmax(as_numpy(teacher), t), oracle.softmax(as_numpy(student), t)
    return t**2 * oracle.DIVERGENCES[name](p, q)


def test_every_divergence_has_an_oracle() -> None:
    assert set(LOSSES) == set(oracle.DIVERGENCES), "write the formula in oracle.DIVERGENCES"


def test_worst_relative_error_of_all_losses_is_under_1e_5() -> None:
    """Half precision is only the input's: the oracle gets the same rounded numbers."""
    errors: dict[str, float] = {}
    for case, (teacher, student) in cases().items():
        for t in TEMPERATURES:
            for name in sorted(LOSSES):
                found = compute_kd_loss(teacher, student, t, divergence=name).item()
                expected = expected_rows(teacher, student, t, name).mean()
                errors[f"{name}, {case}, t = {t}"] = oracle.worst_relative_error(found, expected)
        labels = np.random.default_rng(3).integers(0, student.shape[-1], student.shape[:-1])
        found = compute_ce_loss(student, mx.array(labels)).item()
        expected = oracle.cross_entropy(as_numpy(student), labels).mean()
        errors[f"cross-entropy, {case}"] = oracle.worst_relative_error(found, expected)
    worst = max(errors, key=errors.__getitem__)
    print(f"\nworst relative error of {len(errors)} losses: {errors[worst]:.1e} ({worst})")
    assert errors[worst] < 1e-5, worst


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_by_the_students_logits(name: str, t: float) -> None:
    worst = 0.0
    for teacher, student in (random_pair((5, 12)), extreme_pair()):
        gradient = mx.grad(lambda x, y=teacher: compute_kd_loss(y, x, t, divergence=name))(student)
        rows = oracle.slope(
            lambda x, y=teacher: (
                t**2
                * oracle.DIVERGENCES[name](oracle.softmax(as_numpy(y), t), oracle.softmax(x, t))
            ),
            as_numpy(student),
        )
        error = oracle.error_of_gradient(as_numpy(gradient), rows / len(rows))
        worst = max(worst, error)
    assert worst < 1e-5


def test_gradient_of_forward_kl_is_t_times_q_minus_p() -> None:
    teacher, student = random_pair((3, 20))
    p, q = oracle.softmax(as_numpy(teacher), 2.0), oracle.softmax(as_numpy(student), 2.0)
    gradient = mx.grad(lambda x: compute_kd_loss(teacher, x, 2.0))(student)
    assert oracle.error_of_gradient(as_numpy(gradient), 2.0 * (q - p) / 3) < 1e-6


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_half_precision_rounds_only_the_gradients_last_step(name: str, dtype: mx.Dtype) -> None:
    teacher, student = (part.astype(dtype) for part in random_pair((4, 30)))
    gradient = mx.grad(lambda x: compute_kd_loss(teacher, x, divergence=name))(student)
    exact = mx.grad(lambda x: compute_kd_loss(teacher, x, divergence=name))(
        student.astype(mx.float32)
    )
    assert gradient.dtype == dtype
    resolution = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}[dtype]
    np.testing.assert_allclose(as_numpy(gradient), as_numpy(exact), rtol=resolution, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_float32_whatever_the_logits_are(dtype: mx.Dtype) -> None:
    teacher, student = (part.astype(dtype) for part in random_pair((2, 8)))
    assert log_softmax(student, 2.0).dtype == mx.float32
    assert compute_kd_loss(teacher, student).dtype == mx.float32
    assert compute_ce_loss(student, mx.array([1, 2])).dtype == mx.float32
    assert kept_and_rest(student, mx.array([[0], [1]])).dtype == mx.float32


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_identical_models_give_loss_and_gradient_zero(name: str, t: float) -> None:
    """A cross-entropy reported as KL would give the teacher's entropy here.

    The loss is held against 1e-6 nats, that is without its t².
    """
    logits, _ = random_pair((2, 3, 50))
    value, gradient = mx.value_and_grad(lambda x: compute_kd_loss(logits, x, t, divergence=name))(
        logits
    )
    assert abs(value.item()) <= 1e-6 * t**2
    # The total variation has no derivative here; MLX takes 0 for it.
    assert mx.abs(gradient).max().item() <= 1e-6


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    teacher, student = random_pair((2, 3, 50))
    moved = student + mx.array([[[5.0], [-3.0], [8.0]]])
    assert compute_kd_loss(teacher, moved).item() == pytest.approx(
        compute_kd_loss(teacher, student).item(), rel=1e-5
    )


def test_arguments_are_not_swapped() -> None:
    """The pair (0.5, 0.5), (0.9, 0.1) has ½ ln(25/9) = 0.5108 forward and 0.3681 in reverse."""
    teacher, student = mx.log(mx.array([[0.5, 0.5]])), mx.log(mx.array([[0.9, 0.1]]))
    forward = compute_kd_loss(teacher, student, 1.0).item()
    reverse = compute_kd_loss(teacher, student, 1.0, divergence="reverse_kl").item()
    assert forward == pytest.approx(0.5 * math.log(25 / 9), rel=1e-6)
    assert reverse == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)
    beta = generalised_jsd(teacher[0], student[0], beta=0.9).item()
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    assert beta == pytest.approx(float(oracle.jsd(p, q, 0.9)), rel=1e-5)
    assert beta != pytest.approx(float(oracle.jsd(p, q, 0.1)), rel=1e-2)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_mean_is_over_tokens_and_not_over_sequences(name: str) -> None:
    teacher, student = random_pair((2, 4, 20))
    mask = np.array([[1, 0, 0, 0], [1, 1, 1, 1]])
    rows = expected_rows(teacher, student, 2.0, name)
    of_tokens = rows[mask == 1].mean()
    of_sequences = np.mean([row[kept == 1].mean() for row, kept in zip(rows, mask, strict=True)])
    assert abs(of_tokens / of_sequences - 1) > 0.01
    for kind in (mx.bool_, mx.float32, mx.int32):
        found = compute_kd_loss(
            teacher, student, 2.0, mask=mx.array(mask).astype(kind), divergence=name
        )
        assert found.item() == pytest.approx(of_tokens, rel=1e-5)


def test_what_the_mask_leaves_out_has_no_effect_and_no_gradient() -> None:
    teacher, student = random_pair((2, 4, 20))
    mask = mx.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    value, gradient = mx.value_and_grad(lambda x: compute_kd_loss(teacher, x, mask=mask))(student)
    other = mx.where(mask[..., None] == 1, student, 50.0 - student)
    assert compute_kd_loss(teacher, other, mask=mask).item() == value.item()
    left_out = as_numpy(gradient)[np.asarray(mask) == 0]
    assert not left_out.any()
    assert math.isnan(compute_kd_loss(teacher, student, mask=mx.zeros((2, 4))).item())


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 2, 3, 7)])
def test_leading_axes(shape: tuple[int, ...]) -> None:
    teacher, student = random_pair(shape)
    rows = expected_rows(teacher, student, 2.0, "forward_kl")
    assert compute_kd_loss(teacher, student).item() == pytest.approx(rows.mean(), rel=1e-5)
    labels = np.random.default_rng(0).integers(0, 7, shape[:-1])
    entropies = oracle.cross_entropy(as_numpy(student), np.asarray(labels))
    found = compute_ce_loss(student, mx.array(labels)).item()
    assert found == pytest.approx(entropies.mean(), rel=1e-5)
    assert token_cross_entropy(student, mx.array(labels)).shape == shape[:-1]


@pytest.mark.parametrize("ignore_index", [-100, 0, 6])
def test_cross_entropy_leaves_out_what_is_ignored(ignore_index: int) -> None:
    _, student = random_pair((3, 4, 7))
    targets = np.random.default_rng(5).integers(0, 7, (3, 4))
    targets[0, 1:] = ignore_index
    targets[2, 3] = ignore_index
    counted = targets != ignore_index
    rows = oracle.cross_entropy(as_numpy(student), np.where(counted, targets, 0))
    value, gradient = mx.value_and_grad(
        lambda x: compute_ce_loss(x, mx.array(targets), ignore_index)
    )(student)
    assert value.item() == pytest.approx(rows[counted].mean(), rel=1e-5)
    assert not as_numpy(gradient)[~counted].any()
    expected = oracle.softmax(as_numpy(student))[counted]
    expected[np.arange(len(expected)), targets[counted]] -= 1
    error = oracle.error_of_gradient(as_numpy(gradient)[counted], expected / counted.sum())
    assert error < 1e-5


def test_cross_entropy_with_nothing_counted_is_not_a_number() -> None:
    assert math.isnan(compute_ce_loss(mx.zeros((1, 2, 3)), mx.full((1, 2), -100)).item())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_teacher_gets_no_gradient(name: str) -> None:
    teacher, student = random_pair((2, 20))
    gradient = mx.grad(lambda x: compute_kd_loss(x, student, divergence=name))(teacher)
    assert not as_numpy(gradient).any()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"reverse_kl"}))
def test_a_token_that_the_teacher_excludes(name: str) -> None:
    """Excluded is -inf, not a logit times 0; reverse KL is rightly infinite there."""
    teacher, student = random_pair((3, 10))
    teacher[:, 4] = -mx.inf
    value, gradient = mx.value_and_grad(lambda x: compute_kd_loss(teacher, x, divergence=name))(
        student
    )
    expected = expected_rows(teacher, student, 2.0, name).mean()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(as_numpy(gradient)).all()


def test_reverse_kl_is_infinite_where_only_the_teacher_excludes() -> None:
    teacher, student = random_pair((1, 10))
    teacher[:, 4] = -mx.inf
    assert compute_kd_loss(teacher, student, divergence="reverse_kl").item() == math.inf


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_token_that_both_exclude(name: str) -> None:
    teacher, student = random_pair((3, 10))
    teacher[:, 4] = student[:, 4] = -mx.inf
    value, gradient = mx.value_and_grad(lambda x: compute_kd_loss(teacher, x, divergence=name))(
        student
    )
    without = [mx.concatenate([part[:, :4], part[:, 5:]], axis=-1) for part in (teacher, student)]
    smaller = mx.grad(lambda x: compute_kd_loss(without[0], x, divergence=name))(without[1])
    expected = expected_rows(*without, 2.0, name).mean()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(np.delete(gradient, 4, axis=-1), smaller, rtol=1e-5, atol=1e-7)
    assert not as_numpy(gradient)[:, 4].any()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_nan_is_not_hidden(name: str) -> None:
    for broken in (0, 1):
        pair = random_pair((2, 10))
        pair[broken][1, 3] = mx.nan
        assert math.isnan(compute_kd_loss(*pair, divergence=name).item())
        outcomes = kept_and_rest(pair[broken], mx.array([[0, 1], [0, 1]]))
        assert math.isnan(outcomes[1, -1].item())


def test_jsd_is_finite_where_a_gap_exceeds_88_nats() -> None:
    """mlx_lm's js_div_loss is NaN there, since exp(-88) is 0 in float32."""
    teacher = mx.array([[0.0, -200.0, -90.0]])
    student = mx.array([[-200.0, 0.0, -90.0]])
    value, gradient = mx.value_and_grad(
        lambda x: compute_kd_loss(teacher, x, 1.0, divergence="jsd")
    )(student)
    assert value.item() == pytest.approx(math.log(2), rel=1e-6)
    assert np.isfinite(as_numpy(gradient)).all()


@pytest.mark.parametrize(("beta", "instead"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_refuses_a_beta_where_it_is_0_for_every_pair(beta: float, instead: str) -> None:
    teacher, student = random_pair((1, 4))
    with pytest.raises(ValueError, match=f"beta is {beta}.*use {instead}, or a beta strictly"):
        generalised_jsd(log_softmax(teacher), log_softmax(student), beta=beta)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.99])
def test_jsd_of_other_betas(beta: float) -> None:
    teacher, student = random_pair((4, 30))
    found = generalised_jsd(log_softmax(teacher), log_softmax(student), beta=beta)
    p, q = oracle.softmax(as_numpy(teacher)), oracle.softmax(as_numpy(student))
    np.testing.assert_allclose(as_numpy(found), oracle.jsd(p, q, beta), rtol=2e-5)


def test_kd_refuses_what_does_not_fit() -> None:
    logits = mx.zeros((2, 3, 8))
    with pytest.raises(ValueError, match=r"\(2, 3, 9\).*differ in shape: use align_vocab_sizes"):
        compute_kd_loss(mx.zeros((2, 3, 9)), logits)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature is {temperature}: it must be above 0"):
            compute_kd_loss(logits, logits, temperature)
    with pytest.raises(ValueError, match=r"'hinge' is unknown: use one of .*'forward_kl'"):
        compute_kd_loss(logits, logits, divergence="hinge")


def test_cross_entropy_refuses_targets_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 8\) and targets \(2, 4\) do not fit"):
        compute_ce_loss(mx.zeros((2, 3, 8)), mx.zeros((2, 4), mx.int32))


@pytest.mark.parametrize("size", [1, 511, 512, 1024, 1536, 2000, 151_665])
def test_sums_over_a_large_vocabulary(size: int) -> None:
    """MLX's own sum on a CPU is off by 2e-4 at Qwen's 151,665 tokens."""
    logits = np.random.default_rng(size).normal(0, 3, (2, size)).astype(np.float32)
    exact = np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True)
    found = sum_last(mx.exp(mx.array(logits)))
    np.testing.assert_allclose(np.asarray(found), exact, rtol=2e-6)
    np.testing.assert_allclose(
        np.asarray(log_sum_exp(mx.array(logits))), np.log(exact), rtol=1e-6, atol=1e-6
    )
    for function, expected in ((sum_last, 1.0), (log_sum_exp, np.exp(logits) / exact)):
        gradient = mx.grad(lambda x, f=function: (f(x) * mx.array([[1.0], [-2.0]])).sum())(
            mx.array(logits)
        )
        np.testing.assert_allclose(
            np.asarray(gradient), np.array([[1.0], [-2.0]]) * expected * np.ones(size), rtol=1e-5
        )


def test_log_sum_exp_where_everything_is_excluded() -> None:
    logits = mx.array([[-mx.inf] * 4, [0.0, -mx.inf, 0.0, -mx.inf]])
    assert log_sum_exp(logits)[:, 0].tolist() == pytest.approx([-math.inf, math.log(2)])
    gradient = mx.grad(lambda x: log_sum_exp(x).sum())(logits)
    assert gradient.tolist() == [[0, 0, 0, 0], [0.5, 0, 0.5, 0]]
    assert math.isnan(log_sum_exp(mx.array([[0.0, mx.nan]])).item())


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 5, 39, 40])
def test_kept_and_rest_against_the_oracle(k: int, t: float) -> None:
    random = np.random.default_rng(k)
    logits = random.normal(0, 3, (6, 40)).astype(np.float32)
    kept = np.stack([random.permutation(40)[:k] for _ in range(6)])
    found = as_numpy(mx.exp(kept_and_rest(mx.array(logits), mx.array(kept), t)))
    np.testing.assert_allclose(found, oracle.outcomes(logits, kept, t), rtol=1e-5)


def test_a_rest_of_1e_12_keeps_its_precision() -> None:
    """1 - Σ of the kept probabilities is 0 in float32, or noise of 1e-7."""
    logits = np.full((1, 1002), math.log(1e-15), np.float32)
    logits[0, :2] = math.log(0.5)
    kept = np.array([[0, 1]])
    expected = oracle.outcomes(logits, kept)[0, -1]
    assert expected == pytest.approx(1e-12, rel=1e-4)
    found, gradient = mx.value_and_grad(lambda x: kept_and_rest(x, mx.array(kept))[0, -1])(
        mx.array(logits)
    )
    assert found.item() == pytest.approx(math.log(expected), rel=1e-6)
    np.testing.assert_allclose(as_numpy(gradient)[0, 2:], 1e-3, rtol=1e-4)


def test_a_rest_of_excluded_tokens_only() -> None:
    logits = mx.array([[0.5, -1.0, -mx.inf, -mx.inf]])
    kept = mx.array([[0, 1]])
    value, gradient = mx.value_and_grad(
        lambda x: forward_kl(mx.log(mx.array([[0.3, 0.7, 0.0]])), kept_and_rest(x, kept)).sum()
    )(logits)
    p, q = np.array([0.3, 0.7]), oracle.softmax(np.array([0.5, -1.0]))
    assert value.item() == pytest.approx(float(oracle.kl(p, q)), rel=1e-5)
    np.testing.assert_allclose(as_numpy(gradient)[0], [*(q - p), 0, 0], rtol=1e-5)


_LOGITS = arrays.arrays(np.float32, (2, 12), elements=st.floats(-30, 30, width=32))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(pair=_LOGITS, order=st.permutations(range(12)), k=st.integers(1, 12))
def test_coarsening_never_exceeds_the_full_divergence(
    pair: np.ndarray, order: list[int], k: int
) -> None:
    """True of every divergence that is convex in both arguments (data processing)."""
    kept = mx.array([order[:k]])
    teacher, student = mx.array(pair[:1]), mx.array(pair[1:])
    coarse = kept_and_rest(teacher, kept), kept_and_rest(student, kept)
    full = log_softmax(teacher), log_softmax(student)
    for divergence in LOSSES.values():
        of_kept, of_all = divergence(*coarse).item(), divergence(*full).item()
        # A rest of one token hides nothing.
        if k >= 11:
            assert of_kept == pytest.approx(of_all, rel=1e-5, abs=1e-5)
        assert -1e-5 <= of_kept <= of_all * (1 + 1e-5) + 1e-5


@settings(deadline=None, derandomize=True, max_examples=100)
@given(pair=_LOGITS)
def test_bounds_and_symmetries(pair: np.ndarray) -> None:
    p, q = log_softmax(mx.array(pair[0])), log_softmax(mx.array(pair[1]))
    values = {name: (divergence(p, q), divergence(q, p)) for name, divergence in LOSSES.items()}
    found = {name: [value.item() for value in both] for name, both in values.items()}
    assert all(value >= -1e-5 for both in found.values() for value in both)
    assert found["jsd"][0] == pytest.approx(found["jsd"][1], abs=1e-5)
    assert found["jsd"][0] <= math.log(2) + 1e-5
    assert found["total_variation"][0] == pytest.approx(found["total_variation"][1], abs=1e-6)
    assert found["total_variation"][0] <= 1 + 1e-5
    assert found["forward_kl"] == pytest.approx(found["reverse_kl"][::-1], abs=1e-5)
    assert found["skewed_kl"] == pytest.approx(found["skewed_reverse_kl"][::-1], abs=1e-5)
    # Pinsker: TV² is at most KL / 2.
    assert found["total_variation"][0] ** 2 <= found["forward_kl"][0] / 2 + 1e-5
