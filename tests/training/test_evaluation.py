"""Held-out figures against NumPy from dense logits, one text at a time."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import oracle
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.metrics import TokenMetrics, closed_gap
from conch_dna.training.batches import Batch, Example, sequential_batches
from conch_dna.training.data.outcomes import target_identity
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.evaluation import (
    and_kl,
    heldout_figures,
    heldout_metrics,
    slices_of,
    teacher_confidence,
    teacher_metrics,
    with_evaluation,
)
from conch_dna.training.settings import LOSS_MEMORY, KDConfig
from models import memory_of, random_examples

TOP_K = 20


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> ModelSource:
    return ModelSource(str(tiny_teacher))


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> LanguageModel:
    return ModelSource(str(tiny_student)).load()


@pytest.fixture(scope="module")
def examples(teacher: ModelSource) -> list[Example]:
    found = random_examples(7, teacher.token_count, seed=3)
    return [replace(example, text_bytes=10 + number) for number, example in enumerate(found)]


@pytest.fixture(scope="module")
def cache(
    teacher: ModelSource, examples: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> SoftTargetCache:
    identity = target_identity(teacher, top_k=TOP_K, temperature=2.0)
    cache = SoftTargetCache(tmp_path_factory.mktemp("targets"), identity)
    cache.fill(teacher, examples, batch_size=3)
    return cache


@pytest.fixture(scope="module")
def batches(cache: SoftTargetCache, examples: list[Example]) -> list[Batch]:
    return [
        cache.evaluation_batch([examples[i] for i in indices])
        for indices in sequential_batches(examples, 3)
    ]


def dense_logits(model: LanguageModel, examples: list[Example]) -> np.ndarray:
    rows = []
    for example in examples:
        logits = np.asarray(model.model(mx.array(example.ids)[None])[0])
        rows.append(logits[np.flatnonzero(example.counted) - 1])
    return np.concatenate(rows)


def expected_metrics(
    model: LanguageModel, teacher: LanguageModel, examples: list[Example]
) -> dict[str, Any]:
    own, of_teacher = dense_logits(model, examples), dense_logits(teacher, examples)
    labels = np.concatenate([example.ids[example.counted] for example in examples])
    kept = oracle.likeliest(of_teacher, TOP_K)
    entropy = oracle.cross_entropy(own, labels).mean()
    gold, of_own = (-oracle.cross_entropy(part, labels) for part in (of_teacher, own))
    p, q = np.exp(gold), np.exp(of_own)
    chunk_kl = p * (gold - of_own) + (1 - p) * (np.log1p(-p) - np.log1p(-q))
    return {
        "kl_nats": oracle.kl(oracle.outcomes(of_teacher, kept), oracle.outcomes(own, kept)).mean(),
        "cross_entropy": entropy,
        "perplexity": math.exp(entropy),
        "top1_agreement": (own.argmax(axis=-1) == of_teacher.argmax(axis=-1)).mean(),
        "bits_per_byte": entropy * len(labels) / math.log(2) / sum(e.text_bytes for e in examples),
        "chunk_kl_nats": chunk_kl.mean(),
        "tokens": len(labels),
        "compared_tokens": len(labels),
        "chunks": len(labels),
    }


def assert_metrics(found: TokenMetrics, expected: dict[str, Any]) -> None:
    assert found.to_json() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 17, 1024])
def test_figures_of_the_student(
    student: LanguageModel,
    teacher: ModelSource,
    examples: list[Example],
    batches: list[Batch],
    rows: int,
) -> None:
    """The batches differ in tokens, so a mean of the batches' means would be off."""
    assert len({batch.count for batch in batches}) > 1
    found = heldout_metrics(student, batches, memory=memory_of(rows, student))
    expected = expected_metrics(student, teacher.resident(), examples)
    assert_metrics(found, expected)
    assert found.kl_nats and found.top1_agreement is not None
    assert found.kl_nats > 0.01 and found.top1_agreement < 1


def test_figures_of_a_model_that_is_not_taken_apart(
    student: LanguageModel,
    teacher: ModelSource,
    examples: list[Example],
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(student.__dict__, "output_head", None)
    monkeypatch.setattr(student, "head", None)
    expected = expected_metrics(student, teacher.resident(), examples)
    assert_metrics(heldout_metrics(student, batches), expected)


def test_the_teacher_measured_as_a_student_is_the_teacher(
    teacher: ModelSource, examples: list[Example], batches: list[Batch], cache: SoftTargetCache
) -> None:
    own = teacher_metrics(examples, cache)
    measured = heldout_metrics(teacher.resident(), batches)
    assert own.kl_nats == 0.0 and own.top1_agreement == 1.0
    assert measured.to_json() == pytest.approx(own.to_json(), rel=1e-5, abs=1e-6)
    expected = expected_metrics(teacher.resident(), teacher.resident(), examples)
    assert own.to_json() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1024, 17])
