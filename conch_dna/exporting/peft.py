"""Adapters as PEFT has them and back: names, scales, transposed matrices, tied embeddings.

Knows the two forms of an adapter's tensors and configuration; runs no model. mlx_lm has one rank,
one scale and the same names in each layer, PEFT may have others for each matrix. Another kind of
matrix: a branch in `to_peft` and one in `_layer_tensors`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from conch_dna.checkpoints import read_json, require_keys
from conch_dna.errors import ConchError, told
from conch_dna.exporting.quantised import width_of
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.adapters import linear_names, outer_names

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_LAYER = re.compile(r"^(?P<before>(?:.*\.)?layers)\.(?P<number>\d+)\.(?P<rest>.+)$")
# Settings of PEFT that add something mlx_lm's LoRA has not.
_REFUSED = (
    *("modules_to_save", "fan_in_fan_out", "lora_bias", "target_parameters", "layer_replication"),
    *("trainable_token_indices", "use_qalora", "megatron_config", "alora_invocation_tokens"),
)


def to_peft(
    tensors: Mapping[str, mx.array], document: Mapping[str, Any], *, tied: bool, base: str
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """An adapter's tensors and configuration as PEFT saves them.

    Args:
        tensors: By mlx_lm's names: `lora_a [in, r]`, `lora_b [r, out]`, of DoRA `m [out]`.
        document: Its adapter_config.json.
        tied: Whether the model's embedding is its head too, and so an adapter of one of both.
        base: The name of the model in the configuration.

    Raises:
        ConchError: It holds every weight, or LoRA of experts, which PEFT names otherwise for each
            kind of model.
    """
    kind = document.get("fine_tune_type", "lora")
    if kind == "full":
        raise ConchError(
            "the adapter holds every weight, which is no LoRA: conch-dna fuse ADAPTER FOLDER "
            "--bits float makes a model of it"
        )
    require_keys(document, CONFIG_FILE, needs={"lora_parameters": dict})
    rank, scale = document["lora_parameters"]["rank"], document["lora_parameters"]["scale"]
    arrays: dict[str, mx.array] = {}
    targets: dict[str, None] = {}
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if value.ndim > 2 or "switch" in layer:
            raise ConchError(
                f"{layer} is a mixture of experts, whose LoRA PEFT names otherwise for each kind "
                "of model: conch-dna fuse makes a model of it"
            )
        targets[layer] = None
        embedding = layer.endswith("embed_tokens")
        if embedding and leaf == "m":
            raise ConchError(
                f"{layer} has DoRA, which PEFT has not for embeddings: use conch-dna fuse"
            )
        value = value if leaf == "m" else value.T
        if embedding:
            arrays[f"{PREFIX}{layer}.lora_embedding_{leaf[-1].upper()}"] = value
            if tied:
                # What a row is moved by when it is read, it is moved by when it is compared.
                targets["lm_head"] = None
                other = "B" if leaf == "lora_a" else "A"
                arrays[f"{PREFIX}lm_head.lora_{other}.weight"] = value.T
        elif leaf == "m":
            arrays[f"{PREFIX}{layer}.lora_magnitude_vector"] = value
        else:
            arrays[f"{PREFIX}{layer}.lora_{leaf[-1].upper()}.weight"] = value
    configuration = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": document["lora_parameters"].get("dropout", 0.0),
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": kind == "dora",
        "use_rslora": False,
    }
    return {name: mx.contiguous(value) for name, value in arrays.items()}, configuration


@dataclass(frozen=True, eq=False)
class _Matrices:
    """LoRA of one layer, as mlx_lm has it.

    Attributes:
        a: `[in, r]`.
        b: `[r, out]`.
        m: DoRA's norms of rows `[out]`; None for LoRA.
    """

    a: mx.array
    b: mx.array
    m: mx.array | None


def from_peft(
    folder: Path, base: ModelSource, outlined: LanguageModel
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and configuration of mlx_lm's of an adapter that PEFT saved.

    Ranks that differ are filled up with zeros, scales that differ go into the matrices, and a layer
    without an adapter beside others that have one gets one that changes nothing.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors.
        base: The model that it is for.
        outlined: Its modules, without weights.

    Raises:
        ConchError: It is none, has pickled weights, or something that mlx_lm has not.
    """
    document = _read_config(folder)
    with told(f"{folder / WEIGHTS_FILE} cannot be read"):
        arrays = mx.load(str(folder / WEIGHTS_FILE))
        assert isinstance(arrays, dict)
        mx.eval(arrays)
    layers = _layer_tensors(arrays, folder)
    if base.config.get("tie_word_embeddings"):
        layers = _tied(layers, folder)
    if not layers:
        raise ConchError(f"{folder} holds no LoRA matrices")
    bare = [name for name, each in layers.items() if each.m is None]
    if document.get("use_dora") and bare:
        raise ConchError(f"{folder} is DoRA, and {bare[0]} has no magnitudes: save it again")
    scale = _scale(document, document["r"], document["lora_alpha"])
    rank = max(each.a.shape[1] for each in layers.values())
    tensors: dict[str, mx.array] = {}
    for name, each in layers.items():
        own = _scale(document, each.a.shape[1], _own_alpha(document, name))
        missing = rank - each.a.shape[1]
        tensors[f"{name}.lora_a"] = mx.pad(each.a, [(0, 0), (0, missing)])
        tensors[f"{name}.lora_b"] = mx.pad(each.b * (own / scale), [(0, missing), (0, 0)])
        if each.m is not None:
            tensors[f"{name}.m"] = each.m
    keys, count = _keys(layers, outlined)
    dora = any(each.m is not None for each in layers.values())
    tensors |= _empty(outlined, keys, count, layers, rank, folder, dora=dora)
    return tensors, {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": count,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        raise ConchError(f"{folder} has no {CONFIG_FILE}: give a folder that PEFT saved")
    needs = {"peft_type": str, "r": int, "lora_alpha": int | float}
    document = read_json(folder / CONFIG_FILE, needs={"peft_type": str})
    if document["peft_type"] != "LORA":
        raise ConchError(
            f"{folder} is an adapter of the kind {document['peft_type']}, and mlx_lm has LoRA only"
        )
    require_keys(document, folder / CONFIG_FILE, needs=needs)
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = "its weights are pickled, which may run code: save it with safetensors"
        reason = pickled if list(folder.glob("*.bin")) else "it has no weights"
        raise ConchError(f"{folder} has no {WEIGHTS_FILE}: {reason}")
    if document["r"] < 1:
        raise ConchError(f"{folder / CONFIG_FILE} says r {document['r']}, which is no rank")
    if not 0 < document["lora_alpha"] < math.inf:
        alpha = document["lora_alpha"]
        raise ConchError(f"{folder / CONFIG_FILE} says lora_alpha {alpha}, which is no scale")
    if document.get("bias", "none") != "none":
        raise ConchError(
            f"{folder} trains biases ({document['bias']}), which mlx_lm's LoRA does not"
        )
    if extras := [name for name in _REFUSED if document.get(name)]:
        raise ConchError(f"{folder} has {', '.join(extras)}, which mlx_lm's LoRA has not")
    return document


def _layer_tensors(arrays: Mapping[str, mx.array], folder: Path) -> dict[str, _Matrices]:
    """The matrices of each layer, by mlx_lm's name of it."""
    leaves = {
        "lora_A.weight": "a",
        "lora_embedding_A": "a",
        "lora_B.weight": "b",
        "lora_embedding_B": "b",
        "lora_magnitude_vector": "m",
        "lora_magnitude_vector.weight": "m",
    }
    found: dict[str, dict[str, mx.array]] = {}
    for name, value in arrays.items():
        plain = name.removeprefix(PREFIX)
        leaf = next((leaf for leaf in leaves if plain.endswith(f".{leaf}")), None)
        if leaf is None or (leaves[leaf] != "m" and value.ndim != 2):
            raise ConchError(
                f"{folder} holds {name} {value.shape}, which is no part of a LoRA here"
            )
        layer = plain.removesuffix(f".{leaf}")
        own = value.astype(mx.float32)
        found.setdefault(layer, {})[leaves[leaf]] = (
            own.reshape(-1) if leaves[leaf] == "m" else own.T
        )
    for layer, parts in found.items():
        whole = {"a", "b"} <= parts.keys()
        if not whole or parts["a"].shape[1] != parts["b"].shape[0] or not parts["a"].size:
            raise ConchError(f"{folder}: {layer} has not both matrices of a LoRA, of one rank")
        if not all(bool(mx.all(mx.isfinite(each))) for each in parts.values()):
            raise ConchError(f"{folder}: {layer} holds numbers that are not finite: save it again")
    return {layer: _Matrices(p["a"], p["b"], p.get("m")) for layer, p in found.items()}


def _tied(layers: dict[str, _Matrices], folder: Path) -> dict[str, _Matrices]:
    """With one adapter of embedding and head where the model has one matrix for both."""
    name = next((each for each in layers if each.endswith("embed_tokens")), None)
    head = layers.get("lm_head")
    if name is None and head is None:
        return layers
    if name is not None and head is not None:
        own = layers[name]
        turned = own.a.shape == head.b.T.shape and own.b.shape == head.a.T.shape
        if turned and mx.allclose(own.a, head.b.T) and mx.allclose(own.b, head.a.T):
            return {layer: each for layer, each in layers.items() if layer != "lm_head"}
    raise ConchError(
        f"{folder} changes the embedding and the head of a model that has one matrix for both each "
        "in its own way, which mlx_lm cannot"
    )


def _own_alpha(document: Mapping[str, Any], name: str) -> float:
    """The alpha of one layer, by PEFT's patterns for the ends of names.

    Raises:
        ConchError: They are no patterns of numbers.
    """
    import re2

    options = re2.Options()
    options.log_errors = False
    # Whoever made the file chose the pattern: RE2 takes no longer than the name is.
    with told(f"alpha_pattern in {CONFIG_FILE} is none"):
        for pattern, alpha in (document.get("alpha_pattern") or {}).items():
            if re2.compile(rf"(.*\.)?({pattern})", options).fullmatch(name):
                if not math.isfinite(alpha):
                    raise ValueError(f"{pattern} has alpha {alpha}")
                return float(alpha)
    return float(document["lora_alpha"])


def _scale(document: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if document.get("use_rslora") else rank)


def _keys(layers: Mapping[str, _Matrices], outlined: LanguageModel) -> tuple[list[str], int]:
    """Names for `lora_parameters`, and how many of the last layers they are taken from."""
    total = len(outlined.model.layers)
    inner = {name: match for name in layers if (match := _LAYER.match(name))}
    first = min((int(match["number"]) for match in inner.values()), default=total - 1)
    keys = {match["rest"] for match in inner.values()} | (layers.keys() - inner.keys())
    known = {*linear_names(outlined.model), *outer_names(outlined.model)}
    if unknown := sorted(keys - known):
        raise ConchError(
            f"{outlined.model_id} has no {', '.join(unknown[:5])} that could have LoRA: it has "
            f"{', '.join(sorted(known)[:12])}"
        )
    if first >= total:
        raise ConchError(f"layer {first} is adapted, and {outlined.model_id} has {total} layers")
    return sorted(keys), total - first


def _empty(
    outlined: LanguageModel,
    keys: list[str],
    count: int,
    layers: Mapping[str, _Matrices],
    rank: int,
    folder: Path,
    *,
    dora: bool,
) -> dict[str, mx.array]:
    """Adapters that change nothing, for layers that mlx_lm would give one and PEFT did not."""
    total, tensors = len(outlined.model.layers), {}
    modules = dict(outlined.model.named_modules())
    for name, module in modules.items():
        match = _LAYER.match(name)
        if not match or match["rest"] not in keys or int(match["number"]) < total - count:
            continue
        if name in layers:
            continue
        if dora:
            raise ConchError(f"{folder} has DoRA for some layers and none for {name}: use LoRA")
        tensors[f"{name}.lora_a"] = mx.zeros((width_of(module), rank))
        tensors[f"{name}.lora_b"] = mx.zeros((rank, module.weight.shape[0]))
    return tensors
