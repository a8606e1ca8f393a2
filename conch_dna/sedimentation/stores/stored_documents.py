"""How a document lies in a store: its key, its reserved fields, its vector's digest.

Knows neither versions nor Qdrant's ways. To keep one more thing with each document: `to_stored`
and `as_given`, under a field that begins with the reserved prefix.
"""

import hashlib
import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.documents import DocumentId
from conch_dna.sedimentation.stores.filters import LARGEST, PREFIX, boolean_fields, is_unicode

ID = f"{PREFIX}id"
DIGEST = f"{PREFIX}digest"
NAMESPACE = uuid.UUID("7f1d3c52-6a0b-5a43-9c58-0d1f0c0a6e11")
# How far the length of a unit vector in float32 may be from 1.
LENGTH_TOLERANCE = 1e-3
# Lists and objects within each other. Qdrant Edge acknowledges more than 128 and cannot read its
# shard any more.
MOST_LEVELS = 64


class Record(NamedTuple):
    """A stored document: its payload with reserved fields, and a vector or a score if asked for."""

    key: str
    payload: Mapping[str, Any]
    vector: Any = None
    score: float = 0.0


def id_text(identifier: DocumentId) -> str:
    """An id as text that keeps its type: `i1` for 1, `s1` for "1"."""
    if isinstance(identifier, str):
        return f"s{identifier}"
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        return f"i{identifier}"
    raise ConchError(
        f"id {identifier!r} is of type {type(identifier).__name__}: give a text or an integer"
    )


def key_of(identifier: DocumentId) -> str:
    """The point's key: UUID 5 of type and id, as Qdrant takes no texts."""
    try:
        return str(uuid.uuid5(NAMESPACE, id_text(identifier)))
    except UnicodeEncodeError as error:
        raise ConchError(f"id {identifier!r} is no valid Unicode text") from error


def keys_of(ids: Sequence[DocumentId]) -> list[str]:
    """The keys of ids, each of which must be there once.

    Raises:
        ConchError: An id comes twice, or is neither text nor integer.
    """
    keys = [key_of(identifier) for identifier in ids]
    if len(set(keys)) < len(keys):
        twice = next(ids[n] for n, key in enumerate(keys) if key in keys[:n])
        raise ConchError(f"id {twice!r} comes twice in one batch: give each document once")
    return keys


