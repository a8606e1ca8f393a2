"""The loss across tokenizers: against oracles, against itself in chunks, and with one tokenizer.

Random models and hand-made arrays; whether it teaches anything is tested in test_cross_tokenizer.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.cross_tokenizer.alignments import ALIGNMENTS, INDEX
from conch_dna.training.cross_tokenizer.loss import (
    combine,
    gather_roots,
    inner_log_probs,
    make_aligned_loss,
    soft_sum,
    untold_sum,
    with_reaching,
)
from conch_dna.training.cross_tokenizer.records import RecordAligner
from conch_dna.training.cross_tokenizer.targets import AlignedTargets
from conch_dna.training.examples import resolve_alignment
from conch_dna.training.head_loss import make_distillation_loss
from conch_dna.training.soft_targets import SoftTargetCache, target_identity
from models import make_model_folder
from tokenizers_made import character_tokenizer

TEXTS = [
    {"prompt": "Once upon a time", "completion": " there was a little cat who was very happy."},
    {"prompt": "The dog", "completion": " ran to the park. It saw a big red ball!"},
    {"text": "Tom and Sue went home because it was late."},
]
SETTINGS: dict[str, Any] = {
    "temperature": 2.0,
    "alpha": 0.7,
    "divergence": "forward_kl",
    "soft_weight": 1.0,
    "chunk_weight": 1.0,
    "chunk_scale": 100.0,
}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def targets_of(
    teacher: ModelSource, student: ModelSource, folder: Path, alignment: str, top_k: int = 32
) -> tuple[list[Any], AlignedTargets]:
    aligner = RecordAligner(teacher, student)
    examples = [aligner.align(record, f"example {n}") for n, record in enumerate(TEXTS, 1)]
    soft = ALIGNMENTS[alignment].soft != "nowhere"
    identity = target_identity(teacher, top_k=top_k if soft else 0, temperature=2.0)
    targets = AlignedTargets(SoftTargetCache(folder, identity), teacher, student, alignment)
    targets.fill(teacher, examples, batch_size=2)
    return examples, targets


def arrays_of(
    targets: AlignedTargets, examples: list[Any], temperature: float = 2.0
) -> dict[str, mx.array]:
    batch = targets.collate(examples, temperature)
    return {name: mx.array(value) for name, value in batch.arrays.items()}


@pytest.fixture(scope="module")
def same_pair(tiny_teacher: Path, tiny_student: Path) -> tuple[ModelSource, ModelSource]:
    return ModelSource(str(tiny_teacher)), ModelSource(str(tiny_student))


@pytest.mark.parametrize("alignment", sorted(set(ALIGNMENTS) - {"uld"}))
def test_with_one_tokenizer_every_alignment_but_uld_is_the_loss_by_index(
    alignment: str, same_pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    """By the code for different tokenizers itself, not only by what a run resolves it to.

    alm compares no distributions; with one tokenizer a run compares by index instead. Classes
    are compared at temperature 1.
    """
    temperature = 1.0 if alignment == "roots" else 2.0
    teacher, source = same_pair
    assert resolve_alignment(alignment, same=True) == INDEX
    if ALIGNMENTS[alignment].soft == "nowhere":
        return
    student = source.load()
    examples, targets = targets_of(teacher, source, tmp_path, alignment)
    of_teacher = [example.teacher for example in examples]
    by_index = targets.cache.collate(of_teacher, temperature)
    arrays = {name: mx.array(value) for name, value in by_index.arrays.items()}
    by_index_loss = make_distillation_loss(student, temperature=temperature, alpha=0.7)
    expected = by_index_loss(student.model, arrays)
    loss = make_aligned_loss(
        student,
        alignment=alignment,
        roots=targets.student_roots,
        chunk=16,
        **{**SETTINGS, "temperature": temperature},
    )
    got = loss(student.model, arrays_of(targets, examples, temperature))
    count = by_index.count
    for name in ("loss", "kd", "ce"):
        assert got[name].item() / count == pytest.approx(
            expected[name].item() / count, abs=1e-5, rel=1e-5
        )
    assert got["kd"].item() / count > 0.1, "the models must differ for this to say anything"


def test_uld_does_not_see_which_token_is_which() -> None:
    """The baseline's blindness: a permuted vocabulary costs nothing."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(4, 9)).astype(np.float32)
    sorted_log_probs = np.sort(log_softmax(logits / 2.0), axis=-1)[:, ::-1]
    rest = np.full((4, 1), -np.inf, np.float32)
    rows = {
        "teacher_log_probs": mx.array(np.concatenate([sorted_log_probs, rest], 1)),
        "soft_weights": mx.ones(4),
    }
    permuted = mx.array(logits[:, random.permutation(9)])
    value = soft_sum(
        permuted,
        rows,
        alignment="uld",
        temperature=2.0,
        divergence="forward_kl",
        nothing=9,
        roots=np.arange(9),
    )
    assert value.item() == pytest.approx(0, abs=1e-5)


