"""Closed forms of linear maps between spaces, from sums over batches of pairs.

Knows float64 arrays; nothing of adapters, files or models. 50,000 pairs need no more memory than
one batch. To add a closed form: a method of `PairSums` that gives `[D + 1, E]`, the bias last.
"""

from typing import Any

import numpy as np

from conch_dna.errors import ConchError


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


def sums_of(student: Any, teacher: Any) -> PairSums:
    """The sums of pairs that fit into memory, `[N, D]` and `[N, E]`.

    Raises:
        ConchError: Shapes do not fit, or a value is not finite.
    """
    rows, targets = np.asarray(student), np.asarray(teacher)
    if rows.ndim != 2 or targets.ndim != 2:
        raise ConchError(
            f"pairs have shapes {list(rows.shape)} and {list(targets.shape)}: give tables [N, D] "
            "and [N, E]"
        )
    sums = PairSums(rows.shape[1], targets.shape[1])
    sums.add(rows, targets)
    return sums
