"""Off-policy against on-policy at equal tokens that the teacher scores: a grid, three seeds each.

    python tests/benchmarks/own_answers.py [--steps 150] [--seeds 3] [--output FOLDER]
        [--kinds NAME …] [--model FOLDER --layers 0,1,2,…]

Teacher stories260K, student the same model with layers 0, 2 and 4, beginnings of TinyStories: given
texts alone, half or all of the batches the student's own answers, three divergences, short and long
rollouts. With a model of yours it is the teacher, and a student of some of its layers learns from
fewer texts. Each run stays in the output folder; what is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from _setting import print_setting, shared_data, short_stories, spread
from rich.console import Console

from conch_dna.checkpoints import read_json, write_json
from conch_dna.language_model import ModelSource
from conch_dna.screen.presentation import text_table
from conch_dna.training.data.records import tokenize_records
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import keep_layers

SHARES, DIVERGENCES, LENGTHS = (0.5, 1.0), ("forward_kl", "reverse_kl", "jsd"), (24, 72)
FIXED: dict[str, Any] = {
    "alpha": 1.0,
    "temperature": 1.0,
    "lora_keys": "all",
    "learning_rate": 2e-3,
    "batch_size": 8,
    "max_tokens": 96,
    "val_fraction": 0.1,
    "own_answers": -1,
    "rollouts": 64,
    "sampling_temperature": 1.0,
}
# For a model of 135 million parameters, whose step takes seconds.
BIG: dict[str, Any] = {
    "learning_rate": 5e-4,
    "batch_size": 4,
    "max_tokens": 72,
    "val_fraction": 0.2,
    "rollouts": 16,
}


def kinds() -> list[dict[str, Any]]:
    """Settings of every kind of run."""
    off = [{"on_policy": 0.0, "divergence": divergence} for divergence in DIVERGENCES]
    grid = itertools.product(SHARES, DIVERGENCES, LENGTHS)
    names = ("on_policy", "divergence", "rollout_tokens")
    return off + [dict(zip(names, values, strict=True)) for values in grid]


def name_of(kind: dict[str, Any]) -> str:
    """A kind in one word."""
    if not kind["on_policy"]:
        return f"given-{kind['divergence']}"
    return f"own-{kind['on_policy']:g}-{kind['divergence']}-{kind['rollout_tokens']}"


def run(
    names: tuple[str, str],
    records: list[dict[str, Any]],
    kind: dict[str, Any],
    *,
    steps: int,
    seed: int,
    folder: Path,
    more: dict[str, Any],
) -> dict[str, Any]:
    """One run; its figures, read back where it is finished."""
    out = folder / f"{name_of(kind)}-{seed}"
    summary = out / "summary.json"
    if summary.is_file():
        return read_json(summary, needs={"evaluation": dict})
    config = KDConfig(
        **FIXED | more,
        **kind,
        num_iters=steps,
        seed=seed,
        steps_per_eval=max(1, steps // 3),
        steps_per_save=steps,
        output_dir=str(out),
    )
    distiller = TrueKnowledgeDistiller(*names, config)
    result = distiller.distill_domain("stories", data=records, resume=True)
    rounds = result.metadata.get("rounds", [])
    row = {
        "kind": kind,
        "seed": seed,
        "steps": steps,
        "evaluation": result.evaluation,
        "rollout_seconds": sum(each["rollout_seconds"] for each in rounds),
        "scoring_seconds": sum(each["scoring_seconds"] for each in rounds),
        "seconds": result.training_time_seconds,
    }
    write_json(summary, row)
    return row


def figures(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Medians and ranges of a kind's runs: on given texts, and on its own answers."""
    own = [row["evaluation"]["own_answers"] for row in rows]
    return (
        spread([row["evaluation"]["after"]["kl_nats"] for row in rows]),
        spread([each["kl_nats"]["after"] for each in own]),
        spread([each["repetition"]["after"] for each in own]),
        spread([each["ended"]["after"] for each in own], 2),
        f"{statistics.mean(row['seconds'] for row in rows):.0f}",
    )


def main() -> None:
    """Run what is not finished, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of given texts; others follow")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=[name_of(kind) for kind in kinds()])
    parser.add_argument("--model", type=Path, help="the teacher, instead of stories260K")
    parser.add_argument("--layers", default="0,2,4", help="of the teacher, that the student has")
    parser.add_argument("--texts", type=int, help="600, or 120 with a model of yours")
    parser.add_argument("--output", type=Path, default=Path("models/own_answers"))
    args = parser.parse_args()
    teacher = args.model or shared_data() / "models" / "stories260K"
    print_setting(f"{args.steps} steps of given texts, others as many as take the same tokens")
    student = args.output / "student"
    if not student.is_dir():
        keep_layers(teacher, student, [int(each) for each in args.layers.split(",")])
    if args.model:
        records = short_stories(args.texts or 120, words=12, longest=320)
    else:
        records = short_stories(args.texts or 600)
    examples = tokenize_records(records, ModelSource(str(teacher)).tokenizer)
    given = statistics.mean(example.count for example in examples)
    rows = []
    for kind in kinds():
        if args.kinds and name_of(kind) not in args.kinds:
            continue
        share, length = kind["on_policy"], kind.get("rollout_tokens", 0)
        steps = round(args.steps * given / (share * length + (1 - share) * given))
        runs = [
            run(
                (str(teacher), str(student)),
                records,
                kind,
                steps=steps,
                seed=seed,
                folder=args.output,
                more=BIG if args.model else {},
            )
            for seed in range(args.seeds)
        ]
        rows.append((name_of(kind), steps, *figures(runs)))
        print(*rows[-1], sep="  ", flush=True)
    columns = ("kind", "steps", "KL, given", "KL, own", "repeated", "ended", "seconds")
    Console(width=140).print(text_table("equal tokens scored by the teacher", columns, rows))


if __name__ == "__main__":
    main()
