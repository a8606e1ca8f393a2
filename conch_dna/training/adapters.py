"""What of a student is trained, and its folder as mlx_lm opens it: LoRA, DoRA, or every weight.

Knows modules and their names; nothing of data, losses or teachers.
To name another set of layers: an entry in `_chosen_keys`.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from conch_dna.checkpoints import differences, read_json, write_folder
from conch_dna.errors import ConchError, one_line, told
from conch_dna.language_model import (
    ADAPTER_FILES,
    LanguageModel,
    ModelSource,
    named_arrays,
    weight_files,
)
from conch_dna.training.settings import KDConfig

ADAPTER_CONFIG, ADAPTER_FILE = ADAPTER_FILES
_ADAPTER_LEAVES = {"lora_a", "lora_b", "m"}


def linear_names(model: nn.Module) -> list[str]:
    """Names, within a transformer layer, of every module that LoRA can wrap, experts included."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    modules = [pair for layer in model.layers for pair in layer.named_modules()]
    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    return sorted({n for n, part in modules if isinstance(part, kinds) or hasattr(part, "to_lora")})


def outer_names(model: nn.Module) -> list[str]:
    """Full names of the embedding and the head, which lie outside the layers."""
    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    inner = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    return sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and id(module) not in inner
    )


def _chosen_keys(choice: str, available: list[str], outer: list[str]) -> list[str]:
    """The full names of chosen layers; what is no such name stays as it is."""
    keys: dict[str, None] = {}
    for part in (name.strip() for name in choice.split(",")):
        if part == "all":
            names = available
        elif part == "attention":
            names = [name for name in available if name.rsplit(".", 1)[-1] in ("q_proj", "v_proj")]
            # Some models have one matrix for query, key and value.
            names = names or [n for n in available if "qkv" in n.rsplit(".", 1)[-1].lower()]
        elif part in available or part in outer:
            names = [part]
        else:
            # The end of names, such as q_proj, wherever it lies; inside of layers if it does.
            ends = [[n for n in group if n.endswith(f".{part}")] for group in (available, outer)]
            names = (ends[0] or ends[1] or [part]) if part else []
        keys |= dict.fromkeys(names)
    return list(keys)


def outline(student: ModelSource) -> LanguageModel | None:
    """A student with none of its arrays computed: what has which name, kind and shape.

    Returns:
        None where its own code is not here, as in a dry run with a model on the hub.

    Raises:
        ConchError: The model is broken, or of a kind mlx_lm does not know.
    """
    with student.load_errors():
        if weight_files(student.folder):
            return LanguageModel(student, student.modules(lazy=True))
        if student.config.get("model_file"):
            return None
        return LanguageModel(student, _described_modules(student.config))


