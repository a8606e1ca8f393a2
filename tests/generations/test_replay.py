"""The sample of earlier data, and its share in every epoch of a stream."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conch_dna.errors import ConchError
from conch_dna.generations.replay import ReplayBatches, create_replay_buffer
from conch_dna.training.batches import Example, ExampleBatches


def records(name: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{name} {number}"} for number in range(count)]


def generation_of(record: dict[str, Any]) -> str:
    return str(record["text"].split()[0])


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    size=st.integers(0, 60),
    seed=st.integers(0, 3),
)
def test_a_sample_is_as_even_as_the_generations_allow(
    counts: list[int], size: int, seed: int
) -> None:
    previous = {f"G{number}": records(f"G{number}", count) for number, count in enumerate(counts)}
    if size and not sum(counts):
        with pytest.raises(ConchError, match="replay is empty"):
            create_replay_buffer(previous, size, seed=seed)
        return
    drawn = create_replay_buffer(previous, size, seed=seed)
    assert len(drawn) == min(size, sum(counts))
    assert len({record["text"] for record in drawn}) == len(drawn), "none twice"
    shares = Counter(map(generation_of, drawn))
    for name, count in zip(previous, counts, strict=True):
        # Who has fewer than another has given all there is.
        fewer = [n for n in previous if shares[n] > shares[name] + 1]
        assert not fewer or shares[name] == count


def test_the_same_seed_draws_the_same_and_another_another() -> None:
    previous = {"G000": records("G000", 50)}
    first, second, other = (create_replay_buffer(previous, 10, seed=s) for s in (1, 1, 2))
    assert first == second != other


def test_a_later_generation_does_not_change_the_sample_of_an_earlier_one() -> None:
    one = {"G000": records("G000", 50)}
    two = {**one, "G001": records("G001", 50)}
    drawn = [r for r in create_replay_buffer(two, 20, seed=4) if generation_of(r) == "G000"]
    assert drawn == create_replay_buffer(one, 10, seed=4)


def test_a_first_generation_has_nothing_to_replay() -> None:
    assert create_replay_buffer({}, 10) == []


def test_a_sample_of_fewer_than_none_is_refused() -> None:
    with pytest.raises(ConchError, match="-1 records cannot be drawn"):
        create_replay_buffer({}, -1)


def examples(count: int, first: int = 0) -> list[Example]:
    found = []
    for number in range(first, first + count):
        ids = np.full(4 + number % 7, number, np.int32)
        found.append(Example(ids, np.arange(len(ids)) > 0, f"example {number}"))
    return found


def epoch_of(stream: ExampleBatches, epoch: int) -> list[int]:
    start = epoch * stream.batches_per_epoch
    numbers = range(start, start + stream.batches_per_epoch)
    return [int(i) for n in numbers for i in stream.indices(n)]


@pytest.mark.parametrize(("new", "old", "share"), [(90, 40, 0.1), (60, 7, 0.25), (30, 50, 0.5)])
def test_every_epoch_has_its_share(new: int, old: int, share: float) -> None:
    stream = ReplayBatches(examples(new), examples(old, 1000), 5, share=share, seed=3)
    for epoch in range(3):
        indices = epoch_of(stream, epoch)
        replayed = sum(index >= new for index in indices)
        # What does not fill a batch may be new or replayed.
        assert replayed == pytest.approx(share * len(indices), abs=5)
        assert max(Counter(i for i in indices if i < new).values()) == 1


def test_all_are_replayed_before_one_comes_again() -> None:
    stream = ReplayBatches(examples(40), examples(10, 1000), 4, share=0.2, seed=0)
    assert stream.per_epoch == 10
    assert sorted(stream.replayed(0)) == sorted(stream.replayed(1)) == list(range(10))
    uneven = ReplayBatches(examples(28), examples(10, 1000), 5, share=0.2, seed=0)
    seen = np.concatenate([uneven.replayed(epoch) for epoch in range(10)])
    counts = Counter(seen.tolist())
    assert len(seen) == 70 and set(counts.values()) == {7}


def test_a_batch_is_the_same_in_every_run() -> None:
    streams = [ReplayBatches(examples(30), examples(9, 50), 4, seed=2) for _ in range(2)]
    for index in (0, 7, 31):
        for name, value in streams[0].batch(index).arrays.items():
            np.testing.assert_array_equal(value, streams[1].batch(index).arrays[name])


def test_the_digest_tells_what_is_new_and_how_much_is_replayed() -> None:
    new, old = examples(30), examples(9, 50)
    digests = {
        ReplayBatches(new, old, 4, seed=2).digest,
        ReplayBatches(new, old, 4, seed=2, share=0.2).digest,
        ReplayBatches([*new, old[0]], old[1:], 4, seed=2).digest,
        ReplayBatches(new, old, 4, seed=3).digest,
    }
    assert len(digests) == 4


def test_without_a_share_it_is_the_stream_of_new_examples() -> None:
    mixed = ReplayBatches(examples(20), [], 4, share=0.0, seed=5)
    plain = ExampleBatches(examples(20), 4, seed=5)
    assert [mixed.indices(n).tolist() for n in range(9)] == [
        plain.indices(n).tolist() for n in range(9)
    ]


@pytest.mark.parametrize(
    ("new", "old", "share", "message"),
    [
        (10, 3, 1.0, "share 1 is not at least 0 and below 1"),
        (10, 0, 0.1, "needs examples of earlier generations"),
        (2, 3, 0.1, "2 new and 0 replayed examples do not fill one batch of 4"),
    ],
)
def test_what_cannot_be_mixed_is_refused(new: int, old: int, share: float, message: str) -> None:
    with pytest.raises(ConchError, match=message):
        ReplayBatches(examples(new), examples(old, 100), 4, share=share, seed=0)
