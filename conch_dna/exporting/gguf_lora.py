"""An adapter as a GGUF file, which llama.cpp puts on a model while it runs.

Knows mlx_lm's names and, by the `gguf` package, llama.cpp's. Another kind of model: a line in
ARCHITECTURES, once its names were compared.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource

# By mlx_lm's kind of a model llama.cpp's, as the gguf package names it.
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
# Those in which llama.cpp turns neighbouring numbers of a head by position, and mlx_lm halves.
_INTERLEAVED = ("LLAMA",)


def architecture_of(source: ModelSource) -> str:
    """The name of a model's architecture in the gguf package.

    Raises:
        ConchError: It is none of those whose names and positions are known here.
    """
    kind = source.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConchError(
            f"{source.model_id} is of the kind {kind}, and GGUF files are written of "
            f"{', '.join(ARCHITECTURES)}: use --to peft and llama.cpp's own convert_lora_to_gguf.py"
        )
    if source.config.get("rope_traditional"):
        raise ConchError(
            f"{source.model_id} turns neighbouring numbers by position (rope_traditional), as no "
            "model of these kinds does elsewhere: it is not written as GGUF"
        )
    return ARCHITECTURES[kind]


def is_interleaved(source: ModelSource) -> bool:
    """Whether llama.cpp has rows of queries and keys in another order than mlx_lm."""
    return architecture_of(source) in _INTERLEAVED


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in llama.cpp's order: `[heads · 2 · n, …]`."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def heads_of(name: str, config: Mapping[str, Any]) -> int | None:
    """How many heads the rows of a weight are; None where they are none."""
    if name.endswith("self_attn.q_proj"):
        return int(config["num_attention_heads"])
    if name.endswith("self_attn.k_proj"):
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None


def write_gguf_lora(
    path: Path,
    tensors: Mapping[str, mx.array],
    document: Mapping[str, Any],
    base: ModelSource,
) -> None:
    """Write LoRA matrices, float32, as llama.cpp names them.

    Args:
        path: The file.
        tensors: By mlx_lm's names.
        document: The adapter's adapter_config.json.
        base: The model that it is for.

    Raises:
        ConchError: It is no LoRA of linear layers, or of a kind of model that is not known here.
    """
    import gguf

    kind = document.get("fine_tune_type", "lora")
    if kind != "lora":
        remedy = "conch-dna fuse ADAPTER FOLDER --bits float makes a model of it"
        raise ConchError(f"the adapter is {kind}, and llama.cpp puts LoRA on models only: {remedy}")
    arch = getattr(gguf.MODEL_ARCH, architecture_of(base))
    names = gguf.get_tensor_name_map(arch, int(base.config["num_hidden_layers"]))
    rank, scale = document["lora_parameters"]["rank"], document["lora_parameters"]["scale"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(scale * rank))
    writer.add_name(base.model_id)
    for name, value in sorted(tensors.items()):
        layer, _, leaf = name.rpartition(".")
        other = names.get_name(layer)
        if other is None or value.ndim != 2 or layer.endswith("embed_tokens"):
            raise ConchError(
                f"{layer} is no linear layer that llama.cpp puts LoRA on: conch-dna fuse ADAPTER "
                "FOLDER --bits float makes a model of it"
            )
        matrix = np.ascontiguousarray(np.asarray(value.astype(mx.float32)).T)
        heads = heads_of(layer, base.config)
        if leaf == "lora_b" and heads and is_interleaved(base):
            matrix = interleaved(matrix, heads)
        writer.add_tensor(f"{other}.weight.{leaf}", matrix)
    write_out(writer)


def write_out(writer: Any) -> None:
    """Write what a writer of the gguf package was given, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
