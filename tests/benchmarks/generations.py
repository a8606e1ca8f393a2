"""A real line of generations, and whether its second teacher is worth it: the ablation.

    python tests/benchmarks/generations.py line [--steps 300]
    python tests/benchmarks/generations.py ablation [--child 2] [--alpha 0.1] [--kind KIND]
    python tests/benchmarks/generations.py memory

Generation 0 is stories260K cut to layers 0, 2 and 4 and healed by the whole model on beginnings of
one half of TinyStories. Then come the other half, questions of gsm8k and instructions of
self_instruct. `line` grows them with the default settings, gates among them; `ablation` lets
everything pass and teaches one of them, 2 or 3, in all kinds of ways, with three seeds.
Figures are of held-out texts: the new ones, and those of all earlier generations. `memory` sets the
peak of an evolution beside that of a plain distillation of the same student, each in a process.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from _setting import LONGEST, print_setting, shared_data, short_stories, spread, stories

from conch_dna.generations.data import HELDOUT_FILE, earlier_records, init_line
from conch_dna.generations.evolve import train_generation_with_teachers
from conch_dna.generations.line import Line
from conch_dna.generations.manifest import Outcome
from conch_dna.generations.settings import BlendSettings, EvolveConfig, GateSettings
from conch_dna.language_model import ModelSource
from conch_dna.training.adapters import ADAPTER_CONFIG, ADAPTER_FILE
from conch_dna.training.data.records import tokenize_records
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import keep_layers

SEEDS = (0, 1, 2)
HALF = 1000
TEXTS = 400
ALL_PASS = GateSettings(recall_margin=1.0, generalize_gain=-1.0, max_tone_drift=1.0)
AVERAGE = "weights averaged"
KINDS: dict[str, dict[str, Any]] = {
    "cross-entropy only": {"alpha": 1.0, "beta": 0.0, "critic": False},
    "parent only": {"critic": False},
    "parent only and replay": {"critic": False, "replay_share": 0.1},
    "critic only": {"blend": BlendSettings(gated=False, first_share=0.0)},
    "plain average": {"blend": BlendSettings(gated=False, first_share=0.5)},
    "blend with gate": {},
    "blend with gate and replay": {"replay_share": 0.1},
}


def texts_of(name: str, key: str, *files: str) -> list[dict[str, str]]:
    """The short ones among one field of the rows of some files, as texts."""
    rows = []
    for file in files:
        with open(shared_data() / "text" / name / file, encoding="utf-8") as lines:
            rows += [json.loads(line)[key].strip() for line in lines]
    return [{"text": row} for row in rows if 40 < len(row) < LONGEST][:TEXTS]


def new_data() -> list[list[dict[str, str]]]:
    """What each generation learns, generation 0 first."""
    stories = short_stories(2 * HALF)
    return [
        stories[:HALF],
        stories[HALF:],
        texts_of("gsm8k", "question", "train.jsonl"),
        texts_of(
            "self_instruct", "instruction", "user_oriented_instructions.jsonl", "seed_tasks.jsonl"
        ),
    ]


def settings_of(seed: int, steps: int, folder: Path) -> KDConfig:
    return KDConfig(
        seed=seed,
        batch_size=8,
        lora_keys="all",
        learning_rate=2e-3,
        num_iters=steps,
        steps_per_eval=max(1, steps // 6),
        steps_per_save=steps,
        max_tokens=32,
        max_seq_length=500,
        too_long="skip",
        output_dir=str(folder),
    )


def begun(folder: Path, records: list[dict[str, str]], config: EvolveConfig) -> Line:
    """A line with a healed generation 0."""
    whole = shared_data() / "models" / "stories260K"
    cut = keep_layers(whole, folder / "cut", [0, 2, 4])
    distiller = TrueKnowledgeDistiller(str(whole), str(cut), config.training)
    healed = distiller.distill_domain("stories", data=records)
    line = Line(folder, "line")
    init_line(line, str(cut), records, config=config, adapter=Path(healed.adapter_path))
    return line


def shares_of(line: Line, outcome: Outcome) -> dict[str, float]:
    """Each strategy's share of the trained tokens, and the mean disagreement."""
    log = json.loads((line.path(outcome.name) / "training_log.json").read_text(encoding="utf-8"))
    trained = [row for row in log if row["split"] == "train"]
    tokens = sum(row["tokens"] for row in trained)
    names = ("blended", "t1_only", "gold_fallback", "skipped", "js")
    return {name: sum(row[name] for row in trained) / tokens for name in names}


def described(line: Line, outcome: Outcome) -> str:
    child, parent = outcome.metrics["child"], outcome.metrics["parent"]
    shares = ", ".join(f"{name} {value:.1%}" for name, value in shares_of(line, outcome).items())
    return (
        f"new {parent['generalize']['nats_per_token']:.4f} to "
        f"{child['generalize']['nats_per_token']:.4f}, old "
        f"{parent['recall']['nats_per_token']:.4f} to {child['recall']['nats_per_token']:.4f} "
        f"nats; {shares}; best step {outcome.metrics['best_step']}"
    )


