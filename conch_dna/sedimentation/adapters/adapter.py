"""Adapters: the map that raw student vectors go through, the same for documents and queries.

Knows arrays and one folder format; nothing of models, stores or texts. The closed forms are in
closed_forms.py, the training of the residual network in residual.py. To add a kind: a name
in choices.KINDS, its arrays in `_expected_shapes`, a branch in `Adapter.apply`, and what fits it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.checkpoints import read_folder, write_folder
from conch_dna.digests import content_digest, provenance
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.adapters.closed_forms import sums_of
from conch_dna.sedimentation.config import KINDS
from conch_dna.sedimentation.embedders.contract import unit

ARRAYS_FILE = "adapter.safetensors"
ADAPTER_FILE = "adapter.json"
# Rows of the residual network's hidden layer that are in memory at once.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Adapter:
    """A map between spaces of unit vectors.

    The linear kinds give `normalize(x W + b)`. The residual kind gives, for u = normalize(x W + b)
    or u = x where it stands on the identity, `normalize(u + gelu(u W1 + b1) W2 + b2)`.

    Attributes:
        kind: One of KINDS.
        arrays: float32; `weight` `[D, E]` and `bias` `[E]` of the linear part (a low-rank one is
            kept folded into its start, so that a query costs one product), `inner_weight`
            `[E, H]`, `inner_bias` `[H]`, `outer_weight` `[H, E]`, `outer_bias` `[E]` of the
            network. The identity has none.
        in_dimension: D, of what it is given.
        out_dimension: E, of what it gives.
        figures: How it was fitted: numbers for a reader, no part of the digest.

    Raises:
        ConchError: The kind is unknown, or the arrays are not those of the kind and dimensions.

    >>> Adapter.identity(2).apply([[3.0, 4.0]]).round(1).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """

    kind: str
    arrays: Mapping[str, np.ndarray]
    in_dimension: int
    out_dimension: int
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConchError(f"adapter kind {self.kind!r} is none of {', '.join(KINDS)}")
        expected = self._expected_shapes()
        found = {name: array.shape for name, array in self.arrays.items()}
        if found != expected:
            raise ConchError(
                f"a {self.kind} adapter from {self.in_dimension} to {self.out_dimension} "
                f"dimensions needs arrays {expected}, not {found}"
            )
        broken = [name for name, array in self.arrays.items() if not np.isfinite(array).all()]
        if broken:
            raise ConchError(
                f"{', '.join(broken)} of the {self.kind} adapter hold values that are not finite: "
                "fit it again with a higher strength or a lower learning rate"
            )

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        source, target = self.in_dimension, self.out_dimension
        linear = {"weight": (source, target), "bias": (target,)}
        if self.kind == "identity":
            return {} if source == target else linear
        if self.kind != "residual":
            return linear
        # Its width is free, and so is whether it stands on the identity.
        shape = self.arrays["inner_weight"].shape if "inner_weight" in self.arrays else (0, 0)
        network: dict[str, tuple[int, ...]] = {
            "inner_weight": (target, shape[-1]),
            "inner_bias": (shape[-1],),
            "outer_weight": (shape[-1], target),
            "outer_bias": (target,),
        }
        stands_on_identity = "weight" not in self.arrays and source == target
        return network if stands_on_identity else {**linear, **network}

    @classmethod
    def identity(cls, dimension: int) -> "Adapter":
        """The adapter that changes nothing."""
        return cls("identity", {}, dimension, dimension)

    @classmethod
    def from_matrix(
        cls, kind: str, matrix: np.ndarray, figures: Mapping[str, Any] | None = None
    ) -> "Adapter":
        """A linear adapter from what `PairSums` solves.

        Args:
            kind: A linear one of KINDS.
            matrix: `[D + 1, E]`, its last row is the bias.
            figures: See the class.
        """
        arrays = {
            "weight": np.ascontiguousarray(matrix[:-1], np.float32),
            "bias": np.ascontiguousarray(matrix[-1], np.float32),
        }
        return cls(kind, arrays, len(matrix) - 1, matrix.shape[1], figures or {})

    @property
    def matrix(self) -> np.ndarray:
        """The linear part with its bias as the last row, float64 `[D + 1, E]`."""
        if "weight" not in self.arrays:
            return np.eye(self.in_dimension + 1, self.out_dimension)
        return np.vstack([self.arrays["weight"], self.arrays["bias"]]).astype(np.float64)

    @property
    def digest(self) -> str:
        """Content address of what decides its vectors: kind, dimensions and arrays."""
        parts: list[str | np.ndarray] = [self.kind, f"{self.in_dimension} {self.out_dimension}"]
        for name, array in sorted(self.arrays.items()):
            parts += [f"{name} {list(array.shape)}", np.ascontiguousarray(array, "<f4")]
        return content_digest(*parts)

    def apply(self, vectors: Any) -> np.ndarray:
        """Map vectors, one product for the linear kinds.

        Args:
            vectors: Raw student vectors, unit `[N, D]`.

        Returns:
            Unit float32 `[N, E]`.

        Raises:
            ConchError: The dimension is another, or a vector comes out zero or not finite.
        """
        rows = self.linear_part(vectors)
        if self.kind == "residual" and len(rows):
            parts = [
                np.array(residual_rows(self._network, mx.array(rows[at : at + ROWS_AT_ONCE])))
                for at in range(0, len(rows), ROWS_AT_ONCE)
            ]
            rows = unit(np.concatenate(parts), what="adapted vectors")
        return rows

    @cached_property
    def _network(self) -> dict[str, mx.array]:
        """Kept, or every query would copy it."""
        return {n: mx.array(a) for n, a in self.arrays.items() if n.startswith(("inner", "outer"))}

    def linear_part(self, vectors: Any) -> np.ndarray:
        """What the residual network is given: the vectors after the linear part, unit `[N, E]`.

        Raises:
            ConchError: See `apply`.
        """
        rows = np.asarray(vectors, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.in_dimension:
            raise ConchError(
                f"the adapter maps tables [N, {self.in_dimension}] and was given "
                f"{list(rows.shape)}: use the student that it was fitted for"
            )
        if "weight" in self.arrays:
            rows = rows @ self.arrays["weight"] + self.arrays["bias"]
        return unit(rows, what="adapted vectors")

    def save(self, folder: Path, origin: Mapping[str, Any] | None = None) -> None:
        """Write it as a folder that appears whole or not at all.

        Args:
            folder: Where; what stands there is replaced.
            origin: What it was made from, such as the names and digests of student and teacher.

        Raises:
            ConchError: The disk is full or not writable.
        """
        document = {
            "kind": self.kind,
            "in_dimension": self.in_dimension,
            "out_dimension": self.out_dimension,
            "digest": self.digest,
            "figures": dict(self.figures),
            "origin": dict(origin or {}),
            "provenance": provenance(),
        }
        arrays = {name: mx.array(array) for name, array in self.arrays.items()}
        write_folder(folder, arrays={ARRAYS_FILE: arrays}, documents={ADAPTER_FILE: document})

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Read back what `save` wrote, verifying every file and the digest.

        Raises:
            NotWholeError: A file is missing, added, truncated or altered.
        """
        arrays, documents = read_folder(folder)
        if ARRAYS_FILE not in arrays or ADAPTER_FILE not in documents:
            raise NotWholeError(f"{folder} is no adapter: it lacks {ARRAYS_FILE} or {ADAPTER_FILE}")
        document = documents[ADAPTER_FILE]
        adapter = cls(
            document["kind"],
            {name: np.array(array) for name, array in arrays[ARRAYS_FILE].items()},
            document["in_dimension"],
            document["out_dimension"],
            document["figures"],
        )
        if adapter.digest != document["digest"]:
            raise NotWholeError(f"{folder}: its arrays are others than {ADAPTER_FILE} says")
        return adapter


