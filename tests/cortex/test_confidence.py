"""Confidence, its calibration and the hand-over, against formulas in float64 and by properties.

The oracle of isotonic regression is its min-max formula, that of the temperature a plain Newton
iteration; neither is what the module uses.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from conch_dna.cortex.calibration.confidence import (
    CALIBRATION_FILE,
    FITS,
    Calibration,
    answer_confidence,
    calibrate,
    halves,
    load_calibration,
    save_calibration,
)
from conch_dna.cortex.calibration.risk_coverage import draw_risk_coverage, risk_coverage
from conch_dna.cortex.calibration.settings import METHODS
from conch_dna.errors import ConchError
from conch_dna.metrics import expected_calibration_error, reliability

# Equal values are likely, which is where such code goes wrong.
shares = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
answers = st.integers(20, 60).flatmap(
    lambda n: st.tuples(*(numpy_arrays(np.float64, n, elements=shares) for _ in range(2)))
)


def overconfident(n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and answers that are right with the probability confidence squared."""
    rng = np.random.default_rng(seed)
    raw = rng.uniform(0.2, 1.0, n)
    return raw, (rng.random(n) < raw**2).astype(float)


def isotonic_oracle(raw: np.ndarray, agreement: np.ndarray) -> np.ndarray:
    """`max over a ≤ i of min over b ≥ i of the mean of agreement with confidences in [a, b]`."""
    levels = np.unique(raw)
    fitted = [
        max(
            min(agreement[(raw >= a) & (raw <= b)].mean() for b in levels if b >= level)
            for a in levels
            if a <= level
        )
        for level in raw
    ]
    return np.array(fitted)


def newton_oracle(raw: np.ndarray, agreement: np.ndarray) -> tuple[float, float]:
    """Slope and shift of the logit with the least log loss."""
    design = np.stack([np.log(raw / (1 - raw)), np.ones(len(raw))], axis=1)
    line = np.zeros(2)
    for _ in range(100):
        right = 1 / (1 + np.exp(-design @ line))
        hessian = (design * (right * (1 - right))[:, None]).T @ design
        line -= np.linalg.solve(hessian, design.T @ (right - agreement))
    return float(line[0]), float(line[1])


class TestAnswerConfidence:
    def test_it_is_the_geometric_mean_of_the_probabilities(self) -> None:
        probabilities = [0.9, 0.5, 0.2]
        expected = (0.9 * 0.5 * 0.2) ** (1 / 3)
        assert answer_confidence(np.log(probabilities)) == pytest.approx(expected, rel=1e-12)

    @given(st.lists(st.floats(-50, 0), min_size=1, max_size=20), st.integers(2, 4))
    def test_it_does_not_depend_on_the_length(self, log_probs, times):
        once, repeated = answer_confidence(log_probs), answer_confidence(log_probs * times)
        assert 0 <= once <= 1 and once == pytest.approx(repeated)

    @pytest.mark.parametrize(
        ("log_probs", "confidence"),
        [([], 0.0), ([0.0, 0.0], 1.0), ([-math.inf, 0.0], 0.0), ([5e-7], 1.0), ([-1e300], 0.0)],
    )
    def test_ends(self, log_probs: list[float], confidence: float) -> None:
        assert answer_confidence(log_probs) == confidence

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.1])
    def test_damaged_weights_show(self, wrong: float) -> None:
        with pytest.raises(ConchError, match=r"of token 1 is not a number of at most 0.*damaged"):
            answer_confidence([-1.0, wrong, math.nan])


