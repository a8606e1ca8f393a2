"""Codes, scales and biases: mlx reads them as they are meant, and outputs are kept."""

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.exporting import grids
from conch_dna.exporting.grids import Grid, compensated, rounded

BITS = (2, 3, 4, 5, 6, 8)


def matrix(rows: int = 12, columns: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def inputs(columns: int = 128, count: int = 400, seed: int = 1) -> np.ndarray:
    """Inputs that hang together, as those of real layers do, of very different sizes."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(count, columns // 4)) @ random.normal(size=(columns // 4, columns))
    own = random.normal(size=(count, columns))
    return ((mixed + own) * np.exp(random.normal(size=columns))).astype(np.float32)


def error(weight: np.ndarray, grid: Grid, rows: np.ndarray) -> float:
    return float(np.square(rows @ (weight - grid.weight()).T).mean())


@pytest.mark.parametrize("bits", BITS)
def test_mlx_reads_what_is_packed(bits):
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**bits, (6, 64)).astype(np.uint8)
    scales, biases = random.normal(size=(2, 6, 2)).astype(np.float32)
    grid = Grid(codes, scales, biases, bits)
    read = mx.dequantize(*map(mx.array, (grid.packed(), scales, biases)), 32, bits)
    np.testing.assert_allclose(read, grid.weight(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rounding_is_that_of_mlx(bits, group_size):
    weight = mx.array(matrix())
    grid = rounded(np.array(weight), bits=bits, group_size=group_size)
    theirs = mx.dequantize(*mx.quantize(weight, group_size, bits), group_size, bits)
    # A number halfway between two codes may go either way.
    step = float(np.abs(grid.scales).max())
    assert np.abs(grid.weight() - np.array(theirs)).max() <= step * 1.01
    assert np.isclose(grid.weight(), np.array(theirs), atol=1e-5).mean() > 0.99
    assert grid.group_size == group_size


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_change_less_than_by_rounding(bits):
    weight, drawn = matrix(), inputs(count=2000)
    rows, others = drawn[:1000], drawn[1000:]
    moments = rows.T @ rows / len(rows)
    plain = rounded(weight, bits=bits, group_size=64)
    kept = compensated(weight, moments, bits=bits, group_size=64)
    assert error(weight, kept, rows) < 0.6 * error(weight, plain, rows)
    assert error(weight, kept, others) < 0.8 * error(weight, plain, others)


def test_both_steps_are_worth_it(monkeypatch):
    weight, rows = matrix(), inputs()
    moments = rows.T @ rows / len(rows)
    both = compensated(weight, moments, bits=3, group_size=64)
    monkeypatch.setattr(grids, "_refitted", lambda weight, moments, grid: grid)
    codes_only = compensated(weight, moments, bits=3, group_size=64)
    plain = rounded(weight, bits=3, group_size=64)
    errors = [error(weight, each, rows) for each in (both, codes_only, plain)]
    assert errors == sorted(errors)
    assert errors[0] < 0.95 * errors[1] < 0.95 * errors[2]


def test_the_fit_is_the_best_there_is_for_its_codes():
    weight, rows = matrix(), inputs()
    kept = compensated(weight, rows.T @ rows / len(rows), bits=3, group_size=64)
    best = error(weight, kept, rows)
    for name in ("scales", "biases"):
        for factor in (0.97, 1.03):
            other = {
                "scales": kept.scales,
                "biases": kept.biases,
                name: getattr(kept, name) * factor,
            }
            assert error(weight, Grid(kept.codes, bits=3, **other), rows) > best


def test_what_lies_on_a_grid_stays_on_it_if_that_is_told():
    grid = rounded(matrix(), bits=4, group_size=64)
    weight, rows = grid.weight(), inputs()
    moments = rows.T @ rows / len(rows)
    how = {"bits": 4, "group_size": 64, "start": (grid.scales, grid.biases)}
    np.testing.assert_array_equal(compensated(weight, moments, **how).codes, grid.codes)
    # A little beside it, it is still far nearer than by a grid of its own.
    moved = weight + 0.02 * np.abs(grid.scales).mean() * matrix(seed=3)
    anew = compensated(moved, moments, bits=4, group_size=64)
    assert error(moved, compensated(moved, moments, **how), rows) < 0.5 * error(moved, anew, rows)


@pytest.mark.parametrize("reached", [0, 5])
def test_columns_that_nothing_comes_into_are_rounded(reached):
    weight = matrix()
    moments = np.zeros((128, 128), np.float32)
    moments[range(reached), range(reached)] = 1.0
    kept = compensated(weight, moments, bits=4, group_size=64)
    plain = rounded(weight, bits=4, group_size=64)
    assert np.abs(kept.weight() - weight).max() < 3 * np.abs(plain.weight() - weight).max()


def test_rows_that_do_not_fit_at_once_give_the_same(monkeypatch):
    weight, rows = matrix(rows=7), inputs()
    moments = rows.T @ rows / len(rows)
    whole = compensated(weight, moments, bits=4, group_size=32)
    monkeypatch.setattr(grids, "_ROOM", 1.0)
    apart = compensated(weight, moments, bits=4, group_size=32)
    # To how products of other shapes are rounded.
    np.testing.assert_allclose(apart.weight(), whole.weight(), atol=1e-3)
    lost = [
        np.einsum("rc,cd,rd->", weight - each.weight(), moments, weight - each.weight())
        for each in (apart, whole)
    ]
    np.testing.assert_allclose(lost[0], lost[1], rtol=1e-3)
