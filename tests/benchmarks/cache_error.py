"""Bytes per token of the soft-target cache, and the error of its KL against dense targets.

Teacher and student are both trained: stories260K, and the same with layers 0, 2 and 4; and the
embedded pair. The text is held-out TinyStories.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from _setting import print_setting, shared_data, stories

from conch_dna.language_model import ModelSource
from conch_dna.losses import forward_kl, log_softmax
from conch_dna.training.batches import collate, sequential_batches
from conch_dna.training.data.outcomes import target_identity
from conch_dna.training.data.records import fitting, tokenize_records
from conch_dna.training.evaluation import heldout_metrics
from conch_dna.training.soft_targets import SoftTargetCache
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


def main() -> None:
    data = shared_data()
    print_setting("Soft-target cache at temperature 2: size, and KL against dense targets")
    with tempfile.TemporaryDirectory() as temporary:
        story = data / "models" / "stories260K"
        cut = keep_layers(story, Path(temporary) / "student", [0, 2, 4])
        pairs = {
            "stories260K and its 3 layers": (str(story), str(cut)),
            "embedded pair": ("embedded:teacher", "embedded:student"),
        }
        for label, (teacher_id, student_id) in pairs.items():
            teacher, student = ModelSource(teacher_id), ModelSource(student_id)
            examples = tokenize_records(stories("heldout", 60), teacher.tokenizer)
            examples = [examples[index] for index in fitting(examples, 512, skip=True)]
            loaded = student.load()
            dense = dense_kl(teacher.resident(), loaded, examples)
            tokens = sum(example.count for example in examples)
            print(f"  {label}, {tokens:,} held-out tokens, dense KL {dense:.6f} nats")
            for k in (16, 64, 128):
                identity = target_identity(teacher, top_k=k, temperature=2.0)
                cache = SoftTargetCache(Path(temporary) / label, identity)
                cache.fill(teacher, examples, batch_size=4)
                batches = (
                    cache.collate([examples[i] for i in indices], 1.0)
                    for indices in sequential_batches(examples, 4)
                )
                kept = heldout_metrics(loaded, batches).kl_nats
                size = sum(path.stat().st_size for path in cache.folder.iterdir())
                print(
                    f"    K = {k:3d}: {size / tokens:.1f} bytes per token, KL {kept:.6f}, "
                    f"error {kept - dense:+.6f} ({(kept - dense) / dense:+.2%})"
                )


if __name__ == "__main__":
    main()
