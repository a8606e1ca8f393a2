"""Two real domains on one student: distilled, calibrated, and measured beside EGO.

    python tests/benchmarks/cortex_pair.py [--steps 150] [--max-risk 0.4] [--json FILE]

EGO is stories260K, the student its layers 0, 2 and 4; the domains are beginnings of TinyStories
and of questions of gsm8k, a quarter of each held out. The table is that of `conch-dna benchmark`;
below it stand calibration errors with both methods, and the area under the risk-coverage curve.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _setting import print_setting, shared_data, stories
from rich.console import Console

from conch_dna.checkpoints import write_json
from conch_dna.cortex.benchmark.command import run_benchmark
from conch_dna.cortex.benchmark.report import domain_table
from conch_dna.cortex.calibration.calibrating import calibrate_domain
from conch_dna.cortex.calibration.settings import AdapterBenchmarkSettings, CalibrationSettings
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from generations import settings_of
from models import keep_layers

SHORTEST, LONGEST = 150, 240
ANSWER = 32


def opened(texts: list[str], words: int, count: int) -> list[dict[str, str]]:
    """Records whose prompt is a text's first words, and whose completion goes on to 240 letters."""
    found = []
    for text in texts:
        cut = " ".join(text.split())[:LONGEST].rsplit(" ", 1)[0]
        if SHORTEST < len(cut.encode()) <= LONGEST:
            parts = cut.split(" ")
            prompt, rest = " ".join(parts[:words]), " " + " ".join(parts[words:])
            found.append({"prompt": prompt, "completion": rest, "finish_reason": "length"})
    return found[:count]


def domains(count: int) -> dict[str, list[dict[str, str]]]:
    """The records of both domains."""
    path = shared_data() / "text" / "gsm8k" / "train.jsonl"
    asked = [json.loads(line)["question"] for line in path.read_text("utf-8").splitlines()]
    return {
        "beginnings": opened([each["text"] for each in stories("train", 4 * count)], 10, count),
        "questions": opened(asked, 6, count),
    }


def measured(folder: Path, *, steps: int, records: int, max_risk: float) -> dict[str, Any]:
    """Distil both domains in a folder, calibrate and measure; prints as it goes."""
    whole = str(shared_data() / "models" / "stories260K")
    cut = str(keep_layers(Path(whole), folder / "cut", [0, 2, 4]))
    config = replace(
        settings_of(0, steps, folder / "adapters"),
        learning_rate=1e-3,
        max_tokens=48,
        val_fraction=0.25,
    )
    data = domains(records)
    found: dict[str, Any] = {}
    for name, given in data.items():
        TrueKnowledgeDistiller(whole, cut, config).distill_domain(name, data=given)
    settings = AdapterBenchmarkSettings(samples=200, max_tokens=ANSWER, max_risk=max_risk)
    with CortexSuite(folder / "adapters", cut, ego=whole, domains=list(data)) as suite:
        for name in data:
            document = run_benchmark(suite, [name], settings)
            found[name] = document["domains"][name]
            Console(width=120).print(domain_table(name, found[name]))
            for method in ("isotonic", "temperature"):
                calibration, details = calibrate_domain(
                    suite,
                    name,
                    CalibrationSettings(max_tokens=ANSWER, max_risk=max_risk, method=method),
                )
                found[name][method] = {**calibration.to_json(), "details": details}
                print(
                    f"{name}, {method}: ECE {calibration.ece_before:.3f} to "
                    f"{calibration.ece_after:.3f} on {calibration.n_held} held-out answers; area "
                    f"under risk-coverage {details['area']}; {calibration.verdict}"
                )
    return found


def main() -> None:
    """Run as told by the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--records", type=int, default=600)
    parser.add_argument("--max-risk", type=float, default=0.4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print_setting("two domains of stories260K into its layers 0, 2, 4")
    with tempfile.TemporaryDirectory(prefix="conch-cortex-") as folder:
        found = measured(
            Path(folder), steps=given.steps, records=given.records, max_risk=given.max_risk
        )
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
