"""What a threshold promises holds as often as it says, on answers that it has not seen."""

import math

import numpy as np
import pytest

from conch_dna.cortex.calibration.confidence import calibrate
from conch_dna.cortex.calibration.guarantee import (
    STARTS,
    fewest_answers,
    guaranteed_threshold,
    p_value,
)
from conch_dna.errors import ConchError

RISKS = [0.05, 0.1, 0.3, 0.6]


def drawn(generator: np.random.Generator, count: int, *, graded: bool):
    """Confidences, and losses that are rarer where confidence is higher."""
    sure = generator.beta(4, 2, count)
    wrong = generator.random(count) < (1 - sure) ** 1.5
    return sure, wrong * (generator.random(count) if graded else 1.0)


def true_risk(threshold: float, *, graded: bool) -> float:
    sure, losses = drawn(np.random.default_rng(99), 400_000, graded=graded)
    return float(losses[sure >= threshold].mean())


class TestPValue:
    @pytest.mark.parametrize("risk", RISKS)
    @pytest.mark.parametrize("count", [5, 40, 200])
    def test_it_is_small_as_seldom_as_it_says(self, count, risk):
        """Where the true mean is the risk itself."""
        generator = np.random.default_rng(count)
        for losses in (
            (generator.random((3_000, count)) < risk).astype(float),
            generator.beta(2 * risk, 2 - 2 * risk, (3_000, count)),
        ):
            for level in (0.01, 0.2):
                small = [p_value(each, risk, level) <= level for each in losses]
                assert np.mean(small) <= level + 4 * math.sqrt(level / 3_000)

    @pytest.mark.parametrize("risk", RISKS)
    def test_so_many_right_answers_are_enough(self, risk):
        fewest, level = fewest_answers(risk, 0.95), 0.05 / STARTS
        assert p_value(np.zeros(fewest), risk, level) <= level
        assert p_value(np.zeros(fewest - 1), risk, level) > level
        assert fewest_answers(0.0, 0.95) is None and fewest_answers(1.0, 0.95) == 1

    def test_nothing_is_shown_by_nothing_and_shares_show_more(self):
        assert p_value(np.zeros(0), 0.1, 0.05) == 1.0
        assert p_value(np.full(50, 0.5), 0.1, 0.05) == 1.0
        halves, whole = np.full(100, 0.05), np.zeros(100)
        whole[::20] = 1.0
        assert p_value(halves, 0.1, 0.01) < 0.1 * p_value(whole, 0.1, 0.01)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize(("count", "risk"), [(100, 0.2), (400, 0.1)])
def test_the_promise_is_kept(count, risk, graded):
    broken, kept = 0, []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        fixed, _ = drawn(generator, count // 2, graded=graded)
        sure, losses = drawn(generator, count // 2, graded=graded)
        threshold = guaranteed_threshold(fixed, sure, losses, max_risk=risk, confidence=0.9)
        if threshold is not None:
            broken += true_risk_of(threshold, graded) > risk
            kept.append((sure >= threshold).mean())
    assert broken <= 200 * 0.1 + 3 * math.sqrt(200 * 0.09)
    # A promise that keeps nothing would be kept too.
    assert len(kept) > (100 if graded else 20) and np.mean(kept) > 0.3


_KNOWN: dict[tuple[float, bool], float] = {}


def true_risk_of(threshold: float, graded: bool) -> float:
    """By a grid of thresholds below it, where the risk is no smaller."""
    place = math.floor(threshold * 200) / 200
    if (place, graded) not in _KNOWN:
        _KNOWN[place, graded] = true_risk(place, graded=graded)
    return _KNOWN[place, graded]


def test_more_is_promised_by_keeping_less():
    sure, losses = drawn(np.random.default_rng(3), 1000, graded=True)
    found = [
        calibrate(sure, 1 - losses, max_risk=0.1, confidence=each, method="none")
        for each in (0.0, 0.5, 0.95)
    ]
    thresholds = [each.threshold for each in found]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[-1]
    assert "with probability 0.95" in found[-1].verdict
    assert "with probability" not in found[0].verdict


def test_the_held_out_answers_choose_no_threshold():
    """Those that are tested are of the other half, so that none is picked by what it shows."""
    sure, losses = drawn(np.random.default_rng(5), 200, graded=False)
    fixed = np.array([0.1, 0.5, 0.7, 0.9])
    found = guaranteed_threshold(fixed, sure, losses, max_risk=0.3, confidence=0.9)
    assert found in fixed


def test_all_wrong_keeps_nothing():
    fitted = calibrate([0.7] * 60, [0.0] * 60)
    assert fitted.threshold is None and "with probability 0.95" in fitted.verdict
    with pytest.raises(ConchError, match="cannot show a disagreement"):
        calibrate([0.7] * 60, [1.0] * 60, max_risk=0.05)
