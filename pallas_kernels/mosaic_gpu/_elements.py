"""Which elements of a partial block count, tested on the registers of a tile.

Row and column are those of the computed tile: queries and keys in the forward and dq
kernels, keys and queries in the dk and dv kernel, which computes the transpose. An
element counts if its row and column exist, its bit is set and every rule allows it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax.experimental.mosaic.gpu import utils

from . import _registers as r
from . import _tiles

Array = Any
Values = list[Any]


class SameLabel(NamedTuple):
    """Allows equal labels: ``rows [B or 1, R]``, ``columns [B or 1, C]`` int32."""

    rows: Array
    columns: Array

    def by_row(self, at: Place) -> Values:
        """What the thread needs for its two rows."""
        return [at.rows(self.rows)]

    def by_column(self, at: Place, pair: int) -> Values:
        """What it needs for two neighbouring columns."""
        return [at.columns(self.columns, pair)]

    def allows(self, row: Values, column: Values, i: ir.Value):
        """Whether the element of row i and a column counts."""
        del i
        return _compare("eq", row[0], column[0])


class RowInterval(NamedTuple):
    """Allows columns ``start <= c < stop`` of each row, ``[B or 1, R]`` int32.

    Tested by bit, as lengths are: see `Place.words`.
    """

    start: Array
    stop: Array


class ColumnInterval(NamedTuple):
    """Allows rows ``start <= r < stop`` of each column, ``[B or 1, C]`` int32."""

    start: Array
    stop: Array

    def by_row(self, at: Place) -> Values:
        """See `SameLabel`."""
        return []

    def by_column(self, at: Place, pair: int) -> Values:
        """See `SameLabel`."""
        return [at.columns(self.start, pair), at.columns(self.stop, pair)]

    def allows(self, row: Values, column: Values, i: ir.Value):
        """See `SameLabel`."""
        start, stop = column
        return _both(_compare("sle", start, i), _compare("slt", i, stop))


class Within(NamedTuple):
    """Allows pairs no farther apart than a cut-off.

    ``rows [B or 1, 3, R]``, ``columns [B or 1, 3, C]``, ``cutoff2 [B or 1]``, the
    squared cut-off; float32. Coordinates that are NaN are close to nothing. The same
    operations in every kernel, so that they agree on each pair.
    """

    rows: Array
    columns: Array
    cutoff2: Array

    def by_row(self, at: Place) -> Values:
        """See `SameLabel`."""
        return [at.rows(self.rows, axis) for axis in range(3)] + [
            2 * [at.entry(self.cutoff2)]
        ]

    def by_column(self, at: Place, pair: int) -> Values:
        """See `SameLabel`."""
        return [at.columns(self.columns, pair, axis) for axis in range(3)]

    def allows(self, row: Values, column: Values, i: ir.Value):
        """See `SameLabel`."""
        del i
        *xyz, cutoff2 = row
        dx, dy, dz = (r.sub(x, y) for x, y in zip(xyz, column, strict=True))
        square = r.fma(dz, dz, r.fma(dy, dy, r.mul(dx, dx)))
        return arith.cmpf(arith.CmpFPredicate.OLE, square, cutoff2)


Rule = SameLabel | RowInterval | ColumnInterval | Within


class Elements(NamedTuple):
    """The element test of a launch; see the module.

    Attributes:
        lengths: ``[2 B]`` int32, existing rows and columns of each batch entry; None if
            bits or coordinates rule out the others.
        bits: ``[B or 1, n, block_rows, ceil(block_columns / 32)]`` int32 or None.
        rules: all of them must allow.
        bad: ``[B, heads of the columns, C]`` int32, not 0 where a column has a value
            that is not finite; see `_persistent`.
    """

    lengths: Array | None
    bad: Array
    bits: Array | None = None
    rules: tuple[Rule, ...] = ()


class Position(NamedTuple):
    """Scalars that place a 64-row tile: ``bit_word`` is its first word of bits."""

    batch: Array
    row: Array
    column: Array
    bit_word: Array


class Place:
    """The thread's rows and columns of a tile, in one batch entry."""

    def __init__(self, scalars: Sequence[ir.Value], columns: int, rows: int):
        self.batch, self.row0, self.column0, self.bit_word = scalars
        self.thread_row, self.thread_column = r.first_row(), r.first_column()
        if rows < 64:
            self.thread_row = arith.andi(self.thread_row, r.integer(rows - 1))
        self.num_columns = columns

    def row(self, half: int) -> ir.Value:
        """Index of the row."""
        row = arith.addi(self.row0, self.thread_row)
        return arith.addi(row, r.integer(8 * half))

    def column(self, n: int) -> ir.Value:
        """Index of the thread's n-th column."""
        column = arith.addi(self.column0, self.thread_column)
        return arith.addi(column, r.integer(n // 2 * 8 + n % 2))

    def _start(self, ref: ir.Value, axis: int, first: ir.Value) -> ir.Value:
        """Position of an index of a ``[B or 1, (3,) n]`` array, flattened."""
        shape = ir.MemRefType(ref.type).shape
        if shape[0] > 1:
            entry = shape[1] * shape[2] if len(shape) == 3 else shape[1]
            first = arith.addi(first, arith.muli(self.batch, r.integer(entry)))
        return arith.addi(first, r.integer(axis * shape[-1]))

    def rows(self, ref: ir.Value, axis: int = 0, here: bool = False) -> list[ir.Value]:
        """Values of the thread's two rows; ``here`` as in `_registers.global_word`."""
        ty = ir.MemRefType(ref.type).element_type
        first = arith.addi(self.row0, self.thread_row)
        at = self._start(ref, axis, first)
        return [r.global_word(ref, at, 8 * half, ty, here) for half in range(2)]

    def columns(self, ref: ir.Value, pair: int, axis: int = 0) -> list[ir.Value]:
        """Values of two neighbouring columns of the thread."""
        ty = ir.MemRefType(ref.type).element_type
        first = arith.addi(self.column0, self.thread_column)
        at = self._start(ref, axis, first)
        return r.global_pair(ref, at, 8 * pair, ty)

    def entry(self, ref: ir.Value) -> ir.Value:
        """Value of the batch entry."""
        shared = ir.MemRefType(ref.type).shape[0] == 1
        at = r.integer(0) if shared else self.batch
        return r.global_word(ref, at, 0, r.f32())

    def words(self, lengths: Any, bits: Any, intervals: Sequence) -> list[ir.Value]:
        """For each row half, a bit for each of the thread's columns: see `_bit`.

        It is set if row and column exist, if their own bit is and if the intervals of
        the row have the column.
        """
        count = -(-self.num_columns // 32)
        out = [[r.integer(-1)] * count for _ in range(2)]
        if bits is not None:
            stride = ir.MemRefType(bits.type).shape[-1]
            first = arith.muli(self.thread_row, r.integer(stride))
            first = arith.addi(self.bit_word, first)
            for half, w in itertools.product(range(2), range(count)):
                word = r.global_word(bits, first, 8 * half * stride + w, r.i32(), True)
                out[half][w] = arith.shrui(word, self.thread_column)
        if lengths is not None:
            two = arith.muli(self.batch, r.integer(2))
            rows, columns = (
                r.global_word(lengths, two, i, r.i32(), True) for i in range(2)
            )
            exist = [self._before(columns, w) for w in range(count)]
            for half in range(2):
                row_exists = _compare("slt", self.row(half), rows)
                for w, word in enumerate(out[half]):
                    counts = arith.select(row_exists, exist[w], r.integer(0))
                    out[half][w] = _both(word, counts)
        for start, stop in intervals:
            ends = [self.rows(x, here=True) for x in (start, stop)]
            for half, (first, last) in enumerate(zip(*ends, strict=True)):
                for w, word in enumerate(out[half]):
                    too_low = arith.xori(self._before(first, w), r.integer(-1))
                    inside = _both(self._before(last, w), too_low)
                    out[half][w] = _both(word, inside)
        return [_packed(words) for words in out]

    def _before(self, column: ir.Value, w: int) -> ir.Value:
        """Bits of the w-th 32 columns from the thread's first that are before one."""
        return r.low_bits(arith.subi(column, self.column(8 * w)))


def _packed(words: Sequence[ir.Value]) -> ir.Value:
    """Two bits of each byte of each word, those of a byte side by side."""
    out = r.integer(0)
    for w, word in enumerate(words):
        own = arith.shli(_both(word, r.integer(0x03030303)), r.integer(2 * w))
        out = arith.ori(out, own)
    return out


def _bit(n: int) -> int:
    """The bit of a thread's n-th column in a word of `Place.words`.

    Neighbours, of which it has two every 8 columns, are side by side, and so are those
    32 columns on: compilers then make predicates of a byte at a time.
    """
    pair, second = divmod(n, 2)
    return pair % 4 * 8 + pair // 4 * 2 + second


def _compare(how: str, x: ir.Value, y: ir.Value) -> ir.Value:
    return arith.cmpi(getattr(arith.CmpIPredicate, how), x, y)


def _both(x: ir.Value, y: ir.Value) -> ir.Value:
    return arith.andi(x, y)


WORDS = (64, 8)
"""An array whose registers, four a thread, hold a tile's words."""


def _intervals(elements: Elements) -> list[RowInterval]:
    return [rule for rule in elements.rules if isinstance(rule, RowInterval)]


def _has_words(elements: Elements) -> bool:
    given = elements.lengths is not None or elements.bits is not None
    return given or bool(_intervals(elements))


def no_words(elements: Elements) -> Array | None:
    """What `fetch` returns, with nothing in it."""
    if not _has_words(elements):
        return None
    return plgpu.layout_cast(jnp.zeros(WORDS, jnp.float32), r.ACC)


def fetch(elements: Elements, columns: int, rows: int) -> Callable:
    """``f(position) -> words``: what `apply` tests, by bit, all but the other rules by.

    The words, or None, are integers in registers of a float32 array.
    """
    if not _has_words(elements):
        return lambda position: None
    used = elements.lengths, elements.bits, _intervals(elements)
    refs, tree = jax.tree_util.tree_flatten(used)

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * len(refs), *[r.SCALAR] * 4),
        return_type=plgpu.ShapeDtypeStruct(WORDS, jnp.float32, layout=r.ACC),
    )
    def f(_, *args):
        at = Place([x.registers.item() for x in args[len(refs) :]], columns, rows)
        words = at.words(*jax.tree_util.tree_unflatten(tree, args[: len(refs)]))
        values = [arith.bitcast(r.f32(), word) for word in words]
        return r.accumulator(values + [r.number(0.0)] * 2, WORDS)

    return lambda position: f(*refs, *position)


def apply(elements: Elements, columns: int, fill: float, rows: int) -> Callable:
    """``f(x, position, words) -> x``, ``fill`` where an element does not count.

    ``elements`` holds references to global memory, ``words`` is from `fetch`; x is 64 x
    ``columns``. Where a block has only 32 ``rows``, the others are tested as if they
    were these: nothing beyond the block is read.
    """
    others = [rule for rule in elements.rules if not isinstance(rule, RowInterval)]
    refs, tree = jax.tree_util.tree_flatten(others)
    given = int(_has_words(elements))

    @plgpu.inline_mgpu(
        arg_types=(
            *[r.ACC] * (1 + given),
            *[plgpu.RefType()] * len(refs),
            *[r.SCALAR] * 4,
        ),
        return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=r.ACC),
    )
    def f(_, s, *args):
        args = list(args)
        words = []
        if given:
            words = [arith.bitcast(r.i32(), x) for x in r.scalars(args.pop(0))]
        rules = jax.tree_util.tree_unflatten(tree, args[: len(refs)])
        at = Place([x.registers.item() for x in args[len(refs) :]], columns, rows)
        by_row = [rule.by_row(at) for rule in rules]
        out = r.scalars(s)
        # Two columns at a time: what both rows need of them is loaded once, soon used.
        for i, x in enumerate(out):
            pair, half, second = i >> 2, (i >> 1) & 1, i & 1
            if i % 4 == 0:
                values = [rule.by_column(at, pair) for rule in rules]
            tests = []
            if words:
                bit = r.integer(_signed(1 << _bit(2 * pair + second)))
                bit = arith.andi(words[half], bit)
                tests.append(_compare("ne", bit, r.integer(0)))
            for rule, of_row, of_column in zip(rules, by_row, values, strict=True):
                of_row = [x[half] for x in of_row]
                of_column = [x[second] for x in of_column]
                tests.append(rule.allows(of_row, of_column, at.row(half)))
            counts = functools.reduce(_both, tests)
            out[i] = arith.select(counts, x, r.number(fill))
        return r.accumulator(out, (64, columns))

    def test(x, position, words):
        return f(x, *([words] if given else []), *refs, *position)

    return test


