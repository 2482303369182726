"""How the Mosaic backend hands a bias to its kernels, and takes its gradient back.

A mask here has one batch axis, full or of size 1, and so have the kernels' biases:
entries that share a bias are told by position and never copied.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.backends import _score as programs
from jsparse.bias import Bias, BlockBias, DistanceBias, EntryBias, ScoreFunction
from jsparse.pallas_kernels.mosaic_gpu import _bias, _distance, _score
from jsparse.pallas_kernels.mosaic_gpu._schedule import Blocks as Listed
from jsparse.pallas_kernels.mosaic_gpu.bwd_dbias_sm90 import (
    EMPTY,
    FULL,
    PARTIAL,
    Blocks,
)
from jsparse.patterns import BlockMask
from jsparse.patterns._device_lists import EntryLists, entry_lists
from jsparse.patterns._integers import as_keys
from jsparse.patterns._parts import Sizes

Array = Any
Known = tuple[Listed, Listed]
"""Lists of partial and of full blocks as NumPy arrays."""


def kernel_bias(
    bias: Bias | None, mask: BlockMask, batch: tuple[int, ...]
) -> _bias.Bias | None:
    """A bias of `Operands` for the kernels, for launches by query block.

    A `BlockBias` gets its numbers by `launched`.

    The last axis is padded, which is a copy, where TMA could not address a row of it.
    """
    if bias is None:
        return None
    if isinstance(bias, DistanceBias):
        return _distance_bias(bias, mask, batch)
    if isinstance(bias, ScoreFunction):
        arrays = tuple(_one_batch_axis(x, batch) for x in bias.arrays)
        return _score.Score(arrays, bias.function)
    values, inner = _join_batch(_values(bias), batch)
    if values.dtype.itemsize > 4:
        values = values.astype(jnp.float32)
    if isinstance(bias, EntryBias):
        found = _entry_lists(bias, mask, batch)
        return _bias.EntryBias(
            values,
            inner,
            lists=found.lists,
            starts=found.starts,
            counted=found.counted,
            blocks=(mask.block_q, mask.block_kv),
        )
    if isinstance(bias, BlockBias):
        return _bias.BlockBias(values, inner)
    if values.shape[2] == 1:
        whole = mask.num_kv_blocks * mask.block_kv
        values = _pad_last(values[:, :, 0].astype(jnp.float32), whole)
        return _bias.KeyBias(values, inner)
    pitch = 16 // values.dtype.itemsize
    whole = -(-values.shape[-1] // pitch) * pitch
    return _bias.DenseBias(_pad_last(values, whole), inner)


def _entry_lists(
    bias: EntryBias, mask: BlockMask, batch: tuple[int, ...]
) -> EntryLists:
    index = _one_batch_axis(as_keys(bias.index, mask.kv_len), batch)
    sides = mask.q_lengths, mask.kv_lengths
    count = max(len(x) for x in (index, *sides))
    lengths = [jnp.broadcast_to(x, (count,)).astype(jnp.int32) for x in sides]
    return entry_lists(
        index,
        jnp.stack(lengths, 1),
        mask.bits,
        mask.kv_num_blocks[:, 0],
        Sizes(mask.q_len, mask.kv_len, mask.block_q, mask.block_kv),
    )


def _distance_bias(
    bias: DistanceBias, mask: BlockMask, batch: tuple[int, ...]
) -> _distance.DistanceBias:
    """Points by axis, in whole blocks."""

    def points(x, length):
        x = _one_batch_axis(jnp.swapaxes(x, -1, -2), batch)
        return _pad_last(x, length)

    inverse = centers = None
    if bias.form in _distance.MOST:
        knots = _one_batch_axis(bias.knots, batch)
        inverse = 1 / knots[:, -1]
        centers = knots[:, :-1] if bias.form == "gaussian" else None
    return _distance.DistanceBias(
        points(bias.q_coords, mask.num_q_blocks * mask.block_q),
        points(bias.kv_coords, mask.num_kv_blocks * mask.block_kv),
        _one_batch_axis(bias.weights, batch),
        bias.form,
        inverse,
        centers,
    )


def launched(bias: _bias.Bias | None, mask: BlockMask, side: str) -> _bias.Bias | None:
    """The bias for a launch over the lists ``"kv"``, by query block, or ``"q"``."""
    if isinstance(bias, _distance.DistanceBias) and side == "q":
        return dataclasses.replace(bias, rows=bias.columns, columns=bias.rows)
    if isinstance(bias, _bias.EntryBias):
        return dataclasses.replace(bias, counted=None)
    if not isinstance(bias, _bias.BlockBias):
        return bias
    if side == "kv":
        numbers = [x.number for x in _listed(mask)]
    else:
        places = _by_place(mask, [x.number for x in _listed(mask)], 0)
        numbers = []
        for rows in (mask.q_indices, mask.full_q_indices):
            b, h, j = np.ix_(*map(np.arange, rows.shape[:3]))
            last = mask.num_q_blocks - 1
            at = jnp.minimum(rows, last), j[..., None]  # beyond the count: anything
            numbers.append(places[b[..., None], h[..., None], *at])
    return dataclasses.replace(bias, numbers=tuple(numbers))


def entry_gradient(
    grad: Array, counted: Array, primal: EntryBias, batch: tuple[int, ...]
) -> EntryBias:
    """From ``grad [B, H, T, n]``, undefined where an entry does not count."""
    found = like(jnp.where(counted[:, None], grad, 0), primal.values, batch)
    return EntryBias(found, primal.index)


def bias_blocks(bias: _bias.Streamed, mask: BlockMask) -> Blocks:
    """Where the blocks of a streamed bias are, and who computes them."""
    listed = _listed(mask)
    count, column, _ = listed[0]
    bits = PARTIAL + _first(count)[..., None] + _slots(column)
    if isinstance(bias, _bias.DenseBias):
        state = _by_place(mask, [bits, FULL], EMPTY)
        return Blocks(state.reshape(*state.shape[:2], -1))
    total = bias.values.shape[2]
    batch, heads, nq = count.shape
    b, h, i = np.ix_(*map(np.arange, (batch, heads, nq)))
    state = jnp.full((batch, heads, total), EMPTY)
    row, col = jnp.zeros((2, batch, total), jnp.int32)
    for (count, column, number), value in zip(listed, (bits, FULL), strict=True):
        used = _slots(column) < count[..., None]
        number = jnp.where(used, number, total)  # others are dropped
        at = b[..., None], number
        state = state.at[at[0], h[..., None], number].set(value, mode="drop")
        row = row.at[at].set(i[..., None], mode="drop")
        col = col.at[at].set(column, mode="drop")
    return Blocks(state, row, col)


def zero_unlisted(
    grad: Array, bias: _bias.Streamed, mask: BlockMask, known: Known | None
) -> Array:
    """A gradient as ``bias.values``, 0 in blocks that the mask does not list.

    Costs nothing where lists are ``known`` on the host to have every block.
    """
    if known is not None and _lists_every_block(bias, mask, known):
        return grad
    state = bias_blocks(bias, mask).state
    listed = jnp.broadcast_to(state != EMPTY, (*grad.shape[:2], state.shape[-1]))
    if isinstance(bias, _bias.BlockBias):
        return jnp.where(listed[..., None, None], grad, 0)
    listed = listed.reshape(*grad.shape[:2], mask.num_q_blocks, mask.num_kv_blocks)
    listed = jnp.repeat(listed, mask.block_q, 2)[:, :, : grad.shape[2]]
    listed = jnp.repeat(listed, mask.block_kv, 3)[..., : grad.shape[3]]
    return jnp.where(listed, grad, 0)


def _lists_every_block(bias: _bias.Streamed, mask: BlockMask, known: Known) -> bool:
    """Whether no block is missing in the lists."""
    partial, full = known
    count = np.asarray(partial.count) + np.asarray(full.count)
    if isinstance(bias, _bias.DenseBias):
        return bool((count == mask.num_kv_blocks).all())
    return bool((count.sum((1, 2)) == bias.values.shape[2]).all())


def like(grad: Array, primal: Bias, batch: tuple[int, ...]) -> Bias:
    """A gradient in the shape of its bias: padding off, the rest summed.

    The rest are copies of shared entries, or by key all that share the bias.
    """
    values = _values(primal)
    rank = len(batch)
    lead, _ = _joined(values.shape[:rank], batch)
    if grad.shape[0] > math.prod(lead):
        lead = batch
    grad = grad[..., : values.shape[-1]]
    grad = grad.reshape(*lead, *grad.shape[1:])
    axes = [i for i, n in enumerate(values.shape) if n < grad.shape[i]]
    if axes:
        grad = grad.astype(jnp.float32).sum(axes, keepdims=True)
    grad = grad.astype(values.dtype)
    return BlockBias(grad) if isinstance(primal, BlockBias) else grad


def distance_gradient(
    bias: _distance.DistanceBias,
    by_query: Array,
    by_key: Array,
    by_pair: Array | None,
    dlse: Array,
    primal: DistanceBias,
    batch: tuple[int, ...],
) -> DistanceBias:
    """From the sums of the dq and the dk and dv kernel; ``dlse`` is ``[B, H, T]``."""
    of_head = by_query.shape[1:3]
    if by_pair is None:
        factor = -bias.weights[..., 0]
        weights = _slope_gradient(by_query[3:], dlse)
        knots = jnp.zeros((of_head[0], primal.knots.shape[-1]))
    else:
        factor = bias.inverse[:, None]
        weights, knots = _weights_gradient(bias, by_pair)

    def points(sums):
        whole = jnp.broadcast_to(factor, of_head)
        return jnp.einsum("abhn,bh->bna", sums, whole, precision="highest")

    weights, q_coords, kv_coords, knots = (
        _shaped(x, like, batch)
        for x, like in (
            (weights, primal.weights),
            (points(by_query[:3]), primal.q_coords),
            (points(by_key), primal.kv_coords),
            (knots, primal.knots),
        )
    )
    return DistanceBias(weights, q_coords, kv_coords, knots, form=primal.form)


def _slope_gradient(sums: Array, dlse: Array) -> Array:
    """``[B, H, 1]`` from sums over ``[B, H, T]`` of ``ds d``, ``ds`` and ``p d``.

    The ds of a row add up to its dlse, which dlse says exactly. What the sum is beside
    it comes from delta, made from the rounded output, and is p times that: as much of
    the sum over distances is taken off, which else grows with their mean.
    """
    with_distance, total, mean = sums
    return -(with_distance - (total - dlse) * mean).sum(-1)[..., None]


def _weights_gradient(
    bias: _distance.DistanceBias, by_pair: Array
) -> tuple[Array, Array]:
    """``[B, H, n]`` and that of the knots, ``[B, n + 1]``, from `lane_sums`."""
    # A ds that is NaN reaches every weight, as it does in a product with the basis.
    by_pair += 0 * by_pair.sum(-1, keepdims=True)
    n = bias.weights.shape[-1]
    knots = jnp.zeros((len(by_pair), n + 1))
    if bias.form == "gaussian":
        centers = (bias.weights * by_pair[..., n : 2 * n]).sum(1)
        width = by_pair[..., 2 * n :].sum(1)
        knots = jnp.append(centers, width, -1) * bias.inverse[:, None]
    return by_pair[..., :n], knots


def score_gradient(
    bias: _score.Score,
    by_query: Array | None,
    by_key: Array | None,
    dlse: Array,
    primal: ScoreFunction,
    batch: tuple[int, ...],
) -> ScoreFunction:
    """From sums of `_score.products_gradient`, ``[n, B, H, T]`` and ``[n, B, H, S]``.

    As in `distance_gradient`, what the ds of a row miss of its dlse is taken off.
    """
    sums, numbers = {}, bias.summed(rows_are_queries=True)
    if by_query is not None:
        total, count = by_query[-1] - dlse, len(numbers)
        for n, x, mean in zip(
            numbers, by_query[:count], by_query[count:-1], strict=True
        ):
            sums[n] = x - total * mean
    if by_key is not None:
        sums |= zip(bias.summed(rows_are_queries=False), by_key, strict=True)
    program: Any = primal.function
    loads = [(n, program.learned[n], program.loads[program.learned[n]]) for n in sums]

    def entry(arrays, sums):
        """The gradients of one batch entry's arrays."""
        grads = [jnp.zeros(x.shape, jnp.float32) for x in arrays]
        for n, at, one in loads:
            heads, rows = sums[n].shape
            place = jnp.arange(rows, dtype=jnp.int32)
            heads = jnp.arange(heads, dtype=jnp.int32)[:, None]
            _, index = programs.load(program, arrays, (place, place, heads))[at]
            shape = jnp.broadcast_shapes((1, 1), *(jnp.shape(x) for x in index))
            axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
            values = sums[n].sum(axes, keepdims=True)
            index = tuple(jnp.broadcast_to(x, shape) for x in index)
            if not index:
                values = values.reshape(())
            grads[one.array] = programs.add_at(grads[one.array], index, values)
        return tuple(grads)

    count = math.prod(batch)
    arrays = tuple(jnp.broadcast_to(x, (count, *x.shape[1:])) for x in bias.arrays)
    grads = jax.vmap(entry, axis_size=count)(arrays, sums)

    found = zip(grads, primal.arrays, strict=True)
    return ScoreFunction(program, tuple(_shaped(x, like, batch) for x, like in found))


