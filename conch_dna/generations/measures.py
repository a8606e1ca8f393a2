"""What gates are decided on: how well a model writes given texts, and what it answers.

Knows loaded models and tokenized examples; nothing of thresholds, lines or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conch_dna.generations.taboo import TabooTokens
from conch_dna.language_model import LanguageModel
from conch_dna.training.answers import sample_texts
from conch_dna.training.batches import Example
from conch_dna.training.evaluation import token_scores
from conch_dna.training.settings import KDConfig


@dataclass(frozen=True, eq=False)
class Scores:
    """How well a model writes texts, one figure for each.

    Attributes:
        top1: Share of a text's counted tokens that the model holds likeliest `[n]`, 0 to 1.
        nats: Cross-entropy of its counted tokens, in nats per token `[n]`.
        tokens: How many tokens count `[n]`.
    """

    top1: np.ndarray
    nats: np.ndarray
    tokens: np.ndarray

    def to_json(self) -> dict[str, float | int]:
        """Means over texts of `top1`, and over tokens of `nats`."""
        return {
            "texts": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            "top1": float(self.top1.mean()) if len(self.top1) else 0.0,
            "nats_per_token": float((self.nats * self.tokens).sum() / max(1, self.tokens.sum())),
        }


def text_scores(
    model: LanguageModel, examples: Sequence[Example], *, batch_size: int, chunk: int = 1024
) -> Scores:
    """Score every text under a model.

    Args:
        model: Loaded.
        examples: With at least one counted token each.
        batch_size: Texts at once.
        chunk: Tokens whose logits exist at once; 0 takes all.
    """
    scores = token_scores(model, examples, batch_size=batch_size, chunk=chunk)
    return Scores(
        np.array([each.likeliest.mean(dtype=np.float64) for each in scores]),
        np.array([-each.log_probs.mean(dtype=np.float64) for each in scores]),
        np.array([example.count for example in examples], np.int64),
    )


@dataclass(frozen=True, eq=False)
class Measured:
    """One model's measures.

    Attributes:
        recall: On earlier held-out data.
        generalize: On the new held-out data.
        answers: To the same prompts as the other model's.
    """

    recall: Scores
    generalize: Scores
    answers: list[str]

    def to_json(self, taboo: TabooTokens | None, tokenizer: Any) -> dict[str, Any]:
        """The figures, with how many answers hold a taboo word where there are some."""
        found: dict[str, Any] = {
            "recall": self.recall.to_json(),
            "generalize": self.generalize.to_json(),
        }
        if taboo:
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in self.answers]
            found["answers_with_taboo_words"] = sum(bool(taboo.spelled(i).any()) for i in ids)
        return found


def measure(
    model: LanguageModel,
    *,
    recall: Sequence[Example],
    generalize: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    config: KDConfig,
) -> Measured:
    """Score a model on two sets of texts and let it answer prompts.

    Args:
        model: Loaded.
        recall: Earlier held-out texts.
        generalize: New held-out ones.
        prompts: Token ids.
        config: Batch size, and how answers are drawn.
    """
    scores = [
        text_scores(model, part, batch_size=config.batch_size, chunk=config.head_chunk)
        for part in (recall, generalize)
    ]
    return Measured(scores[0], scores[1], sample_texts(model, prompts, config))