class TestIsotonic:
    @settings(deadline=None, max_examples=60)
    @given(answers)
    def test_it_is_the_min_max_formula(self, pair):
        raw, agreement = pair
        fitted = Calibration(**blank("isotonic"), **FITS["isotonic"](raw, agreement))
        found = np.array([fitted(share) for share in raw])
        np.testing.assert_allclose(found, isotonic_oracle(raw, agreement), atol=1e-12)

    @settings(deadline=None)
    @given(answers, st.integers(1, 12))
    def test_no_calibration_error_is_left_on_its_own_answers(self, pair, bins):
        raw, agreement = pair
        fitted = Calibration(**blank("isotonic"), **FITS["isotonic"](raw, agreement))
        found = np.array([fitted(share) for share in raw])
        error = expected_calibration_error(found, agreement, bins=bins)
        assert error == pytest.approx(0, abs=1e-12)

    def test_between_answers_lies_a_straight_line_and_outside_a_flat_one(self) -> None:
        fitted = Calibration(**blank("isotonic"), knots=((0.2, 0.1), (0.4, 0.1), (0.6, 0.9)))
        assert [fitted(raw) for raw in (0.0, 0.2, 0.3, 0.4)] == [0.1] * 4
        assert fitted(0.5) == pytest.approx(0.5)
        assert fitted(0.55) == pytest.approx(0.7)
        assert fitted(0.6) == fitted(1.0) == 0.9


class TestTemperature:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.parametrize("soft", [False, True])
    def test_it_has_the_least_log_loss(self, seed: int, soft: bool) -> None:
        raw, agreement = overconfident(200, seed=seed)
        if soft:
            agreement = np.random.default_rng(seed).beta(8 * raw, 3)
        slope, shift = newton_oracle(raw, agreement)
        found = FITS["temperature"](raw, agreement)
        assert found["temperature"] == pytest.approx(1 / slope, rel=1e-4)
        assert found["shift"] == pytest.approx(shift, abs=1e-4)

    def test_the_formula(self) -> None:
        fitted = Calibration(**blank("temperature"), temperature=2.0, shift=-0.5)
        logit = math.log(0.8 / 0.2) / 2 - 0.5
        assert fitted(0.8) == pytest.approx(1 / (1 + math.exp(-logit)))

    @pytest.mark.parametrize("outcome", [0.0, 1.0, 0.3])
    def test_one_outcome_for_all_is_learned_within_bounds(self, outcome: float) -> None:
        raw = np.linspace(0, 1, 40)
        found = Calibration(
            **blank("temperature"), **FITS["temperature"](raw, np.full(40, outcome))
        )
        assert found(0.5) == pytest.approx(outcome, abs=0.01)

    def test_one_confidence_for_all_leaves_the_slope_alone(self) -> None:
        agreement = np.array([1.0, 0.0, 0.0, 0.0] * 5)
        found = FITS["temperature"](np.full(20, 0.9), agreement)
        assert found["temperature"] == 1.0
        assert Calibration(**blank("temperature"), **found)(0.9) == pytest.approx(0.25, abs=1e-6)

    def test_answers_that_disagree_the_surer_they_are_do_not_turn_it_round(self) -> None:
        raw = np.linspace(0.1, 0.9, 50)
        found = FITS["temperature"](raw, 1 - raw)
        assert found["temperature"] > 100


def blank(method: str) -> dict:
    """The fields that a map does not need."""
    return {
        "method": method,
        "threshold": None,
        "max_risk": 0.1,
        "coverage": 0.0,
        "risk": None,
        "ece_before": 0.0,
        "ece_after": 0.0,
        "n_fit": 10,
        "n_held": 10,
        "seed": 0,
        "adapter_digest": "d",
        "ego": "e",
    }


def test_every_method_of_the_settings_has_a_fit() -> None:
    assert tuple(FITS) == METHODS


