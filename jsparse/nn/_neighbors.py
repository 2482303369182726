"""Attention through neighbour lists in tables of bounded size.

A table holds what belongs to the blocks that a pattern touches: bits that say which
elements count, and, for kernels that cannot read it by bit, the bias. Its size is
static, the number of blocks is not: a pattern that touches more than a table holds is
taken a few query blocks at a time, as many as fit even if they touch every key block.
Called by `functional.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jsparse.bias import Bias, BlockBias, DistanceBias, EntryBias
from jsparse.ops import block_sparse_attention, support
from jsparse.patterns import BlockMask, device

Array = Any
READS_BITS = "mosaic_gpu"
"""The implementation that takes an `EntryBias` of any size."""


@dataclasses.dataclass(frozen=True)
class Tables:
    """How neighbour lists are computed.

    Attributes:
        capacity: key blocks that tables have room for, per query block on the mean.
        block_q: queries per block.
        block_kv: keys per block.
        scale: multiplies ``q . k``; ``1 / sqrt(D)`` if None.
        implementation: the backend.
    """

    capacity: int
    block_q: int
    block_kv: int
    scale: float | None
    implementation: Any


@functools.partial(jax.jit, static_argnames="tables")
def attend(
    q: Array, k: Array, v: Array, index: Array, bias: Bias | None, *, tables: Tables
) -> Array:
    """``out [B, T, H, Dv]``.

    Args:
        q: ``[B, T, H, D]``.
        k: ``[B, S, K, D]``.
        v: ``[B, S, K, Dv]``.
        index: ``[B or 1, T, n]`` int32; entries outside 0..S - 1 are padding.
        bias: ``[B or 1, H or 1, T, n]``, a `DistanceBias`, or None.
        tables: sizes and backend.
    """
    rows = -(-q.shape[1] // tables.block_q)
    columns = -(-k.shape[1] // tables.block_kv)
    room = min(tables.capacity, columns) * rows
    mask = _mask(index, k.shape[1], tables, room)
    if room == rows * columns:
        return _launch(q, k, v, mask, index, bias, tables)
    # Lists are as wide as the pattern; only the tables can be too small.
    fits = (jnp.asarray(mask.needed_capacity) <= columns).all()

    def at_once(q, k, v, mask, index, bias):
        return _launch(q, k, v, mask, index, bias, tables)

    def in_parts(q, k, v, mask, index, bias):
        del mask
        return _in_parts(q, k, v, index, bias, tables, max(1, room // columns))

    return jax.lax.cond(fits, at_once, in_parts, q, k, v, mask, index, bias)


def _mask(index: Array, kv_len: int, tables: Tables, room: int) -> BlockMask:
    """The mask of the lists, with bits for ``room`` blocks."""
    return device.neighbors(
        index,
        kv_len=kv_len,
        block_q=tables.block_q,
        block_kv=tables.block_kv,
        capacity=-(-kv_len // tables.block_kv),
        q_capacity=-(-index.shape[1] // tables.block_q),
        num_bits=room,
    )


def _launch(q, k, v, mask: BlockMask, index, bias, tables: Tables) -> Array:
    """Attention over a mask whose blocks all have room."""
    mask = dataclasses.replace(mask, needed_capacity=None)
    if bias is not None and not isinstance(bias, DistanceBias):
        entries = _Entries.of(mask, index)
        by_bit = entries.bias_of_bits(bias)
        fits = support(q, k, v, mask, bias=by_bit)[READS_BITS] is None
        asked = tables.implementation in ("auto", READS_BITS)
        bias = by_bit if fits and asked else entries.bias_of_blocks(bias)
    return block_sparse_attention(
        *(q, k, v, mask),
        bias=bias,
        scale=tables.scale,
        implementation=tables.implementation,
    )


def _in_parts(q, k, v, index, bias, tables: Tables, rows: int) -> Array:
    """``rows`` query blocks at a time, each part with room for all its blocks."""
    length, room = q.shape[1], rows * -(-k.shape[1] // tables.block_kv)
    step = rows * tables.block_q
    parts = -(-length // step)

    def split(x: Array, axis: int, fill: Any = 0) -> Array:
        width = [(0, 0)] * x.ndim
        width[axis] = (0, parts * step - length)
        x = jnp.pad(x, width, constant_values=fill)
        x = x.reshape(*x.shape[:axis], parts, step, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    by_query = bias
    if isinstance(bias, DistanceBias):
        by_query = split(bias.q_coords, bias.q_coords.ndim - 2)
    elif bias is not None:
        by_query = split(bias, 2)
    # Gradients of k and v are summed over the parts, in float32 at least.
    wide = jnp.float32 if k.dtype.itemsize < 4 else k.dtype
    keys, values = k.astype(wide), v.astype(wide)

    @jax.checkpoint
    def part(given):
        q, index, by_query = given
        mask = _mask(index, k.shape[1], tables, room)
        some = by_query
        if isinstance(bias, DistanceBias):
            some = dataclasses.replace(bias, q_coords=by_query)
        both = keys.astype(k.dtype), values.astype(v.dtype)
        return _launch(q, *both, mask, index, some, tables)

    out = jax.lax.map(part, (split(q, 1), split(index, 1, -1), by_query))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


class _Entries(NamedTuple):
    """Where the entries of neighbour lists are in a mask made of them, ``[B, T, n]``.

    Of a key that a list names twice the first entry counts. What does not count, or
    does not exist, has a block beyond all others, each a different one.

    Attributes:
        mask: the mask.
        block: number of the block.
        row: query in the block.
        column: key in the block.
        at_bit: ``[B, T * n]``, the number of the entry at each bit; beyond all where
            there is none.
    """

    mask: BlockMask
    block: Array
    row: Array
    column: Array
    at_bit: Array

    @classmethod
    def of(cls, mask: BlockMask, index: Array) -> _Entries:
        """The entries of ``index [B, T, n]``."""
        counts, lists = (
            jnp.asarray(x)[:, 0] for x in (mask.kv_num_blocks, mask.kv_indices)
        )
        words = EntryBias.table(mask.bits)
        sizes = mask.kv_len, mask.block_q, mask.block_kv
        find = functools.partial(_places, sizes=sizes)
        return cls(mask, *jax.vmap(find)(counts, lists, words, index))

    def bias_of_bits(self, bias: Array) -> EntryBias:
        """``bias [B or 1, H or 1, T, n]`` by bit."""

        def fill(bias, at_bit):
            # A gather whose gradient adds nothing up: it needs no atomics either.
            entries = bias.reshape(len(bias), -1).at[:, at_bit]
            return entries.get(mode="fill", fill_value=0, unique_indices=True)

        return EntryBias(self._each(fill, bias, self.at_bit))

    def bias_of_blocks(self, bias: Array) -> BlockBias:
        """``bias [B or 1, H or 1, T, n]`` by block."""
        room = jnp.asarray(self.mask.bits).shape[1]

        def fill(bias, *places):
            shape = (bias.shape[0], room, self.mask.block_q, self.mask.block_kv)
            empty = jnp.zeros(shape, bias.dtype)
            return empty.at[:, *places].set(bias, mode="drop", unique_indices=True)

        return BlockBias(self._each(fill, bias, self.block, self.row, self.column))

    def _each(self, fill: Callable, bias: Array, *places: Array) -> Array:
        """``fill`` of every batch entry of a bias or of the places."""
        batch = max(bias.shape[0], len(self.block))
        whole = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (bias, *places))
        return jax.vmap(fill)(*whole)


def _places(
    counts: Array, lists: Array, words: Array, index: Array, sizes: tuple[int, int, int]
) -> tuple[Array, Array, Array, Array]:
    """Block, row, column and at_bit of `_Entries`, of one batch entry.

    ``words`` is `EntryBias.table`, of one batch entry.
    """
    kv_len, block_q, block_kv = sizes
    t = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
    row, exists = t // block_q, (index >= 0) & (index < kv_len)
    slots = jnp.arange(lists.shape[1], dtype=jnp.int32)
    ascending = jnp.where(slots < counts[:, None], lists, jnp.iinfo(jnp.int32).max)
    wanted = index // block_kv
    wanted = jnp.pad(wanted, ((0, len(counts) * block_q - len(index)), (0, 0)))
    wanted = wanted.reshape(len(counts), -1)
    # As a loop each step of the search would be several launches on a GPU.
    find = functools.partial(jnp.searchsorted, method="scan_unrolled")
    slot = jax.vmap(find)(ascending, wanted).astype(jnp.int32)
    slot = slot.reshape(-1, index.shape[1])[: len(index)]
    block = (jnp.cumsum(counts) - counts)[row] + slot
    row = jnp.broadcast_to(t % block_q, index.shape)
    column = index % block_kv

    word = words.at[block, row, column // 32].get(mode="clip")
    below = jnp.left_shift(jnp.int32(1), column % 32) - 1
    bit = word[..., 1] + jax.lax.population_count(word[..., 0] & below)

    # Who is first at a bit: the least of all numbers that are sent there.
    number = jnp.arange(index.size, dtype=jnp.int32).reshape(index.shape)
    at_bit = jnp.full(index.size, index.size, jnp.int32)
    at_bit = at_bit.at[jnp.where(exists, bit, index.size)].min(number, mode="drop")
    placed = exists & (at_bit.at[bit].get(mode="clip") == number)
    block = jnp.where(placed, block, len(words) + number)
    at_bit = jnp.where(at_bit < index.size, at_bit, index.size + number.reshape(-1))
    return block, row, column, at_bit
