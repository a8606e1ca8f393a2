"""Training of the residual network that stands on a linear adapter and starts as nothing.

Knows arrays of pairs; nothing of texts, teachers, stores or gates. To train it on another
quantity: `_loss`, which is also what decides when to stop.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from conch_dna.errors import ConchError, NonFiniteLossError
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter, residual_rows
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.embedders.contract import unit

# Of one epoch: its number from 0 in, targets [N, E] of all pairs out.
TargetsOfEpoch = Callable[[int], np.ndarray]
Network = dict[str, mx.array]


def fit_residual(
    start: EmbeddingAdapter,
    student: Any,
    teacher: np.ndarray | TargetsOfEpoch,
    config: ChelationConfig,
) -> EmbeddingAdapter:
    """Train `normalize(u + gelu(u W1 + b1) W2 + b2)` on top of an adapter, u being what it gives.

    The loss is 1 − mean cosine with the targets. W2 and both biases are 0 at the start, so that
    the first step begins at the adapter itself. Adam, with the learning rate falling to 0 by half
    a cosine. After each epoch the loss of the held-out pairs is taken; the network with the lowest
    is kept, and if none beats the start, the start is.

    Args:
        start: What it stands on. If it is residual itself, training goes on from its network.
        student: Raw student vectors, unit `[N, D]`.
        teacher: Targets, unit `[N, E]`, or what gives those of an epoch where they change by a
            schedule. The loss of held-out pairs is always that with the last epoch's targets, so
            that epochs can be compared.
        config: Its `hidden` (width of a new network), `epochs`, `learning_rate`, `batch_size`,
            `held_out` (at least one pair), `patience` and `seed` (of split, order and W1).

    Returns:
        A residual adapter; its figures hold `loss_before` and `loss_after` of the held-out pairs,
        `best_epoch` (0 is the start) and `epochs_run`.

    Raises:
        ConchError: Shapes do not fit, or too few pairs.
        NonFiniteLossError: The loss became NaN or infinite.
    """
    rows = mx.array(start.linear_part(student))
    targets_of: TargetsOfEpoch = teacher if callable(teacher) else lambda _epoch: teacher
    last = _checked(targets_of(config.epochs - 1), rows)
    if len(student) < 2:
        raise ConchError(f"{len(student)} pairs: at least 2 are needed, one of them held out")

    generator = np.random.default_rng(config.seed)
    order = generator.permutation(len(rows))
    count = max(1, round(config.held_out * len(order)))
    held_out, training = mx.array(order[:count]), order[count:]
    if not len(training):
        raise ConchError(
            f"held_out {config.held_out:g} of {len(order)} pairs leaves none to learn from"
        )
    network = _start_network(start, config)
    steps = config.epochs * math.ceil(len(training) / config.batch_size)
    optimizer = optim.Adam(learning_rate=optim.cosine_decay(config.learning_rate, steps))
    loss_and_gradient = mx.value_and_grad(_loss)

    def held_out_loss() -> float:
        return float(np.array(_loss(network, rows[held_out], last[held_out])))

    before = lowest = held_out_loss()
    best, best_epoch, epoch = network, 0, 0
    for epoch in range(1, config.epochs + 1):
        targets = _checked(targets_of(epoch - 1), rows) if callable(teacher) else last
        shuffled = generator.permutation(training)
        for first in range(0, len(shuffled), config.batch_size):
            batch = mx.array(shuffled[first : first + config.batch_size])
            _, gradient = loss_and_gradient(network, rows[batch], targets[batch])
            network = optimizer.apply_gradients(gradient, network)
            # One evaluation a step, or the graph of the whole epoch stays in memory.
            mx.eval(network, optimizer.state)
        loss = held_out_loss()
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the residual adapter's loss became {loss} in epoch {epoch}: choose a learning "
                f"rate below {config.learning_rate:g}"
            )
        if loss < lowest:
            best, best_epoch, lowest = network, epoch, loss
        elif epoch - best_epoch >= config.patience:
            break
    figures = {
        "pairs": len(order),
        "held_out_pairs": count,
        "loss_before": before,
        "loss_after": lowest,
        "best_epoch": best_epoch,
        "epochs_run": epoch,
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "start": start.digest,
    }
    linear = {name: start.arrays[name] for name in ("weight", "bias") if name in start.arrays}
    arrays = {**linear, **{name: np.array(array) for name, array in best.items()}}
    return EmbeddingAdapter("residual", arrays, start.in_dimension, start.out_dimension, figures)


def _loss(network: Network, rows: mx.array, targets: mx.array) -> mx.array:
    """1 − mean cosine of what the network makes of rows with unit targets; 0 at equality."""
    adapted = residual_rows(network, rows)
    return 1 - ((adapted * targets).sum(axis=1) / mx.linalg.norm(adapted, axis=1)).mean()


def _start_network(start: EmbeddingAdapter, config: ChelationConfig) -> Network:
    if start.kind == "residual":
        return start.network
    width = start.out_dimension
    key = mx.random.key(config.seed)
    # A unit vector times columns of this size is of the order of 1, where gelu bends.
    return {
        "inner_weight": mx.random.normal((width, config.hidden), key=key),
        "inner_bias": mx.zeros(config.hidden),
        "outer_weight": mx.zeros((config.hidden, width)),
        "outer_bias": mx.zeros(width),
    }


def _checked(targets: Any, rows: mx.array) -> mx.array:
    table = unit(targets, what="targets")
    if table.shape != rows.shape:
        raise ConchError(
            f"targets have shape {list(table.shape)}, but the adapter gives {list(rows.shape)}: "
            "one target is needed for each student vector, in the dimension of the start"
        )
    return mx.array(table)
