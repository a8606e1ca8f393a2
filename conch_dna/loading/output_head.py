"""A model taken apart at its output head: what the head takes, the head, what comes after it.

Knows mlx modules; nothing of tokenizers, losses or files. The model's own code runs with a
stand-in where its head is, so that a model of another kind needs no line here.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Of a chunk of logits, and of the next one, whose beginning may be there already.
LOGIT_ARRAYS = 14
_ONE_TOKEN = mx.zeros((1, 1), mx.int32)
_WHOLE = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)


class _Reached(Exception):
    """A model's head was reached, with what it was to take."""

    def __init__(self, place: "tuple[nn.Module, str]", states: mx.array) -> None:
        super().__init__("reached the head")
        self.place = place
        self.states = states


class _StandIn(nn.Module):
    """Is called where a model calls its head, and looks like it otherwise."""

    def __init__(self, head: nn.Module, meet: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.__dict__.update(_head=head, _meet=meet)

    def __call__(self, given: mx.array) -> Any:
        return self._head(given) if hasattr(self._head, "as_linear") else self._meet(given)

    def as_linear(self, states: mx.array) -> mx.array:
        """Where an embedding is the head."""
        return self._meet(states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_head"], name)


class OutputHead:
    """The last linear layer of a model: its own `lm_head`, or its embedding.

    Args:
        model: Maps ids `[B, T]` to logits `[B, T, rows]`.

    Raises:
        ValueError: The model calls none, or more than once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parent, self._name = self._found()
        logits, calls = mx.zeros((1, 1, 1)), 0

        def counted(states: mx.array) -> mx.array:
            nonlocal calls
            calls += 1
            return logits

        with self._replaced(counted):
            self.is_last = model(_ONE_TOKEN) is logits
        if calls != 1:
            raise ValueError(f"the model calls its head {calls} times")

    @property
    def module(self) -> nn.Module:
        """The layer, as it is in the model now."""
        module: nn.Module = self._parent[self._name]
        return module

    def states(self, *args: Any, **given: Any) -> mx.array:
        """What the model's head takes for some inputs: the model's arguments to `[B, T, D]`."""

        def meet(states: mx.array) -> mx.array:
            raise _Reached((self._parent, self._name), states)

        try:
            with self._replaced(meet):
                self.model(*args, **given)
        except _Reached as reached:
            return reached.states
        raise ValueError("the model did not call its head")

    def logits(self, states: mx.array, rows: int) -> mx.array:
        """States `[..., D]` to the model's logits of its first tokens `[..., rows]`.

        What comes after the head (a scale, a soft-cap) is done as well.
        """
        return self.after(self.linear(states, rows))

    def linear(self, states: mx.array, rows: int) -> mx.array:
        """The head alone, over its first rows; those behind them are not computed."""
        head = self.module
        arrays = {name: v for name, v in head.items() if isinstance(v, mx.array)}
        size = max(len(v) for v in arrays.values()) if arrays else 0
        if type(head) in _WHOLE and rows < size:
            head = copy.copy(head)
            head.update({name: v[:rows] for name, v in arrays.items() if len(v) == size})
        apply: Any = getattr(head, "as_linear", head)
        logits: mx.array = apply(states)
        return logits[..., :rows] if logits.shape[-1] > rows else logits

    def after(self, logits: mx.array) -> mx.array:
        """What the model does to the logits of its head; of any shape and width."""
        return logits if self.is_last else self._after(logits)

    def _after(self, logits: mx.array) -> mx.array:
        # The body is not computed for it, since nothing is asked of it.
        with self._replaced(lambda states: logits):
            found: mx.array = self.model(_ONE_TOKEN)
        return found

    def _found(self) -> tuple[nn.Module, str]:
        """The module that holds the head, and the head's name in it."""
        places = [
            (parent, name)
            for _, parent in self.model.named_modules()
            for name, child in parent.items()
            if isinstance(child, nn.Module) and (name == "lm_head" or hasattr(child, "as_linear"))
        ]
        kept = [(parent, name, parent[name]) for parent, name in places]
        try:
            for parent, name, head in kept:

                def meet(states: mx.array, place: tuple[nn.Module, str] = (parent, name)) -> Any:
                    raise _Reached(place, states)

                parent[name] = _StandIn(head, meet)
            self.model(_ONE_TOKEN)
        except _Reached as reached:
            return reached.place
        finally:
            for parent, name, head in kept:
                parent[name] = head
        raise ValueError("the model has no head of its own")

    @contextmanager
    def _replaced(self, meet: Callable[[mx.array], mx.array]) -> Iterator[None]:
        head = self.module
        self._parent[self._name] = _StandIn(head, meet)
        try:
            yield
        finally:
            self._parent[self._name] = head


def rows_at_once(megabytes: float, width: int, arrays: int = LOGIT_ARRAYS) -> int:
    """Rows of logits that fit into a budget with all that is made of them; at least one.

    Args:
        megabytes: The budget.
        width: Real tokens V.
        arrays: Float32 arrays of that width that a row of logits needs at a time.

    >>> rows_at_once(256, 151_936)
    30
    """
    return max(1, int(megabytes * 1e6 / (4 * arrays * width)))
