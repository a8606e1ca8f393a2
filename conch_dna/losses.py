"""Divergences between two distributions, and cross-entropy, as pure functions of arrays.

Knows nothing of models, tokens' meaning, masks' origin or training.
To add a divergence: write the function and its entry in LOSSES; the oracle table tests it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

Divergence = Callable[[mx.array, mx.array], mx.array]
SUM_BLOCK = 512
_LOG2_E = float(np.float32(math.log2(math.e)))
_LOG2_E_REST = math.log2(math.e) - _LOG2_E


def sum_last(values: mx.array) -> mx.array:
    """Sum over the last axis `[..., V]` to `[..., 1]`, block by block.

    On a CPU, MLX adds a row's terms one after the other, which costs 5e-5 of the sum of 32,000
    float32 probabilities and 2e-4 of that of 150,000; in blocks it costs less than 1e-6.
    """
    cut = values.shape[-1] // SUM_BLOCK * SUM_BLOCK
    if cut <= SUM_BLOCK:
        return values.sum(axis=-1, keepdims=True)
    blocks = values[..., :cut].reshape(*values.shape[:-1], -1, SUM_BLOCK).sum(axis=-1)
    tail = values[..., cut:].sum(axis=-1, keepdims=True)
    return blocks.sum(axis=-1, keepdims=True) + tail


def exponential(values: mx.array) -> mx.array:
    """`exp` of each value, float32.

    On a CPU MLX's takes 25 ns an element and its power 10, and is no less exact. The exponent is
    the value times log₂ e in two parts, since one float32 is off by the same 1e-8 everywhere, which
    adds up over a vocabulary.
    """
    if mx.default_device() != mx.cpu:
        return mx.exp(values)
    return mx.power(2.0, values * _LOG2_E + values * _LOG2_E_REST)


def log_sum_exp(logits: mx.array) -> mx.array:
    """`log Σ exp` over the last axis `[..., V]` to `[..., 1]`; see `sum_last` for its precision.

    Of excluded outcomes only (-inf) it is -inf, and its gradient 0 where MLX's own is NaN.
    """
    result: mx.array = _log_sum_exp(logits)[0]
    return result


def _log_sum_exp_forward(logits: mx.array) -> tuple[mx.array, ...]:
    largest = logits.max(axis=-1, keepdims=True)
    largest = mx.where(largest == -mx.inf, 0.0, largest)
    total = sum_last(exponential(logits - largest))
    return largest + mx.log(total), largest, total


def _log_sum_exp_backward(logits: mx.array, cotangents: Any, outputs: Any) -> mx.array:
    _, largest, total = outputs
    return exponential(logits - largest) * (cotangents[0] / mx.where(total == 0, 1.0, total))


# A gradient of its own, so that no exponentials wait in memory for the backward pass.
_log_sum_exp: Any = mx.custom_function(_log_sum_exp_forward)
_log_sum_exp.vjp(_log_sum_exp_backward)


def log_softmax(logits: mx.array, temperature: float = 1.0) -> mx.array:
    """Log-probabilities `log softmax(logits / temperature)` over the last axis, in float32.

    Args:
        logits: Scores `[..., V]`, any float dtype; differentiable.
        temperature: Above 0; larger is flatter.

    Returns:
        Natural-log probabilities `[..., V]`, float32, at most 0.
    """
    scaled = logits.astype(mx.float32) / temperature
    return scaled - log_sum_exp(scaled)


def forward_kl(teacher_log_probs: mx.array, student_log_probs: mx.array) -> mx.array:
    """Forward Kullback-Leibler divergence `Σ p (log p - log q)`, teacher p, student q.

    Args:
        teacher_log_probs: log p `[..., V]`, float32. An outcome of probability 0 may be -inf.
        student_log_probs: log q `[..., V]`, float32.

    Returns:
        Nats per position `[...]`, at least 0, and 0 only where p equals q.

    Source: Hinton, Vinyals and Dean (2015), "Distilling the Knowledge in a Neural Network", §2.

    >>> p, q = mx.log(mx.array([0.5, 0.5])), mx.log(mx.array([0.25, 0.75]))
    >>> round(forward_kl(p, q).item(), 4)
    0.1438
    """
    possible = teacher_log_probs > -mx.inf
    # The inner where keeps the gradient finite at outcomes the teacher excludes.
    difference = mx.where(possible, teacher_log_probs, 0.0) - mx.where(
        possible, student_log_probs, 0.0
    )
    return sum_last(mx.exp(teacher_log_probs) * difference).squeeze(-1)


def reverse_kl(teacher_log_probs: mx.array, student_log_probs: mx.array) -> mx.array:
    """Reverse divergence `Σ q (log q - log p)`; shapes and unit as `forward_kl`.

    Infinite where the student gives probability to an outcome that the teacher excludes.

    Source: Gu et al. (2024), "MiniLLM", §2.1.
    """
    return forward_kl(student_log_probs, teacher_log_probs)


def _log_mixture(first: mx.array, second: mx.array, weight: float) -> mx.array:
    """`log(weight exp(first) + (1 - weight) exp(second))`, elementwise."""
    excluded = (first == -mx.inf) & (second == -mx.inf)
    # The inner where keeps the gradient finite at outcomes that both exclude.
    mixture = mx.logaddexp(
        mx.where(excluded, 0.0, first) + mx.log(mx.array(weight)),
        mx.where(excluded, 0.0, second) + mx.log(mx.array(1 - weight)),
    )
    return mx.where(excluded, -mx.inf, mixture)


def generalised_jsd(
    teacher_log_probs: mx.array, student_log_probs: mx.array, *, beta: float = 0.5
) -> mx.array:
    """`beta KL(p‖m) + (1 - beta) KL(q‖m)` with `m = beta p + (1 - beta) q`.

    Args:
        teacher_log_probs: log p `[..., V]`, float32.
        student_log_probs: log q `[..., V]`, float32.
        beta: Weight of the teacher, strictly between 0 and 1.

    Returns:
        Nats per position `[...]`, between 0 and the entropy of (beta, 1 - beta).

    Raises:
        ValueError: beta is 0 or 1, where the divergence is 0 for any pair.

    Source: Agarwal et al. (2024), "On-Policy Distillation of Language Models", eq. 1.
    """
    if not 0.0 < beta < 1.0:
        instead = "reverse_kl" if beta >= 1.0 else "forward_kl"
        raise ValueError(
            f"beta is {beta}, where the generalised JSD is 0 for every pair: "
            f"use {instead}, or a beta strictly between 0 and 1"
        )
    mixture = _log_mixture(teacher_log_probs, student_log_probs, beta)
    return beta * forward_kl(teacher_log_probs, mixture) + (1 - beta) * forward_kl(
        student_log_probs, mixture
    )


def skewed_kl(
    teacher_log_probs: mx.array, student_log_probs: mx.array, *, skew: float = 0.1
) -> mx.array:
    """`KL(p ‖ s p + (1 - s) q)`: forward KL that stays finite; shapes as `forward_kl`.

    Source: Ko et al. (2024), "DistiLLM", §3.1.
    """
    return forward_kl(teacher_log_probs, _log_mixture(teacher_log_probs, student_log_probs, skew))


def skewed_reverse_kl(
    teacher_log_probs: mx.array, student_log_probs: mx.array, *, skew: float = 0.1
) -> mx.array:
    """`KL(q ‖ (1 - s) p + s q)`: reverse KL that stays finite; shapes as `forward_kl`.

    Source: Ko et al. (2024), "DistiLLM", §3.1.
    """
    return skewed_kl(student_log_probs, teacher_log_probs, skew=skew)


def total_variation(teacher_log_probs: mx.array, student_log_probs: mx.array) -> mx.array:
    """Half the L1 distance `½ Σ |p - q|` `[...]`, between 0 and 1; shapes as `forward_kl`."""
    difference = mx.exp(teacher_log_probs) - mx.exp(student_log_probs)
    return 0.5 * sum_last(mx.abs(difference)).squeeze(-1)


LOSSES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": generalised_jsd,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
}


def kept_and_rest(logits: mx.array, kept_ids: mx.array, temperature: float = 1.0) -> mx.array:
    """Coarsen a distribution to K kept tokens and one rest outcome.

    The rest is the log-sum-exp over the other tokens themselves, not `log(1 - Σ kept)`, so it
    keeps its full relative precision however small it is.

    Args:
        logits: Scores `[..., V]`, any float dtype; differentiable.
        kept_ids: Distinct token ids `[..., K]`, K at most V.
        temperature: Above 0.

    Returns:
        Log-probabilities `[..., K + 1]`, float32, the rest last (-inf where K equals V).
    """
    scaled = logits.astype(mx.float32) / temperature
    kept = mx.take_along_axis(scaled, kept_ids, axis=-1)
    others = mx.put_along_axis(scaled, kept_ids, mx.array(-mx.inf), axis=-1)
    outcomes = mx.concatenate([kept, log_sum_exp(others)], axis=-1)
    return outcomes - log_sum_exp(outcomes)


def _powered(values: mx.array, exponent: float) -> mx.array:
    if exponent == 1:
        return values
    return mx.square(values) if exponent == 2 else mx.power(values, exponent)


class Rest:
    """What a distribution gives to tokens that are not kept, at several temperatures.

    Of each token one exponential is taken, at the highest temperature; those at others are its
    powers.

    Args:
        logits: `[N, V]`, float32, at temperature 1.
        kept_ids: Distinct token ids `[N, K]`, K at most V.
        temperatures: Above 0.
        alone: Take one exponential for each temperature instead, so that what is said at one is
            the same to the bit whatever the others are.
    """

    def __init__(
        self,
        logits: mx.array,
        kept_ids: mx.array,
        temperatures: Sequence[float],
        *,
        alone: bool = False,
    ) -> None:
        others = mx.put_along_axis(logits, kept_ids, mx.array(-mx.inf), axis=-1)
        largest = others.max(axis=-1, keepdims=True)
        # Where everything is kept there are no others: their maximum is -inf and their share 0.
        self._largest = mx.where(largest == -mx.inf, 0.0, largest)
        others = others - self._largest
        if alone:
            self._powers = {t: exponential(others / t) for t in temperatures}
        else:
            base = max(temperatures)
            exp = exponential(others / base)
            self._powers = {t: _powered(exp, base / t) for t in temperatures}
        self._sums = {t: sum_last(powers) for t, powers in self._powers.items()}

    def log_sum(self, temperature: float) -> mx.array:
        """`log Σ exp(logit / t)` over these tokens `[N, 1]`, at one of the temperatures.

        It is -inf where there are none. Summed itself, not `log(1 - Σ kept)`, it is as exact
        however small it is.
        """
        return self._largest / temperature + mx.log(self._sums[temperature])

    def shares(self, temperature: float, total: mx.array) -> mx.array:
        """Each token's part `[N, V]` of a total `[N, 1]`, by its probability at t; 0 if kept."""
        summed = self._sums[temperature]
        return self._powers[temperature] * (total / mx.where(summed == 0, 1.0, summed))


