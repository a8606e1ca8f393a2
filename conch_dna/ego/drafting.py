"""Speculative decoding: a small model drafts what a big one then reads at once, and keeps or not.

Knows two module trees of one vocabulary and mlx_lm's speculative step; nothing of prompts, domains
or who drafts. The answer is the big model's own, whoever drafts. Another reason not to draft: a
branch in `unfit`.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.cross_tokenizer.vocabulary import vocabulary_digest
from conch_dna.training.data.answers import make_sampler, random_key


@dataclass(frozen=True, eq=False)
class Draft:
    """A small model that says beforehand what a big one is likely to say.

    Attributes:
        name: What people call it.
        source: Its tokenizer and sizes.
        model: mlx_lm's module: ids `[B, T]` to logits `[B, T, rows]`; its arrays are computed, so
            that another thread may use them at the same time.
        tokens: How many it proposes at a time.
    """

    name: str
    source: ModelSource
    model: nn.Module
    tokens: int


def other_vocabulary(model: ModelSource, draft: ModelSource) -> str:
    """Why a model has not the tokens of another, so that it cannot draft for it; empty if it has.

    Which tokens end an answer may differ: the big model's count.
    """
    if vocabulary_digest(model.tokenizer) != vocabulary_digest(draft.tokenizer):
        return f"{draft.model_id} has not the tokens of {model.model_id}"
    if draft.vocabulary_size < model.vocabulary_size:
        return (
            f"{draft.model_id} has rows for {draft.vocabulary_size:,} tokens and "
            f"{model.model_id} says {model.vocabulary_size:,}"
        )
    return ""


def unfit(model: LanguageModel, draft: Draft, length: int) -> str:
    """Why a draft cannot be used for a text; empty where it can.

    Args:
        model: Whose answer it is.
        draft: Who would draft.
        length: Tokens of the prompt and the longest answer.
    """
    if problem := other_vocabulary(model.source, draft.source):
        return problem
    if length > (draft.source.context_length or length):
        return (
            f"prompt and answer are longer than the context of {draft.source.model_id}, "
            f"{draft.source.context_length:,} tokens"
        )
    for side, tree in ((model.source, model.model), (draft.source, draft.model)):
        if not _goes_back(_caches(tree), length):
            return f"{side.model_id} remembers a window or a state, out of which no token is taken"
    return ""


def _caches(tree: nn.Module) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    caches: list[Any] = make_prompt_cache(tree)
    return caches


def _goes_back(caches: Sequence[Any], length: int) -> bool:
    """Whether refused tokens can be taken out of caches: a full window and a state forget more."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    return all(
        type(cache) is KVCache or (type(cache) is RotatingKVCache and length < cache.max_size)
        for cache in caches
    )


def drafted_tokens(
    model: LanguageModel,
    draft: Draft,
    ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Generator[tuple[int, bool], None, None]:
    """Tokens of an answer, several a step of the big model, and whether each was drafted.

    A token is the likeliest of the model's log-probabilities plus Gumbel noise of its own position,
    which is a draw from the model's distribution (the Gumbel-max trick). The draft sees the same
    noise, so that it often says the same; what it says changes no token, only their speed
    (Daliri, Musco and Suresh 2024, drafter-invariant speculative decoding).

    Args:
        model: Whose answer it is.
        draft: That `unfit` has nothing against.
        ids: The prompt, not empty.
        max_tokens: Longest answer.
        temperature: 0 takes the likeliest token.
        seed: Of the draw.
    """
    from mlx_lm.generate import speculative_generate_step

    draw = _Draw(model.vocabulary_size, temperature, seed)
    sides = [_Side(tree, _caches(tree), draw) for tree in (model.model, draft.model)]
    steps = speculative_generate_step(
        mx.array(list(ids)),
        *sides,
        # The thread's own: mlx_lm keeps the stream while the caller has the token.
        stream=mx.default_stream(mx.default_device()),
        num_draft_tokens=draft.tokens,
        max_tokens=max_tokens,
        sampler=draw,
        prompt_cache=[cache for side in sides for cache in side.layers],
    )
    try:
        for token, _, drafted in steps:
            yield int(token), bool(drafted)
    finally:
        steps.close()


class _Draw:
    """Log-probabilities `[T, rows]` of the last positions that a model read to token ids `[T]`.

    Args:
        vocabulary_size: Rows from here on are padding and never drawn.
        temperature: 0 takes the likeliest token.
        seed: Of the noise.

    Attributes:
        end: How many tokens the model has read that was asked last.
    """

    def __init__(self, vocabulary_size: int, temperature: float, seed: int) -> None:
        self.end = 0
        self._size, self._temperature, self._seed = vocabulary_size, temperature, seed
        self._likeliest = make_sampler(0, vocabulary_size, mx.random.key(0))
        self._noise: dict[int, mx.array] = {}

    def __call__(self, log_probs: mx.array) -> mx.array:
        if self._temperature == 0:
            return self._likeliest(log_probs)
        places = range(self.end - len(log_probs), self.end)
        # Both models read the same few places one after the other.
        kept = {place: self._noise.get(place) for place in places}
        self._noise |= {place: self._new(place) for place, noise in kept.items() if noise is None}
        noise = mx.stack([self._noise[place] for place in places])
        scaled = log_probs[:, : self._size].astype(mx.float32) / self._temperature
        return self._likeliest(scaled + noise)

    def _new(self, place: int) -> mx.array:
        return mx.random.gumbel((self._size,), key=random_key("drafted", self._seed, place))

    def forget(self, before: int) -> None:
        """Drop the noise of places that no model reads again."""
        self._noise = {place: noise for place, noise in self._noise.items() if place >= before}


class _Side:
    """One of the two models, as mlx_lm asks it: says how far it has read.

    Attributes:
        layers: Its caches; mlx_lm counts them to know which caches are whose.
    """

    def __init__(self, tree: nn.Module, caches: list[Any], draw: _Draw) -> None:
        self.layers = caches
        self._tree = tree
        self._draw = draw

    def __call__(self, tokens: mx.array, *, cache: list[Any]) -> mx.array:
        self._draw.forget(cache[0].offset)
        logits: mx.array = self._tree(tokens, cache=cache)
        self._draw.end = cache[0].offset
        return logits
