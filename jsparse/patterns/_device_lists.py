"""The blocks that lists of keys touch, their bits and their entries, on the device.

On a Hopper GPU by kernels of their own, which take the lists as they come; elsewhere by
XLA, which sorts them first. Called by `device.neighbors`, and for an `EntryBias`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jsparse.pallas_kernels._common import on_hopper
from jsparse.patterns._device_checks import each
from jsparse.patterns._integers import divide
from jsparse.patterns._parts import WORD, Sizes

Array = Any


def blocks_and_bits(
    index: Array, lengths: Array, sizes: Sizes, num_bits: int
) -> tuple[Array, Array]:
    """The map of blocks ``[B, nq, nk]`` and the bits ``[B, num_bits, block_q, words]``.

    Args:
        index: ``[B or 1, T, k]`` int32; keys that do not exist are padding.
        lengths: ``[B, 2]`` int32, queries and keys that exist.
        sizes: of the mask.
        num_bits: blocks that there is room for; those beyond have no bits.
    """
    if _kernels_take(index, sizes):
        return _by_kernels(sizes, num_bits)(index, lengths)
    find = functools.partial(_by_sorting, sizes=sizes, num_bits=num_bits)
    return each(find, len(lengths), index, lengths)


class EntryLists(NamedTuple):
    """The entries of lists by block; see `neighbors_sm90.list_entries`.

    Attributes:
        lists: ``[B, nq, room]`` int32.
        starts: ``[B, nq, nk]`` int32, where those of a block begin.
        counted: ``[B, T, k]`` bool, whether an entry counts.
    """

    lists: Array
    starts: Array
    counted: Array


def entry_lists(
    index: Array, lengths: Array, bits: Array, counts: Array, sizes: Sizes
) -> EntryLists:
    """The entries of lists ``index`` by block.

    Args:
        index: as in `blocks_and_bits`.
        lengths: as in `blocks_and_bits`.
        bits: ``[B or 1, n, block_q, words]`` uint32, of the mask made of the lists.
        counts: ``[B or 1, nq]`` int32, its blocks.
        sizes: of the mask.
    """
    if not _kernels_take(index, sizes):
        find = functools.partial(_entries_by_sorting, sizes=sizes)
        return each(find, len(lengths), index, lengths)
    from jsparse.pallas_kernels.mosaic_gpu import neighbors_sm90

    _, kv_len, block_q, block_kv = sizes
    options = {"kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}
    named = neighbors_sm90.count_blocks(index, lengths, **options)
    size = neighbors_sm90.list_size(index.shape[-1], sizes.grid[1], block_q)
    starts = neighbors_sm90.list_starts(named, size)
    first_bits = jnp.pad(jnp.cumsum(counts, 1, dtype=jnp.int32), ((0, 0), (1, 0)))
    bits = jax.lax.bitcast_convert_type(bits, jnp.int32)
    lists, counted = neighbors_sm90.list_entries(
        index, lengths, bits, first_bits, starts, **options
    )
    return EntryLists(lists, starts, counted)


def _numbers(active: Array) -> Array:
    """Numbers of the active blocks of a batch entry, row by row; else any."""
    return jnp.cumsum(active.reshape(-1), dtype=jnp.int32) - 1


# ---------------------------------------------------------------------------- kernels


def _kernels_take(index: Array, sizes: Sizes) -> bool:
    if not on_hopper() or jax.typeof(index).sharding.mesh.explicit_axes:
        return False
    from jsparse.pallas_kernels.mosaic_gpu import neighbors_sm90

    return neighbors_sm90.takes(sizes.grid[1], sizes.block_q, sizes.block_kv)


@functools.lru_cache(maxsize=16)
def _by_kernels(sizes: Sizes, num_bits: int):
    from jsparse.pallas_kernels.mosaic_gpu import neighbors_sm90

    _, kv_len, block_q, block_kv = sizes
    options = {"kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}

    @custom_vmap
    def find(index, lengths):
        active = neighbors_sm90.count_blocks(index, lengths, **options) > 0
        ends = jnp.cumsum(active.sum(-1, dtype=jnp.int32), 1, dtype=jnp.int32)
        starts = jnp.pad(ends, ((0, 0), (1, 0)))
        numbers = jax.vmap(_numbers)(active)
        bits = neighbors_sm90.set_bits(
            index, lengths, numbers, starts, num_bits=num_bits, **options
        )
        return active, bits

    @find.def_vmap
    def rule(axis_size, in_batched, *args):
        index, lengths = (
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip(args, in_batched, strict=True)
        )
        entries = lengths.shape[1]
        index = jnp.broadcast_to(index, (axis_size, entries, *index.shape[2:]))
        found = find(*(x.reshape(-1, *x.shape[2:]) for x in (index, lengths)))
        active, bits = (x.reshape(axis_size, entries, *x.shape[1:]) for x in found)
        return (active, bits), (True, True)

    return find


# -------------------------------------------------------------------------------- XLA


def _by_sorting(
    index: Array, lengths: Array, *, sizes: Sizes, num_bits: int
) -> tuple[Array, Array]:
    """Of one batch entry."""
    row_exists = jnp.arange(sizes.q_len, dtype=jnp.int32)[:, None] < lengths[0]
    known = row_exists & (index >= 0) & (index < lengths[1])
    index = jnp.where(known, index, sizes.kv_len)
    # A sort that keeps equals in order would carry their places with it.
    index = jnp.sort(index, axis=1, stable=False)
    nq, nk = sizes.grid
    t = jnp.arange(sizes.q_len, dtype=jnp.int32)[:, None]
    row, q = divide(t, sizes.block_q)
    col, s = divide(index, sizes.block_kv)
    exists = index < sizes.kv_len
    col = jnp.where(exists, col, nk)
    # Of neighbours in the same block only the first writes: a GPU takes turns at those
    # that write to one place.
    seen = jnp.where(_is_first(col), col, nk)
    active = jnp.zeros((nq, nk), bool).at[row, seen].set(True, mode="drop")
    entry = _numbers(active)[row * nk + jnp.minimum(col, nk - 1)]
    # Of equal neighbours in the sorted row only the first adds its bit, so that adding
    # is setting and no order of the additions matters.
    entry = jnp.where(exists & _is_first(index), entry, num_bits)
    word, s = divide(s, WORD)
    word += q * sizes.words
    bit = jnp.left_shift(jnp.uint32(1), s.astype(jnp.uint32))
    bits = jnp.zeros((num_bits, sizes.block_q * sizes.words), jnp.uint32)
    bits = bits.at[entry, word].add(bit, mode="drop")
    return active, bits.reshape(num_bits, sizes.block_q, sizes.words)


def first_of_keys(keys: Array) -> Array:
    """Which entries of lists ``[T, k]`` are the first of their key."""
    # Equal keys are neighbours in the sorted list, in the order of their entries.
    order = jnp.argsort(keys, axis=1)
    first = _is_first(jnp.take_along_axis(keys, order, 1))
    rows = jnp.arange(len(keys), dtype=jnp.int32)[:, None]
    return jnp.zeros_like(first).at[rows, order].set(first, unique_indices=True)


def _is_first(x: Array) -> Array:
    """Which entries of each row ``[T, k]`` differ from the one before."""
    return jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _entries_by_sorting(index: Array, lengths: Array, *, sizes: Sizes) -> EntryLists:
    """Of one batch entry."""
    from jsparse.pallas_kernels.mosaic_gpu import neighbors_sm90

    (nq, nk), (q_len, count) = sizes.grid, index.shape
    row_exists = jnp.arange(q_len, dtype=jnp.int32)[:, None] < lengths[0]
    exists = row_exists & (index >= 0) & (index < lengths[1])
    keys = jnp.where(exists, index, sizes.kv_len)
    counted = exists & first_of_keys(keys)

    # By query block, block by block.
    rows = jnp.arange(q_len, dtype=jnp.int32)[:, None]
    _, q = divide(jnp.broadcast_to(rows, keys.shape), sizes.block_q)
    column, s = divide(keys, sizes.block_kv)
    number = jnp.arange(count, dtype=jnp.int32) << 14
    entry = jnp.where(counted, number | q << 7 | s, -1)
    column = jnp.where(exists, column, nk)
    room = ((0, nq * sizes.block_q - q_len), (0, 0))
    column = jnp.pad(column, room, constant_values=nk).reshape(nq, -1)
    entry = jnp.pad(entry, room).reshape(nq, -1)
    order = jnp.argsort(column, axis=1)
    column, entry = (jnp.take_along_axis(x, order, 1) for x in (column, entry))
    rows = jnp.arange(nq, dtype=jnp.int32)[:, None]
    counts = jnp.zeros((nq, nk), jnp.int32).at[rows, column].add(1, mode="drop")
    size = neighbors_sm90.list_size(count, nk, sizes.block_q)
    starts = neighbors_sm90.list_starts(counts, size)
    before = jnp.cumsum(counts, 1, dtype=jnp.int32) - counts
    at = (starts - before).at[rows, column].get(mode="fill", fill_value=0)
    at += jnp.arange(column.shape[1], dtype=jnp.int32)
    lists = jnp.zeros((nq, size), jnp.int32)
    lists = lists.at[rows, jnp.where(column < nk, at, size)].set(entry, mode="drop")
    for n, x in enumerate((counts, jnp.broadcast_to(rows, counts.shape), starts)):
        place = starts - neighbors_sm90.HEADER + n
        lists = lists.at[rows, place].set(x)
    return EntryLists(lists, starts, counted)
