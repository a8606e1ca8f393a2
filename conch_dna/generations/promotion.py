"""Gates: the measures of a child and of its parent in, a decision with its reasons out.

Knows numbers and generated texts; nothing of models, training or files.
To add a gate: a function in GATES; it gets the measures of both and the settings.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.metrics import paired_interval

WORD = re.compile(r"\w+")

Metrics = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What a child must reach.

    Attributes:
        recall_margin: How much less than the parent it may recall; a share between 0 and 1.
        generalize_gain: How much more than the parent it must get right of the new domain.
        max_tone_drift: How much further than the parent's its words may lie from the reference.
        max_law_violations: Answers that may break a law.
        confidence: Of the intervals of differences, between 0 and 1.
        by_lower_bound: Names of gates whose difference must reach its bound with this confidence,
            not only as measured.
        seed: Of the resampling.
    """

    recall_margin: float = 0.05
    generalize_gain: float = 0.02
    max_tone_drift: float = 0.05
    max_law_violations: int = 0
    confidence: float = 0.95
    by_lower_bound: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ConchError(f"confidence {self.confidence:g} is not between 0 and 1, such as 0.95")
        unknown = sorted(set(self.by_lower_bound) - set(PAIRED))
        if unknown:
            raise ConchError(
                f"by_lower_bound names {', '.join(unknown)}: only {', '.join(PAIRED)} are "
                "differences with an interval"
            )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one gate says.

    Attributes:
        gate: Its name.
        passed: Whether the child may go on.
        reason: One line with the figures.
        figures: What it was decided on.
    """

    gate: str
    passed: bool
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)


Gate = Callable[[Metrics, Metrics, GateSettings], Verdict]


def _scores(metrics: Metrics, name: str) -> np.ndarray | None:
    """A figure as an array of one score an item; None where there is no evidence."""
    value = metrics.get(name)
    if value is None:
        return None
    scores = np.atleast_1d(np.asarray(value, np.float64))
    return scores if len(scores) and np.isfinite(scores).all() else None


def _paired(
    name: str, child: Metrics, parent: Metrics, settings: GateSettings, *, least: float
) -> Verdict:
    """Whether the difference of a score reaches `least`, or its lower bound does."""
    own, other = _scores(child, name), _scores(parent, name)
    if own is None or other is None:
        who = "the child" if own is None else "the parent"
        return Verdict(
            gate=name,
            passed=False,
            reason=f"{name}: no data of {who}; nothing is promoted on no evidence",
        )
    difference = float(own.mean() - other.mean())
    figures: dict[str, Any] = {
        "child": float(own.mean()),
        "parent": float(other.mean()),
        "difference": difference,
        "least": least,
        "items": len(own),
    }
    decisive, shown = difference, ""
    wants_bound = name in settings.by_lower_bound
    if len(own) == len(other) and len(own) > 1:
        low, high = paired_interval(own, other, confidence=settings.confidence, seed=settings.seed)
        figures["interval"] = [low, high]
        shown = f" [{low:+.4f}, {high:+.4f}]"
        decisive = low if wants_bound else difference
    elif wants_bound:
        return Verdict(
            gate=name,
            passed=False,
            reason=f"{name}: no interval of {len(own)} and {len(other)} scores; its lower bound "
            "was asked for, which needs the same items of both",
            figures=figures,
        )
    # A difference of exactly the margin passes, whatever the last bit of a float says.
    passed = decisive >= least or math.isclose(decisive, least, abs_tol=1e-9)
    bound = "lower bound " if wants_bound else ""
    return Verdict(
        gate=name,
        passed=passed,
        reason=f"{name}: {own.mean():.4f} against the parent's {other.mean():.4f}, difference "
        f"{difference:+.4f}{shown}; {bound}needed {least:+.4f}",
        figures=figures,
    )


def recall_gate(child: Metrics, parent: Metrics, settings: GateSettings) -> Verdict:
    """What earlier generations learned must not be forgotten: parent's recall less the margin."""
    return _paired("recall", child, parent, settings, least=-settings.recall_margin)


def generalize_gate(child: Metrics, parent: Metrics, settings: GateSettings) -> Verdict:
    """Held-out data of the new domain: the parent's score and the gain."""
    return _paired("generalize", child, parent, settings, least=settings.generalize_gain)


