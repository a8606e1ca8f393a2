"""Twenty changes of one store, and what its gate guarantees: never much worse than raw vectors.

    python tests/benchmarks/twenty_cycles.py [--cycles 20] [--folder DIR] [--json FILE]
        [--picture PNG]

A static student of all-MiniLM-L6-v2, which is the teacher too, over the cranfield collection.
Distillations, of a map and of the student's own table, and cycles of the three modes take turns,
each in an engine of its own on the same folder, behind questions that are titles of documents. All
judged queries are kept for what is printed behind each change: nDCG@10 of the active version and of
the raw vectors. `--folder` keeps the student and the teacher's vectors, most of the work, for
another run.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _setting import print_setting, shared_data

from conch_dna.checkpoints import write_json
from conch_dna.metrics import paired_interval
from conch_dna.sedimentation.benchmark.collections import read_beir
from conch_dna.sedimentation.benchmark.stages import evaluate_engine
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.embedders.local import MINILM
from conch_dna.sedimentation.embedders.make_student import make_student
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.results import ChangeResult

# A cycle of each mode and a distillation take turns, by a share of the teacher that grows with
# every turn, so that there is something left to learn.
TURNS = ("hybrid", "baseline", "offline", "distillation", "table")
WEIGHTS = (0.2, 0.4, 0.6, 0.8, 1.0)
QUERIES_A_CYCLE = 100
# With the default of 5 too few queries find a collapsed neighbourhood.
CONFIG = ChelationConfig(collapse_percentile=40.0, threshold=1)


def changed(engine: AntigravityEngine, turn: str, titles: list[str], number: int) -> ChangeResult:
    """One change, behind questions of users."""
    random = np.random.default_rng(number)
    engine.run_inferences([titles[n] for n in random.choice(len(titles), QUERIES_A_CYCLE)])
    if turn in ("distillation", "table"):
        return engine.run_offline_distillation()
    return engine.run_sedimentation_cycle()


def main() -> None:
    parser = argparse.ArgumentParser(description="What the gate guarantees over many changes.")
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="Keeps student and teacher's vectors.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    collection = read_beir(shared_data() / "retrieval" / "cranfield")
    print_setting(
        f"{options.cycles} changes of one store: cranfield, {CONFIG.gate_margin:g} margin"
    )
    titles = [each["title"] for each in collection.documents if each["title"].strip()]
    judged = collection.queries, collection.judgements
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        student, store = folder / "student", Path(temporary) / "store"
        if not student.is_dir():
            make_student(MINILM, student, device="cpu")
        raw: np.ndarray | None = None
        for number in range(options.cycles):
            turn = TURNS[number % len(TURNS)]
            with AntigravityEngine(
                store,
                str(student),
                "offline" if turn in ("distillation", "table") else turn,
                MINILM,
                WEIGHTS[number // len(TURNS) % len(WEIGHTS)],
                config=replace(CONFIG, train_student=turn == "table"),
                teacher_cache=folder / "teacher_vectors",
                device="cpu",
            ) as engine:
                if raw is None:
                    engine.ingest(collection.documents)
                    raw = evaluate_engine(engine, *judged).ndcg
                result = changed(engine, turn, titles, number)
                active = evaluate_engine(engine, *judged).ndcg
            rows.append(row := told(turn, result, active, raw))
            print(
                f"  {number + 1:2d} {turn:12} {row['outcome']:9} active {row['version']:5} "
                f"{row['ndcg_at_10']:.4f}, raw {row['raw_ndcg_at_10']:.4f}, "
                f"{row['difference']:+.4f} [{row['interval'][0]:+.4f}, {row['interval'][1]:+.4f}]"
                f"{', queries asked before' if row['used_before'] else ''}",
                flush=True,
            )
    lowest = min(row["difference"] for row in rows)
    passed = sum(row["outcome"] == "passed" for row in rows)
    print(
        f"  {passed} of {len(rows)} changes passed; lowest difference to raw {lowest:+.4f}, "
        f"{time.perf_counter() - began:.0f} s"
    )
    if options.json:
        write_json(options.json, {"lowest": lowest, "margin": CONFIG.gate_margin, "rows": rows})
    if options.picture:
        draw(rows, options.picture)
    if lowest < -CONFIG.gate_margin:
        sys.exit(f"the active version was {-lowest:.4f} below raw: more than the margin")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The active version beside raw vectors and what the gate guarantees, change by change."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(9, 4), layout="constrained")).subplots()
    numbers = range(1, len(rows) + 1)
    raw = rows[0]["raw_ndcg_at_10"]
    low, high = ([raw + row["interval"][end] for row in rows] for end in (0, 1))
    axes.fill_between(numbers, low, high, step="mid", alpha=0.2, label="95% interval to raw")
    axes.step(numbers, [row["ndcg_at_10"] for row in rows], where="mid", label="active version")
    axes.axhline(raw, color="black", linewidth=1, label="raw vectors")
    floor = raw - CONFIG.gate_margin
    axes.axhline(floor, color="red", linewidth=1, linestyle="--", label="guaranteed")
    passed = [
        number for number, row in zip(numbers, rows, strict=True) if row["outcome"] == "passed"
    ]
    axes.plot(passed, [rows[number - 1]["ndcg_at_10"] for number in passed], "o", label="passed")
    axes.set(xlabel="change", ylabel="nDCG@10 of judged queries")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def told(turn: str, result: ChangeResult, active: np.ndarray, raw: np.ndarray) -> dict[str, Any]:
    """What a change came to, and what the judged queries say of it, which the gate never saw."""
    refused = "refused" if result.candidate else "no change"
    return {
        "turn": turn,
        "outcome": "passed" if result.activated else refused,
        "version": result.version,
        "ndcg_at_10": float(active.mean()),
        "raw_ndcg_at_10": float(raw.mean()),
        "difference": float((active - raw).mean()),
        "interval": list(paired_interval(active, raw, confidence=0.95, seed=0)),
        "reason": result.reason,
        "used_before": result.questions.get("used_before", 0),
        "gate": result.figures,
    }


if __name__ == "__main__":
    main()
