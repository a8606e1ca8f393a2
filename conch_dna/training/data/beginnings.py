"""Beginnings that several texts share, computed once for all of them.

Knows mlx_lm's prompt caches and module trees; nothing of what is asked or compared. Only plain
key-value caches are taken apart into rows: with any other kind nothing is shared.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.training.chats.conversations import common_prefix

Ids = Sequence[int] | np.ndarray
# Fewer tokens than that are not worth the trouble.
SHORTEST = 32
STEP = 2048


def prompt_cache(tree: nn.Module, ids: Sequence[int]) -> list[Any]:
    """A model's prompt cache of a beginning, one entry a layer; empty caches for none.

    Args:
        tree: mlx_lm's module.
        ids: Token ids of the beginning.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache: list[Any] = make_prompt_cache(tree)
    for start in range(0, len(ids), STEP):
        tree(mx.array([list(ids[start : start + STEP])]), cache=cache)
        mx.eval([entry.state for entry in cache])
    return cache


class SharedBeginning:
    """What texts have in common at their beginning, and the model's cache of it.

    Args:
        tree: mlx_lm's module.
        texts: Token ids of each text.
        before: How many of its first tokens each text can share at most.

    Attributes:
        length: How many tokens are shared; 0 where that is not worth it, or the model keeps
            something else of a prompt than keys and values.
    """

    def __init__(self, tree: nn.Module, texts: Sequence[Ids], before: Sequence[int]) -> None:
        self.length = shared_length(texts, before)
        self._cache: list[Any] = []
        if self.length and can_share(tree):
            self._cache = prompt_cache(tree, [int(one) for one in texts[0][: self.length]])
        else:
            self.length = 0

    def cache(self, rows: int) -> list[Any] | None:
        """A prompt cache for as many rows, which the caller may change; None where none is shared.

        Args:
            rows: Texts that go on from it.
        """
        from mlx_lm.models.cache import KVCache

        if not self.length:
            return None
        caches = []
        for entry in self._cache:
            keys, values = (
                mx.broadcast_to(part[..., : self.length, :], (rows, *_shape(part, self.length)))
                for part in (entry.keys, entry.values)
            )
            cache = KVCache()
            cache.keys, cache.values, cache.offset = keys, values, self.length
            caches.append(cache)
        return caches


def _shape(part: mx.array, length: int) -> tuple[int, int, int]:
    return part.shape[1], length, part.shape[3]


def shared_length(texts: Sequence[Ids], before: Sequence[int]) -> int:
    """How many tokens texts share at their beginning; 0 for fewer than are worth it.

    Args:
        texts: Token ids of each.
        before: How many of its first tokens each can share at most.
    """
    if len(texts) < 2:
        return 0
    most = min(before)
    starts = [np.asarray(text[:most]).tolist() for text in texts]
    # What the first and the last in order share all between them share too.
    length = common_prefix(min(starts), max(starts))
    return length if length >= SHORTEST else 0


def can_share(tree: nn.Module) -> bool:
    """Whether a model keeps of a prompt its keys and values alone."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    return all(type(entry) is KVCache for entry in make_prompt_cache(tree))
