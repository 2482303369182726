"""Arithmetic on registers that emulation stands in for, with NumPy for instructions.

Each value is that of all threads of a warpgroup; float32, rounded as PTX says.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from jsparse.pallas_kernels.mosaic_gpu import _distance

F32 = np.float32
THREADS = 128


def add_down(x, y):
    exact = np.asarray(x, np.float64) + np.asarray(y, np.float64)
    near = exact.astype(F32)
    return np.where(near > exact, np.nextafter(near, F32(-np.inf)), near)


def of_lane(x, lane):
    warps = np.broadcast_to(x, THREADS).reshape(-1, 32)
    return np.take_along_axis(warps, (lane & 31).reshape(-1, 32), 1).reshape(-1)


REGISTERS = types.SimpleNamespace(
    number=F32,
    mul=np.multiply,
    sub=np.subtract,
    add_down=add_down,
    of_lane=of_lane,
    i32=lambda: np.int32,
)
ARITH = types.SimpleNamespace(
    bitcast=lambda kind, x: x.view(kind),
    cmpf=lambda how, x, y: x >= y,
    select=np.where,
    CmpFPredicate=_distance.arith.CmpFPredicate,
)


@pytest.mark.parametrize("count", [2, 7, 32, 33, 64])
def test_a_cell_of_a_table(count, monkeypatch):
    monkeypatch.setattr(_distance, "r", REGISTERS)
    monkeypatch.setattr(_distance, "arith", ARITH)
    rng, width = np.random.default_rng(count), F32(0.37)
    values = rng.standard_normal(count).astype(F32)
    steps = np.append(np.diff(values), F32(0))
    d = rng.uniform(0, 1.3 * width * (count - 1), THREADS).astype(F32)
    d[:4] = 0, np.inf, np.nan, width * (count - 1)

    def lanes(x):
        """Lane n has entries n and n + 32, or the last."""
        lane = np.arange(THREADS) % 32
        return [x[np.minimum(lane + g, count - 1)] for g in range(0, count, 32)]

    cell = _distance._Cell(d, 1 / width, count, np.minimum)
    found = cell.look_up(lanes(values)) + cell.fraction * cell.look_up(lanes(steps))
    truth = np.interp(d.astype(np.float64), np.arange(count) * width, values)
    truth[np.isnan(d)] = np.nan
    np.testing.assert_allclose(found, truth, atol=1e-5 * count)

    # Where sums are kept, NaN counts as far away, and only the entry's number is left.
    cell = _distance._Cell(d, 1 / width, count, np.fmin)
    row = (cell.index.astype(np.int64) << 9) % 2**32
    assert row.max() == 512 * (count - 1) == row[1] == row[2]
    index = np.minimum(np.where(np.isnan(d), np.inf, d) / width, count - 1)
    np.testing.assert_array_equal(row[4:], 512 * np.floor(index[4:]).astype(int))


def inline(**_):
    """Runs what would become instructions."""
    return lambda f: lambda *args: f(None, *args)


def scalar(x):
    """As a kernel passes one."""
    return types.SimpleNamespace(registers=types.SimpleNamespace(item=lambda: x))


@pytest.mark.parametrize("again", [False, True])
def test_differences_of_points(again, monkeypatch):
    rng, columns, rows = np.random.default_rng(3), 32, 64
    mine, theirs = (rng.uniform(-1000, 1000, (3, n)) for n in (rows, columns))
    mine, theirs = mine.astype(F32), theirs.astype(F32)
    mine[:, 9] = theirs[:, 5]  # no distance: an inverse that is finite
    thread = np.arange(THREADS)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2

    class Place:
        def __init__(self, scalars, *_):
            assert scalars == ["batch", "row", 0, 0]

        def rows(self, ref, axis):
            return [ref[axis, row], ref[axis, row + 8]]

    registers = types.SimpleNamespace(
        **vars(REGISTERS),
        integer=int,
        fma=lambda x, y, z: (np.float64(x) * y + z).astype(F32),
        inverse_sqrt=lambda x: 1 / np.sqrt(x),
        scalars=list,
        tied=lambda values, text: values,
        accumulator=lambda values, shape: values[: shape[0] * shape[1] // THREADS],
        shared_pairs=lambda ref, count: [
            ref[8 * j + column + i] for j in range(count) for i in range(2)
        ],
        ACC=None,
    )
    monkeypatch.setattr(_distance, "r", registers)
    monkeypatch.setattr(_distance, "Place", Place)
    monkeypatch.setattr(_distance, "_tile", lambda columns: None)
    utils = types.SimpleNamespace(memref_slice=lambda ref, axis: ref[axis])
    monkeypatch.setattr(_distance, "utils", utils)
    monkeypatch.setattr(_distance.plgpu, "inline_mgpu", inline)

    read: Any = theirs
    read = _distance.read_columns(columns)(read)
    points = mine, scalar("batch"), scalar("row"), read
    found: list[Any] = list(_distance._differences(points, rows, again))
    assert len(found) == columns // 2
    for i, (difference, square) in enumerate(found):
        at = row + (i >> 1 & 1) * 8, i // 4 * 8 + column + (i & 1)
        expected = mine[:, at[0]] - theirs[:, at[1]]
        np.testing.assert_array_equal(difference, expected)
        exact = (expected.astype(np.float64) ** 2).sum(0)
        np.testing.assert_allclose(square, exact, rtol=3e-7, atol=2e-30)
        root: Any = _distance._root_of_inverse(square)
        assert np.isfinite(registers.inverse_sqrt(square)).all()
        np.testing.assert_allclose(root, np.sqrt(exact), rtol=1e-6, atol=2e-15)