class TestCalibrate:
    @settings(deadline=None, max_examples=50)
    @given(answers, st.sampled_from(sorted(FITS)), st.integers(0, 3))
    def test_it_never_falls_and_stays_a_share(self, pair, method, seed):
        fitted = calibrate(*pair, method=method, seed=seed, confidence=0)
        places = sorted({*np.linspace(0, 1, 101), *pair[0]})
        found = [fitted(place) for place in places]
        assert found == sorted(found)
        assert found[0] >= 0 and found[-1] <= 1

    @pytest.mark.parametrize("method", sorted(FITS))
    def test_the_error_falls_on_answers_it_has_not_seen(self, method: str) -> None:
        raw, agreement = overconfident(2000)
        fitted = calibrate(raw, agreement, method=method)
        assert fitted.n_fit == fitted.n_held == 1000
        # E[c − c²] for c uniform in [0.2, 1] is 0.1867.
        assert fitted.ece_before == pytest.approx(0.187, abs=0.03)
        if method == "none":
            assert fitted.ece_after == fitted.ece_before
        else:
            assert fitted.ece_after < 0.05

    @pytest.mark.parametrize("method", sorted(FITS))
    def test_figures_are_of_the_held_out_half_alone(self, method: str) -> None:
        raw, agreement = overconfident(300)
        fitted = calibrate(raw, agreement, method=method, max_risk=0.4, seed=5)
        fit, held = halves(300, seed=5)
        assert sorted([*fit, *held]) == list(range(300))
        found = np.array([fitted(share) for share in raw[held]])
        before = expected_calibration_error(raw[held], agreement[held])
        assert fitted.ece_before == before
        assert fitted.ece_after == expected_calibration_error(found, agreement[held])
        kept = found >= fitted.threshold
        assert fitted.coverage == pytest.approx(kept.mean())
        assert fitted.risk == pytest.approx(1 - agreement[held][kept].mean())
        # Other held-out outcomes change the figures and not the map.
        other = agreement.copy()
        other[held] = 1 - other[held]
        again = calibrate(raw, other, method=method, max_risk=0.4, seed=5)
        assert (again.knots, again.temperature) == (fitted.knots, fitted.temperature)
        assert again.ece_before != before

    @settings(deadline=None, max_examples=50)
    @given(answers, st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.sampled_from(sorted(FITS)))
    def test_the_threshold_is_the_lowest_that_keeps_the_risk(self, pair, max_risk, method):
        raw, agreement = pair
        fitted = calibrate(raw, agreement, method=method, max_risk=max_risk, confidence=0)
        _, held = halves(len(raw), seed=0)
        found, right = np.array([fitted(share) for share in raw[held]]), agreement[held]
        # 1e-9: sums in another order.
        good = [t for t in found if 1 - right[found >= t].mean() <= max_risk - 1e-9]
        some = [t for t in found if 1 - right[found >= t].mean() <= max_risk + 1e-9]
        if fitted.threshold is None:
            assert not good
            assert all(fitted.should_fallback(share) for share in (0.0, 0.5, 1.0, math.nan))
            assert "EGO answers everything" in fitted.verdict
        else:
            assert min(some) <= fitted.threshold <= min(good, default=1.0)
            assert [fitted.should_fallback(share) for share in found] == list(
                found < fitted.threshold
            )
            assert fitted.should_fallback(math.nan)
            assert f"{fitted.threshold:.3f} the neuron answers itself" in fitted.verdict

    def test_a_risk_of_one_keeps_everything(self) -> None:
        fitted = calibrate(*overconfident(100), max_risk=1.0)
        assert fitted.coverage == 1.0

    @pytest.mark.parametrize("method", sorted(FITS))
    @pytest.mark.parametrize("outcome", [0.0, 1.0])
    def test_constant_confidences_and_outcomes(self, method: str, outcome: float) -> None:
        fitted = calibrate([0.7] * 30, [outcome] * 30, method=method)
        kept = outcome == 1.0
        assert (fitted.threshold is not None) == kept and fitted.coverage == float(kept)
        assert fitted.ece_before == pytest.approx(abs(0.7 - outcome))
        if method != "none":
            assert fitted.ece_after == pytest.approx(0, abs=1e-3)

    def test_it_is_a_function_of_its_seed(self) -> None:
        raw, agreement = overconfident(100)
        assert calibrate(raw, agreement, seed=3) == calibrate(list(raw), list(agreement), seed=3)
        assert calibrate(raw, agreement, seed=3) != calibrate(raw, agreement, seed=4)

    @pytest.mark.parametrize(
        ("raw", "agreement", "options", "words"),
        [
            ([0.5] * 19, [1] * 19, {}, "19 answers are too few to calibrate on: 20 or more"),
            ([], [], {}, "0 answers are too few"),
            ([0.5] * 20, [1] * 21, {}, "two lists of the same length"),
            ([0.5] * 20 + [math.nan] * 2, [1] * 22, {}, "2 of 22 confidences.*nan at place 20"),
            ([0.5] * 20, [1] * 19 + [1.5], {}, "1 of 20 agreements.*1.5 at place 19"),
            ([0.5] * 20, [1] * 20, {"method": "platt"}, "'platt' is unknown: use isotonic, temp"),
            ([0.5] * 20, [1] * 20, {"max_risk": 1.5}, "max_risk 1.5 is not a share"),
            ([0.5] * 20, [1] * 20, {"max_risk": math.nan}, "max_risk nan is not a share"),
            ([0.5] * 20, [1] * 20, {"confidence": 1}, "confidence 1 is not a probability"),
            (
                [0.5] * 20,
                [1] * 20,
                {},
                "10 held-out answers cannot show .* 0.3 .*: 28 answers would",
            ),
            ([0.5] * 90, [1] * 90, {"max_risk": 0.0}, "no number of answers can show"),
        ],
    )
    def test_what_cannot_be_calibrated(self, raw, agreement, options, words) -> None:
        with pytest.raises(ConchError, match=words) as error:
            calibrate(raw, agreement, **options)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("raw", [-0.1, 1.1, math.nan])
    def test_a_confidence_is_a_share(self, raw: float) -> None:
        with pytest.raises(ValueError, match="not a number from 0 to 1"):
            calibrate(*overconfident(40))(raw)