def token_cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy `-log softmax(logits)[target]` of every position.

    Args:
        logits: Scores `[..., V]`, any float dtype; differentiable.
        targets: Token ids `[...]`, each between 0 and V - 1.

    Returns:
        Nats per position `[...]`, float32, at least 0.
    """
    logits = logits.astype(mx.float32)
    gold = mx.take_along_axis(logits, targets[..., None], axis=-1)
    return (log_sum_exp(logits) - gold).squeeze(-1)


def likelihood_kl(
    teacher_log_probs: mx.array, student_log_probs: mx.array, *, scale: float = 1.0
) -> mx.array:
    """How far two likelihoods of the same text are apart: `s KL(Bernoulli(P)‖Bernoulli(Q))`.

    P = exp(l_teacher / s) and Q = exp(l_student / s). It is the binary cross-entropy of P and Q
    less the entropy of P, which is constant, so it is 0 where the likelihoods agree; the factor
    s keeps the gradient's size independent of s, as t² does for a temperature. At s = 1 it is
    the divergence of the event "the text goes on so", a lower bound of the full KL.

    Args:
        teacher_log_probs: l_teacher, at most 0, float32, any shape; no gradient.
        student_log_probs: l_student, same shape; differentiable.
        scale: s, above 0.

    Returns:
        Nats, same shape, at least 0. Log-probabilities nearer to 0 than float32 can tell
        (2⁻²⁴) count as that.

    Source: approximate likelihood matching, Minixhofer, Vulić and Ponti (2025), "Universal
        Cross-Tokenizer Distillation via Approximate Likelihood Matching", §3.

    >>> round(likelihood_kl(mx.array(-1.0), mx.array(-2.0)).item(), 4)
    0.1699
    """
    resolution = -(2.0**-24)
    teacher = mx.minimum(mx.stop_gradient(teacher_log_probs), resolution) / scale
    student = mx.minimum(student_log_probs, resolution) / scale
    p, not_p = mx.exp(teacher), -mx.expm1(teacher)
    differences = (mx.log(not_p) - mx.log(-mx.expm1(student)), teacher - student)
    return scale * (not_p * differences[0] + p * differences[1])


def compute_ce_loss(logits: mx.array, targets: mx.array, ignore_index: int = -100) -> mx.array:
    """Mean cross-entropy over the targets that count.

    Args:
        logits: Student scores `[B, T, V]` (any leading axes), position i scoring `targets[i]`:
            the caller has already shifted.
        targets: Token ids `[B, T]`; `ignore_index` marks those that do not count.
        ignore_index: The mark.

    Returns:
        Nats per counted token, a scalar; NaN when nothing counts (0 / 0), which the batch maker
        refuses beforehand.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {logits.shape} and targets {targets.shape} do not fit: "
            "targets need the logits' shape without its last axis"
        )
    counted = targets != ignore_index
    losses = token_cross_entropy(logits, mx.where(counted, targets, 0))
    return mx.where(counted, losses, 0.0).sum() / counted.sum()


