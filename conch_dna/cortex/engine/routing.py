"""One batch whose rows have different adapters.

Knows an adapter bank and mlx_lm's prompt caches; nothing of requests, sampling or when rows come
and go. Each row's adapter travels through mlx_lm's batches as the last entry of its prompt cache.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from conch_dna.cortex.engine.adapter_bank import AdapterBank


class RowShapeError(ValueError):
    """A layer got an array whose first axis is not the batch's rows."""


class Rows:
    """Which adapter each row of the batch has that the model is computing now.

    Attributes:
        indices: `[B]`, int32.
    """

    def __init__(self) -> None:
        self.indices = mx.array([], dtype=mx.int32)

    def of(self, x: mx.array) -> mx.array:
        """The indices for an input whose first axis must be the rows.

        Raises:
            RowShapeError: It is not.
        """
        if x.ndim < 2 or x.shape[0] != self.indices.size:
            raise RowShapeError(f"{self.indices.size} rows, but an input of shape {x.shape}")
        return self.indices


class RowCache:
    """The row's adapter, in the form of an entry of mlx_lm's prompt cache.

    It has what `BatchGenerator` asks of one.

    Args:
        rows: Index of each row's adapter; one row where it belongs to one sequence.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)

    @staticmethod
    def merge(caches: Sequence["RowCache"]) -> "RowCache":
        """One entry for the rows of several, in their order."""
        return RowCache([row for cache in caches for row in cache.rows])

    def extend(self, other: "RowCache") -> None:
        """Put another batch's rows behind these."""
        self.rows += other.rows

    def filter(self, keep: Sequence[int]) -> None:
        """Keep only these rows, in that order."""
        self.rows = [self.rows[index] for index in keep]

    def extract(self, index: int) -> "RowCache":
        """The entry of one row."""
        return RowCache([self.rows[index]])

    def prepare(self, **padding: Any) -> None:
        """Padding of prompts does not concern it."""

    def finalize(self) -> None:
        """The end of a prompt does not concern it either."""

    @property
    def state(self) -> list[mx.array]:
        """Arrays to compute: none."""
        return []

    @property
    def nbytes(self) -> int:
        """Memory of arrays."""
        return 0


def _low_rank(x: mx.array, first: mx.array, second: mx.array, share: mx.array) -> mx.array:
    """`s x A B` with each row's own factors.

    The factors of all adapters stand side by side, and each row keeps what its own made of it: two
    products of plain matrices take less time than one of each row with its own.

    Args:
        x: `[B, ..., in]`.
        first: A of every adapter, `[in, N r]`.
        second: B of every adapter, `[N r, out]`.
        share: s of the row's own adapter, and 0 of the others', `[B, N r]`.

    Returns:
        `[B, ..., out]`, in the dtype that x and the factors have together.
    """
    z = x @ first
    share = share.reshape(x.shape[0], *(1,) * (x.ndim - 2), -1)
    return (z * share.astype(z.dtype)) @ second


class _RowLoRA(nn.Module):
    """A layer with low-rank updates of several adapters, one for each row.

    Args:
        own: The base's own layer.
        lora_a: A of every adapter, `[in, N r]`, in an embedding's tokens.
        lora_b: B of every adapter, `[N r, out]`.
        share: For each adapter, and for rows without one: s where its own factors stand, else 0;
            `[N + 1, N r]`.
        rows: Which adapter each row has.
    """

    def __init__(
        self, own: nn.Module, lora_a: mx.array, lora_b: mx.array, share: mx.array, rows: Rows
    ) -> None:
        super().__init__()
        self.own = own
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.share = share
        self.rows = rows


class RowLoRALinear(_RowLoRA):
    """A linear layer whose rows have different adapters."""

    def __call__(self, x: mx.array) -> mx.array:
        """`[B, ..., in]` to `[B, ..., out]`."""
        share = self.share[self.rows.of(x)]
        y: mx.array = self.own(x)
        return y + _low_rank(x, self.lora_a, self.lora_b, share).astype(x.dtype)


