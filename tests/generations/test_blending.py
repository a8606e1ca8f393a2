"""Two teachers into one target: every formula against float64, its gradient, and its edges."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

import oracle
from conch_dna.generations.blending import (
    Strategy,
    all_outcomes,
    blend_teacher_predictions,
    calculate_confidence,
    choose,
    common_outcomes,
    confidence,
    disagreement,
    disagreement_regularizer,
    jensen_shannon_divergence,
    mixture,
    shares,
    smart_target_selection,
)
from conch_dna.generations.settings import CONFIDENCES

LOGITS = st.floats(-30, 30, width=32)


def made(shape: tuple[int, ...], seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).normal(size=shape)


def to_mx(values: np.ndarray) -> mx.array:
    return mx.array(np.asarray(values, np.float32))


def confidence_of(p: np.ndarray, method: str) -> np.ndarray:
    if method == "top1":
        return p.max(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p > 0, p * np.log(p), 0.0).sum(-1)
    return 1 - entropy / np.log(p.shape[-1])


def js_of(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return oracle.jsd(p, q) / np.log(2)


def numerical_gradient(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-5
        gradient[index] = (function(at + step) - function(at - step)) / 2e-5
    return gradient


@pytest.mark.parametrize("method", CONFIDENCES)
def test_confidence_is_its_formula(method: str) -> None:
    p = oracle.softmax(made((6, 11)))
    got = np.asarray(calculate_confidence(to_mx(p), method))
    np.testing.assert_allclose(got, confidence_of(p, method), rtol=1e-5)


@pytest.mark.parametrize("method", CONFIDENCES)
def test_certainty_is_1_and_no_idea_is_the_least(method: str) -> None:
    assert calculate_confidence(mx.array([0.0, 1.0, 0.0]), method).item() == 1
    least = calculate_confidence(mx.full((8,), 1 / 8), method).item()
    assert least == pytest.approx(1 / 8 if method == "top1" else 0, abs=1e-6)


def test_one_token_alone_is_certain() -> None:
    assert calculate_confidence(mx.array([1.0]), "entropy").item() == 1


def test_an_unknown_measure_of_confidence_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="top1 or entropy, not by 'margin'"):
        calculate_confidence(mx.array([1.0]), "margin")


def test_the_rest_is_no_token_however_large_it_is() -> None:
    log_probs = mx.log(mx.array([0.2, 0.1, 0.7]))
    assert confidence(log_probs, rest_tokens=100).item() == pytest.approx(0.2)


def test_the_rest_counts_as_equally_likely_tokens() -> None:
    p = np.array([0.5, 0.2] + [0.3 / 6] * 6)
    coarse = mx.log(mx.array([0.5, 0.2, 0.3]))
    got = confidence(coarse, "entropy", rest_tokens=6).item()
    assert got == pytest.approx(float(confidence_of(p, "entropy")), rel=1e-5)


def test_the_divergence_is_its_formula() -> None:
    p, q = oracle.softmax(made((6, 11))), oracle.softmax(made((6, 11), 1))
    got = np.asarray(jensen_shannon_divergence(to_mx(p), to_mx(q)))
    np.testing.assert_allclose(got, js_of(p, q), rtol=1e-4)


def test_identical_distributions_are_0_apart_and_disjoint_ones_1() -> None:
    p = mx.array([[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    q = mx.array([[0.0, 0.0, 0.9, 0.1], [0.1, 0.2, 0.3, 0.4]])
    got = jensen_shannon_divergence(p, q)
    assert got[0].item() == pytest.approx(1, abs=1e-6)
    assert got[1].item() == pytest.approx(0, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    p=numpy_arrays(np.float32, (3, 6), elements=LOGITS),
    q=numpy_arrays(np.float32, (3, 6), elements=LOGITS),
)
def test_the_divergence_lies_between_0_and_1_and_is_symmetric(p: Any, q: Any) -> None:
    logs = [to_mx(oracle.log_softmax(x)) for x in (p, q)]
    there, back = np.asarray(disagreement(*logs)), np.asarray(disagreement(*logs[::-1]))
    assert ((there >= 0) & (there <= 1)).all()
    np.testing.assert_allclose(there, back, atol=1e-6)


def test_a_gap_of_hundreds_of_nats_is_no_nan() -> None:
    """Exponentials underflow there; a divergence that divides by a mixture of 0 gives NaN."""
    first, second = (mx.array([[0.0, -400.0]]), mx.array([[-400.0, 0.0]]))
    assert disagreement(first, second).item() == pytest.approx(1, abs=1e-6)
    gradient = mx.grad(lambda x: disagreement(x, second).sum())(first)
    assert mx.isfinite(gradient).all().item()


def test_the_blend_is_the_weighted_mean_of_probabilities() -> None:
    first, second = made((5, 9)), made((5, 9), 1)
    got, weights = blend_teacher_predictions(to_mx(first), to_mx(second), 2.0)
    sure = [oracle.softmax(x).max(-1) for x in (first, second)]
    weight = sure[0] / (sure[0] + sure[1])
    soft = [oracle.softmax(x, 2.0) for x in (first, second)]
    expected = weight[:, None] * soft[0] + (1 - weight)[:, None] * soft[1]
    np.testing.assert_allclose(np.exp(np.asarray(got)), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(np.asarray(weights[0]), weight, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(weights[0] + weights[1]), 1, rtol=1e-6)


def test_blending_a_distribution_with_itself_changes_nothing() -> None:
    logits = to_mx(made((5, 9)))
    got, _ = blend_teacher_predictions(logits, logits, 1.0)
    np.testing.assert_allclose(
        np.asarray(got), oracle.log_softmax(np.asarray(logits)), rtol=1e-4, atol=1e-5
    )


def test_a_teacher_of_weight_0_says_nothing() -> None:
    first, second = (mx.log(mx.array([[0.5, 0.5]])), mx.array([[0.0, -mx.inf]]))
    got = mixture(first, second, mx.array([0.0]))
    assert np.exp(np.asarray(got)).tolist() == [[1.0, 0.0]]


def test_two_teachers_without_confidence_share_alike() -> None:
    first, second = shares(mx.array([0.0, 0.2]), mx.array([0.0, 0.6]))
    assert first.tolist() == pytest.approx([0.5, 0.25])
    assert second.tolist() == pytest.approx([0.5, 0.75])


TOKENS = {
    "agree": ([8.0, 0, 0, 0], [8.0, 0.1, 0, 0]),
    "agree, both unsure": ([0.5, 0, 0, 0], [0.4, 0, 0, 0]),
    "disagree, first sure": ([8.0, 0, 0, 0], [0, 8.0, 0, 0]),
    "disagree, first unsure": ([1.0, 0, 0, 0], [0, 0, 8.0, 0]),
}
CASES = [
    ("agree", True, Strategy.BLENDED, 1.0),
    ("agree", False, Strategy.BLENDED, 1.0),
    ("agree, both unsure", True, Strategy.BLENDED, 1.0),
    ("disagree, first sure", True, Strategy.T1_ONLY, 1.0),
    ("disagree, first sure", False, Strategy.T1_ONLY, 1.0),
    ("disagree, first unsure", True, Strategy.GOLD_FALLBACK, 0.5),
    ("disagree, first unsure", False, Strategy.SKIP, 0.0),
]


@pytest.mark.parametrize(("name", "has_gold", "strategy", "weight"), CASES)
def test_each_token_is_taught_by_what_can_be_trusted(
    name: str, has_gold: bool, strategy: Strategy, weight: float
) -> None:
    first, second = (mx.array([logits]) for logits in TOKENS[name])
    gold = mx.array([3]) if has_gold else None
    target, weights, chosen = smart_target_selection(first, second, gold)
    assert Strategy(chosen.item()) is strategy
    assert weights.item() == weight
    expected = {
        Strategy.BLENDED: blend_teacher_predictions(first, second, 2.0)[0],
        Strategy.T1_ONLY: to_mx(oracle.log_softmax(np.array(first), 2.0)),
        Strategy.GOLD_FALLBACK: mx.array([[-mx.inf, -mx.inf, -mx.inf, 0.0]]),
        Strategy.SKIP: target,
    }[strategy]
    np.testing.assert_allclose(np.asarray(target), np.asarray(expected), rtol=1e-5, atol=1e-6)


def test_tokens_of_one_text_are_chosen_one_by_one() -> None:
    first, second = (
        mx.array([list(x) for x in side]) for side in zip(*TOKENS.values(), strict=True)
    )
    *_, chosen = smart_target_selection(first, second, mx.array([3, 3, 3, -1]))
    names = [Strategy(number).name for number in chosen.tolist()]
    assert names == ["BLENDED", "BLENDED", "T1_ONLY", "SKIP"]


def test_the_thresholds_are_the_callers() -> None:
    first, second = (mx.array([logits]) for logits in TOKENS["disagree, first unsure"])
    blended = smart_target_selection(first, second, js_threshold=1.0)[2]
    alone = smart_target_selection(first, second, confidence_threshold=0.3)[2]
    assert (blended.item(), alone.item()) == (Strategy.BLENDED, Strategy.T1_ONLY)


def test_the_temperature_does_not_move_the_thresholds() -> None:
    first, second = (mx.array([logits]) for logits in TOKENS["disagree, first sure"])
    chosen = [
        smart_target_selection(first, second, temperature=t)[2].item() for t in (1.0, 2.0, 20.0)
    ]
    assert chosen == [Strategy.T1_ONLY] * 3


@pytest.mark.parametrize("name", ["js_threshold", "confidence_threshold"])
def test_a_threshold_outside_0_and_1_is_refused(name: str) -> None:
    one = mx.zeros(1)
    with pytest.raises(ValueError, match=f"{name} is 1.5; it lies between 0 and 1"):
        choose(one, one, one > 0, **{name: 1.5})


def test_teachers_over_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(1, 4\)"):
        smart_target_selection(mx.zeros((1, 3)), mx.zeros((1, 4)))


def regularizer_of(first: np.ndarray, second: np.ndarray, student: np.ndarray) -> np.ndarray:
    p, q, s = (oracle.softmax(x, 1.5) for x in (first, second, student))
    return (1 - js_of(p, q)) * oracle.kl(p, s)


def test_the_regularizer_and_its_gradient_are_their_formula() -> None:
    first, second, student = (made((3, 5), seed) for seed in range(3))
    got = disagreement_regularizer(to_mx(first), to_mx(second), to_mx(student), 1.5)
    np.testing.assert_allclose(
        np.asarray(got), regularizer_of(first, second, student), rtol=1e-4, atol=1e-6
    )
    gradient = mx.grad(
        lambda x: disagreement_regularizer(to_mx(first), to_mx(second), x, 1.5).sum()
    )(to_mx(student))
    expected = numerical_gradient(lambda x: regularizer_of(first, second, x).sum(), student)
    np.testing.assert_allclose(np.asarray(gradient), expected, atol=1e-5)


def test_disjoint_teachers_are_not_followed() -> None:
    first, second = mx.array([[50.0, 0, 0]]), mx.array([[0.0, 50, 0]])
    assert disagreement_regularizer(first, second, mx.zeros((1, 3))).item() == pytest.approx(
        0, abs=1e-5
    )


def outcomes_of(p: np.ndarray, ids: np.ndarray, nothing: int) -> tuple[np.ndarray, np.ndarray]:
    kept = np.take_along_axis(p, ids, axis=-1)
    rest = 1 - kept.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return ids, np.log(np.concatenate([kept, rest], axis=-1))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_common_outcomes_keep_all_mass_and_never_add_disagreement(data: Any) -> None:
    size, rows = 9, 3
    first, second = (
        oracle.softmax(data.draw(numpy_arrays(np.float64, (rows, size), elements=st.floats(-4, 4))))
        for _ in range(2)
    )
    kept = [data.draw(st.integers(1, size - 1)) for _ in range(2)]
    both = [
        outcomes_of(p, oracle.likeliest(np.log(p), k), size)
        for p, k in zip((first, second), kept, strict=True)
    ]
    ids, one, two = common_outcomes(both[0], both[1], size)
    for row in range(rows):
        shared = set(both[0][0][row].tolist()) & set(both[1][0][row].tolist())
        assert set(ids[row][ids[row] < size].tolist()) == shared
        for column, token in enumerate(ids[row]):
            expected = (first[row, token], second[row, token]) if token < size else (0, 0)
            assert np.exp([one[row, column], two[row, column]]) == pytest.approx(expected)
    for log_probs in (one, two):
        np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-9)
    fine = js_of(first, second)
    assert (js_of(np.exp(one), np.exp(two)) <= fine + 1e-9).all()


def test_outcomes_that_stand_for_no_token_are_never_common() -> None:
    ids = np.array([[1, 4, 4]])
    log_probs = np.log(np.array([[0.5, 1e-300, 1e-300, 0.5]]))
    log_probs[0, 1:3] = -np.inf
    found, one, two = common_outcomes((ids, log_probs), (ids, log_probs), 4)
    assert found.tolist() == [[1, 4, 4]]
    assert np.exp(one).tolist() == np.exp(two).tolist() == [[0.5, 0.0, 0.0, 0.5]]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_all_outcomes_are_what_is_known_and_the_rest_spread_evenly(data: Any) -> None:
    size, rows = 9, 3
    found = [
        oracle.softmax(data.draw(numpy_arrays(np.float64, (rows, size), elements=st.floats(-4, 4))))
        for _ in range(2)
    ]
    kept = [oracle.likeliest(np.log(p), data.draw(st.integers(1, size - 1))) for p in found]
    both = [outcomes_of(p, ids, size) for p, ids in zip(found, kept, strict=True)]
    one, two = all_outcomes(both[0], both[1], size)
    for p, ids in zip(found, kept, strict=True):
        known = np.zeros((rows, size), bool)
        np.put_along_axis(known, ids, True, axis=-1)
        rest = np.where(known, 0, p).sum(-1, keepdims=True)
        p[:] = np.where(known, p, rest / (~known).sum(-1, keepdims=True))
    for log_probs in (one, two):
        np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-9)
    np.testing.assert_allclose(js_of(np.exp(one), np.exp(two)), js_of(*found), atol=1e-6)


def test_teachers_that_keep_other_tokens_do_not_agree() -> None:
    """Over their common tokens alone, of which there are none, they would agree entirely."""
    first = np.array([[0, 1]]), np.log(np.array([[0.5, 0.3, 0.2]]))
    second = np.array([[2, 3]]), np.log(np.array([[0.5, 0.3, 0.2]]))
    _, one, two = common_outcomes(first, second, 100)
    assert js_of(np.exp(one), np.exp(two)) == pytest.approx(0)
    one, two = all_outcomes(first, second, 100)
    assert js_of(np.exp(one), np.exp(two)) > 0.7