def averaged(line: Line, folder: Path) -> dict[str, Any]:
    """The mean of parent's and child's adapter, measured on the same texts."""
    from conch_dna.generations.promotion import text_scores

    child, *chain = [line.head, *line.ancestors(line.head)]
    base = ModelSource(line.manifest("G000")["base"]["model"])
    arrays = [mx.load(str(line.path(name) / ADAPTER_FILE)) for name in (child, chain[0])]
    folder.mkdir()
    shutil.copyfile(line.path(child) / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    mean = {name: (value + arrays[1][name]) / 2 for name, value in arrays[0].items()}
    mx.save_safetensors(str(folder / ADAPTER_FILE), mean)
    model = base.load(adapter_path=folder)
    records = earlier_records(line, [child, *chain], HELDOUT_FILE)
    old = [row for name in chain for row in records[name]]
    parts = {"generalize": records[child], "recall": old}
    scores = {}
    for name, rows in parts.items():
        examples = tokenize_records(rows, base.tokenizer, train_on_prompt=False)
        scores[name] = text_scores(model, examples, batch_size=8).to_json()
    return {"child": scores}


def show_line(steps: int) -> None:
    """Grow three generations and judge them."""
    with tempfile.TemporaryDirectory() as temporary:
        config = EvolveConfig(training=settings_of(0, steps, Path(temporary)))
        data = new_data()
        line = begun(Path(temporary), data[0], config)
        for records in data[1:]:
            outcome = train_generation_with_teachers(line, records, config)
            print(f"{outcome.name}: {described(line, outcome)}")
            for verdict in outcome.verdicts:
                print(f"    {'passed' if verdict.passed else 'FAILED'}: {verdict.reason}")
            print(f"    {'promoted' if outcome.promoted else 'archived'}", flush=True)


def show_ablation(child: int, kinds: list[str], alphas: list[float], steps: int) -> None:
    """Teach one generation in all kinds of ways."""
    figures: dict[str, list[dict[str, Any]]] = {}
    data = new_data()
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            # Earlier generations really learn their data, so that teachers differ.
            config = EvolveConfig(
                training=settings_of(seed, steps, folder), gates=ALL_PASS, alpha=0.5, beta=0.5
            )
            line = begun(folder, data[0], config)
            for records in data[1:child]:
                outcome = train_generation_with_teachers(line, records, config)
                print(f"  seed {seed}, {outcome.name}: {described(line, outcome)}", flush=True)
            for alpha in alphas:
                for kind in kinds:
                    label = kind if kind == "cross-entropy only" else f"{kind}, alpha {alpha:g}"
                    if label in figures and len(figures[label]) > SEEDS.index(seed):
                        continue
                    place = folder / label.replace(" ", "-")
                    shutil.copytree(folder / "line", place / "line")
                    grown = Line(place, "line")
                    changes = {"alpha": alpha, "beta": 1 - alpha, "replay_share": 0.0}
                    changed = replace(config, **{**changes, **KINDS[kind]})
                    outcome = train_generation_with_teachers(grown, data[child], changed)
                    figures.setdefault(label, []).append(outcome.metrics)
                    print(f"  seed {seed}, {label}: {described(grown, outcome)}", flush=True)
                    if kind == "parent only":
                        label = f"{AVERAGE}, alpha {alpha:g}"
                        figures.setdefault(label, []).append(averaged(grown, place / "mean"))
    for label, rows in figures.items():
        new, old = (
            spread([row["child"][name]["nats_per_token"] for row in rows])
            for name in ("generalize", "recall")
        )
        print(f"  {label}: new {new}, old {old} nats per token", flush=True)


def peak_of(what: str) -> None:
    """Print the peak of one run on the embedded student, in this process."""
    texts = stories("train", 80)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        training = replace(settings_of(0, 6, folder), max_seq_length=352)
        name = "embedded:student"
        if what == "distillation":
            training = replace(training, force=True)
            TrueKnowledgeDistiller(name, name, training).distill_domain("stories", data=texts)
        else:
            config = EvolveConfig(training=training, gates=ALL_PASS)
            line = Line(folder, "line")
            init_line(line, name, texts[:20], config=config)
            for number in range(2 if what == "two teachers" else 1):
                mx.reset_peak_memory()
                records = texts[20:] if number else texts[:80]
                train_generation_with_teachers(line, records, config)
    print(f"  {what}: peak {mx.get_peak_memory() / 1e6:.1f} MB", flush=True)


def show_memory() -> None:
    """The peaks of three runs, each in a process of its own."""
    for what in ("distillation", "one teacher", "two teachers"):
        subprocess.run([sys.executable, __file__, "memory", "--peak-of", what], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A line, and if a second teacher is worth it.")
    parser.add_argument("what", nargs="?", choices=("line", "ablation", "memory"), default="line")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--alpha", action="append", type=float)
    parser.add_argument("--child", type=int, choices=(2, 3), default=3)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    shared_data()
    if arguments.peak_of:
        peak_of(arguments.peak_of)
        return
    print_setting(f"generations: {arguments.what}, {arguments.steps} steps of 8")
    if arguments.what == "memory":
        show_memory()
    elif arguments.what == "line":
        show_line(arguments.steps)
    else:
        print(f"  generation {arguments.child}, seeds {SEEDS}")
        show_ablation(
            arguments.child,
            arguments.kind or list(KINDS),
            arguments.alpha or [0.1],
            arguments.steps,
        )


if __name__ == "__main__":
    main()
