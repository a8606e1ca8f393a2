"""Figures of merit: perplexity, agreement, the share of a gap closed, intervals of differences.

Knows nothing of models or files; everything here is plain arithmetic on numbers.
To add a metric: a function here, its column in `training/evaluation.py`, its case in the test.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000


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


def gap_closed(kl_before: float, kl_after: float) -> float | None:
    """Share of the KL divergence that training took away: `1 - after / before`.

    Returns:
        1 when nothing is left, 0 when nothing changed, negative when it grew; None when there
        was no gap (before is 0), where the share has no meaning.

    >>> gap_closed(0.5, 0.25)
    0.5
    """
    if kl_before <= 0:
        return None
    return 1.0 - kl_after / kl_before


def closed_gap(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """`gap_closed` of two models' figures: by the KL, or where there is none by that of chunks.

    Args:
        before: `TokenMetrics.to_json` of the model before training.
        after: Of the model after it.
    """
    name = "chunk_kl_nats" if before["kl_nats"] is None else "kl_nats"
    return gap_closed(before[name], after[name]) if before[name] is not None else None


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
    from scipy.stats import bootstrap

    difference = child - parent
    if len(difference) < 2 or np.ptp(difference) == 0:
        mean = float(difference.mean())
        return mean, mean
    found = bootstrap(
        (difference,),
        np.mean,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
