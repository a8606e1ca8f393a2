"""Before and after: held-out figures of a model against the teacher's targets.

Knows loaded models and batches that carry targets; nothing of training or files.
To add a figure: a sum here, a field of `metrics.TokenMetrics`.
"""

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from conch_dna.language_model import LanguageModel
from conch_dna.losses import forward_kl, kept_and_rest, likelihood_kl
from conch_dna.metrics import TokenMetrics, token_metrics
from conch_dna.training.batches import Batch, Example
from conch_dna.training.head_loss import chunk_log_probs, gold_log_probs, with_nothing
from conch_dna.training.soft_targets import Targets

_ROWS = ("kept_ids", "teacher_log_probs", "best_ids", "soft_weights", "labels", "weights")


def heldout_metrics(
    model: LanguageModel, batches: Iterable[Batch], *, chunk: int = 1024
) -> TokenMetrics:
    """Figures of a model on held-out batches, at temperature 1.

    The KL is over the kept tokens and the rest, so it is a lower bound of the full KL.

    Args:
        model: Student or other model with the student's tokenizer.
        batches: Of `Targets.evaluation_batch`.
        chunk: Tokens whose logits exist at once; 0 takes all.
    """
    totals = dict.fromkeys(("kl", "agreeing", "compared", "gold", "chunk_kl", "chunks"), 0.0)
    tokens = text_bytes = 0
    plain = model.has_plain_head
    for batch in batches:
        tokens += batch.count
        text_bytes += batch.text_bytes
        arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
        states = model.body(arrays["inputs"]) if plain else model.logits(arrays["inputs"])
        states = states.reshape(-1, states.shape[-1])[arrays["positions"]]
        size = chunk or states.shape[0]
        gold = []
        for start in range(0, states.shape[0], size):
            rows = {n: arrays[n][start : start + size] for n in _ROWS if n in arrays}
            part = states[start : start + size]
            logits = model.head(part) if plain else part
            gold.append(gold_log_probs(logits, rows["labels"]))
            sums = {"gold": (gold[-1] * rows["weights"]).sum()}
            if "kept_ids" in rows:
                sums |= _compared(logits, rows, nothing=model.source.token_count)
            mx.eval(sums, gold[-1])
            for name, value in sums.items():
                totals[name] += float(value)
        student = chunk_log_probs(mx.concatenate(gold), arrays)
        distances = likelihood_kl(arrays["chunk_log_probs"], student)
        totals["chunk_kl"] += float((distances * arrays["chunk_weights"]).sum())
        totals["chunks"] += float(arrays["chunk_weights"].sum())
    return token_metrics(
        kl_sum=totals["kl"],
        cross_entropy_sum=-totals["gold"],
        agreeing=totals["agreeing"],
        compared_tokens=round(totals["compared"]),
        chunk_kl_sum=totals["chunk_kl"],
        chunks=round(totals["chunks"]),
        tokens=tokens,
        text_bytes=text_bytes,
    )


def _compared(logits: mx.array, rows: dict[str, mx.array], *, nothing: int) -> dict[str, mx.array]:
    student = kept_and_rest(with_nothing(logits.astype(mx.float32), nothing), rows["kept_ids"])
    weights = rows["soft_weights"]
    best = mx.argmax(logits, axis=-1)
    return {
        "kl": (forward_kl(rows["teacher_log_probs"], student) * weights).sum(),
        "agreeing": ((best == rows["best_ids"]) * weights).sum(),
        "compared": weights.sum(),
    }


def teacher_metrics(examples: Iterable[Example], targets: Targets) -> TokenMetrics:
    """The teacher's own figures over its own tokens, from its stored targets alone."""
    tokens = text_bytes = 0
    total = 0.0
    for example in examples:
        gold = targets.gold(example)
        tokens += len(gold)
        text_bytes += example.text_bytes
        total += float(gold.sum(dtype=np.float64))
    return token_metrics(
        cross_entropy_sum=-total,
        tokens=tokens,
        agreeing=tokens,
        compared_tokens=tokens,
        chunks=tokens,
        text_bytes=text_bytes,
    )
