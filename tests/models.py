"""Models and token ids for tests: tiny random ones, and stories260K with layers left out.

Random weights are for unit tests only; what a test claims of learning stands on trained models.
"""

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from safetensors import safe_open

import conch_dna
from conch_dna.language_model import ModelSource
from conch_dna.loading.output_head import LOGIT_ARRAYS
from conch_dna.training.adapters import attach_lora, save_adapter, trained_tensors
from conch_dna.training.batches import Example
from conch_dna.training.settings import KDConfig

ASSETS = Path(conch_dna.__file__).parent / "assets"
SHARED = Path(__file__).parents[2] / "shared" / "data"
ANIMALS = ["cat", "dog", "bird", "fox", "frog", "pig", "bear", "duck", "cow", "hen", "goat", "boy"]
# A run of some steps, in which a few figures are told.
QUICK: dict[str, Any] = {
    "num_iters": 4,
    "learning_rate": 3e-3,
    "warmup_iters": 1,
    "batch_size": 2,
    "max_tokens": 8,
    "top_k": 8,
    "val_fraction": 0.25,
    "steps_per_report": 2,
    "steps_per_eval": 2,
    "steps_per_save": 2,
    # By this figure one of the few steps is better than none.
    "select_by": "kd",
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def random_adapter(
    model: Path | str, folder: Path, *, seed: int = 7, size: float = 0.1, rank: int = 4
) -> Path:
    """LoRA of random numbers on all linear layers of a model, as mlx_lm opens it."""
    student = ModelSource(str(model)).load()
    described = attach_lora(student, KDConfig(lora_rank=rank, lora_keys="all"))
    mx.random.seed(seed)
    tensors = {n: size * mx.random.normal(v.shape) for n, v in trained_tensors(student).items()}
    save_adapter(folder, tensors, {**described, "model": str(model)})
    return folder


def make_model_folder(
    folder: Path,
    *,
    seed: int = 0,
    tokenizer: Path = ASSETS / "student",
    chat_template: str | None = None,
    quantize: bool | int = False,
    **changes: Any,
) -> Path:
    """Write a random model, a Llama by default, with a real tokenizer, which `mlx_lm.load` opens.

    Args:
        folder: Where to.
        seed: Of the weights.
        tokenizer: Folder to take the tokenizer from.
        chat_template: Jinja text for the tokenizer, if it is to have one.
        quantize: To so many bits, or 4, in groups of 32.
        **changes: To the model's configuration, such as another `model_type`.
    """
    from mlx_lm.utils import MODEL_REMAPPING, quantize_model

    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    if chat_template is not None:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({**settings, "chat_template": chat_template}))
    tokens = json.loads((folder / "tokenizer.json").read_text())
    size = len(tokens["model"]["vocab"]) + sum(
        token["content"] not in tokens["model"]["vocab"] for token in tokens["added_tokens"]
    )
    source = json.loads((tokenizer / "config.json").read_text())
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": size,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": source["eos_token_id"],
        **changes,
    }
    mx.random.seed(seed)
    name = MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    kind = importlib.import_module(f"mlx_lm.models.{name}")
    model: nn.Module = kind.Model(kind.ModelArgs.from_dict(config))
    if quantize:
        model, config = quantize_model(
            model, config, group_size=32, bits=4 if quantize is True else quantize
        )
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "rope_theta": 10_000.0,
    "norm_topk_prob": True,
}
"""Changes that make a mixture of experts of a model folder."""


def make_gemma2_folder(folder: Path, *, seed: int = 0, kv_heads: int = 2) -> Path:
    """Write a random Gemma-2, whose masks mlx_lm does not make for rows of unequal length.

    Args:
        folder: Where to.
        seed: Of the weights.
        kv_heads: With as many rows the masks are wrong, with others an error.
    """
    from mlx_lm.models.gemma2 import Model, ModelArgs

    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(ASSETS / "student" / name, folder / name)
    source = json.loads((ASSETS / "student" / "config.json").read_text())
    config = {
        "model_type": "gemma2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": source["vocab_size"],
        "max_position_embeddings": 256,
        "eos_token_id": source["eos_token_id"],
    }
    mx.random.seed(seed)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_examples(count: int, vocabulary: int, *, seed: int = 0) -> list[Example]:
    """Examples of 12 to 30 random tokens, of which all after a short prompt count."""
    random = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        length, prompt = int(random.integers(12, 31)), int(random.integers(1, 6))
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        examples.append(Example(ids, np.arange(length) >= prompt, f"example {seed}.{number}"))
    return examples


def keep_layers(source: Path, folder: Path, layers: Sequence[int]) -> Path:
    """Write a model with only some of another's layers, numbered anew.

    Args:
        source: A Llama folder.
        folder: Where to.
        layers: Those that stay, ascending.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = len(layers)
    (folder / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    kept = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            if int(parts[2]) not in layers:
                continue
            parts[2] = str(layers.index(int(parts[2])))
        kept[".".join(parts)] = value
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "mlx"})
    return folder


def stored_rows(folder: Path) -> int:
    """How many of a teacher's tokens have targets in a folder or below."""
    rows = 0
    for shard in folder.rglob("*.safetensors"):
        with safe_open(str(shard), framework="numpy") as stored:
            rows += json.loads(stored.metadata()["entries"])[-1][2]
    return rows


def memory_of(rows: int, model: Any) -> float:
    """Megabytes into which so many rows of a model's logits fit, and no more."""
    return rows * 4 * LOGIT_ARRAYS * model.vocabulary_size * 1.000001 / 1e6
