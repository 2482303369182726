"""Neighbour lists by block: three kernels, a warpgroup for each query block.

Lists are read as they come, in any order, with duplicates. How often a block is named
is counted, and the bits of its elements are or-ed, both in shared memory: neither asks
who comes first. A third kernel sorts the entries by block, for a bias that has a value
for each. Between the kernels, their caller numbers the blocks and adds up counts.

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
"""Their counts take 32 KB, and 64 registers of a thread on their way out."""
MOST_ENTRIES = 1 << 17
"""Of a list: what `list_entries` has bits for."""
HEADER = 3
"""Numbers before the entries of a block."""
ALIGNED = 4
"""Numbers whose multiples the lists of blocks begin at: TMA copies whole 16 bytes."""
_PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


def takes(num_kv_blocks: int, block_q: int, block_kv: int) -> bool:
    """Whether the kernels were built for such blocks, and so many."""
    fit = block_q in BLOCKS["block_q"] and block_kv in BLOCKS["block_kv"]
    return fit and num_kv_blocks <= MOST_KEY_BLOCKS


def count_blocks(
    index: Array, lengths: Array, *, kv_len: int, block_q: int, block_kv: int
) -> Array:
    """How often the lists of a query block name each key block.

    Args:
        index: ``[B or 1, T, k]`` int32; a key that does not exist is padding.
        lengths: ``[B, 2]`` int32, queries and keys that exist.
        kv_len: number of keys S.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        ``[B, nq, nk]`` int32.
    """
    batch, (entries, q_len, count) = len(lengths), index.shape
    num_q, num_kv = -(-q_len // block_q), -(-kv_len // block_kv)
    room = _whole(num_kv)
    add = add_to_blocks(count, block_kv)

    def body(index, lengths, out, counts):
        entry, block = divided(lax.axis_index("block"), num_q)
        rows = _Rows.of(lengths, entry, block, q_len * (entries > 1), block_q)
        counts[...] = _zeros((room,))
        plgpu.commit_smem()
        rows.each(count, lambda *some: add(index, counts, rows.first, *some, rows.keys))
        plgpu.commit_smem()
        layout = _strided((room,), 4)
        found = plgpu.load(counts, layout=layout, optimized=False)
        out[entry * num_q + block] = found

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * num_q, room), jnp.int32),
        scratch_types=[plgpu.SMEM((room,), jnp.int32)],
        grid=(batch * num_q,),
        grid_names=("block",),
        kernel_name="jsparse_neighbor_blocks",
        compiler_params=_PARAMS,
    )
    (found,) = per_device(lambda *x: [kernel(*x)])(index.reshape(-1, count), lengths)
    return found.reshape(batch, num_q, room)[..., :num_kv]


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
        index: as in `count_blocks`.
        lengths: as in `count_blocks`.
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


def list_entries(
    index: Array,
    lengths: Array,
    bits: Array,
    first_bits: Array,
    starts: Array,
    *,
    kv_len: int,
    block_q: int,
    block_kv: int,
) -> tuple[Array, Array]:
    """The entries of the lists by the blocks that they name.

    Of a key that a list names twice the first entry counts. Which lists do is seen from
    the bits: they are fewer than the entries; only there each entry looks for an
    earlier one.

    Args:
        index: as in `count_blocks`.
        lengths: as in `count_blocks`.
        bits: ``[B or 1, n, block_q, words]`` int32, of a mask of these lists.
        first_bits: ``[B or 1, nq + 1]`` int32, the first block of bits of each query
            block, and their total.
        starts: ``[B, nq, nk]`` int32, of `list_starts`.
        kv_len: number of keys S.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        lists: ``[B, nq, room]`` int32. Of each block how often it is named, the query
            block, and where its entries begin; then for each of these its number in its
            list times 2 ** 14, its query in the block times 2 ** 7, and its key; below
            0 if it does not count. Undefined elsewhere.
        counted: ``[B, T, k]`` bool, whether an entry counts.
    """
    batch, (entries, q_len, count) = len(lengths), index.shape
    num_q, num_kv = -(-q_len // block_q), -(-kv_len // block_kv)
    room, size = _whole(num_kv), list_size(count, num_kv, block_q)
    words = block_kv // 32
    add, take_off = count_entries(count), take_off_bits(block_q, words)
    place, close = place_entries(count, block_kv, size), close_lists(room, size)

    def body(index, lengths, bits, first_bits, starts, lists, counted, ends, extra):
        entry, block = divided(lax.axis_index("block"), num_q)
        rows = _Rows.of(lengths, entry, block, q_len * (entries > 1), block_q)
        own = entry * num_q + block
        layout = _strided((room,), 4)
        ends[...] = plgpu.load(starts.at[own], layout=layout, optimized=False)
        extra[...] = _zeros((4 * THREADS,))
        plgpu.commit_smem()
        rows.each(count, lambda *some: add(index, extra, rows.first, *some, rows.keys))
        of_bits = entry if first_bits.shape[0] > 1 else 0
        first, stop = (first_bits[of_bits, block + n] for n in (0, 1))
        num_bits = bits.shape[0] // first_bits.shape[0]

        def each_block(n, _):
            take_off(bits, extra, of_bits * num_bits + n)

        # A mask that has overflown has more blocks than bits.
        lax.fori_loop(first, jnp.minimum(stop, num_bits), each_block, None)
        plgpu.commit_smem()
        args = index, ends, extra, lists, counted, own, rows.first
        rows.each(count, lambda *some: place(*args, *some, rows.keys))
        plgpu.commit_smem()
        close(starts, ends, lists, own, block)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch * num_q, size), jnp.int32),
            jax.ShapeDtypeStruct((batch * num_q, block_q * count), jnp.int8),
        ),
        scratch_types=[
            plgpu.SMEM((room,), jnp.int32),
            plgpu.SMEM((4 * THREADS,), jnp.int32),
        ],
        grid=(batch * num_q,),
        grid_names=("block",),
        kernel_name="jsparse_neighbor_entries",
        compiler_params=_PARAMS,
    )
    rest = (0, 0), (0, 0), (0, room - num_kv)
    starts = jnp.pad(starts, rest, constant_values=size - ALIGNED + HEADER)
    bits = bits.reshape(-1, block_q * words)
    lists, counted = per_device(kernel)(
        *(index.reshape(-1, count), lengths, bits, first_bits),
        starts.reshape(-1, room),
    )
    counted = counted.reshape(batch, num_q * block_q, count)[:, :q_len]
    exists = jnp.arange(q_len, dtype=jnp.int32) < lengths[:, :1]
    return lists.reshape(batch, num_q, size), (counted != 0) & exists[..., None]


def list_size(count: int, num_kv: int, block_q: int) -> int:
    """Room for the lists of a query block, whose queries have ``count`` entries.

    The last of them is that of all blocks that no list names.
    """
    entries = block_q * count
    most = entries + (HEADER + ALIGNED - 1) * min(num_kv, entries)
    return (-(-most // ALIGNED) + 1) * ALIGNED


def list_starts(counts: Array, size: int) -> Array:
    """Where the entries of each block begin, from how often lists name it."""
    whole = -(-(counts + HEADER) // ALIGNED) * ALIGNED
    sizes = jnp.where(counts > 0, whole, 0)
    starts = jnp.cumsum(sizes, -1, dtype=jnp.int32) - sizes
    return jnp.where(counts > 0, starts, size - ALIGNED) + HEADER


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


def add_to_blocks(count: int, block_kv: int) -> Callable:
    """``f(index, counts, row, first, end, keys)``: counts the entries of blocks.

    Of entries ``first``, ... of the lists from ``row`` on, before ``end``, as many as
    are in flight.
    """

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 2, *[r.SCALAR] * 4), return_type=()
    )
    def f(_, index, counts, *scalars):
        row, first, end, keys = (x.registers.item() for x in scalars)
        to = utils.memref_ptr(counts)
        for key in _keys(index, row, first, end, count):
            text = (
                "{ .reg .pred p; .reg .b32 a; setp.lt.u32 p, $1, $2; "
                f"shr.u32 a, $1, {block_kv.bit_length() - 1}; shl.b32 a, a, 2; "
                "add.u32 a, a, $0; @p red.shared.add.u32 [a], 1; }"
            )
            r.command(text, to, key, keys, spec="r,r,r")

    return f


def add_bits(count: int, block_q: int, block_kv: int, at_once: int) -> Callable:
    """``f(index, numbers, tile, row, of_row, block, first, end, keys)``: sets bits.

    As `add_to_blocks`; of blocks ``block``, ... whose bits the tile has. ``of_row`` is
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
                "{ .reg .pred p; .reg .b32 a, w, n, q; "
                f"setp.lt.u32 p, $2, {at_once}; {_query(nth, count, '$3')}"
                f"mad.lo.u32 a, $2, {block_q}, q; "
                f"and.b32 w, $1, {block_kv - 1}; shr.u32 q, w, 5; "
                f"mad.lo.u32 a, a, {words}, q; mad.lo.u32 a, a, 4, $0; "
                "and.b32 w, w, 31; shl.b32 w, 1, w; @p red.shared.or.b32 [a], w; }"
            )
            r.command(text, to, key, place, first, spec="r,r,r,r")

    return f


