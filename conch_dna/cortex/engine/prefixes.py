"""Prompt caches of beginnings that many prompts share, the least recently used dropped first.

Knows mlx_lm's prompt caches and module trees; nothing of domains' meaning or of batches. It is
never asked for less than a whole kept beginning, so no kind of cache has to be cut.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from conch_dna.training.data.beginnings import prompt_cache

_Key = tuple[str | None, tuple[int, ...]]


class PrefixCaches:
    """Computed once for each owner, version and beginning.

    Args:
        max_bytes: Most memory of what is kept; a larger one is computed and not kept.

    Attributes:
        computed: How many beginnings were computed so far.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.computed = 0
        # Holds the tree, so that another version is another object.
        self._kept: OrderedDict[_Key, tuple[nn.Module, list[Any], int]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(size for _, _, size in self._kept.values())

    def get(self, owner: str | None, tree: nn.Module, prefix: Sequence[int]) -> list[Any]:
        """A prompt cache of the beginning that the caller may change.

        Args:
            owner: Whose it is, see `forget`.
            tree: The model that computes it; another one than before is another version.
            prefix: Token ids; an empty cache is for none.
        """
        if not prefix:
            return prompt_cache(tree, prefix)
        key = (owner, tuple(prefix))
        entry = self._kept.get(key)
        if entry is None or entry[0] is not tree:
            cache = prompt_cache(tree, prefix)
            entry = (tree, cache, sum(part.nbytes for part in cache))
            self.computed += 1
            self._kept[key] = entry
        self._kept.move_to_end(key)
        while self._kept and self.nbytes > self.max_bytes:
            self._kept.popitem(last=False)
        return copy.deepcopy(entry[1])

    def forget(self, owner: str | None) -> None:
        """Drop all that was kept for an owner."""
        for key in [key for key in self._kept if key[0] == owner]:
            del self._kept[key]
