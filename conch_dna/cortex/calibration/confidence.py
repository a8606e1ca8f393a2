"""How sure an answer is, made to mean how often it agrees with EGO, and when EGO answers.

It knows numbers only: log-probabilities, and for each answer the share of it that EGO agrees with.
To add a way to calibrate: its name in METHODS, a fit in FITS, a branch in `Calibration.__call__`.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import read_json, write_json
from conch_dna.cortex.calibration.drift import Expectations
from conch_dna.cortex.calibration.guarantee import fewest_answers, guaranteed_threshold
from conch_dna.cortex.calibration.risk_coverage import Numbers, risk_coverage
from conch_dna.cortex.calibration.settings import METHODS, MIN_ANSWERS, CalibrationSettings
from conch_dna.errors import ConchError
from conch_dna.metrics import expected_calibration_error
from conch_dna.training.settings import validate_domain

logger = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.json"
# Bins of fewer held-out answers would measure chance.
MIN_IN_A_BIN = 5
# Log-probabilities of a softmax in float32 may pass 0 by rounding, not by more.
ROUNDING = 1e-3
# Confidences of 0 and 1 have no logit: those nearer to the ends than this count as this.
END = 1e-6
SLOPES, SHIFTS = (1e-3, 1e3), (-20.0, 20.0)


class TooFewAnswersError(ConchError):
    """There are fewer answers than what is asked of a calibration takes."""


def answer_confidence(log_probs: Numbers) -> float:
    """Exp of the mean log-probability of an answer's tokens: the same for any length.

    Args:
        log_probs: Of the tokens that the answer has, in nats, under the model at temperature 1.

    Returns:
        In [0, 1]; 0 for an answer without tokens, which says nothing.

    Raises:
        ConchError: A value is NaN or above 0.

    >>> answer_confidence([math.log(0.5), math.log(0.5)])
    0.5
    """
    values = np.asarray(log_probs, dtype=np.float64)
    if not (values <= ROUNDING).all():
        wrong = int(np.flatnonzero(~(values <= ROUNDING))[0])
        raise ConchError(
            f"log-probability {values[wrong]:g} of token {wrong} is not a number of at most 0: "
            "the model's weights may be damaged"
        )
    return min(1.0, math.exp(values.mean())) if len(values) else 0.0


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """From an answer's raw confidence to how often such answers agree with EGO.

    Attributes:
        method: isotonic, temperature or none.
        knots: isotonic: (raw, calibrated) pairs, neither ever falling, straight lines between.
        temperature: temperature: `sigmoid(logit(raw) / temperature + shift)`.
        shift: See temperature.
        threshold: The lowest calibrated confidence at which the neuron's own answer stands; None
            where nothing keeps the risk, so that EGO answers everything.
        max_risk: The share of disagreement that was allowed among the answers that are kept.
        confidence: The probability with which the threshold keeps it; 0 where it is not known.
        coverage: Share of the held-out answers that the threshold keeps.
        risk: Mean disagreement among those; None where there are none.
        ece_before: Expected calibration error of the raw confidence on the held-out answers.
        ece_after: Of the calibrated one.
        n_fit: On how many answers the map was fitted.
        n_held: On how many others the threshold was chosen and everything was measured.
        seed: Of the split.
        adapter_digest: The adapter that gave the answers.
        ego: The model that they were compared with.
        expected: What live answers are compared with; None where that was not kept.
    """

    method: str
    knots: tuple[tuple[float, float], ...] = ()
    temperature: float = 1.0
    shift: float = 0.0
    threshold: float | None
    max_risk: float
    confidence: float = 0.0
    coverage: float
    risk: float | None
    ece_before: float
    ece_after: float
    n_fit: int
    n_held: int
    seed: int
    adapter_digest: str
    ego: str
    expected: Expectations | None = None

    def __post_init__(self) -> None:
        _check_method(self.method)
        shares = [self.max_risk, self.confidence, self.coverage, self.ece_before, self.ece_after]
        shares += [share for share in (self.threshold, self.risk) if share is not None]
        shares += [value for knot in self.knots for value in knot]
        raw, calibrated = ([knot[side] for knot in self.knots] for side in (0, 1))
        sound = (
            all(0 <= share <= 1 for share in shares)
            and (self.threshold is None or self.risk is not None)
            and raw == sorted(set(raw))
            and calibrated == sorted(calibrated)
            and bool(self.knots) == (self.method == "isotonic")
            and 0 < self.temperature < math.inf
            and math.isfinite(self.shift)
            and all(isinstance(text, str) for text in (self.adapter_digest, self.ego))
            and all(isinstance(count, int) for count in (self.n_fit, self.n_held, self.seed))
        )
        if not sound:
            raise ConchError("the calibration's figures contradict each other: calibrate again")

    def __call__(self, raw: float) -> float:
        """The calibrated confidence, in [0, 1]; it never falls where the raw one rises.

        Args:
            raw: Exp of the mean log-probability of the answer's tokens.

        Raises:
            ValueError: It is no number from 0 to 1.
        """
        if not 0 <= raw <= 1:
            raise ValueError(f"confidence {raw} is not a number from 0 to 1")
        if self.method == "isotonic":
            return _between(self.knots, raw)
        if self.method == "temperature":
            return _sigmoid(_logit(raw) / self.temperature + self.shift)
        return float(raw)

    def should_fallback(self, confidence: float) -> bool:
        """Whether EGO should answer instead.

        Args:
            confidence: The calibrated one.
        """
        return self.threshold is None or not confidence >= self.threshold

    @property
    def verdict(self) -> str:
        """What the threshold means, in one line for people."""
        if self.threshold is None:
            shown = f" with probability {self.confidence:g}" if self.confidence else ""
            return (
                f"no threshold keeps the disagreement with EGO within {self.max_risk:g}{shown} on "
                f"{self.n_held} held-out answers: EGO answers everything"
            )
        promise = f", with probability {self.confidence:g}" if self.confidence else ""
        return (
            f"from a confidence of {self.threshold:.3f} the neuron answers itself: "
            f"{self.coverage:.0%} of {self.n_held} held-out answers, of which {self.risk:.1%} "
            f"disagree with EGO (at most {self.max_risk:g}{promise})"
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Any) -> "Calibration":
        """The fields back from `to_json`.

        Raises:
            ConchError: A field is missing, unknown or of the wrong kind.
        """
        names = {field.name for field in fields(cls)}
        # Calibrations of before promise nothing, and expect nothing of live answers.
        before = {"confidence": 0.0, "expected": None}
        document = {**before, **document} if isinstance(document, dict) else {}
        if set(document) != names:
            raise ConchError("the calibration has not the fields it should have: calibrate again")
        try:
            knots = tuple((float(raw), float(value)) for raw, value in document["knots"])
            expected = document["expected"]
            if expected is not None:
                expected = Expectations.from_json(expected)
            return cls(**{**document, "knots": knots, "expected": expected})
        except (TypeError, ValueError) as error:
            raise ConchError(
                f"the calibration cannot be read ({error}): calibrate again"
            ) from error


def _between(knots: Sequence[tuple[float, float]], raw: float) -> float:
    """The height at `raw` of straight lines through points; flat before and behind them."""
    after = bisect_right(knots, raw, key=lambda knot: knot[0])
    if after == 0:
        return knots[0][1]
    (left, low) = knots[after - 1]
    if after == len(knots):
        return low
    (right, high) = knots[after]
    return min(high, low + (high - low) * ((raw - left) / (right - left)))


def _logit(share: float) -> float:
    inside = min(max(share, END), 1 - END)
    return math.log(inside) - math.log1p(-inside)


def _sigmoid(logit: float) -> float:
    # One form for each sign, so that exp cannot overflow.
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))


def _fit_isotonic(raw: np.ndarray, agreement: np.ndarray) -> dict[str, Any]:
    """The least-squares map that never falls; answers of the same confidence are one point."""
    from scipy.optimize import isotonic_regression

    places, which, counts = np.unique(raw, return_inverse=True, return_counts=True)
    means = np.bincount(which, weights=agreement) / counts
    fitted = isotonic_regression(means, weights=counts)
    ends = {index for block in fitted.blocks for index in (block, block - 1)}
    kept = sorted(index for index in ends if 0 <= index < len(places))
    heights = np.clip(fitted.x, 0.0, 1.0)
    return {"knots": tuple((float(places[index]), float(heights[index])) for index in kept)}


def _fit_temperature(raw: np.ndarray, agreement: np.ndarray) -> dict[str, Any]:
    """Slope and shift of the logit with the least log loss; the slope stays positive."""
    from scipy.optimize import minimize

    logits = np.array([_logit(share) for share in raw])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * logits + parameters[1]
        error = np.array([_sigmoid(value) for value in z]) - agreement
        value = np.mean(np.logaddexp(0, z) - agreement * z)
        return float(value), np.array([np.mean(error * logits), np.mean(error)])

    # One confidence for all says nothing about a slope.
    slopes = SLOPES if np.ptp(logits) > 0 else (1.0, 1.0)
    tight = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    line = minimize(
        loss, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=[slopes, SHIFTS], options=tight
    )
    return {"temperature": float(1 / line.x[0]), "shift": float(line.x[1])}


FITS: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, Any]]] = {
    "isotonic": _fit_isotonic,
    "temperature": _fit_temperature,
    "none": lambda raw, agreement: {},
}


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ConchError(f"calibration method {method!r} is unknown: use {', '.join(METHODS)}")


def calibrate(
    raw: Numbers,
    agreement: Numbers,
    *,
    method: str = CalibrationSettings.method,
    max_risk: float = CalibrationSettings.max_risk,
    confidence: float = CalibrationSettings.confidence,
    seed: int = CalibrationSettings.seed,
    adapter_digest: str = "",
    ego: str = "",
) -> Calibration:
    """Fit the map on one half of the answers; choose the threshold and measure on the other.

    Args:
        raw: Confidence of each answer, exp of its tokens' mean log-probability.
        agreement: Share of each answer that EGO agrees with, in [0, 1].
        method: One of METHODS.
        max_risk: The mean disagreement allowed among the answers that EGO does not see.
        confidence: The probability with which that holds for answers to come; see
            `guaranteed_threshold`. 0 promises nothing.
        seed: Decides which answers are in which half.
        adapter_digest: The adapter that gave the answers.
        ego: The model they were compared with.

    Returns:
        Its threshold is the lowest that is shown to keep the disagreement within `max_risk`;
        without a promise the lowest at which the held-out answers do.

    Raises:
        ConchError: Fewer than 20 answers, or than could show what is asked for; values outside of
            [0, 1], or an unknown method.
    """
    _check_method(method)
    if not 0 <= max_risk <= 1:
        raise ConchError(f"max_risk {max_risk} is not a share from 0 to 1, such as 0.1")
    if not 0 <= confidence < 1:
        raise ConchError(f"confidence {confidence} is not a probability below 1, such as 0.95")
    sure, right = _checked(raw, agreement)
    fit, held = halves(len(sure), seed=seed)
    if confidence:
        _require_enough(len(held), max_risk, confidence)
    unchosen = Calibration(
        method=method,
        **FITS[method](sure[fit], right[fit]),
        threshold=None,
        max_risk=max_risk,
        confidence=confidence,
        coverage=0.0,
        risk=None,
        ece_before=0.0,
        ece_after=0.0,
        n_fit=len(fit),
        n_held=len(held),
        seed=seed,
        adapter_digest=adapter_digest,
        ego=ego,
    )
    calibrated = np.array([unchosen(share) for share in sure[held]])
    if confidence:
        fixed = np.array([unchosen(share) for share in sure[fit]])
        losses = 1 - right[held]
        threshold = guaranteed_threshold(
            fixed, calibrated, losses, max_risk=max_risk, confidence=confidence
        )
    else:
        curve = risk_coverage(calibrated, right[held])
        good = [place for place, risk in enumerate(curve.risk) if risk <= max_risk]
        threshold = curve.confidence[good[-1]] if good else None
    bins = bins_for(len(held))
    figures: dict[str, Any] = {
        "ece_before": expected_calibration_error(sure[held], right[held], bins=bins),
        "ece_after": expected_calibration_error(calibrated, right[held], bins=bins),
    }
    if threshold is not None:
        kept = calibrated >= threshold
        figures |= {"threshold": threshold, "coverage": float(kept.mean())}
        figures["risk"] = float(np.clip(1 - right[held][kept].mean(), 0, 1))
    return replace(unchosen, **figures)


def _require_enough(held: int, max_risk: float, confidence: float) -> None:
    fewest = fewest_answers(max_risk, confidence)
    if fewest is None:
        raise TooFewAnswersError(
            f"no number of answers can show a disagreement of {max_risk:g} with probability "
            f"{confidence:g}: give a higher --max-risk, or --confidence 0"
        )
    if held < fewest:
        raise TooFewAnswersError(
            f"{held} held-out answers cannot show a disagreement of at most {max_risk:g} with "
            f"probability {confidence:g}, were all of them right: {2 * fewest} answers would do, "
            "half of which are held out; or give a higher --max-risk, or --confidence 0, which "
            "promises nothing"
        )


def bins_for(count: int) -> int:
    """Of how many bins a calibration error is made: ten, or as many as hold five answers each."""
    return max(1, min(10, count // MIN_IN_A_BIN))


def halves(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which answers `calibrate` fits on, and which it holds out: places `[n]` in rising order."""
    order = np.random.default_rng(seed).permutation(count)
    middle = (count + 1) // 2
    return np.sort(order[:middle]), np.sort(order[middle:])


