"""Rows of kept tokens written in few bytes and read again."""

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.training.data import target_codec
from conch_dna.training.data.outcomes import compress
from conch_dna.training.data.target_codec import BLOCK, Decoder, encode

Arrays = dict[str, np.ndarray]
TEMPERATURES = (0.5, 1.0, 2.0)


def rows(count: int, *, tokens: int = 300, top_k: int = 24, spread: float = 3.0) -> Arrays:
    """What a teacher that prefers the first tokens says at some positions."""
    random = np.random.default_rng(count)
    logits = random.normal(0, spread, (count, tokens)) - 0.02 * np.arange(tokens)
    labels = mx.array(random.integers(0, tokens, count))
    found = compress(
        mx.array(logits.astype(np.float32)), labels, top_k=top_k, temperatures=TEMPERATURES
    )
    return {name: np.asarray(value) for name, value in found.items()}


def read(stored: Arrays, given: Arrays, bits: int, **changes: Any) -> Arrays:
    top_k = given["kept_ids"].shape[1]
    options = {"top_k": top_k, "temperatures": TEMPERATURES, "bits": bits}
    decoder = Decoder(stored, **{**options, **changes})
    blocks = [decoder.block(number) for number in range(len(stored["ends"]))]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def by_id(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of each row in the order of the ids."""
    order = np.argsort(arrays["kept_ids"], axis=1)
    ids, log_probs = (
        np.take_along_axis(arrays[name], order, axis=1) for name in ("kept_ids", "kept_log_probs")
    )
    return ids, log_probs


@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 9])
def test_what_is_read_is_near_to_what_was_written(count: int, bits: int) -> None:
    given = rows(count)
    found = read(encode(given, bits), given, bits)
    ids, log_probs = by_id(given)
    found_ids, found_log_probs = by_id(found)
    np.testing.assert_array_equal(found_ids, ids)
    np.testing.assert_array_equal(found["kept_ids"][:, 0], given["kept_ids"][:, 0])
    for name in ("log_rest", "gold_log_prob"):
        np.testing.assert_array_equal(found[name], given[name])
    # Half a step of the root at the least likely one, where steps are widest, and what the errors
    # of all change in the whole.
    ranges = np.ptp(given["kept_log_probs"], axis=1)
    widest = 1.3 * ranges / (2**bits - 1) + 0.02
    assert (np.abs(found_log_probs - log_probs).max(axis=1) < widest).all()
    for column, t in enumerate(TEMPERATURES):
        sums = np.exp(found["kept_log_probs"] / t - found["log_normalizer"][:, [column]]).sum(1)
        np.testing.assert_allclose(sums + np.exp(found["log_rest"][:, column]), 1, atol=1e-5)


def test_more_bits_are_nearer() -> None:
    given = rows(400)
    _, exact = by_id(given)
    errors = []
    for bits in (4, 5, 6, 7, 8):
        _, found = by_id(read(encode(given, bits), given, bits))
        errors.append(float((np.exp(exact) * (exact - found)).sum(1).mean()))
    assert errors == sorted(errors, reverse=True) and errors[-2] < 1e-4
    # A step half as wide has a quarter of the error.
    assert all(2 < first / second < 8 for first, second in pairwise(errors))


@pytest.mark.parametrize(
    "shape", [{"top_k": 1}, {"top_k": 300}, {"spread": 0.0}, {"spread": 1e5}, {"tokens": 70_000}]
)
def test_rows_of_every_shape(shape: dict[str, Any]) -> None:
    """One kept token, all of them, all alike, hardly any probability, gaps of three bytes."""
    given = rows(30, **shape)
    found = read(encode(given, 7), given, 7)
    np.testing.assert_array_equal(by_id(found)[0], by_id(given)[0])
    np.testing.assert_array_equal(found["kept_ids"][:, 0], given["kept_ids"][:, 0])
    assert np.isfinite(found["kept_log_probs"]).all()
    np.testing.assert_array_equal(found["log_rest"], given["log_rest"])


def test_a_block_that_is_not_of_its_rows_is_refused() -> None:
    given = rows(40)
    stored = encode(given, 7)
    for changes in ({"top_k": 25}, {"temperatures": (1.0,)}):
        with pytest.raises(ValueError):
            read(stored, given, 7, **changes)
    with pytest.raises(ValueError):
        read({**stored, "rows": np.array([41])}, given, 7)


def test_no_more_is_unpacked_than_rows_can_take() -> None:
    """A small file that would become large is cut off, and then is not of its rows."""
    given = rows(40)
    stored = encode(given, 7)
    bomb = np.frombuffer(target_codec._packed([bytes(10**8)]), np.uint8)
    stored |= {"blocks": bomb, "ends": np.array([len(bomb)])}
    with pytest.raises(ValueError):
        read(stored, given, 7)
