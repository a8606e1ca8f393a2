"""Bits by what rounding costs: never more than asked, more where more is lost, less lost in all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conch_dna.errors import ConchError
from conch_dna.exporting.mixed_bits import Cost, allocated
from conch_dna.exporting.settings import FuseSettings

WIDTHS = (2, 3, 4, 5, 6, 8)
COSTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.builds(Cost, kl=st.floats(0, 10), weights=st.integers(1, 10**9)),
    min_size=1,
    max_size=12,
)


def estimate(cost: Cost, width: int, measured: int) -> float:
    return cost.kl * 4.0 ** (measured - width)


class TestAllocated:
    @given(COSTS, st.floats(2, 8))
    def test_there_are_never_more_bits_than_asked(self, costs, mean):
        widths = allocated(costs, mean)
        total = sum(cost.weights for cost in costs.values())
        assert widths.keys() == costs.keys()
        assert set(widths.values()) <= set(WIDTHS)
        assert sum(widths[part] * costs[part].weights for part in costs) <= mean * total * (
            1 + 1e-9
        )

    @given(COSTS, st.integers(3, 8).filter(lambda mean: mean != 7))
    def test_by_the_estimate_nothing_is_lost_against_the_same_for_all(self, costs, mean):
        equal = {part: Cost(kl=cost.kl, weights=1) for part, cost in costs.items()}
        widths = allocated(equal, mean)
        same = sum(cost.kl for cost in equal.values())
        made = sum(estimate(equal[part], width, mean) for part, width in widths.items())
        assert made <= same * (1 + 1e-9)

    def test_who_loses_more_gets_more(self):
        costs = {"little": Cost(kl=0.01, weights=100), "much": Cost(kl=1.0, weights=100)}
        assert allocated(costs, 4.5) == {"little": 3, "much": 6}
        costs = {"small": Cost(kl=0.1, weights=10), "big": Cost(kl=0.1, weights=1000)}
        widths = allocated(costs, 4.0)
        assert widths["small"] > widths["big"]


def test_one_of_both():
    with pytest.raises(ConchError, match=r"bits is 4 and mean_bits 4\.5: leave one"):
        FuseSettings(bits="4", mean_bits=4.5)
    with pytest.raises(ConchError, match="mean_bits"):
        FuseSettings(mean_bits=1.5)
