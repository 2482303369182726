"""Attention through neighbour lists in tables of bounded size.

A table holds what belongs to the blocks that a pattern touches: bits that say which
elements count, and, for kernels that cannot read it as it is, the bias. Its size is
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
from jsparse.ops import block_sparse_attention, gradients, support
from jsparse.ops._sharding import Axes, axes_of, check_heads, on_devices, sum_devices
from jsparse.ops._vjp import Static, accumulator_dtype, vary_like
from jsparse.patterns import BlockMask, device
from jsparse.patterns._device_lists import first_of_keys
from jsparse.patterns._integers import divide

Array = Any
READS_ENTRIES = "mosaic_gpu"
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


class _Inputs(NamedTuple):
    """What has gradients: the arguments of `attend` but the lists."""

    q: Array
    k: Array
    v: Array
    bias: Bias | None


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
    args = _Inputs(q, k, v, bias), index
    axes = axes_of(q, k, v)
    if axes is None:
        return _attend(tables, *args)
    specs = _specs(*args, axes)
    run = functools.partial(_attend, tables)
    return on_devices(run, args, specs, axes.by_query, axes.mesh)


def _specs(inputs: _Inputs, index: Array, axes: Axes) -> tuple[_Inputs, Any]:
    """How the arguments are divided over the devices of a mesh with explicit axes."""
    q, k, v, bias = inputs
    check_heads(axes, q.shape[2], k.shape[2])

    def of(x: Array, *names: Any) -> Any:
        """Of the first axes of x, where they are not shared."""
        pairs = zip(names, x.shape[: len(names)], strict=True)
        return jax.P(*(name if size > 1 else None for name, size in pairs))

    (batch,), heads = axes.batch, axes.heads
    of_bias: Any = bias
    if isinstance(bias, DistanceBias):
        of_bias = jax.tree_util.tree_map(
            lambda x: of(x, batch) if x.ndim == 3 else jax.P(), bias
        )
        of_bias = dataclasses.replace(of_bias, weights=of(bias.weights, heads))
    elif bias is not None:
        of_bias = of(bias, batch, heads)
    of_q, of_k, of_v = (of(x, batch, None, heads) for x in (q, k, v))
    return _Inputs(of_q, of_k, of_v, of_bias), of(index, batch)


# With a derivative of its own: that of a `jax.lax.cond` keeps the residuals of both
# branches, and where devices choose differently none may wait for another inside.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tables: Tables, inputs: _Inputs, index: Array) -> Array:
    out, _, _ = _forward(tables, inputs, index)
    return out


def _attend_fwd(tables, inputs, index):
    of_bias = jax.tree_util.tree_leaves(inputs.bias)
    inputs, index = jax.tree_util.tree_map(lambda x: x.value, (inputs, index))
    out, lse, pattern = _forward(tables, inputs, index)
    static = Static(any(x.perturbed for x in of_bias))
    return out, (inputs, index, pattern, out, lse, static)


def _attend_bwd(tables, residuals, dout):
    inputs, index, pattern, out, lse, static = residuals
    wanted = inputs if static.bias_gradient else inputs._replace(bias=None)
    rows = out, lse, dout
    grads = _backward(tables, inputs, index, pattern, rows, static.bias_gradient)
    return jax.tree_util.tree_map(sum_devices, grads, wanted), None


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _forward(
    tables: Tables, inputs: _Inputs, index: Array
) -> tuple[Array, Array, _Pattern]:
    """``out``, ``lse``, and the pattern of all queries."""
    inputs, index = vary_like((inputs, index), (inputs, index))
    parts = _Parts.of(tables, inputs)
    pattern = _pattern(tables, inputs, index, parts.table)

    def at_once(inputs, index, pattern):
        del index
        return _attention(tables, inputs, pattern)

    def in_parts(inputs, index, pattern):
        del pattern
        q, v = inputs.q, inputs.v
        out = jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
        lse = jnp.zeros((len(q), q.shape[2], q.shape[1]), accumulator_dtype(q))

        def body(n, rows):
            some, lists = parts.take(n, inputs, index)
            found = _attention(tables, some, _pattern(tables, some, lists, parts.room))
            return parts.put(n, rows, found, _OF_ROWS[:2])

        return parts.loop(body, vary_like((out, lse), inputs))

    out, lse = parts.choose(at_once, in_parts, inputs, index, pattern)
    return out, lse, pattern


def _backward(
    tables: Tables,
    inputs: _Inputs,
    index: Array,
    pattern: _Pattern,
    rows: tuple[Array, Array, Array],
    bias_gradient: bool,
) -> _Inputs:
    """The gradients; ``rows`` are out, lse and the cotangent of out."""
    inputs, index = vary_like((inputs, index), (inputs, index))
    parts = _Parts.of(tables, inputs)

    def at_once(inputs, index, pattern, rows):
        del index
        return _gradients(tables, inputs, pattern, rows, bias_gradient)

    def in_parts(inputs, index, pattern, rows):
        del pattern
        primals = inputs if bias_gradient else inputs._replace(bias=None)
        axes = _query_axes(primals)

        def body(n, totals):
            some, lists = parts.take(n, inputs, index)
            pattern = _pattern(tables, some, lists, parts.room)
            some_rows = parts.slices(n, rows, _OF_ROWS)
            found = _gradients(tables, some, pattern, some_rows, bias_gradient)
            return parts.put(n, totals, found, axes)

        def empty(x, axis):
            return jnp.zeros(
                x.shape, accumulator_dtype(x) if axis == _SHARED else x.dtype
            )

        totals = vary_like(jax.tree_util.tree_map(empty, primals, axes), inputs)
        totals = parts.loop(body, totals)
        return jax.tree_util.tree_map(lambda x, p: x.astype(p.dtype), totals, primals)

    return parts.choose(at_once, in_parts, inputs, index, pattern, rows)


class _Pattern(NamedTuple):
    """The mask of some lists, and their bias as the backend takes it.

    Attributes:
        mask: with room for the blocks of a table.
        entries: where they are, if the bias is a `BlockBias` made of an array.
        bias: an `EntryBias`, a `BlockBias`, a `DistanceBias` or None.
    """

    mask: BlockMask
    entries: _Entries | None
    bias: Bias | None


def _pattern(tables: Tables, inputs: _Inputs, index: Array, room: int) -> _Pattern:
    mask = device.neighbors(
        index,
        kv_len=inputs.k.shape[1],
        block_q=tables.block_q,
        block_kv=tables.block_kv,
        capacity=-(-inputs.k.shape[1] // tables.block_kv),
        q_capacity=-(-index.shape[1] // tables.block_q),
        num_bits=room,
    )
    if inputs.bias is None or isinstance(inputs.bias, DistanceBias):
        return _Pattern(mask, None, inputs.bias)
    by_entry = EntryBias(inputs.bias, index)
    asked = tables.implementation in ("auto", READS_ENTRIES)
    if asked and support(*inputs[:3], mask, bias=by_entry)[READS_ENTRIES] is None:
        return _Pattern(mask, None, by_entry)
    entries = _Entries.of(mask, index)
    return _Pattern(mask, entries, entries.spread(inputs.bias, mask))


def _attention(
    tables: Tables, inputs: _Inputs, pattern: _Pattern
) -> tuple[Array, Array]:
    """``out`` and ``lse``; the table has room."""
    return block_sparse_attention(
        *inputs[:3],
        dataclasses.replace(pattern.mask, needed_capacity=None),
        bias=pattern.bias,
        scale=tables.scale,
        return_lse=True,
        implementation=tables.implementation,
    )


def _gradients(
    tables: Tables,
    inputs: _Inputs,
    pattern: _Pattern,
    rows: tuple[Array, Array, Array],
    bias_gradient: bool,
) -> _Inputs:
    """Those of ``inputs``; the table has room."""
    dq, dk, dv, of_bias = gradients(
        *inputs[:3],
        dataclasses.replace(pattern.mask, needed_capacity=None),
        *rows,
        bias=pattern.bias,
        bias_gradient=bias_gradient,
        scale=tables.scale,
        implementation=tables.implementation,
    )
    if isinstance(of_bias, EntryBias):
        of_bias = of_bias.values
    elif pattern.entries is not None and of_bias is not None:
        of_bias = pattern.entries.gradient(of_bias, inputs.bias)
    return _Inputs(dq, dk, dv, of_bias)


_SHARED = -1
"""The axis of queries of an array that all queries share."""

_OF_ROWS = (1, 2, 1)
"""The axes of queries of out, lse and the cotangent of out."""


def _query_axes(inputs: _Inputs) -> _Inputs:
    """The axis of queries of each array, or `_SHARED`."""
    bias: Any = inputs.bias
    if isinstance(bias, DistanceBias):
        shared = jax.tree_util.tree_map(lambda _: _SHARED, bias)
        bias = dataclasses.replace(shared, q_coords=bias.q_coords.ndim - 2)
    elif bias is not None:
        bias = 2
    return _Inputs(1, _SHARED, _SHARED, bias)


class _Parts(NamedTuple):
    """Some query blocks at a time, as many as surely fit a table.

    Attributes:
        length: of all queries.
        step: queries of a part. The last one begins before the end of the one before,
            if it must.
        number: of parts.
        columns: key blocks.
        table: blocks that a table for all queries has room for.
        room: blocks that a table for a part must have room for.
    """

    length: int
    step: int
    number: int
    columns: int
    table: int
    room: int

    @classmethod
    def of(cls, tables: Tables, inputs: _Inputs) -> _Parts:
        length = inputs.q.shape[1]
        rows = -(-length // tables.block_q)
        columns = -(-inputs.k.shape[1] // tables.block_kv)
        # One query block must fit, whatever it touches.
        table = max(min(tables.capacity, columns) * rows, columns)
        at_a_time = table // columns
        step = min(at_a_time * tables.block_q, length)
        number = -(-length // step)
        return cls(length, step, number, columns, table, at_a_time * columns)

    def choose(
        self,
        at_once: Callable,
        in_parts: Callable,
        inputs: _Inputs,
        index: Array,
        pattern: _Pattern,
        *rest: Any,
    ) -> Any:
        """What either of them makes of the rest; the former if the table has room."""
        if self.number == 1:
            return at_once(inputs, index, pattern, *rest)
        # Lists are as wide as the pattern; only the tables can be too small.
        needed = jnp.asarray(pattern.mask.needed_capacity)
        fits = (needed <= self.columns).all()
        return jax.lax.cond(fits, at_once, in_parts, inputs, index, pattern, *rest)

    def take(self, n: Array, inputs: _Inputs, index: Array) -> tuple[_Inputs, Array]:
        """Part n of the inputs, and of the lists, empty where it begins sooner.

        So each query is counted once in what all queries share.
        """
        queries = self._start(n) + jnp.arange(self.step, dtype=jnp.int32)
        its_own = queries >= n * self.step
        lists = jnp.where(its_own[:, None], self.slices(n, index, 1), -1)
        return self.slices(n, inputs, _query_axes(inputs)), lists

    def slices(self, n: Array, tree: Any, axes: Any) -> Any:
        """Part n of each array, and what is `_SHARED`."""

        def cut(x, axis):
            if axis == _SHARED:
                return x
            return jax.lax.dynamic_slice_in_dim(x, self._start(n), self.step, axis)

        return jax.tree_util.tree_map(cut, tree, axes)

    def put(self, n: Array, totals: Any, found: Any, axes: Any) -> Any:
        """``totals`` with what was ``found`` for part n; what is `_SHARED` is added."""

        def place(total, x, axis):
            if axis == _SHARED:
                return total + x.astype(total.dtype)
            start = self._start(n)
            return jax.lax.dynamic_update_slice_in_dim(total, x, start, axis)

        return jax.tree_util.tree_map(place, totals, found, axes)

    def loop(self, body: Callable[[Array, Any], Any], totals: Any) -> Any:
        """``body(n, totals)`` for every part.

        The last one comes first: what it has in common with the one before, for which
        its lists are empty, is overwritten.
        """
        last = self.number - 1
        return jax.lax.fori_loop(
            0, self.number, lambda n, totals: body(last - n, totals), totals
        )

    def _start(self, n: Array) -> Array:
        return jnp.minimum(n * self.step, self.length - self.step)


class _Entries(NamedTuple):
    """Where the entries of neighbour lists are in a mask made of them, ``[B, T, n]``.

    Of a key that a list names twice the first entry counts. What does not count, or
    does not exist, has a block of its own, beyond all others.

    Attributes:
        block: number of the block.
        row: query in the block.
        column: key in the block.
    """

    block: Array
    row: Array
    column: Array

    @classmethod
    def of(cls, mask: BlockMask, index: Array) -> _Entries:
        """The entries of ``index [B, T, n]``."""
        counts, lists = (
            jnp.asarray(x)[:, 0] for x in (mask.kv_num_blocks, mask.kv_indices)
        )
        sizes = (
            mask.kv_len,
            mask.block_q,
            mask.block_kv,
            jnp.asarray(mask.bits).shape[1],
        )
        find = functools.partial(_places, sizes=sizes)
        return cls(*jax.vmap(find)(counts, lists, index))

    def spread(self, bias: Array, mask: BlockMask) -> BlockBias:
        """``bias [B or 1, H or 1, T, n]`` by block."""
        room = jnp.asarray(mask.bits).shape[1]

        def fill(bias, *places):
            shape = (bias.shape[0], room, mask.block_q, mask.block_kv)
            empty = jnp.zeros(shape, bias.dtype)
            return empty.at[:, *places].set(bias, mode="drop", unique_indices=True)

        return BlockBias(self._each(fill, bias))

    def gradient(self, found: Any, bias: Array) -> Array:
        """The gradient of ``bias``, of that of the `BlockBias`."""

        # Every entry looks up its own, where JAX would have them scattered.
        def look(values, *places):
            return values.at[:, *places].get(mode="fill", fill_value=0)

        each = self._each(look, found.values)
        return each.sum(0, keepdims=True) if len(bias) < len(each) else each

    def _each(self, move: Callable, values: Array) -> Array:
        """``move`` of every batch entry of the values or of the entries."""
        batch = max(len(values), len(self.block))
        whole = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (values, *self))
        return jax.vmap(move)(*whole)


def _places(
    counts: Array, lists: Array, index: Array, sizes: tuple[int, int, int, int]
) -> tuple[Array, Array, Array]:
    """The fields of `_Entries`, of one batch entry; ``sizes`` end with the blocks."""
    kv_len, block_q, block_kv, total = sizes
    exists = (index >= 0) & (index < kv_len)
    t = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
    row, q = divide(t, block_q)
    column, s = divide(jnp.where(exists, index, 0), block_kv)
    # A table of all pairs of blocks is small; a search in the lists reads them often.
    slots = jnp.arange(lists.shape[1], dtype=jnp.int32)
    number = (jnp.cumsum(counts) - counts)[:, None] + slots
    rows = jnp.arange(len(counts), dtype=jnp.int32)[:, None]
    columns = -(-kv_len // block_kv)
    block = jnp.zeros((len(counts), columns), jnp.int32)
    listed = jnp.where(slots < counts[:, None], lists, columns)
    block = block.at[rows, listed].set(number, mode="drop")[row, column]
    placed = exists & first_of_keys(jnp.where(exists, index, kv_len))
    beyond = total + jnp.arange(index.size, dtype=jnp.int32).reshape(index.shape)
    block = jnp.where(placed, block, beyond)
    return block, jnp.broadcast_to(q, index.shape), s
