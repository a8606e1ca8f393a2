"""What is left of an adapter in its model, by bits and groups: rounded, fitted, healed, whole.

    python tests/benchmarks/fuse_bits.py --adapter FOLDER [--data FILE] [--widths 4,64 4,32 3,64]
        [--steps 40] [--seeds 3] [--answers 16] [--output FOLDER]

Each form is made by `conch-dna fuse` and measured as it measures. Recovered is the share of the
rounded form's KL to the adapter that is gone. What is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from _setting import print_setting, spread
from rich.console import Console

from conch_dna.checkpoints import read_json, write_json
from conch_dna.exporting.fuse import Fusing
from conch_dna.exporting.settings import FuseSettings
from conch_dna.exporting.source import AdapterSource
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import Progress

# Everything is to be measured, so nothing is refused.
ANY = 1e6


def measured(args: argparse.Namespace, name: str, **settings: Any) -> dict[str, Any]:
    """Figures of one form; read back where they are there."""
    path: Path = args.output / f"{name}.json"
    if path.is_file():
        return read_json(path, needs={"figures": list})
    folder, began = args.output / name, time.perf_counter()
    with Progress(plain=True) as report:
        source = AdapterSource.open(args.adapter, trust_remote_code=False, report=report)
        chosen = FuseSettings(max_kl=ANY, answers=args.answers, **settings)
        rows = Fusing(source, folder, chosen, data=args.data, report=report).fused(
            resume=True, overwrite=True
        )
    found = {"figures": [row.to_json() for row in rows], "seconds": time.perf_counter() - began}
    write_json(path, found)
    shutil.rmtree(folder)
    print(name, f"KL {found['figures'][-1]['kl_nats']:.4f}", flush=True)
    return found


def row_of(name: str, runs: list[dict[str, Any]], plain: float | None) -> tuple[str, ...]:
    """A form's row: of one run, or of one of each seed."""
    last = [run["figures"][-1] for run in runs]
    kl = [each["kl_nats"] for each in last]
    gone = spread([100 * (1 - value / plain) for value in kl], 1) if plain else ""
    valid = "" if last[0]["valid"] is None else spread([each["valid"] for each in last], 2)
    return (
        name,
        spread(kl, 4),
        gone,
        spread([100 * each["top1_agreement"] for each in last], 1),
        valid,
        f"{last[0]['bytes'] / 1e6:.0f} MB",
        spread([run["seconds"] for run in runs], 0),
    )


def main() -> None:
    """Do what is not finished, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--widths", nargs="+", default=["4,64", "4,32", "3,64", "3,32", "2,64"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("models/fuse_bits"))
    args = parser.parse_args()
    print_setting(f"{args.adapter} in its model; {args.steps} steps of healing")
    whole = measured(args, "float", bits="float")
    base = whole["figures"][1]
    rows = [row_of("whole weights", [whole], None)]
    for width in args.widths:
        bits, group_size = width.split(",")
        how: dict[str, Any] = {"bits": bits, "group_size": int(group_size)}
        plain = measured(args, f"{bits}-{group_size}-rounded", fit="rounded", **how)
        lost = plain["figures"][-1]["kl_nats"]
        rows.append(row_of(f"{bits} bits, groups of {group_size}: rounded", [plain], lost))
        fitted = measured(args, f"{bits}-{group_size}-fitted", **how)
        rows.append(row_of("  fitted", [fitted], lost))
        healed = [
            measured(args, f"{bits}-{group_size}-healed-{s}", steps=args.steps, seed=s, **how)
            for s in range(args.seeds)
        ]
        if healed:
            rows.append(row_of("  healed", healed, lost))
    columns = ("", "KL", "recovered, %", "top-1, %", "valid", "weights", "seconds")
    title = f"the model without the adapter: KL {base['kl_nats']:.4f}"
    Console(width=130).print(text_table(title, columns, rows))


if __name__ == "__main__":
    main()
