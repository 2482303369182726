"""Block-sparse attention in plain XLA: runs anywhere JAX runs, in bounded memory.

Query blocks are taken one or a few at a time; each group walks its block
list with an online softmax, so the largest array is one tile ``[H, rows, block_q,
width * block_kv]``. The backward pass makes two such walks: by query block for dq and
the bias, by key block for dk and dv. Nothing is scattered with atomics, so the same
inputs give the same bits on every run.

This file sees the whole problem: batch axes, head patterns, sums over what is shared.
`_xla_tiles.py` computes one batch entry, `_xla_bias.py` evaluates a bias on one tile.

References:
    Online softmax: Milakov and Gimelshein 2018; recomputation in the backward pass:
    Dao et al. 2022 (FlashAttention).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jsparse.backends._contract import (
    HostPattern,
    Operands,
    Problem,
    accumulator_dtype,
    batch_axes,
    vary_like,
)
from jsparse.backends._xla_tiles import Lists, Single, Tiles
from jsparse.bias import BlockBias, DistanceBias, ScoreFunction
from jsparse.patterns import BlockMask

Array = Any

name = "xla"
differentiable = False


def why_not(problem: Problem) -> str | None:
    """Takes every problem whose arrays are floating point."""
    if not jnp.issubdtype(jnp.dtype(problem.dtype), jnp.floating):
        return f"dtype {problem.dtype} is not a floating-point type"
    if problem.bias == "entry":
        return "an entry bias; expected another, such as a BlockBias"
    return None


# ------------------------------------------------------------------ entry points


def forward(
    operands: Operands, scale: float, pattern: HostPattern | None
) -> tuple[Array, Array]:
    """See `Backend.forward`."""
    operands = vary_like(operands, operands)
    single, restore = _prepare(operands)
    shape = batch_axes(single, restore.batch_rank)
    out, lse = _map_batch(lambda one: Tiles(one, scale).forward(), single, shape)
    return restore.out(out), restore.lse(lse)


def backward(
    operands: Operands,
    scale: float,
    pattern: HostPattern | None,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
    bias_gradient: bool,
) -> tuple[Array, Array, Array, Any]:
    """See `Backend.backward`."""
    operands = vary_like(operands, (operands, dout))
    acc = accumulator_dtype(operands.q)
    # d lse enters the logits' gradient exactly where -sum(dout * out) does.
    delta = (dout.astype(acc) * out.astype(acc)).sum(-1)
    delta = jnp.moveaxis(delta, -1, -2) - dlse
    single, restore = _prepare(operands)
    rows = (restore.split_q(dout), restore.split_lse(lse), restore.split_lse(delta))
    shape = batch_axes((single, rows), restore.batch_rank)

    def one(args):
        entry, (dout_, lse_, delta_) = args
        return Tiles(entry, scale).backward(dout_, lse_, delta_)

    target = (*single.operands[:3], single.operands.bias)
    grads = _sum_batch(one, (single, rows), target, shape)
    *grads, dbias = restore.gradients(grads, operands)
    return *grads, dbias if bias_gradient else None


# ----------------------------------------------------- batch axes and head patterns


class _Restore(NamedTuple):
    """Undoes `_prepare`: the split of heads into batch axes (K, G), and padding."""

    rank: int
    heads: tuple[int, int] | None  # (K, G) where heads became batch axes

    @property
    def batch_rank(self) -> int:
        """Number of batch axes after the split."""
        return self.rank + (0 if self.heads is None else 2)

    def split_q(self, x: Array) -> Array:
        """``[*B, T, H, D]`` to ``[*B, K, G, T, 1, D]``."""
        if self.heads is None:
            return x
        x = x.reshape(*x.shape[:-2], *self.heads, x.shape[-1])
        return jnp.moveaxis(x, -4, -2)[..., None, :]

    def out(self, x: Array) -> Array:
        """Inverse of `split_q`."""
        if self.heads is None:
            return x
        x = jnp.moveaxis(x[..., 0, :], -2, -4)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    def split_kv(self, x: Array) -> Array:
        """``[*B, S, K, D]`` to ``[*B, K, 1, S, 1, D]``."""
        if self.heads is None:
            return x
        return jnp.moveaxis(x, -2, -3)[..., None, :, None, :]

    def merge_kv(self, x: Array) -> Array:
        """Inverse of `split_kv`."""
        if self.heads is None:
            return x
        return jnp.moveaxis(x[..., 0, :, 0, :], -3, -2)

    def split_lse(self, x: Array) -> Array:
        """``[*B, H, ...]`` to ``[*B, K, G, 1, ...]``; a shared axis stays shared."""
        if self.heads is None:
            return x
        sizes = self.heads if x.shape[self.rank] > 1 else (1, 1)
        return x.reshape(*x.shape[: self.rank], *sizes, 1, *x.shape[self.rank + 1 :])

    def lse(self, x: Array) -> Array:
        """Inverse of `split_lse`."""
        if self.heads is None:
            return x
        return x.reshape(*x.shape[: self.rank], -1, *x.shape[self.rank + 3 :])

    def split_shared(self, tree: Any) -> Any:
        """Inserts axes of size 1 for (K, G) into leaves that have no head axis."""
        if self.heads is None:
            return tree
        axes = (self.rank, self.rank + 1)
        return jax.tree_util.tree_map(lambda x: jnp.expand_dims(x, axes), tree)

    def gradients(self, grads: tuple, operands: Operands) -> tuple:
        dq, dk, dv, dbias = grads
        dq, dk, dv = self.out(dq), self.merge_kv(dk), self.merge_kv(dv)
        bias: Any = operands.bias
        if isinstance(bias, DistanceBias):
            if self.heads is not None:
                squeeze = (self.rank, self.rank + 1)
                rest = [
                    jnp.squeeze(x, squeeze)
                    for x in (dbias.q_coords, dbias.kv_coords, dbias.knots)
                ]
                dbias = DistanceBias(self.lse(dbias.weights), *rest, form=bias.form)
        elif isinstance(bias, BlockBias):
            if self.heads is not None:
                squeeze = (self.rank, self.rank + 1)
                dbias = BlockBias(jnp.squeeze(dbias.values, squeeze))
        elif isinstance(bias, ScoreFunction):
            *arrays, _ = dbias.arrays
            if self.heads is not None:
                arrays = [jnp.squeeze(x, (self.rank, self.rank + 1)) for x in arrays]
            dbias = ScoreFunction(bias.function, tuple(arrays))
        elif bias is not None:
            dbias = self.lse(dbias)[..., : bias.shape[-2], : bias.shape[-1]]
        return dq, dk, dv, dbias


def _prepare(operands: Operands) -> tuple[Single, _Restore]:
    """Numbers the blocks, pads a dense bias, makes head patterns batch axes."""
    operands = jax.tree_util.tree_map(jnp.asarray, operands)
    q, k, v, mask, bias = operands
    num_heads, num_kv_heads = q.shape[-2], k.shape[-2]
    heads = None
    if mask.num_heads > 1:
        heads = (num_kv_heads, num_heads // num_kv_heads)
    restore = _Restore(q.ndim - 3, heads)
    lists = _number_blocks(
        mask, needed=mask.bits is not None or isinstance(bias, BlockBias)
    )
    lists = jax.tree_util.tree_map(restore.split_lse, lists)
    # The lists were taken out; what is left of the mask has no head axis.
    blank = dict.fromkeys(_LIST_FIELDS)
    mask = restore.split_shared(dataclasses.replace(mask, **blank, groups=None))
    if isinstance(bias, DistanceBias):
        rest = [
            restore.split_shared(x) for x in (bias.q_coords, bias.kv_coords, bias.knots)
        ]
        bias = DistanceBias(restore.split_lse(bias.weights), *rest, form=bias.form)
    elif isinstance(bias, BlockBias):
        bias = restore.split_shared(bias)
    elif isinstance(bias, ScoreFunction):
        # Where heads become batch axes, only these numbers tell them apart.
        heads = jnp.arange(num_heads, dtype=jnp.int32)
        heads = restore.split_lse(heads.reshape(*(1,) * restore.rank, -1))
        arrays = restore.split_shared(bias.arrays)
        bias = ScoreFunction(bias.function, (*arrays, heads))
    elif bias is not None:
        bias = restore.split_lse(_pad_to_blocks(bias, mask))
    operands = Operands(
        restore.split_q(q), restore.split_kv(k), restore.split_kv(v), mask, bias
    )
    return Single(operands, (lists[0], lists[1]), (lists[2], lists[3])), restore


_LIST_FIELDS = tuple(
    f"{side}_{what}"
    for side in ("kv", "full_kv", "q", "full_q")
    for what in ("num_blocks", "indices")
)


def _pad_to_blocks(bias: Array, mask: BlockMask) -> Array:
    """A dense bias with whole blocks only; one per key (``T`` of 1) stays as it is."""
    if bias.shape[-2] == 1:
        return bias
    pads = [-mask.q_len % mask.block_q, -mask.kv_len % mask.block_kv]
    return jnp.pad(bias, [(0, 0)] * (bias.ndim - 2) + [(0, n) for n in pads])


def _number_blocks(mask: BlockMask, needed: bool) -> tuple[Lists, ...]:
    """The four lists, with block numbers (partial, then full) where they are needed."""
    found, start = [], jnp.int32(0)
    for side in ("", "full_"):
        counts = getattr(mask, f"{side}kv_num_blocks")
        indices = getattr(mask, f"{side}kv_indices")
        columns = (
            getattr(mask, f"{side}q_num_blocks"),
            getattr(mask, f"{side}q_indices"),
        )
        if not needed:
            found.append((Lists(counts, indices, None), Lists(*columns, None)))
            continue
        flat = counts.reshape(*counts.shape[:-2], -1)
        first = start + (jnp.cumsum(flat, -1, dtype=jnp.int32) - flat).reshape(
            counts.shape
        )
        slots = jnp.arange(indices.shape[-1], dtype=jnp.int32)
        ids = first[..., None] + slots
        place, places = _column_ids, (counts[..., None], indices, ids, columns[1])
        # Any of them may be shared over an axis on which another is not.
        lead = jnp.broadcast_shapes(*(x.shape[:-2] for x in places))
        for _ in lead:
            place = jax.vmap(place)
        column_ids = place(
            *(jnp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in places)
        )
        found.append((Lists(counts, indices, ids), Lists(*columns, column_ids)))
        start = start + flat.sum(-1, dtype=jnp.int32)[..., None, None]
    (kv, q), (full_kv, full_q) = found
    return kv, full_kv, q, full_q


def _column_ids(counts: Array, indices: Array, ids: Array, q_indices: Array) -> Array:
    """Block numbers of the transposed list, through a map over all block pairs.

    ``counts`` is ``[nq, 1]``.
    """
    nq, nk = indices.shape[0], q_indices.shape[0]
    slots = jnp.arange(indices.shape[1], dtype=jnp.int32)
    row = jnp.arange(nq, dtype=jnp.int32)[:, None]
    col = jnp.where(slots < counts, indices, nk)
    where = jnp.zeros((nq, nk), jnp.int32).at[row, col].set(ids, mode="drop")
    return where[q_indices, jnp.arange(nk, dtype=jnp.int32)[:, None]]


def _map_batch(fn: Callable, tree: Any, shape: tuple[int, ...]) -> Any:
    """``fn`` of every batch entry, one after another; leaves of size 1 are shared."""
    if math.prod(shape) == 1:
        out = fn(_entry(tree, (0,) * len(shape), shape))
        return jax.tree_util.tree_map(lambda x: x.reshape(*shape, *x.shape), out)
    flat = jnp.arange(math.prod(shape), dtype=jnp.int32)
    out = lax.map(lambda n: fn(_entry(tree, jnp.unravel_index(n, shape), shape)), flat)
    return jax.tree_util.tree_map(lambda x: x.reshape(*shape, *x.shape[1:]), out)


def _sum_batch(fn: Callable, tree: Any, target: Any, shape: tuple[int, ...]) -> Any:
    """Adds ``fn`` of every batch entry into arrays like ``target``, in order."""
    rank = len(shape)
    if math.prod(shape) == 1:
        grads = fn(_entry(tree, (0,) * rank, shape))
        return jax.tree_util.tree_map(
            lambda g, x: g.reshape(x.shape).astype(x.dtype), grads, target
        )

    def zeros(x):
        shared = x.shape[:rank] != shape
        return jnp.zeros(x.shape, accumulator_dtype(x) if shared else x.dtype)

    def body(n, total):
        index = jnp.unravel_index(n, shape)
        grads = fn(_entry(tree, index, shape))

        def add(sum_, g):
            at = _clip_index(sum_, index)
            return sum_.at[at].add(g.astype(sum_.dtype))

        return jax.tree_util.tree_map(add, total, grads)

    start = vary_like(jax.tree_util.tree_map(zeros, target), tree)
    total = lax.fori_loop(0, math.prod(shape), body, start)
    return jax.tree_util.tree_map(lambda g, x: g.astype(x.dtype), total, target)


def _entry(tree: Any, index: Any, shape: tuple[int, ...]) -> Any:
    return jax.tree_util.tree_map(lambda x: x[_clip_index(x, index)], tree)


def _clip_index(x: Array, index: Any) -> tuple:
    return tuple(0 if x.shape[axis] == 1 else i for axis, i in enumerate(index))
