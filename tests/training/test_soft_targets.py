"""Soft targets: what is stored is exact, addressed by content, whole or computed again.

Knows tiny random teachers for the cache's mechanics, and the embedded trained pair for what K
tokens and a rest lose of the full divergence.
"""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from safetensors import safe_open

import oracle
from conch_dna.checkpoints import file_digest
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.losses import LOSSES, compute_kd_loss
from conch_dna.training.adapters import attach_lora
from conch_dna.training.batches import Example, collate
from conch_dna.training.data import outcomes, soft_targets, target_shards
from conch_dna.training.data.outcomes import (
    TARGET_ARRAYS,
    TargetIdentity,
    compress,
    compute_targets,
    target_identity,
)
from conch_dna.training.data.soft_targets import SoftTargetCache, TargetBatches
from conch_dna.training.evaluation import heldout_metrics
from conch_dna.training.head_loss import make_distillation_loss
from conch_dna.training.settings import KDConfig
from models import ASSETS, make_model_folder, memory_of, random_examples

TEMPERATURES = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def source(tiny_teacher: Path) -> ModelSource:
    return ModelSource(str(tiny_teacher))


@pytest.fixture
def examples(source: ModelSource) -> list[Example]:
    return random_examples(7, source.token_count)


def dense_logits(model: LanguageModel, example: Example) -> np.ndarray:
    """The model's logits of the real tokens at each counted position, one example at a time."""
    logits = np.asarray(model.model(mx.array(example.ids)[None])[0].astype(mx.float32))
    return logits[np.flatnonzero(example.counted) - 1, : model.source.token_count]


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(found[name], expected[name]) for name in TARGET_ARRAYS)


def filled(folder: Path, source: ModelSource, examples: list[Example], **changes: Any) -> Any:
    identity = target_identity(source, **{"top_k": 12, "temperature": 2.0, **changes})
    cache = SoftTargetCache(folder, identity)
    cache.fill(source, examples, batch_size=3)
    return cache


@contextmanager
def teacher_must_stay_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(self: ModelSource) -> LanguageModel:
        raise AssertionError("the teacher was loaded, though nothing is missing")

    with monkeypatch.context() as patch:
        patch.setattr(ModelSource, "resident", refuse)
        yield


