"""Figures of merit from sums over tokens: perplexity, agreement, the share of a gap closed.

Knows nothing of models or files; everything here is plain arithmetic on numbers.
To add a metric: a function here, its column in `training/evaluation.py`, its case in the test.
"""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class TokenMetrics:
    """How one model does on held-out text, per counted token.

    Attributes:
        kl_nats: KL(teacher‖model) at temperature 1, nats per token; 0 for the teacher itself.
        cross_entropy: Of the text's own tokens, nats per token.
        perplexity: exp(cross_entropy).
        top1_agreement: Share of positions where model and teacher prefer the same token.
        tokens: How many tokens the figures stand on.
    """

    kl_nats: float
    cross_entropy: float
    perplexity: float
    top1_agreement: float
    tokens: int

    def to_json(self) -> dict[str, float]:
        """The fields as a JSON object."""
        return asdict(self)


def perplexity(cross_entropy: float) -> float:
    """Exp of a cross-entropy in nats; infinite where that overflows a float."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


def token_metrics(
    *, kl_sum: float, cross_entropy_sum: float, agreeing: float, tokens: int
) -> TokenMetrics:
    """Divide sums over counted tokens by their number.

    Raises:
        ValueError: There are no tokens.
    """
    if tokens < 1:
        raise ValueError("no held-out tokens: nothing can be measured; add held-out text")
    cross_entropy = cross_entropy_sum / tokens
    return TokenMetrics(
        kl_nats=kl_sum / tokens,
        cross_entropy=cross_entropy,
        perplexity=perplexity(cross_entropy),
        top1_agreement=agreeing / tokens,
        tokens=tokens,
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