def test_uld_is_the_l1_distance_of_sorted_probabilities() -> None:
    random = np.random.default_rng(1)
    student = random.normal(size=(3, 7))
    teacher = np.sort(log_softmax(random.normal(size=(3, 5))), axis=-1)[:, ::-1]
    rows = {
        "teacher_log_probs": mx.array(
            np.concatenate([teacher, np.full((3, 1), -np.inf)], 1).astype(np.float32)
        ),
        "soft_weights": mx.array([1.0, 0.0, 1.0]),
    }
    own = np.sort(np.exp(log_softmax(student)), axis=-1)[:, ::-1][:, :5]
    distances = np.abs(np.exp(teacher) - own).sum(-1)
    value = soft_sum(
        mx.array(student.astype(np.float32)),
        rows,
        alignment="uld",
        temperature=1.0,
        divergence="forward_kl",
        nothing=7,
        roots=np.arange(7),
    )
    assert value.item() == pytest.approx(distances[0] + distances[2], rel=1e-5)


def test_classes_add_up_the_probabilities_of_their_members() -> None:
    random = np.random.default_rng(2)
    logits = 5 * random.normal(size=(6, 8))
    roots = np.array([0, 1, 1, 3, 0, 1, -1, 3])
    got = np.asarray(gather_roots(mx.array(logits.astype(np.float32)), roots), np.float64)
    for column in range(8):
        members = np.flatnonzero(roots == column) if roots[column] >= 0 else [column]
        if roots[column] not in (-1, column):
            assert np.isneginf(got[:, column]).all()
            continue
        expected = np.log(np.exp(logits[:, members]).sum(-1))
        np.testing.assert_allclose(got[:, column], expected, rtol=1e-5, atol=1e-5)


def test_classes_keep_a_tiny_probability_and_a_finite_gradient() -> None:
    """A gap of 200 nats underflows as a probability; its logarithm must not."""
    logits = mx.array([[200.0, 0.0, 0.0, -300.0]])
    roots = np.array([0, 1, 1, 1])
    got = gather_roots(logits, roots)
    assert got[0, 1].item() == pytest.approx(0.0, abs=1.0)
    gradient = mx.grad(lambda x: gather_roots(x, roots)[0, 1])(logits)
    assert mx.isfinite(gradient).all().item()


