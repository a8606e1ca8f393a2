"""Kinds of models that mlx_lm knows, built tiny: loss, gradient, adapter, resume.

A new kind is a line of KINDS. What a line says differs from make_model_folder's Llama.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.adapters import make_trainable
from conch_dna.training.data.outcomes import compress
from conch_dna.training.head_loss import make_distillation_loss, takes_chunks
from conch_dna.training.settings import KDConfig
from conch_dna.training.trainer import Trainer
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import EXPERTS, make_model_folder, memory_of
from watching import stopped

GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
ROPE = {"rope_theta": 10_000.0}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": ROPE,
    "qwen3": {**ROPE, "head_dim": 16},
    "qwen3_moe": EXPERTS,
    "gemma2": {**GEMMA, "final_logit_softcapping": 2.0},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "phi3": ROPE,
    "smollm3": {**ROPE, "no_rope_layer_interval": 2},
    "granite": {
        **ROPE,
        "logits_scaling": 3.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {"logit_scale": 0.25, "layer_norm_eps": 1e-5, "layer_norm_bias": False},
    "olmo2": {},
    "nanochat": {"rope_theta": 10_000.0},
    "gpt2": {
        "n_ctx": 256,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 256,
        "layer_norm_epsilon": 1e-5,
    },
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
        "rope_theta": 10_000.0,
    },
}
# What comes after their head.
AFTER = {"gemma2", "granite", "cohere", "nanochat"}
RECORDS = [
    {"prompt": f"The {animal} saw a", "completion": f" red {thing} and ran to the {animal}."}
    for animal in ("cat", "dog", "bird", "fox")
    for thing in ("ball", "bug", "box")
]
QUICK: dict[str, Any] = {
    "num_iters": 4,
    "learning_rate": 1e-2,
    "warmup_iters": 0,
    "batch_size": 3,
    "top_k": 8,
    "val_fraction": 0.25,
    "steps_per_eval": 2,
    "steps_per_save": 2,
    "lora_dropout": 0.2,
    "lora_keys": "all",
    "select_by": "loss",
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random models of the kind: a teacher and a student."""
    folder = tmp_path_factory.mktemp(kind)
    changes = {"model_type": kind, **KINDS[kind]}
    teacher, student = (
        make_model_folder(folder / name, seed=seed, **changes)
        for seed, name in enumerate(("teacher", "student"))
    )
    return teacher, student


def loss_and_gradients(
    student: LanguageModel, arrays: dict[str, mx.array], memory: float
) -> tuple[float, dict[str, np.ndarray]]:
    loss = make_distillation_loss(student, temperature=2.0, alpha=0.7, memory=memory)
    student.model.train()
    step = nn.value_and_grad(student.model, lambda: loss(student.model, arrays)["loss"])
    value, gradients = step()
    named = {name: np.asarray(each) for name, each in tree_flatten(gradients)}
    return value.item(), named


def test_loss_and_gradient_are_those_of_all_logits(kind: str, folders: tuple[Path, Path]) -> None:
    teacher, student = (ModelSource(str(folder)).load() for folder in folders)
    assert student.output_head is not None
    assert student.output_head.is_last == (kind not in AFTER)
    assert_chunks_equal_dense(teacher, student)


def assert_chunks_equal_dense(teacher: LanguageModel, student: LanguageModel) -> None:
    """Afterwards the student is one whose head is not taken apart."""
    make_trainable(student, KDConfig(lora_keys="all"))
    # So that the gradient by lora_a is not 0.
    mx.random.seed(3)
    moved = [
        (name, mx.random.normal(value.shape) * 0.1)
        for name, value in tree_flatten(student.model.trainable_parameters())
    ]
    student.model.load_weights(moved, strict=False)
    assert takes_chunks(student), "its head is found, whatever the names of its parts"
    random = np.random.default_rng(0)
    ids = mx.array(random.integers(0, student.vocabulary_size, (2, 20)))
    positions = mx.array(np.r_[4:20, 26:39])
    labels = mx.array(random.integers(0, student.vocabulary_size, len(positions)))
    logits = teacher.logits(ids).reshape(40, -1)[positions]
    stored = compress(logits, labels, top_k=8, temperatures=(2.0,))
    kept = stored["kept_log_probs"] / 2 - stored["log_normalizer"]
    arrays = {
        "inputs": ids,
        "positions": positions,
        "labels": labels,
        "weights": mx.ones(len(positions)),
        "kept_ids": stored["kept_ids"].astype(mx.int32),
        "teacher_log_probs": mx.concatenate([kept, stored["log_rest"]], axis=-1),
    }
    chunked = loss_and_gradients(student, arrays, memory_of(7, student))
    student.__dict__["output_head"] = None
    dense = loss_and_gradients(student, arrays, 256)
    assert chunked[0] == pytest.approx(dense[0], rel=1e-5)
    assert chunked[1].keys() == dense[1].keys() and chunked[1]
    largest = max(np.abs(each).max() for each in dense[1].values())
    assert largest > 0
    for name, expected in dense[1].items():
        np.testing.assert_allclose(chunked[1][name], expected, atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantized_student(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Mac has it: the products of quantized weights stay, in head and body."""
    monkeypatch.setenv("CONCH_DNA_CPU_WEIGHTS", "keep")
    student = ModelSource(str(make_model_folder(tmp_path / "student", quantize=bits))).load()
    teacher = ModelSource(str(make_model_folder(tmp_path / "teacher", seed=1))).load()
    assert_chunks_equal_dense(teacher, student)
    assert student.output_head is None
    head = student.model.model.embed_tokens
    assert isinstance(head, nn.QuantizedEmbedding) and head.bits == bits


@pytest.mark.slow
def test_its_adapter_opens_in_mlx_lm_and_a_stopped_run_ends_alike(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    teacher, student = map(str, folders)

    def distil(output: Path, **how: Any) -> Path:
        config = KDConfig(**QUICK, output_dir=str(output))
        distiller = TrueKnowledgeDistiller(teacher, student, config)
        return Path(distiller.distill_domain("s", data=RECORDS, **how).adapter_path)

    whole = distil(tmp_path / "whole")
    with stopped(Trainer, "_take_step", call=4):
        distil(tmp_path / "parts")
    parts = distil(tmp_path / "parts", resume=True)
    assert (whole / "adapters.safetensors").read_bytes() == (
        parts / "adapters.safetensors"
    ).read_bytes()
    plain, _ = mlx_lm.load(student)[:2]
    opened, tokenizer = mlx_lm.load(student, adapter_path=str(whole))[:2]
    ids = mx.array([tokenizer.encode("The cat saw a red ball")])
    difference = mx.abs(opened(ids) - plain(ids)).max().item()
    assert difference > 1e-4
    own = ModelSource(student).load(adapter_path=whole)
    np.testing.assert_array_equal(own.model(ids), opened(ids))
