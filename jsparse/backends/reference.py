"""Dense attention in plain jnp: the definition that other backends are tested against.

Differentiable to any order. It builds the ``[*, H, T, S]`` logits, so it is for small
problems and for checking rows of large ones.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jsparse.backends import _score
from jsparse.backends._contract import (
    HostPattern,
    Operands,
    Problem,
    accumulator_dtype,
    matmul_precision,
)
from jsparse.bias import BlockBias, DistanceBias, EntryBias, ScoreFunction
from jsparse.patterns import BlockMask
from jsparse.patterns._integers import as_keys

Array = Any

name = "reference"
differentiable = True


def why_not(problem: Problem) -> str | None:
    """Never refuses: memory is the only limit."""
    return None


def forward(
    operands: Operands, scale: float, pattern: HostPattern | None
) -> tuple[Array, Array]:
    """Dense attention with the mask's elements; see `Backend.forward`."""
    q, k, v, mask, bias = operands
    acc = accumulator_dtype(q)
    group = q.shape[-2] // k.shape[-2]
    k, v = (jnp.repeat(x, group, axis=-2) for x in (k, v))
    # A NaN must reach exactly the rows that attend to it, but 0 * NaN is NaN in a
    # product: products see zeros in its place, and the NaN is put back by element.
    q_bad, k_bad, v_bad = (_not_finite(x) for x in (q, k, v))
    q, k, v = (_finite(x) for x in (q, k, v))
    logits = jnp.einsum(
        "...thd,...shd->...hts",
        q,
        k,
        preferred_element_type=acc,
        precision=matmul_precision(q),
    )
    bad = _head_first(q_bad)[..., :, None] | _head_first(k_bad)[..., None, :]
    logits = jnp.where(bad, jnp.nan, logits * scale)
    elements, block_ids = _elements(mask)
    if isinstance(bias, ScoreFunction):
        logits = _new_scores(bias, logits, elements, operands.batch_shape)
    elif bias is not None:
        logits = logits + _dense_bias(bias, mask, block_ids).astype(acc)
    logits = jnp.where(elements, logits, -jnp.inf)
    seen = logits != -jnp.inf
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits, 0) - top), 0)
    total = weights.sum(-1)
    empty = total == 0
    some = jnp.where(empty, 1, total)
    weights = jnp.where(seen, weights / some[..., None], 0).astype(v.dtype)
    out = jnp.einsum(
        "...hts,...shd->...thd",
        weights,
        v,
        preferred_element_type=acc,
        precision=matmul_precision(v),
    )
    poisoned = (seen & _head_first(v_bad)[..., None, :]).any(-1)
    out = jnp.where(jnp.swapaxes(poisoned, -1, -2)[..., None], jnp.nan, out)
    lse = jnp.where(empty, -jnp.inf, jnp.log(some) + top[..., 0])
    shape = operands.batch_shape
    out = jnp.broadcast_to(out.astype(q.dtype), (*shape, *out.shape[-3:]))
    return out, jnp.broadcast_to(lse, (*shape, *lse.shape[-2:]))


def _not_finite(x: Array) -> Array:
    return ~jnp.isfinite(x).all(-1)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _head_first(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _elements(mask: BlockMask) -> tuple[Array, Array]:
    """Allowed elements ``[*B, H or 1, T, S]``, block ids ``[*B, H or 1, nq, nk]``."""
    t = jnp.arange(mask.q_len, dtype=jnp.int32)
    s = jnp.arange(mask.kv_len, dtype=jnp.int32)
    element = (t < mask.q_lengths[..., None])[..., :, None]
    element = element & (s < mask.kv_lengths[..., None])[..., None, :]
    for rule in mask.rules:
        element = element & rule.allowed(rule.q_data(), rule.kv_data(), t, s)
    element = element[..., None, :, :]
    partial, ids_partial = _block_map(mask.kv_num_blocks, mask.kv_indices, mask)
    full, ids_full = _block_map(mask.full_kv_num_blocks, mask.full_kv_indices, mask)
    if mask.bits is not None:
        element = element & _dense_bits(mask, ids_partial)
    allowed = _spread(full, mask) | (_spread(partial, mask) & element)
    num_partial = jnp.asarray(mask.kv_num_blocks).sum((-1, -2), dtype=jnp.int32)
    ids = jnp.where(full, num_partial[..., None, None, None] + ids_full, ids_partial)
    return allowed, ids


def _block_map(counts: Array, indices: Array, mask: BlockMask) -> tuple[Array, Array]:
    """Which blocks are listed ``[*B, H, nq, nk]``, and their numbers in list order."""
    used = jnp.arange(indices.shape[-1], dtype=jnp.int32) < counts[..., None]
    columns = jnp.arange(mask.num_kv_blocks, dtype=jnp.int32)
    onehot = used[..., None] & (indices[..., None] == columns)
    flat = counts.reshape(*counts.shape[:-2], -1)
    first = (jnp.cumsum(flat, -1, dtype=jnp.int32) - flat).reshape(counts.shape)
    slot = jnp.arange(indices.shape[-1], dtype=jnp.int32)[:, None]
    ids = first[..., None] + jnp.where(onehot, slot, 0).sum(-2, dtype=jnp.int32)
    return onehot.any(-2), ids


def _spread(blocks: Array, mask: BlockMask) -> Array:
    """Block values ``[..., nq, nk]`` to elements ``[..., T, S]``."""
    x = jnp.repeat(jnp.repeat(blocks, mask.block_q, -2), mask.block_kv, -1)
    return x[..., : mask.q_len, : mask.kv_len]


def _dense_bits(mask: BlockMask, ids: Array) -> Array:
    return _place_blocks(_bits(mask)[..., None, :, :, :], ids, mask)


def _bits(mask: BlockMask) -> Array:
    """``[*B, n, block_q, block_kv]`` bool."""
    words = jnp.asarray(mask.bits)
    shift = jnp.arange(32, dtype=jnp.uint32)
    bits = (words[..., None] >> shift) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], -1)[..., : mask.block_kv] != 0