# What is stored


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("k", [1, 10, 59, 60])
def test_compress_against_the_oracle(k: int, dtype: mx.Dtype) -> None:
    random = np.random.default_rng(k)
    rounded = mx.array(random.normal(0, 3, (9, 60))).astype(dtype)
    # Distinct logits, so that the likeliest K have one order.
    logits = np.asarray(rounded.astype(mx.float32)) + np.arange(60) * 2.0**-10
    logits = np.asarray(mx.array(logits), np.float32)
    labels = random.integers(0, 60, 9)
    found = compress(mx.array(logits), mx.array(labels), top_k=k, temperatures=TEMPERATURES)
    stored = {name: np.asarray(value) for name, value in found.items()}
    kept = oracle.likeliest(logits, k)
    np.testing.assert_array_equal(stored["kept_ids"], kept)
    exact = oracle.log_softmax(logits)
    np.testing.assert_allclose(
        stored["kept_log_probs"], np.take_along_axis(exact, kept, axis=-1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        stored["gold_log_prob"], -oracle.cross_entropy(logits, labels), rtol=1e-5, atol=1e-6
    )
    for column, t in enumerate(TEMPERATURES):
        normalizer = np.log(np.exp(exact / t).sum(axis=-1))
        np.testing.assert_allclose(stored["log_normalizer"][:, column], normalizer, atol=2e-6)
        at_t = stored["kept_log_probs"] / t - stored["log_normalizer"][:, column : column + 1]
        probabilities = oracle.outcomes(logits, kept, t)
        np.testing.assert_allclose(np.exp(at_t), probabilities[:, :-1], rtol=1e-5)
        rest = np.exp(stored["log_rest"][:, column].astype(np.float64))
        np.testing.assert_allclose(rest, probabilities[:, -1], rtol=1e-5)
        assert (rest == 0).all() == (k == 60)


def test_the_rest_is_not_one_token_at_a_temperature() -> None:
    """At t = 2, 100 tokens of 0.001 weigh 100·√0.001 against √0.9: far more than √0.1 would."""
    logits = np.log(np.array([[0.9, *[0.001] * 100]], np.float32))
    stored = compress(mx.array(logits), mx.array([0]), top_k=1, temperatures=(1.0, 2.0))
    rest = np.exp(np.asarray(stored["log_rest"]))[0]
    assert rest[0] == pytest.approx(0.1, rel=1e-5)
    weight = 100 * 0.001**0.5
    assert rest[1] == pytest.approx(weight / (weight + 0.9**0.5), rel=1e-5)


def test_a_small_rest_keeps_its_precision() -> None:
    logits = np.full((1, 1001), np.log(1e-15), np.float32)
    logits[0, 0] = 0.0
    stored = compress(mx.array(logits), mx.array([0]), top_k=1, temperatures=(1.0,))
    assert stored["log_rest"].item() == pytest.approx(np.log(1e-12), rel=1e-6)


def test_targets_of_a_teacher(source: ModelSource, examples: list[Example]) -> None:
    """Batches and padding leave no trace: one example at a time gives the same."""
    identity = target_identity(source, top_k=12, temperature=2.0)
    teacher = source.resident()
    found = compute_targets(
        teacher, examples, identity, batch_size=3, report=lambda event, row: None
    )
    for example, stored in zip(examples, found, strict=True):
        logits = dense_logits(teacher, example)
        gold = -oracle.cross_entropy(logits, example.ids[example.counted])
        np.testing.assert_allclose(stored["gold_log_prob"], gold, rtol=1e-4)
        probabilities = oracle.outcomes(logits, stored["kept_ids"].astype(np.int64))
        np.testing.assert_allclose(np.exp(stored["kept_log_probs"]), probabilities[:, :-1], 1e-4)
        np.testing.assert_allclose(np.exp(stored["log_rest"][:, 0]), probabilities[:, -1], 1e-4)
        largest = np.sort(oracle.softmax(logits), axis=-1)[:, :-13:-1]
        np.testing.assert_allclose(np.exp(stored["kept_log_probs"]), largest, rtol=1e-4)


def test_padded_rows_of_the_teachers_head_take_no_part(tmp_path: Path) -> None:
    source = ModelSource(str(make_model_folder(tmp_path / "padded", vocab_size=1600)))
    teacher = source.resident()
    examples = random_examples(2, source.token_count)
    identity = target_identity(source, top_k=20, temperature=2.0)
    assert identity.vocabulary_size == source.token_count < 1600

    def targets() -> list[dict[str, np.ndarray]]:
        return compute_targets(
            teacher, examples, identity, batch_size=2, report=lambda event, row: None
        )

    before = targets()
    weight = teacher.model.model.embed_tokens.weight
    weight[source.token_count :] = 30.0 * weight[source.token_count :]
    loudest = mx.argmax(teacher.model(mx.array(examples[0].ids)[None]), axis=-1)
    assert loudest.max().item() >= source.token_count
    for found, expected in zip(targets(), before, strict=True):
        assert found["kept_ids"].max() < source.token_count
        for name in TARGET_ARRAYS:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_teacher_that_is_not_taken_apart(
    source: ModelSource, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = source.load()
    identity = target_identity(source, top_k=12, temperature=2.0)
    options: dict[str, Any] = {"batch_size": 3, "report": lambda event, row: None}
    plain = compute_targets(teacher, examples, identity, **options)
    monkeypatch.setitem(teacher.__dict__, "output_head", None)
    monkeypatch.setattr(teacher, "head", None)
    whole = compute_targets(teacher, examples, identity, **options)
    for found, expected in zip(whole, plain, strict=True):
        np.testing.assert_allclose(found["log_rest"], expected["log_rest"], rtol=1e-5, atol=1e-6)


def test_a_broken_teacher_is_refused(source: ModelSource, examples: list[Example]) -> None:
    broken = source.load()
    broken.model.update(tree_map(lambda x: x * mx.nan, broken.model.parameters()))
    identity = target_identity(source, top_k=12, temperature=2.0)
    with pytest.raises(ConchError, match=r"on example 0.*weight \S+ is NaN"):
        compute_targets(broken, examples, identity, batch_size=3, report=lambda event, row: None)


# The address


def test_more_kept_tokens_than_the_teacher_has(source: ModelSource) -> None:
    tokens = source.token_count
    with pytest.raises(
        ConchError, match=f"top_k is {tokens + 1}, but teacher .* has {tokens} tokens: lower --top"
    ):
        target_identity(source, top_k=tokens + 1, temperature=2.0)


def test_temperature_one_is_always_stored(source: ModelSource) -> None:
    assert target_identity(source, top_k=5, temperature=2).temperatures == (1.0, 2.0)
    assert target_identity(source, top_k=5, temperature=0.5).temperatures == (0.5, 1.0)
    assert target_identity(source, top_k=5, temperature=1).temperatures == (1.0,)


def test_everything_the_targets_depend_on_changes_the_address(
    source: ModelSource, tiny_student: Path
) -> None:
    identity = target_identity(source, top_k=12, temperature=2.0)
    others = [
        target_identity(source, top_k=13, temperature=2.0),
        target_identity(source, top_k=12, temperature=3.0),
        target_identity(ModelSource(str(tiny_student)), top_k=12, temperature=2.0),
        replace(identity, tokenizer="another"),
        replace(identity, vocabulary_size=identity.vocabulary_size - 1),
    ]
    assert len({identity.digest, *(other.digest for other in others)}) == 1 + len(others)
    assert target_identity(source, top_k=12, temperature=2.0).digest == identity.digest


def test_the_format_changes_the_address(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = target_identity(source, top_k=12, temperature=2.0)
    before = identity.digest
    monkeypatch.setattr(outcomes, "ADDRESS", "soft targets of tomorrow")
    assert identity.digest != before


def test_sizes_are_told_without_reading_the_weights(tmp_path: Path, tiny_teacher: Path) -> None:
    for path in tiny_teacher.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    identity = target_identity(
        ModelSource(str(tmp_path)), top_k=64, temperature=2.0, with_digests=False
    )
    assert identity.bytes_per_token == 64 * (2 + 4) + 2 * (4 + 4) + 4


def test_ids_take_two_bytes_only_where_they_fit() -> None:
    shape: dict[str, Any] = {"teacher": "", "tokenizer": "", "temperatures": (1.0,)}
    fits = TargetIdentity(vocabulary_size=65_536, kept_below=65_536, top_k=10, **shape)
    exceeds = TargetIdentity(vocabulary_size=65_537, kept_below=65_537, top_k=10, **shape)
    assert (fits.id_type, fits.bytes_per_token) == (np.uint16, 10 * 6 + 12)
    assert (exceeds.id_type, exceeds.bytes_per_token) == (np.uint32, 10 * 8 + 12)


# The cache


def shards(cache: SoftTargetCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


def test_what_is_read_is_what_was_computed(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    identity = target_identity(source, top_k=12, temperature=2.0)
    cache = SoftTargetCache(tmp_path, identity)
    assert cache.missing(examples) == examples
    assert cache.fill(source, examples, batch_size=3) == len(examples)
    assert cache.missing(examples) == []
    computed = compute_targets(
        source.resident(), examples, identity, batch_size=3, report=lambda event, row: None
    )
    for cached in (cache, SoftTargetCache(tmp_path, identity)):
        for example, expected in zip(examples, computed, strict=True):
            assert same(cached.read(example), expected)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(shards(cache)[0]) in maps.read_text(), "shards are read by memory map"


def test_few_bits_are_near_to_what_was_computed(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    exact = filled(tmp_path / "exact", source, examples)
    compact = filled(tmp_path / "compact", source, examples, bits=7)
    sizes = [shards(cache)[0].stat().st_size for cache in (exact, compact)]
    assert sizes[1] < 0.8 * sizes[0]
    for example in examples:
        expected, found = exact.read(example), compact.read(example)
        for name in ("log_rest", "gold_log_prob"):
            np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(found["kept_ids"][:, 0], expected["kept_ids"][:, 0])
    for temperature in (1.0, 2.0):
        parts = [cache.outcomes(examples, temperature, 192) for cache in (exact, compact)]
        dense = [np.full((192, source.token_count + 1), -np.inf) for _ in parts]
        for row, part in zip(dense, parts, strict=True):
            np.put_along_axis(row, part["kept_ids"], part["teacher_log_probs"][:, :-1], axis=1)
            row[:, -1] = part["teacher_log_probs"][:, -1]
            np.testing.assert_allclose(np.exp(row).sum(1), 1, atol=1e-5)
        assert np.array_equal(*(np.isfinite(row) for row in dense))
        assert oracle.kl(np.exp(dense[0]), np.exp(dense[1])).max() < 1e-4


def test_what_is_stored_as_it_is_serves_where_few_bits_are_asked(
    tmp_path: Path,
    source: ModelSource,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = filled(tmp_path, source, examples[:-1])
    compact = SoftTargetCache(tmp_path, replace(exact.identity, bits=7))
    assert compact.missing(examples) == examples[-1:]
    # In the same batches, or products may be rounded otherwise.
    alone = filled(tmp_path / "alone", source, examples[:-1], bits=7)
    for example in examples[:-1]:
        assert same(compact.read(example), alone.read(example)), "whatever lies there"
    compact.fill(source, examples, batch_size=3)
    assert [len(shards(cache)) for cache in (exact, compact)] == [1, 1]
    again = SoftTargetCache(tmp_path, exact.identity)
    assert again.missing(examples) == examples[-1:], "few bits do not serve where all are asked"


def test_another_teachers_shard_is_not_read(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    cache = filled(tmp_path, source, examples)
    other = SoftTargetCache(tmp_path, target_identity(source, top_k=12, temperature=3.0))
    other.folder.mkdir()
    (shard,) = shards(cache)
    shutil.copy(shard, other.folder)
    warnings: list[str] = []
    again = SoftTargetCache(
        tmp_path, other.identity, report=lambda event, row: warnings.append(row["message"])
    )
    assert again.missing(examples) == examples and "another teacher" in warnings[0]


def test_size_on_disk_is_as_announced(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    cache = filled(tmp_path, source, examples)
    (shard,) = shards(cache)
    content = shard.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    tokens = sum(example.count for example in examples)
    assert len(content) - header == tokens * cache.identity.bytes_per_token


@pytest.mark.parametrize("bits", [32, 7])
def test_a_full_cache_never_loads_the_teacher(
    tmp_path: Path,
    source: ModelSource,
    bits: int,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filled(tmp_path, source, examples, bits=bits)
    identity = target_identity(source, top_k=12, temperature=2.0, bits=bits)
    with teacher_must_stay_away(monkeypatch):
        again = SoftTargetCache(tmp_path, identity)
        assert again.fill(source, examples[::-1], batch_size=2) == 0


@pytest.mark.parametrize("bits", [32, 7])
def test_a_changed_data_set_computes_only_what_is_new(
    tmp_path: Path, source: ModelSource, bits: int, examples: list[Example]
) -> None:
    cache = filled(tmp_path, source, examples, bits=bits)
    before = [cache.read(example) for example in examples]
    new = random_examples(2, source.token_count, seed=9)
    advanced: list[int] = []
    cache = SoftTargetCache(
        tmp_path, cache.identity, report=lambda event, row: advanced.append(row["by"])
    )
    assert cache.fill(source, [new[0], *examples[2:], new[1], new[0]], batch_size=3) == 2
    assert sum(advanced) == new[0].count + new[1].count
    assert all(same(cache.read(e), old) for e, old in zip(examples, before, strict=True))


def test_what_counts_is_part_of_an_examples_address(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    cache = filled(tmp_path, source, examples)
    counted = examples[0].counted.copy()
    counted[-1] = False
    fewer = Example(examples[0].ids, counted, "one token less")
    assert cache.missing([fewer]) == [fewer]
    cache.fill(source, [fewer], batch_size=1)
    assert len(cache.read(fewer)["kept_ids"]) == len(cache.read(examples[0])["kept_ids"]) - 1


@pytest.mark.parametrize("bits", [32, 7])
def test_many_shards(
    tmp_path: Path,
    source: ModelSource,
    bits: int,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = filled(tmp_path / "whole", source, examples, bits=bits)
    monkeypatch.setattr(soft_targets, "SHARD_POSITIONS", 30)
    parts = filled(tmp_path / "parts", source, examples, bits=bits)
    assert len(shards(whole)) == 1 < len(shards(parts))
    again = SoftTargetCache(tmp_path / "parts", parts.identity)
    assert again.missing(examples) == []
    for example in examples:
        found, expected = again.read(example), whole.read(example)
        np.testing.assert_allclose(found["log_rest"], expected["log_rest"], atol=1e-5)


def test_other_settings_live_side_by_side(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    first = filled(tmp_path, source, examples)
    second = SoftTargetCache(tmp_path, target_identity(source, top_k=12, temperature=3.0))
    assert second.missing(examples) == examples
    assert first.folder != second.folder and first.folder.parent == second.folder.parent


@pytest.mark.parametrize("bits", [32, 7])
def test_shards_are_the_same_bytes_every_time(
    tmp_path: Path, source: ModelSource, bits: int, examples: list[Example]
) -> None:
    first = filled(tmp_path / "a", source, examples, bits=bits)
    second = filled(tmp_path / "b", source, examples, bits=bits)
    names = [[(path.name, file_digest(path)) for path in shards(c)] for c in (first, second)]
    assert names[0] == names[1] and names[0]


def test_k_equal_to_the_vocabulary(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    cache = filled(tmp_path, source, examples[:2], top_k=source.token_count)
    outcomes = cache.outcomes(examples[:2], 2.0, 64)
    assert (outcomes["teacher_log_probs"][: examples[0].count, -1] == -np.inf).all()
    logits = dense_logits(source.resident(), examples[0])
    exact = oracle.softmax(logits, 2.0)
    rows = outcomes["teacher_log_probs"][: examples[0].count, :-1]
    kept = outcomes["kept_ids"][: examples[0].count]
    np.testing.assert_allclose(
        np.exp(rows), np.take_along_axis(exact, kept.astype(np.int64), axis=-1), rtol=1e-4
    )


# Damage


@pytest.mark.parametrize("bits", [32, 7])
@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_shard_is_computed_again(
    tmp_path: Path, source: ModelSource, bits: int, examples: list[Example], kept: int
) -> None:
    cache = filled(tmp_path, source, examples, bits=bits)
    before = [{n: v.copy() for n, v in cache.read(e).items()} for e in examples]
    (shard,) = shards(cache)
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:kept])
    assert_recomputed(cache.identity, tmp_path, source, examples, before, "truncated or unreadable")
    assert shard.read_bytes() == content


@pytest.mark.parametrize("bits", [32, 7])
@pytest.mark.parametrize(
    "listing",
    ["[" * 100_000, "{}", '["a"]', '[["a", 0, 9999]]', '[["a", 1, 0]]', '[["a", 0.5, 1]]'],
)
def test_a_listing_of_another_form_is_computed_again(
    tmp_path: Path, source: ModelSource, bits: int, examples: list[Example], listing: str
) -> None:
    """Its digest is right: whoever wrote it meant it."""
    cache = filled(tmp_path, source, examples, bits=bits)
    before = [{n: v.copy() for n, v in cache.read(e).items()} for e in examples]
    (shard,) = shards(cache)
    with safe_open(str(shard), framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    metadata |= {"entries": listing, "digest": target_shards._data_digest(listing, arrays)}
    shard.unlink()
    mx.save_safetensors(str(shard), {n: mx.array(v) for n, v in arrays.items()}, metadata)
    assert_recomputed(cache.identity, tmp_path, source, examples, before, str(shard))


@pytest.mark.parametrize("bits", [32, 7])
def test_a_flipped_bit_in_the_data_is_computed_again(
    tmp_path: Path, source: ModelSource, bits: int, examples: list[Example]
) -> None:
    cache = filled(tmp_path, source, examples, bits=bits)
    before = [{n: v.copy() for n, v in cache.read(e).items()} for e in examples]
    (shard,) = shards(cache)
    content = bytearray(shard.read_bytes())
    content[-100] ^= 4
    shard.unlink()
    shard.write_bytes(content)
    assert_recomputed(cache.identity, tmp_path, source, examples, before, "was altered")


def assert_recomputed(
    identity: TargetIdentity,
    folder: Path,
    source: ModelSource,
    examples: list[Example],
    before: list[dict[str, np.ndarray]],
    reason: str,
) -> None:
    warnings: list[str] = []

    def report(event: str, row: dict[str, Any]) -> None:
        if event == "warning":
            warnings.append(row["message"])

    again = SoftTargetCache(folder, identity, report=report)
    assert len(warnings) == 1 and reason in warnings[0] and "computed again" in warnings[0]
    assert shards(again) == [], "a damaged shard that stays is reported for ever"
    assert again.missing(examples) == examples
    assert again.fill(source, examples, batch_size=3) == len(examples)
    assert all(same(again.read(e), old) for e, old in zip(examples, before, strict=True))


@pytest.mark.parametrize("bits", [32, 7])
def test_no_flipped_bit_of_the_header_goes_unnoticed(
    tmp_path: Path, source: ModelSource, bits: int
) -> None:
    """Either the shard is refused, or what is read is unharmed."""
    examples = random_examples(2, source.token_count)
    cache = filled(tmp_path, source, examples, bits=bits)
    before = [{n: v.copy() for n, v in cache.read(e).items()} for e in examples]
    (shard,) = shards(cache)
    content = shard.read_bytes()
    random = np.random.default_rng(0)
    for place in range(8 + int.from_bytes(content[:8], "little")):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(0, 8))
        shard.unlink(missing_ok=True)
        shard.write_bytes(damaged)
        again = SoftTargetCache(tmp_path, cache.identity)
        if not again.missing(examples):
            for example, old in zip(examples, before, strict=True):
                assert same(again.read(example), old), f"byte {place}"


def test_leftovers_of_a_killed_process_are_removed(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    cache = filled(tmp_path, source, examples)
    leftover = cache.folder / f".writing-1-{shards(cache)[0].name}"
    leftover.write_bytes(b"half")
    again = SoftTargetCache(tmp_path, cache.identity)
    assert not leftover.exists() and again.missing(examples) == []


@contextmanager
def no_file_may_exceed(size: int) -> Iterator[None]:
    """Make the system refuse larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    filled(tmp_path / "warm", source, examples)  # compiles MLX's kernels, which also writes files
    identity = target_identity(source, top_k=12, temperature=2.0)
    cache = SoftTargetCache(tmp_path / "full", identity)
    with no_file_may_exceed(4096), pytest.raises(ConchError, match=r"cannot write .*disk space"):
        cache.fill(source, examples, batch_size=3)
    assert list(cache.folder.iterdir()) == []
    assert cache.missing(examples) == examples
    assert cache.fill(source, examples, batch_size=3) == len(examples)


# Batches


def test_a_batch_carries_the_outcomes_of_its_own_positions(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    cache = filled(tmp_path, source, examples)
    chosen = [examples[4], examples[1]]
    for t in (1.0, 2.0):
        batch = cache.collate(chosen, t)
        plain = collate(chosen)
        for name, value in plain.arrays.items():
            assert np.array_equal(batch.arrays[name], value)
        assert (batch.count, batch.names) == (plain.count, plain.names)
        logits = np.concatenate([dense_logits(source.resident(), e) for e in chosen])
        kept = batch.arrays["kept_ids"][: batch.count].astype(np.int64)
        expected = oracle.outcomes(logits, kept, t)
        found = np.exp(batch.arrays["teacher_log_probs"][: batch.count])
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        labels = batch.arrays["labels"][: batch.count]
        gold = -oracle.cross_entropy(logits, labels)
        np.testing.assert_allclose(batch.arrays["gold_log_prob"][: batch.count], gold, rtol=1e-4)


def test_the_padding_of_a_batch_has_a_finite_loss(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    """A weight of 0 makes it harmless only where its loss is finite, since 0 · inf is NaN.

    Where everything is kept the student's rest has probability 0, so the padding's must too.
    """
    for top_k in (12, source.token_count):
        batch = filled(tmp_path, source, examples, top_k=top_k).collate(examples[:1], 2.0)
        rows = np.exp(batch.arrays["teacher_log_probs"])
        assert len(rows) == len(batch.arrays["labels"]) > batch.count
        np.testing.assert_allclose(rows.sum(axis=-1), 1.0, rtol=1e-5)
        assert (rows[:, -1] > 0).all() == (top_k == 12)
        assert all(len(set(kept)) == len(kept) for kept in batch.arrays["kept_ids"].tolist())


@pytest.mark.parametrize("divergence", sorted(LOSSES))
def test_where_everything_is_kept_the_loss_is_the_dense_one(
    tmp_path: Path,
    source: ModelSource,
    tiny_student: Path,
    examples: list[Example],
    divergence: str,
) -> None:
    cache = filled(tmp_path, source, examples[:3], top_k=source.token_count)
    batch = cache.collate(examples[:3], 2.0)
    arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
    student = ModelSource(str(tiny_student)).load()
    attach_lora(student, KDConfig(lora_rank=2))
    loss = make_distillation_loss(
        student, temperature=2.0, alpha=1.0, divergence=divergence, memory=memory_of(50, student)
    )
    student.model.train()
    step = nn.value_and_grad(student.model, lambda: loss(student.model, arrays)["loss"])
    value, gradients = step()
    dense = [
        mx.array(np.concatenate([dense_logits(model, e) for e in examples[:3]]))
        for model in (source.resident(), student)
    ]
    expected = compute_kd_loss(*dense, 2.0, divergence=divergence).item()
    assert value.item() / batch.count == pytest.approx(expected, rel=1e-4)
    largest = [mx.abs(gradient).max().item() for gradient in named_arrays(gradients).values()]
    assert np.isfinite(largest).all() and max(largest) > 0


def test_a_stream_is_addressed_by_its_targets_too(
    tmp_path: Path, source: ModelSource, examples: list[Example]
) -> None:
    first, second = (filled(tmp_path, source, examples, temperature=t) for t in (2.0, 3.0))
    stream = TargetBatches(examples, 2, first, temperature=2.0, seed=0)
    others = [
        TargetBatches(examples, 2, first, temperature=1.0, seed=0),
        TargetBatches(examples, 2, second, temperature=1.0, seed=0),
        TargetBatches(examples, 2, first, temperature=2.0, seed=1),
        TargetBatches(examples[::-1], 2, first, temperature=2.0, seed=0),
    ]
    assert len({stream.digest, *(other.digest for other in others)}) == 5
    again = TargetBatches(examples, 2, first, temperature=2.0, seed=0)
    assert again.digest == stream.digest
    for index in (0, 2, 5):
        chosen = [examples[i] for i in stream.indices(index)]
        expected = first.collate(chosen, 2.0)
        found = again.batch(index)
        assert found.names == expected.names
        for name, value in expected.arrays.items():
            assert np.array_equal(found.arrays[name], value)


# What K tokens and a rest lose


def story_examples(source: ModelSource, count: int) -> list[Example]:
    lines = (ASSETS / "story_openings.txt").read_text(encoding="utf-8").splitlines()
    examples = []
    for number, line in enumerate(lines[:count]):
        ids = np.array(source.tokenizer.encode(line), np.int32)
        examples.append(Example(ids, np.arange(len(ids)) > 0, f"line {number}"))
    return examples


def test_what_64_kept_tokens_lose_of_the_full_divergence(tmp_path: Path) -> None:
    """On the trained pair, at t = 1: what is kept is the oracle's figure, and most of the full."""
    teacher, student = ModelSource("embedded:teacher"), ModelSource("embedded:student")
    examples = story_examples(teacher, 20)
    logits = [
        np.concatenate([dense_logits(source.resident(), e) for e in examples])
        for source in (teacher, student)
    ]
    full = oracle.kl(*(oracle.softmax(part) for part in logits)).mean()
    kept = oracle.likeliest(logits[0], 64)
    coarse = oracle.kl(*(oracle.outcomes(part, kept) for part in logits)).mean()
    found = {}
    for k in (4, 64, teacher.token_count):
        cache = filled(tmp_path, teacher, examples, top_k=k)
        metrics = heldout_metrics(student.resident(), [cache.evaluation_batch(examples)])
        found[k] = metrics.kl_nats
    loss = 1 - found[64] / full
    print(f"\nKL in nats: all {len(logits[0][0])} tokens {full:.4f}, " + json.dumps(found))
    print(f"64 tokens and a rest lose {loss:.2%} over {len(logits[0])} positions")
    assert found[4] < found[64] < full
    assert found[64] == pytest.approx(coarse, rel=1e-4)
    assert loss < 0.2
    assert found[teacher.token_count] == pytest.approx(full, rel=1e-4)
    teacher.release()
    student.release()
