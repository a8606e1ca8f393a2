"""What comes into a model's linear layers: second moments of their inputs on given texts.

Knows modules and token ids; nothing of bits or files. Another figure of inputs: what `_Caught`
sums up.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from conch_dna.language_model import LanguageModel
from conch_dna.screen.progress import Report

# Bytes of moments that are summed up in one pass over the texts.
ROOM = 4e9


class _Caught(nn.Module):
    """A layer whose inputs are summed up on their way in; it is told whole, not by its parts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, moments=None)

    def __call__(self, x: mx.array, *rest: Any, **named: Any) -> mx.array:
        if mx.issubdtype(x.dtype, mx.floating):
            self._sum_up(x)
        out: mx.array = self.__dict__["layer"](x, *rest, **named)
        return out

    def as_linear(self, x: mx.array) -> mx.array:
        """An embedding as the head."""
        self._sum_up(x)
        out: mx.array = self.__dict__["layer"].as_linear(x)
        return out

    def _sum_up(self, x: mx.array) -> None:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        own = rows.T @ rows
        before = self.__dict__["moments"]
        self.__dict__["moments"] = own if before is None else before + own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)


def input_moments(
    model: LanguageModel,
    widths: dict[str, int],
    windows: Sequence[Sequence[int]],
    report: Report,
) -> dict[str, np.ndarray]:
    """The mean outer product of each layer's inputs, over all tokens of the texts, and shrunk.

    Few tokens tell little of how inputs hang together: what stands beside the diagonal is taken
    down by the share width / (width + tokens). As many layers at a time as fit into ROOM, each
    time with a pass over all texts.

    Args:
        model: In memory; it is left as it was.
        widths: Numbers that come into each layer, by its name; layers of the same name.
        windows: Token ids, each read by itself.
        report: Gets a phase.

    Returns:
        By name float32 `[width, width]`; a layer that no text reached is missing, and an
        embedding that is not the head.
    """
    passes = _parts(widths)
    tokens = sum(map(len, windows))
    report("phase", {"name": "inputs of layers", "total": len(passes) * tokens, "unit": "tokens"})
    found: dict[str, np.ndarray] = {}
    modules = dict(model.model.named_modules())
    for names in passes:
        caught = {name: _Caught(modules[name]) for name in names}
        model.model.update_modules(tree_unflatten(list(caught.items())))
        try:
            for window in windows:
                model.model(mx.array([list(window)]))
                # What comes in is all that is wanted of it.
                moments = (each.__dict__["moments"] for each in caught.values())
                mx.eval([each for each in moments if each is not None])
                report("advance", {"by": len(window)})
        finally:
            own = [(name, modules[name]) for name in names]
            model.model.update_modules(tree_unflatten(own))
        for name, each in caught.items():
            if (moments := each.__dict__["moments"]) is not None:
                found[name] = _shrunk(np.array(moments) / tokens, tokens)
    return found


def _shrunk(moments: np.ndarray, tokens: int) -> np.ndarray:
    own = np.diagonal(moments).copy()
    moments *= tokens / (len(moments) + tokens)
    np.einsum("ii->i", moments)[...] = own
    return moments


def _parts(widths: dict[str, int]) -> list[list[str]]:
    """Names in passes, none of which needs more than ROOM."""
    parts: list[list[str]] = [[]]
    left = ROOM
    for name, width in widths.items():
        left -= 4 * width**2
        if left < 0 and parts[-1]:
            parts.append([])
            left = ROOM - 4 * width**2
        parts[-1].append(name)
    return parts
