"""The targets of two caches and their student's loss, against float64 from the models' logits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import oracle
from conch_dna.errors import ConchError
from conch_dna.generations.blending import Strategy
from conch_dna.generations.settings import BlendSettings, EvolveConfig
from conch_dna.generations.taboo import TabooTokens
from conch_dna.generations.two_teachers import (
    TeacherCache,
    TwoTeacherTargets,
    make_two_teacher_loss,
    two_teacher_sums,
)
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.batches import Example
from conch_dna.training.data.outcomes import target_identity
from conch_dna.training.data.records import tokenize_records
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.settings import KDConfig
from models import make_model_folder, memory_of

TEXTS = [
    {"prompt": "Once upon a time", "completion": " there was a little cat who was happy."},
    {"prompt": "The dog", "completion": " ran to the park. It saw a big red ball!"},
]
TEMPERATURE = 2.0
TOP_K = 24


def sharpened(source: Path, folder: Path, scale: float, noise: float, seed: int) -> Path:
    """A model whose embeddings are scaled, so that it is surer, and moved a little."""
    import shutil

    shutil.copytree(source, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.random.seed(seed)
    name = "model.norm.weight"
    weights[name] = weights[name] * scale
    weights = {key: value + noise * mx.random.normal(value.shape) for key, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Path]:
    """A parent, one that nearly agrees, one that does not, and one that is sure of all it says."""
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "parent": tiny_teacher,
        "near": sharpened(tiny_teacher, folder / "near", 1.0, 0.004, 5),
        "middle": sharpened(tiny_teacher, folder / "middle", 1.5, 0.02, 6),
        "sure": sharpened(tiny_teacher, folder / "sure", 60.0, 0.0, 7),
        "other": make_model_folder(folder / "other", seed=9),
    }


def cached(path: Path, folder: Path, examples: Sequence[Example]) -> SoftTargetCache:
    source = ModelSource(str(path))
    identity = target_identity(source, top_k=TOP_K, temperature=TEMPERATURE)
    cache = SoftTargetCache(folder / path.name, identity)
    cache.fill(source, examples, batch_size=2)
    source.release()
    return cache


def examples_of(student: ModelSource) -> list[Example]:
    return tokenize_records(TEXTS, student.tokenizer, train_on_prompt=False)


def made(
    teachers: dict[str, Path],
    names: tuple[str, str | None],
    student: Path,
    folder: Path,
    taboo: TabooTokens | None = None,
    **settings: Any,
) -> tuple[TwoTeacherTargets, list[Example]]:
    source = ModelSource(str(student))
    examples = examples_of(source)
    first, second = (cached(teachers[name], folder, examples) if name else None for name in names)
    assert first is not None
    caches = TeacherCache(first), TeacherCache(second) if second else None
    return TwoTeacherTargets(*caches, source, BlendSettings(**settings), taboo), examples


def logits_of(path: Path, examples: Sequence[Example]) -> np.ndarray:
    """float64 `[n, V]` at the counted positions."""
    model = ModelSource(str(path)).load()
    found = []
    for example in examples:
        logits = np.asarray(model.logits(mx.array(example.ids)[None]), np.float64)[0]
        found.append(logits[np.flatnonzero(example.counted) - 1])
    return np.concatenate(found)


def spread_out(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """A distribution of which only the kept tokens are known, the rest spread evenly."""
    p = oracle.softmax(logits)
    known = np.zeros(len(p), bool)
    known[kept] = True
    spread: np.ndarray = np.where(known, p, p[~known].sum() / (~known).sum())
    return spread


def expected_of(
    first: np.ndarray, second: np.ndarray, settings: BlendSettings
) -> list[dict[str, Any]]:
    """What each token is taught by, and its target as ids and probabilities with a rest."""
    found = []
    for one, two in zip(first, second, strict=True):
        kept = [oracle.likeliest(logits, TOP_K) for logits in (one, two)]
        common = np.array([i for i in kept[0] if i in set(kept[1])], np.int64)
        soft = [oracle.outcomes(x, common, TEMPERATURE) for x in (one, two)]
        js = oracle.jsd(*(spread_out(x, ids) for x, ids in zip((one, two), kept, strict=True)))
        js /= np.log(2)
        sure = [oracle.softmax(x).max() for x in (one, two)]
        weight = sure[0] / sum(sure)
        own = oracle.outcomes(one, kept[0], TEMPERATURE)
        if js < settings.js_threshold:
            strategy, ids, p = Strategy.BLENDED, common, weight * soft[0] + (1 - weight) * soft[1]
            first_p = soft[0]
        elif sure[0] > settings.confidence_threshold:
            strategy, ids, p, first_p = Strategy.T1_ONLY, kept[0], own, own
        else:
            strategy, ids, p, first_p = Strategy.GOLD_FALLBACK, kept[0], own, own
        found.append(
            {"strategy": strategy, "ids": ids, "p": p, "first": first_p, "js": js, "w": weight}
        )
    return found


PAIRS = [("parent", "near"), ("parent", "middle"), ("sure", "other"), ("parent", "other")]


@pytest.mark.parametrize("names", PAIRS)
def test_each_token_gets_the_target_that_the_definition_gives(
    names: tuple[str, str], teachers: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    targets, examples = made(teachers, names, tiny_student, tmp_path, js_threshold=0.02)
    batch = targets.collate(examples, TEMPERATURE)
    first, second = (logits_of(teachers[name], examples) for name in names)
    expected = expected_of(first, second, targets.settings)
    arrays = batch.arrays
    for row, wanted in enumerate(expected):
        assert Strategy(arrays["strategy"][row]) is wanted["strategy"]
        assert 1 - arrays["agreement"][row] == pytest.approx(wanted["js"], abs=1e-4)
        if wanted["strategy"] is Strategy.GOLD_FALLBACK:
            assert arrays["kd_weights"][row] == 0
            assert arrays["gold_weights"][row] == arrays["ce_weights"][row] == 0.5
            continue
        kept = arrays["kept_ids"][row]
        for name, p in (("teacher_log_probs", wanted["p"]), ("first_log_probs", wanted["first"])):
            probabilities = np.exp(arrays[name][row].astype(np.float64))
            real = kept != targets.nothing
            got = dict(zip(kept[real].tolist(), probabilities[:-1][real], strict=True))
            assert got == pytest.approx(
                dict(zip(wanted["ids"].tolist(), p, strict=False)), rel=2e-3, abs=1e-6
            )
            assert probabilities[-1] == pytest.approx(p[-1], rel=2e-3, abs=1e-5)
    assert batch.count == len(expected)
    kinds = [wanted["strategy"] for wanted in expected]
    for strategy, name in zip(Strategy, ("blended", "t1_only", "gold_fallback"), strict=False):
        assert arrays[f"sum_{name}"] == kinds.count(strategy)
    assert arrays["sum_tokens"] == len(expected) and arrays["sum_skipped"] == 0
    assert arrays["sum_js"] == pytest.approx(sum(w["js"] for w in expected), rel=1e-3)
    assert arrays["sum_first_weight"] == pytest.approx(sum(w["w"] for w in expected), rel=1e-3)


def test_the_pairs_show_every_strategy(
    teachers: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    """Or the test above would say little."""
    seen = set()
    for names in PAIRS:
        targets, examples = made(teachers, names, tiny_student, tmp_path, js_threshold=0.02)
        batch = targets.collate(examples, TEMPERATURE)
        seen |= set(batch.arrays["strategy"][: batch.count].tolist())
    assert seen >= {Strategy.BLENDED, Strategy.T1_ONLY, Strategy.GOLD_FALLBACK}


def test_one_teacher_alone_is_plain_distillation(
    teachers: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    """A first generation has no grandparent; its targets are the parent's, its weights 1."""
    targets, examples = made(teachers, ("parent", None), tiny_student, tmp_path)
    got = targets.collate(examples, TEMPERATURE).arrays
    plain = targets.first.collate(examples, TEMPERATURE).arrays
    rows = plain["weights"] > 0
    for name in ("kept_ids", "teacher_log_probs", "labels"):
        np.testing.assert_array_equal(got[name][rows], plain[name][rows])
    for name in ("weights", "kd_weights", "ce_weights"):
        np.testing.assert_array_equal(got[name], plain["weights"])


