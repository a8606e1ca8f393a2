"""Soft targets in few bytes: kept ids by how often they are kept, log-probabilities in few bits.

Knows arrays of kept tokens; nothing of teachers, texts or files. Another way to write a row is
another pair of `_written` and `_read`, and a new format in `target_shards`.

Of a row's kept tokens the set is stored, not their order: their ranks by frequency within the
shard, ascending, as gaps. A log-probability is the root of its distance to the row's likeliest, in
equal steps, so that steps are finest where the probability is. Exact, in float32, stay the rest at
every temperature and the text's own token. From the rest follows what the kept tokens have
together, so that all outcomes add up to 1 at each temperature.
"""

import lzma
from collections.abc import Sequence
from typing import Any

import numpy as np

BLOCK = 256
MOST_BITS = 8
# More than any vocabulary has.
MOST_IDS = 2**24
_FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 0, "pb": 0, "dict_size": 2**20}
]
Arrays = dict[str, np.ndarray]


def encode(arrays: Arrays, bits: int) -> Arrays:
    """Write rows of kept tokens.

    Args:
        arrays: Of `outcomes.compress`, with at least one kept token; all finite but the rest.
        bits: Of each log-probability, 1 to 8.

    Returns:
        `ids`: the kept ids, most frequent first; `blocks`: the rows, 256 at a time; both uint8.
        `ends` int64: where each block ends. `rows` int64 `[1]`: of all blocks.
    """
    counts = np.bincount(arrays["kept_ids"].ravel())
    ids = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    ranks = np.zeros(len(counts), np.int64)
    ranks[ids] = np.arange(len(ids))
    blocks = []
    for start in range(0, len(arrays["kept_ids"]), BLOCK):
        part = {name: value[start : start + BLOCK] for name, value in arrays.items()}
        blocks.append(_written(part, ranks, bits))
    table = _packed([_bytes_of(_zigzag(np.diff(ids, prepend=0)))])
    return {
        "ids": np.frombuffer(table, np.uint8),
        "blocks": np.frombuffer(b"".join(blocks), np.uint8),
        "ends": np.cumsum([len(block) for block in blocks], dtype=np.int64),
        "rows": np.array([len(arrays["kept_ids"])]),
    }


class Decoder:
    """Reads what `encode` wrote.

    Args:
        stored: Its arrays.
        top_k: Kept tokens of a row.
        temperatures: Of the rest, ascending.
        bits: Of each log-probability.

    Attributes:
        rows: Of all blocks.

    Raises:
        ValueError, lzma.LZMAError: The arrays are broken.
    """

    def __init__(
        self, stored: Arrays, *, top_k: int, temperatures: Sequence[float], bits: int
    ) -> None:
        self._blocks, self._ends = stored["blocks"], stored["ends"]
        self._top_k, self._temperatures, self._bits = top_k, tuple(temperatures), bits
        self.rows = int(stored["rows"][0])
        table = _unpacked(stored["ids"].tobytes(), 4 * MOST_IDS)
        values = np.frombuffer(table, np.uint8).reshape(4, -1)
        self._ids = np.cumsum(_unzigzag(_number_of(values)))

    def block(self, number: int) -> Arrays:
        """The arrays of `outcomes.compress` of 256 rows, likeliest token first; fewer at last."""
        start = int(self._ends[number - 1]) if number else 0
        rows = min(BLOCK, self.rows - number * BLOCK)
        most = 1 + rows * (self._top_k * 4 + 2 + 4 * (len(self._temperatures) + 1))
        content = _unpacked(self._blocks[start : int(self._ends[number])].tobytes(), most)
        return self._read(content, rows)

    def _read(self, content: bytes, rows: int) -> Arrays:
        gap_bytes = content[0]
        values = np.frombuffer(content, np.uint8, offset=1)
        cells, floats = rows * self._top_k, rows * (len(self._temperatures) + 1)
        sizes = [gap_bytes * cells, cells, 2 * rows, 4 * floats]
        gaps, codes, spread, exact = np.split(values, np.cumsum(sizes)[:-1])
        if len(exact) != sizes[-1]:
            raise ValueError(f"a block of {len(values)} bytes is not of {rows} rows")
        ranks = np.cumsum(_number_of(gaps.reshape(gap_bytes, rows, -1)).astype(np.int64) + 1, 1) - 1
        ranges = _number_of(spread.reshape(2, -1)).astype(np.uint16).view(np.float16)
        numbers = np.ascontiguousarray(_number_of(exact.reshape(4, -1)).astype(np.uint32))
        floats_of = numbers.view(np.float32).reshape(rows, -1)
        return _outcomes(
            self._ids[ranks],
            codes.reshape(rows, -1),
            ranges[:, None],
            floats_of[:, :-1],
            floats_of[:, -1],
            temperatures=self._temperatures,
            bits=self._bits,
        )


