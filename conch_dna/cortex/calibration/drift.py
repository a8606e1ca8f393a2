"""Whether live answers are still of the kind that a calibration was made on, told by bets.

Knows numbers and JSON only: what calibration saw, and of each live answer whether it was handed
over and how much a schema's mask took; no clock, file, server or model. To watch another figure: a
kind in KINDS, a field of `Outcome` and of `Expectations`.

What is promised, for each kind of one domain: with probability 1 - LEVEL, over the draw of the
calibration's answers and of all later ones together, there is never an alarm, however often anybody
looks, as long as every live answer is drawn as the calibration's were. Half of LEVEL is for the
calibration's own error: the null's boundaries are confidence bounds, not its mean. The other half
is for the live answers: a stake is bet on each before it is seen, that the mean is beyond the
boundary, which makes no stake 1 / a times as large with a probability above a (Ville 1939; bets on
bounded means: Waudby-Smith and Ramdas 2023, arXiv 2010.09686). So that a late drift is found as
well as an early one, a part of the stake waits for each later answer to begin with, as in mixtures
over the time of a change (Shin, Ramdas and Rinaldo 2022, arXiv 2203.03532). An alarm stays.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from conch_dna.cortex.calibration.guarantee import p_value
from conch_dna.errors import ConchError

Kind = Literal["hand_over", "mask"]
KINDS: tuple[Kind, ...] = ("hand_over", "mask")
# Of a false alarm ever, for each kind of a domain: half by calibration's error, half by bets.
LEVEL = 0.01
# Bet together, as shares of the most that can be bet: large drifts are found by large bets soonest.
STAKES = np.array([0.03, 0.06, 0.12, 0.25, 0.5, 0.9])
# Answers of which the recent mean is told; alarms do not depend on it.
RECENT = 100


class Outcome(NamedTuple):
    """What is watched of one live answer.

    Attributes:
        handed_over: Whether the neuron's first answer did not stand: not sure enough, or not valid.
        removed: Mean share of probability that the schema took; None where it was written freely.
    """

    handed_over: bool
    removed: float | None


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What calibration saw of one figure, a share in [0, 1].

    Attributes:
        answers: Of how many.
        mean: Of them.
        at_least: Lower confidence bound of the true mean; 0 where only more is a drift.
        at_most: Upper one.

    Raises:
        ConchError: The figures contradict each other.
    """

    answers: int
    mean: float
    at_least: float
    at_most: float

    def __post_init__(self) -> None:
        shares = (self.at_least, self.mean, self.at_most)
        sound = (
            _is_count(self.answers)
            and self.answers > 0
            and all(isinstance(share, int | float) for share in shares)
            and 0 <= self.at_least <= self.mean <= self.at_most <= 1
            and self.at_least < 1
            and self.at_most > 0
        )
        if not sound:
            raise ConchError("the calibration's figures contradict each other: calibrate again")


@dataclass(frozen=True, kw_only=True)
class Expectations:
    """What live answers are compared with.

    Attributes:
        hand_over: Share of answers that do not stand at the calibration's threshold.
        mask: Share of probability that the schema took; None where there is no schema.
        max_tokens: Longest answer of the calibration; a longer one is judged by its beginning.
    """

    hand_over: Expected
    mask: Expected | None
    max_tokens: int

    def of(self, kind: Kind) -> Expected | None:
        """What is expected of a kind."""
        return self.hand_over if kind == "hand_over" else self.mask

    @classmethod
    def from_json(cls, document: Any) -> "Expectations":
        """The fields back from `dataclasses.asdict`.

        Raises:
            ConchError: A field is missing, unknown or of the wrong kind.
            TypeError: The same.
        """
        read: dict[str, Any] = {
            name: value if value is None or name == "max_tokens" else Expected(**value)
            for name, value in dict(document).items()
        }
        found = cls(**read)
        longest = found.max_tokens
        if not isinstance(found.hand_over, Expected) or not _is_count(longest) or not longest:
            raise ConchError("the calibration's figures contradict each other: calibrate again")
        return found


