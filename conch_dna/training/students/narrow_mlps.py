"""Narrower MLPs: those neurons of a model stay that weigh most in what it computes on real texts.

Knows MLPs of gate_proj, up_proj and down_proj; nothing of which layers stay or where files lie.
A neuron's weight is its mean |activation| (Minitron, Muralidharan et al. 2024) times the norm of
its column in down_proj, as in Wanda (Sun et al. 2023). Another: in place of `neuron_weights`.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, named_arrays
from conch_dna.training.students.layers import layers_of, with_layers
from conch_dna.training.students.watching import Heard, in_place

DOWN = "down_proj"
_PARTS = ("gate_proj", "up_proj", DOWN)
# The widest that divides the teacher's width is taken, and the last where none does.
_MULTIPLES = (64, 32, 8)
_IN_FILES = re.compile(r"\blayers\.(\d+)\.mlp\.(.*)$")


@dataclass(frozen=True, kw_only=True)
class Width:
    """How many neurons each MLP of a student has.

    Attributes:
        share: What was asked for, of the teacher's.
        neurons: What that is, rounded.
        of: The teacher's.
        multiple: What the number of neurons is rounded to a multiple of.
    """

    share: float
    neurons: int
    of: int
    multiple: int


def width_of(model: LanguageModel, arrays: Mapping[str, mx.array], share: float) -> Width:
    """The width to which a share of a model's neurons comes.

    Args:
        model: Whose layers are all alike.
        arrays: What its files hold.
        share: Of the neurons of each MLP.

    Raises:
        ConchError: Its MLPs are built in another way or quantised, or the share keeps none or all.
    """
    _require_narrowable(model, arrays)
    of = model.source.config["intermediate_size"]
    multiple = next((each for each in _MULTIPLES if of % each == 0), _MULTIPLES[-1])
    if not 0 < share < 1:
        raise ConchError(f"--mlp is {share:g}: give a share between 0 and 1, such as 0.75")
    neurons = round(share * of / multiple) * multiple
    if not 0 < neurons < of:
        raise ConchError(
            f"--mlp {share:g} of {of} neurons is {neurons} in multiples of {multiple}: give a "
            f"share between {multiple / of:.3g} and {1 - multiple / of:.3g}"
        )
    return Width(share=share, neurons=neurons, of=of, multiple=multiple)


def _require_narrowable(model: LanguageModel, arrays: Mapping[str, mx.array]) -> None:
    name, config = model.model_id, model.source.config
    if any(config.get(each) for each in ("quantization", "quantization_config")):
        raise ConchError(
            f"{name} is quantised, and MLPs of quantised weights cannot be narrowed: make it of "
            "the whole model"
        )
    mlp = getattr(layers_of(model)[0], "mlp", None)
    kind = type(mlp).__name__ if mlp is not None else "no MLP"
    found = named_arrays(mlp.parameters()) if isinstance(mlp, nn.Module) else {}
    known = {f"{part}.{each}" for part in _PARTS for each in ("weight", "bias")}
    if not {f"{part}.weight" for part in _PARTS} <= set(found) <= known:
        raise ConchError(
            f"the layers of {name} have {kind} with {', '.join(found) or 'no weights'}, not an "
            f"MLP of {', '.join(_PARTS)} alone: leave --mlp out"
        )
    width = found[f"{DOWN}.weight"].shape[1]
    if config.get("intermediate_size") != width:
        raise ConchError(
            f"intermediate_size in the config.json of {name} is {config.get('intermediate_size')}, "
            f"and its MLPs have {width} neurons: leave --mlp out"
        )
    count = len(layers_of(model))
    held = [match for each in arrays if (match := _IN_FILES.search(each))]
    if {(int(m[1]), m[2]) for m in held if int(m[1]) < count} != {
        (number, part) for number in range(count) for part in found
    }:
        raise ConchError(
            f"the files of {name} name the weights of its MLPs in another way than "
            f"layers.0.mlp.{DOWN}.weight: leave --mlp out"
        )


def neuron_weights(model: LanguageModel, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """What each neuron weighs: mean over tokens of |activation| · ‖its column in down_proj‖₂.

    Args:
        model: In memory; it is left as it was.
        windows: Token ids of real texts, each read by itself.

    Returns:
        For each layer float32 `[neurons]`, at least 0.
    """
    layers = layers_of(model)
    sums, count = [mx.array(0.0) for _ in layers], 0

    def heard(number: int, down: nn.Module) -> nn.Module:
        def note(activations: mx.array) -> None:
            rows = mx.abs(activations.astype(mx.float32)).reshape(-1, activations.shape[-1])
            sums[number] = sums[number] + rows.sum(axis=0)

        return Heard(down, note)

    watched = {f"{_mlp(n)}.{DOWN}": heard(n, layer.mlp[DOWN]) for n, layer in enumerate(layers)}
    with in_place(model.model, watched):
        for window in windows:
            # Only the sums are computed: the last layer's activations are part of them.
            model.model(mx.array([list(window)]))
            mx.eval(sums)
            count += len(window)
    norms = [mx.linalg.norm(each.mlp[DOWN].weight.astype(mx.float32), axis=0) for each in layers]
    return [np.asarray(total / count * norm) for total, norm in zip(sums, norms, strict=True)]


def heaviest(weights: np.ndarray, count: int) -> mx.array:
    """The numbers of so many neurons that weigh most, ascending, as int32 `[count]`."""
    order = np.argsort(-weights, kind="stable")[:count]
    return mx.array(np.sort(order).astype(np.int32))


@contextmanager
def cut_down(
    model: LanguageModel, kept: Sequence[int], neurons: Mapping[int, mx.array] | None
) -> Iterator[None]:
    """The model with some of its layers and neurons, for as long as this is entered.

    No weight is copied for longer than it is used.

    Args:
        model: In memory.
        kept: Its layers that stay, ascending.
        neurons: Of each of them those that stay; None for all.
    """
    layers = [layers_of(model)[number] for number in kept]
    narrow = {
        _mlp(place): _Narrow(layer.mlp, neurons[number])
        for place, (number, layer) in enumerate(zip(kept, layers, strict=True))
        if neurons
    }
    with with_layers(model, layers), in_place(model.model, narrow):
        yield


def _mlp(number: int) -> str:
    """What a layer's MLP is called in a model; see `layers_of`."""
    return f"model.layers.{number}.mlp"


