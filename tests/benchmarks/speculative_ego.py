"""EGO alone, with an undistilled and with a distilled draft: tokens a second, acceptance, equality.

    python tests/benchmarks/speculative_ego.py [--ego MODEL] [--student MODEL | --layers 0,2,…]
        [--adapter FOLDER] [--prompts 200] [--max-tokens 64] [--draft-tokens 2 4 8]
        [--temperature 0] [--questions FILE …] [--steps 200] [--output FOLDER] [--json FILE]

The embedded pair by default: EGO answers beginnings of TinyStories, and the draft is distilled from
its answers to the openings in the package. With a model of yours, questions (JSONL or lines): the
first are asked, the rest teach. Every prompt is answered in every way, one after the other, so that
speeds are compared prompt by prompt. Each answer stays in the output folder; what is there is not
done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from _ratios import note_ratio
from _setting import print_setting, short_stories, spread
from rich.console import Console

from conch_dna.checkpoints import (
    NotWholeError,
    content_digest,
    file_digest,
    read_json,
    write_json,
)
from conch_dna.ego.drafting import Draft
from conch_dna.ego.model import EgoModel
from conch_dna.ego.settings import EgoConfig
from conch_dna.language_model import ASSETS, ModelSource
from conch_dna.screen.presentation import text_table
from conch_dna.training.adapters import ADAPTER_FILE
from conch_dna.training.data.records import read_prompts
from conch_dna.training.data.views import prompt_text
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import keep_layers

ALONE = "EGO alone"
# As `make demo` teaches.
EMBEDDED: dict[str, Any] = {
    "samples_per_prompt": 4,
    "lora_keys": "all,model.embed_tokens",
    "lora_rank": 32,
    "lora_scale": 4.0,
    "learning_rate": 5e-3,
    "batch_size": 8,
    "sampling_temperature": 1.0,
    "max_tokens": 192,
}
# For a model of 135 million parameters, whose step takes seconds.
BIG: dict[str, Any] = {
    "lora_keys": "all",
    "lora_rank": 16,
    "learning_rate": 1e-3,
    "batch_size": 4,
    "max_tokens": 64,
}


def distilled(
    names: tuple[str, str], prompts: list[str], *, steps: int, folder: Path, more: dict[str, Any]
) -> Path:
    """The adapter's folder; a finished one is not made again."""
    config = KDConfig(
        **more,
        alpha=1.0,
        num_iters=steps,
        steps_per_eval=max(1, steps // 2),
        steps_per_save=steps,
        val_fraction=0.1,
        output_dir=str(folder),
    )
    distiller = TrueKnowledgeDistiller(*names, config)
    distiller.distill_domain("asked", prompts=prompts, resume=(folder / "asked").exists())
    return folder / "asked" / "adapters_kd"


def answers(
    ego: EgoModel, ways: dict[str, Draft | None], prompts: list[str], place: Path
) -> list[dict[str, Any]]:
    """What every way makes of each prompt: text, tokens, steps and seconds."""
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        path = place / f"{number}.json"
        try:
            kept = read_json(path, needs={"prompt": str, "ways": dict})
        except NotWholeError:
            kept = {"prompt": prompt, "ways": {}}
        if kept["prompt"] != prompt:
            kept = {"prompt": prompt, "ways": {}}
        # Another one begins each time, so that nobody is always the first after a pause.
        names = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
        for name in names if not set(ways) <= set(kept["ways"]) else ():
            began = time.perf_counter()
            [found] = ego.generate_many([prompt], draft=ways[name])
            if found.undrafted:
                raise SystemExit(f"{name} does not draft: {found.undrafted}")
            kept["ways"][name] = {
                "text": found.text,
                "tokens": found.tokens,
                "steps": found.steps or found.tokens,
                "seconds": time.perf_counter() - began,
            }
        write_json(path, kept)
        rows.append(kept["ways"])
    return rows


def figures(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """One way beside EGO alone."""
    own, ways = [row[ALONE] for row in rows], [row[name] for row in rows]
    speeds = [way["tokens"] / way["seconds"] for way in ways]
    before = [way["tokens"] / way["seconds"] for way in own]
    return {
        "tokens_per_s": statistics.median(speeds),
        "ratios": [now / then for now, then in zip(speeds, before, strict=True)],
        "acceptance": sum(way["tokens"] for way in ways) / sum(way["steps"] for way in ways),
        "equal": sum(a["text"] == b["text"] for a, b in zip(ways, own, strict=True)),
    }


def main() -> None:
    """Answer what is not answered, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ego", default="embedded:teacher")
    parser.add_argument("--student", default="embedded:student")
    parser.add_argument("--layers", help="of EGO, that the student has, instead of --student")
    parser.add_argument("--adapter", type=Path, help="of the student, instead of a new one")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--questions", type=Path, nargs="+", help="instead of beginnings")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("models/speculative_ego"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_setting(f"{args.ego} drafted for, {args.max_tokens} tokens at most")
    if args.layers:
        args.student = str(args.output / "student")
        kept = [int(each) for each in args.layers.split(",")]
        keep_layers(ModelSource(args.ego).folder, Path(args.student), kept)
    if args.questions:
        known = [prompt_text(each) for path in args.questions for each in read_prompts(path)]
        asked, taught = known[: args.prompts], known[args.prompts :]
    else:
        asked = [record["prompt"] for record in short_stories(args.prompts, words=8)]
        taught = (ASSETS / "story_openings.txt").read_text(encoding="utf-8").splitlines()
    adapter = args.adapter or distilled(
        (args.ego, args.student),
        taught,
        steps=args.steps,
        folder=args.output / f"distilled-{args.steps}",
        more=EMBEDDED if args.ego == "embedded:teacher" else BIG,
    )
    source = ModelSource(args.student)
    base = source.load()
    drafts = {
        "undistilled": base.model,
        "distilled": source.load(adapter_path=adapter, share=base).model,
    }
    ways: dict[str, Draft | None] = {ALONE: None}
    for count in args.draft_tokens:
        ways |= {f"{n}, {count} drafted": Draft(n, source, t, count) for n, t in drafts.items()}
    who = content_digest(args.ego, args.student, file_digest(adapter / ADAPTER_FILE))[:8]
    place = args.output / f"answers-{who}-{args.max_tokens}-{args.temperature:g}"
    config = EgoConfig(model=args.ego, max_tokens=args.max_tokens, temperature=args.temperature)
    with EgoModel(config) as ego:
        for draft in ways.values():
            ego.generate_many(asked[:1], draft=draft)
        rows = answers(ego, ways, asked, place)
    found = {name: figures(rows, name) for name in ways}
    table = [
        (
            name,
            f"{each['tokens_per_s']:.1f}",
            spread(each["ratios"], 2),
            f"{each['acceptance']:.2f}",
            f"{each['equal']} of {len(rows)}",
        )
        for name, each in found.items()
    ]
    columns = ("", "tokens/s", "of EGO alone", "tokens a step", "equal answers")
    Console(width=140).print(text_table("EGO's answers", columns, table))
    for name, each in found.items():
        if name != ALONE:
            note_ratio(f"speed, {name}, over EGO alone", each["ratios"], "above 1")
    if args.json:
        write_json(args.json, {"ego": args.ego, "student": args.student, "ways": found})


if __name__ == "__main__":
    main()