def expected_hand_overs(count: int, answers: int) -> Expected:
    """What a share of hand-overs lets expect, whichever threshold the answers themselves chose.

    The bounds of Clopper and Pearson (1934) at every place where a threshold may lie among the
    answers, which share the probability of error: those below a threshold are those of a half-line
    of raw confidences, however it was chosen.

    Args:
        count: Answers that did not stand.
        answers: All of them, one or more.
    """
    from scipy.special import betaincinv

    level = LEVEL / 4 / answers
    low = float(betaincinv(count, answers - count + 1, level)) if count else 0.0
    high = float(betaincinv(count + 1, answers - count, 1 - level)) if count < answers else 1.0
    return Expected(answers=answers, mean=count / answers, at_least=low, at_most=high)


def expected_mask(removed: Sequence[float]) -> Expected:
    """What the mass under the mask lets expect: its mean, and a bound above by `p_value`.

    Args:
        removed: Of each answer, in [0, 1]; one or more.
    """
    values = np.asarray(removed, np.float64)
    low, high = float(values.mean()), 1.0
    # What a larger mean explains is explained by every larger one: the p never rises.
    for _ in range(40):
        middle = (low + high) / 2
        if 0 < middle < 1 and p_value(values, middle, LEVEL / 2) <= LEVEL / 2:
            high = middle
        else:
            low = middle
    return Expected(answers=len(values), mean=float(values.mean()), at_least=0.0, at_most=high)


class Bets:
    """Stakes on the mean of values in [0, 1] being above a boundary; 1 in all before the first.

    Several series `[n]` can be bet on side by side.

    Args:
        boundary: In (0, 1], or `[n]` of them.

    Attributes:
        boundary: As given, `[...]`.
        stakes: What those that have begun have become, for each of STAKES `[..., 6]`.
        answers: How many values there were.
    """

    def __init__(self, boundary: float | np.ndarray) -> None:
        self.boundary = np.asarray(boundary, np.float64)
        self.stakes = np.zeros((*self.boundary.shape, len(STAKES)))
        self.answers = 0

    def add(self, value: float | np.ndarray) -> None:
        """Let bets on one more value `[...]` be won or lost."""
        # Of the whole stake 1 / log2(n + 2) is left after n answers: its parts fall off slowly.
        begun = self._left(self.answers) - self._left(self.answers + 1)
        self.answers += 1
        gain = np.asarray(value / self.boundary - 1)
        self.stakes = (self.stakes + begun) * (1 + STAKES * gain[..., None])

    @property
    def evidence(self) -> np.ndarray:
        """All stakes together `[...]`: ever 1 / a with a probability of at most a, by the null."""
        return np.asarray(self.stakes.mean(-1) + self._left(self.answers))

    @staticmethod
    def _left(answers: int) -> float:
        return 1 / math.log2(answers + 2)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is to be said of one kind.

    Attributes:
        kind: hand_over or mask.
        expected: What calibration saw.
        answers: Live ones counted.
        live: Their mean; None where there are none.
        recent: Of the last RECENT of them.
        drifted: When the alarm began, as it was told to `Drift.add`; empty without one.
    """

    kind: Kind
    expected: Expected
    answers: int
    live: float | None
    recent: float | None
    drifted: str

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        """One line for people, without the domain."""
        what = {
            "hand_over": "{} of {} answers did not stand{}; calibration: {} of {}",
            "mask": "{} of probability under the schema's mask in {} answers{}; calibration: {} "
            "in {}",
        }[self.kind]
        recent = ""
        if self.answers > RECENT and self.recent is not None:
            recent = f" ({_percent(self.recent)} in the last {RECENT})"
        expected = self.expected
        return what.format(
            "-" if self.live is None else _percent(self.live),
            self.answers,
            recent,
            _percent(expected.mean),
            expected.answers,
        )


def _percent(share: float) -> str:
    return f"{share:.1%}"


class _Tally:
    """One kind's live figures and bets."""

    def __init__(self, kind: Kind, expected: Expected) -> None:
        self.kind = kind
        self.expected = expected
        self.answers = 0
        self.total = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.drifted = ""
        self.above = Bets(expected.at_most)
        self.below = Bets(1 - expected.at_least) if kind == "hand_over" else None

    def add(self, value: float, now: str) -> None:
        self.answers += 1
        self.total += value
        self.recent.append(value)
        if self.drifted:
            # Bets that are won go on being won: without end they would be no numbers any more.
            return
        sides = [self.above]
        self.above.add(value)
        if self.below is not None:
            self.below.add(1 - value)
            sides.append(self.below)
        level = LEVEL / 2 / len(sides)
        if any(side.evidence >= 1 / level for side in sides):
            self.drifted = now

    @property
    def finding(self) -> Finding:
        recent = list(self.recent)
        return Finding(
            kind=self.kind,
            expected=self.expected,
            answers=self.answers,
            live=self.total / self.answers if self.answers else None,
            recent=sum(recent) / len(recent) if recent else None,
            drifted=self.drifted,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "answers": self.answers,
            "total": self.total,
            "recent": list(self.recent),
            "drifted": self.drifted,
            "bet_on": self.above.answers,
            "above": self.above.stakes.tolist(),
            "below": None if self.below is None else self.below.stakes.tolist(),
        }

    def take(self, document: Any) -> None:
        """Go on from what `to_json` gave.

        Raises:
            ValueError: It did not.
        """
        state = dict(document)
        stakes = [state["above"], *([] if self.below is None else [state["below"]])]
        sound = (
            set(state) == set(self.to_json())
            and _is_count(state["answers"])
            and _is_count(state["bet_on"])
            and state["bet_on"] <= state["answers"]
            and len(state["recent"]) == min(RECENT, state["answers"])
            and all(0 <= value <= 1 for value in state["recent"])
            # Sums of shares round.
            and 0 <= state["total"] <= state["answers"] * (1 + 1e-9)
            and isinstance(state["drifted"], str)
            and all(len(each) == len(STAKES) for each in stakes)
            and all(0 <= stake < math.inf for each in stakes for stake in each)
            and (self.below is not None or state["below"] is None)
        )
        if not sound:
            raise ValueError(f"its figures of {self.kind} contradict each other")
        self.answers, self.total = state["answers"], float(state["total"])
        self.recent.extend(map(float, state["recent"]))
        self.drifted = state["drifted"]
        sides = [self.above, *([] if self.below is None else [self.below])]
        for side, each in zip(sides, stakes, strict=True):
            side.stakes, side.answers = np.array(each, np.float64), state["bet_on"]