class RowLoRAEmbedding(_RowLoRA):
    """An embedding whose rows have different adapters."""

    def __call__(self, x: mx.array) -> mx.array:
        """Ids `[B, T]` to `[B, T, D]`."""
        share = self.share[self.rows.of(x)][:, None]
        y: mx.array = self.own(x)
        z = self.lora_a[x]
        return y + ((z * share.astype(z.dtype)) @ self.lora_b).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states `[B, ..., D]` to logits `[B, ..., tokens]`."""
        share = self.share[self.rows.of(x)]
        y: mx.array = self.own.as_linear(x)
        return y + _low_rank(x, self.lora_b.T, self.lora_a.T, share).astype(x.dtype)


class RoutedModel:
    """A bank's model, called with a prompt cache whose last entry is a `RowCache`.

    Rows that all have the same adapter are computed by that adapter's own modules, to the bit as
    mlx_lm would; a mixed batch by layers with a low-rank update for each row.

    Args:
        bank: It may change afterwards; this stays as it is.
        names: The adapters of the rows.

    Attributes:
        names: With None, for rows without an adapter, as the last; a row's index counts in it.
        trees: The module tree of each.
    """

    def __init__(self, bank: AdapterBank, names: Sequence[str | None]) -> None:
        self.names: tuple[str | None, ...] = (*names, None)
        self.trees = [bank.tree(name) for name in self.names]
        self._vocabulary_size = bank.vocabulary_size
        self._shared = bank.shared
        self._rows = Rows()

    def __call__(self, inputs: mx.array, cache: Sequence[Any]) -> mx.array:
        """Ids `[B, T]` to logits of the real tokens `[B, T, V]`, float32.

        Args:
            inputs: Token ids.
            cache: mlx_lm's batched prompt cache, and a `RowCache` of B rows behind it.
        """
        *own, rows = cache
        if len(set(rows.rows)) == 1:
            tree = self.trees[rows.rows[0]]
        else:
            tree = self._mixed
            self._rows.indices = mx.array(rows.rows, dtype=mx.int32)
        logits: mx.array = tree(inputs, cache=own)
        # Padding rows of the head are no tokens, and have no share in any probability.
        return logits[..., : self._vocabulary_size].astype(mx.float32)

    def routes(self) -> bool:
        """Whether the model keeps the batch's rows on the first axis in every adapted layer.

        Tried on two rows without a cache, since a model's class does not tell.
        """
        tree = self._mixed
        self._rows.indices = mx.array([0, len(self.names) - 1], dtype=mx.int32)
        try:
            for length in (3, 1):
                mx.eval(tree(mx.zeros((2, length), dtype=mx.int32)))
        except RowShapeError:
            return False
        return True

    @cached_property
    def _mixed(self) -> nn.Module:
        """A tree whose adapted layers have the factors of all adapters; made when needed."""
        mixed = self._shared.tree()
        mixed.update_modules(tree_unflatten(_row_layers(self.trees, self._rows)))
        mixed.eval()
        mx.eval(mixed.parameters())
        return mixed


def _row_layers(trees: Sequence[nn.Module], rows: Rows) -> list[tuple[str, nn.Module]]:
    """For every layer that a tree adapts, one with the factors of all trees, by its name."""
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

    adapted = [
        {
            name: module
            for name, module in tree.named_modules()
            if type(module) in (LoRALinear, LoRAEmbedding)
        }
        for tree in trees
    ]
    result: list[tuple[str, nn.Module]] = []
    for name in dict.fromkeys(name for layers in adapted for name in layers):
        layers = [each.get(name) for each in adapted]
        first, second, share = side_by_side(
            [layer and (layer.lora_a, layer.lora_b, float(layer.scale)) for layer in layers]
        )
        one = next(layer for layer in layers if layer is not None)
        if isinstance(one, LoRALinear):
            layer: nn.Module = RowLoRALinear(one.linear, first, second, share, rows)
        else:
            layer = RowLoRAEmbedding(one.embedding, first, second, share, rows)
        result.append((name, layer))
    return result


def side_by_side(
    factors: Sequence[tuple[mx.array, mx.array, float] | None],
) -> tuple[mx.array, mx.array, mx.array]:
    """A, B and shares of several low-rank updates, as a layer of rows takes them.

    Args:
        factors: A `[in, r]`, B `[r, out]` and s of each, ranks may differ; None for no update.
    """
    ranks = [0 if each is None else each[0].shape[1] for each in factors]
    share = np.zeros((len(factors), sum(ranks)), np.float32)
    start = 0
    for row, (each, rank) in enumerate(zip(factors, ranks, strict=True)):
        share[row, start : start + rank] = 0.0 if each is None else each[2]
        start += rank
    present = [each for each in factors if each is not None]
    first = mx.concatenate([each[0] for each in present], axis=1)
    second = mx.concatenate([each[1] for each in present], axis=0)
    return first, second, mx.array(share)
