"""Modules of a model watched, or with others in their place, for a while.

Knows modules and their names; nothing of what is done with what they are given. Another thing to
watch: another `note`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


class Heard(nn.Module):
    """A layer whose inputs are noted on their way in, those of an embedding where it is the head.

    Args:
        layer: It is told whole, not by its parts.
        note: Gets each input, `[…, width]`.
    """

    def __init__(self, layer: nn.Module, note: Callable[[mx.array], None]) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, note=note)

    def __call__(self, x: mx.array, *rest: Any, **named: Any) -> mx.array:
        """What the layer says; ids, which an embedding looks up, are not noted."""
        if mx.issubdtype(x.dtype, mx.floating):
            self.__dict__["note"](x)
        out: mx.array = self.__dict__["layer"](x, *rest, **named)
        return out

    def as_linear(self, x: mx.array) -> mx.array:
        """An embedding as the head."""
        self.__dict__["note"](x)
        out: mx.array = self.__dict__["layer"].as_linear(x)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)


@contextmanager
def in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules in place of a model's own, by their names in it, for as long as this is entered."""
    own = dict(model.named_modules())
    try:
        model.update_modules(tree_unflatten(list(modules.items())))
        yield
    finally:
        model.update_modules(tree_unflatten([(name, own[name]) for name in modules]))
