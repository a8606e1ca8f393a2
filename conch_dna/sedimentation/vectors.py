"""Unit vectors: the one form in which embeddings are kept and compared.

Knows arrays; nothing of texts, stores or models. Cosine similarity is the dot product of two rows.
"""

from typing import Any

import numpy as np

from conch_dna.errors import ConchError


def unit(vectors: Any, *, what: str = "vectors") -> np.ndarray:
    """Rows scaled to length 1.

    Args:
        vectors: `[N, D]`, any float type.
        what: What they are, for the message.

    Returns:
        float32 `[N, D]`, contiguous.

    Raises:
        ConchError: A row has a value that is not finite, or is all zero; its number is named.

    >>> unit([[3.0, 4.0]]).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    rows = np.asarray(vectors, np.float64)
    if rows.ndim != 2:
        raise ConchError(f"{what} have shape {list(rows.shape)}: give a table [N, D]")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        raise ConchError(
            f"{len(broken)} of {len(rows)} {what} hold values that are not finite, the first is "
            f"number {broken[0] + 1}: look at what made them"
        )
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    empty = np.flatnonzero(lengths[:, 0] == 0)
    if len(empty):
        raise ConchError(
            f"{len(empty)} of {len(rows)} {what} are all zero, the first is number "
            f"{empty[0] + 1}: they have no direction to compare"
        )
    return np.ascontiguousarray((rows / lengths).astype(np.float32))
