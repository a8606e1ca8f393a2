"""How a model holds the tokens of given texts: log-probabilities, and which it holds likeliest.

Knows a loaded model and tokenized examples; nothing of who asks or what is made of it.
To give another figure of every token: an array in `TokenScores`, filled in `token_scores`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from conch_dna.language_model import LanguageModel
from conch_dna.training.batches import Example, collate, sequential_batches
from conch_dna.training.head_loss import gold_log_probs


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
    found: dict[int, TokenScores] = {}
    plain = model.has_plain_head
    for indices in sequential_batches(examples, batch_size):
        batch = collate([examples[index] for index in indices])
        inputs = mx.array(batch.arrays["inputs"])
        states = model.body(inputs) if plain else model.logits(inputs)
        positions = mx.array(batch.arrays["positions"][: batch.count])
        labels = mx.array(batch.arrays["labels"][: batch.count])
        states = states.reshape(-1, states.shape[-1])[positions]
        log_probs, likeliest = [], []
        for start in range(0, batch.count, chunk or batch.count):
            part = slice(start, start + (chunk or batch.count))
            logits = model.head(states[part]) if plain else states[part]
            log_probs.append(gold_log_probs(logits, labels[part]))
            likeliest.append(mx.argmax(logits, axis=-1) == labels[part])
            # Here, so that only one chunk's logits exist.
            mx.eval(log_probs[-1], likeliest[-1])
        all_probs = np.asarray(mx.concatenate(log_probs))
        all_likeliest = np.asarray(mx.concatenate(likeliest))
        ends = np.cumsum([examples[index].count for index in indices])
        for index, end in zip(indices, ends, strict=True):
            part = slice(end - examples[index].count, end)
            found[int(index)] = TokenScores(all_probs[part], all_likeliest[part])
    return [found[index] for index in range(len(examples))]