def residual_rows(network: Mapping[str, mx.array], rows: mx.array) -> mx.array:
    """`u + gelu(u W1 + b1) W2 + b2`, before normalising, float32 `[N, E]`.

    gelu is the exact one, by the error function, which is what torch's `GELU` computes too.
    """
    hidden = nn.gelu(rows @ network["inner_weight"] + network["inner_bias"])
    return rows + hidden @ network["outer_weight"] + network["outer_bias"]


def fit_ridge(student: Any, teacher: Any, *, strength: float = 0.01) -> Adapter:
    """Least squares with a bias column: W = argmin ‖XW − Y‖² + strength ‖W‖² (formulas.md 6).

    Solved in float64. For more pairs than fit into memory add batches to a `PairSums` and give
    what its `ridge` solves to `Adapter.from_matrix`.

    Args:
        student: X, raw student vectors, unit `[N, D]`.
        teacher: Y, unit `[N, E]`; any E.
        strength: Above 0; XᵀX of unit vectors has about N / D on its diagonal.

    Raises:
        ConchError: No pairs, shapes that do not fit, or a strength of 0 or less.
    """
    sums = sums_of(student, teacher)
    figures = {"pairs": sums.pairs, "strength": strength}
    return Adapter.from_matrix("ridge", sums.ridge(strength=strength), figures)


def fit_procrustes(student: Any, teacher: Any) -> Adapter:
    """The rotation (or reflection) R = argmin ‖XR − Y‖² with RᵀR = 1 (Schönemann 1966).

    Args:
        student: X, raw student vectors, unit `[N, D]`.
        teacher: Y, unit `[N, D]`.

    Raises:
        ConchError: The dimensions differ, no pairs, or shapes that do not fit.
    """
    sums = sums_of(student, teacher)
    return Adapter.from_matrix("procrustes", sums.rotation(), {"pairs": sums.pairs})


def fit_low_rank(
    student: Any,
    teacher: Any,
    *,
    rank: int,
    strength: float = 0.01,
    start: Adapter | None = None,
) -> Adapter:
    """The start plus the best correction of a rank: argmin ‖X(B + C) − Y‖² + strength ‖C‖².

    Args:
        student: X, raw student vectors, unit `[N, D]`.
        teacher: Y, unit `[N, E]`.
        rank: Of C, between 1 and min(D + 1, E).
        strength: Above 0.
        start: B, a linear adapter; the identity where there is none.

    Raises:
        ConchError: The rank is out of its range, there is no identity between the dimensions, or
            the start is not linear or of other dimensions.
    """
    sums = sums_of(student, teacher)
    if start is None and sums.in_dimension != sums.out_dimension:
        raise ConchError(
            f"there is no identity from {sums.in_dimension} to {sums.out_dimension} dimensions: "
            "give a ridge as the start of the low-rank adapter"
        )
    start = start or Adapter.identity(sums.in_dimension)
    if start.kind == "residual":
        raise ConchError("a low-rank correction stands on a linear adapter, not on a residual one")
    matrix = sums.low_rank(rank, start=start.matrix, strength=strength)
    figures = {"pairs": sums.pairs, "strength": strength, "rank": rank, "start": start.digest}
    return Adapter.from_matrix("low_rank", matrix, figures)
