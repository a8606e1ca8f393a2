"""Bins of held-out tokens hold every token once, and the sums that were put into them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from conch_dna.training.evaluation import TokenFigures
from conch_dna.training.runs.breakdown import breakdown

PLACES = np.array([1, 2, 3, 4, 5, 8, 9, 1, 2, 3])
KL = np.arange(10) / 10


def figures(kl: np.ndarray = KL, **more: np.ndarray) -> TokenFigures:
    plain = TokenFigures(
        place=PLACES,
        kl=kl,
        compared=np.ones(10),
        entropy=np.arange(10) / 2,
        confidence=np.linspace(0.1, 1, 10),
        right=np.arange(10) % 2 == 0,
    )
    return replace(plain, **more)


def test_positions_are_binned_by_powers_of_two():
    found = breakdown(figures(), figures(KL / 2), None)
    assert json.loads(json.dumps(found)) == found
    position = found["by_position"]
    assert found["figure"] == "kl_nats"
    assert position["first"] == [1, 2, 3, 5, 9]
    assert position["count"] == [2, 2, 3, 2, 1]
    assert position["before"] == pytest.approx([0.7, 0.9, 1.4, 0.9, 0.6])
    assert position["after"] == pytest.approx([0.35, 0.45, 0.7, 0.45, 0.3])


def test_entropies_are_binned_by_equal_numbers_and_equal_ones_share_a_bin():
    entropy = breakdown(figures(), figures(), None)["by_teacher_entropy"]
    assert entropy["count"] == [1] * 10
    assert entropy["mean"] == pytest.approx(np.arange(10) / 2)
    assert entropy["before"] == pytest.approx(KL)
    flat = figures(entropy=np.ones(10))
    entropy = breakdown(flat, flat, None)["by_teacher_entropy"]
    assert entropy["mean"] == [1] and entropy["count"] == [10]
    assert entropy["before"] == pytest.approx([4.5])


def test_what_is_not_compared_is_in_no_bin():
    compared = np.array([0, 1] * 5)
    entropy = np.where(compared, np.arange(10) / 2, np.nan)
    part = figures(KL * compared, compared=compared, entropy=entropy)
    found = breakdown(part, part, None)
    for name in ("by_position", "by_teacher_entropy"):
        assert sum(found[name]["count"]) == 5
        assert sum(found[name]["before"]) == pytest.approx(2.5)
    chunks = figures(entropy=np.full(10, np.nan))
    found = breakdown(chunks, chunks, None)
    assert found["figure"] == "chunk_kl_nats" and found["by_teacher_entropy"] is None
    assert sum(found["by_position"]["count"]) == 10


def test_calibration_is_of_both_students_and_of_the_teacher_where_it_is_known():
    sure = np.array([0.9, 0.9, 0.9, 0.9]), np.array([True, True, True, False])
    found = breakdown(figures(), figures(confidence=np.full(10, 1 + 1e-7)), sure)["calibration"]
    assert list(found) == ["before", "after", "teacher"]
    assert found["teacher"]["confidence"] == pytest.approx([0.9])
    assert found["teacher"]["outcome"] == [0.75] and found["teacher"]["count"] == [4]
    assert found["teacher"]["ece"] == pytest.approx(0.15)
    assert found["after"]["confidence"] == [1.0] and found["after"]["ece"] == 0.5
    assert sum(found["before"]["count"]) == 10
    assert "teacher" not in breakdown(figures(), figures(), None)["calibration"]
