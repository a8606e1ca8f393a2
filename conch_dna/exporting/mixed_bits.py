"""How many bits each part of a model gets, by what few bits of it cost.

Knows modules, and figures on texts that the adapter has spoken about; nothing of files or of how
codes are chosen. Another cut of a model into parts: `_PART`.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.exporting.quantised import (
    Precision,
    base_of,
    base_width,
    few_bits,
    kept_whole,
    layers_of,
    whole,
    width_of,
)
from conch_dna.exporting.settings import WIDTHS
from conch_dna.language_model import LanguageModel
from conch_dna.screen.progress import Report
from conch_dna.training.batches import Example
from conch_dna.training.data.soft_targets import Targets
from conch_dna.training.evaluation import figures_on
from conch_dna.training.settings import KDConfig
from conch_dna.training.students.watching import in_place

# What stands in one block beside each other, such as model.layers.3.mlp.
_PART = re.compile(r"(?P<part>.*?\blayers\.\d+\.[^.]+)\..+")
_WIDTHS = tuple(map(int, WIDTHS))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What few bits of a part alone cost.

    Attributes:
        kl: KL(adapter‖model with that part in few bits), nats a token.
        weights: How many weights the part has.
    """

    kl: float
    weights: int


def allocated(costs: Mapping[str, Cost], mean: float) -> dict[str, int]:
    """Bits for each part, so that the sum of costs is small and their mean is at most as asked.

    Another bit takes an error's square down to a quarter, and so a KL. From one width below the
    one that was measured on, the part that gains most for the room it takes gets the next one.

    Args:
        costs: By part, measured at `base_width(mean)`.
        mean: Bits of a weight on average, from 2 to 8.

    >>> costs = {"mlp": Cost(kl=0.01, weights=300), "head": Cost(kl=0.2, weights=100)}
    >>> allocated(costs, 4.0)
    {'mlp': 3, 'head': 6}
    """
    measured = base_width(mean)
    lowest = _WIDTHS[max(0, _WIDTHS.index(measured) - 1)]
    widths = dict.fromkeys(costs, lowest)
    room = (mean - lowest) * sum(cost.weights for cost in costs.values())
    while True:
        steps = {}
        for part, width in widths.items():
            if width == _WIDTHS[-1]:
                continue
            wider = _WIDTHS[_WIDTHS.index(width) + 1]
            cost, needed = costs[part], (wider - width) * costs[part].weights
            gain = cost.kl * (4.0 ** (measured - width) - 4.0 ** (measured - wider))
            if needed <= room:
                steps[part] = (gain / needed, needed, wider)
        if not steps:
            return widths
        part = max(steps, key=lambda name: steps[name][0])
        _, needed, widths[part] = steps[part]
        room -= needed


def mixed_precision(
    model: LanguageModel,
    precision: Precision,
    mean: float,
    moments: Mapping[str, np.ndarray] | None,
    examples: Sequence[Example],
    targets: Targets,
    config: KDConfig,
    report: Report,
) -> Precision:
    """A precision in which each part of a model has as many bits as it needs.

    A part at a time gets few bits in memory, as the whole model will, and the model is measured:
    nothing is estimated from gradients, and no second model is needed.

    Args:
        model: With its adapter; it is left as it was.
        precision: Its group size, and the layers that stay whole.
        mean: Bits of a weight on average.
        moments: As of `fuse_in_place`.
        examples: Texts to measure on.
        targets: What the adapter says of them.
        config: How they are read.
        report: Gets a phase.
    """
    left = kept_whole(model.model, precision)
    layers = {n: m for n, m in layers_of(model.model) if precision.of(n) and n not in left}
    parts: dict[str, list[str]] = {}
    for name in layers:
        match = _PART.fullmatch(name)
        parts.setdefault(match["part"] if match else name, []).append(name)
    report("phase", {"name": "cost of each part", "total": len(parts), "unit": "parts"})
    width, costs = base_width(mean), {}
    for part, names in parts.items():
        rounded = {
            name: _rounded(layers[name], width, precision.group_size, (moments or {}).get(name))
            for name in names
        }
        with in_place(model.model, rounded):
            kl = figures_on(model, examples, targets, config).metrics.kl_nats or 0.0
        costs[part] = Cost(kl=kl, weights=sum(_weights(layers[name]) for name in names))
        report("advance", {"by": 1, "note": f"{part}: {kl:.4f}"})
    widths = allocated(costs, mean)
    own = {
        name: {"group_size": precision.group_size, "bits": widths[part]}
        for part, names in parts.items()
        for name in names
    }
    return replace(precision, own={**precision.own, **own})


def _weights(module: nn.Module) -> int:
    """Numbers in a layer's matrix."""
    weight = base_of(module).weight
    return int(weight.size // weight.shape[-1]) * width_of(module)


def _rounded(
    module: nn.Module, bits: int, group_size: int, moments: np.ndarray | None
) -> nn.Module:
    """A layer with its adapter in its weights, which are as its few bits tell them."""
    layer = whole(few_bits(whole(copy.deepcopy(module)), bits, group_size, moments))
    mx.eval(layer.parameters())
    return layer
