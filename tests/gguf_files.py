"""GGUF files for tests, written byte by byte as ggml's specification has them.

Knows the container, three quantisations in NumPy and llama.cpp's names; nothing of the reader.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

_NUMBERS = {"I": 4, "i": 5, "f": 6, "Q": 10, "?": 7}
KIND_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q5_0": 6}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def quantized(kind: str, values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A matrix in a kind's bytes, and what these bytes stand for, as float64."""
    if kind in ("F32", "F16"):
        kept = values.astype("<f4" if kind == "F32" else "<f2")
        return kept.tobytes(), kept.astype(np.float64)
    blocks = values.reshape(-1, 32).astype(np.float64)
    if kind == "Q8_0":
        scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype("<f2")
        numbers = np.rint(blocks / np.maximum(scale, 1e-9)).clip(-127, 127).astype("i1")
        parts, back = [scale.view("u1"), numbers.view("u1")], numbers * scale.astype(np.float64)
    else:
        low = blocks.min(1, keepdims=True)
        high = blocks.max(1, keepdims=True)
        if kind == "Q4_0":
            scale = (np.abs(blocks).max(1, keepdims=True) / 8).astype("<f2")
            offset, shift = [], -8 * scale.astype(np.float64)
        else:
            scale = ((high - low) / 15).astype("<f2")
            offset = [low.astype("<f2")]
            shift = offset[0].astype(np.float64)
        wide = np.maximum(scale.astype(np.float64), 1e-9)
        numbers = np.rint((blocks - shift) / wide).clip(0, 15).astype("u1")
        # The first half of a block lies in the lower four bits.
        packed = numbers[:, :16] | (numbers[:, 16:] << 4)
        parts = [scale.view("u1"), *(each.view("u1") for each in offset), packed]
        back = numbers * scale.astype(np.float64) + shift
    return np.concatenate(parts, axis=1).tobytes(), back.reshape(values.shape)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, np.ndarray):
        code = {"f": 6, "i": 5}[value.dtype.kind]
        return (
            struct.pack("<IIQ", 9, code, len(value))
            + value.astype(f"<{value.dtype.kind}4").tobytes()
        )
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Write a file, version 3; what its tensors stand for comes back.

    Args:
        path: Where to.
        metadata: Texts, whole numbers, numbers, truths, lists of texts, arrays of numbers.
        tensors: Kind and values by name.
    """
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(name) + _value(value) for name, value in metadata.items())
    data, meant = b"", {}
    for name, (kind, values) in tensors.items():
        content, meant[name] = quantized(kind, values)
        shape = tuple(reversed(values.shape))
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", KIND_NUMBERS[kind], len(data))
        data += content + bytes(-len(content) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return meant


def tokenizer_metadata(folder: Path) -> dict[str, Any]:
    """The tokenizer of a folder, byte-level BPE or SentencePiece's, as llama.cpp writes it down."""
    document = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    model = document["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    types = np.ones(len(pieces), np.int32)
    for token in document["added_tokens"]:
        types[token["id"]] = 3
    metadata = {"tokenizer.ggml.tokens": pieces}
    if model["byte_fallback"]:
        types[model["vocab"]["<unk>"]] = 2
        scores = np.zeros(len(pieces), np.float32)
        for rank, (left, right) in enumerate(model["merges"]):
            scores[model["vocab"][left + right]] = -rank
        for number, piece in enumerate(pieces):
            types[number] = 6 if piece.startswith("<0x") else types[number]
        metadata |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.remove_extra_whitespaces": True,
        }
    else:
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
            "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        }
    return {**metadata, "tokenizer.ggml.token_type": types}


def llama_parts(
    folder: Path, kind: str = "F32", embedding_kind: str | None = None
) -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """Metadata and tensors of a Llama folder as its GGUF file would have them."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.attention.head_count": heads["attn_q"],
        "llama.attention.head_count_kv": heads["attn_k"],
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.context_length": config["max_position_embeddings"],
        "llama.rope.freq_base": float(config.get("rope_theta", 10_000.0)),
        **tokenizer_metadata(folder),
    }
    if "head_dim" in config:
        metadata["llama.attention.key_length"] = config["head_dim"]
    weights = mx.load(str(folder / "model.safetensors"))
    tensors = {}
    for name, array in weights.items():
        values = np.array(array.astype(mx.float32))
        stem = name.removesuffix(".weight")
        if stem in OUTER:
            new = OUTER[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            new = f"blk.{layer}.{PARTS[part]}"
            if PARTS[part] in heads:
                # As convert_hf_to_gguf.py has it.
                split = values.reshape(heads[PARTS[part]], 2, -1, values.shape[1])
                values = split.swapaxes(1, 2).reshape(values.shape)
        used = kind if values.ndim == 2 else "F32"
        if new == "token_embd" and embedding_kind:
            used = embedding_kind
        tensors[f"{new}.weight"] = (used, values)
    return metadata, tensors
