"""Which value of a bias by entry each thread reads, on NumPy integers for registers.

What the instructions themselves do, of which emulation knows nothing, is for the GPU.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from jsparse.pallas_kernels.mosaic_gpu import _entries

I32 = np.int32
BLOCK_Q, BLOCK_KV, BLOCKS = 128, 64, 3


@pytest.fixture
def thread(monkeypatch):
    """Whose registers they are, ``thread[0]`` of 128."""
    number = [0]
    registers = types.SimpleNamespace(
        first_row=lambda: number[0] // 32 * 16 + number[0] % 32 // 4,
        first_column=lambda: number[0] % 4 * 2,
        integer=int,
        i32=lambda: I32,
        asm=lambda *_: None,
        global_pair=lambda table, at, offset, _: table.words.reshape(-1)[
            at + offset : at + offset + 2
        ],
    )
    arith = types.SimpleNamespace(
        addi=lambda x, y: int(x) + int(y),
        andi=lambda x, y: int(x) & int(y),
        muli=lambda x, y: int(x) * int(y),
        shrui=lambda x, n: int(x) >> int(n),
        subi=lambda x, y: int(x) - int(y),
    )
    mlir = types.SimpleNamespace(
        MemRefType=lambda x: x,
        IntegerType=types.SimpleNamespace(get_signless=lambda bits: bits),
    )
    monkeypatch.setattr(_entries, "r", registers)
    monkeypatch.setattr(_entries, "arith", arith)
    monkeypatch.setattr(_entries, "ir", mlir)
    monkeypatch.setattr(
        _entries, "utils", types.SimpleNamespace(memref_ptr=lambda ref: ref)
    )
    monkeypatch.setattr(_entries, "_count", count)
    return number


def count(bits, before, room, skip):
    """As its text says; a shift by 32 leaves nothing."""
    below = int(bits) << (room - skip) & 0xFFFFFFFF
    return int(before) + below.bit_count()


def entries(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Any]:
    """Bits, the number of each that is set, else -1, and the table."""
    bits = rng.random((BLOCKS, BLOCK_Q, BLOCK_KV)) < 0.2
    number = np.where(bits, np.cumsum(bits).reshape(bits.shape) - 1, -1)
    words = np.packbits(bits, -1, "little").view(np.uint32).astype(np.int64)
    counts = np.bitwise_count(words)
    before = (np.cumsum(counts) - counts.reshape(-1)).reshape(words.shape)
    table = types.SimpleNamespace(words=np.stack([words, before], -1))
    table.type = types.SimpleNamespace(shape=table.words.shape)
    return bits, number, table


def found(place, columns: int, row: Any, column: Any) -> dict:
    """Number by row and column of the tile, of one thread's elements."""
    numbers = {}
    for at, pair in place.pairs(columns):
        for n, bit, before in zip(at, pair.bits, pair.before, strict=True):
            r, c = row + 8 * (n >> 1 & 1), column + 8 * (n >> 2) + (n & 1)
            assert (r, c) not in numbers
            numbers[r, c] = before if int(pair.word) & bit else -1
    return numbers


VALUES: Any = types.SimpleNamespace(
    type=types.SimpleNamespace(shape=(2, 3, 5000), element_type="f32")
)


@pytest.mark.parametrize("columns, part", [(64, 0), (32, 0), (32, 32)])
@pytest.mark.parametrize("first", [0, 64])
def test_rows_are_queries(thread, columns, part, first):
    _, number, table = entries(np.random.default_rng(columns))
    seen = {}
    for thread[0] in range(128):
        at = [0, (1 * BLOCK_Q + first) * 2 + part // 32, 0]
        place = _entries._ByQuery(table, VALUES, at, 64)
        seen |= found(place, columns, place.row, place.column)
    assert len(seen) == 64 * columns
    for (q, kv), n in seen.items():
        assert n == number[1, first + q, part + kv], (q, kv)


@pytest.mark.parametrize("columns, part", [(64, 0), (64, 64), (32, 96), (128, 0)])
@pytest.mark.parametrize("first, rows", [(0, 64), (32, 32)])
def test_rows_are_keys(thread, columns, part, first, rows):
    _, number, table = entries(np.random.default_rng(columns))
    seen = {}
    for thread[0] in range(128):
        at = [0, (2 * BLOCK_Q + part) * 2, first]
        place = _entries._ByKey(table, VALUES, at, rows)
        row = place.key - first
        seen |= found(place, columns, row, place.column)
    assert len(seen) == rows * columns
    for (kv, q), n in seen.items():
        assert n == number[2, part + q, first + kv], (q, kv)
