"""A model with its adapter as one GGUF file, for llama.cpp, LM Studio and Ollama.

Knows mlx_lm's configurations and tokenizers and, by the `gguf` package, llama.cpp's names. Another
kind of numbers: one of `settings.GGUF_KINDS`; of models: `gguf_lora.ARCHITECTURES`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from conch_dna.errors import ConchError
from conch_dna.exporting.gguf_lora import (
    architecture_of,
    heads_of,
    interleaved,
    is_interleaved,
    write_out,
)
from conch_dna.language_model import ModelSource
from conch_dna.loading.gguf_tokenizer import SPLITS
from conch_dna.screen.progress import Report

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def write_gguf_model(
    path: Path,
    source: ModelSource,
    weights: Mapping[str, mx.array],
    kind: str,
    report: Report,
) -> None:
    """Write a model, float weights by mlx_lm's names, with its tokenizer and template.

    Args:
        path: The file.
        source: Whose configuration and tokenizer it has.
        weights: Of all its layers.
        kind: One of `settings.GGUF_KINDS`; all that is no matrix stays float32.
        report: Gets a phase, and what stays wider than asked.

    Raises:
        ConchError: It is of a kind, or has a tokenizer or positions, that is not known here.
    """
    import gguf

    arch = getattr(gguf.MODEL_ARCH, architecture_of(source))
    tokenizer = _tokenizer(source, len(weights["model.embed_tokens.weight"]))
    names = gguf.get_tensor_name_map(arch, int(source.config["num_hidden_layers"]))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_sizes(writer, source)
    if tokenizer.get("remove_extra_whitespaces"):
        text = (
            "this tokenizer leaves spaces out where several stand together, and llama.cpp does not"
        )
        report("warning", {"message": f"{text}: it reads such texts otherwise"})
    for add, value in tokenizer.items():
        getattr(writer, f"add_{add}")(value)
    asked = getattr(gguf.GGMLQuantizationType, kind.upper())
    writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(kind)))
    report("phase", {"name": "writing", "total": len(weights), "unit": "tensors"})
    wider = []
    for name, value in sorted(weights.items()):
        part, _, leaf = name.rpartition(".")
        other = names.get_name(part)
        if other is None:
            raise ConchError(f"{source.model_id} has {name}, which llama.cpp has no name for here")
        matrix = np.array(value.astype(mx.float32))
        heads = heads_of(part, source.config)
        if heads and is_interleaved(source):
            matrix = interleaved(matrix, heads)
        used = asked if matrix.ndim == 2 else gguf.GGMLQuantizationType.F32
        size, _ = gguf.GGML_QUANT_SIZES[used]
        if matrix.shape[-1] % size:
            wider.append(name)
            used = gguf.GGMLQuantizationType.F16
        data = gguf.quants.quantize(matrix, used)
        writer.add_tensor(f"{other}.{leaf}", data, raw_dtype=used)
        report("advance", {"by": 1})
    if wider:
        text = f"{len(wider)} matrices stay in 16 bits, since blocks do not divide them: {wider[0]}"
        report("message", {"message": text})
    write_out(writer)


def _file_type(kind: str) -> str:
    return "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"


def _add_sizes(writer: Any, source: ModelSource) -> None:
    """What a file says of a model's shape; see `loading.gguf_model.config_of`."""
    # As mlx_lm reads its config.json: what is not said there is not the same for all kinds.
    args = source.modules(lazy=True).args
    scaling = getattr(args, "rope_scaling", None) or {}
    stretched = scaling.get("rope_type", scaling.get("type", "linear"))
    if scaling and stretched not in ("linear", "default"):
        raise ConchError(
            f"{source.model_id} stretches positions by {stretched!r}, which is not written here: "
            "use llama.cpp's own convert_hf_to_gguf.py on a model fused with --bits float"
        )
    if source.config.get("use_sliding_window"):
        raise ConchError(f"{source.model_id} has windows of attention, which are not written here")
    heads = int(args.num_attention_heads)
    width = int(getattr(args, "head_dim", None) or args.hidden_size // heads)
    writer.add_name(source.model_id)
    writer.add_context_length(source.context_length or 2048)
    writer.add_embedding_length(int(args.hidden_size))
    writer.add_block_count(int(args.num_hidden_layers))
    writer.add_feed_forward_length(int(args.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(args.num_key_value_heads or heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(float(args.rms_norm_eps))
    writer.add_rope_freq_base(float(args.rope_theta))
    if scaling and stretched == "linear":
        writer.add_rope_scaling_type(_linear())
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def _linear() -> Any:
    import gguf

    return gguf.RopeScalingType.LINEAR


def _tokenizer(source: ModelSource, rows: int) -> dict[str, Any]:
    """What a file says of a tokenizer, by the names of the writer's methods without `add_`.

    The other way round as `loading.gguf_tokenizer`.
    """
    tokenizer = source.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    document = json.loads(backend.to_str()) if backend is not None else {}
    model = document.get("model", {})
    if model.get("type") != "BPE":
        raise ConchError(
            f"{source.model_id} has a tokenizer of the kind {model.get('type')}, not byte-level "
            "BPE or SentencePiece's BPE, which alone are written here"
        )
    added = {token["id"]: token for token in document["added_tokens"]}
    pieces = {number: piece for piece, number in model["vocab"].items()}
    pieces |= {number: token["content"] for number, token in added.items()}
    if max(pieces) >= rows:
        raise ConchError(
            f"{source.model_id} has token {max(pieces)} and {rows} rows: it cannot be written"
        )
    texts = [pieces.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [_NORMAL if number in pieces else _UNUSED for number in range(rows)]
    for number, token in added.items():
        types[number] = _CONTROL if token["special"] else _USER_DEFINED
    found: dict[str, Any] = {"token_list": texts}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if model.get("byte_fallback"):
        scores = [0.0] * rows
        for rank, (left, right) in enumerate(merges):
            number = model["vocab"][left + right]
            # A piece is made by its first merge.
            scores[number] = scores[number] or -float(rank + 1)
        for number, piece in pieces.items():
            if piece.startswith("<0x") and len(piece) == 6:
                types[number] = _BYTE
        if (unknown := model.get("unk_token")) in model["vocab"]:
            types[model["vocab"][unknown]] = _UNKNOWN
            found["unk_token_id"] = model["vocab"][unknown]
        steps = _steps(document, "normalizer")
        patterns = [(step.get("pattern") or {}).get("Regex", "") for step in steps]
        found |= {
            "tokenizer_model": "llama",
            "token_scores": scores,
            "add_space_prefix": any(step.get("type") == "Prepend" for step in steps),
            "remove_extra_whitespaces": any(" {2,}" in pattern for pattern in patterns),
        }
    else:
        found |= {"tokenizer_model": "gpt2", "tokenizer_pre": _split(document, source.model_id)}
        found["token_merges"] = [" ".join(pair) for pair in merges]
    found["token_types"] = types
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if isinstance(number, int) and number < rows:
            found[f"{name}_token_id"] = number
    read = tokenizer.encode("a")
    found["add_bos_token"] = bool(read) and read[0] == found.get("bos_token_id")
    found["add_eos_token"] = len(read) > 1 and read[-1] == found.get("eos_token_id")
    if template := getattr(tokenizer, "chat_template", None):
        found["chat_template"] = template
    return found


def _steps(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    part = document.get(name) or {}
    inner: list[dict[str, Any]] = part.get("pretokenizers") or part.get("normalizers") or [part]
    return inner


def _split(document: Mapping[str, Any], model_id: str) -> str:
    """llama.cpp's name of the way in which a tokenizer splits text before its merges."""
    way: str | None = "unknown"
    for step in _steps(document, "pre_tokenizer"):
        if step.get("type") == "ByteLevel":
            way = None if step.get("use_regex", True) and way == "unknown" else way
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            way = "digits"
        elif step.get("type") == "Split":
            way = step["pattern"].get("Regex")
    known = {split: name for name, split in reversed(SPLITS.items())}
    known["digits"] = "smollm"
    if way not in known:
        raise ConchError(
            f"the tokenizer of {model_id} splits text in a way that has no name of llama.cpp's "
            f"here (known: {', '.join(SPLITS)})"
        )
    return known[way]
