"""Perplexity of an adapter in its model: here, and as GGUF files that llama.cpp runs.

    python tests/benchmarks/llama_cpp_files.py --adapter FOLDER [--texts 3] [--kinds f32 q8_0 q4_0]
        [--output FOLDER]

On held-out texts of the adapter, a token at a time, on one thread. Beside its model stands the
adapter as a file of its own (gguf-lora). Needs the package xllamacpp.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import math
import statistics
from pathlib import Path

import mlx.core as mx
import numpy as np
from _setting import print_setting
from rich.console import Console

from conch_dna.exporting.adapter_files import export_gguf, export_gguf_lora
from conch_dna.exporting.gguf_model import write_gguf_model
from conch_dna.exporting.settings import GGUF_KINDS
from conch_dna.exporting.source import AdapterSource
from conch_dna.language_model import named_arrays
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import silent
from llama_cpp import LlamaCpp

# Where a token is not among so many, all are asked for.
FEW = 400


def there(model: LlamaCpp, ids: list[int], size: int) -> list[float]:
    """Minus log-probabilities of a text's tokens but the first, by llama.cpp."""
    found = []
    for place in range(1, len(ids)):
        row = model.likeliest(ids[:place], FEW)
        if ids[place] not in row:
            row = model.likeliest(ids[:place], size)
        found.append(-row[ids[place]])
    return found


def main() -> None:
    """Write the files, run them, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["f32", "q8_0", "q4_0"], choices=GGUF_KINDS)
    parser.add_argument("--output", type=Path, default=Path("models/llama_cpp_files"))
    args = parser.parse_args()
    print_setting(f"{args.adapter}, {args.texts} held-out texts")
    adapter = AdapterSource.open(args.adapter, trust_remote_code=False, report=silent)
    split = adapter.split(None, adapter.config())
    texts = [example.ids.tolist() for example in split.heldout[: args.texts]]
    bare, adapted = adapter.load()
    own: list[float] = []
    for ids in texts:
        logits = adapted.logits(mx.array([ids]))[0].astype(mx.float32)
        rows = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        own += (-rows[np.arange(len(ids) - 1), ids[1:]]).tolist()
    size = rows.shape[1]
    args.output.mkdir(parents=True, exist_ok=True)
    base, lora = args.output / "base.gguf", args.output / "lora.gguf"
    if not base.is_file():
        arrays = named_arrays(bare.model.parameters())
        write_gguf_model(base, adapter.base, arrays, "f32", silent)
    if not lora.is_file():
        export_gguf_lora(adapter, lora)
    bare.release()
    adapted.release()
    files: list[tuple[str, Path, Path | None]] = [("gguf-lora beside f32", base, lora)]
    for kind in args.kinds:
        path = args.output / f"{kind}.gguf"
        if not path.is_file():
            export_gguf(adapter, path, kind, silent)
        files.append((kind, path, None))
    found = {"here": own}
    for name, path, beside in files:
        model = LlamaCpp(path, beside, plain=adapter.base.tokenizer.encode("a")[-1])
        found[name] = [each for ids in texts for each in there(model, ids, size)]
        print(name, math.exp(statistics.mean(found[name])), flush=True)
    rows_shown = [
        (
            name,
            f"{math.exp(statistics.mean(values)):.4f}",
            f"{max(abs(a - b) for a, b in zip(values, own, strict=True)):.1e}",
        )
        for name, values in found.items()
    ]
    columns = ("", "perplexity", "largest difference of a token, nats")
    Console(width=100).print(text_table(f"{len(own)} tokens", columns, rows_shown))


if __name__ == "__main__":
    main()