def _checked(raw: Numbers, agreement: Numbers) -> tuple[np.ndarray, np.ndarray]:
    columns = {"confidences": raw, "agreements": agreement}
    sure, right = (np.asarray(column, dtype=np.float64) for column in columns.values())
    if sure.ndim != 1 or sure.shape != right.shape:
        raise ConchError(
            f"confidences {sure.shape} and agreements {right.shape} must be two lists of the same "
            "length: give one of each for every answer"
        )
    if len(sure) < MIN_ANSWERS:
        raise TooFewAnswersError(
            f"{len(sure)} answers are too few to calibrate on: {MIN_ANSWERS} or more are needed"
        )
    for name, values in zip(columns, (sure, right), strict=True):
        wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
        if len(wrong):
            raise ConchError(
                f"{len(wrong)} of {len(values)} {name} are no numbers from 0 to 1, the first of "
                f"them {values[wrong[0]]:g} at place {wrong[0]}: leave those answers out"
            )
    return sure, right


def save_calibration(adapters_dir: Path, domain: str, calibration: Calibration) -> Path:
    """Write a domain's calibration beside its adapter; what was there is replaced.

    Raises:
        ConchError: The domain's name is no folder's, or the disk is full or not writable.
    """
    path = _file(adapters_dir, domain)
    write_json(path, calibration.to_json())
    return path


def load_calibration(
    adapters_dir: Path,
    domain: str,
    adapter_digest: str,
    *,
    report: Callable[[str], None] = logger.warning,
) -> Calibration | None:
    """A domain's calibration, if it is that of the adapter in use.

    Args:
        adapters_dir: The folder of all domains.
        domain: Its name.
        adapter_digest: Of the adapter in use.
        report: Gets the reason where there is no calibration to use.

    Returns:
        None where there is none, where it belongs to another adapter, or cannot be read.
    """
    path = _file(adapters_dir, domain)
    if not path.exists():
        report(f"{domain} is not calibrated: there is no {path}")
        return None
    try:
        calibration = Calibration.from_json(read_json(path, needs={}))
    except ConchError as error:
        report(f"the calibration {path} is left out: {error}")
        return None
    if calibration.adapter_digest != adapter_digest:
        report(
            f"the calibration {path} is left out: it is of the adapter "
            f"{calibration.adapter_digest[:12]!r}, and {adapter_digest[:12]!r} is in use; "
            "calibrate again"
        )
        return None
    return calibration


def _file(adapters_dir: Path, domain: str) -> Path:
    validate_domain(domain, with_own_data=True)
    return Path(adapters_dir) / domain / CALIBRATION_FILE
