"""Risk and coverage: what is wrong among the answers kept, the surest kept first.

Knows numbers and matplotlib's axes; nothing of calibrations, suites or EGO. To draw something else
beside the curves: a panel in `draw_risk_coverage`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.metrics import Reliability
from conch_dna.screen.presentation import drawing

Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class RiskCoverage:
    """What is wrong among the answers that are kept, when the surest ones are kept first.

    Attributes:
        confidence: The lowest confidence that is kept, falling.
        coverage: Share of the answers that this keeps, rising to 1.
        risk: Mean disagreement among them.
        area: Mean risk over every number of kept answers; equally sure ones come in any order.
    """

    confidence: tuple[float, ...]
    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    area: float


def risk_coverage(confidence: Numbers, outcome: Numbers) -> RiskCoverage:
    """The curve over every threshold that there is (El-Yaniv and Wiener 2010).

    Args:
        confidence: `[n]`; only their order counts.
        outcome: `[n]`, in [0, 1]: the share of each answer that EGO agrees with.

    Raises:
        ConchError: No answers, different lengths, NaN, or outcomes outside of [0, 1].
    """
    sure = np.asarray(confidence, dtype=np.float64)
    right = np.asarray(outcome, dtype=np.float64)
    if sure.ndim != 1 or sure.shape != right.shape or not len(sure):
        raise ConchError(
            f"confidences {sure.shape} and outcomes {right.shape} must be two lists of the same "
            "length, and not empty"
        )
    if np.isnan(sure).any() or not ((right >= 0) & (right <= 1)).all():
        raise ConchError("confidences must not be NaN, and outcomes must be shares from 0 to 1")
    levels, which, counts = np.unique(-sure, return_inverse=True, return_counts=True)
    wrong = np.bincount(which, weights=1 - right)
    # Each answer stands for the mean of those that are as sure as it is.
    share = np.repeat(wrong / counts, counts)
    area = float(np.mean(np.cumsum(share) / np.arange(1, len(share) + 1)))
    kept = np.cumsum(counts)
    risk = np.clip(np.cumsum(wrong) / kept, 0.0, 1.0)
    confidences, coverages, risks = (
        tuple(float(value) for value in column) for column in (-levels, kept / len(sure), risk)
    )
    return RiskCoverage(confidences, coverages, risks, area)


def draw_risk_coverage(
    path: Path,
    curves: Mapping[str, RiskCoverage],
    reliabilities: Mapping[str, Reliability] | None = None,
    *,
    title: str = "",
) -> None:
    """Draw risk over coverage, and beside it how right answers are for how sure, into a PNG.

    Args:
        path: The file to write.
        curves: What to draw, by the name it gets.
        reliabilities: How often answers of each bin of confidence are right, by the same names;
            without them there is one picture.
        title: Above both.
    """
    panels = 2 if reliabilities else 1
    with drawing(path, (5.5 * panels, 4.5)) as figure:
        left, *more = figure.subplots(1, panels, squeeze=False)[0]
        draw_curves(left, curves)
        for axes in more:
            axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
            for name, bins in (reliabilities or {}).items():
                # A bin of one answer must not look like one of fifty.
                sizes = [50 * count / max(bins.count) for count in bins.count]
                axes.scatter(bins.confidence, bins.outcome, s=sizes, alpha=0.7, label=name)
            axes.set(xlabel="confidence", ylabel="agreement with EGO", xlim=(0, 1), ylim=(0, 1))
            axes.set_aspect("equal")
        for axes in (left, *more):
            axes.grid(alpha=0.3)
        # Both panels have the same names in the same colours; a legend within would cover them.
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
        figure.suptitle(title, fontsize="medium")


def draw_curves(
    axes: Any, curves: Mapping[str, RiskCoverage], styles: Mapping[str, str] | None = None
) -> None:
    """Draw risk over coverage, a line for each curve, on matplotlib's axes.

    Args:
        axes: matplotlib's.
        curves: What to draw, by the name it gets.
        styles: Colour and dashes by the same names, such as C1--; by default a colour for each.
    """
    for number, (name, curve) in enumerate(curves.items()):
        style = (styles or {}).get(name, f"C{number}")
        axes.plot(curve.coverage, curve.risk, style, label=f"{name} (area {curve.area:.3f})")
    axes.set(xlabel="coverage: share that the neuron answers", ylabel="risk: disagreement with EGO")
    axes.set(xlim=(0, 1.02), ylim=(0, None))
