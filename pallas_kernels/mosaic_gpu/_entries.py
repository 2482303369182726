"""A bias with a value for each entry of neighbour lists: spread over tiles.

The entries of a block lie together (see `neighbors_sm90.list_entries`): where in its
list each is, its query and its key. The first `AT_HAND` come through shared memory with
the keys of the block; so do the values of 64 queries, with these, where rows are
queries and there is room. A warpgroup copies the values of a block to a tile in shared
memory, from where each thread reads its own elements; others do not count, and are left
as they were. The gradient goes from the tile to its places. An entry is one thread's,
and each has a place of its own: no two write to one.

Called by `_biased`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils

from . import _registers as r
from .neighbors_sm90 import HEADER

Array = Any
PADDING = 8
"""Numbers between rows: four rows of neighbouring pairs are in 32 different banks."""
COPIES, COPIED = 2, 256
"""Of the lists, to shared memory for each step; TMA takes no more numbers at a time."""
AT_HAND = COPIES * COPIED - HEADER
"""Entries of a block that are there."""
MOST_VALUES = 256
"""Of a list, that fit: TMA copies no longer rows."""
IN_FLIGHT = 3
"""Values that a thread has under way: a block of 64 x 64 has about 300."""


class TileEntries(NamedTuple):
    """Which entries are a tile's, as scalars.

    Attributes:
        values: number of their first two axes, joined.
        lists: number of the first query block of the batch entry's lists.
        row: first of the tile in its block.
        column: likewise.
    """

    values: Array
    lists: Array
    row: Array
    column: Array


class Sizes(NamedTuple):
    """What is known of tiles before tracing.

    Attributes:
        columns: of a tile, which has 64 rows, or those of a block.
        blocks: queries and keys of a block.
        rows_are_queries: or keys.
    """

    columns: int
    blocks: tuple[int, int]
    rows_are_queries: bool


def tile_scratch(lead: Sequence[int], columns: int) -> plgpu.SMEM:
    """Shared memory of 64-row tiles; ``lead`` are axes before them."""
    return plgpu.SMEM((*lead, 64 * (columns + PADDING)), jnp.float32)


def value_scratch(lead: Sequence[int], count: int, dtype: Any) -> plgpu.SMEM:
    """Shared memory of the values of 64 queries."""
    return plgpu.SMEM((*lead, 64, count), dtype)


def values_fit(count: int, dtype: Any) -> bool:
    """Whether TMA copies values of lists of ``count`` entries."""
    whole = count * jnp.dtype(dtype).itemsize % 16 == 0
    return whole and count <= MOST_VALUES


def list_scratch(lead: Sequence[int]) -> plgpu.SMEM:
    """Shared memory of the entries at hand."""
    return plgpu.SMEM((*lead, COPIES * COPIED), jnp.int32)


def fetch(bias: Any, place: Sequence[Array], listed: Array, full: Array) -> None:
    """Copies the entries of a block to shared memory, `COPIES` times.

    ``place`` are batch entry, query block and key block.
    """
    entry, block, key = place
    first = bias.starts[entry, block, key] - HEADER
    for n in range(COPIES):
        some = bias.lists.at[entry, block, pl.ds(first + n * COPIED, COPIED)]
        plgpu.copy_gmem_to_smem(some, listed.at[pl.ds(n * COPIED, COPIED)], full)


def spread(sizes: Sizes) -> Callable:
    """``f(bias, at, listed, tile, own)``: values to the elements of their entries.

    ``bias`` is an `_bias.EntryBias`, ``at`` a `TileEntries`, ``listed`` what was copied
    by `fetch`, and ``own`` the values of the tile's queries, if they are at hand.
    """

    def f(bias, at, listed, tile, own):
        copy = _each_entry(sizes, bias.count, to_tile=True, at_hand=own is not None)
        copy(bias.values, bias.lists, listed, tile, tile if own is None else own, *at)

    return f


def read(columns: int) -> Callable:
    """``f(tile) -> x``: the thread's elements, once all are there."""
    found = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=r.ACC)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=found)
    def f(_, tile):
        utils.warpgroup_barrier()
        struct = llvm.StructType.get_literal([r.f32()] * 2)
        place, out = _own_elements(tile, columns), []
        for offset in _pairs(columns):
            text = f"ld.shared.v2.f32 {{$0, $1}}, [$2+{offset}];"
            both = r.asm(struct, [place], text, "=f,=f,r", effects=True)
            out += [llvm.extractvalue(r.f32(), both, [e]) for e in range(2)]
        return r.accumulator(out, (64, columns))

    return f


