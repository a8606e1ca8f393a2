"""The tests' own arithmetic in float64 NumPy, written from the definitions and not from the code.

Works on probabilities where the code works on their logarithms, so a slip in one shows in the
other. To add a divergence: its formula in DIVERGENCES; test_losses.py fails until it is there.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def log_softmax(logits: Array, temperature: float = 1.0) -> Array:
    """Log softmax of logits / temperature over the last axis; -inf for excluded tokens."""
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = scaled - scaled.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits: Array, temperature: float = 1.0) -> Array:
    """Probabilities at a temperature."""
    return np.exp(log_softmax(logits, temperature))


def kl(p: Array, q: Array) -> Array:
    """Σ p ln(p / q), where 0 ln 0 is 0 and p ln(p / 0) is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(axis=-1)


def jsd(p: Array, q: Array, beta: float = 0.5) -> Array:
    """The generalised Jensen-Shannon divergence; beta is the teacher's weight."""
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": jsd,
    "skewed_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skewed_reverse_kl": lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    "total_variation": lambda p, q: np.abs(p - q).sum(axis=-1) / 2,
}


def outcomes(logits: Array, kept_ids: Array, temperature: float = 1.0) -> Array:
    """Probabilities of the kept tokens and of all others together `[..., K + 1]`."""
    probabilities = softmax(logits, temperature)
    others = np.ones(probabilities.shape, bool)
    np.put_along_axis(others, kept_ids, False, axis=-1)
    kept = np.take_along_axis(probabilities, kept_ids, axis=-1)
    rest = np.where(others, probabilities, 0.0).sum(axis=-1, keepdims=True)
    return np.concatenate([kept, rest], axis=-1)


def likeliest(logits: Array, k: int) -> Array:
    """Ids of the k largest logits, the largest first."""
    return np.argsort(-np.asarray(logits, np.float64), axis=-1, kind="stable")[..., :k]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-ln of the label's probability, per position."""
    return -np.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[..., 0]


def kd_rows(
    logits: Array, kept_ids: Array, teacher: Array, temperature: float, divergence: str
) -> Array:
    """t² D per position; `teacher` holds probabilities of the K + 1 outcomes at t."""
    student = outcomes(logits, kept_ids, temperature)
    return temperature**2 * DIVERGENCES[divergence](teacher, student)


def slope(function: Callable[[Array], Array], point: Array, step: float = 1e-5) -> Array:
    """Derivative of a function of rows, `[..., V]` to `[...]`, by central differences."""
    point = np.asarray(point, np.float64)
    gradient = np.empty(point.shape)
    for column in range(point.shape[-1]):
        move = np.zeros(point.shape[-1])
        move[column] = step
        gradient[..., column] = (function(point + move) - function(point - move)) / (2 * step)
    return gradient


def worst_relative_error(found: Array, expected: Array) -> float:
    """Largest |found - expected| / |expected|."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float((np.abs(found - expected) / np.abs(expected)).max())


def error_of_gradient(found: Array, expected: Array) -> float:
    """Largest difference, relative to the largest entry of the expected gradient."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
