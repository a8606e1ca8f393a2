"""A line of generations, and whether its second teacher is worth it: the ablation, three seeds.

    python tests/benchmarks/generations.py [--kind KIND] [--steps 200]

Generation 0 is stories260K cut to layers 0, 2 and 4 and healed by the whole model on beginnings of
TinyStories; generation 1 learns others of them; the ablated one learns gsm8k questions.
Figures are of held-out texts: the new ones, and those of both earlier generations.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from _setting import LONGEST, print_setting, shared_data, short_stories, spread

from conch_dna.generations.evolve import train_generation_with_teachers
from conch_dna.generations.line import Line
from conch_dna.generations.material import init_line
from conch_dna.generations.promotion import GateSettings
from conch_dna.generations.settings import EvolveConfig
from conch_dna.generations.two_teachers import BlendSettings
from conch_dna.language_model import ModelSource
from conch_dna.training.adapters import ADAPTER_CONFIG, ADAPTER_FILE
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import keep_layers

SEEDS = (0, 1, 2)
TEXTS = 300
AVERAGE = "weights averaged"
KINDS: dict[str, dict[str, Any]] = {
    "cross-entropy only": {"alpha": 1.0, "beta": 0.0, "critic": False},
    "parent only": {"critic": False},
    "critic only": {"blend": BlendSettings(gated=False, first_share=0.0)},
    "plain average": {"blend": BlendSettings(gated=False, first_share=0.5)},
    "blend with gate": {},
    "blend with gate and replay": {"replay_share": 0.1},
}


def questions(count: int) -> list[dict[str, str]]:
    """Questions of gsm8k, as texts."""
    path = shared_data() / "text" / "gsm8k" / "train.jsonl"
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(2 * count), file, strict=False)]
    return [{"text": row["question"]} for row in rows if len(row["question"]) < LONGEST][:count]


def settings_of(seed: int, steps: int, folder: Path) -> KDConfig:
    return KDConfig(
        seed=seed,
        batch_size=8,
        lora_keys="all",
        learning_rate=2e-3,
        num_iters=steps,
        steps_per_eval=steps // 4,
        steps_per_save=steps,
        max_tokens=32,
        max_seq_length=500,
        too_long="skip",
        output_dir=str(folder),
    )


def grown(folder: Path, seed: int, steps: int) -> Line:
    """A line of two generations."""
    data = shared_data()
    whole = data / "models" / "stories260K"
    cut = keep_layers(whole, folder / "cut", [0, 2, 4])
    texts = short_stories(2 * TEXTS)
    training = settings_of(seed, steps, folder / "heal")
    distiller = TrueKnowledgeDistiller(str(whole), str(cut), training)
    healed = distiller.distill_domain("stories", data=texts[:TEXTS])
    line = Line(folder, "line")
    config = EvolveConfig(training=training)
    init_line(line, str(cut), texts[:TEXTS], config=config, adapter=Path(healed.adapter_path))
    child = evolved(line, texts[TEXTS:], replace(config, replay_share=0.1))
    print(f"  seed {seed}, generation 1: {described(child)}", flush=True)
    return line


def evolved(line: Line, records: list[dict[str, str]], config: EvolveConfig) -> dict[str, Any]:
    """A generation whose gates let everything pass: it is measured, not judged."""
    gates = GateSettings(recall_margin=1.0, generalize_gain=-1.0, max_tone_drift=1.0)
    outcome = train_generation_with_teachers(line, records, replace(config, gates=gates))
    log = json.loads((line.path(outcome.name) / "training_log.json").read_text(encoding="utf-8"))
    trained = [row for row in log if row["split"] == "train"]
    tokens = sum(row["tokens"] for row in trained)
    strategies = {
        name: sum(row[name] for row in trained) / tokens
        for name in ("blended", "t1_only", "gold_fallback", "js")
    }
    return {**outcome.metrics, "strategies": strategies}


def described(metrics: dict[str, Any]) -> str:
    child, parent = metrics["child"], metrics["parent"]
    shares = ", ".join(f"{name} {value:.1%}" for name, value in metrics["strategies"].items())
    return (
        f"new {parent['generalize']['nats_per_token']:.4f} to "
        f"{child['generalize']['nats_per_token']:.4f}, old "
        f"{parent['recall']['nats_per_token']:.4f} to {child['recall']['nats_per_token']:.4f} "
        f"nats; {shares}; peak {metrics['peak_memory_bytes'] / 1e6:.0f} MB"
    )


def averaged(line: Line, folder: Path) -> dict[str, Any]:
    """The mean of parent's and child's adapter, measured on the same texts."""
    from conch_dna.generations.material import HELDOUT_FILE, earlier_records
    from conch_dna.generations.measures import text_scores
    from conch_dna.training.records import tokenize_records

    child, parent = "G002", "G001"
    base = ModelSource(line.manifest("G000")["base"]["model"])
    arrays = [mx.load(str(line.path(name) / ADAPTER_FILE)) for name in (child, parent)]
    folder.mkdir()
    shutil.copyfile(line.path(child) / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    mean = {name: (value + arrays[1][name]) / 2 for name, value in arrays[0].items()}
    mx.save_safetensors(str(folder / ADAPTER_FILE), mean)
    model = base.load(adapter_path=folder)
    records = earlier_records(line, ["G002", "G001", "G000"], HELDOUT_FILE)
    new = tokenize_records(records.pop("G002"), base.tokenizer, train_on_prompt=False)
    old = [row for rows in records.values() for row in rows]
    parts = {
        "generalize": new,
        "recall": tokenize_records(old, base.tokenizer, train_on_prompt=False),
    }
    scores = {n: text_scores(model, part, batch_size=8).to_json() for n, part in parts.items()}
    return {"child": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether a second teacher is worth it.")
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    kinds = arguments.kind or list(KINDS)
    shared_data()
    print_setting(f"generations: {TEXTS} texts each, {arguments.steps} steps of 8, seeds {SEEDS}")
    figures: dict[str, list[dict[str, Any]]] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            grown(folder, seed, arguments.steps)
            for kind in kinds:
                place = folder / kind.replace(" ", "-")
                shutil.copytree(folder / "line", place / "line")
                line = Line(place, "line")
                plain = EvolveConfig(
                    training=settings_of(seed, arguments.steps, folder), replay_share=0.0
                )
                metrics = evolved(line, questions(TEXTS), replace(plain, **KINDS[kind]))
                figures.setdefault(kind, []).append(metrics)
                print(f"  seed {seed}, {kind}: {described(metrics)}", flush=True)
                if kind == "parent only":
                    found = averaged(line, place / "mean")
                    figures.setdefault(AVERAGE, []).append(found)
    for kind, rows in figures.items():
        new, old = (
            spread([row["child"][name]["nats_per_token"] for row in rows])
            for name in ("generalize", "recall")
        )
        print(f"  {kind}: new {new}, old {old} nats per token")


if __name__ == "__main__":
    main()