def write(sizes: Sizes) -> Callable:
    """``f(bias, out, at, listed, tile, x)``: elements of x to where their values are.

    ``out`` is as the values; ``at`` tells where in it.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), r.ACC), return_type=())
    def put(_, tile, x):
        place, values = _own_elements(tile, sizes.columns), r.scalars(x)
        for nth, offset in enumerate(_pairs(sizes.columns)):
            text = f"st.shared.v2.f32 [$0+{offset}], {{$1, $2}};"
            r.command(text, place, *values[2 * nth : 2 * nth + 2], spec="r,f,f")

    def f(bias, out, at, listed, tile, x):
        put(tile, x)
        copy = _each_entry(sizes, bias.count, to_tile=False, at_hand=False)
        copy(out, bias.lists, listed, tile, tile, *at)

    return f


def _own_elements(tile: ir.Value, columns: int) -> ir.Value:
    """Where the first of the elements is that the thread's registers hold."""
    row = arith.muli(r.first_row(), r.integer(columns + PADDING))
    number = arith.muli(arith.addi(row, r.first_column()), r.integer(4))
    return arith.addi(llvm.ptrtoint(r.i32(), utils.memref_ptr(tile)), number)


def _pairs(columns: int) -> list[int]:
    """How far behind the first the thread's pairs of elements are, in bytes."""
    below = 8 * (columns + PADDING)
    return [4 * (8 * j + below * half) for j in range(columns // 8) for half in (0, 1)]


# ------------------------------------------------------------------------- each entry

_TYPES = {
    "f32": ("b32", "", ""),
    "bf16": ("b16", "mov.b32 {x}, {{z, {h}}};", "cvt.rn.bf16.f32 {h}, {x};"),
    "f16": ("b16", "cvt.f32.f16 {x}, {h};", "cvt.rn.f16.f32 {h}, {x};"),
}
"""By dtype: how a value is moved, and how h is made float32 x, and x made h."""


def _each_entry(sizes: Sizes, count: int, to_tile: bool, at_hand: bool) -> Callable:
    """``f(values, lists, listed, tile, own, *at)``: copies the values of entries.

    To the tile, from ``own`` if they are ``at_hand``, or from the tile to where they
    belong. Lists have ``count`` entries.
    """

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 5, *[r.SCALAR] * 4), return_type=()
    )
    def f(_, values, lists, listed, tile, own, *at):
        # Nobody still reads of the tile what the last step put there, or all have put
        # there what is to be written.
        utils.warpgroup_barrier()
        ty = ir.MemRefType(values.type)
        kind, of_entry = str(ty.element_type), ty.shape[-2] * ty.shape[-1]
        size = 4 if kind == "f32" else 2
        room, block_q = ir.MemRefType(lists.type).shape[-1], sizes.blocks[0]
        some = [str(n) for n in range(IN_FLIGHT)]
        find = {n: _find(n, sizes, count, size, at_hand) for n in some}
        move = {n: _move(n, kind, to_tile, at_hand) for n in some}
        load = "".join(
            f"mov.b32 e{n}, -1; add.u32 m, i, {128 * k}; setp.lt.u32 p{n}, m, most; "
            f"@p{n} ld.shared.b32 e{n}, [src+{512 * k}]; "
            for k, n in enumerate(some)
        )
        moves = "".join(x for pair in zip(*move.values(), strict=True) for x in pair)
        text = (
            "{ .reg .pred more; .reg .b16 z; .reg .b32 i, u, m, total, most, block; "
            ".reg .b32 src; .reg .b64 base, a; mov.b16 z, 0; "
            + "".join(
                f".reg .pred p{n}; .reg .b16 h{n}; .reg .b64 at{n}; "
                f".reg .b32 e{n}, q{n}, k{n}, x{n}, v{n}, to{n}; "
                for n in some
            )
            # All values of a launch may be more than 32 bits can count.
            + f"cvt.s64.s32 a, $5; mad.lo.s64 base, a, {of_entry * size}, $0; "
            "ld.shared.b32 total, [$2]; ld.shared.b32 block, [$2+4]; "
            f"mul.wide.s32 a, block, {block_q * count * size}; "
            f"add.s64 base, base, a; min.u32 most, total, {AT_HAND}; "
            "mov.u32 i, %tid.x; and.b32 i, i, 127; shl.b32 src, i, 2; "
            f"add.u32 src, src, $2; add.u32 src, src, {4 * HEADER}; mov.b32 u, 0; "
            f"again: {load}{''.join(find.values())}{moves}"
            f"add.u32 i, i, {128 * IN_FLIGHT}; add.u32 src, src, {512 * IN_FLIGHT}; "
            f"add.u32 u, u, {128 * IN_FLIGHT}; setp.lt.u32 more, u, most; "
            "@more bra again; "
            # A block may have more than are at hand.
            f"setp.gt.u32 more, total, {AT_HAND}; @!more bra done; "
            f"add.u32 m, block, $6; mul.wide.u32 a, m, {4 * room}; add.s64 a, a, $1; "
            "ld.shared.b32 m, [$2+8]; mad.wide.u32 a, m, 4, a; "
            f"mov.u32 i, %tid.x; and.b32 i, i, 127; add.u32 i, i, {AT_HAND}; "
            f"mov.b32 u, {AT_HAND}; "
            "rest: mov.b32 e0, -1; setp.lt.u32 p0, i, total; "
            "mad.wide.u32 at0, i, 4, a; @p0 ld.global.nc.b32 e0, [at0]; "
            f"{find['0']}{''.join(move['0'])}add.u32 i, i, 128; add.u32 u, u, 128; "
            "setp.lt.u32 more, u, total; @more bra rest; done: }"
        )
        refs = [utils.memref_ptr(x) for x in (values, lists, listed, tile, own)]
        scalars = [x.registers.item() for x in at]
        r.command(text, *refs, *scalars, spec="l,l,r,r,r,r,r,r,r")

    return f


