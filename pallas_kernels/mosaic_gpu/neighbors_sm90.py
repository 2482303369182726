"""The blocks and bits of neighbour lists: two kernels, a warpgroup a query block.

Lists are read as they come, in any order, with duplicates: a key's block is flagged,
its bit is or-ed, both in shared memory, and neither asks who comes first. Between the
two, their caller numbers the blocks.

May assume: blocks of `BLOCKS`, and at most `MOST_KEY_BLOCKS` of keys. Called by the
builder of such masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax.experimental.mosaic.gpu import utils

from .._common import divided
from . import _registers as r
from ._manual_axes import per_device

Array = Any
BLOCKS = {"block_q": (64, 128), "block_kv": (32, 64, 128)}
THREADS = 128
AT_ONCE = 8
"""Entries that a thread has in flight."""
ROOM = 64 * 1024
"""Bytes of bits that a CTA sets at a time: three CTAs fit on a multiprocessor."""
MOST_KEY_BLOCKS = 8192
"""Their flags take 32 KB, and 64 registers of a thread on their way out."""
_PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


def takes(num_kv_blocks: int, block_q: int, block_kv: int) -> bool:
    """Whether the kernels were built for such blocks, and so many."""
    fit = block_q in BLOCKS["block_q"] and block_kv in BLOCKS["block_kv"]
    return fit and num_kv_blocks <= MOST_KEY_BLOCKS


def touched_blocks(
    index: Array, lengths: Array, *, kv_len: int, block_q: int, block_kv: int
) -> Array:
    """Which key blocks the lists of a query block name.

    Args:
        index: ``[B or 1, T, k]`` int32; a key that does not exist is padding.
        lengths: ``[B, 2]`` int32, queries and keys that exist.
        kv_len: number of keys S.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        ``[B, nq, nk]`` bool.
    """
    batch, (entries, q_len, count) = len(lengths), index.shape
    num_q, num_kv = -(-q_len // block_q), -(-kv_len // block_kv)
    room = -(-num_kv // (4 * THREADS)) * 4 * THREADS
    flag = flag_blocks(count, block_kv)

    def body(index, lengths, out, flags):
        entry, block = divided(lax.axis_index("block"), num_q)
        rows = _Rows.of(lengths, entry, block, q_len * (entries > 1), block_q)
        flags[...] = _zeros((room,))
        plgpu.commit_smem()
        rows.each(count, lambda *some: flag(index, flags, rows.first, *some, rows.keys))
        plgpu.commit_smem()
        found = plgpu.load(flags, layout=_strided((room,), 4), optimized=False)
        out[entry * num_q + block] = found.astype(jnp.int8)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * num_q, room), jnp.int8),
        scratch_types=[plgpu.SMEM((room,), jnp.int32)],
        grid=(batch * num_q,),
        grid_names=("block",),
        kernel_name="jsparse_neighbor_blocks",
        compiler_params=_PARAMS,
    )
    (found,) = per_device(lambda *x: [kernel(*x)])(index.reshape(-1, count), lengths)
    return found.reshape(batch, num_q, room)[..., :num_kv] != 0


def set_bits(
    index: Array,
    lengths: Array,
    numbers: Array,
    starts: Array,
    *,
    kv_len: int,
    block_q: int,
    block_kv: int,
    num_bits: int,
) -> Array:
    """The bits of the elements that lists name.

    Args:
        index: as in `touched_blocks`.
        lengths: as in `touched_blocks`.
        numbers: ``[B, nq, nk]`` int32, of the blocks that are touched, counted through
            all query blocks of a batch entry.
        starts: ``[B, nq + 1]`` int32, the first of each query block, and their total.
        kv_len: number of keys S.
        block_q: queries per block.
        block_kv: keys per block.
        num_bits: blocks that there is room for; those beyond are left out.

    Returns:
        ``[B, num_bits, block_q, words]`` uint32, 0 in blocks that do not exist.
    """
    batch, (entries, q_len, count) = len(lengths), index.shape
    num_q, num_kv = -(-q_len // block_q), -(-kv_len // block_kv)
    words = block_kv // 32
    at_once = ROOM // (4 * block_q * words)
    # Of a block; TMA takes at most 256 numbers along an axis.
    shape = (-(-block_q * words // 128), min(block_q * words, 128))
    add = add_bits(count, block_q, block_kv, at_once)

    def body(index, lengths, numbers, starts, out, tile):
        entry, block = divided(lax.axis_index("block"), num_q)
        rows = _Rows.of(lengths, entry, block, q_len * (entries > 1), block_q)
        at, of_row = entry * (num_q + 1), (entry * num_q + block) * num_kv
        begin, stop = starts[at + block], starts[at + block + 1]
        total = starts[at + num_q]

        def clear():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile[...] = _zeros((at_once, *shape))
            plgpu.commit_smem()

        def some_blocks(n, _):
            first = begin + n * at_once
            clear()
            args = index, numbers, tile, rows.first, of_row, first
            rows.each(count, lambda *some: add(*args, *some, rows.keys))
            plgpu.commit_smem()
            found = jnp.minimum(stop, num_bits) - first

            def copy(i, _):
                plgpu.copy_smem_to_gmem(tile.at[i], out.at[entry, first + i])

            lax.fori_loop(0, jnp.minimum(found, at_once), copy, None)

        lax.fori_loop(0, _rounds(stop - begin, at_once), some_blocks, None)
        clear()

        def copy_zeros(n, _):
            unused = out.at[entry, total + block + n * num_q]
            plgpu.copy_smem_to_gmem(tile.at[0], unused)

        # What no block uses is shared out among all.
        lax.fori_loop(0, _rounds(num_bits - total - block, num_q), copy_zeros, None)
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, num_bits, *shape), jnp.int32),
        scratch_types=[plgpu.SMEM((at_once, *shape), jnp.int32)],
        grid=(batch * num_q,),
        grid_names=("block",),
        kernel_name="jsparse_neighbor_bits",
        compiler_params=_PARAMS,
    )
    flat = index.reshape(-1, count), lengths, numbers.reshape(-1), starts.reshape(-1)
    (found,) = per_device(lambda *x: [kernel(*x)])(*flat)
    found = found.reshape(batch, num_bits, block_q, words)
    return lax.bitcast_convert_type(found, jnp.uint32)


class _Rows(NamedTuple):
    """The lists of a query block.

    Attributes:
        first: number of the first query, of all batch entries.
        number: of queries that exist.
        keys: that exist.
    """

    first: Array
    number: Array
    keys: Array

    @classmethod
    def of(cls, lengths, entry, block, rows: int, block_q: int) -> _Rows:
        """Of a block, where each batch entry has ``rows`` lists of its own, or none."""
        number = jnp.clip(lengths[entry, 0] - block * block_q, 0, block_q)
        return cls(entry * rows + block * block_q, number, lengths[entry, 1])

    def each(self, count: int, body: Callable) -> None:
        """``body(n, end)`` for entries n, n + 1, ... of ``end``, some at a time."""
        end, step = self.number * count, THREADS * AT_ONCE

        def some(n, _):
            body(n * step, end)

        lax.fori_loop(0, _rounds(end, step), some, None)


def flag_blocks(count: int, block_kv: int) -> Callable:
    """``f(index, flags, row, first, end, keys)``: 1 in the flags of blocks.

    Of entries ``first``, ... of the lists from ``row`` on, before ``end``, as many as
    are in flight.
    """

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 2, *[r.SCALAR] * 4), return_type=()
    )
    def f(_, index, flags, *scalars):
        row, first, end, keys = (x.registers.item() for x in scalars)
        to = utils.memref_ptr(flags)
        for key in _keys(index, row, first, end, count):
            text = (
                "{ .reg .pred p; .reg .b32 a; setp.lt.u32 p, $1, $2; "
                f"shr.u32 a, $1, {block_kv.bit_length() - 1}; shl.b32 a, a, 2; "
                "add.u32 a, a, $0; @p st.shared.b32 [a], 1; }"
            )
            r.command(text, to, key, keys, spec="r,r,r")

    return f


def add_bits(count: int, block_q: int, block_kv: int, at_once: int) -> Callable:
    """``f(index, numbers, tile, row, of_row, block, first, end, keys)``: sets bits.

    As `flag_blocks`; of blocks ``block``, ... whose bits the tile has. ``of_row`` is
    where the numbers of the query block begin.
    """
    words = block_kv // 32

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 3, *[r.SCALAR] * 6), return_type=()
    )
    def f(_, index, numbers, tile, *scalars):
        row, of_row, block, first, end, keys = (x.registers.item() for x in scalars)
        of_block, to = utils.memref_ptr(numbers), utils.memref_ptr(tile)
        found = list(_keys(index, row, first, end, count))
        # Of a key that does not exist, a number that is not below.
        text = (
            "{ .reg .pred p; .reg .b32 a; .reg .b64 d; setp.lt.u32 p, $1, $2; "
            f"shr.u32 a, $1, {block_kv.bit_length() - 1}; add.s32 a, a, $3; "
            "mad.wide.s32 d, a, 4, $4; mov.b32 $0, -1; @p ld.global.nc.b32 $0, [d]; "
            "@p sub.s32 $0, $0, $5; }"
        )
        spec = "=&r,r,r,r,l,r"
        args = keys, of_row, of_block, block
        places = [r.asm(r.i32(), [key, *args], text, spec) for key in found]
        for nth, (key, place) in enumerate(zip(found, places, strict=True)):
            text = (
                "{ .reg .pred p; .reg .b32 a, w, q; "
                f"setp.lt.u32 p, $2, {at_once}; mov.u32 q, %tid.x; "
                f"add.u32 q, q, $3; add.u32 q, q, {nth * THREADS}; "
                f"div.u32 q, q, {count}; mad.lo.u32 a, $2, {block_q}, q; "
                f"and.b32 w, $1, {block_kv - 1}; shr.u32 q, w, 5; "
                f"mad.lo.u32 a, a, {words}, q; mad.lo.u32 a, a, 4, $0; "
                "and.b32 w, w, 31; shl.b32 w, 1, w; @p red.shared.or.b32 [a], w; }"
            )
            r.command(text, to, key, place, first, spec="r,r,r,r")

    return f


def _keys(
    index: ir.Value, row: ir.Value, first: ir.Value, end: ir.Value, count: int
) -> list[ir.Value]:
    """Some entries of the thread; -1 where there are none."""
    text = (
        "{{ .reg .pred p; .reg .b32 t; .reg .b64 d; mov.u32 t, %tid.x; "
        "add.s32 t, t, $3; add.s32 t, t, {at}; setp.lt.s32 p, t, $4; "
        "mul.wide.s32 d, $2, {row}; add.s64 d, d, $1; mad.wide.s32 d, t, 4, d; "
        "mov.b32 $0, -1; @p ld.global.nc.b32 $0, [d]; }}"
    )
    args = [utils.memref_ptr(index), row, first, end]
    return [
        r.asm(r.i32(), args, text.format(at=n * THREADS, row=4 * count), "=&r,l,r,r,r")
        for n in range(AT_ONCE)
    ]


def _strided(shape: tuple[int, ...], vec_size: int) -> Any:
    return plgpu.Layout.WG_STRIDED(shape, vec_size=vec_size)


def _zeros(shape: tuple[int, ...]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.int32), _strided(shape, 4))


def _rounds(total, step: int):
    """How many steps ``total`` takes; none if it is not above 0."""
    return lax.div(jnp.maximum(total, 0) + step - 1, jnp.int32(step))
