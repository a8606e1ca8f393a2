"""Adapters: the map of raw student vectors, the same for documents and queries.

Knows arrays and one folder format; nothing of models, stores or texts. Linear kinds are solved
here in closed form from sums over pairs; the residual network is trained in residual.py. To add a
kind: a name in choices.KINDS, its arrays in `_expected_shapes`, a branch in `apply`, and one in
`linear_adapter` or a module that fits it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.checkpoints import (
    content_digest,
    provenance,
    read_folder,
    require_keys,
    write_folder,
)
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.config import KINDS
from conch_dna.sedimentation.embedders.contract import unit

ARRAYS_FILE = "adapter.safetensors"
ADAPTER_FILE = "adapter.json"
# Rows of the residual network's hidden layer that are in memory at once.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class EmbeddingAdapter:
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

    >>> EmbeddingAdapter.identity(2).apply([[3.0, 4.0]]).round(1).tolist()
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
        shapes = {name: array.shape for name, array in self.arrays.items()}
        if shapes != expected:
            raise ConchError(
                f"a {self.kind} adapter from {self.in_dimension} to {self.out_dimension} "
                f"dimensions needs arrays {expected}, not {shapes}"
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
    def identity(cls, dimension: int) -> "EmbeddingAdapter":
        """The adapter that changes nothing."""
        return cls("identity", {}, dimension, dimension)

    @classmethod
    def from_matrix(
        cls, kind: str, matrix: np.ndarray, figures: Mapping[str, Any] | None = None
    ) -> "EmbeddingAdapter":
        """A linear adapter from what `PairSums` solves.

        Args:
            kind: A linear one of KINDS.
            matrix: `[D + 1, E]`, its last row is the bias.
            figures: How it was fitted, for a reader.
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
                np.array(residual_rows(self.network, mx.array(rows[at : at + ROWS_AT_ONCE])))
                for at in range(0, len(rows), ROWS_AT_ONCE)
            ]
            rows = unit(np.concatenate(parts), what="adapted vectors")
        return rows

    @cached_property
    def network(self) -> dict[str, mx.array]:
        """The residual network's arrays; kept, or every query would copy them."""
        names = ("inner_weight", "inner_bias", "outer_weight", "outer_bias")
        return {name: mx.array(self.arrays[name]) for name in names}

    def linear_part(self, vectors: Any) -> np.ndarray:
        """What the residual network is given: the vectors after the linear part, unit `[N, E]`.

        Raises:
            ConchError: The dimension is another, or a row comes out zero or not finite.
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

    def widened(self) -> "EmbeddingAdapter":
        """The same map into one dimension more, which is always zero."""
        matrix = np.pad(self.matrix, ((0, 0), (0, 1)))
        linear = self.from_matrix("ridge", matrix, self.figures)
        if self.kind != "residual":
            return linear
        pads = {"inner_weight": ((0, 1), (0, 0)), "inner_bias": ((0, 0),)}
        pads |= {"outer_weight": ((0, 0), (0, 1)), "outer_bias": ((0, 1),)}
        network = {name: np.pad(self.arrays[name], pad) for name, pad in pads.items()}
        return EmbeddingAdapter(
            "residual",
            {**linear.arrays, **network},
            self.in_dimension,
            linear.out_dimension,
            self.figures,
        )

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
    def load(cls, folder: Path) -> "EmbeddingAdapter":
        """Read back what `save` wrote, verifying every file and the digest.

        Raises:
            NotWholeError: A file is missing, added, truncated or altered.
        """
        arrays, documents = read_folder(folder)
        if ARRAYS_FILE not in arrays or ADAPTER_FILE not in documents:
            raise NotWholeError(f"{folder} is no adapter: it lacks {ARRAYS_FILE} or {ADAPTER_FILE}")
        document = documents[ADAPTER_FILE]
        needs = {
            **dict.fromkeys(("kind", "digest"), str),
            **dict.fromkeys(("in_dimension", "out_dimension"), int),
            **dict.fromkeys(("figures", "origin"), dict),
        }
        require_keys(document, folder / ADAPTER_FILE, needs=needs)
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


class PairSums:
    """XᵀX and XᵀY over batches of pairs: all that the closed forms need of any number of them.

    X has a last column of ones, for the bias. Holds (D + 1)(D + 1 + E) numbers of float64.

    Args:
        in_dimension: D.
        out_dimension: E.

    >>> sums = PairSums(1, 1)
    >>> sums.add([[0.0], [1.0], [2.0]], [[1.0], [3.0], [5.0]])
    >>> sums.ridge(strength=1e-9).round(3).tolist()  # y = 2 x + 1
    [[2.0], [1.0]]
    """

    def __init__(self, in_dimension: int, out_dimension: int) -> None:
        self.in_dimension = in_dimension
        self.out_dimension = out_dimension
        self.pairs = 0
        self.own = np.zeros((in_dimension + 1, in_dimension + 1))
        self.cross = np.zeros((in_dimension + 1, out_dimension))

    @classmethod
    def of(cls, student: Any, teacher: Any) -> "PairSums":
        """The sums of pairs that fit into memory, `[N, D]` and `[N, E]`.

        Raises:
            ConchError: Shapes do not fit, or a value is not finite.
        """
        sums = cls(np.shape(student)[-1], np.shape(teacher)[-1])
        sums.add(student, teacher)
        return sums

    def add(self, student: Any, teacher: Any) -> None:
        """Count a batch.

        Args:
            student: Raw student vectors `[N, D]`.
            teacher: Targets of the same texts `[N, E]`.

        Raises:
            ConchError: Shapes do not fit, or a value is not finite.
        """
        rows, targets = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
        shapes = (len(rows), self.in_dimension), (len(rows), self.out_dimension)
        if (rows.shape, targets.shape) != shapes:
            raise ConchError(
                f"pairs have shapes {list(rows.shape)} and {list(targets.shape)}: student and "
                f"target of the same texts are needed, [N, {self.in_dimension}] and "
                f"[N, {self.out_dimension}]"
            )
        if not (np.isfinite(rows).all() and np.isfinite(targets).all()):
            raise ConchError("pairs hold values that are not finite: look at what embedded them")
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        self.own += rows.T @ rows
        self.cross += rows.T @ targets
        self.pairs += len(rows)

    def ridge(self, *, strength: float) -> np.ndarray:
        """W = argmin ‖XW − Y‖² + strength ‖W‖²; the bias is a row of W, held back like the others.

        Returns:
            float64 `[D + 1, E]`.

        Raises:
            ConchError: No pairs, or a strength of 0 or less.
        """
        from scipy.linalg import solve

        return np.asarray(solve(self._regularised(strength), self.cross, assume_a="pos"))

    def rotation(self) -> np.ndarray:
        """R = argmin ‖XR − Y‖² with RᵀR = 1: U Vᵀ of the SVD of XᵀY; a bias of 0.

        Returns:
            float64 `[D + 1, D]`.

        Raises:
            ConchError: The dimensions differ, or there are no pairs.
        """
        self._need_pairs()
        if self.in_dimension != self.out_dimension:
            raise ConchError(
                f"a rotation needs equal dimensions, not {self.in_dimension} and "
                f"{self.out_dimension}: fit a ridge"
            )
        left, _, right = np.linalg.svd(self.cross[:-1])
        return np.vstack([left @ right, np.zeros(self.out_dimension)])

    def low_rank(self, rank: int, *, start: np.ndarray, strength: float) -> np.ndarray:
        """The start B plus C = argmin ‖X(B + C) − Y‖² + strength ‖C‖² of at most this rank.

        Reduced-rank ridge in closed form (Mukherjee & Zhu 2011): the full correction C, projected
        on the `rank` leading eigenvectors of Cᵀ (XᵀX + strength) C. At the full rank on a start of
        zero it is the ridge.

        Args:
            rank: Between 1 and min(D + 1, E).
            start: B, `[D + 1, E]`.
            strength: Above 0.

        Returns:
            float64 `[D + 1, E]`.

        Raises:
            ConchError: Rank or strength is out of its range, the start has another shape, or there
                are no pairs.
        """
        from scipy.linalg import eigh, solve

        regularised = self._regularised(strength)
        if start.shape != self.cross.shape:
            raise ConchError(
                f"the start maps {len(start) - 1} to {start.shape[1]} dimensions, the pairs "
                f"{self.in_dimension} to {self.out_dimension}"
            )
        most = min(self.cross.shape)
        if not 1 <= rank <= most:
            raise ConchError(f"rank {rank} is out of its range: choose between 1 and {most}")
        correction = solve(regularised, self.cross - self.own @ start, assume_a="pos")
        explained = correction.T @ regularised @ correction
        last = len(explained) - 1
        _, leading = eigh(explained, subset_by_index=(last - rank + 1, last))
        return np.asarray(start + correction @ leading @ leading.T)

    def _need_pairs(self) -> None:
        if not self.pairs:
            raise ConchError("there are no pairs of student and target to fit an adapter to")

    def _regularised(self, strength: float) -> np.ndarray:
        self._need_pairs()
        if not strength > 0:
            raise ConchError(f"ridge strength {strength:g} must be above 0, such as 0.01")
        return self.own + strength * np.eye(self.in_dimension + 1)


def linear_adapter(
    kind: str, sums: PairSums, *, strength: float = 0.01, rank: int = 32
) -> EmbeddingAdapter:
    """The linear adapter that is best for the pairs that were summed.

    Args:
        kind: "procrustes" is the rotation or reflection R = argmin ‖XR − Y‖² (Schönemann 1966);
            "low_rank" the identity plus the best correction of a rank; every other kind a ridge,
            W = argmin ‖XW − Y‖² + strength ‖W‖² (formulas.md 6).
        sums: Of raw student vectors X and targets Y.
        strength: Of ridge and low-rank correction, above 0; XᵀX of unit vectors has about N / D
            on its diagonal.
        rank: Of the low-rank correction, between 1 and min(D + 1, E).

    Raises:
        ConchError: No pairs, a setting out of its range, or dimensions that the kind cannot join.
    """
    figures: dict[str, Any] = {"pairs": sums.pairs}
    if kind == "procrustes":
        return EmbeddingAdapter.from_matrix(kind, sums.rotation(), figures)
    figures["strength"] = strength
    if kind != "low_rank":
        return EmbeddingAdapter.from_matrix("ridge", sums.ridge(strength=strength), figures)
    if sums.in_dimension != sums.out_dimension:
        raise ConchError(
            f"a low-rank adapter from {sums.in_dimension} to {sums.out_dimension} dimensions has "
            "no identity to stand on: use a ridge"
        )
    start = EmbeddingAdapter.identity(sums.in_dimension).matrix
    matrix = sums.low_rank(rank, start=start, strength=strength)
    return EmbeddingAdapter.from_matrix(kind, matrix, {**figures, "rank": rank})