def _find(n: str, sizes: Sizes, count: int, size: int, at_hand: bool) -> str:
    """Where an entry's element ``to`` and value are, if it counts, p.

    The value is at ``at`` in global, or at ``v`` in shared memory. All are registers of
    the nth entry of the thread.
    """
    row, column = ("q", "k") if sizes.rows_are_queries else ("k", "q")
    block_rows, block_columns = sizes.blocks[:: 1 if sizes.rows_are_queries else -1]
    text = (
        "setp.ge.s32 p{n}, e{n}, 0; and.b32 k{n}, e{n}, 127; "
        "shr.u32 q{n}, e{n}, 7; and.b32 q{n}, q{n}, 127; shr.u32 x{n}, e{n}, 14; "
    )
    if not at_hand:
        text += "mad.lo.u32 v{n}, q{n}, {count}, x{n}; "
        text += "mad.wide.u32 at{n}, v{n}, {size}, base; "
    if block_rows > 64:
        text += f"sub.u32 {row}{{n}}, {row}{{n}}, $7; "
        text += f"setp.lt.and.u32 p{{n}}, {row}{{n}}, 64, p{{n}}; "
    if block_columns > sizes.columns:
        text += f"sub.u32 {column}{{n}}, {column}{{n}}, $8; "
        text += f"setp.lt.and.u32 p{{n}}, {column}{{n}}, {sizes.columns}, p{{n}}; "
    if at_hand:
        text += "mad.lo.u32 v{n}, q{n}, {count}, x{n}; "
        text += "mad.lo.u32 v{n}, v{n}, {size}, $4; "
    pitch = 4 * (sizes.columns + PADDING)
    text += f"mad.lo.u32 to{{n}}, {row}{{n}}, {pitch}, $3; "
    text += f"mad.lo.u32 to{{n}}, {column}{{n}}, 4, to{{n}}; "
    return text.format(n=n, count=count, size=size)


def _move(n: str, kind: str, to_tile: bool, at_hand: bool) -> tuple[str, str]:
    """The load and the store of an entry's value."""
    width, widen, narrow = _TYPES[kind]
    x, h = f"x{n}", f"h{n}"
    register = x if width == "b32" else h
    if to_tile:
        source = f"ld.shared.{width}" if at_hand else f"ld.global.nc.{width}"
        load = f"@p{n} {source} {register}, [{'v' if at_hand else 'at'}{n}]; "
        store = widen.format(x=x, h=h) + f"@p{n} st.shared.b32 [to{n}], {x}; "
    else:
        load = f"@p{n} ld.shared.b32 {x}, [to{n}]; "
        store = narrow.format(x=x, h=h)
        store += f"@p{n} st.global.{width} [at{n}], {register}; "
    return load, store