def count_entries(count: int) -> Callable:
    """``f(index, extra, row, first, end, keys)``: adds the entries of each query.

    As `add_to_blocks`.
    """

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 2, *[r.SCALAR] * 4), return_type=()
    )
    def f(_, index, extra, *scalars):
        row, first, end, keys = (x.registers.item() for x in scalars)
        to = utils.memref_ptr(extra)
        for nth, key in enumerate(_keys(index, row, first, end, count)):
            text = (
                "{ .reg .pred p; .reg .b32 n, q; setp.lt.u32 p, $1, $2; "
                + _query(nth, count, "$3")
                + "mad.lo.u32 q, q, 4, $0; @p red.shared.add.u32 [q], 1; }"
            )
            r.command(text, to, key, keys, first, spec="r,r,r,r")

    return f


def take_off_bits(block_q: int, words: int) -> Callable:
    """``f(bits, extra, block)``: subtracts the set bits of each query of a block."""

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 2, r.SCALAR), return_type=())
    def f(_, bits, extra, block):
        args = [utils.memref_ptr(extra), utils.memref_ptr(bits), block.registers.item()]
        size = block_q * words
        for first in range(0, size, THREADS):
            text = (
                "{ .reg .pred p; .reg .b32 n, w; .reg .b64 a; mov.u32 n, %tid.x; "
                f"add.s32 n, n, {first}; setp.lt.u32 p, n, {size}; "
                f"mul.wide.s32 a, $2, {4 * size}; add.s64 a, a, $1; "
                "mad.wide.s32 a, n, 4, a; @p ld.global.nc.b32 w, [a]; "
                f"popc.b32 w, w; neg.s32 w, w; div.u32 n, n, {words}; "
                "mad.lo.u32 n, n, 4, $0; @p red.shared.add.u32 [n], w; }"
            )
            r.command(text, *args, spec="r,l,r")

    return f


