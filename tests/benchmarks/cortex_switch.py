"""Six adapters on one base: a switch beside a reload, and the memory of six domains beside one.

    python tests/benchmarks/cortex_switch.py [--size embedded|100m] [--adapters 6] [--json FILE]

The base is the embedded student, or a random Llama of about 100 million parameters in float32; the
adapters are LoRA of rank 8 on all linear layers with random tensors. A switch is `activate` alone,
and with one token computed after it; a reload is mlx_lm.load of the same adapter. Each number of
domains is measured in a process of its own, after every one of them has answered. Logits of every
adapter, and of the base in the end, are compared bit by bit with what mlx_lm.load gives.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from _setting import print_setting

from conch_dna.checkpoints import write_json
from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.language_model import ModelSource
from cortex_models import write_adapter
from models import make_model_folder

LARGE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 14,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
TEXT = "Once upon a time there was a little girl who had a red ball."


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: Sequence[float], *, unit: float, digits: int) -> str:
    middle, high = (float(np.quantile(values, share)) * unit for share in (0.5, 0.99))
    return f"median {middle:.{digits}f}, p99 {high:.{digits}f} (n = {len(values)})"


def told(values: Sequence[float]) -> dict[str, float]:
    return {
        "n": len(values),
        "median_s": statistics.median(values),
        "p99_s": float(np.quantile(values, 0.99)),
    }


def loaded(model_id: str, folders: Sequence[Path]) -> AdapterBank:
    bank = AdapterBank(ModelSource(model_id).load())
    for number, folder in enumerate(folders):
        bank.add(str(number), folder)
    return bank


def switches(
    model_id: str, folders: Sequence[Path], *, count: int, reloads: int
) -> dict[str, dict[str, float]]:
    """Seconds of each way to come to the next adapter."""
    from mlx_lm import load

    bank = loaded(model_id, folders)
    token = mx.array([[1]])
    model = bank.base.model
    names = bank.names
    times: dict[str, list[float]] = {"switch": [], "switch and a token": [], "a token": []}
    for number in range(count):
        name = names[number % len(names)]
        times["switch"].append(seconds_of(lambda: bank.activate(name)))  # noqa: B023
    # A pass of the large model takes a while.
    for number in range(max(30, count // 20)):
        name = names[number % len(names)]

        def switched(name: str = name) -> None:
            bank.activate(name)
            mx.eval(model(token))

        times["switch and a token"].append(seconds_of(switched))
        times["a token"].append(seconds_of(lambda: mx.eval(model(token))))
    place = str(bank.base.source.folder)
    times["reload"] = []
    for number in range(reloads):
        folder = folders[number % len(folders)]
        times["reload"].append(
            seconds_of(lambda: load(place, adapter_path=str(folder)))  # noqa: B023
        )
        gc.collect()
    unit = {"reload": (1e3, 2, "ms"), "switch": (1e6, 2, "us")}
    for name, values in times.items():
        factor, digits, word = unit.get(name, (1e3, 3, "ms"))
        print(f"  {name}: {spread(values, unit=factor, digits=digits)} {word}", flush=True)
    return {name: told(values) for name, values in times.items()}


def same_bits(model_id: str, folders: Sequence[Path]) -> dict[str, bool]:
    """Whether logits are those of mlx_lm.load, for every adapter and for the base in the end."""
    from mlx_lm import load

    bank = loaded(model_id, folders)
    source = bank.base.source
    ids = mx.array([source.tokenizer.encode(TEXT)])
    found = {}
    for name, folder in zip(bank.names, folders, strict=True):
        bank.activate(name)
        here = bank.base.model(ids)
        other, *_ = load(str(source.folder), adapter_path=str(folder))
        found[name] = bool(mx.array_equal(here, other(ids)))
    bank.activate(None)
    other, *_ = load(str(source.folder))
    found["base"] = bool(mx.array_equal(bank.base.model(ids), other(ids)))
    return found


def memory(model_id: str, folders: Sequence[Path]) -> dict[str, int]:
    """Bytes of this process once every adapter has answered."""
    bank = loaded(model_id, folders)
    ids = mx.array([bank.base.tokenizer.encode(TEXT)])
    for name in bank.names:
        bank.activate(name)
        mx.eval(bank.base.model(ids))
    gc.collect()
    mx.clear_cache()
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "active": mx.get_active_memory(),
        "peak": mx.get_peak_memory(),
        "process peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def memory_apart(model_id: str, folders: Sequence[Path]) -> dict[str, int]:
    command = [sys.executable, __file__, "--memory-of", model_id, *map(str, folders)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, int] = json.loads(answer.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Switching adapters, and their memory.")
    parser.add_argument("--size", choices=("embedded", "100m"), default="embedded")
    parser.add_argument("--adapters", type=int, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--switches", type=int, default=3000)
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        model_id, *places = arguments.memory_of
        print(json.dumps(memory(model_id, [Path(place) for place in places])))
        return
    count = arguments.adapters
    print_setting(f"switching among {count} adapters of rank {arguments.rank}: {arguments.size}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model_id = "embedded:student"
        if arguments.size == "100m":
            model_id = str(make_model_folder(folder / "base", **LARGE))
        folders = [
            write_adapter(
                folder / f"adapter{number}",
                model_id,
                seed=number,
                lora_keys="all",
                lora_rank=arguments.rank,
            )
            for number in range(count)
        ]
        bank = loaded(model_id, folders)
        sizes = {"base_bytes": bank.base_bytes, "adapter_bytes": bank.bytes_of("0")}
        del bank
        print(
            f"  base {sizes['base_bytes'] / 2**20:.1f} MiB, each adapter "
            f"{sizes['adapter_bytes'] / 2**20:.2f} MiB"
        )
        times = switches(model_id, folders, count=arguments.switches, reloads=arguments.reloads)
        bits = same_bits(model_id, folders)
        apart = {number: memory_apart(model_id, folders[:number]) for number in (1, count)}
    ratios = {name: apart[count][name] / apart[1][name] for name in apart[1]}
    for name, ratio in ratios.items():
        one, all_ = (apart[number][name] / 2**20 for number in (1, count))
        print(f"  {name} memory: {one:.1f} MiB of 1 domain, {all_:.1f} of {count}: {ratio:.3f}")
    print(f"  bit-equal with mlx_lm.load: {sum(bits.values())} of {len(bits)}, the base among them")
    if arguments.json:
        document = {"size": arguments.size, "adapters": count, "rank": arguments.rank, **sizes}
        document |= {"times": times, "bit_equal": bits, "memory": apart, "ratios": ratios}
        write_json(arguments.json, document)


if __name__ == "__main__":
    main()
