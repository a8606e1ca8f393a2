"""Before and after: held-out figures of a model against the teacher's targets.

Knows loaded models and batches that carry targets; nothing of training or files.
To add a figure: a sum here, a field of `metrics.TokenMetrics`.
"""

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from conch_dna.language_model import LanguageModel
from conch_dna.losses import forward_kl, kept_and_rest, token_cross_entropy
from conch_dna.metrics import TokenMetrics, token_metrics
from conch_dna.training.batches import Batch

_ROWS = ("kept_ids", "teacher_log_probs", "labels", "weights")


def heldout_metrics(
    model: LanguageModel, batches: Iterable[Batch], *, chunk: int = 1024
) -> TokenMetrics:
    """Figures of a model on held-out batches, at temperature 1.

    The KL is over the kept tokens and the rest, so it is a lower bound of the full KL.

    Args:
        model: Student or other model with the teacher's tokenizer.
        batches: With `kept_ids` and `teacher_log_probs` at temperature 1.
        chunk: Tokens whose logits exist at once; 0 takes all.
    """
    totals = np.zeros(3)
    tokens = 0
    plain = model.has_plain_head
    for batch in batches:
        tokens += batch.count
        arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
        states = model.body(arrays["inputs"]) if plain else model.logits(arrays["inputs"])
        states = states.reshape(-1, states.shape[-1])[arrays["positions"]]
        size = chunk or states.shape[0]
        for start in range(0, batch.count, size):
            rows = {name: arrays[name][start : start + size] for name in _ROWS}
            part = states[start : start + size]
            logits = model.head(part) if plain else part
            student = kept_and_rest(logits, rows["kept_ids"])
            weights = rows["weights"]
            best = mx.argmax(logits, axis=-1)
            sums = mx.stack(
                [
                    (forward_kl(rows["teacher_log_probs"], student) * weights).sum(),
                    (token_cross_entropy(logits, rows["labels"]) * weights).sum(),
                    ((best == rows["kept_ids"][:, 0]) * weights).sum(),
                ]
            )
            totals += np.asarray(sums, np.float64)
    return token_metrics(
        kl_sum=float(totals[0]),
        cross_entropy_sum=float(totals[1]),
        agreeing=float(totals[2]),
        tokens=tokens,
    )


def teacher_metrics(batches: Iterable[Batch]) -> TokenMetrics:
    """The teacher's own figures, from its stored targets alone."""
    tokens, gold = 0, 0.0
    for batch in batches:
        tokens += batch.count
        gold += float(batch.arrays["gold_log_prob"][: batch.count].sum(dtype=np.float64))
    return token_metrics(kl_sum=0.0, cross_entropy_sum=-gold, agreeing=tokens, tokens=tokens)
