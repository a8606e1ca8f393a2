"""The command of `make demo` with three seeds: the share of the held-out KL it takes away."""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _setting import TESTS, print_setting, spread

SEEDS = (0, 1, 2)


def demo_options() -> list[str]:
    """The options of `make demo`, from the Makefile, without the output folder."""
    text = (TESTS.parent / "Makefile").read_text(encoding="utf-8")
    match = re.search(r"^DEMO_OPTIONS := ((?:.*\\\n)*.*)", text, re.MULTILINE)
    assert match
    words = match.group(1).replace("\\\n", " ").split()
    place = words.index("--output-dir")
    return words[:place] + words[place + 2 :]


def main() -> None:
    """Run the demo once for each seed."""
    options = demo_options()
    print_setting(f"make demo with seeds {SEEDS}: {' '.join(options)}")
    closed, seconds = [], []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "conch_dna.training.true_kd", *options]
            command += ["--seed", str(seed), "--output-dir", folder]
            began = time.perf_counter()
            subprocess.run(command, cwd=TESTS.parent, check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
            path = Path(folder) / "stories" / "adapters_kd" / "evaluation.json"
            figures = json.loads(path.read_text(encoding="utf-8"))
        closed.append(figures["gap_closed"])
        print(
            f"  seed {seed}: held-out KL {figures['before']['kl_nats']:.4f} to "
            f"{figures['after']['kl_nats']:.4f}, {figures['gap_closed']:.1%} closed",
            flush=True,
        )
    print(f"  gap closed: {spread(closed, 3)}; wanted at least 0.30")
    print(f"  seconds:    {spread(seconds, 0)}")


if __name__ == "__main__":
    main()
