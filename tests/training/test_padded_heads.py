"""Heads with more rows than the tokenizer has tokens, of unequal numbers, as in the Qwen family.

Random tiny models with Qwen2.5's own tokenizer (151,665 tokens) and the rows that its models have,
and the same in small with the embedded tokenizer.
"""

import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from conch_dna.language_model import ASSETS, LanguageModel, ModelSource, open_tokenizer
from conch_dna.loading.output_head import rows_at_once
from conch_dna.training.cross_tokenizer.vocabulary import (
    SAME,
    SAME_UP_TO_PADDING,
    compare_tokenizers,
)
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.records import split_heldout
from conch_dna.training.head_loss import make_distillation_loss
from conch_dna.training.runs import domain_run
from conch_dna.training.settings import KDConfig, KDResult
from conch_dna.training.true_kd import TrueKnowledgeDistiller, plan_domain
from models import make_model_folder
from tokenizers_made import character_tokenizer

ANIMALS = ["cat", "dog", "bird", "fox", "frog", "pig"]
RECORDS = [
    {"prompt": f"There was a little {animal}", "completion": f" who had {number} red balls."}
    for number, animal in enumerate(ANIMALS)
]
# As few batches as there can be: each takes 128 rows of logits.
TINY: dict[str, Any] = {
    "num_iters": 2,
    "learning_rate": 1e-2,
    "warmup_iters": 0,
    "batch_size": 5,
    "max_tokens": 2,
    "val_fraction": 0.1,
    "steps_per_eval": 2,
    "steps_per_save": 2,
    "loss_memory": 1.0,
}


class Padded(NamedTuple):
    """Two models with one tokenizer, its real tokens, and the rows of their heads."""

    teacher: ModelSource
    student: ModelSource
    tokens: int
    teacher_rows: int
    student_rows: int


def make_padded(folder: Path, tokenizer: Path, tokens: int, rows: tuple[int, int]) -> Padded:
    """Two random models of one layer, whose heads are matrices of their own."""
    teacher, student = (
        make_model_folder(
            folder / name,
            tokenizer=tokenizer,
            seed=seed,
            vocab_size=count,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
        for seed, (name, count) in enumerate(zip(("teacher", "student"), rows, strict=True))
    )
    return Padded(ModelSource(str(teacher)), ModelSource(str(student)), tokens, *rows)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Padded:
    """The embedded tokenizer's 1,536 tokens, padded to 1,664 and 1,600 rows."""
    folder = tmp_path_factory.mktemp("small")
    return make_padded(folder, ASSETS / "student", 1536, (1664, 1600))


@pytest.fixture(scope="module")
def qwen(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Padded:
    """Qwen2.5's tokenizer with the rows of its 7B and of its 0.5B model."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = folder / "tokenizer"
    shutil.copytree(shared_data / "tokenizers" / "qwen2.5", tokenizer)
    (tokenizer / "config.json").write_text(json.dumps({"eos_token_id": 151645}))
    return make_padded(folder, tokenizer, 151_665, (152_064, 151_936))


@pytest.fixture(params=["small", pytest.param("qwen", marks=pytest.mark.slow)])
def padded(request: pytest.FixtureRequest) -> Padded:
    """Both, one after the other."""
    pair: Padded = request.getfixturevalue(request.param)
    return pair


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Draw no curves, and spare the garbage collector the imported modules."""
    import mlx_lm  # noqa: F401

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domain_run, "draw_curve", lambda path, *a, **k: path.write_bytes(b"PNG"))
        yield
    gc.unfreeze()


def distil(teacher: Path, student: Path, output: Path, **settings: Any) -> KDResult:
    config = KDConfig(**(TINY | {"output_dir": str(output)} | settings))
    return TrueKnowledgeDistiller(str(teacher), str(student), config).distill_domain(
        "s", data=RECORDS
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Padded], KDResult]:
    """Gives a run of a pair without any option that would speak of tokenizers, made once."""
    made: dict[int, KDResult] = {}

    def run(pair: Padded) -> KDResult:
        if pair.tokens not in made:
            output = tmp_path_factory.mktemp("run")
            made[pair.tokens] = distil(pair.teacher.folder, pair.student.folder, output)
        return made[pair.tokens]

    return run


