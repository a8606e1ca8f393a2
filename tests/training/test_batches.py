"""Which tokens count, the shift by one, and orders that are functions of a seed and an index.

Oracles are loops over single tokens, written from formulas.md §1.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conch_dna.errors import ConchError
from conch_dna.training.batches import (
    Example,
    ExampleBatches,
    bucketed_batches,
    collate,
    round_up,
    sequential_batches,
)


def example(ids: list[int], counted: list[int], name: str = "example") -> Example:
    """An example whose tokens at the indices `counted` count."""
    marks = np.zeros(len(ids), bool)
    marks[counted] = True
    return Example(np.asarray(ids, np.int32), marks, name)


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    made = []
    for number in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(st.integers(1, 99), min_size=2, max_size=70))
        counted = draw(st.lists(st.integers(1, len(ids) - 1), min_size=1))
        made.append(example(ids, counted, f"example {number}"))
    return made


def of_length(length: int, first: int = 1) -> Example:
    """An example whose ids are `first`, `first + 1`, …; all that can count does."""
    return example(list(range(first, first + length)), list(range(1, length)))


# Examples


def test_an_example_refuses_a_first_token_that_counts():
    with pytest.raises(ValueError, match="nothing predicts it"):
        example([5, 6], [0, 1])


def test_an_example_refuses_marks_of_another_length():
    with pytest.raises(ValueError, match="ids but"):
        Example(np.zeros(3, np.int32), np.zeros(2, bool), "a")


def test_the_digest_follows_ids_and_marks_but_not_the_name():
    first = example([1, 2, 3], [2])
    assert first.digest == example([1, 2, 3], [2], "other name").digest
    others = [example([1, 2, 4], [2]), example([1, 2, 3], [1, 2]), example([1, 2, 3], [1])]
    # One mark more or less at the end of a byte of packed marks must not be lost either.
    others += [example([1, 2, 3, 0], [2]), example([258, 2, 3], [2])]
    assert len({first.digest, *(other.digest for other in others)}) == 6


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_round_up_is_the_next_multiple(number, multiple):
    assert round_up(number, multiple) == math.ceil(number / multiple) * multiple


# Collation


@given(examples())
def test_position_i_predicts_token_i_plus_1_and_padding_never_counts(chosen):
    batch = collate(chosen)
    inputs, positions = batch.arrays["inputs"], batch.arrays["positions"]
    labels, weights = batch.arrays["labels"], batch.arrays["weights"]
    assert inputs.dtype == positions.dtype == labels.dtype == np.int32
    assert weights.dtype == np.float32
    length = inputs.shape[1]
    expected = []
    for row, one in enumerate(chosen):
        assert inputs[row, : len(one.ids) - 1].tolist() == one.ids[:-1].tolist()
        assert not inputs[row, len(one.ids) - 1 :].any()
        for place in range(1, len(one.ids)):
            if one.counted[place]:
                # Seen from the input: the token before the counted one, in its own row.
                expected.append((row * length + place - 1, int(one.ids[place])))
                assert inputs.reshape(-1)[expected[-1][0]] == one.ids[place - 1]
    assert batch.count == len(expected) == sum(one.count for one in chosen)
    pairs = list(zip(positions.tolist(), labels.tolist(), strict=True))
    assert pairs[: batch.count] == expected
    assert weights.tolist() == [1.0] * batch.count + [0.0] * (len(weights) - batch.count)
    assert batch.names == tuple(one.name for one in chosen)


@given(examples())
def test_few_shapes_arise_and_none_is_cut(chosen):
    arrays = collate(chosen).arrays
    longest, count = max(len(one.ids) for one in chosen), sum(one.count for one in chosen)
    assert arrays["inputs"].shape[1] % 32 == 0
    assert longest - 1 <= arrays["inputs"].shape[1] < longest - 1 + 32
    assert arrays["labels"].shape == arrays["positions"].shape == arrays["weights"].shape
    assert len(arrays["labels"]) % 128 == 0
    assert count <= len(arrays["labels"]) < count + 128


def test_a_batch_in_which_nothing_counts_is_refused_by_name():
    with pytest.raises(ConchError, match=r"no token counts in the batch of first, second"):
        collate([example([1, 2], [], "first"), example([1, 2, 3], [], "second")])


def test_one_example_may_count_nothing_if_another_does():
    batch = collate([example([1, 2], [], "first"), example([1, 2, 3], [2], "second")])
    assert batch.count == 1
    assert batch.arrays["labels"][0] == 3


# Orders


@given(
    lengths=st.lists(st.integers(2, 500), min_size=1, max_size=300),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
)
def test_each_example_is_drawn_at_most_once_an_epoch(lengths, batch_size, seed, epoch):
    batches = bucketed_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert len(batches) == len(lengths) // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    drawn = [int(index) for batch in batches for index in batch]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(len(lengths)))
    again = bucketed_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]


def test_orders_differ_between_epochs_and_seeds():
    def order(seed: int, epoch: int) -> str:
        return str(
            [batch.tolist() for batch in bucketed_batches([5] * 64, 4, seed=seed, epoch=epoch)]
        )

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_what_an_epoch_leaves_out_the_next_ones_take():
    lengths = list(range(10, 17))
    left_out = []
    for epoch in range(30):
        batches = bucketed_batches(lengths, 4, seed=0, epoch=epoch)
        left_out.append(frozenset(range(7)) - {int(i) for batch in batches for i in batch})
    assert all(len(rest) == 3 for rest in left_out)
    assert len(set(left_out)) > 10
    assert frozenset.union(*left_out) == frozenset(range(7))


def test_batches_hold_similar_lengths():
    """Within a pool of 16 batches no batch's lengths reach into another's."""
    lengths = np.random.default_rng(0).integers(2, 1000, size=64).tolist()
    batches = bucketed_batches(lengths, 4, seed=0, epoch=0)
    spans = sorted((min(found), max(found)) for found in ([lengths[i] for i in b] for b in batches))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    order = [min(lengths[i] for i in batch) for batch in batches]
    assert order != sorted(order)


def test_padding_is_less_than_in_batches_at_random():
    lengths = np.random.default_rng(1).integers(2, 1000, size=640)

    def padded(batches: list[np.ndarray]) -> int:
        return sum(int(lengths[batch].max()) * len(batch) for batch in batches)

    bucketed = padded(bucketed_batches(lengths.tolist(), 4, seed=0, epoch=0))
    at_random = padded(list(np.random.default_rng(2).permutation(640).reshape(-1, 4)))
    assert bucketed < 1.1 * lengths.sum() < at_random


# The stream


def stream(count: int = 11, batch_size: int = 3, seed: int = 5) -> ExampleBatches:
    return ExampleBatches(
        [of_length(5 + i, 10 * i + 1) for i in range(count)], batch_size, seed=seed
    )


def test_the_stream_is_the_same_wherever_it_is_entered():
    forward = [stream().indices(i).tolist() for i in range(12)]
    jumping = stream()
    for index in (11, 0, 7, 6, 2, 10):
        assert jumping.indices(index).tolist() == forward[index]
        batch = stream().batch(index)
        np.testing.assert_array_equal(batch.arrays["inputs"], jumping.batch(index).arrays["inputs"])
    per_epoch = 11 // 3
    for epoch in range(4):
        drawn = [i for batch in forward[epoch * per_epoch : (epoch + 1) * per_epoch] for i in batch]
        assert len(set(drawn)) == per_epoch * 3


def test_a_batch_holds_the_examples_its_indices_say():
    batches = stream()
    indices = batches.indices(4)
    expected = collate([batches.examples[i] for i in indices])
    for name, value in batches.batch(4).arrays.items():
        np.testing.assert_array_equal(value, expected.arrays[name])


@pytest.mark.parametrize("batches", [0, 1, 3, 4, 10])
def test_what_is_drawn_is_what_the_batches_hold_each_once(batches):
    first = stream()
    indices = [int(index) for batch in range(batches) for index in first.indices(batch)]
    expected = [first.examples[index] for index in dict.fromkeys(indices)]
    drawn = first.drawn(batches)
    assert len(drawn) == len(expected)
    assert all(found is wanted for found, wanted in zip(drawn, expected, strict=True))


def test_too_few_examples_for_a_batch_are_refused():
    with pytest.raises(
        ConchError, match=r"3 training examples cannot fill one batch of 4: .*--batch-size"
    ):
        stream(count=3, batch_size=4)
    assert len(stream(count=4, batch_size=4).indices(9)) == 4


def test_the_digest_of_a_stream_follows_data_order_batch_size_and_seed():
    first = stream()
    assert first.digest == stream().digest
    reversed_examples = ExampleBatches(list(first.examples)[::-1], 3, seed=5)
    others = [stream(count=10), stream(batch_size=2), stream(seed=6), reversed_examples]
    assert len({first.digest, *(other.digest for other in others)}) == 5


# Evaluation order


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40), batch_size=st.integers(1, 7))
def test_sequential_batches_take_every_example_once_sorted_by_length(lengths, batch_size):
    batches = sequential_batches([of_length(n) for n in lengths], batch_size)
    drawn = [int(index) for batch in batches for index in batch]
    assert sorted(drawn) == list(range(len(lengths)))
    assert [lengths[i] for i in drawn] == sorted(lengths)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(-1, 10), (0, 0), (1, 1), (2, 2), (3, 3), (9, 9), (10, 10), (99, 10)],
)
def test_a_limit_takes_so_many_batches_spread_over_the_lengths(limit, expected):
    chosen = [of_length(n) for n in range(2, 32)]
    batches = sequential_batches(chosen, 3, limit)
    assert len(batches) == expected
    assert len({tuple(batch) for batch in batches}) == expected
    if expected >= 2:
        assert batches[0][0] == 0 and batches[-1][-1] == 29