def to_stored(identifier: DocumentId, payload: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """A payload with the reserved fields.

    Raises:
        ConchError: See `check_payload`.
    """
    check_payload(identifier, payload)
    return {**payload, ID: id_text(identifier), DIGEST: digest, **boolean_fields(payload)}


def check_payload(identifier: DocumentId, payload: Mapping[str, Any]) -> None:
    """Refuse a payload that a store could not give back.

    Raises:
        ConchError: A field has the reserved prefix, a value would not come back as given, or it
            is nested deeper than MOST_LEVELS.
    """
    for field in payload:
        if isinstance(field, str) and field.startswith(PREFIX):
            raise ConchError(
                f"document {identifier!r}: payload field {field!r} begins with {PREFIX}, which "
                "is reserved: rename it"
            )
    if (wrong := _not_plain(payload)) is not None:
        raise ConchError(
            f"document {identifier!r}: payload holds {wrong}, which would not come back as "
            "given: use texts, finite numbers of at most 64 bits, booleans, None, lists and dicts "
            f"of at most {MOST_LEVELS} levels"
        )


def stored_id(stored: Mapping[str, Any]) -> DocumentId:
    """The id as it was given."""
    return id_of(stored[ID])


def id_of(text: str) -> DocumentId:
    """The id of which `id_text` made this."""
    return int(text[1:]) if text.startswith("i") else text[1:]


def as_given(records: Iterable[Record]) -> tuple[list[DocumentId], list[dict[str, Any]]]:
    """The ids and the payloads of records, as they were given."""
    ids, payloads = [], []
    for each in records:
        ids.append(stored_id(each.payload))
        payloads.append({f: v for f, v in each.payload.items() if not f.startswith(PREFIX)})
    return ids, payloads


def _not_plain(value: Any, levels: int = MOST_LEVELS) -> str | None:
    """The first thing within a value that a store would change or choke on; None if there is none.

    Args:
        value: Any.
        levels: How many lists and objects may lie within each other.
    """
    if value is None or isinstance(value, bool):
        return None
    if type(value) is str:
        return None if is_unicode(value) else f"the invalid text {value!r}"
    if type(value) is int:
        return None if -LARGEST <= value < LARGEST else f"the integer {value}"
    if type(value) is float:
        return None if math.isfinite(value) else f"the number {value}"
    if not levels and isinstance(value, (list, Mapping)):
        return f"more than {MOST_LEVELS} levels of lists and objects"
    inside: Iterable[Any]
    if type(value) is list:
        inside = value
    elif isinstance(value, Mapping):
        for key in value:
            if type(key) is not str or not is_unicode(key):
                return f"the field {key!r}"
        inside = value.values()
    else:
        return f"{value!r} of type {type(value).__name__}"
    return next((wrong for v in inside if (wrong := _not_plain(v, levels - 1)) is not None), None)


def checked_rows(vectors: Any, *, count: int | None, dimension: int, what: str) -> np.ndarray:
    """Unit rows, float32 `[count, dimension]`; nothing is scaled.

    Raises:
        ConchError: The shape is another, or a row is not finite or not of length 1.
    """
    rows = np.ascontiguousarray(vectors, np.float32)
    if rows.ndim != 2 or (count is not None and len(rows) != count) or rows.shape[1] != dimension:
        needed = f"[{'N' if count is None else count}, {dimension}]"
        raise ConchError(f"{what} have shape {list(rows.shape)}, but {needed} is needed")
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    # Written so that NaN is refused too.
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= LENGTH_TOLERANCE))
    if len(wrong):
        raise ConchError(
            f"{len(wrong)} of {len(rows)} {what} do not have length 1, the first is number "
            f"{wrong[0] + 1} with {lengths[wrong[0]]:g}: pass them through `unit`"
        )
    return rows


def coarse(value: Any) -> Any:
    """A payload with its floats at six digits: Qdrant gives back some with another last bit."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return {name: coarse(inside) for name, inside in value.items()}
    return [coarse(each) for each in value] if isinstance(value, list) else value


class ContentSum:
    """Digest of a set of ids and vectors, or payloads, that does not depend on their order.

    The sum, modulo 2²⁵⁶, of SHA-256 over the id with its type and the vector's float32 bytes or
    the payload's JSON, floats at six digits. Whoever writes a version can add up what it writes
    and hand the result to `activate`; what is replaced or deleted is taken off again.

    Args:
        count: Of the documents counted in already.
        digest: Of them.
    """

    def __init__(self, count: int = 0, digest: str = "0") -> None:
        self.count = count
        self._sum = int(digest, 16)

    def add(
        self, ids: Sequence[DocumentId], contents: np.ndarray | Sequence[Mapping[str, Any]]
    ) -> None:
        """Count in documents, none of which was counted before; vectors `[n, D]` or payloads."""
        rows: Iterable[bytes]
        if isinstance(contents, np.ndarray):
            rows = (row.tobytes() for row in np.ascontiguousarray(contents, "<f4"))
        else:
            rows = (json.dumps(coarse(each), sort_keys=True).encode() for each in contents)
        for identifier, row in zip(ids, rows, strict=True):
            name = id_text(identifier).encode()
            content = len(name).to_bytes(8, "little") + name + row
            self._sum += int.from_bytes(hashlib.sha256(content).digest(), "little")
        self.count += len(ids)

    def __add__(self, other: "ContentSum") -> "ContentSum":
        return ContentSum(self.count + other.count, f"{(self._sum + other._sum) % 2**256:x}")

    def __sub__(self, other: "ContentSum") -> "ContentSum":
        return ContentSum(self.count - other.count, f"{(self._sum - other._sum) % 2**256:x}")

    def hexdigest(self) -> str:
        """The digest so far, 64 hexadecimal digits."""
        return f"{self._sum % 2**256:064x}"

    def to_json(self) -> dict[str, Any]:
        """What `ContentSum(**document)` is made of."""
        return {"count": self.count, "digest": self.hexdigest()}