def loud_copy(source: ModelSource, folder: Path, tokens: int) -> Path:
    """The same model with padding rows that would win everywhere."""
    copy = Path(shutil.copytree(source.folder, folder))
    weights = mx.load(str(copy / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["lm_head.weight"][tokens:] = 50.0
    mx.save_safetensors(str(copy / "model.safetensors"), weights, {"format": "mlx"})
    return copy


def test_the_tokenizers_are_the_same_up_to_padding(padded: Padded) -> None:
    teacher, student = padded.teacher.tokenizer, padded.student.tokenizer
    rows = {"teacher_rows": padded.teacher_rows, "student_rows": padded.student_rows}
    found = compare_tokenizers(teacher, student, **rows)
    assert found.verdict == SAME_UP_TO_PADDING == "same up to padding rows"
    assert found.teacher_tokens == found.student_tokens == padded.tokens
    assert found.shared_tokens == found.same_ids == padded.tokens
    assert {"teacher_rows": found.teacher_rows, "student_rows": found.student_rows} == rows


def test_the_rows_are_those_of_the_configurations(small: Padded) -> None:
    (teacher, teacher_rows), (student, student_rows) = (
        open_tokenizer(source.model_id) for source in small[:2]
    )
    assert (teacher_rows, student_rows) == (small.teacher_rows, small.student_rows)
    assert compare_tokenizers(teacher, student).verdict == SAME
    rows = {"teacher_rows": teacher_rows, "student_rows": teacher_rows}
    assert compare_tokenizers(teacher, student, **rows).verdict == SAME


def test_they_train_without_any_option(padded: Padded, finished: Any) -> None:
    result = finished(padded)
    assert result.metadata["alignment"] == "index"
    assert result.metadata["best_step"] > 0
    after = result.evaluation["after"]
    assert all(math.isfinite(after[name]) for name in ("kl_nats", "bits_per_byte"))
    assert after["compared_tokens"] == after["tokens"] > 0
    assert after["kl_nats"] < result.evaluation["before"]["kl_nats"]


def test_the_figures_are_those_of_real_tokens_only(small: Padded, finished: Any) -> None:
    """Silent failure: padding rows share in the softmax, with whatever weights they have."""
    from mlx_lm import load

    result = finished(small)
    _, heldout = split_heldout(RECORDS, TINY["val_fraction"], seed=0)
    for moment, source in (("teacher", small.teacher), ("before", small.student)):
        model, tokenizer = load(source.model_id)
        losses = []
        for record in (RECORDS[index] for index in heldout):
            first = len(tokenizer.encode(record["prompt"]))
            ids = tokenizer.encode(record["prompt"] + record["completion"])
            ids.append(tokenizer.eos_token_id)
            logits = np.asarray(model(mx.array([ids]))[0], np.float64)[:, : small.tokens]
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses += [-log_probs[place - 1, ids[place]] for place in range(first, len(ids))]
        told = result.evaluation[moment]["cross_entropy"]
        assert told == pytest.approx(np.mean(losses), abs=1e-5)


def test_what_stands_in_padding_rows_changes_nothing(
    small: Padded, finished: Any, tmp_path: Path
) -> None:
    def adapter(result: KDResult) -> bytes:
        return (Path(result.adapter_path) / "adapters.safetensors").read_bytes()

    teacher = loud_copy(small.teacher, tmp_path / "teacher", small.tokens)
    student = loud_copy(small.student, tmp_path / "student", small.tokens)
    assert adapter(distil(teacher, student, tmp_path / "out")) == adapter(finished(small))


def test_padding_rows_are_never_drawn_nor_kept(small: Padded, tmp_path: Path) -> None:
    """Neither in the teacher's answers nor in its targets."""
    teacher = loud_copy(small.teacher, tmp_path / "loud", small.tokens)
    config = KDConfig(**TINY, target_bits=32, output_dir=str(tmp_path / "out"))
    distiller = TrueKnowledgeDistiller(str(teacher), small.student.model_id, config)
    distiller.distill_domain("s", prompts=[record["prompt"] for record in RECORDS])
    (shard,) = (tmp_path / "out" / "s" / "soft_targets").rglob("*.safetensors")
    with safe_open(str(shard), framework="numpy") as stored:
        assert stored.get_tensor("kept_ids").max() < small.tokens
    lines = (
        (tmp_path / "out" / "s" / "adapters_kd" / "training_data.jsonl").read_text().splitlines()
    )
    assert max(max(json.loads(line)["tokens"]["ids"]) for line in lines) < small.tokens


def test_an_adapter_on_the_head_leaves_padding_rows_alone(small: Padded, tmp_path: Path) -> None:
    """All real tokens' columns are trained, since each is part of the softmax."""
    settings = {"lora_keys": "all,lm_head", "lora_rank": 2}
    result = distil(small.teacher.folder, small.student.folder, tmp_path, **settings)
    assert result.metadata["best_step"] > 0
    tensors = mx.load(str(Path(result.adapter_path) / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    trained = np.asarray(tensors["lm_head.lora_b"])
    assert trained.shape == (2, small.student_rows)
    assert not trained[:, small.tokens :].any()
    assert (trained[:, : small.tokens] != 0).any(axis=0).all()


def head_gradient(
    student: LanguageModel,
    loss: Callable[[nn.Module, dict[str, mx.array]], dict[str, mx.array]],
    arrays: dict[str, np.ndarray],
) -> np.ndarray:
    """Gradient of the loss by a head that is trained itself, rows by hidden size."""
    given = {name: mx.array(value) for name, value in arrays.items()}
    student.model.train()
    gradients = nn.value_and_grad(student.model, lambda model: loss(model, given)["loss"])(
        student.model
    )[1]
    return np.asarray(dict(tree_flatten(gradients))["lm_head.weight"])


def trained_head(source: ModelSource) -> LanguageModel:
    """A student of which only the head is trained, as it is."""
    student = source.load()
    student.model.freeze()
    student.model.lm_head.unfreeze()
    return student


def test_padding_rows_of_a_trained_head_get_no_gradient(padded: Padded, finished: Any) -> None:
    config = KDConfig(**TINY)
    pair = Examples(padded.teacher, padded.student, config)
    _, examples = pair.make(RECORDS[:2])
    targets = pair.targets(Path(finished(padded).adapter_path).parent / "soft_targets")
    assert not targets.missing(examples)
    student = trained_head(padded.student)
    loss = make_distillation_loss(student, temperature=config.temperature, alpha=0.5)
    gradient = head_gradient(student, loss, targets.collate(examples, config.temperature).arrays)
    assert gradient.shape[0] == padded.student_rows
    assert not gradient[padded.tokens :].any()
    assert (gradient[: padded.tokens] != 0).any(axis=1).all()


def test_nor_do_they_where_the_tokenizers_differ(small: Padded, tmp_path: Path) -> None:
    """The same student, taught across tokenizers."""
    tokenizer = character_tokenizer(tmp_path / "tokenizer")
    folder = make_model_folder(tmp_path / "teacher", tokenizer=tokenizer, vocab_size=384)
    teacher = ModelSource(str(folder))
    assert teacher.token_count == 336
    pair = Examples(teacher, small.student, KDConfig())
    _, examples = pair.make(RECORDS[:2])
    targets: Any = pair.targets(tmp_path / "targets")
    targets.fill(teacher, examples, batch_size=2)
    teacher.release()
    student = trained_head(small.student)
    loss = targets.loss(student, KDConfig(alpha=0.5))
    gradient = head_gradient(student, loss, targets.collate(examples, 2.0).arrays)
    assert not gradient[small.tokens :].any()
    assert (gradient[: small.tokens] != 0).any(axis=1).all()


def test_a_dry_run_counts_real_tokens(padded: Padded) -> None:
    planned = plan_domain(padded.teacher, padded.student, KDConfig(**TINY), "s", data=RECORDS)
    assert planned["alignment"] == "index"
    rows = rows_at_once(TINY["loss_memory"], padded.tokens)
    assert planned["logits_bytes"] == 4 * rows * padded.tokens