def _described_modules(config: dict[str, Any]) -> nn.Module:
    """The modules that a configuration describes, quantized where it says so, without weights."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    model: nn.Module = model_class(arguments.from_dict(config))
    if quantization := config.get("quantization"):

        def how(name: str, module: nn.Module) -> Any:
            fits = hasattr(module, "to_quantized")
            fits = fits and module.weight.shape[-1] % quantization["group_size"] == 0
            return quantization.get(name, fits) if fits else False

        general = {name: quantization[name] for name in ("group_size", "bits")}
        mode = quantization.get("mode", "affine")
        nn.quantize(model, **general, mode=mode, class_predicate=how)
    return model


def require_trainable(
    student: ModelSource, config: KDConfig, *, start: Path | None = None, weights: bool = True
) -> None:
    """Refuse, before any work, what `make_trainable` would refuse, and weights that are broken.

    Args:
        student: The model's source.
        config: What is trained of it, see `make_trainable`.
        start: Folder of the adapter that training begins from; None for a new one.
        weights: Read them, an array at a time; it takes seconds for each GiB.

    Raises:
        ConchError: See `make_trainable`; or mlx_lm has no such model, or none that can be trained;
            or a weight is NaN or infinite.
    """
    if weights:
        _require_finite(student)
    if (outlined := outline(student)) is None:
        return
    try:
        make_trainable(outlined, config, start=start, compute=False)
    except ConchError:
        raise
    except Exception as error:
        # Some of mlx_lm's models, such as recurrent_gemma, are not made to be trained.
        raise ConchError(
            f"student {student.model_id} is of the kind {student.config.get('model_type')}, which "
            f"mlx_lm {version('mlx-lm')} cannot train ({one_line(error)}): use one of another kind"
        ) from error


def _require_finite(student: ModelSource) -> None:
    for path in weight_files(student.folder):
        # Loading the model would say no more.
        with told(f"student {path} cannot be read"):
            arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        while arrays:
            name, value = arrays.popitem()
            is_number = mx.issubdtype(value.dtype, mx.inexact)
            # One pass, which tells most that are sound: whatever is not finite stays so in the sum.
            if not is_number or mx.isfinite(value.astype(mx.float32).sum()):
                continue
            # Buffers, such as a mask, may hold infinities.
            is_bad = mx.isnan(value)
            if name.endswith(("weight", "scales", "biases")):
                is_bad = is_bad | mx.isinf(value)
            if is_bad.any():
                raise ConchError(
                    f"weight {name} of student {student.model_id} has numbers that are NaN or "
                    f"infinite, in {path.name}: use a model that is whole"
                )


def make_trainable(
    student: LanguageModel, config: KDConfig, *, start: Path | None = None, compute: bool = True
) -> dict[str, Any]:
    """Choose what of a pristine student is trained: LoRA (or DoRA) layers, or all its weights.

    Args:
        student: Loaded from its folder, without an adapter.
        config: `full`, and for LoRA rank, scale, dropout, keys, layers, DoRA and seed.
        start: Folder of an adapter to go on from, whether it holds LoRA layers or every weight.
        compute: Compute the weights; else only what they are is told.

    Returns:
        What `adapter_config.json` must hold for mlx_lm.

    Raises:
        ConchError: LoRA is asked for on top of a folder of every weight, a layer's name is
            unknown, the adapter to go on from has another shape, a layer cannot get DoRA, or
            weights to be trained in full are quantized.
    """
    require_goes_on(config, start)
    if not config.full:
        tensors = mx.load(str(start / ADAPTER_FILE)) if start else None
        assert tensors is None or isinstance(tensors, dict)
        described = attach_lora(student, config, start=tensors)
    else:
        if start is not None:
            from mlx_lm.utils import load_adapters

            load_adapters(student.model, str(start))
        described = unfreeze_all(student)
    if compute:
        mx.eval(student.model.parameters())
    return described


def require_goes_on(config: KDConfig, start: Path | None) -> None:
    """Refuse LoRA on top of a folder that holds every weight: mlx_lm could not open the result.

    Raises:
        ConchError: The folder holds every weight, and the settings ask for LoRA.
    """
    if start is None or config.full:
        return
    recorded = read_json(start / ADAPTER_CONFIG, needs={})
    if recorded.get("fine_tune_type") == "full":
        raise ConchError(
            f"{start} holds every weight, and LoRA layers on top of them would not fit into one "
            "adapter: add --full"
        )


def unfreeze_all(student: LanguageModel) -> dict[str, Any]:
    """Let every weight of a student train; an adapter that it carries becomes part of them.

    Returns:
        What `adapter_config.json` must hold for mlx_lm.

    Raises:
        ConchError: Its weights are quantized.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    model = student.model
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
    # On a CPU it may be in float32, and mlx_lm will put the adapter on what its files hold.
    outlined = outline(student.source) if student.source.config.get("quantization") else None
    modules = [*model.named_modules(), *(outlined.model.named_modules() if outlined else [])]
    quantized = sorted({name for name, module in modules if isinstance(module, kinds)})
    if quantized:
        raise ConchError(
            f"{len(quantized)} layers of {student.model_id} are quantized, such as "
            f"{quantized[0]}, and cannot be trained in full: use LoRA, or the model as it was "
            "before it was quantized"
        )
    fused = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    model.unfreeze()
    return {
        "fine_tune_type": "full",
        "num_layers": len(model.layers),
        "lora_parameters": {},
    }


