"""A model with its adapter as one model of few bits, and its folder as mlx_lm opens it.

Knows modules and their names; nothing of texts, training or gates. Another kind of layer: a branch
in `few_bits`.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from conch_dna.checkpoints import write_folder
from conch_dna.errors import ConchError
from conch_dna.exporting.grids import Grid, compensated
from conch_dna.exporting.settings import FLOAT, OWN, WIDTHS, FuseSettings
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.screen.progress import Report
from conch_dna.training.students.block_influence import other_files

WEIGHTS = "model.safetensors"
_QUANTISED = ("quantization", "quantization_config")


def base_width(mean: float) -> int:
    """The greatest width that is at most a mean number of bits."""
    return max(width for width in map(int, WIDTHS) if width <= mean)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In how many bits a model's layers are.

    Attributes:
        bits: Of a weight; None for weights that are whole.
        group_size: Weights that share a scale.
        own: Layers with others, by their names, as config.json has them: settings, or False.
    """

    bits: int | None
    group_size: int = 64
    own: Mapping[str, Any]

    def of(self, name: str) -> tuple[int, int] | None:
        """Bits and group size of a layer; None where it stays whole."""
        if self.bits is None or self.own.get(name) is False:
            return None
        other = self.own.get(name) or {}
        return other.get("bits", self.bits), other.get("group_size", self.group_size)

    def to_config(self) -> dict[str, Any]:
        """What config.json says of it."""
        if self.bits is None:
            return {}
        general = {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        return {key: {**general, **self.own} for key in _QUANTISED}


def precision_of(source: ModelSource, settings: FuseSettings) -> Precision:
    """The precision that settings come to for a model.

    Raises:
        ConchError: The model's own is to be kept, and is of a kind that is not made here.
    """
    own = source.config.get("quantization")
    if settings.mean_bits:
        size = own.get("group_size", 64) if isinstance(own, dict) else 64
        return Precision(
            bits=base_width(settings.mean_bits), group_size=settings.group_size or size, own={}
        )
    if settings.bits == FLOAT or (settings.bits == OWN and not isinstance(own, dict)):
        return Precision(bits=None, own={})
    if settings.bits != OWN or not isinstance(own, dict):
        return Precision(bits=int(settings.bits), group_size=settings.group_size or 64, own={})
    if own.get("mode", "affine") != "affine":
        raise ConchError(
            f"{source.model_id} is quantised as {own['mode']}, which is not made here: give --bits"
        )
    by_layer = {name: value for name, value in own.items() if isinstance(value, dict | bool)}
    size = settings.group_size or own["group_size"]
    return Precision(bits=own["bits"], group_size=size, own=by_layer)


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that can be quantised, by their names, an adapter's around them included."""
    inside: list[str] = []
    for name, module in sorted(model.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if hasattr(module, "fuse") or hasattr(module, "to_quantized") or _is_quantised(module):
            inside.append(name)
            yield name, module


def _is_quantised(module: nn.Module) -> bool:
    return "scales" in module and hasattr(module, "bits")


def base_of(module: nn.Module) -> nn.Module:
    """The layer under an adapter's."""
    inner: nn.Module = module.get("linear") or module.get("embedding") or module
    return inner


def width_of(module: nn.Module) -> int:
    """Numbers that come into a layer, or out of an embedding."""
    base = base_of(module)
    packed = int(base.weight.shape[-1])
    return packed * 32 // int(base.bits) if _is_quantised(base) else packed


def is_matrix(module: nn.Module) -> bool:
    """Whether a layer is one matrix: inputs are multiplied by it, or it is an embedding."""
    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    return isinstance(base_of(module), kinds)


def whole(module: nn.Module) -> nn.Module:
    """A layer with its adapter in its weights, which are float32; nothing is computed yet."""
    from mlx_lm.utils import dequantize_model

    # First, or an adapter's small numbers would be lost beside weights in 16 bits.
    module.set_dtype(mx.float32)
    holder = nn.Module()
    holder.layer = module
    if not hasattr(module, "fuse"):
        return dequantize_model(holder).layer
    holder.layer = base_of(module)
    base = dequantize_model(holder).layer
    for name in ("linear", "embedding"):
        if name in module:
            module[name] = base
    fused: nn.Module = module.fuse()
    return fused


def kept_whole(model: nn.Module, precision: Precision) -> list[str]:
    """Layers that groups of the wanted size do not divide, and that stay as they are.

    Raises:
        ConchError: All of them would.
    """
    wanted = [(n, m, each[1]) for n, m in layers_of(model) if (each := precision.of(n))]
    left = [name for name, module, size in wanted if width_of(module) % size]
    if wanted and len(left) == len(wanted):
        name, module, size = wanted[0]
        sizes = [str(each) for each in (32, 64, 128) if width_of(module) % each == 0]
        remedy = f"give --group-size {' or '.join(sizes)}" if sizes else "give --bits float"
        raise ConchError(
            f"no layer can be in {precision.bits} bits with groups of {size}: {name} is "
            f"{width_of(module)} wide; {remedy}"
        )
    return left


def fuse_in_place(
    model: LanguageModel,
    precision: Precision,
    moments: Mapping[str, np.ndarray] | None,
    report: Report,
) -> Precision:
    """Make a model with an adapter one without, layer by layer, each in its precision.

    A layer that the adapter leaves alone, and that is in as many bits already, stays to the bit.

    Args:
        model: In memory, with its adapter; it is changed.
        precision: What is wanted.
        moments: Of the inputs of layers whose outputs are to be kept; others, and without any all,
            are rounded, as mlx_lm does.
        report: Gets a phase.

    Returns:
        The precision, with the layers that stay whole.
    """
    left = kept_whole(model.model, precision)
    own = {**precision.own, **dict.fromkeys(left, False)}
    precision = Precision(bits=precision.bits, group_size=precision.group_size, own=own)
    layers = list(layers_of(model.model))
    filed = model.source.modules(lazy=True)
    dtype, own_layers = _float_kind(filed), dict(filed.named_modules())
    report("phase", {"name": "weights", "total": len(layers), "unit": "layers"})
    for name, module in layers:
        how, before = precision.of(name), own_layers.get(name)
        if not (
            how and before and _is_quantised(before) and (before.bits, before.group_size) == how
        ):
            before = None
        if before is not None and moments is not None and not hasattr(module, "fuse"):
            layer = before
        else:
            layer = whole(module)
            if how:
                layer = few_bits(layer, *how, (moments or {}).get(name), before)
        layer.set_dtype(dtype)
        mx.eval(layer.parameters())
        model.model.update_modules(tree_unflatten([(name, layer)]))
        report("advance", {"by": 1})
    model.model.set_dtype(dtype)
    mx.eval(model.model.parameters())
    return precision


def few_bits(
    layer: nn.Module,
    bits: int,
    group_size: int,
    moments: np.ndarray | None,
    before: nn.Module | None = None,
) -> nn.Module:
    """A layer in few bits, by its codes.

    Args:
        layer: With whole weights and no adapter.
        bits: Of a weight.
        group_size: Weights that share a scale.
        moments: Of its inputs, to keep its outputs; None rounds it, as mlx_lm does.
        before: The same without an adapter, if it was in as many bits.
    """
    quantised: nn.Module = layer.to_quantized(group_size, bits)
    if moments is None:
        return quantised
    start = None
    if before is not None:
        # All that the adapter did not move lies on this grid.
        scales, biases = before.scales.astype(mx.float32), before.biases.astype(mx.float32)
        start = np.array(scales), np.array(biases)
    weight = np.array(layer.weight)
    put_grid(quantised, compensated(weight, moments, bits=bits, group_size=group_size, start=start))
    return quantised


def put_grid(quantised: nn.Module, grid: Grid) -> None:
    """Give a quantised layer other codes, scales and biases."""
    quantised.weight = mx.array(grid.packed())
    quantised.scales, quantised.biases = mx.array(grid.scales), mx.array(grid.biases)


def write_model(
    source: ModelSource,
    folder: Path,
    arrays: Mapping[str, mx.array],
    precision: Precision,
) -> None:
    """Write a model's folder as mlx_lm opens it, whole or not at all.

    Args:
        source: Whose configuration and tokenizer it has.
        folder: Where to; what stands there is replaced.
        arrays: Its weights, by their names.
        precision: Of them.
    """
    config = {name: value for name, value in source.config.items() if name not in _QUANTISED}
    write_folder(
        folder,
        arrays={WEIGHTS: arrays},
        documents={"config.json": {**config, **precision.to_config()}},
        writers={path.name: partial(shutil.copyfile, path) for path in other_files(source.folder)},
    )


def _float_kind(model: nn.Module) -> mx.Dtype:
    """The type of a model's numbers that are not codes: of scales, norms and whole weights."""
    arrays = named_arrays(model.parameters()).values()
    return next(each.dtype for each in arrays if mx.issubdtype(each.dtype, mx.floating))
