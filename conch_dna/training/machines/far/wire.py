"""What a teacher's server and a far student say to each other beyond OpenAI's API, as JSON.

Knows examples and arrays; nothing of HTTP or models. Another figure of a position needs nothing
here: arrays go by their names.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.training.batches import Example
from conch_dna.training.data.outcomes import TargetIdentity

# Of `GET /teacher` and of what is asked for; a server that speaks another says so.
FORMAT = 1
# By which rounding may lift a log-probability above 0, or move the sum of all probabilities from 1.
SLACK = 1e-3


def counted_runs(example: Example) -> list[list[int]]:
    """Where tokens count, as beginnings and ends."""
    edges = np.flatnonzero(np.diff(example.counted.astype(np.int8), prepend=0, append=0))
    return [[int(start), int(end)] for start, end in edges.reshape(-1, 2)]


def example_of(ids: Sequence[int], runs: Sequence[Sequence[int]], name: str) -> Example:
    """A text whose tokens count in these runs.

    Raises:
        ConchError: A run lies outside, or the first token counts.
    """
    counted = np.zeros(len(ids), bool)
    for start, end in runs:
        if not 1 <= start < end <= len(ids):
            raise ConchError(
                f"{name} has {len(ids)} tokens, and what counts is {start} to {end}: give places "
                "from 1 on, which is the second token"
            )
        counted[start:end] = True
    return Example(np.array(ids, np.int32), counted, name)


def asked_of(identity: TargetIdentity) -> dict[str, Any]:
    """What a server has to know of the targets that it is asked for."""
    return {
        "top_k": identity.top_k,
        "temperatures": list(identity.temperatures),
        "kept_below": identity.kept_below,
        "draws": identity.draws,
    }


def packed(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as JSON: type, shape, and bytes in base64."""
    return {
        name: {
            "type": value.dtype.name,
            "shape": list(value.shape),
            "data": base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii"),
        }
        for name, value in arrays.items()
    }


def unpacked(
    fields: Any, identity: TargetIdentity, rows: int, server: str
) -> dict[str, np.ndarray]:
    """The arrays that `packed` packed, checked: a server may be another than it says.

    Args:
        fields: What came.
        identity: Of the targets that were asked for.
        rows: Of each array.
        server: What messages call the one that sent it.

    Raises:
        ConchError: It is not what was asked for.
    """
    found: dict[str, np.ndarray] = {}
    try:
        for name in identity.arrays:
            each = fields[name]
            kind = np.dtype(identity.id_type if name.endswith("_ids") else np.float32)
            shape = [rows, *identity.row_shape(name)]
            if each["type"] != kind.name or each["shape"] != shape:
                raise ValueError(f"{name} is {each['type']!r:.20} of {each['shape']!r:.40}")
            data = base64.b64decode(each["data"], validate=True)
            found[name] = array = np.frombuffer(data, kind).reshape(shape)
            if not _possible(name, array, identity):
                raise ValueError(f"{name} has impossible values")
        if identity.top_k and not _are_outcomes(found, identity):
            raise ValueError("the kept tokens and their rest are no distribution")
    except (KeyError, TypeError, ValueError) as error:
        raise ConchError(
            f"{server} sent targets that are not what was asked for ({error}): use the same "
            "version of conch_dna on both machines"
        ) from error
    return found


def _possible(name: str, array: np.ndarray, identity: TargetIdentity) -> bool:
    if name == "kept_ids":
        return bool((array < identity.kept_below).all())
    if name == "drawn_ids":
        return bool((array < identity.vocabulary_size).all())
    # Nothing is left for the rest where all tokens are kept.
    finite = name == "log_rest" or bool(np.isfinite(array).all())
    return finite and (name == "log_normalizer" or bool((array <= SLACK).all()))


def _are_outcomes(found: Mapping[str, np.ndarray], identity: TargetIdentity) -> bool:
    """Whether no token is kept twice, and all outcomes add up to 1 at each temperature."""
    ids = np.sort(found["kept_ids"], axis=1)
    sound = bool((ids[:, 1:] > ids[:, :-1]).all())
    kept, normalizer, rest = (
        found[name].astype(np.float64) for name in ("kept_log_probs", "log_normalizer", "log_rest")
    )
    for column, t in enumerate(identity.temperatures):
        with np.errstate(over="ignore"):
            shares = np.exp(kept / t - normalizer[:, [column]]).sum(1) + np.exp(rest[:, column])
        sound = sound and bool((abs(shares - 1) <= SLACK).all())
    return sound
