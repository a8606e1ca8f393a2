"""An adapter's folder as modules around a base model's own arrays.

Knows mlx_lm's adapter folders and module trees; nothing of which adapter is active or of requests.
What a tree is made of besides modules, lists, dicts and tuples is shared as it is. A kind of
adapter that mlx_lm learns to build is built here too, since mlx_lm builds all of them.
"""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.checkpoints import (
    DIGESTS,
    content_digest,
    file_digest,
    read_json,
    verify_folder,
)
from conch_dna.errors import ConchError, one_line
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.training.adapters import ADAPTER_CONFIG, ADAPTER_FILE, adapter_tensors

KINDS = ("lora", "dora", "full")
MOST_RANK, MOST_SCALE = 65_536, 3e38
# Where a line of generations keeps what base all of them stand on.
_LINE_MANIFESTS = ("manifest.json", "../G000/manifest.json")


@dataclass(frozen=True)
class Swap:
    """One place of a module tree in which an adapter stands instead of the base.

    Attributes:
        holder: The module, list or dict of the live tree that holds it.
        key: Its name or index there.
        own: The base's part.
        other: The adapter's.
    """

    holder: Any
    key: str | int
    own: Any
    other: Any


class SharedTree:
    """The modules of a base as they were without an adapter, and trees that share its arrays.

    Args:
        live: The base's own module tree, without an adapter.
    """

    def __init__(self, live: nn.Module) -> None:
        clones: dict[int, Any] = {}
        self.pristine: nn.Module = _clone(live, clones)
        self._live = {id(clone): original for original, clone in clones.values()}
        # Kept, so that no id is given out again.
        self._clones = clones

    def tree(self) -> nn.Module:
        """A new module tree over the base's arrays, of which any may be replaced."""
        tree: nn.Module = _clone(self.pristine, {})
        return tree

    def swaps(self, adapted: nn.Module) -> tuple[Swap, ...]:
        """What of the live tree must be exchanged to make it the adapted one."""
        seen: set[int] = set()

        def differences(own: Any, other: Any) -> Iterator[Swap]:
            seen.add(id(own))
            for key, part in _entries(own):
                new = other[key]
                if id(part) in self._live and type(new) is type(part):
                    if id(part) not in seen:
                        yield from differences(part, new)
                elif new is not part:
                    yield Swap(self._live[id(own)], key, self._live.get(id(part), part), new)

        return tuple(differences(self.pristine, adapted))


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    yield from value.items() if isinstance(value, dict) else enumerate(value)


def _clone(value: Any, clones: dict[int, Any]) -> Any:
    """New modules, lists and dicts around the same arrays; parts used twice stay one.

    Args:
        value: A part of a module tree.
        clones: Filled with (original, clone) by the original's id.
    """
    if not isinstance(value, nn.Module | dict | list | tuple):
        return value
    if id(value) in clones:
        return clones[id(value)][1]
    if isinstance(value, tuple):
        result: Any = tuple(_clone(part, clones) for part in value)
    else:
        result = copy.copy(value)
        for key, part in list(_entries(value)):
            result[key] = _clone(part, clones)
    clones[id(value)] = (value, result)
    return result


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that fits a base model.

    Attributes:
        digest: Content address of its configuration and tensors.
        tree: The base with this adapter, as a module tree of its own over the base's arrays.
        swaps: What to exchange in the live tree for it.
        nbytes: Memory of its tensors.
    """

    digest: str
    tree: nn.Module
    swaps: tuple[Swap, ...]
    nbytes: int


def read_adapter(folder: Path, base: LanguageModel, shared: SharedTree) -> LoadedAdapter:
    """Read an adapter's folder onto a base, as `mlx_lm.load` would.

    Args:
        folder: Holds adapter_config.json and adapters.safetensors.
        base: The model it must belong to.
        shared: The base's modules.

    Raises:
        ConchError: The folder is not whole, belongs to another base, or does not fit; all
            tensors that do not are listed.
    """
    config = read_config(folder)
    require_same_base(folder, config, base)
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise ConchError(
            f"{folder} holds an adapter of the kind {kind!r}: known are {', '.join(KINDS)}"
        )
    tensors = _read_tensors(folder)
    tree = shared.tree()
    if kind != "full":
        _attach(tree, config, folder, dora=kind == "dora")
    _require_fits(tree, tensors, folder, full=kind == "full")
    tree.load_weights(list(tensors.items()), strict=False)
    # Or dropout would be at work in every answer.
    tree.eval()
    return LoadedAdapter(
        digest=adapter_digest(folder),
        tree=tree,
        swaps=shared.swaps(tree),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def adapter_digest(folder: Path) -> str:
    """Content address of an adapter's configuration and tensors."""
    return content_digest(*(file_digest(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_FILE)))


