"""What a teacher loses as it gets smaller: size against distance, after each part that goes.

Knows two ways to run one model in memory and token ids; nothing of what was left out of it.
Another figure: a field of `CurvePoint`, its sum in `distance`, and its column in `curve_table`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import mlx.core as mx

from conch_dna.errors import number_of
from conch_dna.language_model import LanguageModel
from conch_dna.losses import forward_kl, log_softmax
from conch_dna.screen.presentation import text_table
from conch_dna.training.settings import LOSS_MEMORY

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A teacher without some of its parts.

    Attributes:
        layers: How many it has left.
        neurons: How many each of its MLPs has left; None for all.
        weight_bytes: Of its weights, as the student's files would have them.
        kl_nats: KL(teacher‖itself so), nats a token, on text that no influence was measured on.
        top1_agreement: Share of these tokens at which both find the same token likeliest.
    """

    layers: int
    neurons: int | None = None
    weight_bytes: int
    kl_nats: float
    top1_agreement: float


def distance(
    model: LanguageModel,
    windows: Sequence[Sequence[int]],
    cut: Callable[[], AbstractContextManager[None]],
    *,
    memory: float = LOSS_MEMORY,
) -> tuple[float, float]:
    """How far a model is from itself without some of its parts, at temperature 1.

    Of each window both compute their last states, and then some rows of logits at a time: nothing
    is kept of a window but two sums.

    Args:
        model: In memory; it is left as it was.
        windows: Token ids, each read by itself; every token counts.
        cut: Makes it the other one for as long as it is entered.
        memory: Megabytes for logits and what is made of them.

    Returns:
        KL(model‖cut) in nats a token, and the share of tokens at which both agree on the likeliest.
    """
    kl = agreeing = 0.0
    for window in windows:
        whole = _begun(model, window, memory / 2)
        with cut():
            other = _begun(model, window, memory / 2)
        for first, second in zip(whole, other, strict=True):
            divergence = forward_kl(log_softmax(first), log_softmax(second)).sum()
            same = (mx.argmax(first, axis=-1) == mx.argmax(second, axis=-1)).sum()
            # Here, so that no more logits exist than these.
            mx.eval(divergence, same)
            kl, agreeing = kl + float(divergence), agreeing + float(same)
    count = sum(map(len, windows))
    return kl / count, agreeing / count


def _begun(model: LanguageModel, window: Sequence[int], memory: float) -> Iterator[mx.array]:
    """Logits of a window some rows at a time, by the body that the model has at this call."""
    ids = mx.array([list(window)])
    parts = model.logits_at(ids, mx.arange(ids.size), memory=memory)
    _, first = next(parts)
    return chain([first], (logits for _, logits in parts))


def curve_table(points: Sequence[CurvePoint], name: str, *, tokens: int) -> "Table":
    """Sizes beside distances.

    Args:
        points: From the whole teacher on.
        name: The teacher's.
        tokens: How many the distances stand on.
    """
    columns = ("layers", "neurons an MLP", "weights", "KL, nats a token", "top-1 agreement")
    rows = [
        (
            point.layers,
            point.neurons or "all",
            f"{point.weight_bytes / 1e6:.1f} MB",
            f"{point.kl_nats:.4f}",
            f"{point.top1_agreement:.1%}",
        )
        for point in points
    ]
    return text_table(
        f"{name}: size and quality on {number_of(tokens, 'token')}, untrained",
        columns,
        rows,
        numbers=columns,
    )
