"""One step of the optimiser: gradients of its batches, clipped, and the update.

Knows a model, a loss that returns sums and batches' arrays; nothing of checkpoints or progress.
Another way to compute a step: a class with the methods of `Steps`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_map_with_path, tree_unflatten

from conch_dna.errors import told
from conch_dna.training.batches import Batch
from conch_dna.training.settings import TrainerSettings

Loss = Callable[[nn.Module, dict[str, mx.array]], dict[str, mx.array]]
"""`loss(model, arrays)` returns scalars that are SUMS over counted tokens; `loss` is minimised."""


class BatchStream(Protocol):
    """An endless stream of training batches in which batch `index` is always the same."""

    @property
    def digest(self) -> str:
        """Content address of the data and their order."""

    def batch(self, index: int) -> Batch:
        """Batch `index`, counted from 0 over all epochs."""

    def parts(self, index: int, count: int) -> list[Batch]:
        """The same in so many parts, for as many processes."""


def learning_rate_schedule(settings: TrainerSettings) -> Callable[[mx.array], mx.array]:
    """Linear warm-up to the peak, which the first step after it has; then as `schedule` says."""
    decay_steps = max(1, settings.num_iters - settings.warmup_iters)
    after = optim.cosine_decay(settings.learning_rate, decay_steps)
    if settings.schedule == "constant":
        after = optim.linear_schedule(settings.learning_rate, settings.learning_rate, 1)
    if settings.warmup_iters == 0:
        return after
    start = settings.learning_rate / (settings.warmup_iters + 1)
    warmup = optim.linear_schedule(start, settings.learning_rate, settings.warmup_iters)
    return optim.join_schedules([warmup, after], [settings.warmup_iters])


class Steps:
    """Steps of a model's trainable parameters in this process.

    Args:
        model: Its trainable parameters are trained.
        loss: See `Loss`.
        settings: See `TrainerSettings`.

    Attributes:
        optimizer: AdamW.
    """

    def __init__(self, model: nn.Module, loss: Loss, settings: TrainerSettings) -> None:
        self.model = model
        self.optimizer = optim.AdamW(
            learning_rate=learning_rate_schedule(settings),
            weight_decay=settings.weight_decay,
            bias_correction=True,
        )
        self._max_grad_norm = settings.max_grad_norm
        self._stepped = False
        kind = getattr(model, "model_type", type(model).__name__)
        self._no_gradient = f"a model of the kind {kind} cannot take a training step here"

        def scaled_loss(
            arrays: dict[str, mx.array], scale: mx.array
        ) -> tuple[mx.array, dict[str, mx.array]]:
            sums = loss(model, arrays)
            return sums["loss"] * scale, sums

        self.value_and_grad = nn.value_and_grad(model, scaled_loss)
        self.state = [model.state, self.optimizer.state, mx.random.state]
        self._compiled = self._compile()

    def _compile(self) -> Callable[..., Any]:
        @partial(mx.compile, inputs=self.state, outputs=self.state)
        def step(
            arrays: dict[str, mx.array], scale: mx.array, previous: Any, last: bool
        ) -> tuple[dict[str, mx.array], Any, mx.array]:
            (_, sums), gradients = self.value_and_grad(arrays, scale)
            if previous is not None:
                gradients = tree_map(mx.add, gradients, previous)
            if not last:
                return sums, gradients, mx.array(0.0)
            return sums, None, self.update(gradients)

        return step

    def update(self, gradients: Any) -> mx.array:
        """Clip gradients and take the optimiser's step; returns their norm before."""
        gradients, norm = optim.clip_grad_norm(gradients, self._max_grad_norm)
        self.optimizer.update(self.model, gradients)
        return norm

    def restore(self, trained: Mapping[str, Any], moments: Mapping[str, Any]) -> None:
        """Take trained parameters and the optimiser's state, arrays by their dotted names."""
        self.model.update(tree_unflatten([(n, mx.array(v)) for n, v in trained.items()]))
        # Leaf by leaf: flattening loses the empty branches that the optimiser expects.
        self.optimizer.state.update(
            tree_map_with_path(lambda name, _: mx.array(moments[name]), self.optimizer.state)
        )

    def begin(self) -> None:
        """Called before the first step, when the parameters are where they begin."""

    def batches(self, stream: BatchStream, index: int) -> list[Batch]:
        """Batch `index` of a stream, in the parts that `take` takes."""
        return [stream.batch(index)]

    def take(
        self, batches: Sequence[Sequence[Batch]], count: int
    ) -> tuple[list[dict[str, float]], float]:
        """Take a step.

        Args:
            batches: Of each batch what `batches` gave.
            count: Tokens that count in all of them.

        Returns:
            The sums of each batch, and the gradient's norm.
        """
        self.model.train()
        gradients, found = None, []
        for number, (batch,) in enumerate(batches, 1):
            arrays = arrays_of(batch)
            with self.explained():
                sums, gradients, norm = self._compiled(
                    arrays, mx.array(1.0 / count), gradients, number == len(batches)
                )
                # One evaluation per batch: it bounds the memory of a step to that of one batch.
                mx.eval(self.state, sums, gradients, norm)
            found.append({name: float(value) for name, value in sums.items()})
        return found, norm.item()

    def explained(self) -> Any:
        """What has no gradient is only found out by the first step."""
        first, self._stepped = not self._stepped, True
        return told(self._no_gradient) if first else nullcontext()


def arrays_of(batch: Batch) -> dict[str, mx.array]:
    """A batch's arrays for the model."""
    return {name: mx.array(value) for name, value in batch.arrays.items()}