def trained_tensors(student: LanguageModel) -> dict[str, mx.array]:
    """What was trained of a model, by name: all that its folder must hold."""
    return named_arrays(student.model.trainable_parameters())


def attach_lora(
    student: LanguageModel, config: KDConfig, *, start: dict[str, mx.array] | None = None
) -> dict[str, Any]:
    """Freeze a pristine student and put fresh LoRA (or DoRA) layers on it.

    Args:
        student: Loaded from its folder, never trained.
        config: Rank, scale, dropout, keys, layers, DoRA and seed.
        start: Tensors of an adapter to go on from, instead of one that changes nothing.

    Returns:
        What `adapter_config.json` must hold for mlx_lm.

    Raises:
        ConchError: The student already carries an adapter, has no layer of such a name or one that
            cannot be wrapped, or the adapter to go on from is of another shape.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = student.model
    if adapter_tensors(model):
        raise ConchError(
            f"student {student.model_id} already carries an adapter: each domain starts from the "
            "pristine model; load it anew"
        )
    available = linear_names(model)
    outer = outer_names(model)
    keys = _chosen_keys(config.lora_keys, available, outer)
    unknown = [key for key in keys if key not in available and key not in outer]
    if unknown or not keys:
        raise ConchError(
            f"lora_keys {config.lora_keys!r} names no layers of {student.model_id}"
            f"{': ' + ', '.join(unknown) if unknown else ''}. It has {', '.join(available + outer)}"
        )
    total = len(model.layers)
    if config.lora_layers > total or config.lora_layers == 0:
        raise ConchError(
            f"lora_layers is {config.lora_layers}, but {student.model_id} has {total} layers: "
            f"use 1 to {total}, or -1 for all"
        )
    layers = total if config.lora_layers == -1 else config.lora_layers
    parameters = {
        "rank": config.lora_rank,
        "scale": config.lora_scale,
        "dropout": config.lora_dropout,
        "keys": keys,
    }
    _require_wrapped(student, keys, layers, dora=config.dora)
    model.freeze()
    mx.random.seed(config.seed)
    linear_to_lora_layers(model, layers, parameters, use_dora=config.dora)
    if start is not None:
        _go_on_from(model, start)
    return {
        "fine_tune_type": "dora" if config.dora else "lora",
        "num_layers": layers,
        "lora_parameters": parameters,
    }


def _require_wrapped(student: LanguageModel, keys: list[str], layers: int, *, dora: bool) -> None:
    """Refuse layers of which none has a module of these names, or one that DoRA cannot wrap."""
    chosen = [*student.model.layers[-layers:], student.model]
    named = [(n, m) for part in chosen for n, m in part.named_modules() if n in keys]
    if not named:
        raise ConchError(
            f"lora_layers is {layers}, but the last {layers} layers of {student.model_id} have "
            f"none of {', '.join(keys)}: use more layers, or names of what is in them"
        )
    if not dora:
        return
    refused = {name: why for name, module in named if (why := _no_dora(module))}
    if refused:
        name, why = next(iter(refused.items()))
        raise ConchError(
            f"dora is true, but DoRA cannot wrap {name} of {student.model_id}, {why} "
            f"({len(refused)} such in all): use LoRA, or name others in --lora-keys"
        )


def _no_dora(module: nn.Module) -> str | None:
    """Why mlx_lm cannot make a DoRA layer of a module; None where it can."""
    if isinstance(module, nn.QuantizedLinear):
        # It takes the width of the input for a whole multiple.
        return f"quantized to {module.bits} bits" if 32 % module.bits else None
    if isinstance(module, nn.QuantizedEmbedding):
        return "a quantized embedding"
    if isinstance(module, nn.Linear | nn.Embedding):
        return None
    return f"a {type(module).__name__}"


def _go_on_from(model: nn.Module, start: dict[str, mx.array]) -> None:
    changed = differences(
        {name: list(value.shape) for name, value in start.items()},
        {name: list(value.shape) for name, value in adapter_tensors(model).items()},
    )
    if changed:
        raise ConchError(
            f"the adapter to go on from has other tensors than these settings make, "
            f"{len(changed)} in all: {changed[0]}. Give the rank, keys, layers and DoRA of the "
            "generation before"
        )
    model.update(tree_unflatten(list(start.items())))


def adapter_tensors(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's tensors of a model, by name; empty when it has none."""
    return {
        name: value for name, value in named_arrays(model.parameters()).items() if _is_adapter(name)
    }