def poison(columns: int) -> Callable:
    """``f(x, bad, first) -> x``, NaN in columns that are not finite, where not -inf.

    ``first`` is where the first of the 64 x ``columns`` tile stands in ``bad``.
    """

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, plgpu.RefType(), r.SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=r.ACC),
    )
    def f(_, x, bad, first):
        first = arith.addi(first.registers.item(), r.first_column())
        flags = [
            _compare("ne", flag, r.integer(0))
            for pair in range(columns // 8)
            for flag in r.global_pair(bad, first, 8 * pair, r.i32())
        ]
        values = [
            _nan_if_flagged(flags[i >> 2 << 1 | i & 1], v)
            for i, v in enumerate(r.scalars(x))
        ]
        return r.accumulator(values, (64, columns))

    return f


def _nan_if_flagged(flag: ir.Value, x: ir.Value) -> ir.Value:
    seen = arith.cmpf(arith.CmpFPredicate.UNE, x, r.number(-math.inf))
    return arith.select(arith.andi(flag, seen), r.number(math.nan), x)


def zero_columns(columns: int, dim: int) -> Callable:
    """``f(tile, bad, first)``: zeros for tokens that are not finite.

    A token is a row of a 16-bit tile of ``columns`` rows and ``dim`` columns, and of
    each of its parts: a swizzle moves nothing out of a row. A thread has one.
    """
    dtype = jnp.bfloat16
    parts, width = _tiles.parts(dim, dtype)
    row = 2 * width
    stores = "".join(
        f"st.shared.v4.b32 [d+{columns * row * part + at}], {{z, z, z, z}}; "
        for part in range(parts)
        for at in range(0, row, 16)
    )
    text = (
        "{ .reg .pred p; .reg .b32 t, d, z; .reg .b64 a; "
        f"mov.u32 t, %tid.x; and.b32 t, t, 127; setp.ge.u32 p, t, {columns}; "
        "@p bra DONE; add.s32 z, t, $2; mad.wide.s32 a, z, 4, $1; "
        "ld.global.nc.b32 z, [a]; setp.eq.s32 p, z, 0; @p bra DONE; mov.b32 z, 0; "
        f"mad.lo.u32 d, t, {row}, $0; {stores} DONE: }}"
    )

    @plgpu.inline_mgpu(
        arg_types=(_tiles.ref_type(dim, dtype), plgpu.RefType(), r.SCALAR),
        return_type=(),
    )
    def f(_, tile, bad, first):
        refs = (utils.memref_ptr(tile), utils.memref_ptr(bad))
        r.command(text, *refs, first.registers.item(), spec="r,l,r")

    return f


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