def _shaped(grad: Array, primal: Array, batch: tuple[int, ...]) -> Array:
    """``grad [B, ...]`` in the shape of its primal: what is shared is summed."""
    grad = grad.reshape(*batch, *grad.shape[1:])
    axes = tuple(i for i, n in enumerate(primal.shape) if n < grad.shape[i])
    return grad.sum(axes, keepdims=True).astype(primal.dtype)


def _values(bias: Bias) -> Array:
    return bias.values if isinstance(bias, BlockBias | EntryBias) else bias


def _pad_last(x: Array, length: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


# ------------------------------------------------------------------------ batch axes


def _one_batch_axis(x: Array, batch: tuple[int, ...]) -> Array:
    """Small arrays: one axis of size 1 if all entries share it, else full."""
    rank = len(batch)
    lead, rest = x.shape[:rank], x.shape[rank:]
    if math.prod(lead) > 1:
        x = jnp.broadcast_to(x, (*batch, *rest))
    return x.reshape(-1, *rest)


def _join_batch(x: Array, batch: tuple[int, ...]) -> tuple[Array, int]:
    """One batch axis from those of ``batch``, each of which x has or shares.

    Also ``inner``: batch entry n of them all reads ``x[n // inner % len(x)]``.
    """
    rank = len(batch)
    lead, inner = _joined(x.shape[:rank], batch)
    x = jnp.broadcast_to(x, (*lead, *x.shape[rank:]))
    return x.reshape(-1, *x.shape[rank:]), inner


def _joined(
    lead: tuple[int, ...], batch: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    """Axes ``lead``, full between two that are its own, and ``inner``.

    Axes of size 1 at either end stay so, as nothing has to be copied for them.
    """
    own = [i for i, n in enumerate(batch) if lead[i] == n > 1]
    if not own:
        return lead, 1
    begin, end = own[0], own[-1] + 1
    full = (*lead[:begin], *batch[begin:end], *lead[end:])
    return full, math.prod(batch[end:])


# ------------------------------------------------------------------------ block lists


class _List(NamedTuple):
    """Blocks of a kind by query block: how many, which, their number in `BlockBias`."""

    count: Array
    column: Array
    number: Array


def _listed(mask: BlockMask) -> tuple[_List, _List]:
    """The partial and the full blocks, in `BlockBias` order: heads outermost."""
    partial, full = mask.kv_num_blocks, mask.full_kv_num_blocks
    before = partial.sum((1, 2), dtype=jnp.int32)[:, None, None, None]
    return (
        _List(
            partial,
            mask.kv_indices,
            _first(partial)[..., None] + _slots(mask.kv_indices),
        ),
        _List(
            full,
            mask.full_kv_indices,
            before + _first(full)[..., None] + _slots(mask.full_kv_indices),
        ),
    )


def _first(count: Array) -> Array:
    """How many blocks of its batch entry come before each row's."""
    flat = count.reshape(len(count), -1)
    return (jnp.cumsum(flat, 1, dtype=jnp.int32) - flat).reshape(count.shape)


def _slots(column: Array) -> Array:
    return np.arange(column.shape[-1], dtype=np.int32)


def _by_place(mask: BlockMask, values: list, fill: int) -> Array:
    """``[B or 1, H or 1, nq, nkv]`` int32: values of partial and of full blocks."""
    lists = _listed(mask)
    places = jnp.full((*lists[0].count.shape, mask.num_kv_blocks), fill, jnp.int32)
    b, h, i = np.ix_(*map(np.arange, places.shape[:3]))
    for (count, column, _), value in zip(lists, values, strict=True):
        used = _slots(column) < count[..., None]
        column = jnp.where(used, column, mask.num_kv_blocks)  # others are dropped
        at = b[..., None], h[..., None], i[..., None], column
        places = places.at[at].set(value, mode="drop")
    return places