def _dense_entries(bias: EntryBias, kv_len: int) -> Array:
    """``[*B, H or 1, T, S]``, 0 where no list has an entry."""
    values, index = bias.values, as_keys(bias.index, kv_len)[..., None, :, :]
    lead = jnp.broadcast_shapes(values.shape[:-1], index.shape[:-1])
    values, index = (
        jnp.broadcast_to(x, (*lead, x.shape[-1])).reshape(-1, x.shape[-1])
        for x in (values, index)
    )
    key = jnp.where((index >= 0) & (index < kv_len), index, kv_len)
    rows, count = jnp.arange(len(key), dtype=jnp.int32)[:, None], key.shape[1]
    # Of a key that is named twice, the first.
    first = jnp.full((len(key), kv_len + 1), count)
    first = first.at[rows, key].min(jnp.arange(count), mode="drop")
    dense = jnp.pad(values, ((0, 0), (0, 1)))[rows, first]
    return dense[:, :kv_len].reshape(*lead, kv_len)


def _place_blocks(blocks: Array, ids: Array, mask: BlockMask) -> Array:
    """Puts blocks ``[*B, H or 1, n, bq, bk]`` where ``ids [*B, H or 1, nq, nk]``."""
    lead = jnp.broadcast_shapes(blocks.shape[:-3], ids.shape[:-2])
    blocks = jnp.broadcast_to(blocks, (*lead, *blocks.shape[-3:]))
    ids = jnp.broadcast_to(ids, (*lead, *ids.shape[-2:]))
    nq, nk = ids.shape[-2:]
    flat = ids.reshape(*lead, nq * nk, 1, 1)
    last = max(blocks.shape[-3] - 1, 0)
    tiles = jnp.take_along_axis(blocks, jnp.clip(flat, 0, last), axis=-3)
    tiles = tiles.reshape(*lead, nq, nk, mask.block_q, mask.block_kv)
    dense = jnp.swapaxes(tiles, -2, -3).reshape(*lead, nq * mask.block_q, -1)
    return dense[..., : mask.q_len, : mask.kv_len]


def _new_scores(
    bias: ScoreFunction, logits: Array, elements: Array, batch: tuple[int, ...]
) -> Array:
    """What a score function makes of the logits ``[*B, H, T, S]``."""

    def one(logits, elements, arrays):
        heads, rows, columns = (
            jnp.arange(n, dtype=jnp.int32).reshape(n, *(1,) * after)
            for n, after in zip(logits.shape, (2, 1, 0), strict=True)
        )
        place = rows, columns, heads
        loaded = [value for value, _ in _score.load(bias.function, arrays, place)]
        return _score.scores(bias.function, elements, (logits, *place), loaded)

    def flat(x):
        shape = x.shape[len(batch) :]
        return jnp.broadcast_to(x, (*batch, *shape)).reshape(-1, *shape)

    elements = jnp.broadcast_to(elements, logits.shape)
    entries = jax.tree_util.tree_map(flat, (logits, elements, bias.arrays))
    out = jax.vmap(one)(*entries)
    return out.reshape(*batch, *out.shape[1:])


def _dense_bias(bias: Any, mask: BlockMask, ids: Array) -> Array:
    if isinstance(bias, BlockBias):
        return _place_blocks(bias.values, ids, mask)
    if isinstance(bias, EntryBias):
        return _dense_entries(bias, mask.kv_len)
    if isinstance(bias, DistanceBias):
        return bias.dense()
    return bias
