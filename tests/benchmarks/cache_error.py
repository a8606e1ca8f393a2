"""Bytes per token of the soft-target cache, the error of its KL, and its speed.

    python tests/benchmarks/cache_error.py [--model FOLDER]

Teacher and student are both trained: stories260K, and the same with layers 0, 2 and 4; the
embedded pair; and a model given beside itself without every fifth layer. The text is held-out
TinyStories. The error of few kept tokens is against dense targets, that of few bits against the
same tokens in float32.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from _setting import print_setting, shared_data, stories

from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.loading.model_config import read_config
from conch_dna.losses import forward_kl, log_softmax
from conch_dna.training.batches import Example, collate, sequential_batches
from conch_dna.training.data.outcomes import EXACT_BITS, target_identity
from conch_dna.training.data.records import fitting, tokenize_records
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.data.target_codec import Decoder, encode
from conch_dna.training.evaluation import heldout_metrics
from models import keep_layers


def dense_kl(teacher, student, examples) -> float:
    """KL(teacher‖student) at temperature 1 over all tokens, nats per token."""
    total, tokens = 0.0, 0
    for indices in sequential_batches(examples, 4):
        batch = collate([examples[i] for i in indices])
        inputs, positions = (mx.array(batch.arrays[n]) for n in ("inputs", "positions"))
        log_probs = [
            log_softmax(model.logits(inputs).reshape(-1, model.vocabulary_size)[positions])
            for model in (teacher, student)
        ]
        kl = forward_kl(*log_probs) * mx.array(batch.arrays["weights"])
        total += float(np.asarray(kl, np.float64).sum())
        tokens += batch.count
    return total / tokens


def kl_to(student: LanguageModel, cache: SoftTargetCache, examples: list[Example]) -> float:
    """Held-out KL at temperature 1 by what is in a cache, nats per token."""
    chosen = ([examples[i] for i in indices] for indices in sequential_batches(examples, 4))
    kl = heldout_metrics(student, map(cache.evaluation_batch, chosen)).kl_nats
    assert kl is not None
    return kl


def speeds(cache: SoftTargetCache, examples: list[Example], bits: int) -> str:
    """Tokens a second of writing and reading, without the teacher and the disk."""
    if bits == EXACT_BITS:
        return ""
    parts = [cache.read(example) for example in examples]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    began = time.perf_counter()
    stored = encode(rows, bits)
    written = time.perf_counter()
    identity = cache.identity
    options = {"top_k": identity.top_k, "temperatures": identity.temperatures, "bits": bits}
    decoder = Decoder(stored, **options)
    for number in range(len(stored["ends"])):
        decoder.block(number)
    count, done = len(rows["kept_ids"]), time.perf_counter()
    each = [f"{count / seconds:,.0f}" for seconds in (written - began, done - written)]
    return f", written {each[0]} and read {each[1]} a second"


def main() -> None:
    """Print a line for each number of kept tokens and of bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a real model, beside the tiny ones")
    parser.add_argument("--texts", type=int, default=60)
    args = parser.parse_args()
    data = shared_data()
    print_setting("Soft-target cache at temperature 2: size, KL, speed")
    with tempfile.TemporaryDirectory() as temporary:
        story = data / "models" / "stories260K"
        cut = keep_layers(story, Path(temporary) / "student", [0, 2, 4])
        pairs = {
            "stories260K and its 3 layers": (str(story), str(cut)),
            "embedded pair": ("embedded:teacher", "embedded:student"),
        }
        if args.model:
            count = read_config(Path(args.model))["num_hidden_layers"]
            kept = [number for number in range(count) if number % 5 != 4]
            thin = keep_layers(Path(args.model), Path(temporary) / "thin", kept)
            pairs = {f"{Path(args.model).name} and {len(kept)} layers": (args.model, str(thin))}
        for label, (teacher_id, student_id) in pairs.items():
            teacher, student = ModelSource(teacher_id), ModelSource(student_id)
            examples = tokenize_records(stories("heldout", args.texts), teacher.tokenizer)
            examples = [examples[index] for index in fitting(examples, 512, skip=True)]
            loaded = student.load()
            dense = dense_kl(teacher.resident(), loaded, examples)
            tokens = sum(example.count for example in examples)
            print(f"  {label}, {tokens:,} held-out tokens, dense KL {dense:.6f} nats")
            for k in (16, 64, 128):
                exact = 0.0
                for bits in (EXACT_BITS, 8, 7, 6) if k == 64 else (EXACT_BITS, 7):
                    identity = target_identity(teacher, top_k=k, temperature=2.0, bits=bits)
                    # In a folder of its own, so that what is exact does not serve for all.
                    cache = SoftTargetCache(Path(temporary) / f"{label} {bits}", identity)
                    cache.fill(teacher, examples, batch_size=4)
                    kl = kl_to(loaded, cache, examples)
                    size = sum(path.stat().st_size for path in cache.folder.iterdir())
                    exact = exact or kl
                    print(
                        f"    K = {k:3d}, {bits:2d} bits: {size / tokens:.1f} bytes per token, KL "
                        f"{kl:.6f}, of dense {(kl - dense) / dense:+.2%}, of float32 "
                        f"{(kl - exact) / exact:+.3%}{speeds(cache, examples, bits)}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
