"""Plain arithmetic of metrics, on numbers that can be checked by hand."""

import json
import math

import pytest

from conch_dna.metrics import TokenMetrics, gap_closed, perplexity, token_metrics


def test_sums_are_divided_by_the_tokens() -> None:
    metrics = token_metrics(kl_sum=3.0, cross_entropy_sum=4 * math.log(8), agreeing=3, tokens=4)
    assert metrics.kl_nats == 0.75
    assert metrics.cross_entropy == pytest.approx(math.log(8))
    assert metrics.perplexity == pytest.approx(8)
    assert metrics.top1_agreement == 0.75
    assert metrics.tokens == 4


def test_fields_as_json() -> None:
    metrics = TokenMetrics(
        kl_nats=0.5, cross_entropy=1.0, perplexity=math.e, top1_agreement=0.25, tokens=7
    )
    assert json.loads(json.dumps(metrics.to_json())) == {
        "kl_nats": 0.5,
        "cross_entropy": 1.0,
        "perplexity": math.e,
        "top1_agreement": 0.25,
        "tokens": 7,
    }


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
