"""Arithmetic on registers that emulation stands in for, with NumPy for instructions.

Each value is that of all threads of a warpgroup; float32, rounded as PTX says.
"""

from __future__ import annotations

import types

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
