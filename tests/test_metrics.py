"""Plain arithmetic of metrics, on numbers that can be checked by hand."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from conch_dna.metrics import (
    TokenMetrics,
    closed_gap,
    expected_calibration_error,
    perplexity,
    ranges_of,
    reliability,
    token_metrics,
    verdict,
    worst_slice,
)


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
    assert closed_gap({"kl_nats": before}, {"kl_nats": after}) == pytest.approx(closed)


@pytest.mark.parametrize("before", [0.0, -1e-9])
def test_there_is_no_share_of_no_gap(before: float) -> None:
    assert closed_gap({"kl_nats": before}, {"kl_nats": 0.1}) is None


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


class TestCalibrationError:
    shares = st.floats(0, 1)
    pairs = st.integers(1, 40).flatmap(
        lambda n: st.tuples(
            numpy_arrays(np.float64, n, elements=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.99, 1.0])),
            numpy_arrays(np.float64, n, elements=st.floats(0, 1)),
        )
    )

    def test_equal_bins_by_hand(self) -> None:
        """Bins {0.1, 0.2}, {0.6, 0.8}, {0.9, 1.0} with outcomes {0, 1}, {1, 1}, {1, 0}."""
        sure = np.array([0.9, 0.1, 0.6, 0.2, 1.0, 0.8])
        right = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
        found = reliability(sure, right, bins=3)
        assert found.confidence == pytest.approx((0.15, 0.7, 0.95))
        assert found.outcome == pytest.approx((0.5, 1.0, 0.5))
        assert found.count == (2, 2, 2)
        error = expected_calibration_error(sure, right, bins=3)
        assert error == pytest.approx((0.35 + 0.3 + 0.45) / 3)

    def test_bins_are_weighted_by_what_they_hold(self) -> None:
        sure = np.array([0.2] * 3 + [0.8])
        right = np.array([1.0, 0.0, 0.0, 1.0])
        assert reliability(sure, right, bins=2).count == (3, 1)
        error = expected_calibration_error(sure, right, bins=2)
        assert error == pytest.approx((3 * (1 / 3 - 0.2) + 0.2) / 4)

    def test_equal_confidences_lie_where_their_middle_does(self) -> None:
        """Six of eight are alike; the middle of them is the fifth of the eight, so behind half."""
        sure = np.array([0.1] * 2 + [0.5] * 6)
        assert reliability(sure, sure, bins=2).count == (2, 6)

    @given(pairs, st.integers(1, 12))
    def test_equal_confidences_share_a_bin_and_the_order_plays_no_part(self, pair, bins):
        sure, right = pair
        found = reliability(sure, right, bins=bins)
        assert sum(found.count) == len(sure) and min(found.count) > 0
        assert len(found.count) <= min(bins, len(set(sure)))
        assert list(found.confidence) == sorted(found.confidence)
        assert np.dot(found.count, found.outcome) == pytest.approx(right.sum())
        error = expected_calibration_error(sure, right, bins=bins)
        assert -1e-12 <= error <= 1 + 1e-12
        order = np.random.default_rng(0).permutation(len(sure))
        again = expected_calibration_error(sure[order], right[order], bins=bins)
        assert again == pytest.approx(error, abs=1e-12)
        # More cannot be found than the mean distance of single answers, nor less than that of all.
        assert error <= np.abs(sure - right).mean() + 1e-12
        assert error >= abs(sure.mean() - right.mean()) - 1e-12

    @given(numpy_arrays(np.float64, 30, elements=shares))
    def test_who_is_as_right_as_sure_has_none(self, sure):
        assert expected_calibration_error(sure, sure) == pytest.approx(0, abs=1e-12)

    def test_bins_hold_equal_numbers_where_confidences_differ(self) -> None:
        sure = np.random.default_rng(0).random(100) ** 4
        assert reliability(sure, sure).count == (10,) * 10

    @pytest.mark.parametrize(
        ("sure", "right", "bins", "words"),
        [
            ([], [], 10, "not empty"),
            ([0.5], [0.5, 0.5], 10, "two lists of the same length"),
            ([[0.5]], [[0.5]], 10, "two lists"),
            ([math.nan], [1.0], 10, "confidences must be numbers from 0 to 1"),
            ([0.5], [1.1], 10, "outcomes must be numbers from 0 to 1"),
            ([0.5], [1.0], 0, "bins 0 must be 1 or more"),
        ],
    )
    def test_what_cannot_be_binned(self, sure, right, bins, words) -> None:
        with pytest.raises(ValueError, match=words):
            expected_calibration_error(np.array(sure), np.array(right), bins=bins)


class TestVerdict:
    """Whether a sum over each example, divided by its tokens, has fallen."""

    @staticmethod
    def of(change: float, *, examples: int = 24, noise: float = 0.1, seed: int = 0):
        random = np.random.default_rng(seed)
        counts = random.integers(5, 50, examples).astype(float)
        before = np.stack([counts * random.uniform(0.5, 2, examples), counts])
        moved = counts * (change + random.normal(0, noise, examples))
        return verdict(before, np.stack([before[0] + moved, counts]), seed=seed)

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize(("change", "word"), [(-0.2, "better"), (0.2, "worse")])
    def test_planted_changes_are_found(self, change, word, seed):
        found = self.of(change, seed=seed)
        assert found["verdict"] == word
        low, high = found["interval"]
        assert low < found["difference"] < high

    def test_chance_alone_is_seldom_called_a_change(self):
        """Of 200 at 95%, 10 are to be expected and 24 are one in 30,000."""
        words = [self.of(0.0, seed=seed)["verdict"] for seed in range(200)]
        assert 200 - words.count("not shown to be better") <= 24

    def test_an_unchanged_student_is_not_shown_to_be_better(self):
        found = self.of(0.0, noise=0.0)
        assert found["verdict"] == "not shown to be better"
        assert found["interval"] == [0.0, 0.0]

    def test_too_few_examples_show_nothing(self):
        found = self.of(-0.2, examples=5, noise=0.0)
        assert (found["verdict"], found["interval"]) == ("not shown to be better", None)
        assert found["examples"] == 5
        assert self.of(-0.2, examples=6, noise=0.0)["verdict"] == "better"

    def test_examples_weigh_as_much_as_their_tokens(self):
        before = np.array([[1.0] * 7, [1.0] * 6 + [94.0]])
        after = np.array([[0.9] * 6 + [10.4], before[1]])
        assert verdict(before, after)["difference"] == pytest.approx((9.4 - 0.6) / 100)

    def test_examples_without_anything_to_compare_are_left_out(self):
        before = np.array([[1.0] * 8, [1.0] * 6 + [0.0] * 2])
        found = verdict(before, before - [[0.5] * 6 + [0.0] * 2, [0.0] * 8])
        assert (found["verdict"], found["examples"]) == ("better", 6)


class TestSlices:
    def planted(self, seed: int, *, loss: float, count: int = 60) -> Any:
        """Figures of examples of three domains, of which one got worse and the others better."""
        random = np.random.default_rng(seed)
        tokens = random.integers(10, 60, count).astype(float)
        domains = [("task", "debug", "memory")[n % 3] for n in range(count)]
        before = random.gamma(4.0, 0.1, count)
        after = before - 0.05 + 0.05 * random.normal(size=count)
        after += np.array([loss if name == "debug" else 0.0 for name in domains])
        pair = [np.stack([each * tokens, tokens]) for each in (before, after)]
        slices = {"domain": domains, "length": ranges_of(tokens.tolist(), "tokens")}
        return pair, slices

    def test_a_planted_loss_is_named_in_at_least_19_of_20_seeds(self):
        named = 0
        for seed in range(20):
            pair, slices = self.planted(seed, loss=0.12)
            found = worst_slice(*pair, slices, seed=seed)
            named += bool(found and found["lost"] and found["slice"] == "debug")
        assert named >= 19

    def test_where_nothing_was_planted_a_loss_is_claimed_in_few_seeds(self):
        claimed = 0
        for seed in range(40):
            pair, slices = self.planted(seed, loss=0.05)
            claimed += worst_slice(*pair, slices, seed=seed)["lost"]
        assert claimed <= 4

    def test_the_worst_examples_are_of_the_part(self):
        pair, slices = self.planted(0, loss=0.5)
        found = worst_slice(*pair, slices)
        assert len(found["worst"]) == 3
        assert {slices["domain"][place] for place in found["worst"]} == {"debug"}
        change = (pair[1] - pair[0])[0] / pair[0][1]
        assert change[found["worst"][0]] == max(change[np.array(slices["domain"]) == "debug"])
        assert found["difference"] == pytest.approx(0.45, abs=0.03)
        assert found["interval"][0] < found["difference"] < found["interval"][1]

    def test_parts_of_too_few_examples_and_the_whole_are_none(self):
        pair, _ = self.planted(0, loss=0.1, count=10)
        assert worst_slice(*pair, {"length": ["one"] * 10}) is None
        assert worst_slice(*pair, {"length": ["one"] * 5 + ["two"] * 5}) is None
        assert worst_slice(*pair, {}) is None

    def test_examples_without_a_figure_do_not_count(self):
        pair, slices = self.planted(0, loss=0.2)
        pair[0][1][:30] = pair[1][1][:30] = 0.0
        found = worst_slice(*pair, slices)
        assert found["examples"] <= 30
        assert all(place >= 30 for place in found["worst"])

    def test_equal_values_share_a_range(self):
        assert ranges_of([7, 7, 7, 7], "tokens") == ["7 to 7 tokens"] * 4
        assert len(set(ranges_of(list(range(30)), "tokens"))) == 3
