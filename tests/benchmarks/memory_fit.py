"""What a dry run says of memory beside what MLX counts in the run itself, phase by phase.

    python tests/benchmarks/memory_fit.py [--smollm2 FOLDER] [--json FILE]

The embedded pair answers prompts; stories260K teaches its own layers 0, 2 and 4, with and without
recomputed activations; SmolLM2-135M-Instruct, where its folder is given, teaches itself.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from _setting import SHARED, print_setting
from rich.console import Console

from conch_dna.language_model import ASSETS
from conch_dna.screen.presentation import text_table
from measured_memory import estimated, measured
from models import keep_layers

SHORT = {"num_iters": 3, "steps_per_eval": 3}


def cases(folder: Path, smollm2: str | None) -> dict[str, tuple[Any, ...]]:
    """Teacher, student, settings and data of each pair."""
    openings = (ASSETS / "story_openings.txt").read_text(encoding="utf-8").splitlines()[:24]
    found: dict[str, tuple[Any, ...]] = {
        "embedded": (
            "embedded:teacher",
            "embedded:student",
            {**SHORT, "max_tokens": 120},
            {"prompts": openings},
        )
    }
    if (teacher := SHARED / "models" / "stories260K").is_dir():
        student = keep_layers(teacher, folder / "student", [0, 2, 4])
        text = (SHARED / "text" / "tinystories" / "train.jsonl").read_text(encoding="utf-8")
        data = [json.loads(line) for line in text.splitlines()[:60]]
        limits = {"max_seq_length": 352, "too_long": "skip", "max_tokens": 60, "lora_keys": "all"}
        for name, more in (("", {}), (", recomputed", {"grad_checkpoint": True})):
            settings = {**SHORT, **limits, **more}
            found[f"stories260K{name}"] = (str(teacher), str(student), settings, {"data": data})
    if smollm2:
        data = [{"text": f"{number} dogs ran to the park. " * 6} for number in range(8)]
        settings = {"num_iters": 2, "max_tokens": 8, "steps_per_eval": 2}
        found["SmolLM2-135M"] = (smollm2, smollm2, settings, {"data": data})
    return found


def main() -> None:
    """Estimate, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", metavar="FOLDER", help="of SmolLM2-135M-Instruct in float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print_setting("Memory, estimated and measured")
    rows, figures = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in cases(Path(scratch), options.smollm2).items():
            peaks = measured(*case, Path(scratch) / name)
            for phase, estimate in estimated(*case).phases.items():
                if phase in peaks and estimate is not None:
                    figures.append({"pair": name, "phase": phase, "estimate": estimate})
                    figures[-1]["measured"] = peaks[phase]
                    shown = [f"{each / 1e6:.1f}" for each in (estimate, peaks[phase])]
                    rows.append((name, phase, *shown, f"{estimate / peaks[phase]:.2f}"))
    columns = ("pair", "phase", "estimate, MB", "measured, MB", "ratio")
    Console(width=100).print(text_table("peak memory", columns, rows, numbers=columns[2:]))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
