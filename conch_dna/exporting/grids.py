"""Numbers on a grid: which codes, scales and biases stand for a layer's weights in a few bits.

Knows matrices and what came into the layer; nothing of models or files. The form is mlx's affine
one, `weight = scale · code + bias` with a scale and a bias for each group of a row.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

# Of the mean of the moments' diagonal, added to it, so that it can be inverted.
DAMPING = 0.01
_BLOCK = 64
# Bytes of what one row's fit needs at once.
_ROOM = 256e6


@dataclass(frozen=True, eq=False)
class Grid:
    """A matrix in a few bits.

    Attributes:
        codes: Whole numbers from 0 to 2**bits - 1, uint8 `[rows, columns]`.
        scales: Float32 `[rows, groups]`.
        biases: Float32 `[rows, groups]`.
        bits: Of a code.
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    def weight(self) -> np.ndarray:
        """The matrix that it stands for, float32 `[rows, columns]`."""
        rows, groups = self.scales.shape
        grouped = self.codes.reshape(rows, groups, -1).astype(np.float32)
        return (grouped * self.scales[..., None] + self.biases[..., None]).reshape(rows, -1)

    def packed(self) -> np.ndarray:
        """The codes as mlx stores them: a stream of bits, the lowest first, uint32 `[rows, n]`."""
        places = np.arange(self.bits, dtype=np.uint8)
        bits = (self.codes[:, :, None] >> places) & 1
        return np.packbits(bits.reshape(len(bits), -1), axis=1, bitorder="little").view(np.uint32)


def rounded(weight: np.ndarray, *, bits: int, group_size: int) -> Grid:
    """A matrix rounded to the nearest codes, as `mx.quantize` does; float32 `[rows, columns]`."""
    made = mx.quantize(mx.array(weight), group_size, bits)
    scales, biases = np.array(made[1]), np.array(made[2])
    return Grid(_nearest(weight, scales, biases, bits), scales, biases, bits)


def _nearest(weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    grouped = weight.reshape(*scales.shape, -1)
    codes = np.rint((grouped - biases[..., None]) / scales[..., None])
    return np.clip(codes, 0, 2**bits - 1).astype(np.uint8).reshape(weight.shape)


def compensated(
    weight: np.ndarray,
    moments: np.ndarray,
    *,
    bits: int,
    group_size: int,
    start: tuple[np.ndarray, np.ndarray] | None = None,
) -> Grid:
    """A matrix in few bits whose outputs, for what comes in, change little.

    Column by column, those with the largest inputs first, an error of rounding is made good in the
    columns that are still to come (GPTQ, arXiv 2210.17323, with the groups' grids fixed before);
    then scales and biases are fitted once more to the outputs by least squares.

    Args:
        weight: Float32 `[rows, columns]`.
        moments: Mean of the outer products of the inputs `[columns, columns]`.
        bits: Of a code.
        group_size: Columns that share a scale.
        start: Scales and biases of a grid on which most of the matrix lies already; by default
            those between the least and the greatest number of each group.

    Raises:
        np.linalg.LinAlgError: The moments cannot be inverted, as where an input is not finite.
    """
    damped = moments.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    # Where nothing ever came in, any weight will do, and each must stay what it is.
    diagonal += DAMPING * diagonal.mean() + (0 if diagonal.any() else 1)
    plain = rounded(weight, bits=bits, group_size=group_size)
    if start is not None:
        plain = Grid(_nearest(weight, *start, bits), *start, bits)
    codes = _compensated_codes(weight, damped, plain)
    # Where little has to be made good, moving numbers to do so costs more than it brings.
    made = [_refitted(weight, damped, each) for each in (replace(plain, codes=codes), plain)]
    return _best_rows(weight, damped, *made)


def _compensated_codes(weight: np.ndarray, moments: np.ndarray, start: Grid) -> np.ndarray:
    order = np.argsort(-np.diagonal(moments), kind="stable")
    inverse = np.linalg.inv(moments[np.ix_(order, order)])
    factor = np.linalg.cholesky(inverse).T.astype(np.float32)
    left = weight[:, order].astype(np.float32)
    group = order // start.group_size
    codes = np.empty(weight.shape, np.uint8)
    most = 2**start.bits - 1
    for begin in range(0, len(order), _BLOCK):
        end = min(begin + _BLOCK, len(order))
        errors = np.empty((len(weight), end - begin), np.float32)
        for column in range(begin, end):
            scale, bias = start.scales[:, group[column]], start.biases[:, group[column]]
            code = np.clip(np.rint((left[:, column] - bias) / scale), 0, most)
            codes[:, order[column]] = code
            error = (left[:, column] - (scale * code + bias)) / factor[column, column]
            left[:, column + 1 : end] -= np.outer(error, factor[column, column + 1 : end])
            errors[:, column - begin] = error
        left[:, end:] -= errors @ factor[begin:end, end:]
    return codes


def _best_rows(weight: np.ndarray, moments: np.ndarray, *choices: Grid) -> Grid:
    """Each row of the one whose output is nearest to that of the matrix's own."""
    moments = moments.astype(np.float32)
    lost = [weight - each.weight() for each in choices]
    best = np.argmin([np.einsum("rc,rc->r", each @ moments, each) for each in lost], axis=0)
    rows = np.arange(len(weight))

    def chosen(name: str) -> np.ndarray:
        return np.stack([getattr(each, name) for each in choices])[best, rows]

    return Grid(chosen("codes"), chosen("scales"), chosen("biases"), choices[0].bits)


def _refitted(weight: np.ndarray, moments: np.ndarray, grid: Grid) -> Grid:
    """The same codes with the scales and biases that keep each row's output best."""
    rows, groups = grid.scales.shape
    columns, size = weight.shape[1], grid.group_size
    moments = moments.astype(np.float32)
    scales, biases = np.empty_like(grid.scales), np.empty_like(grid.biases)
    # Of a constant in each group: the same for every row.
    ones = moments.reshape(columns, groups, size).sum(axis=2)
    both_ones = ones.reshape(groups, size, groups).sum(axis=1)
    at_once = max(1, int(_ROOM / (8 * columns + 64 * groups**2)))
    for begin in range(0, rows, at_once):
        part = slice(begin, begin + at_once)
        codes = grid.codes[part].reshape(-1, groups, size).astype(np.float32)
        normal = np.empty((len(codes), 2 * groups, 2 * groups))
        for group in range(groups):
            own = moments[group * size : (group + 1) * size]
            seen = (codes[:, group] @ own).reshape(codes.shape)
            normal[:, group, :groups] = (seen * codes).sum(axis=2)
            normal[:, group, groups:] = seen.sum(axis=2)
        normal[:, groups:, :groups] = normal[:, :groups, groups:].transpose(0, 2, 1)
        normal[:, groups:, groups:] = both_ones
        against = weight[part] @ moments
        against = against.reshape(len(codes), groups, size)
        wanted = np.concatenate([(against * codes).sum(axis=2), against.sum(axis=2)], axis=1)
        before = np.concatenate([grid.scales[part], grid.biases[part]], axis=1)
        # Groups of one code leave the split between scale and bias open: they stay as they are.
        ridge = 1e-6 * np.einsum("rii->ri", normal).mean(axis=1)[:, None]
        np.einsum("rii->ri", normal)[...] += ridge
        found = np.linalg.solve(normal, (wanted + ridge * before)[..., None])[..., 0]
        scales[part], biases[part] = found[:, :groups], found[:, groups:]
    return Grid(grid.codes, scales, biases, grid.bits)