def test_figures_of_each_token_are_those_of_dense_logits(
    student: LanguageModel,
    teacher: ModelSource,
    examples: list[Example],
    batches: list[Batch],
    cache: SoftTargetCache,
    rows: int,
) -> None:
    found = heldout_figures(student, batches, memory=memory_of(rows, student)).by_token
    ordered = [examples[i] for part in sequential_batches(examples, 3) for i in part]
    own, of_teacher = (dense_logits(m, ordered) for m in (student, teacher.resident()))
    labels = np.concatenate([example.ids[example.counted] for example in ordered])
    places = np.concatenate([np.arange(example.count) + 1 for example in ordered])
    kept = oracle.likeliest(of_teacher, TOP_K)
    p, q = oracle.outcomes(of_teacher, kept), oracle.outcomes(own, kept)
    assert found.place.tolist() == places.tolist()
    assert found.kl == pytest.approx(oracle.kl(p, q), abs=1e-5)
    assert found.compared.tolist() == [1] * len(labels)
    assert found.entropy == pytest.approx(-(p * np.log(p)).sum(axis=-1), abs=1e-5)
    likeliest = own.argmax(axis=-1)
    sure = np.exp(-oracle.cross_entropy(own, likeliest))
    assert found.confidence == pytest.approx(sure, abs=1e-6)
    assert found.right.tolist() == (likeliest == labels).tolist()
    confidence = teacher_confidence(ordered, cache)
    assert confidence is not None
    likeliest = of_teacher.argmax(axis=-1)
    sure = np.exp(-oracle.cross_entropy(of_teacher, likeliest))
    assert confidence[0] == pytest.approx(sure, abs=1e-6)
    assert confidence[1].tolist() == (likeliest == labels).tolist()


def test_padding_of_a_batch_does_not_count(student: LanguageModel, batches: list[Batch]) -> None:
    alone = [batches[0]]
    before = heldout_metrics(student, alone)
    arrays = {name: value.copy() for name, value in batches[0].arrays.items()}
    padding = arrays["weights"] == 0
    assert padding.any()
    arrays["labels"][padding] = 5
    arrays["positions"][padding] = 7
    arrays["chunk_log_probs"][padding] = -9.0
    arrays["best_ids"][padding] = 3
    after = heldout_metrics(student, [replace(batches[0], arrays=arrays)])
    assert after.to_json() == pytest.approx(before.to_json(), rel=1e-6)


@pytest.mark.parametrize("figure", ["kl_nats", "chunk_kl_nats"])
def test_a_loss_and_the_kl_beside_it_read_the_student_once(
    tiny_student: Path,
    cache: SoftTargetCache,
    examples: list[Example],
    figure: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = ModelSource(str(tiny_student)).load()
    student.model.freeze()
    evaluation = cache.evaluation_batch(examples[:3])
    batch = with_evaluation(cache.collate(examples[:3], 2.0), evaluation)
    arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
    loss = cache.loss(student, KDConfig(temperature=2.0))
    alone = loss(student.model, arrays)
    read, kind = [], type(student.model)
    call = kind.__call__
    monkeypatch.setattr(
        kind, "__call__", lambda *given, **more: read.append(given) or call(*given, **more)
    )
    both = and_kl(loss, student, figure, memory=LOSS_MEMORY)(student.model, arrays)
    assert len(read) == 1
    expected = getattr(heldout_metrics(student, [evaluation]), figure)
    assert float(both["kl"] / both["kl_count"]) == pytest.approx(expected, rel=1e-5)
    for name, value in alone.items():
        assert float(both[name]) == pytest.approx(float(value), rel=1e-6)
    # Nothing is kept for the next step, whose weights are others.
    loss(student.model, arrays)
    assert len(read) == 3


def test_no_batches_are_refused(student: LanguageModel, cache: SoftTargetCache) -> None:
    for measure in (lambda: heldout_metrics(student, []), lambda: teacher_metrics([], cache)):
        with pytest.raises(ValueError, match="no held-out tokens"):
            measure()


def test_gap_between_a_student_and_its_teacher_is_closed_by_the_teacher(
    student: LanguageModel, teacher: ModelSource, batches: list[Batch]
) -> None:
    before = heldout_metrics(student, batches).to_json()
    after = heldout_metrics(teacher.resident(), batches).to_json()
    assert closed_gap(before, after) == pytest.approx(1.0, abs=1e-4)
    assert closed_gap(before, before) == 0.0


class TestSlices:
    def test_names_stand_in_the_order_of_the_figures(self, student, cache, examples, batches):
        figures = heldout_figures(student, batches)
        records = [{"source": "one" if n % 2 else "two"} for n in range(len(examples))]
        names, slices = slices_of(examples, records, figures, 3)
        by_length = sorted(examples, key=lambda example: len(example.ids))
        assert names == [example.name for example in by_length]
        sources = {e.name: r["source"] for e, r in zip(examples, records, strict=True)}
        assert slices["source"] == [sources[name] for name in names]
        counts = dict(zip(names, figures.by_example["cross_entropy"][1], strict=True))
        assert all(counts[example.name] == example.count for example in examples)
        for name, part in zip(names, slices["length"], strict=True):
            low, high = map(float, part.removesuffix(" tokens").split(" to "))
            assert low <= counts[name] <= high

    def test_the_teachers_entropy_is_that_of_each_example(self, student, cache, examples, batches):
        figures = heldout_figures(student, batches)
        _, slices = slices_of(examples, [], figures, 3)
        order = [int(n) for n in np.concatenate(sequential_batches(examples, 3))]
        start = 0
        for number, part in zip(order, slices["teacher's entropy"], strict=True):
            own = figures.by_token.entropy[start : start + examples[number].count]
            start += examples[number].count
            low, high = map(float, part.removesuffix(" nats").split(" to "))
            assert low - 0.01 <= own.mean() <= high + 0.01

    def test_records_of_one_source_or_of_none_are_not_told_apart(self, student, examples, batches):
        figures = heldout_figures(student, batches)
        _, slices = slices_of(examples, [{"source": "a"}] * len(examples), figures, 3)
        assert "source" not in slices