def test_without_a_gate_every_token_is_blended_at_the_given_share(
    teachers: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    targets, examples = made(
        teachers, ("parent", "other"), tiny_student, tmp_path, gated=False, first_share=0.5
    )
    batch = targets.collate(examples, TEMPERATURE)
    assert (batch.arrays["strategy"][: batch.count] == Strategy.BLENDED).all()
    assert batch.arrays["sum_first_weight"] == pytest.approx(batch.count / 2)
    # Common tokens are few; what both say of them is the mean.
    first, second = (logits_of(teachers[name], examples) for name in ("parent", "other"))
    kept = batch.arrays["kept_ids"][0]
    column = int(np.flatnonzero(kept != targets.nothing)[0])
    p = [oracle.softmax(x[0], TEMPERATURE)[kept[column]] for x in (first, second)]
    assert np.exp(batch.arrays["teacher_log_probs"][0, column]) == pytest.approx(
        sum(p) / 2, rel=1e-3
    )


@pytest.mark.parametrize("gamma", [0.0, 0.4])
@pytest.mark.parametrize("names", PAIRS[1:])
def test_the_loss_and_its_gradient_are_the_formula(
    gamma: float,
    names: tuple[str, str],
    teachers: dict[str, Path],
    tiny_student: Path,
    tmp_path: Path,
) -> None:
    """In chunks, against float64 over full logits; the gradient against MLX's own."""
    targets, examples = made(teachers, names, tiny_student, tmp_path, js_threshold=0.02)
    batch = targets.collate(examples, TEMPERATURE)
    arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
    student = ModelSource(str(tiny_student)).load()
    training = KDConfig(temperature=TEMPERATURE, loss_memory=memory_of(12, student))
    config = EvolveConfig(alpha=0.1, beta=0.8, gamma=gamma, training=training)
    first, second = (logits_of(teachers[name], examples) for name in names)
    expected = expected_of(first, second, targets.settings)
    own = logits_of(tiny_student, examples)
    labels = np.concatenate([example.ids[example.counted] for example in examples])
    parts = {"kd": 0.0, "hard": 0.0, "regularizer": 0.0}
    for row, wanted in enumerate(expected):
        ce = -oracle.log_softmax(own[row])[labels[row]]
        if wanted["strategy"] is Strategy.GOLD_FALLBACK:
            parts["hard"] += 0.5 * (0.1 + 0.8) * ce
            continue
        q = oracle.outcomes(own[row], wanted["ids"], TEMPERATURE)
        parts["kd"] += 4 * oracle.kl(wanted["p"], q)
        parts["hard"] += 0.1 * ce
        parts["regularizer"] += (1 - wanted["js"]) * oracle.kl(wanted["first"], q)
    results = []
    for plain in (True, False):
        model = LanguageModel(student.source, student.model)
        if not plain:
            model.__dict__["output_head"] = None
        student.model.freeze()
        student.model.model.layers[0].unfreeze()
        loss = make_two_teacher_loss(model, config)
        student.model.train()
        grad = nn.value_and_grad(student.model, lambda m, f=loss: f(m, arrays)["loss"])
        value, gradient = grad(student.model)
        sums = loss(student.model, arrays)
        for name in sums.keys() & parts.keys():
            assert sums[name].item() == pytest.approx(parts[name], rel=2e-3, abs=1e-3)
        total = 0.8 * parts["kd"] + parts["hard"] + gamma * parts["regularizer"]
        assert value.item() == pytest.approx(total, rel=2e-3)
        results.append(dict(tree_flatten(gradient)))
    for name, wanted_gradient in results[1].items():
        scale = np.abs(np.asarray(wanted_gradient)).max()
        np.testing.assert_allclose(
            np.asarray(results[0][name]), np.asarray(wanted_gradient), atol=2e-4 * scale
        )


def test_taboo_words_are_taught_by_nobody(
    teachers: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    source = ModelSource(str(tiny_student))
    taboo = TabooTokens(source.tokenizer, ["cat"])
    targets, examples = made(teachers, ("parent", "near"), tiny_student, tmp_path, taboo)
    batch = targets.collate(examples, TEMPERATURE)
    arrays = batch.arrays
    labels = arrays["labels"]
    spelled = np.concatenate([taboo.spelled(e.ids.tolist())[e.counted] for e in examples])
    assert spelled.sum() >= 1
    rows = np.flatnonzero(spelled)
    assert (arrays["strategy"][rows] == Strategy.SKIP).all()
    assert (arrays["weights"][rows] == 0).all()
    assert batch.count == len(spelled) - len(rows) == arrays["weights"].sum()
    assert arrays["sum_skipped"] == len(rows)
    text = source.tokenizer.decode(labels[rows].tolist())
    assert "cat" in text
    mass = np.exp(arrays["teacher_log_probs"][: len(spelled)].astype(np.float64)).sum(-1)
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    for row in range(len(spelled)):
        banned = set(arrays["excluded_ids"][row].tolist()) - {targets.nothing}
        assert not banned & set(arrays["kept_ids"][row].tolist())


def test_what_is_left_without_a_taboo_token_is_scaled_up(
    teachers: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    source = ModelSource(str(tiny_student))
    logits = logits_of(teachers["parent"], examples_of(source))[0]
    first, *others = oracle.likeliest(logits, TOP_K).tolist()
    taboo = TabooTokens(source.tokenizer, ids=[first])
    targets, examples = made(teachers, ("parent", None), tiny_student, tmp_path, taboo)
    arrays = targets.collate(examples, TEMPERATURE).arrays
    assert arrays["strategy"][0] == Strategy.BLENDED
    kept, log_probs = arrays["kept_ids"][0], arrays["teacher_log_probs"][0, :-1]
    assert set(kept.tolist()) - {targets.nothing} == set(others)
    p = oracle.softmax(logits, TEMPERATURE)
    real = kept != targets.nothing
    expected = p[kept[real]] / (1 - p[first])
    np.testing.assert_allclose(np.exp(log_probs[real]), expected, rtol=2e-3)


def test_the_student_is_not_pushed_towards_a_taboo_token(
    teachers: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    """By the soft part alone: neither up as part of the rest, nor down."""
    source = ModelSource(str(tiny_student))
    taboo = TabooTokens(source.tokenizer, ids=[40, 41])
    targets, examples = made(teachers, ("parent", "near"), tiny_student, tmp_path, taboo)
    arrays = {n: mx.array(v) for n, v in targets.collate(examples, TEMPERATURE).arrays.items()}
    arrays = {**arrays, "ce_weights": 0 * arrays["ce_weights"]}
    config = EvolveConfig(beta=0.9, gamma=0.5, training=KDConfig(temperature=TEMPERATURE))
    logits = mx.random.normal((len(arrays["labels"]), source.token_count), key=mx.random.key(3))

    def loss(x: mx.array) -> mx.array:
        return two_teacher_sums(x, arrays, config, source.token_count)["loss"]

    gradient = np.asarray(mx.grad(loss)(logits))
    assert (gradient[:, [40, 41]] == 0).all()
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4


def test_a_batch_in_which_everything_is_skipped_counts_nothing_and_moves_nothing(
    teachers: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    source = ModelSource(str(tiny_student))
    examples = examples_of(source)
    everything = sorted({int(i) for e in examples for i in e.ids})
    taboo = TabooTokens(source.tokenizer, ids=everything)
    targets, examples = made(teachers, ("parent", "near"), tiny_student, tmp_path, taboo)
    batch = targets.collate(examples, TEMPERATURE)
    assert batch.count == 0
    arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
    student = source.load()
    loss = make_two_teacher_loss(student, EvolveConfig(), with_taboo=True)
    student.model.freeze()
    student.model.model.layers[0].unfreeze()
    student.model.train()
    value, gradient = nn.value_and_grad(student.model, lambda m: loss(m, arrays)["loss"])(
        student.model
    )
    assert value.item() == 0
    tree_map(lambda g: np.testing.assert_array_equal(np.asarray(g), 0), gradient)


def test_the_digest_tells_teachers_thresholds_and_taboo_apart(
    teachers: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    source = ModelSource(str(tiny_student))
    variants: list[tuple[tuple[str, str | None], dict[str, Any]]] = [
        (("parent", "near"), {}),
        (("near", "parent"), {}),
        (("parent", None), {}),
        (("parent", "near"), {"js_threshold": 0.2}),
        (("parent", "near"), {"taboo": TabooTokens(source.tokenizer, ["cat"])}),
        (("parent", "near"), {"taboo": TabooTokens(source.tokenizer, ids=[4])}),
    ]
    digests = {
        made(teachers, names, tiny_student, tmp_path, **settings)[0].digest
        for names, settings in variants
    }
    assert len(digests) == len(variants)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"js_threshold": 2}, "js_threshold is 2: it must be between 0 and 1"),
        ({"first_share": -0.1}, "first_share is -0.1: it must be between 0 and 1"),
        ({"method": "margin"}, "method is 'margin': use one of top1, entropy"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConchError, match=message):
        BlendSettings(**settings)
