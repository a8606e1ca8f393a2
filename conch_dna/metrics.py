"""Figures of merit: perplexity, agreement, closed gaps, intervals and calibration.

Knows nothing of models or files; everything here is plain arithmetic on numbers.
To add a metric: a function here, its column in `training/evaluation.py`, its case in the test.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
# The figures of `TokenMetrics` by which two models can be compared example by example, in the
# order in which they say how far a student is from its teacher.
COMPARABLE = ("kl_nats", "chunk_kl_nats", "cross_entropy")
BETTER, NOT_SHOWN, WORSE = "better", "not shown to be better", "worse"
# If training changed nothing but chance, all of fewer examples would agree in over 5% of runs.
FEWEST_EXAMPLES = 6


@dataclass(frozen=True, kw_only=True)
class TokenMetrics:
    """How one model does on held-out text, per counted token.

    Attributes:
        kl_nats: KL(teacher‖model) at temperature 1, nats per token at which their distributions
            can be compared; 0 for the teacher itself, None where there is no such token.
        cross_entropy: Of the text's own tokens, nats per token.
        perplexity: exp(cross_entropy).
        top1_agreement: Share of those tokens where model and teacher prefer the same one.
        bits_per_byte: Of the text's own tokens, per byte of the text: comparable between
            tokenizers. None where the bytes are not known.
        chunk_kl_nats: KL of the event "the text goes on with its next chunk", nats per chunk; a
            chunk is the text between boundaries that both tokenizers have, so with the same
            tokenizer a token. None where there is no chunk.
        tokens: How many tokens the figures stand on.
        compared_tokens: How many of them kl_nats and top1_agreement stand on.
        chunks: How many chunks chunk_kl_nats stands on.
    """

    kl_nats: float | None
    cross_entropy: float
    perplexity: float
    top1_agreement: float | None
    bits_per_byte: float | None
    chunk_kl_nats: float | None
    tokens: int
    compared_tokens: int
    chunks: int

    def to_json(self) -> dict[str, float | None]:
        """The fields as a JSON object."""
        return asdict(self)


def perplexity(cross_entropy: float) -> float:
    """Exp of a cross-entropy in nats; infinite where that overflows a float."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


def token_metrics(
    *,
    cross_entropy_sum: float,
    tokens: int,
    kl_sum: float = 0.0,
    agreeing: float = 0.0,
    compared_tokens: int = 0,
    chunk_kl_sum: float = 0.0,
    chunks: int = 0,
    text_bytes: int = 0,
) -> TokenMetrics:
    """Divide sums over counted tokens, compared tokens, chunks and bytes by their numbers.

    Raises:
        ValueError: There are no tokens.
    """
    if tokens < 1:
        raise ValueError("no held-out tokens: nothing can be measured; add held-out text")
    cross_entropy = cross_entropy_sum / tokens
    bits = cross_entropy_sum / math.log(2)
    return TokenMetrics(
        kl_nats=kl_sum / compared_tokens if compared_tokens else None,
        cross_entropy=cross_entropy,
        perplexity=perplexity(cross_entropy),
        top1_agreement=agreeing / compared_tokens if compared_tokens else None,
        bits_per_byte=bits / text_bytes if text_bytes else None,
        chunk_kl_nats=chunk_kl_sum / chunks if chunks else None,
        tokens=tokens,
        compared_tokens=compared_tokens,
        chunks=chunks,
    )


