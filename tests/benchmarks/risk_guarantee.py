"""How often a threshold's risk is above what was asked for, with and without a promise.

    python tests/benchmarks/risk_guarantee.py [--draws 1000] [--max-risk 0.1 0.2 0.3]

Made-up answers whose confidence tells how wrong they are: each either right or wrong, or wrong by a
share. Thresholds are chosen on 40 to 400 of them by `calibrate`, and their risk is taken from
400,000 others.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse

import numpy as np
from _setting import print_setting
from rich.console import Console

from conch_dna.cortex.calibration.confidence import calibrate
from conch_dna.errors import ConchError
from conch_dna.screen.presentation import text_table

COUNTS = (40, 100, 200, 400)
KINDS = ("right or wrong", "shares")


def answers(generator: np.random.Generator, count: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and agreements that are higher where confidence is."""
    sure = generator.beta(4, 2, count)
    wrong = (generator.random(count) < (1 - sure) ** 1.5).astype(float)
    return sure, 1 - wrong * (generator.random(count) if kind == "shares" else 1.0)


class Risk:
    """The true risk of what lies above a confidence, by many answers."""

    def __init__(self, kind: str) -> None:
        sure, right = answers(np.random.default_rng(99), 400_000, kind)
        order = np.argsort(-sure)
        self._sure = -sure[order]
        self._risk = np.cumsum(1 - right[order]) / np.arange(1, len(order) + 1)

    def __call__(self, threshold: float) -> float:
        kept = int(np.searchsorted(self._sure, -threshold, side="right"))
        return float(self._risk[kept - 1]) if kept else 0.0

    def coverage(self, threshold: float) -> float:
        """Share of all answers that are kept."""
        return float(np.searchsorted(self._sure, -threshold, side="right") / len(self._sure))


def row_of(kind: str, count: int, max_risk: float, draws: int, risk: Risk) -> tuple[str, ...]:
    """Both rules on as many draws."""
    cells = []
    for confidence in (0.95, 0.0):
        above, coverage = 0, []
        for seed in range(draws):
            sure, right = answers(np.random.default_rng(seed), count, kind)
            try:
                found = calibrate(
                    sure, right, method="none", max_risk=max_risk, confidence=confidence
                )
            except ConchError:
                break
            threshold = found.threshold
            above += threshold is not None and risk(threshold) > max_risk
            coverage.append(0.0 if threshold is None else risk.coverage(threshold))
        if coverage:
            cells += [f"{above / draws:.1%}", f"{np.mean(coverage):.0%}"]
        else:
            cells += ["too few", "–"]
    return kind, str(count), f"{max_risk:g}", *cells


def main() -> None:
    """Draw, calibrate, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--max-risk", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    args = parser.parse_args()
    print_setting(f"{args.draws} draws each")
    rows = []
    for kind in KINDS:
        risk = Risk(kind)
        rows += [
            row_of(kind, count, each, args.draws, risk)
            for each in args.max_risk
            for count in COUNTS
        ]
    columns = ("answers", "how many", "risk asked for", "0.95: above", "keeps", "0: above", "keeps")
    Console(width=110).print(text_table("risk above what was asked for", columns, rows))


if __name__ == "__main__":
    main()
