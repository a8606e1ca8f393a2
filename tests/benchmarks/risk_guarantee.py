"""How often a threshold's risk is above what was asked for, with and without a promise.

    python tests/benchmarks/risk_guarantee.py [--draws 1000] [--max-risk 0.1 0.2 0.3]
        [--model FOLDER --ego FOLDER --prompts FILE [--answers 1200] [--output FILE]]

Made-up answers whose confidence tells how wrong they are: each either right or wrong, or wrong by a
share. Thresholds are chosen on 40 to 400 of them by `calibrate`, and their risk is taken from
400,000 others. With --model, real ones instead: its answers to questions, judged by --ego; each
draw chooses a threshold on some of them, and takes its risk from the rest.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _setting import print_setting
from rich.console import Console

from conch_dna.checkpoints import read_json, write_json
from conch_dna.cortex.calibration.calibrating import NeuronAnswer, agreement_with_ego
from conch_dna.cortex.calibration.confidence import calibrate
from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.batching import AnswerEngine, Request
from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.screen.presentation import text_table
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.data.answers import continuation_text

COUNTS = (40, 100, 200, 400)
KINDS = ("right or wrong", "shares")


def answers(generator: np.random.Generator, count: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and agreements that are higher where confidence is."""
    sure = generator.beta(4, 2, count)
    wrong = (generator.random(count) < (1 - sure) ** 1.5).astype(float)
    return sure, 1 - wrong * (generator.random(count) if kind == "shares" else 1.0)


class Risk:
    """The risk of what lies above a confidence, by many answers.

    Args:
        sure: Their confidences `[n]`.
        right: How far EGO agrees with each `[n]`.
    """

    def __init__(self, sure: np.ndarray, right: np.ndarray) -> None:
        order = np.argsort(-sure)
        self._sure = -sure[order]
        self._risk = np.cumsum(1 - right[order]) / np.arange(1, len(order) + 1)

    def __call__(self, threshold: float) -> float:
        kept = int(np.searchsorted(self._sure, -threshold, side="right"))
        return float(self._risk[kept - 1]) if kept else 0.0

    def coverage(self, threshold: float) -> float:
        """Share of all answers that are kept."""
        return float(np.searchsorted(self._sure, -threshold, side="right") / len(self._sure))


Draw = tuple[np.ndarray, np.ndarray, Risk]


def made_up(kind: str) -> Callable[[int, int], Draw]:
    """Draws of made-up answers, by seed and number."""
    risk = Risk(*answers(np.random.default_rng(99), 400_000, kind))
    return lambda seed, count: (*answers(np.random.default_rng(seed), count, kind), risk)


def resplit(sure: np.ndarray, right: np.ndarray) -> Callable[[int, int], Draw]:
    """Draws of real answers, by seed and number; the risk is that of the others."""

    def draw(seed: int, count: int) -> Draw:
        order = np.random.default_rng(seed).permutation(len(sure))
        some, others = order[:count], order[count:]
        return sure[some], right[some], Risk(sure[others], right[others])

    return draw


def real(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Confidences of a model's answers, and EGO's agreement; kept in a file."""
    if not args.output.is_file():
        model = ModelSource(args.model).load()
        bank = AdapterBank(model)
        engine = AnswerEngine(bank, max_batch=16)
        given: list[NeuronAnswer] = []
        with open(args.prompts, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][: args.answers]
        for start in range(0, len(rows), 16):
            turns = [[{"role": "user", "content": row["question"]}] for row in rows[start:][:16]]
            requests = [
                Request(
                    domain=None, tokens=tuple(prompt_ids(model.tokenizer, each, "")), max_tokens=48
                )
                for each in turns
            ]
            for each, request, pieces in zip(turns, requests, engine.run(requests), strict=True):
                reason = pieces[-1].finish_reason or "length"
                ids = [piece.token for piece in pieces if piece.finish_reason != "stop"]
                text = continuation_text(model.tokenizer, request.tokens, ids)
                log_probs = tuple(piece.log_prob for piece in pieces)
                given.append(NeuronAnswer(each, text, reason, log_probs))
            print(f"  {len(given)} answers", flush=True)
        engine.close()
        shares, _ = agreement_with_ego(EgoModel(EgoConfig(model=args.ego)), given)
        known = ~np.isnan(shares)
        sure = np.array([each.confidence for each in given])
        found = {"sure": sure[known].tolist(), "right": shares[known].tolist()}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, found)
    found = read_json(args.output, needs={"sure": list, "right": list})
    return np.array(found["sure"]), np.array(found["right"])


def row_of(
    kind: str, count: int, max_risk: float, draws: int, draw: Callable[[int, int], Draw]
) -> tuple[str, ...]:
    """Both rules on as many draws."""
    cells = []
    for confidence in (0.95, 0.0):
        above, coverage = 0, []
        for seed in range(draws):
            sure, right, risk = draw(seed, count)
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
    parser.add_argument("--model")
    parser.add_argument("--ego", help="judges its answers")
    parser.add_argument("--prompts", type=Path, help="JSON lines with question")
    parser.add_argument("--answers", type=int, default=1200)
    parser.add_argument("--output", type=Path, default=Path("models/real_answers.json"))
    args = parser.parse_args()
    print_setting(f"{args.draws} draws each")
    draws = {kind: made_up(kind) for kind in KINDS}
    if args.model:
        sure, right = real(args)
        print(f"  {len(sure)} real answers, EGO agrees with {right.mean():.3f} of their tokens")
        draws = {"real": resplit(sure, right)}
    rows = []
    for kind, draw in draws.items():
        rows += [
            row_of(kind, count, each, args.draws, draw)
            for each in args.max_risk
            for count in COUNTS
        ]
    columns = ("answers", "how many", "risk asked for", "0.95: above", "keeps", "0: above", "keeps")
    Console(width=110).print(text_table("risk above what was asked for", columns, rows))


if __name__ == "__main__":
    main()
