"""Models in float32 on a CPU, where mlx multiplies quantized and 16-bit weights slowly.

Knows modules and memory, nothing of where a model comes from. To dequantize another kind of
module: mlx_lm's `dequantize_model` has to know it.
"""

import logging
import os
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from conch_dna.errors import ConchError

VARIABLE = "CONCH_DNA_CPU_WEIGHTS"
CHOICES = ("auto", "float32", "keep")
# What else a run needs besides its weights has the rest.
_SHARE_OF_MEMORY = 0.7
_LOGGED: set[str] = set()


def log_once(text: str) -> None:
    """Log what was not logged before in this process."""
    if text not in _LOGGED:
        _LOGGED.add(text)
        logging.getLogger("conch_dna").warning(text)


def on_cpu() -> bool:
    """Whether mlx computes on a CPU unless told otherwise."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def for_this_device(model: nn.Module, name: str, *, say: Callable[[str], None]) -> nn.Module:
    """A model as it is, or on a CPU with float32 in place of quantized and 16-bit weights.

    Nothing is computed: arrays stay lazy until they are evaluated. `CONCH_DNA_CPU_WEIGHTS` is
    `auto` (float32 where it fits into memory), `float32` or `keep`.

    Args:
        model: With its weights; it is changed.
        name: What a message calls it.
        say: Gets what is done, or why it is not, in one line.

    Raises:
        ConchError: The variable has another value.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ConchError(f"{VARIABLE} is {choice!r}, not {', '.join(CHOICES[:-1])} or keep")
    quantized = [module for _, module in model.named_modules() if _bits(module)]
    halves = any(each.dtype in (mx.float16, mx.bfloat16) for each in _arrays(model))
    if choice == "keep" or not on_cpu() or not (quantized or halves):
        return model
    kind = "quantized" if quantized else "in 16 bits"
    size = _float32_bytes(model)
    shown = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
    room = _SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if choice == "auto" and size > room:
        say(
            f"{name} stays {kind}, which is slow on a CPU: as float32 it would take {shown}, more "
            f"than {_SHARE_OF_MEMORY:.0%} of the memory here ({VARIABLE}=float32 loads it so)"
        )
        return model
    say(
        f"{name} is {kind}, which is slow on a CPU: its weights are loaded as float32 ({shown}; "
        f"{VARIABLE}=keep leaves them)"
    )
    from mlx_lm.utils import dequantize_model

    # First, or the products of scales and numbers would be rounded to 16 bits.
    model.set_dtype(mx.float32)
    return dequantize_model(model)


def _arrays(model: nn.Module) -> list[mx.array]:
    named: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return list(named.values())


def _bits(module: nn.Module) -> int | None:
    """The bits of a quantized module; None for another."""
    return getattr(module, "bits", None) if "scales" in module else None


def _float32_bytes(model: nn.Module) -> int:
    """What all weights take as float32."""
    packed, numbers = 0, 0
    for _, module in model.named_modules():
        if bits := _bits(module):
            numbers += module.weight.size * 32 // bits
            packed += sum(module[n].size for n in ("weight", "scales", "biases") if n in module)
    return 4 * (numbers + sum(each.size for each in _arrays(model)) - packed)
