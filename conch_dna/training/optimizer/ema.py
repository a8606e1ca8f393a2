"""An exponential moving average of a model's trainable parameters.

Knows a model's parameters; nothing of losses, data or files.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from conch_dna.language_model import named_arrays


class EMA:
    """A shadow of a model's trainable parameters that follows them slowly.

    At the n-th update the decay is `min(decay, (1 + n) / (10 + n))`, so that a short run does not
    end where it began: an average of 0.999 alone remembers 82% of its start after 200 updates.

    Args:
        model: Its trainable parameters are followed; freeze the others beforehand.
        decay: Share of the shadow that stays, at least 0 and below 1; 0 is no average at all.

    Attributes:
        shadow: The averages by name, float32 whatever the parameters are.
        updates: How many there were.

    Raises:
        ValueError: The decay lies elsewhere, or nothing in the model is trainable.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay:g}; it is at least 0 and below 1, such as 0.999")
        self.model = model
        self.decay = decay
        self.updates = 0
        self.shadow = {name: value.astype(mx.float32) for name, value in self._parameters().items()}
        if not self.shadow:
            raise ValueError("the model has no trainable parameters: there is nothing to average")
        self._kept: dict[str, mx.array] | None = None

    def _parameters(self) -> dict[str, mx.array]:
        return named_arrays(self.model.trainable_parameters())

    def update(self) -> float:
        """Move the shadow towards the parameters, after each step of the optimiser.

        Returns:
            The decay that was used.

        Raises:
            RuntimeError: The shadow is in the model.
        """
        if self._kept is not None:
            raise RuntimeError("the shadow is in the model: call restore before update")
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.shadow = {
            name: decay * self.shadow[name] + (1 - decay) * value.astype(mx.float32)
            for name, value in self._parameters().items()
        }
        mx.eval(self.shadow)
        return decay

    def apply_shadow(self) -> None:
        """Put the averages into the model, in its own dtype; `restore` takes them out again.

        Raises:
            RuntimeError: They are there already, so that the parameters would be lost.
        """
        if self._kept is not None:
            raise RuntimeError("the shadow is in the model already: call restore first")
        self._kept = self._parameters()
        self._put(
            {name: self.shadow[name].astype(value.dtype) for name, value in self._kept.items()}
        )

    def restore(self) -> None:
        """Put the parameters back that `apply_shadow` replaced.

        Raises:
            RuntimeError: There are none.
        """
        if self._kept is None:
            raise RuntimeError("there is nothing to restore: apply_shadow was not called")
        self._put(self._kept)
        self._kept = None

    def load(self, shadow: dict[str, mx.array], updates: int) -> None:
        """Go on from the averages of a checkpoint.

        Raises:
            ValueError: They are of other parameters.
        """
        if shapes(shadow) != shapes(self.shadow):
            raise ValueError("these averages are of other parameters than the model's")
        self.shadow = dict(shadow)
        self.updates = updates

    def _put(self, values: dict[str, mx.array]) -> None:
        self.model.update(tree_unflatten(list(values.items())))


def shapes(values: dict[str, mx.array]) -> dict[str, Any]:
    """The shape of each array by its name."""
    return {name: tuple(value.shape) for name, value in values.items()}