def _at_most(name: str, child: Metrics, most: float, *, words: str) -> Verdict:
    scores = _scores(child, name)
    if scores is None:
        return Verdict(
            gate=name,
            passed=False,
            reason=f"{name}: no data of the child; nothing is promoted on no evidence",
        )
    value = float(scores.sum())
    passed = value <= most or math.isclose(value, most, abs_tol=1e-9)
    return Verdict(
        gate=name,
        passed=passed,
        reason=f"{name}: {value:.4g} {words}; at most {most:g}",
        figures={"child": value, "most": most},
    )


def tone_gate(child: Metrics, parent: Metrics, settings: GateSettings) -> Verdict:
    """How much further from the reference the child's words lie than the parent's."""
    return _at_most("tone_drift", child, settings.max_tone_drift, words="more than the parent")


def law_gate(child: Metrics, parent: Metrics, settings: GateSettings) -> Verdict:
    """Answers that break a law."""
    return _at_most("law_violations", child, settings.max_law_violations, words="answers")


PAIRED = ("recall", "generalize")
GATES: dict[str, Gate] = {
    "recall": recall_gate,
    "generalize": generalize_gate,
    "tone_drift": tone_gate,
    "law_violations": law_gate,
}


def judge(child: Metrics, parent: Metrics, settings: GateSettings | None = None) -> list[Verdict]:
    """What every gate says, in their order."""
    settings = settings or GateSettings()
    return [gate(child, parent, settings) for gate in GATES.values()]


def validate_student_vs_teachers(
    student_metrics: Metrics,
    teacher1_metrics: Metrics,
    teacher2_metrics: Metrics | None = None,
    *,
    settings: GateSettings | None = None,
) -> tuple[bool, str]:
    """Whether a child replaces its parent.

    Args:
        student_metrics: `recall` and `generalize`, shares between 0 and 1 or one score an item in
            the same order as the parent's; `tone_drift`, see `tone_drift`; `law_violations`, how
            many answers break a law. What is missing fails its gate.
        teacher1_metrics: The parent's `recall` and `generalize`.
        teacher2_metrics: The grandparent's, for the message only: it has no say.
        settings: See `GateSettings`.

    Returns:
        Whether every gate passed, and a line for each, the failed ones first.

    >>> parent = {"recall": 0.8, "generalize": 0.5}
    >>> child = {"recall": 0.7, "generalize": 0.6, "tone_drift": 0.0, "law_violations": 0}
    >>> passed, message = validate_student_vs_teachers(child, parent)
    >>> print(passed, message.splitlines()[0])
    False recall: 0.7000 against the parent's 0.8000, difference -0.1000; needed -0.0500
    """
    verdicts = judge(student_metrics, teacher1_metrics, settings)
    lines = [v.reason for v in sorted(verdicts, key=lambda verdict: verdict.passed)]
    for name in PAIRED:
        scores = _scores(teacher2_metrics or {}, name)
        if scores is not None:
            lines.append(f"{name} of the grandparent: {scores.mean():.4f}")
    return all(verdict.passed for verdict in verdicts), "\n".join(lines)


def word_distance(texts: Sequence[str], reference: Sequence[str]) -> float:
    """Jensen-Shannon divergence, over ln 2, between the words of texts and of a reference.

    Words are runs of letters and digits in lower case. Few texts lie far from any reference by
    chance alone, so only texts of about the same length are compared with each other.

    Returns:
        Between 0, the same shares of the same words, and 1, no word in common.

    Raises:
        ConchError: One side has no word.
    """
    from scipy.spatial.distance import jensenshannon

    counts = [
        Counter(w for t in side for w in WORD.findall(t.lower())) for side in (texts, reference)
    ]
    for side, name in zip(counts, ("generated texts", "reference"), strict=True):
        if not side:
            raise ConchError(f"the {name} have no words, so tone cannot be measured: give texts")
    words = sorted(counts[0] | counts[1])
    first, second = (np.array([side[word] for word in words], np.float64) for side in counts)
    return float(jensenshannon(first, second, base=2) ** 2)


def tone_drift(child: Sequence[str], parent: Sequence[str], reference: Sequence[str]) -> float:
    """How much further the child's words lie from the reference than the parent's.

    Returns:
        Between -1 and 1; 0 where both lie as far, below 0 where the child lies closer.
    """
    return word_distance(child, reference) - word_distance(parent, reference)