def closed_gap(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Share of the KL divergence that training took away: `1 - after / before`.

    Of the tokens' KL, or where no token can be compared of that of chunks.

    Args:
        before: `TokenMetrics.to_json` of the model before training.
        after: Of the model after it.

    Returns:
        1 when nothing is left, 0 when nothing changed, negative when it grew; None when there
        was no gap (before is 0 or unknown), where the share has no meaning.

    >>> closed_gap({"kl_nats": 0.5}, {"kl_nats": 0.25})
    0.5
    """
    name = "chunk_kl_nats" if before["kl_nats"] is None else "kl_nats"
    if before[name] is None or before[name] <= 0:
        return None
    return float(1.0 - after[name] / before[name])


def paired_interval(
    child: np.ndarray, parent: np.ndarray, *, confidence: float, seed: int
) -> tuple[float, float]:
    """Bounds of the mean difference of scores of the same items, by a paired bootstrap.

    Args:
        child: Scores `[n]`.
        parent: Scores of the same items `[n]`.
        confidence: Between 0 and 1.
        seed: Of the resampling.

    Returns:
        Lower and upper bound (percentiles of 2,000 resamples); both the difference itself where
        all items differ alike.
    """
    difference = child - parent
    if len(difference) < 2 or np.ptp(difference) == 0:
        mean = float(difference.mean())
        return mean, mean
    return _ratio_interval(difference, np.ones(len(difference)), confidence=confidence, seed=seed)


def _ratio_interval(
    sums: np.ndarray, counts: np.ndarray, *, confidence: float, seed: int
) -> tuple[float, float]:
    """Bounds of Σ sums / Σ counts over items `[n]`, resampled with both together."""
    from scipy.stats import bootstrap

    interval = bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        batch=100,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def verdict(before: np.ndarray, after: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Whether a figure that should fall has fallen, by a paired bootstrap over examples.

    Args:
        before: Each example's sum and what it is divided by `[2, n]`, before training.
        after: The same examples' after it, in the same order.
        seed: Of the resampling.

    Returns:
        `verdict`: BETTER or WORSE where the 95% interval of the difference of the means (after
        less before, each example weighing as much as its count) lies on one side of 0, else, and
        with fewer than 6 examples, NOT_SHOWN; `difference`, `interval` (None with fewer),
        `confidence` and `examples`.
    """
    used = before[1] > 0
    change, counts = (after - before)[0, used], before[1, used]
    difference = float(change.sum() / counts.sum()) if len(counts) else 0.0
    interval, word = None, NOT_SHOWN
    if len(counts) >= FEWEST_EXAMPLES:
        interval = list(_ratio_interval(change, counts, confidence=0.95, seed=seed))
        if interval[1] < 0:
            word = BETTER
        elif interval[0] > 0:
            word = WORSE
    return {
        "verdict": word,
        "difference": difference,
        "interval": interval,
        "confidence": 0.95,
        "examples": len(counts),
    }


def ranges_of(values: Sequence[float], unit: str, *, parts: int = 3) -> list[str]:
    """Names of slices of about equally many values, from low to high.

    >>> ranges_of([4, 40, 5, 41, 6, 42], "tokens", parts=2)
    ['4 to 6 tokens', '40 to 42 tokens', '4 to 6 tokens', '40 to 42 tokens', ...]
    """
    numbers = np.asarray(values, dtype=np.float64)
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, parts + 1)[1:-1], method="higher"))
    which = np.searchsorted(edges, numbers, side="right")
    names = {}
    for part in np.unique(which):
        low, high = numbers[which == part].min(), numbers[which == part].max()
        names[part] = f"{low:.3g} to {high:.3g} {unit}"
    return [names[part] for part in which]