def rounded(arrays: Arrays, bits: int, temperatures: Sequence[float]) -> Arrays:
    """What `encode` and `Decoder` make of rows, to the bit, without writing them."""
    steps, ranges = _steps(arrays["kept_log_probs"], bits)
    return _outcomes(
        arrays["kept_ids"].astype(np.int64),
        steps,
        ranges,
        arrays["log_rest"],
        arrays["gold_log_prob"],
        temperatures=temperatures,
        bits=bits,
    )


def _steps(log_probs: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities `[n, K]` in steps, and each row's range float16 `[n, 1]`."""
    log_probs = log_probs.astype(np.float64)
    distances = log_probs.max(axis=1, keepdims=True) - log_probs
    # What is further below the likeliest has no probability that a float could tell.
    ranges = distances.max(axis=1, keepdims=True).clip(max=6e4).astype(np.float16)
    highest = 2**bits - 1
    shares = distances / np.where(ranges > 0, ranges, 1)
    steps = np.rint(np.sqrt(shares) * highest).clip(0, highest).astype(np.int64)
    # So that the likeliest is told from the others.
    first = np.arange(steps.shape[1]) == log_probs.argmax(1)[:, None]
    return np.where(first, 0, steps.clip(1)), ranges


def _outcomes(
    ids: np.ndarray,
    steps: np.ndarray,
    ranges: np.ndarray,
    rest: np.ndarray,
    gold: np.ndarray,
    *,
    temperatures: Sequence[float],
    bits: int,
) -> Arrays:
    """The arrays of `outcomes.compress` of ids and steps in any order."""
    order = np.argsort(steps.astype(np.int64) * MOST_IDS + ids, axis=1)
    ids = np.take_along_axis(ids, order, axis=1)
    steps = np.take_along_axis(steps, order, axis=1)
    distances = np.square(steps / np.float64(2**bits - 1)) * ranges
    # What the kept tokens have together at each temperature, from what is left to the others.
    together = np.log(-np.expm1(rest.astype(np.float64)))
    at_one = list(temperatures).index(1.0)
    kept = -distances - _log_sum(-distances) + together[:, [at_one]]
    normalizers = [
        _log_sum(kept / t) - together[:, [column]] for column, t in enumerate(temperatures)
    ]
    return {
        "kept_ids": ids.astype(np.uint32),
        "kept_log_probs": kept.astype(np.float32),
        "log_normalizer": np.concatenate(normalizers, axis=1).astype(np.float32),
        "log_rest": rest,
        "gold_log_prob": gold,
    }


def _written(arrays: Arrays, ranks: np.ndarray, bits: int) -> bytes:
    kept = ranks[arrays["kept_ids"]]
    order = np.argsort(kept, axis=1)
    gaps = np.diff(np.take_along_axis(kept, order, axis=1), axis=1, prepend=-1) - 1
    steps, ranges = _steps(arrays["kept_log_probs"], bits)
    steps = np.take_along_axis(steps, order, axis=1)
    gap_bytes = 1 + int(gaps.max() >= 2**8) + int(gaps.max() >= 2**16)
    exact = np.column_stack([arrays["log_rest"], arrays["gold_log_prob"]]).astype(np.float32)
    parts = [
        bytes([gap_bytes]),
        _bytes_of(gaps, gap_bytes),
        _bytes_of(steps, 1),
        _bytes_of(ranges.view(np.uint16), 2),
        _bytes_of(exact.view(np.uint32)),
    ]
    return _packed(parts)


def _packed(parts: Sequence[bytes]) -> bytes:
    return lzma.compress(b"".join(parts), lzma.FORMAT_RAW, filters=_FILTERS)


def _unpacked(content: bytes, most: int) -> bytes:
    """What was packed, of so many bytes at most."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    return reader.decompress(content, most)


def _bytes_of(numbers: np.ndarray, count: int = 4) -> bytes:
    """Whole numbers as all their lowest bytes, then all their next ones, which compress better."""
    low_first = np.ascontiguousarray(numbers).astype("<u4").view(np.uint8)
    return low_first.reshape(-1, 4).T[:count].tobytes()


def _number_of(planes: np.ndarray) -> np.ndarray:
    """The numbers of their bytes `[count, …]`, lowest first."""
    found = planes[0].astype(np.uint32)
    for number, plane in enumerate(planes[1:], 1):
        found |= plane.astype(np.uint32) << np.uint32(8 * number)
    return found


def _zigzag(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers of either sign as ones of none, small where they are small."""
    return np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)


def _unzigzag(numbers: np.ndarray) -> np.ndarray:
    numbers = numbers.astype(np.int64)
    return np.where(numbers % 2, -(numbers + 1) // 2, numbers // 2)


def _log_sum(values: np.ndarray) -> np.ndarray:
    largest = values.max(axis=1, keepdims=True)
    result: np.ndarray = largest + np.log(np.exp(values - largest).sum(axis=1, keepdims=True))
    return result
