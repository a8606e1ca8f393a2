"""Whether the part of the held-out data that is named is the one that was spoilt.

    python tests/benchmarks/planted_slices.py [--seeds 20] [--steps 24] [--output FOLDER]

The embedded student learns one of three domains; what comes out is then taught all three, with the
words of the one it knew shuffled, and with all as they are. On the whole it gets better. Counted is
how often the verdict names the spoilt domain as worse, and how often it names any part where
nothing was spoilt. Other texts and order with each seed. What is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from _setting import print_setting
from rich.console import Console

from conch_dna.checkpoints import read_json
from conch_dna.exporting.fuse import Fusing
from conch_dna.exporting.settings import FuseSettings
from conch_dna.exporting.source import AdapterSource
from conch_dna.screen.presentation import text_table
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller

NAMES = ["Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue"]
DOMAINS: dict[str, tuple[str, list[list[str]]]] = {
    "walks": (
        "One day {0} went for a walk in the {1}. There {0} saw a {2} and said hello to it.",
        [["park", "forest", "garden", "field", "town"], ["bird", "frog", "dog", "cat", "fish"]],
    ),
    "meals": (
        "{0} was very hungry. Mom made {1} with {2} for dinner, and {0} ate it all up.",
        [["soup", "cake", "bread", "rice", "pie"], ["apples", "milk", "eggs", "nuts", "honey"]],
    ),
    "nights": (
        "It was dark and {0} could not sleep. Dad read a book of a {1} and a {2}, and {0} slept.",
        [["king", "bear", "ship", "star", "train"], ["queen", "mouse", "whale", "moon", "tree"]],
    ),
}
# So that how long a text is does not tell its domain.
ENDS = ["", " The end.", " It was a good day.", " Everyone was happy and they laughed a lot."]
TRAINING, HELD_OUT = 24, 10


def texts(domain: str, random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """So many texts of a domain."""
    form, words = DOMAINS[domain]
    *drawn, ends = (random.choice(each, count) for each in (NAMES, *words, ENDS))
    return [
        {"text": form.format(*row) + end, "domain": domain}
        for *row, end in zip(*drawn, ends, strict=True)
    ]


def shuffled(record: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
    """A record whose words stand in another order."""
    words = record["text"].split(" ")
    return {**record, "text": " ".join(random.permutation(words))}


def taught(
    args: argparse.Namespace, student: str, run: str, data: Any, valid: Any, seed: int
) -> tuple[Path, dict[str, Any]]:
    """An adapter by fine-tuning, and its evaluation."""
    config = KDConfig(
        alpha=0.0,
        learning_rate=args.learning_rate,
        lora_keys="all",
        num_iters=args.steps,
        warmup_iters=2,
        steps_per_eval=max(1, args.steps // 2),
        batch_size=6,
        seed=seed,
        output_dir=str(args.output / run),
        max_tokens=8,
    )
    distiller = TrueKnowledgeDistiller("embedded:teacher", student, config)
    result = distiller.distill_domain("planted", data=data, valid_data=valid, resume=True)
    path = Path(result.adapter_path)
    return path, read_json(path / "evaluation.json", needs={"verdict": dict})


def parent(args: argparse.Namespace, domain: str) -> str:
    """The embedded student that knows one domain, as a model."""
    folder = args.output / f"parent-{domain}"
    if not folder.is_dir():
        random = np.random.default_rng(999)
        data, valid = texts(domain, random, 3 * TRAINING), texts(domain, random, HELD_OUT)
        path, _ = taught(args, "embedded:student", f"first-{domain}", data, valid, 999)
        source = AdapterSource.open(path, trust_remote_code=False, report=lambda *_: None)
        Fusing(source, folder, FuseSettings(bits="float", answers=0)).fused(resume=True)
    return str(folder)


def named(args: argparse.Namespace, known: str, seed: int, planted: str) -> tuple[str, bool, float]:
    """The part that a run's verdict names, whether it says that it lost, and how much."""
    random = np.random.default_rng(seed)
    data = [each for name in DOMAINS for each in texts(name, random, TRAINING)]
    valid = [each for name in DOMAINS for each in texts(name, random, HELD_OUT)]
    data = [shuffled(each, random) if each["domain"] == planted else each for each in data]
    run = f"{planted or 'none'}-{seed}"
    _, found = taught(args, parent(args, known), run, data, valid, seed)
    part = found["slice"]
    return f"{part['by']} {part['slice']}", bool(part["lost"]), part["difference"]


def main() -> None:
    """Do what is not finished, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=Path("models/planted_slices"))
    args = parser.parse_args()
    print_setting(f"the embedded student, {args.steps} steps of 6")
    right = claimed = 0
    rows = []
    for seed in range(args.seeds):
        planted = list(DOMAINS)[seed % len(DOMAINS)]
        part, lost, much = named(args, planted, seed, planted)
        right += lost and part == f"domain {planted}"
        control, said, little = named(args, planted, seed, "")
        claimed += said
        before = f"{control}, {little:+.2f}" if said else "–"
        rows.append((seed, planted, f"{part}, {much:+.2f}" if lost else "–", before))
        print(*rows[-1], flush=True)
    columns = ("seed", "spoilt", "named as worse, nats", "the same, nothing spoilt")
    Console(width=110).print(text_table("planted regressions", columns, rows))
    print(f"named: {right} of {args.seeds}; with nothing spoilt any part: {claimed}")


if __name__ == "__main__":
    main()