def narrowed(name: str, array: mx.array, neurons: Mapping[int, mx.array]) -> mx.array:
    """A file's array with some neurons, where it belongs to an MLP; lazy.

    Args:
        name: In the teacher's files.
        array: The teacher's.
        neurons: Those that stay, by layer.
    """
    match = _IN_FILES.search(name)
    return _cut(match[2], array, neurons[int(match[1])]) if match else array


def _cut(name: str, array: mx.array, neurons: mx.array) -> mx.array:
    """An array of an MLP by its name in it, such as up_proj.weight, with some neurons."""
    if name == f"{DOWN}.weight":
        return mx.take(array, neurons, axis=1)
    return array if name == f"{DOWN}.bias" else mx.take(array, neurons, axis=0)


class _Narrow(nn.Module):
    """An MLP that computes with some of its neurons, as the same MLP with narrower layers does."""

    def __init__(self, mlp: nn.Module, neurons: mx.array) -> None:
        super().__init__()
        self.__dict__.update(mlp=mlp, neurons=neurons)

    def __call__(self, x: mx.array) -> mx.array:
        mlp = copy.copy(self.__dict__["mlp"])
        for part in _PARTS:
            layer = copy.copy(mlp[part])
            for name, array in mlp[part].items():
                layer[name] = _cut(f"{part}.{name}", array, self.__dict__["neurons"])
            mlp[part] = layer
        out: mx.array = mlp(x)
        return out
