"""A sweep of nine on the embedded pair beside nine single runs: time, and whether the bits agree.

    python tests/benchmarks/sweep.py [--steps 40] [--json FILE]

Temperatures 1, 2, 4 times alphas 0.5, 0.7, 0.9; the teacher answers the 60 openings of the demo.
Each single run is a `conch-dna distill` with an output folder of its own, which keeps nine of them
and what they learned from. Wall time and processor time: on a busy machine the first says little.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from _setting import print_setting

from conch_dna.language_model import ASSETS

TEMPERATURES, ALPHAS = ("1", "2", "4"), ("0.5", "0.7", "0.9")
FIXED = {
    "domain": "stories",
    "teacher": "embedded:teacher",
    "student": "embedded:student",
    "prompts": str(ASSETS / "story_openings.txt"),
    "max-tokens": "64",
    "lora-keys": "all,model.embed_tokens",
    "lora-scale": "4",
    "learning-rate": "5e-4",
    "batch-size": "8",
    "val-fraction": "0.2",
    "steps-per-eval": "20",
}


def run(command: str, **options: str) -> tuple[float, float]:
    """Wall and processor seconds of a command of conch-dna."""
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    before, began = os.times(), time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "conch_dna", command, *given],
        check=True,
        capture_output=True,
    )
    after = os.times()
    processor = after.children_user + after.children_system
    processor -= before.children_user + before.children_system
    return time.monotonic() - began, processor


def main() -> None:
    """Time both, and compare every adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print_setting(f"a sweep of nine beside nine single runs, {options.steps} steps each")
    fixed = {**FIXED, "iters": str(options.steps)}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        swept = {"temperature": ",".join(TEMPERATURES), "alpha": ",".join(ALPHAS)}
        sweep = run("sweep", **fixed, **swept, **{"output-dir": str(place)})
        print(f"  sweep: {sweep[0]:.0f} s, of the processor {sweep[1]:.0f} s", flush=True)
        single, same = [0.0, 0.0], 0
        for temperature, alpha in product(TEMPERATURES, ALPHAS):
            name = f"temperature-{temperature}_alpha-{alpha}"
            own = {"temperature": temperature, "alpha": alpha, "output-dir": str(place / name)}
            single = [a + b for a, b in zip(single, run("distill", **fixed, **own), strict=True)]
            adapters = [
                (folder / name / "stories" / "adapters_kd" / "adapters.safetensors").read_bytes()
                for folder in (place, place / "stories-sweep")
            ]
            same += adapters[0] == adapters[1]
        print(f"  nine runs: {single[0]:.0f} s, of the processor {single[1]:.0f} s")
        print(f"  ratio {single[0] / sweep[0]:.2f}, of the processor {single[1] / sweep[1]:.2f}")
        print(f"  adapters with the same bytes: {same} of 9")
        document = json.loads((place / "stories-sweep" / "sweep.json").read_text())
        for row in document["runs"]:
            figure = f"{document['figure']} {row['after'][document['figure']]:.4f}"
            # Adapters of step 0 are equal whatever was trained.
            print(f"  {row['name']}: {figure}, kept step {row['best_step']}")
        if options.json:
            figures = {"sweep": sweep, "nine": single, "same": same, "document": document}
            options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
