"""A model's modules again, over the same arrays, so that some of them can be exchanged.

Knows mlx's module trees; nothing of adapters or files. What a tree is made of besides modules,
lists, dicts and tuples is shared as it is.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn


@dataclass(frozen=True)
class Swap:
    """One place of a module tree in which an adapter stands instead of the base.

    Attributes:
        holder: The module, list or dict of the live tree that holds it.
        key: Its name or index there.
        own: The base's part.
        other: The adapter's.
    """

    holder: Any
    key: str | int
    own: Any
    other: Any


class SharedTree:
    """The modules of a base as they were without an adapter, and trees that share its arrays.

    Args:
        live: The base's own module tree, without an adapter.
    """

    def __init__(self, live: nn.Module) -> None:
        made: dict[int, Any] = {}
        self.pristine: nn.Module = _clone(live, made, leaves=False)
        self._live = {id(clone): original for original, clone in made.values()}
        # Kept, so that no id is given out again.
        self._made = made

    def tree(self, *, leaves: bool = False) -> nn.Module:
        """A new module tree over the base's arrays.

        Args:
            leaves: Make new objects of the leaf modules too, so that their arrays can be replaced
                without the base noticing.
        """
        cloned: nn.Module = _clone(self.pristine, {}, leaves=leaves)
        return cloned

    def swaps(self, adapted: nn.Module) -> tuple[Swap, ...]:
        """What of the live tree must be exchanged to make it the adapted one."""
        return tuple(self._differences(self.pristine, adapted, set()))

    def _differences(self, own: Any, other: Any, seen: set[int]) -> Iterator[Swap]:
        if id(own) in seen:
            return
        seen.add(id(own))
        for key, part in _entries(own):
            new = other[key]
            if new is part:
                continue
            if id(part) in self._live and type(new) is type(part):
                yield from self._differences(part, new, seen)
            elif _differs(part, new):
                yield Swap(self._live[id(own)], key, part, new)


def _is_container(value: Any) -> bool:
    return isinstance(value, (nn.Module, dict, list, tuple))


def _is_leaf(value: Any) -> bool:
    return isinstance(value, nn.Module) and not value.children()


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    yield from value.items() if isinstance(value, dict) else enumerate(value)


def _differs(own: Any, new: Any) -> bool:
    """Whether a part is another one; a copied leaf with the same arrays is not."""
    if not (_is_leaf(own) and type(new) is type(own)):
        return True
    return any(new.get(key) is not value for key, value in own.items())


def _clone(value: Any, made: dict[int, Any], *, leaves: bool) -> Any:
    """New modules, lists and dicts around the same arrays; parts used twice stay one.

    Args:
        value: A part of a module tree.
        made: Filled with (original, clone) by the original's id.
        leaves: Clone modules without children too.
    """
    if not _is_container(value) or (not leaves and _is_leaf(value)):
        return value
    if id(value) in made:
        return made[id(value)][1]
    if isinstance(value, tuple):
        result: Any = tuple(_clone(part, made, leaves=leaves) for part in value)
    else:
        result = copy.copy(value)
        for key, part in list(_entries(value)):
            result[key] = _clone(part, made, leaves=leaves)
    made[id(value)] = (value, result)
    return result