def place_entries(count: int, block_kv: int, size: int) -> Callable:
    """``f(index, ends, extra, lists, counted, own, row, first, end, keys)``.

    Puts entries, as `add_to_blocks`, where the lists of their blocks end, of the query
    block ``own`` of all, and says which count.
    """

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 5, *[r.SCALAR] * 5), return_type=()
    )
    def f(_, index, ends, extra, lists, counted, *scalars):
        own, row, first, end, keys = (x.registers.item() for x in scalars)
        in_block = ir.MemRefType(counted.type).shape[-1]
        text = (
            "{{ .reg .pred p, d; .reg .b32 n, q, e, j, w, x; .reg .b16 h; "
            ".reg .b64 a, b; setp.lt.u32 p, $5, $6; {query} "
            "mad.lo.u32 e, q, {count}, 0; sub.u32 e, n, e; "
            # Only a query whose bits are fewer than its entries has duplicates.
            "mad.lo.u32 j, q, 4, $2; @p ld.shared.b32 j, [j]; setp.gt.s32 d, j, 0; "
            "and.pred d, d, p; mov.b32 x, 0; @!d bra known; "
            "add.s32 j, q, $8; mul.wide.s32 a, j, {row}; add.s64 a, a, $0; "
            "mov.b32 j, 0; "
            "earlier: setp.ge.u32 d, j, e; @d bra known; "
            "ld.global.nc.b32 w, [a]; add.s64 a, a, 4; add.u32 j, j, 1; "
            "setp.ne.s32 d, w, $5; @d bra earlier; mov.b32 x, -1; "
            "known: shl.b32 e, e, 14; shl.b32 q, q, 7; or.b32 e, e, q; "
            "and.b32 q, $5, {last}; or.b32 e, e, q; or.b32 e, e, x; "
            "shr.u32 q, $5, {shift}; mad.lo.u32 q, q, 4, $1; "
            "@p atom.shared.add.u32 w, [q], 1; "
            "mul.wide.s32 a, $7, {size}; add.s64 a, a, $3; mad.wide.u32 a, w, 4, a; "
            "@p st.global.b32 [a], e; "
            # What is shifted by 31 is -1 for one that does not count, else 0.
            "add.s32 x, x, 1; cvt.u16.u32 h, x; @!p mov.b16 h, 0; "
            "mul.wide.s32 b, $7, {in_block}; add.s64 b, b, $4; "
            "cvt.u64.u32 a, n; add.s64 b, b, a; "
            "setp.lt.u32 p, n, {in_block}; @p st.global.b8 [b], h; }}"
        )
        refs = [utils.memref_ptr(x) for x in (index, ends, extra, lists, counted)]
        for nth, key in enumerate(_keys(index, row, first, end, count)):
            one = text.format(
                query=_query(nth, count, "$9"),
                count=count,
                row=4 * count,
                last=block_kv - 1,
                shift=block_kv.bit_length() - 1,
                size=4 * size,
                in_block=in_block,
            )
            spec = "l,r,r,l,l,r,r,r,r,r"
            r.command(one, *refs, key, keys, own, row, first, spec=spec)

    return f


