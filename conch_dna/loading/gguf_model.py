"""A GGUF file of a Llama as a model folder that mlx_lm opens, made once and kept in a cache.

Knows llama.cpp's names of weights and mlx_lm's of one family; nothing of training. To take in
another tensor of a layer: its line in NAMES.
"""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.checkpoints import file_digest, verify_folder, write_folder
from conch_dna.errors import ConchError, NotWholeError, one_line
from conch_dna.loading.gguf_file import GgufFile, read_gguf
from conch_dna.loading.gguf_tokenizer import tokenizer_documents

if TYPE_CHECKING:
    import mlx.core as mx

SUFFIX = ".gguf"
CACHE_VARIABLE = "CONCH_DNA_CACHE"
# Raised when the folder that is made of a file changes.
_FORM = 1
_GROUP = 32
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# How large one of these may be; mlx_lm would work for minutes on the modules of more.
_MOST = {"embedding_length": 2**20, "feed_forward_length": 2**24, "block_count": 1_000}
_MOST |= {"attention.head_count": 2**16, "attention.head_count_kv": 2**16}
_MOST |= {"context_length": 2**32, "attention.key_length": 2**16}


def cache_folder() -> Path:
    """Where folders made of GGUF files lie: $CONCH_DNA_CACHE, or conch_dna in the user's cache."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(general).expanduser() / "conch_dna"


def model_folder(path: Path) -> Path:
    """The folder of a GGUF file's model, made when it is not in the cache.

    Args:
        path: The file.

    Raises:
        ConchError: It is no whole GGUF file, no Llama, or holds what mlx cannot read; or the
            cache cannot be written.
    """
    try:
        digest = file_digest(path)
    except OSError as error:
        raise ConchError(f"cannot read {path}: {error}") from error
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}-{_FORM}"
    try:
        verify_folder(folder)
    except NotWholeError:
        file = read_gguf(path)
        config = config_of(file)
        documents = tokenizer_documents(file)
        write_folder(
            folder,
            arrays={"model.safetensors": weights_of(file, config)},
            documents={"config.json": config, **documents},
        )
    return folder


def config_of(file: GgufFile) -> dict[str, Any]:
    """config.json of the model in a file, every size of it compared with the file's tensors.

    Raises:
        ConchError: It is no Llama, says too little, or says other sizes than its tensors have.
    """
    kind = file.get("general.architecture", str)
    if kind != "llama":
        raise ConchError(
            f"{file.path} holds a model of the architecture {kind!r}: of GGUF files only those of "
            "the llama family are read; use the model's own folder or its hub id"
        )
    heads = _size(file, "attention.head_count")
    hidden = _size(file, "embedding_length")
    width = _size(file, "attention.key_length", hidden // heads)
    rows = len(file.get("tokenizer.ggml.tokens", list))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": _size(file, "feed_forward_length"),
        "num_hidden_layers": _size(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(file, "attention.head_count_kv", heads),
        "head_dim": width,
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(file, "rope.freq_base", 10_000.0),
        "max_position_embeddings": _size(file, "context_length"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0]
        if "token_embd.weight" in file.tensors
        else rows,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    for name in ("bos", "eos"):
        number = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(number) is int:
            config[f"{name}_token_id"] = number
    if scaling := _rope_scaling(file, width):
        config["rope_scaling"] = scaling
    _require_shapes(file, config)
    if quantized := _quantization(file):
        config["quantization"] = quantized
    return config


def _number(file: GgufFile, key: str, default: float | None = None) -> float:
    value = float(file.get(f"llama.{key}", (int, float), default))
    if not (math.isfinite(value) and value > 0):
        raise ConchError(f"{file.path}: llama.{key} is {value}, not above 0")
    return value


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    value: int = file.get(f"llama.{key}", int, default)
    if not 1 <= value <= _MOST[key]:
        raise ConchError(f"{file.path}: llama.{key} is {value:,}, not from 1 to {_MOST[key]:,}")
    return value


def _rope_scaling(file: GgufFile, width: int) -> dict[str, Any] | None:
    """How positions are stretched; refused where mlx_lm has nothing like it."""
    turned = file.metadata.get("llama.rope.dimension_count", width)
    if turned != width:
        raise ConchError(
            f"{file.path} turns {turned} of a head's {width} numbers by position, and mlx_lm's "
            "Llama all of them: use the model's own folder"
        )
    kind = file.get("llama.rope.scaling.type", str, "none")
    if "rope_freqs.weight" in file.tensors or kind not in ("none", "linear"):
        found = "its own frequencies" if kind == "none" else repr(kind)
        raise ConchError(
            f"{file.path} stretches positions by {found}, which a GGUF file does not tell in "
            "full: use the model's own folder or its hub id"
        )
    if kind == "none":
        return None
    return {"type": "linear", "factor": _number(file, "rope.scaling.factor")}


def _new_name(name: str) -> str | None:
    """mlx_lm's name of a tensor; None for one that a Llama does not have."""
    part, _, leaf = name.rpartition(".")
    if part in _OUTER:
        return f"{_OUTER[part]}.{leaf}"
    pieces = part.split(".")
    if len(pieces) == 3 and pieces[0] == "blk" and pieces[1].isdecimal() and pieces[2] in NAMES:
        return f"model.layers.{int(pieces[1])}.{NAMES[pieces[2]]}.{leaf}"
    return None


