"""Which element of a tile gets which value of a bias by entry: its PTX, interpreted."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.pallas_kernels.mosaic_gpu import _entries
from jsparse.patterns import _device_lists
from jsparse.patterns._parts import Sizes
from tests.support.ptx import Machine, Memory

COUNT = 24


def lists_of(blocks: tuple[int, int], dense: bool):
    """Neighbour lists, some keys twice, and the `EntryLists` of them."""
    rng, sizes = np.random.default_rng(sum(blocks)), Sizes(300, 260, *blocks)
    index = rng.integers(-20, 120 if dense else 270, (1, 300, COUNT))
    found = _device_lists._entries_by_sorting(
        jnp.asarray(index[0], jnp.int32), jnp.asarray([290, 250]), sizes=sizes
    )
    return index[0], found


def tile_of(found, index, at, values, sizes) -> np.ndarray:
    """What the tile must hold; NaN where no entry counts."""
    out = np.full((64, sizes.columns), np.nan, np.float32)
    query, key, row, column = at
    counted = np.asarray(found.counted)
    for t, n in zip(*np.nonzero(counted), strict=True):
        q = t - query * sizes.blocks[0], index[t, n] - key * sizes.blocks[1]
        if 0 <= q[0] < sizes.blocks[0] and 0 <= q[1] < sizes.blocks[1]:
            r, c = q if sizes.rows_are_queries else q[::-1]
            if 0 <= r - row < 64 and 0 <= c - column < sizes.columns:
                out[r - row, c - column] = values[t, n]
    return out


def run(monkeypatch, found, at, sizes, values, tile, **options) -> np.ndarray:
    """All threads of a warpgroup; returns the values after it."""
    query, key, row, column = at
    lists = np.asarray(found.lists)[None]
    start = int(found.starts[query, key]) - _entries.HEADER
    listed = np.zeros(_entries.COPIES * _entries.COPIED, np.int32)
    some = lists[0, query, start : start + len(listed)]
    listed[: len(some)] = some
    first = query * sizes.blocks[0] + row
    own = np.zeros((64, COUNT), values.dtype)
    own[: len(values[1, 2, first : first + 64])] = values[1, 2, first : first + 64]
    bases = 1 << 33, 1 << 34, 1 << 12, 1 << 16, 1 << 18
    refs = list(map(Memory, (values, lists, listed, tile, own), bases))
    machine = Machine(refs)
    machine.install(monkeypatch, _entries)
    machine.each(
        _entries._each_entry(sizes, COUNT, **options), *refs, 5, 0, row, column
    )
    return refs[0].array


CASES = [
    ((64, 64), True, 64, (2, 1, 0, 0), False),
    ((64, 64), False, 64, (1, 2, 0, 0), False),
    ((128, 128), True, 64, (1, 0, 64, 64), True),
    ((128, 128), False, 32, (1, 0, 64, 96), True),
    ((128, 32), False, 128, (0, 1, 0, 0), True),
]


@pytest.mark.parametrize("at_hand", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("blocks, by_query, columns, at, dense", CASES)
def test_values_reach_their_elements(
    monkeypatch, blocks, by_query, columns, at, dense, dtype, at_hand
):
    if at_hand and not by_query:
        pytest.skip("values are at hand where rows are queries")
    index, found = lists_of(blocks, dense)
    assert dense == (longest(found) > _entries.AT_HAND)
    sizes = _entries.Sizes(columns, blocks, by_query)
    values = np.random.default_rng(1).normal(size=(2, 3, 300, COUNT)).astype(dtype)
    tile = np.full((64, columns + _entries.PADDING), np.nan, np.float32)
    options = {"to_tile": True, "at_hand": at_hand}
    run(monkeypatch, found, at, sizes, values, tile, **options)
    expected = tile_of(found, index, at, values[1, 2], sizes)
    assert np.isfinite(expected).any()
    np.testing.assert_array_equal(tile[:, :columns], expected)
    assert np.isnan(tile[:, columns:]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("blocks, by_query, columns, at, dense", CASES[::2])
def test_gradients_reach_their_places(
    monkeypatch, blocks, by_query, columns, at, dense, dtype
):
    index, found = lists_of(blocks, dense)
    sizes = _entries.Sizes(columns, blocks, by_query)
    tile = np.random.default_rng(1).normal(size=(64, columns + 8)).astype(np.float32)
    out, options = np.zeros((2, 3, 300, COUNT), dtype), {"to_tile": False}
    out = run(monkeypatch, found, at, sizes, out, tile, at_hand=False, **options)
    assert not out[:1].any() and not out[1, :2].any()
    place = tile_of(found, index, at, np.ones((300, COUNT)), sizes)
    expected = np.where(np.isnan(place), 0, tile[:, :columns].astype(dtype))
    again = np.nan_to_num(tile_of(found, index, at, out[1, 2], sizes))
    np.testing.assert_array_equal(again, expected)
    assert (out != 0).sum() == np.isfinite(place).sum()


def longest(found) -> int:
    """The most entries of a block, duplicates among them."""
    starts = np.asarray(found.starts)
    lists = np.asarray(found.lists)
    return max(
        int(lists[q, starts[q, k] - _entries.HEADER])
        for q, k in np.argwhere(np.diff(starts, axis=1) > 0)
    )
