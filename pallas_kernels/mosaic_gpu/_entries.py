"""A bias with a value for each set bit: which one, by counting the bits before it.

The values of a block lie together, in the order of its bits. A thread reads those of
its own elements from global memory, under a predicate: an element whose bit is not set
has 0 and reads nothing. The gradient goes the same way; every element is one thread's,
once, so that no two write to one place.

Called by `_biased`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils

from . import _registers as r

Array = Any


class TileEntries(NamedTuple):
    """Where the values of a tile are, as scalars.

    Attributes:
        entry: of the first two axes of the values, joined.
        word: in the table, of the first query and, where rows are queries, first key.
        key: in its block, the first; what ``word`` lacks where rows are keys.
    """

    entry: Array
    word: Array
    key: Array


def read(columns: int, rows: int, rows_are_queries: bool) -> Callable:
    """``f(table, values, at) -> x``: float32, 0 where no bit is set.

    ``table`` and ``values`` are those of `_bias.EntryBias`, ``at`` is a `TileEntries`,
    and ``rows`` are those of a block, if there are less than 64.
    """
    found = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=r.ACC)

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 2, *[r.SCALAR] * 3), return_type=found
    )
    def f(_, table, values, *at):
        scalars = [x.registers.item() for x in at]
        of_thread = _ByQuery if rows_are_queries else _ByKey
        place = of_thread(table, values, scalars, rows)
        out = [r.number(0.0)] * (columns // 2)
        for (first, second), pair in place.pairs(columns):
            out[first], out[second] = place.load(pair)
        return r.accumulator(out, (64, columns))

    return lambda table, values, at: f(table, values, *at)


def write(columns: int) -> Callable:
    """``f(table, out, at, x)``: writes x where bits are set; rows are queries."""

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 2, *[r.SCALAR] * 3, r.ACC), return_type=()
    )
    def f(_, table, out, *args):
        *at, x = args
        place = _ByQuery(table, out, [x.registers.item() for x in at], 64)
        values = r.scalars(x)
        for (first, second), pair in place.pairs(columns):
            place.store(pair, values[first], values[second])

    return lambda table, out, at, x: f(table, out, *at, x)


class _Pair(NamedTuple):
    """Two elements of a thread whose bits are in one word.

    Attributes:
        word: has the two bits, and others.
        bits: each one's.
        before: how many set bits come before each one's.
    """

    word: ir.Value
    bits: tuple[int, int]
    before: tuple[ir.Value, ir.Value]


_TYPES = {
    "f32": ("b32", "", ""),
    "bf16": ("b16", "mov.b32 {x}, {{z, h}};", "cvt.rn.bf16.f32 h, {x};"),
    "f16": ("b16", "cvt.f32.f16 {x}, h;", "cvt.rn.f16.f32 h, {x};"),
}
"""By dtype: how a value is moved, and how h is made float32 x, and x made h."""


class _Place:
    """The elements of a thread in a tile, and how to get at their values."""

    def __init__(self, table: ir.Value, values: ir.Value, at: list, rows: int):
        entry, self.word, self.key = at
        self.table, ty = table, ir.MemRefType(values.type)
        self.words_per_query = ir.MemRefType(table.type).shape[-2]
        self.kind = str(ty.element_type)
        self.size = 4 if self.kind == "f32" else 2
        of_entry = ty.shape[-1] * self.size
        # All values of a launch may be more than 32 bits can count.
        text = (
            f"{{ .reg .b64 e; cvt.s64.s32 e, $2; mad.lo.s64 $0, e, {of_entry}, $1; }}"
        )
        i64 = ir.IntegerType.get_signless(64)
        self.first = r.asm(i64, [utils.memref_ptr(values), entry], text, "=l,l,r")
        self.row, self.column = r.first_row(), r.first_column()
        if rows < 64:
            self.row = arith.andi(self.row, r.integer(rows - 1))

    def pairs(self, columns: int) -> Iterator[tuple[tuple[int, int], _Pair]]:
        """Elements of an accumulator, by their numbers."""
        raise NotImplementedError

    def look_up(self, offset: int) -> list[ir.Value]:
        """Bits of a word after the thread's first, and how many come before it."""
        return r.global_pair(self.table, self.at, 2 * offset, r.i32())

    def load(self, pair: _Pair) -> list[ir.Value]:
        """The values of two elements."""
        width, widen, _ = _TYPES[self.kind]
        text = self._registers + "mov.b16 z, 0; "
        for x, place, bit in (("$0", "$2", 0), ("$1", "$3", 1)):
            target = x if width == "b32" else "h"
            text += f"mov.{width} {target}, 0; " + self._find(place, pair.bits[bit])
            text += f"@p ld.global.nc.{width} {target}, [a]; {widen.format(x=x)} "
        struct = llvm.StructType.get_literal([r.f32()] * 2)
        args = [*pair.before, pair.word, self.first]
        # Here, so that they are under way while the products are.
        both = r.asm(struct, args, text + "}", "=f,=f,r,r,r,l", effects=True)
        return [llvm.extractvalue(r.f32(), both, [e]) for e in range(2)]

    def store(self, pair: _Pair, *values: ir.Value) -> None:
        """Writes the values of two elements."""
        width, _, narrow = _TYPES[self.kind]
        text = self._registers
        for x, place, bit in (("$0", "$2", 0), ("$1", "$3", 1)):
            source = x if width == "b32" else "h"
            text += narrow.format(x=x) + self._find(place, pair.bits[bit])
            text += f"@p st.global.{width} [a], {source}; "
        args = [*values, *pair.before, pair.word, self.first]
        r.command(text + "}", *args, spec="f,f,r,r,r,l")

    _registers = "{ .reg .pred p; .reg .b64 a; .reg .b32 t; .reg .b16 h, z; "

    def _find(self, place: str, bit: int) -> str:
        """Whether an element's bit is set, p, and where its value is, a."""
        return (
            f"and.b32 t, $4, {bit}; setp.ne.s32 p, t, 0; "
            f"mad.wide.s32 a, {place}, {self.size}, $5; "
        )