class TestRiskCoverage:
    def test_by_hand(self) -> None:
        """Surest first: right, wrong, right; risks 0, 1/2, 1/3."""
        curve = risk_coverage([0.2, 0.9, 0.5], [1.0, 1.0, 0.0])
        assert curve.confidence == (0.9, 0.5, 0.2)
        assert curve.coverage == pytest.approx((1 / 3, 2 / 3, 1))
        assert curve.risk == pytest.approx((0, 1 / 2, 1 / 3))
        assert curve.area == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)

    def test_equally_sure_answers_come_in_any_order(self) -> None:
        """Two of them, one right: the mean area of both orders."""
        curve = risk_coverage([0.5, 0.5, 0.1], [1.0, 0.0, 1.0])
        assert curve.risk == pytest.approx((1 / 2, 1 / 3))
        areas = [(0 + 1 / 2 + 1 / 3) / 3, (1 + 1 / 2 + 1 / 3) / 3]
        assert curve.area == pytest.approx(sum(areas) / 2)

    @given(answers)
    def test_at_full_coverage_the_risk_is_that_of_all(self, pair):
        sure, right = pair
        curve = risk_coverage(sure, right)
        assert curve.coverage[-1] == 1.0
        assert curve.risk[-1] == pytest.approx(1 - right.mean())
        assert list(curve.confidence) == sorted(set(sure), reverse=True)
        # No order is better than one by the outcome itself, none worse than its reverse.
        low, high = (risk_coverage(order, right).area for order in (right, 1 - right))
        assert low - 1e-12 <= curve.area <= high + 1e-12

    @pytest.mark.parametrize(
        ("sure", "right", "words"),
        [
            ([], [], "not empty"),
            ([0.5], [1, 0], "same length"),
            ([math.nan], [1], "must not be NaN"),
            ([0.5], [math.nan], "shares from 0 to 1"),
        ],
    )
    def test_what_has_no_curve(self, sure, right, words) -> None:
        with pytest.raises(ConchError, match=words):
            risk_coverage(sure, right)


class TestDrawing:
    def test_a_picture_with_the_reliability_beside_it(self, tmp_path) -> None:
        raw, agreement = overconfident(200)
        fitted = calibrate(raw, agreement)
        found = np.array([fitted(share) for share in raw])
        curves = {"raw": risk_coverage(raw, agreement), "isotonic": risk_coverage(found, agreement)}
        sizes = []
        for bins in (None, {"raw": reliability(raw, agreement)}):
            path = tmp_path / f"{bool(bins)}.png"
            draw_risk_coverage(path, curves, bins, title="thinking")
            data = path.read_bytes()
            assert data.startswith(b"\x89PNG")
            sizes.append(int.from_bytes(data[16:20], "big"))
        assert sizes[1] == 2 * sizes[0]
        assert len(list(path.parent.iterdir())) == 2

    def test_no_legend_covers_a_curve(self, tmp_path, monkeypatch) -> None:
        from matplotlib.figure import Figure

        saved = []
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.append(self))
        raw, agreement = overconfident(200)
        curves = {"raw": risk_coverage(raw, agreement)}
        draw_risk_coverage(tmp_path / "a", curves, {"raw": reliability(raw, agreement)}, title="a")
        saved[0].canvas.draw()
        (legend,) = saved[0].legends
        for axes in saved[0].axes:
            assert axes.get_legend() is None
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())


