"""The gates: a table of cases, intervals against their definition, and no promotion on nothing."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.generations.promotion import (
    GATES,
    GateSettings,
    gate_verdicts,
    paired_interval,
    tone_drift,
    validate_student_vs_teachers,
    word_distance,
)

PARENT = {"recall": 0.80, "generalize": 0.50}
GOOD = {"recall": 0.80, "generalize": 0.60, "tone_drift": 0.01, "law_violations": 0}

CASES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"recall": 0.75}, set()),  # exactly the margin
    ({"recall": 0.7499}, {"recall"}),
    ({"recall": 0.99}, set()),
    ({"generalize": 0.52}, set()),  # exactly the gain
    ({"generalize": 0.5199}, {"generalize"}),
    ({"generalize": 0.10}, {"generalize"}),
    ({"tone_drift": 0.05}, set()),
    ({"tone_drift": 0.0501}, {"tone_drift"}),
    ({"tone_drift": -0.3}, set()),
    ({"law_violations": 1}, {"law_violations"}),
    ({"law_violations": [0, 1, 0]}, {"law_violations"}),
    ({"law_violations": [0, 0, 0]}, set()),
    ({"recall": 0.1, "law_violations": 7}, {"recall", "law_violations"}),
    *[({name: nothing}, {name}) for name in GATES for nothing in (None, [], float("nan"))],
]


@pytest.mark.parametrize(("changes", "failed"), CASES)
def test_a_gate_fails_by_its_own_measure_alone(changes: dict[str, Any], failed: set[str]) -> None:
    child = {**GOOD, **changes}
    verdicts = gate_verdicts(child, PARENT)
    assert [verdict.gate for verdict in verdicts] == list(GATES)
    assert {verdict.gate for verdict in verdicts if not verdict.passed} == failed
    passed, message = validate_student_vs_teachers(child, PARENT)
    assert passed is (not failed)
    first = message.splitlines()[: len(failed)]
    assert {line.split(":")[0] for line in first} == failed, "the failed ones first"


@pytest.mark.parametrize("name", ["recall", "generalize"])
def test_a_parent_without_data_promotes_nothing(name: str) -> None:
    passed, message = validate_student_vs_teachers(GOOD, {**PARENT, name: []})
    assert not passed
    assert message.splitlines()[0] == (
        f"{name}: no data of the parent; nothing is promoted on no evidence"
    )


def test_the_thresholds_are_the_users() -> None:
    child = {"recall": 0.5, "generalize": 0.5, "tone_drift": 0.2, "law_violations": 2}
    settings = GateSettings(
        recall_margin=0.3, generalize_gain=0.0, max_tone_drift=0.2, max_law_violations=2
    )
    assert validate_student_vs_teachers(child, PARENT, settings=settings)[0]
    assert not validate_student_vs_teachers(child, PARENT)[0]


def test_the_grandparent_is_shown_and_has_no_say() -> None:
    passed, message = validate_student_vs_teachers(GOOD, PARENT, {"recall": 0.99})
    assert passed
    assert message.splitlines()[-1] == "recall of the grandparent: 0.9900"


def scores(shares: tuple[float, float], items: int = 60) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    draws = random.random(items)
    return (draws < shares[0]).astype(float), (draws < shares[1]).astype(float)


def test_the_interval_is_that_of_resampled_differences() -> None:
    child, parent = scores((0.7, 0.5))
    low, high = paired_interval(child, parent, confidence=0.9, seed=0)
    random = np.random.default_rng(7)
    draws = (child - parent)[random.integers(0, len(child), (20_000, len(child)))].mean(1)
    assert (low, high) == pytest.approx(np.quantile(draws, [0.05, 0.95]), abs=0.018)


def test_pairing_matters() -> None:
    """The same shares, but the items that are right are others: the interval is much wider."""
    child, parent = scores((0.6, 0.5))
    paired = paired_interval(child, parent, confidence=0.95, seed=0)
    mixed = paired_interval(child, np.roll(parent[::-1], 7), confidence=0.95, seed=0)
    assert mixed[1] - mixed[0] > 1.3 * (paired[1] - paired[0])


def test_items_that_all_differ_alike_have_no_width() -> None:
    ones = np.ones(5)
    assert paired_interval(ones, 0 * ones, confidence=0.95, seed=0) == (1.0, 1.0)


def test_a_gate_can_ask_for_the_lower_bound() -> None:
    """A gain that is measured on few items may be none."""
    parent = np.repeat([0.0, 1.0], 20)
    child = parent.copy()
    child[:2], child[-1] = 1, 0  # two more are right, and one is wrong
    measures = {**GOOD, "generalize": child}
    others = {**PARENT, "generalize": parent}
    as_measured = gate_verdicts(measures, others)[1]
    by_bound = gate_verdicts(measures, others, GateSettings(by_lower_bound=("generalize",)))[1]
    assert as_measured.passed and not by_bound.passed
    assert as_measured.figures["interval"] == by_bound.figures["interval"]
    assert "lower bound needed +0.0200" in by_bound.reason


def test_a_lower_bound_needs_the_same_items_of_both() -> None:
    settings = GateSettings(by_lower_bound=("recall",))
    verdict = gate_verdicts({**GOOD, "recall": [1, 1, 1]}, {**PARENT, "recall": [1, 0]}, settings)[
        0
    ]
    assert not verdict.passed
    assert "no interval of 3 and 2 scores" in verdict.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence": 1.0}, "confidence is 1.0: it must be above 0 and below 1"),
        ({"by_lower_bound": ("tone_drift",)}, "by_lower_bound names tone_drift"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConchError, match=message):
        GateSettings(**settings)


TEXTS = ["The cat sat.", "the dog: sat, the dog"]


def test_the_distance_of_words_is_their_divergence_in_bits() -> None:
    p, q = Counter({"the": 3, "cat": 1, "sat": 2, "dog": 2}), Counter({"the": 1, "cow": 3})
    words = sorted(p | q)
    first, second = (np.array([c[w] for w in words], float) / c.total() for c in (p, q))
    middle = (first + second) / 2
    expected = sum(
        0.5 * x * np.log2(x / m)
        for side in (first, second)
        for x, m in zip(side, middle, strict=True)
        if x > 0
    )
    assert word_distance(TEXTS, ["cow cow", "the COW"]) == pytest.approx(expected)


def test_the_same_words_are_0_apart_and_others_1() -> None:
    assert word_distance(TEXTS, TEXTS[::-1]) == pytest.approx(0, abs=1e-12)
    assert word_distance(TEXTS, ["Qdrant vectors"]) == pytest.approx(1)


def test_drift_is_what_the_child_is_further_away_than_its_parent() -> None:
    reference = ["the cat sat on the mat"]
    assert tone_drift(["lorem ipsum"], reference, reference) == pytest.approx(1)
    assert tone_drift(reference, ["lorem ipsum"], reference) == pytest.approx(-1)
    assert tone_drift(TEXTS, TEXTS, reference) == 0


def test_texts_without_words_are_as_far_away_as_can_be() -> None:
    """A child that answers nothing is refused by its gate, instead of ending the run."""
    assert word_distance([""], TEXTS) == 1
    assert tone_drift(["..."], TEXTS, TEXTS) == pytest.approx(1)


def test_a_reference_without_words_has_no_tone() -> None:
    with pytest.raises(ConchError, match="the reference has no words"):
        word_distance(TEXTS, ["!"])


def test_a_gate_names_the_texts_that_lost_most() -> None:
    lengths = ["4 to 9 tokens", "10 to 30 tokens"] * 20
    lost = np.array([0.2 if name.startswith("4") else 0.0 for name in lengths])
    child = {**GOOD, "recall": (0.8 - lost).tolist(), "slices": {"recall": {"length": lengths}}}
    [verdict] = [v for v in gate_verdicts(child, {**PARENT, "recall": [0.8] * 40}) if not v.passed]
    assert verdict.gate == "recall"
    assert verdict.figures["slice"]["slice"] == "4 to 9 tokens"
    assert verdict.reason.endswith("length 4 to 9 tokens is worst, lost (-0.2000)")
