"""A threshold whose risk is bounded with a probability that was asked for: Learn-then-Test.

Knows numbers only. Angelopoulos et al. 2021 (arXiv 2110.01052): thresholds that are fixed before
anybody looks at the held-out answers are tested from the strictest to the loosest, until one cannot
be shown to keep the risk. Another bound on a mean: in place of `p_value`.
"""

import math
from functools import lru_cache

import numpy as np

# The tests begin anew at so many of the thresholds, which share the probability of error: the
# strictest keep too few answers to show anything, and would end a single sequence at once.
STARTS = 4
# Of the stake, that a wrong answer may cost.
BOLDEST = 0.9
# Answers; nobody has more to calibrate by.
MOST = 100_000


@lru_cache
def fewest_answers(max_risk: float, confidence: float) -> int | None:
    """How many answers, all of them right, would show a risk; None where no number up to MOST does.

    Args:
        max_risk: The mean loss allowed.
        confidence: The probability with which it is kept.

    >>> fewest_answers(0.1, 0.95)
    47
    """
    if max_risk >= 1:
        return 1
    level = (1 - confidence) / STARTS
    if max_risk <= 0 or p_value(np.zeros(MOST), max_risk, level) > level:
        return None
    few, many = 0, MOST
    while many - few > 1:
        middle = (few + many) // 2
        if p_value(np.zeros(middle), max_risk, level) <= level:
            many = middle
        else:
            few = middle
    return many


def p_value(losses: np.ndarray, max_risk: float, level: float) -> float:
    """How likely so small losses are, were their true mean above `max_risk`: by betting.

    Waudby-Smith and Ramdas 2023 (arXiv 2010.09686): whoever bets, before each loss is seen, that it
    is smaller than `max_risk`, does not multiply a stake by 1 / p with a probability above p. Small
    variances make big bets, so that shares show more than wrong and right answers do.

    Args:
        losses: `[n]` in [0, 1], drawn alike; their order is part of the bet.
        max_risk: In (0, 1).
        level: The p that is wanted; bets are made to reach it.
    """
    if not len(losses):
        return 1.0
    seen = np.arange(1, len(losses) + 1)
    mean = (0.5 + np.cumsum(losses)) / (seen + 1)
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / (seen + 1)
    # Of the losses before each.
    variance = np.concatenate([[0.25], variance[:-1]])
    bet = np.sqrt(2 * math.log(1 / level) / (len(losses) * variance))
    bet = np.minimum(bet, BOLDEST / (1 - max_risk))
    most = float(np.cumsum(np.log1p(bet * (max_risk - losses))).max())
    return min(1.0, math.exp(-most))


def guaranteed_threshold(
    fixed: np.ndarray,
    confidences: np.ndarray,
    losses: np.ndarray,
    *,
    max_risk: float,
    confidence: float,
) -> float | None:
    """The lowest threshold that is shown to keep the risk of what lies at it or above.

    With probability `confidence` over the held-out answers, the mean loss of further answers of at
    least this confidence is at most `max_risk`.

    Args:
        fixed: Confidences of other answers, from which the thresholds come.
        confidences: Of the held-out answers `[n]`.
        losses: Of each, in [0, 1].
        max_risk: In [0, 1].
        confidence: In (0, 1).

    Returns:
        None where none can be shown to.
    """
    if max_risk >= 1:
        return 0.0
    thresholds = np.unique(fixed)[::-1]
    fewest = fewest_answers(max_risk, confidence)
    if fewest is None:
        return None
    # By the other answers' counts, so that nothing of the held-out ones chooses where to begin.
    expected = [(fixed >= each).mean() * len(confidences) for each in thresholds]
    first = next((n for n, count in enumerate(expected) if count >= fewest), len(expected) - 1)
    starts = {first + (len(thresholds) - 1 - first) * n // (STARTS - 1) for n in range(STARTS)}
    level = (1 - confidence) / STARTS
    loosest = -1
    for start in sorted(starts):
        # From where another sequence has been, it would come to the same end.
        for place in range(max(start, loosest + 1), len(thresholds)):
            kept = losses[confidences >= thresholds[place]]
            if p_value(kept, max_risk, level) > level:
                break
            loosest = place
    return None if loosest < 0 else float(thresholds[loosest])