def test_the_loss_is_put_together_as_the_formula_says() -> None:
    random = np.random.default_rng(3)
    gold = -np.abs(random.normal(size=6)) - 0.1
    teacher = np.array([-1.5, -0.2, 0.0])
    arrays = {
        "weights": mx.array([1.0, 1, 1, 1, 1, 0]),
        "chunk_index": mx.array([0, 0, 1, 3, 3, 3]),
        "chunk_log_probs": mx.array(teacher.astype(np.float32)),
        "chunk_weights": mx.array([1.0, 1, 0]),
    }
    sums = combine(
        mx.array(2.5),
        mx.array(gold.astype(np.float32)),
        arrays,
        alpha=0.6,
        soft_weight=0.5,
        chunk_weight=2.0,
        chunk_scale=10.0,
    )
    student = np.array([gold[0] + gold[1], gold[2]])
    p, q = np.exp(teacher[:2] / 10), np.exp(student / 10)
    chunks = 10 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    kd, ce = 0.5 * 2.5 + 2.0 * chunks, -gold[:5].sum()
    assert sums["chunks"].item() == pytest.approx(chunks, rel=1e-4)
    assert sums["kd"].item() == pytest.approx(kd, rel=1e-4)
    assert sums["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert sums["loss"].item() == pytest.approx(0.6 * kd + 0.4 * ce, rel=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("alignment", sorted(ALIGNMENTS))
def test_in_chunks_it_is_the_same_loss_and_gradient(
    alignment: str,
    divergence: str,
    other_pair: tuple[ModelSource, ModelSource],
    tmp_path: Path,
) -> None:
    """The path that never holds all logits against MLX's own gradient through all of them."""
    teacher, source = other_pair
    student = source.load()
    examples, targets = targets_of(teacher, source, tmp_path, alignment)
    arrays = arrays_of(targets, examples)
    settings = {**SETTINGS, "divergence": divergence}
    results = []
    for plain in (True, False):
        model = LanguageModel(source, student.model)
        model.__dict__["has_plain_head"] = plain
        student.model.freeze()
        student.model.model.layers[0].unfreeze()
        loss = make_aligned_loss(
            model, alignment=alignment, roots=targets.student_roots, chunk=24, **settings
        )
        grad = nn.value_and_grad(student.model, lambda m, f=loss: f(m, arrays)["loss"])
        value, gradient = grad(student.model)
        results.append((value.item(), dict(tree_flatten(gradient))))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, expected in results[1][1].items():
        got = np.asarray(results[0][1][name])
        scale = np.abs(np.asarray(expected)).max()
        np.testing.assert_allclose(got, np.asarray(expected), atol=2e-4 * scale, err_msg=name)


@pytest.fixture(scope="module")
def other_pair(
    tmp_path_factory: pytest.TempPathFactory, tiny_student: Path
) -> tuple[ModelSource, ModelSource]:
    """A teacher that reads characters, for a student that reads BPE."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = character_tokenizer(folder / "tokenizer")
    teacher = make_model_folder(folder / "teacher", seed=5, tokenizer=tokenizer)
    return ModelSource(str(teacher)), ModelSource(str(tiny_student))


def test_inside_a_token_the_student_is_what_its_tokens_add_up_to() -> None:
    """Outcomes add up over their tokens, among the tokens of their place alone.

    The second place's tokens are 300 nats below the first's: its shares must not be lost.
    """
    random = np.random.default_rng(4)
    logits = random.normal(size=(1, 6))
    logits[0, [3, 4]] -= 300
    rows = {
        "inner_tokens": mx.array([[0, 2, 5, 3, 4, 6]]),
        "inner_outcomes": mx.array([[0, 0, 1, 2, 3, 4]]),
        "inner_places": mx.array([[0, 0, 0, 1, 1, 2]]),
        "outcome_places": mx.array([[0, 0, 1, 1]]),
        "inner_log_probs": mx.zeros((1, 4)),
        "inner_blank": mx.zeros((1, 2)),
    }
    got = np.asarray(inner_log_probs(mx.array(logits.astype(np.float32)), rows, nothing=6))
    first, second = np.exp(logits[0, [0, 2, 5]]), np.exp(logits[0, [3, 4]] + 300)
    expected = [
        (first[0] + first[1]) / first.sum(),
        first[2] / first.sum(),
        *(second / second.sum()),
    ]
    np.testing.assert_allclose(np.exp(got[0]), expected, rtol=1e-4)


def test_a_boundary_that_longer_tokens_reach_over_counts_as_far_as_the_token_ended() -> None:
    """Against probabilities in float64; in the second row nothing reaches over."""
    random = np.random.default_rng(6)
    logits = random.normal(size=(3, 5))
    student = log_softmax(random.normal(size=(2, 3)))
    rows = {
        "over_own": mx.array([1, 5]),
        "over_tokens": mx.array([[0, 3, 4], [5, 5, 5]]),
        "over_columns": mx.array([[1, 1, 2], [2, 2, 2]]),
    }
    before = np.exp(logits[0])
    total = before[[0, 1, 3, 4]].sum()
    expected = np.exp(student)
    expected[0] *= before[1] / total
    expected[0, 1] += (before[0] + before[3]) / total
    expected[0, 2] += before[4] / total
    both = [mx.array(x.astype(np.float32)) for x in (logits, student)]
    got = np.exp(np.asarray(with_reaching(*both, rows, nothing=5)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_boundaries_keep_a_finite_gradient_where_nothing_can_follow() -> None:
    """A column that stands for no token, and a token that reaches over to nothing kept."""
    rows = {
        "over_own": mx.array([1, 2]),
        "over_tokens": mx.array([[0, 3], [3, 3]]),
        "over_columns": mx.array([[2, 2], [2, 2]]),
    }
    student = mx.array([[0.0, -mx.inf, -1.0], [-mx.inf, -0.5, -mx.inf]])
    logits = mx.array([[200.0, 0.0, -300.0]] * 3)

    def total(x: mx.array) -> mx.array:
        found = with_reaching(x, student, rows, nothing=3)
        return mx.where(found == -mx.inf, 0.0, found).sum()

    gradient = mx.grad(total)(logits)
    assert mx.isfinite(gradient).all().item()
    found = with_reaching(logits, student, rows, nothing=3)
    assert not mx.isnan(found).any().item()
    assert np.isneginf(np.asarray(found)[[0, 1], [1, 0]]).all()


def test_what_classes_leave_open_is_taught_by_the_text() -> None:
    """Told rows pay for the token within its class, others for the token, inner ones nothing."""
    random = np.random.default_rng(5)
    logits = random.normal(size=(4, 5))
    labels = np.array([2, 3, 1, 0])
    roots = np.array([0, 1, 1, 1, -1])
    rows = {
        "labels": mx.array(labels),
        "weights": mx.array([1.0, 1, 1, 0]),
        "soft_weights": mx.array([1.0, 0, 1, 0]),
        "inner_told": mx.array([0.0, 0, 1, 0]),
    }
    log_probs = log_softmax(logits)
    within = np.log(np.exp(log_probs[0, [1, 2, 3]]).sum()) - log_probs[0, 2]
    expected = within - log_probs[1, 3]
    got = untold_sum(mx.array(logits.astype(np.float32)), rows, roots).item()
    assert got == pytest.approx(expected, rel=1e-5)