def compute_kd_loss(
    teacher_logits: mx.array,
    student_logits: mx.array,
    temperature: float = 2.0,
    *,
    mask: mx.array | None = None,
    divergence: str = "forward_kl",
) -> mx.array:
    """Distillation loss `t² D(p‖q)` as a mean over counted positions.

    p and q are the softmaxes of the logits over t. The factor t² keeps the size of the gradient
    independent of t.

    Args:
        teacher_logits: `[B, T, V]` (any leading axes); no gradient flows into them.
        student_logits: Same shape; differentiable.
        temperature: t, above 0.
        mask: `[B, T]`, true or 1 where the position counts; all count when absent.
        divergence: A key of LOSSES.

    Returns:
        Scalar; nats times t²; 0 when the logits differ only by a constant per position. NaN
        when the mask counts nothing.

    Raises:
        ValueError: The shapes differ, the temperature is not above 0, or the divergence is unknown.

    Source: Hinton, Vinyals and Dean (2015), §2.

    >>> teacher, student = mx.array([[2.0, 0.0]]), mx.array([[0.0, 2.0]])
    >>> round(compute_kd_loss(teacher, student, temperature=1.0).item(), 4)
    1.5232
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher logits {teacher_logits.shape} and student logits {student_logits.shape} "
            "differ in shape: use align_vocab_sizes for heads of unequal size"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
    if divergence not in LOSSES:
        raise ValueError(f"divergence {divergence!r} is unknown: use one of {sorted(LOSSES)}")
    teacher = log_softmax(mx.stop_gradient(teacher_logits), temperature)
    losses = LOSSES[divergence](teacher, log_softmax(student_logits, temperature))
    if mask is None:
        return temperature**2 * losses.mean()
    counted = mask.astype(mx.bool_)
    return temperature**2 * mx.where(counted, losses, 0.0).sum() / counted.sum()