def close_lists(room: int, size: int) -> Callable:
    """``f(starts, ends, lists, own, block)``: the `HEADER` of each block's list."""

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 3, *[r.SCALAR] * 2), return_type=()
    )
    def f(_, starts, ends, lists, own, block):
        args = [utils.memref_ptr(x) for x in (starts, ends, lists)]
        args += [own.registers.item(), block.registers.item()]
        for first in range(0, room, THREADS):
            text = (
                "{ .reg .b32 n, s, e; .reg .b64 a; mov.u32 n, %tid.x; "
                f"add.s32 n, n, {first}; mul.wide.s32 a, $3, {4 * room}; "
                "add.s64 a, a, $0; mad.wide.s32 a, n, 4, a; ld.global.nc.b32 s, [a]; "
                "mad.lo.u32 n, n, 4, $1; ld.shared.b32 e, [n]; sub.s32 e, e, s; "
                f"mul.wide.s32 a, $3, {4 * size}; "
                "add.s64 a, a, $2; mad.wide.s32 a, s, 4, a; "
                "st.global.b32 [a+-12], e; st.global.b32 [a+-8], $4; "
                "st.global.b32 [a+-4], s; }"
            )
            r.command(text, *args, spec="l,r,l,r,r")

    return f


def _query(nth: int, count: int, first: str) -> str:
    """Sets n to the number of the thread's nth entry, and q to that of its query."""
    return (
        f"mov.u32 n, %tid.x; add.u32 n, n, {first}; add.u32 n, n, {nth * THREADS}; "
        f"div.u32 q, n, {count}; "
    )


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


def _whole(num_kv: int) -> int:
    """So many numbers, in whole vectors of all threads."""
    return -(-num_kv // (4 * THREADS)) * 4 * THREADS


def _rounds(total, step: int):
    """How many steps ``total`` takes; none if it is not above 0."""
    return lax.div(jnp.maximum(total, 0) + step - 1, jnp.int32(step))
