"""Files of a teacher's targets: rows of many texts, in as few bytes as asked, whole or refused.

Knows safetensors and the codec; nothing of models or examples. To add a format: a class with
`read`, its line in `_FORMATS`, and who writes it in `write_shard`.
"""

import json
import lzma
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conch_dna.checkpoints import content_digest, parse_json, save_arrays
from conch_dna.errors import ConchError, NotWholeError, one_line
from conch_dna.training.data.outcomes import TargetIdentity
from conch_dna.training.data.target_codec import BLOCK, Decoder, encode, rounded

EXACT, COMPACT = "soft targets 1", "soft targets 2"
# Decoded blocks of a shard that stay in memory: at 64 kept tokens some 4 MB.
RECENT_BLOCKS = 32
Arrays = dict[str, np.ndarray]


class Shard(Protocol):
    """An open file of rows."""

    def read(self, start: int, end: int) -> Arrays:
        """The arrays of `outcomes.compress` of some rows."""


class RoundedShard:
    """Rows as they are, told as if they had been written in few bits."""

    def __init__(self, shard: Shard, identity: TargetIdentity) -> None:
        self._shard, self._identity = shard, identity

    def read(self, start: int, end: int) -> Arrays:
        """See `Shard`."""
        identity = self._identity
        return rounded(self._shard.read(start, end), identity.bits, identity.temperatures)


class ExactShard:
    """Rows as they are, in float32."""

    def __init__(self, file: Any, identity: TargetIdentity, rows: int) -> None:
        self._file, self._names = file, identity.arrays
        _require_rows(file.get_slice(self._names[-1]).get_shape()[0], rows)

    def read(self, start: int, end: int) -> Arrays:
        """See `Shard`; only these rows are read."""
        return {name: self._file.get_slice(name)[start:end] for name in self._names}


def _require_rows(there: int, listed: int) -> None:
    if there != listed:
        raise ValueError(f"{there} rows, not {listed}")


class CompactShard:
    """Rows in blocks, see `target_codec`."""

    def __init__(self, file: Any, identity: TargetIdentity, rows: int) -> None:
        decoder = Decoder(
            {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            top_k=identity.top_k,
            temperatures=identity.temperatures,
            bits=identity.bits,
        )
        _require_rows(decoder.rows, rows)
        self._block = lru_cache(RECENT_BLOCKS)(decoder.block)

    def read(self, start: int, end: int) -> Arrays:
        """See `Shard`; the blocks that hold these rows are decoded, or were shortly before."""
        numbers = range(start // BLOCK, max(start, end - 1) // BLOCK + 1)
        try:
            blocks = [self._block(number) for number in numbers]
        except (ValueError, IndexError, lzma.LZMAError) as error:
            raise NotWholeError(f"a block of soft targets cannot be read: {error}") from error
        first = numbers[0] * BLOCK
        return {
            name: np.concatenate([block[name] for block in blocks])[start - first : end - first]
            for name in blocks[0]
        }


_FORMATS: dict[str, type[ExactShard] | type[CompactShard]] = {
    EXACT: ExactShard,
    COMPACT: CompactShard,
}


def write_shard(
    path: Path, identity: TargetIdentity, texts: Sequence[tuple[str, int]], rows: Arrays
) -> None:
    """Write the rows of some texts.

    Args:
        path: Of the file.
        identity: What they depend on, and in how many bits their log-probabilities are written.
        texts: Of each text in order its digest and how many rows it has.
        rows: Arrays of `outcomes.compress`, all texts behind each other.
    """
    import mlx.core as mx

    ends = np.cumsum([count for _, count in texts]).tolist()
    entries = [[key, end - count, end] for (key, count), end in zip(texts, ends, strict=True)]
    listing = json.dumps(entries)
    metadata = {"format": EXACT, "identity": identity.digest, "entries": listing}
    if identity.is_compact:
        metadata["format"] = COMPACT
        rows = encode(rows, identity.bits)
    metadata["digest"] = _data_digest(listing, rows)
    save_arrays(path, {name: mx.array(value) for name, value in rows.items()}, metadata)


def open_shard(path: Path, identity: TargetIdentity) -> tuple[Shard, list[tuple[str, int, int]]]:
    """Open a file, once its content was compared with the digest in its header.

    Returns:
        It, and of each text in it its digest, its first row and one after its last.

    Raises:
        NotWholeError: It is truncated, unreadable or altered.
        ConchError: It cannot be opened, or is of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        metadata = require_digest(path)
        if metadata["format"] not in _FORMATS:
            raise ConchError(
                f"cache shard {path} is of the format {one_line(metadata['format'])}, which this "
                "version does not know; it is left alone"
            )
        file = safe_open(str(path), framework="numpy")
        listing = metadata["entries"]
        if metadata["identity"] != identity.digest:
            raise NotWholeError(f"cache shard {path} is of another teacher or other settings")
        entries = parse_json(listing, path)
        if not are_entries(entries):
            raise NotWholeError(f"cache shard {path} does not say whose its rows are")
        shard = _FORMATS[metadata["format"]](file, identity, entries[-1][2])
    except (SafetensorError, KeyError, ValueError, IndexError, lzma.LZMAError) as error:
        raise NotWholeError(f"cache shard {path} is truncated or unreadable") from error
    return shard, [tuple(entry) for entry in entries]


def require_digest(path: Path) -> dict[str, str]:
    """Compare a file's content with the digest in its header.

    Returns:
        Its header's metadata.

    Raises:
        NotWholeError: It is truncated, unreadable or altered.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConchError(f"cannot open cache shard {path}: {error.strerror}") from error
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        whole = metadata["digest"] == _data_digest(metadata["entries"], arrays)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise NotWholeError(f"cache shard {path} is truncated or unreadable") from error
    if not whole:
        raise NotWholeError(f"cache shard {path} was altered")
    return metadata


def _data_digest(listing: str, arrays: Arrays) -> str:
    # In the order in which they were always digested, which is not that of their names.
    order = ("kept_ids", "kept_log_probs", "log_normalizer", "log_rest", "gold_log_prob")
    names = [name for name in order if name in arrays]
    names += sorted(arrays.keys() - names)
    chosen = [arrays[name] for name in names]
    parts = (part for a in chosen for part in (str(a.dtype), a.tobytes()))
    return content_digest(listing, *parts)


def are_entries(entries: Any) -> bool:
    """Whether something is digests of texts with their first rows and one after their last."""
    if not isinstance(entries, list) or not entries:
        return False
    end = 0
    for entry in entries:
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, int, int]:
            return False
        if not end == entry[1] <= entry[2]:
            return False
        end = entry[2]
    return True