class _ByQuery(_Place):
    """Rows are queries: a word has columns of one row."""

    def __init__(self, *args):
        super().__init__(*args)
        stride = r.integer(self.words_per_query)
        at = arith.addi(self.word, arith.muli(self.row, stride))
        self.at = arith.muli(at, r.integer(2))

    def pairs(self, columns):
        """See `_Place.pairs`: neighbouring columns, for which bits are counted once."""
        room = arith.subi(r.integer(32), self.column)
        for half in range(2):
            for w in range(-(-columns // 32)):
                bits, before = self.look_up(8 * half * self.words_per_query + w)
                mine = arith.shrui(bits, self.column)
                for pair in range(min(4, columns // 8 - 4 * w)):
                    first = _count(bits, before, room, 8 * pair)
                    own = arith.shrui(mine, r.integer(8 * pair))
                    own = arith.andi(own, r.integer(1))
                    both = first, arith.addi(first, own)
                    at = (4 * w + pair) << 2 | half << 1
                    own_bits = 1 << 8 * pair, 2 << 8 * pair
                    yield (at, at + 1), _Pair(mine, own_bits, both)


class _ByKey(_Place):
    """Rows are keys: each column has a word, and rows r and r + 8 are both in it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.key = arith.addi(self.key, self.row)
        stride = r.integer(self.words_per_query)
        at = arith.addi(self.word, arith.muli(self.column, stride))
        at = arith.addi(at, arith.shrui(self.key, r.integer(5)))
        self.at = arith.muli(at, r.integer(2))

    def pairs(self, columns):
        """See `_Place.pairs`: the thread's two rows of a column."""
        bit = arith.andi(self.key, r.integer(31))
        room = arith.subi(r.integer(32), bit)
        for column in range(columns // 4):
            pair, second = divmod(column, 2)
            bits, before = self.look_up((8 * pair + second) * self.words_per_query)
            both = tuple(_count(bits, before, room, 8 * half) for half in range(2))
            at = pair << 2 | second
            mine = arith.shrui(bits, bit)
            yield (at, at + 2), _Pair(mine, (1, 1 << 8), both)


def _count(bits: ir.Value, before: ir.Value, room: ir.Value, skip: int) -> ir.Value:
    """``before`` and the set bits below one; ``room - skip`` is 32 less its number."""
    text = (
        f"{{ .reg .b32 n; sub.s32 n, $3, {skip}; shl.b32 n, $1, n; "
        "popc.b32 n, n; add.s32 $0, n, $2; }"
    )
    return r.asm(r.i32(), [bits, before, room], text, "=r,r,r,r")
