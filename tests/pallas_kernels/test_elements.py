"""The bits by which a thread tests its elements, on NumPy scalars for registers."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from jsparse.pallas_kernels.mosaic_gpu import _elements

I32 = np.int32
ROWS, COLUMNS, BATCH = 64, 256, 2
COMPARED = {"slt": np.less}


class Ref:
    """An array in global memory."""

    def __init__(self, values):
        self.values = np.asarray(values, I32)
        self.type = types.SimpleNamespace(shape=self.values.shape, element_type=I32)

    def word(self, first, offset, *_):
        return self.values.reshape(-1)[first + offset]


def low_bits(count):
    return I32(_elements._signed((1 << min(max(int(count), 0), 32)) - 1))


@pytest.fixture
def thread(monkeypatch):
    """Whose registers they are, ``thread[0]`` of 128."""
    number = [0]
    registers = types.SimpleNamespace(
        first_row=lambda: I32(number[0] // 32 * 16 + number[0] % 32 // 4),
        first_column=lambda: I32(number[0] % 4 * 2),
        global_word=lambda ref, *at: ref.word(*at),
        integer=I32,
        i32=lambda: I32,
        low_bits=low_bits,
    )
    arith = types.SimpleNamespace(
        CmpIPredicate=types.SimpleNamespace(slt="slt"),
        addi=np.add,
        andi=np.bitwise_and,
        cmpi=lambda how, x, y: COMPARED[how](x, y),
        muli=np.multiply,
        ori=np.bitwise_or,
        select=lambda which, x, y: x if which else y,
        shli=np.left_shift,
        shrui=lambda x, n: (x.view(np.uint32) >> np.uint32(n)).view(I32),
        subi=np.subtract,
        xori=np.bitwise_xor,
    )
    monkeypatch.setattr(_elements, "r", registers)
    monkeypatch.setattr(_elements, "arith", arith)
    memref = types.SimpleNamespace(MemRefType=lambda x: x)
    monkeypatch.setattr(_elements, "ir", memref)
    return number


def place_of(batch: int, column: int, columns: int, word: int) -> Any:
    """The thread's place in a tile that begins at row 0."""
    scalars: Any = [I32(x) for x in (batch, 0, column, word)]
    return _elements.Place(scalars, columns, ROWS)


def counting(place: Any, words) -> dict[tuple[int, int], bool]:
    """By row and column of the arrays, whether each element of the thread counts."""
    return {
        (int(place.row(half)), int(place.column(n))): bool(
            words[half].view(np.uint32) >> np.uint32(_elements._bit(n)) & 1
        )
        for half in range(2)
        for n in range(place.num_columns // 4)
    }


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_words_are_bits_lengths_and_intervals(thread, columns):
    rng = np.random.default_rng(columns)
    lengths = np.array([[ROWS - 5, COLUMNS - 9], [ROWS, 77]])
    bits = rng.random((ROWS, COLUMNS)) < 0.7
    packed = np.packbits(bits, bitorder="little").view(np.uint32).reshape(ROWS, -1)
    start = rng.integers(0, COLUMNS, (BATCH, ROWS))
    stop = np.where(start % 3 == 0, 0, start + rng.integers(0, 150, (BATCH, ROWS)))
    first = rng.integers(0, 40, (1, ROWS))
    all_columns = np.full((1, ROWS), COLUMNS)
    j = np.arange(COLUMNS)
    for batch in range(BATCH):
        allowed = bits & (start[batch, :, None] <= j) & (j < stop[batch, :, None])
        allowed &= first[0, :, None] <= j
        allowed &= (np.arange(ROWS) < lengths[batch, 0])[:, None]
        allowed &= j < lengths[batch, 1]
        seen = {}
        for column0 in range(0, COLUMNS, columns):
            for thread[0] in range(128):
                place = place_of(batch, column0, columns, column0 // 32)
                intervals = (Ref(start), Ref(stop)), (Ref(first), Ref(all_columns))
                words = place.words(Ref(lengths), Ref(packed.view(I32)), intervals)
                seen |= counting(place, words)
        assert len(seen) == allowed.size
        for at, counts in seen.items():
            assert counts == allowed[at], at


def test_all_elements_count_where_nothing_is_asked(thread):
    place = place_of(0, 0, 128, 0)
    assert all(counting(place, place.words(None, None, ())).values())
