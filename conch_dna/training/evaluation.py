"""What a model makes of given texts: held-out figures against a teacher, scores of tokens.

Knows loaded models, batches and examples; nothing of training or files. To add a held-out figure:
a sum in `heldout_metrics` and a field of `metrics.TokenMetrics`; one of tokens: `TokenScores`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from conch_dna.language_model import LanguageModel
from conch_dna.losses import forward_kl, kept_and_rest, likelihood_kl
from conch_dna.metrics import TokenMetrics, token_metrics
from conch_dna.training.batches import Batch, Example, collate, sequential_batches
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
    for batch in batches:
        tokens += batch.count
        text_bytes += batch.text_bytes
        arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
        gold = []
        for part, logits in model.logits_at(arrays["inputs"], arrays["positions"], chunk=chunk):
            rows = {name: arrays[name][part] for name in _ROWS if name in arrays}
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


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One text's counted tokens under a model, at temperature 1.

    Attributes:
        log_probs: Log-probability of each, in nats `[n]`.
        likeliest: Whether it is the token that the model holds likeliest there `[n]`.
    """

    log_probs: np.ndarray
    likeliest: np.ndarray


def token_scores(
    model: LanguageModel, examples: Sequence[Example], *, batch_size: int, chunk: int = 1024
) -> list[TokenScores]:
    """Score the counted tokens of every example.

    Args:
        model: Loaded.
        examples: With at least one counted token each.
        batch_size: Examples at once.
        chunk: Tokens whose logits exist at once; 0 takes all.

    Returns:
        Scores in the order of the examples.
    """
    scores: dict[int, TokenScores] = {}
    for indices in sequential_batches(examples, batch_size):
        batch = collate([examples[index] for index in indices])
        inputs = mx.array(batch.arrays["inputs"])
        positions = mx.array(batch.arrays["positions"][: batch.count])
        labels = mx.array(batch.arrays["labels"][: batch.count])
        log_probs, likeliest = [], []
        for part, logits in model.logits_at(inputs, positions, chunk=chunk):
            log_probs.append(gold_log_probs(logits, labels[part]))
            likeliest.append(mx.argmax(logits, axis=-1) == labels[part])
            # Here, so that only one chunk's logits exist.
            mx.eval(log_probs[-1], likeliest[-1])
        all_probs = np.asarray(mx.concatenate(log_probs))
        all_likeliest = np.asarray(mx.concatenate(likeliest))
        ends = np.cumsum([examples[index].count for index in indices])
        for index, end in zip(indices, ends, strict=True):
            part = slice(end - examples[index].count, end)
            scores[int(index)] = TokenScores(all_probs[part], all_likeliest[part])
    return [scores[index] for index in range(len(examples))]