class Drift:
    """What live answers of one domain say against its calibration.

    Args:
        expected: Of the calibration.
        since: When the count began, in words.
    """

    def __init__(self, expected: Expectations, since: str) -> None:
        self.since = since
        self._tallies: dict[Kind, _Tally] = {}
        for kind in KINDS:
            if (each := expected.of(kind)) is not None:
                self._tallies[kind] = _Tally(kind, each)

    def add(self, outcome: Outcome, now: str) -> None:
        """Count a live answer.

        Args:
            outcome: Of it.
            now: What an alarm is to say of when it began.
        """
        values = {"hand_over": float(outcome.handed_over), "mask": outcome.removed}
        for kind, tally in self._tallies.items():
            if (value := values[kind]) is not None:
                tally.add(value, now)

    @property
    def kinds(self) -> set[Kind]:
        """Those that have an alarm."""
        return {kind for kind, tally in self._tallies.items() if tally.drifted}

    @property
    def findings(self) -> list[Finding]:
        """Of each kind that is watched."""
        return [tally.finding for tally in self._tallies.values()]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` goes on from; its size is bounded."""
        return {"since": self.since} | {
            kind: tally.to_json() for kind, tally in self._tallies.items()
        }

    @classmethod
    def from_json(cls, document: Any, expected: Expectations) -> "Drift":
        """Go on from what `to_json` gave, with the expectations of then.

        Raises:
            ConchError: It did not give that.
        """
        try:
            state = dict(document)
            drift = cls(expected, state.pop("since"))
            if not isinstance(drift.since, str) or set(state) != set(drift._tallies):
                raise ValueError("it has other fields than it should have")
            for kind, tally in drift._tallies.items():
                tally.take(state[kind])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConchError(f"what was counted of drift cannot be read: {error}") from error
        return drift


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
