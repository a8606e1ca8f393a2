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
from conch_dna.sedimentation.adapters.adapter import Adapter, residual_rows
from conch_dna.sedimentation.embedders.contract import unit

# Of one epoch: its number from 0 in, targets [N, E] of all pairs out.
TargetsOfEpoch = Callable[[int], np.ndarray]
Network = dict[str, mx.array]


def fit_residual(
    start: Adapter,
    student: Any,
    teacher: np.ndarray | TargetsOfEpoch,
    *,
    hidden: int = 256,
    epochs: int = 15,
    learning_rate: float = 0.005,
    batch_size: int = 100,
    held_out: float = 0.1,
    patience: int = 3,
    seed: int = 0,
) -> Adapter:
    """Train `normalize(u + gelu(u W1 + b1) W2 + b2)` on top of an adapter, u being what it gives.

    The loss is 1 − mean cosine with the targets. W2 and both biases are 0 at the start, so that
    the first step begins at the adapter itself. Adam, with the learning rate falling to 0 by half
    a cosine. After each epoch the loss of the held-out pairs is taken; the network with the lowest
    is kept, and if none beats the start, the start is.

    Args:
        start: What it stands on. If it is residual itself, training goes on from its network.
        student: Raw student vectors, unit `[N, D]`.
        teacher: Targets, unit `[N, E]`, or what gives those of an epoch where they change by a
            schedule. Held-out pairs are always judged by the last epoch's targets, so that epochs
            can be compared.
        hidden: Width H of a new network.
        epochs: Most passes over the pairs.
        learning_rate: Of Adam at the first step.
        batch_size: Pairs a step.
        held_out: Share of the pairs that are only judged on; at least one pair.
        patience: Epochs without a new lowest loss after which it ends.
        seed: Of the split, the order and W1.

    Returns:
        A residual adapter; its figures hold `loss_before` and `loss_after` of the held-out pairs,
        `best_epoch` (0 is the start) and `epochs_run`.

    Raises:
        ConchError: A setting is out of its range, or shapes do not fit.
        NonFiniteLossError: The loss became NaN or infinite.
    """
    _refuse_settings(hidden, epochs, learning_rate, batch_size, held_out, patience)
    rows = mx.array(start.linear_part(student))
    targets_of: TargetsOfEpoch = teacher if callable(teacher) else lambda _epoch: teacher
    last = _checked(targets_of(epochs - 1), rows)
    if len(student) < 2:
        raise ConchError(f"{len(student)} pairs: at least 2 are needed, one of them held out")

    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    count = max(1, round(held_out * len(order)))
    judged, taught = mx.array(order[:count]), order[count:]
    if not len(taught):
        raise ConchError(f"held_out {held_out:g} of {len(order)} pairs leaves none to learn from")
    network = _start_network(start, hidden, seed)
    steps = epochs * math.ceil(len(taught) / batch_size)
    optimizer = optim.Adam(learning_rate=optim.cosine_decay(learning_rate, steps))
    loss_and_gradient = mx.value_and_grad(_loss)

    def judge() -> float:
        return float(np.array(_loss(network, rows[judged], last[judged])))

    before = lowest = judge()
    best, best_epoch, epoch = network, 0, 0
    for epoch in range(1, epochs + 1):
        targets = _checked(targets_of(epoch - 1), rows) if callable(teacher) else last
        shuffled = generator.permutation(taught)
        for first in range(0, len(shuffled), batch_size):
            batch = mx.array(shuffled[first : first + batch_size])
            _, gradient = loss_and_gradient(network, rows[batch], targets[batch])
            network = optimizer.apply_gradients(gradient, network)
            # One evaluation a step, or the graph of the whole epoch stays in memory.
            mx.eval(network, optimizer.state)
        found = judge()
        if not math.isfinite(found):
            raise NonFiniteLossError(
                f"the residual adapter's loss became {found} in epoch {epoch}: choose a learning "
                f"rate below {learning_rate:g}"
            )
        if found < lowest:
            best, best_epoch, lowest = network, epoch, found
        elif epoch - best_epoch >= patience:
            break
    figures = {
        "pairs": len(order),
        "held_out_pairs": count,
        "loss_before": before,
        "loss_after": lowest,
        "best_epoch": best_epoch,
        "epochs_run": epoch,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "start": start.digest,
    }
    linear = {name: start.arrays[name] for name in ("weight", "bias") if name in start.arrays}
    arrays = {**linear, **{name: np.array(array) for name, array in best.items()}}
    return Adapter("residual", arrays, start.in_dimension, start.out_dimension, figures)


def _loss(network: Network, rows: mx.array, targets: mx.array) -> mx.array:
    """1 − mean cosine of what the network makes of rows with unit targets; 0 at equality."""
    made = residual_rows(network, rows)
    return 1 - ((made * targets).sum(axis=1) / mx.linalg.norm(made, axis=1)).mean()


def _start_network(start: Adapter, hidden: int, seed: int) -> Network:
    if start.kind == "residual":
        names = ("inner_weight", "inner_bias", "outer_weight", "outer_bias")
        return {name: mx.array(start.arrays[name]) for name in names}
    width = start.out_dimension
    key = mx.random.key(seed)
    # A unit vector times columns of this size is of the order of 1, where gelu bends.
    return {
        "inner_weight": mx.random.normal((width, hidden), key=key),
        "inner_bias": mx.zeros(hidden),
        "outer_weight": mx.zeros((hidden, width)),
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


def _refuse_settings(
    hidden: int, epochs: int, learning_rate: float, batch_size: int, held_out: float, patience: int
) -> None:
    counts = {"hidden": hidden, "epochs": epochs, "batch_size": batch_size, "patience": patience}
    problems = [f"{name} is {n}: it must be 1 or more" for name, n in counts.items() if n < 1]
    if not learning_rate > 0:
        problems.append(f"learning_rate is {learning_rate:g}: it must be above 0")
    if not 0 < held_out < 1:
        problems.append(f"held_out is {held_out:g}: it must be between 0 and 1, such as 0.1")
    if problems:
        raise ConchError("; ".join(problems))