def worst_slice(
    before: np.ndarray, after: np.ndarray, slices: Mapping[str, Sequence[str]], *, seed: int = 0
) -> dict[str, Any] | None:
    """The part of held-out data for which a figure that should fall rose most surely.

    Of every part with at least 6 examples the interval of `verdict` is found, so wide that all
    of them together hold with 95%; the part whose lower bound is highest is named.

    Args:
        before: Each example's sum and what it is divided by `[2, n]`, before a change.
        after: The same examples' after it.
        slices: By what examples are told apart (such as "length"), the name of each one's part.
        seed: Of the resampling.

    Returns:
        `by`, `slice`, `difference`, its `interval` and `confidence`, `examples` (how many), `worst`
        (places of the three that lost most), and `lost`: whether the interval lies above 0.
        None where no part, or only the whole, has so many.
    """
    used = before[1] > 0
    change, counts = np.where(used, (after - before)[0], 0.0), np.where(used, before[1], 0.0)
    each = change / np.maximum(counts, 1e-12)
    parts = []
    for by, names in slices.items():
        labels = np.asarray(names)
        for name in dict.fromkeys(names):
            places = np.flatnonzero((labels == name) & used)
            if FEWEST_EXAMPLES <= len(places) < used.sum():
                parts.append((by, name, places))
    if not parts:
        return None
    confidence = 1 - 0.05 / len(parts)
    rows = []
    for by, name, places in parts:
        low, high = _ratio_interval(
            change[places], counts[places], confidence=confidence, seed=seed
        )
        rows.append((low, high, by, name, places))
    low, high, by, name, places = max(rows, key=lambda row: row[0])
    return {
        "by": by,
        "slice": name,
        "difference": float(change[places].sum() / counts[places].sum()),
        "interval": [low, high],
        "confidence": confidence,
        "examples": len(places),
        "worst": places[np.argsort(-each[places], kind="stable")[:3]].tolist(),
        "lost": low > 0,
    }


@dataclass(frozen=True)
class Reliability:
    """How often answers that are about equally sure are right, in bins from unsure to sure.

    Attributes:
        confidence: Mean confidence of each bin.
        outcome: Mean outcome of each bin.
        count: How many answers each bin holds; none is empty.
    """

    confidence: tuple[float, ...]
    outcome: tuple[float, ...]
    count: tuple[int, ...]


def reliability(confidence: np.ndarray, outcome: np.ndarray, *, bins: int = 10) -> Reliability:
    """Bins of about equal numbers of answers, by confidence.

    Answers of the same confidence share a bin, so the order of the answers plays no part.

    Args:
        confidence: `[n]`, in [0, 1].
        outcome: `[n]`, in [0, 1]: 1 for right, or the share that is right.
        bins: How many at most.

    Raises:
        ValueError: Nothing to bin, different lengths, or values outside of [0, 1].
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    outcome = np.asarray(outcome, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != outcome.shape or not len(confidence):
        raise ValueError(
            f"confidences {confidence.shape} and outcomes {outcome.shape} must be two lists of the "
            "same length, and not empty"
        )
    for name, values in (("confidences", confidence), ("outcomes", outcome)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name} must be numbers from 0 to 1")
    if bins < 1:
        raise ValueError(f"bins {bins} must be 1 or more")
    _, which, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    # The middle of equal confidences in the order of all decides on their bin.
    middle = (np.cumsum(counts) - counts / 2) / len(confidence)
    place = np.minimum((middle * bins).astype(int), bins - 1)[which]
    size = np.bincount(place, minlength=bins)
    filled = size > 0
    means = (
        np.bincount(place, weights=values, minlength=bins)[filled] / size[filled]
        for values in (confidence, outcome)
    )
    sure, right = (tuple(float(value) for value in mean) for mean in means)
    return Reliability(sure, right, tuple(int(count) for count in size[filled]))


def expected_calibration_error(
    confidence: np.ndarray, outcome: np.ndarray, *, bins: int = 10
) -> float:
    """Mean distance between confidence and outcome, over bins of about equal numbers of answers.

    `ECE = sum over bins of n_b / n · |mean confidence − mean outcome|` (Naeini et al. 2015; bins
    of equal mass: Nguyen and O'Connor 2015). It is biased upwards where bins hold few answers.

    Args:
        confidence: `[n]`, in [0, 1].
        outcome: `[n]`, in [0, 1].
        bins: How many at most.

    Returns:
        In [0, 1]; 0 where every bin is as right as it is sure.

    Raises:
        ValueError: There is nothing to bin, or it does not fit; `reliability` says what.

    >>> sure, right = np.array([0.75, 0.75, 0.5, 0.5]), np.array([1, 1, 1, 0])
    >>> expected_calibration_error(sure, right, bins=2)
    0.125
    """
    binned = reliability(confidence, outcome, bins=bins)
    gaps = np.abs(np.array(binned.confidence) - np.array(binned.outcome))
    return float(np.average(gaps, weights=binned.count))
