"""Plain arithmetic of metrics, on numbers that can be checked by hand."""

import json
import math

import pytest

from conch_dna.metrics import TokenMetrics, closed_gap, gap_closed, perplexity, token_metrics


def test_sums_are_divided_by_the_tokens() -> None:
    metrics = token_metrics(
        kl_sum=3.0,
        cross_entropy_sum=8 * math.log(8),
        agreeing=3,
        compared_tokens=4,
        chunk_kl_sum=1.5,
        chunks=5,
        tokens=8,
        text_bytes=6,
    )
    assert metrics.kl_nats == 0.75
    assert metrics.cross_entropy == pytest.approx(math.log(8))
    assert metrics.perplexity == pytest.approx(8)
    assert metrics.top1_agreement == 0.75
    assert metrics.chunk_kl_nats == pytest.approx(0.3)
    assert metrics.bits_per_byte == pytest.approx(8 * 3 / 6)
    assert (metrics.tokens, metrics.compared_tokens, metrics.chunks) == (8, 4, 5)


def test_what_nothing_stands_on_is_none() -> None:
    metrics = token_metrics(cross_entropy_sum=2.0, tokens=2)
    assert metrics.cross_entropy == 1.0
    assert metrics.kl_nats is None
    assert metrics.top1_agreement is None
    assert metrics.chunk_kl_nats is None
    assert metrics.bits_per_byte is None


def test_fields_as_json() -> None:
    fields = {
        "kl_nats": 0.5,
        "cross_entropy": 1.0,
        "perplexity": math.e,
        "top1_agreement": 0.25,
        "bits_per_byte": 1.5,
        "chunk_kl_nats": None,
        "tokens": 7,
        "compared_tokens": 6,
        "chunks": 0,
    }
    metrics = TokenMetrics(**fields)  # type: ignore[arg-type]
    assert json.loads(json.dumps(metrics.to_json())) == fields


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no held-out tokens.*add held-out text"):
        token_metrics(kl_sum=0.0, cross_entropy_sum=0.0, agreeing=0, tokens=0)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    assert perplexity(math.log(50_000)) == pytest.approx(50_000)
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == math.inf


@pytest.mark.parametrize(
    ("before", "after", "closed"),
    [(0.8, 0.2, 0.75), (0.8, 0.0, 1.0), (0.8, 0.8, 0.0), (0.4, 0.6, -0.5)],
)
def test_share_of_the_gap(before: float, after: float, closed: float) -> None:
    assert gap_closed(before, after) == pytest.approx(closed)


@pytest.mark.parametrize("before", [0.0, -1e-9])
def test_there_is_no_share_of_no_gap(before: float) -> None:
    assert gap_closed(before, 0.1) is None


@pytest.mark.parametrize(
    ("before", "after", "closed"),
    [
        ({"kl_nats": 0.8, "chunk_kl_nats": 4.0}, {"kl_nats": 0.2, "chunk_kl_nats": 3.0}, 0.75),
        ({"kl_nats": None, "chunk_kl_nats": 4.0}, {"kl_nats": None, "chunk_kl_nats": 3.0}, 0.25),
        ({"kl_nats": None, "chunk_kl_nats": None}, {"kl_nats": None, "chunk_kl_nats": None}, None),
    ],
)
def test_the_gap_is_that_of_chunks_where_no_token_can_be_compared(
    before: dict[str, float], after: dict[str, float], closed: float | None
) -> None:
    assert closed_gap(before, after) == (None if closed is None else pytest.approx(closed))