def _require_shapes(file: GgufFile, config: dict[str, Any]) -> None:
    """Refuse tensors that are missing, of another shape, or that a Llama does not have."""
    hidden, inner, rows = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
    }
    expected = {"token_embd.weight": (rows, hidden), "output_norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        expected["output.weight"] = (rows, hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            expected[f"blk.{layer}.{name}.weight"] = shape
            biased = "attention_bias" if name.startswith("attn") else "mlp_bias"
            if config[biased] and len(shape) == 2:
                expected[f"blk.{layer}.{name}.bias"] = shape[:1]
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    for name, shape in expected.items():
        if name not in found:
            raise ConchError(f"{file.path} has no {name}: it is not a whole Llama")
        if found[name] != shape:
            raise ConchError(f"{file.path}: {name} has the shape {found[name]}, not {shape}")
    if others := sorted(found.keys() - expected.keys()):
        raise ConchError(
            f"{file.path} has {others[0]}, which mlx_lm's Llama has not: use the model's own "
            "folder or its hub id"
        )


def _quantization(file: GgufFile) -> dict[str, Any] | None:
    """The part of config.json that says which modules are quantized to how many bits."""
    bits = {
        str(_new_name(name)).removesuffix(".weight"): _BITS[tensor.kind]
        for name, tensor in file.tensors.items()
        if tensor.kind in _BITS
    }
    if not bits:
        return None
    general = min(bits.values())
    others = {
        name: {"group_size": _GROUP, "bits": each} for name, each in bits.items() if each != general
    }
    return {"group_size": _GROUP, "bits": general, **others}


def weights_of(file: GgufFile, config: dict[str, Any]) -> "dict[str, mx.array]":
    """The weights of a file by mlx_lm's names, quantized as they are in it.

    Args:
        file: As `read_gguf` found it whole.
        config: What `config_of` says of it.

    Raises:
        ConchError: mlx cannot read it.
    """
    import mlx.core as mx

    try:
        arrays = mx.load(str(file.path), format="gguf")
        assert isinstance(arrays, dict)
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise ConchError(f"mlx cannot read {file.path}: {one_line(error)}") from error
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    weights = {}
    for name, array in arrays.items():
        part = name.split(".")[-2]
        # GGUF pairs neighbouring numbers of a head for its turn by position, mlx_lm halves.
        if part in heads:
            split = array.reshape(heads[part], -1, 2, *array.shape[1:])
            array = split.swapaxes(1, 2).reshape(array.shape)
        weights[str(_new_name(name))] = array
    return weights
