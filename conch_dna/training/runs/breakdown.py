"""Where a student differs from its teacher, and how sure it is: held-out tokens in few bins.

Knows figures of tokens, as `evaluation` gives them, and puts them into evaluation.json; draws
nothing. To show another dependence: a key of `breakdown`, and a chart in `html_report`.
"""

from typing import Any

import numpy as np

from conch_dna.metrics import expected_calibration_error, reliability
from conch_dna.training.evaluation import TokenFigures

BINS = 10


def breakdown(
    before: TokenFigures,
    after: TokenFigures,
    teacher: tuple[np.ndarray, np.ndarray] | None,
) -> dict[str, Any]:
    """Held-out figures by what a token is like, small enough for evaluation.json.

    Args:
        before: Of the student before training.
        after: Of the same tokens after it.
        teacher: `evaluation.teacher_confidence`.

    Returns:
        `figure`: what is summed, kl_nats or where no token can be compared chunk_kl_nats.
        `by_position`: bins of the answer's 1st, 2nd, 3rd to 4th, 5th to 8th … token; `first` is
        that of each. `by_teacher_entropy`: about ten bins of equally many tokens; `mean` is the
        entropy of each in nats (None where no distributions are compared). Both hold `count`
        and the sums of KL, `before` and `after`, in nats. `calibration`: for `before`, `after` and
        where it is known `teacher` the bins of `metrics.reliability` (`confidence` against
        `outcome`, that the likeliest token was the text's own) with their `count`, and `ece`.
    """
    used = before.compared > 0
    place = np.frexp(before.place - 0.5)[1]
    numbers = np.arange(place.max() + 1)
    position = _sums(place, before, after, len(numbers))
    entropy = None
    known = used & np.isfinite(before.entropy)
    if known.any():
        edges = np.quantile(before.entropy[known], np.linspace(0, 1, BINS + 1)[1:-1])
        # Of equal edges only one is left, so equal entropies share a bin.
        which = np.searchsorted(np.unique(edges), before.entropy, side="right")
        which[~known] = 0
        entropy = _sums(which, before, after, BINS)
        totals = np.bincount(which[known], before.entropy[known], BINS)
        entropy = {"mean": totals / np.maximum(1, entropy["count"]), **entropy}
    sure = {"before": (before.confidence, before.right), "after": (after.confidence, after.right)}
    if teacher is not None:
        sure["teacher"] = teacher
    return {
        "figure": "kl_nats" if known.any() else "chunk_kl_nats",
        "by_position": _filled({"first": np.exp2(numbers - 1).astype(int) + 1, **position}),
        "by_teacher_entropy": None if entropy is None else _filled(entropy),
        "calibration": {name: _calibration(*pair) for name, pair in sure.items()},
    }


def _sums(
    which: np.ndarray, before: TokenFigures, after: TokenFigures, bins: int
) -> dict[str, np.ndarray]:
    """How many compared tokens each bin holds, and the sums of their KL `[bins]`."""
    weights = {"count": before.compared, "before": before.kl, "after": after.kl}
    return {name: np.bincount(which, values, bins) for name, values in weights.items()}


def _filled(columns: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """The bins that hold something."""
    filled = columns["count"] > 0
    columns = {**columns, "count": columns["count"].round().astype(int)}
    return {name: values[filled].tolist() for name, values in columns.items()}


def _calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    # Rounding may bring the probability of a sure token over 1 by the last bit.
    sure = np.minimum(np.asarray(confidence, np.float64), 1.0)
    bins = reliability(sure, right, bins=BINS)
    return {
        "confidence": list(bins.confidence),
        "outcome": list(bins.outcome),
        "count": list(bins.count),
        "ece": expected_calibration_error(sure, right, bins=BINS),
    }