def read_config(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of it, all of whose files are there and as they were written.

    Raises:
        ConchError: It holds no adapter, or one that is not whole.
    """
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_FILE) if not (folder / name).is_file()]
    if missing:
        raise ConchError(
            f"{folder} holds no adapter, there is no {' and no '.join(missing)}: give a folder "
            "that 'conch-dna distill' or mlx_lm.lora made"
        )
    if (folder / DIGESTS).is_file():
        verify_folder(folder)
    return read_json(folder / ADAPTER_CONFIG, needs={})


def _recorded_base(manifest: Path) -> dict[str, Any]:
    """What a line's manifest says of its base; empty where there is no such line."""
    recorded = read_json(manifest, needs={}).get("base") if manifest.is_file() else None
    return recorded if isinstance(recorded, dict) else {}


def _read_tensors(folder: Path) -> dict[str, mx.array]:
    try:
        loaded = mx.load(str(folder / ADAPTER_FILE))
        # Arrays are read when they are needed, and by then the folder may be another.
        mx.eval(loaded)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConchError(f"cannot read {folder / ADAPTER_FILE}: {one_line(error)}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise ConchError(f"{folder / ADAPTER_FILE} holds no tensors: make the adapter again")
    return loaded


def _attach(tree: nn.Module, config: dict[str, Any], folder: Path, *, dora: bool) -> None:
    """Put fresh LoRA or DoRA modules where the configuration says, by mlx_lm's own function."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    random_state: Any = mx.random.state
    high, low = np.asarray(random_state[0])
    try:
        _require_sizes(config["lora_parameters"])
        linear_to_lora_layers(tree, config["num_layers"], config["lora_parameters"], use_dora=dora)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConchError(
            f"cannot build the adapter that {folder / ADAPTER_CONFIG} describes: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        # What it draws is replaced at once; nobody's sampling must depend on it.
        mx.random.seed(int(high) << 32 | int(low))


def _require_sizes(parameters: Any) -> None:
    """Refuse a rank and a scale that mlx_lm would take and fail with later."""
    rank, scale = parameters.get("rank", 1), parameters.get("scale", 1.0)
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise ValueError(f"its rank is {rank!r:.40}, which is none from 1 to {MOST_RANK:,}")
    if type(scale) not in (int, float) or not abs(scale) <= MOST_SCALE:
        raise ValueError(f"its scale is {scale!r:.40}, which is none that float32 holds")


def _require_fits(
    tree: nn.Module, tensors: dict[str, mx.array], folder: Path, *, full: bool
) -> None:
    """Refuse tensors that are unknown, of another shape or, for LoRA and DoRA, missing."""
    expected = named_arrays(tree.parameters()) if full else adapter_tensors(tree)
    problems = [f"{name} is no part of it" for name in sorted(set(tensors) - set(expected))]
    for name in sorted(expected):
        if name not in tensors:
            # mlx_lm trains all weights of some layers only, and keeps only those.
            problems += [] if full else [f"{name} is missing"]
        elif tensors[name].shape != expected[name].shape:
            problems.append(f"{name} is {tensors[name].shape}, not {expected[name].shape}")
        elif not full and not mx.isfinite(tensors[name]).all():
            problems.append(f"{name} has numbers that are not finite")
    if not full and not expected:
        problems.append("its configuration names no layer of the model")
    if problems:
        raise ConchError(
            f"the adapter in {folder} does not fit the model, {len(problems)} differences: "
            f"{'; '.join(problems)}. Distil it from this model, or load the one it was made for"
        )


def require_same_base(folder: Path, config: dict[str, Any], base: LanguageModel) -> None:
    """Refuse an adapter that was made for another model, as far as its folder tells.

    A recorded digest decides. Without one the recorded name does: it must be the base's, or lead
    to a folder with the same weights. An adapter that records nothing is judged by its shapes.

    Raises:
        ConchError: It is another model's; names both.
    """
    source = base.source
    made_by = config.get("conch_dna")
    digest = made_by.get("student_digest") if isinstance(made_by, dict) else None
    name = made_by.get("student") if isinstance(made_by, dict) else None
    name = name or config.get("model")
    for manifest in () if digest else _LINE_MANIFESTS:
        recorded = _recorded_base(folder / manifest)
        digest, name = digest or recorded.get("weights"), name or recorded.get("model")
    if digest is None and isinstance(name, str) and name != source.model_id:
        digest = _digest_of(name)
        if digest is None:
            raise ConchError(
                f"the adapter in {folder} was made for {name}, and whether that is "
                f"{source.model_id} cannot be told here: load the base as {name}, or, if both are "
                f'the same, set "model" in its {ADAPTER_CONFIG} to {source.model_id}'
            )
    if digest is not None and digest != source.weights_digest:
        raise ConchError(
            f"the adapter in {folder} was made for {name or 'another model'} (weights "
            f"{digest[:12]}), not for {source.model_id} (weights {source.weights_digest[:12]}): "
            "load that model as the base, or distil the domain into this one"
        )


def _digest_of(name: str) -> str | None:
    """The weights' digest of a model that is here; None rather than a download."""
    if not (name.startswith("embedded:") or os.path.isdir(os.path.expanduser(name))):
        return None
    try:
        return ModelSource(name).weights_digest
    except ConchError:
        return None
