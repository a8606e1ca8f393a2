"""How often an alarm of drift is false, and after how many answers a true one comes.

    python tests/benchmarks/drift_alarm.py [--draws 300] [--answers 5000]

Made up: raw confidences of a calibration choose the threshold themselves, live answers are drawn
alike or have drifted, from the first one on or after a thousand.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse

import numpy as np
from _setting import print_setting
from rich.console import Console

from conch_dna.cortex.calibration.drift import (
    LEVEL,
    Bets,
    expected_hand_overs,
    expected_mask,
)
from conch_dna.screen.presentation import text_table

CALM = 1_000


def first_alarms(values: np.ndarray, boundaries: np.ndarray, level: float) -> np.ndarray:
    """After how many values the stakes pass 1 / level `[draws]`; infinite where they do not.

    Args:
        values: `[draws, answers]`.
        boundaries: `[draws]`.
        level: Of this side.
    """
    bets, found = Bets(boundaries), np.full(len(values), np.inf)
    for place, column in enumerate(values.T, 1):
        bets.add(column)
        found[(bets.evidence >= 1 / level) & np.isinf(found)] = place
        # Draws that have an alarm are done; their stakes would grow without end.
        bets.stakes[np.isfinite(found)] = 0
    return found


def hand_overs(
    generator: np.random.Generator,
    draws: int,
    counts: tuple[int, int],
    rates: tuple[float, float],
    calm: int,
) -> tuple[np.ndarray, float]:
    """First alarms, and the mean upper bound.

    Args:
        generator: Draws.
        draws: How many calibrations.
        counts: Answers of calibration, and live ones.
        rates: Of hand-overs at calibration, and live.
        calm: Live answers before the drift.
    """
    values, bounds = [], []
    for _ in range(draws):
        # The threshold is an answer's confidence, so that the true rate is not the one expected.
        sure = np.sort(generator.random(counts[0]))
        place = round(rates[0] * counts[0])
        expected = expected_hand_overs(place, counts[0])
        true = float(sure[place]) if place < counts[0] else 1.0
        bounds.append((expected.at_most, 1 - expected.at_least))
        rate = np.full(counts[1], np.clip(true + rates[1] - rates[0], 0, 1))
        rate[:calm] = true
        values.append(generator.random(counts[1]) < rate)
    above, below = np.array(bounds).T
    live = np.array(values, float)
    up = first_alarms(live, above, LEVEL / 4)
    down = first_alarms(1 - live, below, LEVEL / 4)
    return np.minimum(up, down), float(above.mean())


def masses(
    generator: np.random.Generator,
    draws: int,
    counts: tuple[int, int],
    means: tuple[float, float],
    calm: int,
) -> tuple[np.ndarray, float]:
    """As `hand_overs`, for the mass under the mask: shares of a Beta law, most of them small."""

    def drawn(mean: float, shape: tuple[int, ...]) -> np.ndarray:
        return generator.beta(10 * mean, 10 * (1 - mean), shape)

    bounds = np.array([expected_mask(drawn(means[0], (counts[0],))).at_most for _ in range(draws)])
    values = drawn(means[1], (draws, counts[1]))
    values[:, :calm] = drawn(means[0], (draws, calm))
    return first_alarms(values, bounds, LEVEL / 2), float(bounds.mean())


def after(alarms: np.ndarray) -> str:
    """Median and ninth decile of answers to an alarm."""
    middle, late = np.quantile(alarms, [0.5, 0.9], method="lower")
    return " / ".join("none" if np.isinf(each) else f"{each:,.0f}" for each in (middle, late))


def main() -> None:
    """Draw, bet, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--answers", type=int, default=5_000)
    args = parser.parse_args()
    print_setting(f"{args.draws} calibrations each, {args.answers} live answers, level {LEVEL:g}")
    generator = np.random.default_rng(0)
    shifts = {
        "handed over": (hand_overs, 0.2, (0.2, 0.4, 0.6, 0.0)),
        "mask": (masses, 0.02, (0.02, 0.06, 0.2)),
    }
    rows = []
    for name, (draw, expected, lives) in shifts.items():
        for count in (40, 200, 1_000):
            for live in lives:
                size, shares = (count, args.answers), (expected, live)
                alarms, bound = draw(generator, args.draws, size, shares, 0)
                cells = [f"{np.isfinite(alarms).mean():.1%}", after(alarms)]
                if live != expected:
                    late, _ = draw(generator, args.draws, size, shares, CALM)
                    cells.append(after(late - CALM))
                figures = (f"{expected:.0%}", f"{bound:.1%}", f"{live:.0%}")
                rows.append((name, str(count), *figures, *cells, *["–"] * (3 - len(cells))))
    columns = ("watched", "calibrated on", "expected", "bound", "live", "alarms", "after", "late")
    print("after: answers from the drift on, p50 / p90; late: where 1,000 calm ones came before")
    Console(width=110).print(text_table("alarms of drift", columns, rows))


if __name__ == "__main__":
    main()
