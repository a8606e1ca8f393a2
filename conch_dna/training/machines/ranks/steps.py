"""Steps that several processes compute: each the gradient of its part, and all the same update.

Knows batches and the processes; nothing of teachers, text or checkpoints. Another thing that a step
shares: a line in `SharedSteps._step`, which all of them run.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from conch_dna.language_model import named_arrays
from conch_dna.training.batches import Batch
from conch_dna.training.machines.ranks.group import Ranks
from conch_dna.training.optimizer.steps import BatchStream, Loss, Steps
from conch_dna.training.settings import TrainerSettings

_TRAINED, _MOMENTS = "trained/", "optimizer/"


class SharedSteps(Steps):
    """Steps of all processes: the first calls `take`, the others `help` with what it sends.

    A batch's examples are dealt out, gradients are summed over all processes, and each of them
    takes the same step, so that the parameters stay the same without being sent.

    Args:
        model: See `Steps`.
        loss: See `Steps`.
        settings: See `Steps`.
        ranks: The processes.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, settings: TrainerSettings, ranks: Ranks
    ) -> None:
        self.ranks = ranks
        super().__init__(model, loss, settings)

    def _compile(self) -> Callable[..., Any]:
        @partial(mx.compile, inputs=self.state, outputs=self.state)
        def gradients_of(
            arrays: dict[str, mx.array], scale: mx.array, previous: Any
        ) -> tuple[dict[str, mx.array], Any]:
            (_, sums), gradients = self.value_and_grad(arrays, scale)
            if previous is not None:
                gradients = tree_map(mx.add, gradients, previous)
            return sums, gradients

        self._update = partial(mx.compile, inputs=self.state, outputs=self.state)(self.update)
        return gradients_of

    def begin(self) -> None:
        """Give the others the parameters and moments that the first has."""
        arrays = {
            **_named(_TRAINED, self.model.trainable_parameters()),
            **_named(_MOMENTS, self.optimizer.state),
        }
        self.ranks.send({"do": "begin"}, arrays)

    def begin_as(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what the first gave; draws of dropout are each process's own."""
        self.optimizer.init(self.model.trainable_parameters())
        self.restore(_behind(_TRAINED, arrays), _behind(_MOMENTS, arrays))
        mx.random.seed(self.ranks.rank)

    def batches(self, stream: BatchStream, index: int) -> list[Batch]:
        """Batch `index`, a part for each process."""
        return stream.parts(index, self.ranks.size)

    def take(
        self, batches: Sequence[Sequence[Batch]], count: int
    ) -> tuple[list[dict[str, float]], float]:
        """Take a step together; see `Steps.take`."""
        arrays = {
            f"{number}/{rank}/{name}": value
            for number, parts in enumerate(batches)
            for rank, part in enumerate(parts)
            if rank != self.ranks.rank
            for name, value in part.arrays.items()
        }
        self.ranks.send({"do": "step", "batches": len(batches), "count": count}, arrays)
        own = [parts[self.ranks.rank].arrays for parts in batches]
        with self.ranks.together():
            return self._step(own, count)

    def help(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take the step that the first sent."""
        own = [
            _behind(f"{number}/{self.ranks.rank}/", arrays) for number in range(message["batches"])
        ]
        self._step(own, message["count"])

    def _step(
        self, parts: Sequence[dict[str, np.ndarray]], count: int
    ) -> tuple[list[dict[str, float]], float]:
        self.model.train()
        # Gradients are averaged, and a step needs their sum.
        scale = mx.array(self.ranks.size / count)
        gradients, found = None, []
        for part in parts:
            arrays = {name: mx.array(value) for name, value in part.items()}
            with self.explained():
                sums, gradients = self._compiled(arrays, scale, gradients)
                mx.eval(sums, gradients)
            found.append(sums)
        names = sorted(found[0])
        with self.ranks.watched():
            gradients = average_gradients(gradients, self.ranks.group)
            mx.eval(gradients)
        totals = self.ranks.sum(mx.stack([mx.stack([s[name] for name in names]) for s in found]))
        norm = self._update(gradients)
        mx.eval(self.state, norm)
        rows = [dict(zip(names, map(float, row), strict=True)) for row in np.asarray(totals)]
        return rows, float(np.asarray(norm))


def _named(prefix: str, tree: Any) -> dict[str, np.ndarray]:
    return {prefix + name: np.array(value) for name, value in named_arrays(tree).items()}


def _behind(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin so, under the rest of their names."""
    return {n[len(prefix) :]: value for n, value in arrays.items() if n.startswith(prefix)}
