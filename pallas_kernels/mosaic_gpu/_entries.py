"""A bias with a value for each set bit: spread over a tile in shared memory.

The values of a block lie together, in the order of its bits. Of the 16 rows of a warp
each lane takes some words of bits, and copies the values of those that are set to their
elements of a tile, from where every lane of the warp reads its own. Other elements do
not count, and are left as they were. The gradient goes the same way back: each bit is
one lane's, so that no two write to one place. Warps wait for nobody but their lanes.

Called by `_biased`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils

from . import _registers as r

Array = Any
PADDING = 8
"""Numbers between rows: four rows of neighbouring pairs are in 32 different banks."""
IN_FLIGHT = {1: 4, 2: 3, 4: 2}
"""Values of a word that a lane has under way, by how many words it has."""


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


def scratch(lead: Sequence[int], columns: int) -> plgpu.SMEM:
    """Shared memory of 64-row tiles; ``lead`` are axes before them."""
    return plgpu.SMEM((*lead, 64 * (columns + PADDING)), jnp.float32)


def spread(columns: int, rows: int, rows_are_queries: bool) -> Callable:
    """``f(table, values, at, tile)``: values to the elements whose bits are set.

    ``table`` and ``values`` are those of `_bias.EntryBias`, ``at`` is a `TileEntries`,
    and ``rows`` are those of a block, if there are less than 64.
    """

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 3, *[r.SCALAR] * 3), return_type=()
    )
    def f(_, table, values, tile, *at):
        at = TileEntries(*(x.registers.item() for x in at))
        find = _by_query if rows_are_queries else _by_key
        words = find(table, tile, at, columns, rows)
        # Nobody still reads the last step's.
        r.command("bar.warp.sync 0xffffffff;")
        _each_bit(words, values, at.entry, to_shared=True)

    return lambda table, values, at, tile: f(table, values, tile, *at)


def read(columns: int) -> Callable:
    """``f(tile) -> x``: what the lanes of the warp have spread."""
    found = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=r.ACC)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=found)
    def f(_, tile):
        r.command("bar.warp.sync 0xffffffff;")
        struct = llvm.StructType.get_literal([r.f32()] * 2)
        place, out = _own_elements(tile, columns), []
        for offset in _pairs(columns):
            text = f"ld.shared.v2.f32 {{$0, $1}}, [$2+{offset}];"
            both = r.asm(struct, [place], text, "=f,=f,r", effects=True)
            out += [llvm.extractvalue(r.f32(), both, [e]) for e in range(2)]
        return r.accumulator(out, (64, columns))

    return f


def write(columns: int) -> Callable:
    """``f(table, out, at, tile, x)``: writes x where bits are set; rows are queries."""

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 3, *[r.SCALAR] * 3, r.ACC), return_type=()
    )
    def f(_, table, out, tile, *args):
        *at, x = args
        at = TileEntries(*(x.registers.item() for x in at))
        words, values = _by_query(table, tile, at, columns, 64), r.scalars(x)
        place = _own_elements(tile, columns)
        for nth, offset in enumerate(_pairs(columns)):
            text = f"st.shared.v2.f32 [$0+{offset}], {{$1, $2}};"
            r.command(text, place, *values[2 * nth : 2 * nth + 2], spec="r,f,f")
        r.command("bar.warp.sync 0xffffffff;")
        _each_bit(words, out, at.entry, to_shared=False)

    return lambda table, out, at, tile, x: f(table, out, tile, *at, x)


# -------------------------------------------------------------------- words of a lane


class _Word(NamedTuple):
    """Some bits of a lane.

    Attributes:
        bits: which are set.
        before: how many bits come before the first.
        place: of the first bit's element in shared memory.
        step: bytes from an element to the next bit's.
    """

    bits: ir.Value
    before: ir.Value
    place: ir.Value
    step: int


def _by_query(
    table: ir.Value, tile: ir.Value, at: TileEntries, columns: int, rows: int
) -> list[_Word]:
    """Of a lane where rows are queries: a word has columns of one row."""
    del rows  # at least 64
    per_row, per_query = columns // 32, ir.MemRefType(table.type).shape[-2]
    lane, first, found = r.lane(), _first_row(), []
    for n in range(-(-per_row // 2)):
        number = arith.addi(lane, r.integer(32 * n))
        row = arith.divui(number, r.integer(per_row))
        word = arith.remui(number, r.integer(per_row))
        used = arith.cmpi(arith.CmpIPredicate.ult, row, r.integer(16))
        row = arith.addi(first, arith.andi(row, r.integer(15)))
        index = arith.addi(at.word, arith.muli(row, r.integer(per_query)))
        bits, before = _look_up(table, arith.addi(index, word))
        bits = arith.select(used, bits, r.integer(0))
        word = arith.muli(word, r.integer(32))
        place = _element(tile, columns, row, word)
        found.append(_Word(bits, before, place, 4))
    return found


def _by_key(
    table: ir.Value, tile: ir.Value, at: TileEntries, columns: int, rows: int
) -> list[_Word]:
    """Of a lane where rows are keys: of each column's word the half with the rows."""
    per_query = ir.MemRefType(table.type).shape[-2]
    lane, first, found = r.lane(), _first_row(), []
    key = arith.addi(at.key, arith.andi(first, r.integer(rows - 1)))
    word = arith.addi(at.word, arith.shrui(key, r.integer(5)))
    shift = arith.andi(key, r.integer(31))
    for n in range(columns // 32):
        column = arith.addi(lane, r.integer(32 * n))
        index = arith.addi(word, arith.muli(column, r.integer(per_query)))
        bits, before = _look_up(table, index)
        text = (
            "{ .reg .b32 m; bmsk.clamp.b32 m, 0, $3; and.b32 m, m, $1; popc.b32 m, m; "
            "add.s32 $0, $2, m; }"
        )
        before = r.asm(r.i32(), [bits, before, shift], text, "=r,r,r,r")
        bits = arith.andi(arith.shrui(bits, shift), r.integer(0xFFFF))
        place = _element(tile, columns, first, column)
        found.append(_Word(bits, before, place, 4 * (columns + PADDING)))
    return found


def _look_up(table: ir.Value, index: ir.Value) -> list[ir.Value]:
    """A word, and how many bits come before it."""
    return r.global_pair(table, arith.muli(index, r.integer(2)), 0, r.i32())


def _first_row() -> ir.Value:
    """The first row of the warp."""
    text = "{ .reg .b32 a; mov.u32 a, %tid.x; and.b32 a, a, 96; shr.u32 $0, a, 1; }"
    return r.asm(r.i32(), [], text, "=r")


def _element(
    tile: ir.Value, columns: int, row: ir.Value, column: ir.Value
) -> ir.Value:
    """Where an element is in shared memory."""
    number = arith.muli(row, r.integer(columns + PADDING))
    number = arith.muli(arith.addi(number, column), r.integer(4))
    return arith.addi(llvm.ptrtoint(r.i32(), utils.memref_ptr(tile)), number)


def _own_elements(tile: ir.Value, columns: int) -> ir.Value:
    """Where the first of the elements is that the thread's registers hold."""
    return _element(tile, columns, r.first_row(), r.first_column())


def _pairs(columns: int) -> list[int]:
    """How far behind the first the thread's pairs of elements are, in bytes."""
    below = 8 * (columns + PADDING)
    return [4 * (8 * j + below * half) for j in range(columns // 8) for half in (0, 1)]


# --------------------------------------------------------------------------- each bit

_TYPES = {
    "f32": ("b32", "", ""),
    "bf16": ("b16", "mov.b32 {x}, {{z, {h}}};", "cvt.rn.bf16.f32 {h}, {x};"),
    "f16": ("b16", "cvt.f32.f16 {x}, {h};", "cvt.rn.f16.f32 {h}, {x};"),
}
"""By dtype: how a value is moved, and how h is made float32 x, and x made h."""


def _each_bit(
    words: Sequence[_Word], values: ir.Value, entry: ir.Value, to_shared: bool
) -> None:
    """Copies the values of all set bits of a warp's words, or to where they belong.

    From the highest bit on, which one instruction finds, a few of each word at a time;
    all lanes go on until the last one is done.
    """
    ty = ir.MemRefType(values.type)
    kind = str(ty.element_type)
    size, count = (4 if kind == "f32" else 2), IN_FLIGHT[len(words)]
    args = [x for word in words for x in word[:3]] + [utils.memref_ptr(values), entry]
    pointer, number = f"${len(args) - 2}", f"${len(args) - 1}"
    text = "{ .reg .pred more; .reg .b16 z; .reg .b32 n, m; .reg .b64 e; "
    # All values of a launch may be more than 32 bits can count.
    text += f"mov.b16 z, 0; cvt.s64.s32 e, {number}; "
    text += f"mad.lo.s64 e, e, {ty.shape[-1] * size}, {pointer}; "
    for w in range(len(words)):
        text += f".reg .b32 bits{w}; .reg .b64 last{w}; mov.b32 bits{w}, ${3 * w}; "
        text += f"popc.b32 n, bits{w}; add.s32 n, n, ${3 * w + 1}; "
        text += f"mad.wide.s32 last{w}, n, {size}, e; "
        for name in (f"{w}_{n}" for n in range(count)):
            text += f".reg .pred p{name}; .reg .b32 x{name}, to{name}; "
            text += f".reg .b16 h{name}; "
    text += "again: "
    copies = []
    for w, word in enumerate(words):
        for n in range(count):
            name = f"{w}_{n}"
            # Beyond the last bit n is -1, and what is shifted by it 0.
            text += f"setp.ne.s32 p{name}, bits{w}, 0; bfind.u32 n, bits{w}; "
            text += f"mad.lo.u32 to{name}, n, {word.step}, ${3 * w + 2}; "
            text += f"shl.b32 m, 1, n; xor.b32 bits{w}, bits{w}, m; "
            copies.append(_copy(name, f"last{w}+{-(n + 1) * size}", kind, to_shared))
    text += "".join(load for load, _ in copies) + "".join(store for _, store in copies)
    text += "mov.b32 n, 0; "
    for w in range(len(words)):
        text += f"sub.s64 last{w}, last{w}, {count * size}; or.b32 n, n, bits{w}; "
    text += (
        "setp.ne.s32 more, n, 0; vote.sync.any.pred more, more, 0xffffffff; "
        "@more bra again; }"
    )
    r.command(text, *args, spec=",".join(["r,r,r"] * len(words) + ["l,r"]))


def _copy(name: str, at: str, kind: str, to_shared: bool) -> tuple[str, str]:
    """The load and the store of a value, both under its predicate."""
    width, widen, narrow = _TYPES[kind]
    x, h, p = (f"{letter}{name}" for letter in "xhp")
    register = x if width == "b32" else h
    if to_shared:
        load = f"@{p} ld.global.nc.{width} {register}, [{at}]; "
        store = widen.format(x=x, h=h) + f"@{p} st.shared.b32 [to{name}], {x}; "
    else:
        load = f"@{p} ld.shared.b32 {x}, [to{name}]; "
        store = narrow.format(x=x, h=h) + f"@{p} st.global.{width} [{at}], {register}; "
    return load, store