def _is_adapter(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _ADAPTER_LEAVES


def save_adapter(
    path: Path, tensors: dict[str, mx.array], adapter_config: dict[str, Any], **more: Any
) -> None:
    """Write an adapter folder, whole or not at all; `more` goes to `write_folder`."""
    documents = {ADAPTER_CONFIG: adapter_config, **more.pop("documents", {})}
    write_folder(path, arrays={ADAPTER_FILE: tensors}, documents=documents, **more)


def load_verified(student: ModelSource, path: Path, tensors: dict[str, mx.array]) -> LanguageModel:
    """Load a student with a saved adapter through mlx_lm, and compare every tensor.

    mlx_lm accepts a file in which tensors are missing, so it is not asked for its opinion.

    Args:
        student: The model's source.
        path: The adapter's folder.
        tensors: What it must hold.

    Raises:
        ConchError: A tensor is missing, added or different.
    """
    loaded = student.load(adapter_path=path)
    present = {
        name: value
        for name, value in named_arrays(loaded.model.parameters()).items()
        if name in tensors or _is_adapter(name)
    }
    both = sorted(set(tensors) & set(present))
    wrong = sorted(set(tensors) ^ set(present))
    wrong += [name for name in both if not mx.array_equal(tensors[name], present[name])]
    if wrong:
        raise ConchError(
            f"the adapter in {path} does not come back as it was saved: {len(wrong)} tensors are "
            f"missing or different, such as {wrong[0]}. Check the disk, then run with --resume"
        )
    return loaded


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute each layer's activations in the backward pass, in this model only.

    The layers get a subclass of their own, so other models of the same class stay as they are,
    and a second call changes nothing.
    """
    for layer in model.layers:
        original = type(layer)
        if original.__dict__.get("recomputes_activations"):
            continue

        def call(self: nn.Module, *args: Any, _run: Any = original.__call__, **kwargs: Any) -> Any:
            dropouts = _keyed_dropouts(self) if self.training else []
            # Drawn before the layer runs: drawn inside, they would be others when it runs again.
            keys = [mx.random.randint(0, 2**31 - 1, (2,), mx.uint32) for _ in dropouts]

            def inner(parameters: Any, keys: Any, *inner_args: Any, **inner_kwargs: Any) -> Any:
                self.update(parameters)
                for dropout, key in zip(dropouts, keys, strict=True):
                    dropout.__dict__["key"] = mx.stop_gradient(key)
                return _run(self, *inner_args, **inner_kwargs)

            return mx.checkpoint(inner)(self.trainable_parameters(), keys, *args, **kwargs)

        layer.__class__ = type(
            original.__name__, (original,), {"__call__": call, "recomputes_activations": True}
        )


class _KeyedDropout(nn.Dropout):
    """Dropout whose mask follows from `key`, which its layer sets before every call."""

    key: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Drop elements in training, as `nn.Dropout` does."""
        if not self.training:
            return x
        kept: float = self._p_1
        return mx.random.bernoulli(kept, x.shape, key=self.key) * x / kept


def _keyed_dropouts(layer: nn.Module) -> list[nn.Module]:
    dropouts: list[nn.Module] = [
        m for m in layer.modules() if isinstance(m, nn.Dropout) and m._p_1 < 1
    ]
    for dropout in dropouts:
        dropout.__class__ = _KeyedDropout
    return dropouts