class TestOnDisk:
    def fitted(self, **options) -> Calibration:
        options = {"confidence": 0, **options}
        return calibrate(*overconfident(100), adapter_digest="abc", ego="teacher", **options)

    @pytest.mark.parametrize("method", sorted(FITS))
    @pytest.mark.parametrize("max_risk", [0.0, 0.5])
    def test_what_is_saved_comes_back_bit_for_bit(self, method, max_risk, tmp_path) -> None:
        fitted = self.fitted(method=method, max_risk=max_risk)
        path = save_calibration(tmp_path, "thinking", fitted)
        assert path == tmp_path / "thinking" / CALIBRATION_FILE
        told: list[str] = []
        assert load_calibration(tmp_path, "thinking", "abc", report=told.append) == fitted
        assert not told

    def test_one_of_another_adapter_is_left_out(self, tmp_path) -> None:
        save_calibration(tmp_path, "thinking", self.fitted())
        told: list[str] = []
        assert load_calibration(tmp_path, "thinking", "xyz", report=told.append) is None
        assert len(told) == 1 and "'abc'" in told[0] and "'xyz' is in use" in told[0]

    def test_by_default_the_reason_is_logged(self, tmp_path, caplog) -> None:
        assert load_calibration(tmp_path, "thinking", "abc") is None
        assert "thinking is not calibrated: there is no" in caplog.text

    @pytest.mark.parametrize(
        "change",
        [
            {"threshold": "high"},
            {"threshold": 2.0},
            {"knots": [[0.5, 0.5], [0.4, 0.6]]},
            {"knots": [[0.1, 0.5], [0.4, 0.3]]},
            {"knots": [[0.1]]},
            {"knots": []},
            {"knots": 3},
            {"method": "platt"},
            {"method": []},
            {"temperature": 0.0},
            {"temperature": math.nan},
            {"shift": math.inf},
            {"ece_after": -0.1},
            {"adapter_digest": 7},
            {"n_held": "many"},
            {"expected": 7},
            {"expected": {}},
            {"expected": {"hand_over": None, "mask": None, "max_tokens": 9}},
            {"expected": {"hand_over": {"answers": 9}, "mask": None, "max_tokens": 9}},
            {"more": 1},
        ],
    )
    def test_one_that_was_altered_is_left_out(self, change, tmp_path) -> None:
        path = save_calibration(tmp_path, "thinking", self.fitted())
        document = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(document | change), encoding="utf-8")
        told: list[str] = []
        assert load_calibration(tmp_path, "thinking", "abc", report=told.append) is None
        assert len(told) == 1 and "calibration.json is left out" in told[0]

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000])
    def test_one_that_is_no_json_is_left_out(self, text, tmp_path) -> None:
        path = save_calibration(tmp_path, "thinking", self.fitted())
        path.write_bytes(text.encode("latin-1"))
        told: list[str] = []
        assert load_calibration(tmp_path, "thinking", "abc", report=told.append) is None
        assert "calibration.json is left out" in told[0]

    def test_a_missing_field_leaves_it_out(self, tmp_path) -> None:
        path = save_calibration(tmp_path, "thinking", self.fitted())
        document = json.loads(path.read_text(encoding="utf-8"))
        for name in document:
            less = {key: value for key, value in document.items() if key != name}
            path.write_text(json.dumps(less), encoding="utf-8")
            found = load_calibration(tmp_path, "thinking", "abc", report=lambda text: None)
            # Without these it is of before there were promises, or alarms of drift.
            assert (found is None) == (name not in ("confidence", "expected"))

    @pytest.mark.parametrize("domain", ["../other", "a/b", ""])
    def test_a_domain_is_a_folders_name(self, domain, tmp_path) -> None:
        with pytest.raises(ConchError, match="becomes a folder's name"):
            save_calibration(tmp_path, domain, self.fitted())
        with pytest.raises(ConchError, match="becomes a folder's name"):
            load_calibration(tmp_path, domain, "abc")
