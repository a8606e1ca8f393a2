"""The teacher's targets laid over another tokenizer's tokens, against float64 from full logits."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

import oracle
from aligned_pairs import TEMPERATURE, TEXTS, Pair, aligned_targets, teacher_log_probs
from benchmarks._baseline_alignments import BASELINES, instead_of_roots, sorted_distance_sum
from conch_dna.training.cross_tokenizer.targets import merged
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes
from conch_dna.training.cross_tokenizer.vocabulary import build_vocab_projection, shared_tokens
from conch_dna.training.data.examples import KINDS, Examples
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.settings import KDConfig


@pytest.mark.parametrize("kind", ["roots", "shared tokens"])
def test_every_row_keeps_all_of_the_teachers_probability(
    kind: str, pair: Pair, tmp_path: Path
) -> None:
    examples, targets = aligned_targets(pair, tmp_path, kind)
    batch = targets.collate(examples, TEMPERATURE)
    compared = batch.arrays["soft_weights"] > 0
    assert compared.sum() > 3
    mass = np.exp(batch.arrays["teacher_log_probs"].astype(np.float64)).sum(-1)
    np.testing.assert_allclose(mass[compared], 1, atol=1e-5)


@pytest.mark.parametrize("name", ["shared tokens", "bytes", "project", "truncate"])
def test_the_outcomes_are_the_teachers_full_distribution_coarsened(
    name: str, pair: Pair, tmp_path: Path
) -> None:
    """Each kept token of the student gets what the teacher gives the tokens that map to it."""
    teacher, student = pair
    examples, targets = aligned_targets(pair, tmp_path, {**BASELINES, **KINDS}[name])
    tables = token_bytes(teacher.tokenizer), token_bytes(student.tokenizer)
    if name == "project":
        maps = build_vocab_projection(teacher.tokenizer, student.tokenizer).targets
    elif name != "truncate":
        maps = shared_tokens(*tables)
    else:
        maps = np.where(np.arange(len(tables[0].pieces)) < len(tables[1].pieces), 1, 0)
        maps = np.where(maps, np.arange(len(maps)), -1)
    batch = targets.collate(examples, TEMPERATURE)
    row = 0
    checked = 0
    for example in examples:
        dense = teacher_log_probs(teacher, example.teacher.ids, TEMPERATURE)
        counted = np.flatnonzero(example.counted)
        for (first, last), (own, own_last) in zip(
            example.chunks.teacher, example.chunks.student, strict=True
        ):
            single = last - first == 1 and own_last - own == 1
            if name != "project" and not single:
                continue
            at = row + int(np.searchsorted(counted, own))
            assert batch.arrays["soft_weights"][at] == 1
            top = np.argsort(-dense[first - 1], kind="stable")[:16]
            expected: dict[int, float] = {}
            for token in top:
                if maps[token] >= 0:
                    p = float(np.exp(dense[first - 1, token]))
                    expected[int(maps[token])] = expected.get(int(maps[token]), 0.0) + p
            ids = batch.arrays["kept_ids"][at]
            probabilities = np.exp(batch.arrays["teacher_log_probs"][at].astype(np.float64))
            got = {
                int(i): float(p)
                for i, p in zip(ids, probabilities, strict=False)
                if i != student.token_count
            }
            assert got.keys() == expected.keys()
            for token, p in expected.items():
                assert got[token] == pytest.approx(p, rel=1e-3, abs=1e-6)
            assert probabilities[-1] == pytest.approx(1 - sum(expected.values()), abs=1e-4)
            checked += 1
        row += example.count
    assert checked > 3
    assert batch.arrays["soft_weights"].sum() == checked


def test_likelihoods_of_chunks_are_sums_over_the_teachers_tokens(
    pair: Pair, tmp_path: Path
) -> None:
    teacher, _ = pair
    examples, targets = aligned_targets(pair, tmp_path, "alm")
    batch = targets.collate(examples, 1.0)
    expected, spans, row = [], [], 0
    for example in examples:
        dense = teacher_log_probs(teacher, example.teacher.ids, 1.0)
        counted = np.flatnonzero(example.counted)
        for (first, last), (own, own_last) in zip(
            example.chunks.teacher, example.chunks.student, strict=True
        ):
            tokens = range(first, last)
            expected.append(sum(dense[t - 1, example.teacher.ids[t]] for t in tokens))
            spans.append(row + np.searchsorted(counted, np.arange(own, own_last)))
        row += example.count
    count = len(expected)
    np.testing.assert_allclose(batch.arrays["chunk_log_probs"][:count], expected, rtol=1e-4)
    assert batch.arrays["chunk_weights"].sum() == count
    for number, rows in enumerate(spans):
        assert (batch.arrays["chunk_index"][rows] == number).all()
    outside = np.ones(len(batch.arrays["labels"]), bool)
    outside[np.concatenate(spans)] = False
    assert (batch.arrays["chunk_index"][outside] == len(batch.arrays["chunk_weights"])).all()


def test_likelihoods_alone_take_four_bytes_a_token(pair: Pair, tmp_path: Path) -> None:
    examples, targets = aligned_targets(pair, tmp_path, "alm")
    assert targets.identity.bytes_per_token == 4
    data = sum(example.teacher.count for example in examples) * 4
    (shard,) = targets.cache.folder.glob("*.safetensors")
    assert data <= shard.stat().st_size < data + 2000, "the listing of three examples is small"
    assert set(targets.cache.read(examples[0].teacher)) == {"gold_log_prob"}


def test_the_cache_serves_every_kind_that_keeps_as_much(pair: Pair, tmp_path: Path) -> None:
    examples, shared = aligned_targets(pair, tmp_path, "shared tokens")
    assert KINDS["roots"](SoftTargetCache(tmp_path, shared.identity), *pair).missing(examples) == []
    identity = replace(shared.identity, top_k=8)
    other = KINDS["roots"](SoftTargetCache(tmp_path, identity), *pair)
    assert len(other.missing(examples)) == len(TEXTS)


def test_the_stream_digest_tells_alignments_apart(pair: Pair, tmp_path: Path) -> None:
    digests = {aligned_targets(pair, tmp_path / kind, kind)[1].digest for kind in KINDS}
    assert len(digests) == len(KINDS) == 3


def test_evaluation_means_the_same_whatever_was_trained(pair: Pair, tmp_path: Path) -> None:
    batches = []
    for kind in ("shared tokens", "roots"):
        examples, targets = aligned_targets(pair, tmp_path, kind)
        batches.append(targets.evaluation_batch(examples).arrays)
    for other in batches[1:]:
        assert batches[0].keys() == other.keys()
        for name, value in batches[0].items():
            np.testing.assert_array_equal(value, other[name])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_merging_adds_what_goes_to_one_id_and_what_goes_nowhere(data: Any) -> None:
    rows, kept = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    ids = data.draw(numpy_arrays(np.int64, (rows, kept), elements=st.integers(-1, 4)))
    weights = data.draw(numpy_arrays(np.float64, (rows, kept + 1), elements=st.floats(0.001, 1.0)))
    probabilities = weights / weights.sum(1, keepdims=True)
    log_probs = np.log(probabilities)
    got_ids, got, rest = merged(ids, log_probs[:, :-1], log_probs[:, -1])
    for row in range(rows):
        expected: dict[int, float] = {}
        for token, p in zip(ids[row], probabilities[row], strict=False):
            expected[int(token)] = expected.get(int(token), 0.0) + p
        nowhere = expected.pop(-1, 0.0)
        found = {int(i): np.exp(v) for i, v in zip(got_ids[row], got[row], strict=True) if i >= 0}
        assert found == pytest.approx(expected)
        assert np.isneginf(got[row][got_ids[row] < 0]).all()
        assert np.exp(rest[row]) == pytest.approx(probabilities[row, -1] + nowhere)


def test_the_baseline_of_sorted_probabilities_is_their_l1_distance() -> None:
    """It does not see which token is which: a permuted vocabulary costs nothing."""
    random = np.random.default_rng(1)
    student, teacher = oracle.softmax(random.normal(size=(3, 7))), np.zeros((3, 5))
    teacher[:] = np.sort(oracle.softmax(random.normal(size=(3, 5))), axis=-1)[:, ::-1]
    rest = np.full((3, 1), -np.inf)
    rows = {
        "teacher_log_probs": mx.array(np.concatenate([np.log(teacher), rest], 1), mx.float32),
        "soft_weights": mx.array([1.0, 0.0, 1.0]),
    }
    own = np.sort(student, axis=-1)[:, ::-1][:, :5]
    distances = np.abs(teacher - own).sum(-1)
    for order in (np.arange(7), random.permutation(7)):
        logits = mx.array(np.log(student[:, order]), mx.float32)
        value = sorted_distance_sum(logits, rows, temperature=1.0).item()
        assert value == pytest.approx(distances[0] + distances[2], rel=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_teaches_in_place_of_classes(name: str, pair: Pair, tmp_path: Path) -> None:
    config = KDConfig(alignment="roots", top_k=16, temperature=1.0)
    with instead_of_roots(name):
        made = Examples(*pair, config)
        _, examples = made.make(TEXTS)
        targets: Any = made.targets(tmp_path)
        targets.fill(pair[0], examples, batch_size=2)
        assert targets.name == name
    student = pair[1].load()
    loss = targets.loss(student, config)
    arrays = targets.collate(examples, 1.0).arrays
    sums = loss(student.model, {key: mx.array(value) for key, value in arrays.items()})
    assert 0 < sums["soft"].item() < math.inf
    assert (sums["chunks"].item() > 0) == (name == "bytes")
    assert type(Examples(*pair, config).targets(tmp_path)) is KINDS["roots"]
