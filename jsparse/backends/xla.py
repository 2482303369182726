"""Block-sparse attention in plain XLA: runs anywhere JAX runs, in bounded memory.

Query blocks are taken longest list first, ``rows`` at a time; each group walks its block
list ``width`` blocks a step with an online softmax, so the largest array is one tile
``[H, rows, block_q, width * block_kv]``. The backward pass makes two such walks: by query
block for dq and the bias, by key block for dk and dv. Nothing is scattered with atomics,
so the same inputs give the same bits on every run.

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
    Operands,
    Problem,
    accumulator_dtype,
    batch_axes,
    matmul_precision,
)
from jsparse.backends._xla_bias import Reads, Term, arrange_pairs, make_term
from jsparse.bias import BlockBias, DistanceBias
from jsparse.patterns import BlockMask

Array = Any

name = "xla"
differentiable = False


def why_not(problem: Problem) -> str | None:
    """Takes every problem whose arrays are floating point."""
    if not jnp.issubdtype(jnp.dtype(problem.dtype), jnp.floating):
        return f"dtype {problem.dtype} is not a floating-point type"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of the walk: ``rows`` blocks at a time, ``width`` listed blocks a step."""

    rows: int
    width: int

    @classmethod
    def choose(cls, block: int, listed: int, heads: int, platform: str) -> Config:
        """A CPU likes one tile that stays in cache, a GPU many rows in one launch.

        Args:
            block: size of the blocks that own the rows.
            listed: size of the blocks in the lists.
            heads: number of query heads.
            platform: where it will run.
        """
        width = max(1, 512 // listed)
        rows = max(1, 128 // block)
        if platform != "cpu":
            tile = heads * block * width * listed
            rows = max(rows, (1 << 24) // tile)
        return cls(rows, width)


class Lists(NamedTuple):
    """One block list: counts ``[n]``, indices ``[n, C]``, block numbers ``[n, C]``."""

    counts: Array
    indices: Array
    ids: Array | None


class Single(NamedTuple):
    """Operands of one batch entry whose heads share one pattern."""

    operands: Operands
    by_row: tuple[Lists, Lists]  # partial, full
    by_column: tuple[Lists, Lists]


# ------------------------------------------------------------------ entry points


def forward(operands: Operands, scale: float) -> tuple[Array, Array]:
    """See `Backend.forward`."""
    operands = vary_like(operands, operands)
    single, restore = _prepare(operands)
    shape = batch_axes(single, restore.batch_rank)
    out, lse = _map_batch(lambda one: _Tiles(one, scale).forward(), single, shape)
    return restore.out(out), restore.lse(lse)


def backward(
    operands: Operands, scale: float, out: Array, lse: Array, dout: Array, dlse: Array
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
        return _Tiles(entry, scale).backward(dout_, lse_, delta_)

    target = (*single.operands[:3], single.operands.bias)
    grads = _sum_batch(one, (single, rows), target, shape)
    return restore.gradients(grads, operands)


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
        """``[*B, H, ...]`` to ``[*B, K, G, 1, ...]``; a shared head axis stays shared."""
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
        bias = operands.bias
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
        elif bias is not None:
            dbias = self.lse(dbias)[..., : bias.shape[-2], : bias.shape[-1]]
        return dq, dk, dv, dbias


def _prepare(operands: Operands) -> tuple[Single, _Restore]:
    """Numbers the blocks, pads a dense bias, and turns head patterns into batch axes."""
    operands = jax.tree_util.tree_map(jnp.asarray, operands)
    q, k, v, mask, bias = operands
    num_heads, num_kv_heads = q.shape[-2], k.shape[-2]
    heads = None
    if mask.num_heads > 1:
        heads = (num_kv_heads, num_heads // num_kv_heads)
    restore = _Restore(q.ndim - 3, heads)
    lists = _number_blocks(mask, needed=mask.bits is not None or isinstance(bias, BlockBias))
    lists = jax.tree_util.tree_map(restore.split_lse, lists)
    # The lists were taken out; what is left of the mask has no head axis.
    blank = {f: None for f in _LIST_FIELDS}
    mask = restore.split_shared(dataclasses.replace(mask, **blank, groups=None))
    if isinstance(bias, DistanceBias):
        rest = [restore.split_shared(x) for x in (bias.q_coords, bias.kv_coords, bias.knots)]
        bias = DistanceBias(restore.split_lse(bias.weights), *rest, form=bias.form)
    elif isinstance(bias, BlockBias):
        bias = restore.split_shared(bias)
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
        columns = getattr(mask, f"{side}q_num_blocks"), getattr(mask, f"{side}q_indices")
        if not needed:
            found.append((Lists(counts, indices, None), Lists(*columns, None)))
            continue
        flat = counts.reshape(*counts.shape[:-2], -1)
        first = start + (jnp.cumsum(flat, -1, dtype=jnp.int32) - flat).reshape(counts.shape)
        slots = jnp.arange(indices.shape[-1], dtype=jnp.int32)
        ids = first[..., None] + slots
        place = _column_ids
        for _ in range(counts.ndim - 1):
            place = jax.vmap(place)
        column_ids = place(counts, indices, ids, columns[1])
        found.append((Lists(counts, indices, ids), Lists(*columns, column_ids)))
        start = start + flat.sum(-1, dtype=jnp.int32)[..., None, None]
    (kv, q), (full_kv, full_q) = found
    return kv, full_kv, q, full_q


def _column_ids(counts: Array, indices: Array, ids: Array, q_indices: Array) -> Array:
    """Block numbers of the transposed list, through a map over all block pairs."""
    nq, nk = indices.shape[0], q_indices.shape[0]
    slots = jnp.arange(indices.shape[1], dtype=jnp.int32)
    row = jnp.arange(nq, dtype=jnp.int32)[:, None]
    col = jnp.where(slots < counts[:, None], indices, nk)
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
    """Adds ``fn`` of every batch entry into arrays like ``target``, in a fixed order."""
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


def vary_like(tree: Any, source: Any) -> Any:
    """Marks arrays as varying over every mesh axis that ``source`` varies over.

    Inside `jax.shard_map` a loop's carry must start with the type it ends with, and a
    pullback takes the very type that its function returned.
    """
    axes = frozenset()
    for x in jax.tree_util.tree_leaves(source):
        axes |= jax.typeof(jnp.asarray(x)).mat.varying
    if not axes:
        return tree
    return jax.tree_util.tree_map(
        lambda x: lax.pcast(x, tuple(axes - jax.typeof(x).mat.varying), to="varying"),
        jax.tree_util.tree_map(jnp.asarray, tree),
    )


# --------------------------------------------------------------- one batch entry


class _Tiles:
    """Blocked arrays of one batch entry, and the walks over them."""

    def __init__(self, single: Single, scale: float):
        q, k, v, mask, bias = single.operands
        self.single, self.scale, self.mask = single, scale, mask
        self.num_q, self.num_heads, self.head_dim = q.shape
        self.num_kv, self.num_kv_heads, self.value_dim = v.shape
        self.group = self.num_heads // self.num_kv_heads
        self.block_q, self.block_kv = mask.block_q, mask.block_kv
        self.nq, self.nk = -(-self.num_q // self.block_q), -(-self.num_kv // self.block_kv)
        self.acc, self.dtype = accumulator_dtype(q), q.dtype
        self.precision = matmul_precision(q)
        self.platform = jax.default_backend()
        self.q, self.k = self.by_query(q), self.by_key(k)
        # 0 * NaN is NaN: products see zeros, and whoever attends gets the NaN back.
        self.v_bad, self.v = _split_bad(self.by_key(v))
        self.q_rules = [_blocked(x, self.block_q) for r in mask.rules for x in r.q_data()]
        self.kv_rules = [_blocked(x, self.block_kv) for r in mask.rules for x in r.kv_data()]
        self.term: Term = make_term(bias, self.block_q, self.block_kv)
        self.q_bias = tuple(_blocked(x, self.block_q) for x in self.term.q_data())
        self.kv_bias = tuple(_blocked(x, self.block_kv) for x in self.term.kv_data())

    def by_query(self, x: Array) -> Array:
        """``[T, H, D]`` to ``[K, nq, G, block_q, D]``."""
        x = _blocked(x, self.block_q)
        x = x.reshape(*x.shape[:2], self.num_kv_heads, self.group, x.shape[-1])
        return x.transpose(2, 0, 3, 1, 4)

    def by_key(self, x: Array) -> Array:
        """``[S, K, D]`` to ``[K, nk, 1, block_kv, D]``."""
        return _blocked(x, self.block_kv).transpose(2, 0, 1, 3)[:, :, None]

    def per_query(self, x: Array, fill: float) -> Array:
        """``[H, T]`` to ``[K, nq, G, block_q]``."""
        pad = self.nq * self.block_q - self.num_q
        x = jnp.pad(x, ((0, 0), (0, pad)), constant_values=fill)
        x = x.reshape(self.num_kv_heads, self.group, self.nq, self.block_q)
        return x.swapaxes(1, 2)

    # ------------------------------------------------------------------ one tile

    def scores(self, step: _Step) -> tuple[Array, Any]:
        """Logits ``[K, R, G, m, n]``, -inf where nothing is seen, and the bias pullback."""
        q = _take_heads(self.q, step.i)
        k = _take_heads(self.k, step.j)[:, :, 0]
        s = self.product("krgmd,krnd->krgmn", q, k) * self.scale
        pullback = None
        if self.single.operands.bias is not None:
            reads = Reads(
                self.term.shared(),
                tuple(_take(x, step.i) for x in self.q_bias),
                tuple(_take(x, step.j) for x in self.kv_bias),
                self.term.read_pairs(step.pair_i, step.pair_j, step.ids),
            )
            values, pullback = jax.vjp(
                lambda r: self.all_heads(self.term.values(r, step.by_column), s.shape),
                reads,
            )
            s = s + values
        return jnp.where(self.allowed(step)[:, None], s, -jnp.inf), pullback

    def all_heads(self, x: Array, shape: tuple[int, ...]) -> Array:
        """``[H or 1, R, m or 1, n]`` to ``shape``, ``[K, R, G, m, n]``."""
        kv_heads, rows, group, m, n = shape
        x = jnp.broadcast_to(x, (kv_heads * group, rows, m, n)).astype(self.acc)
        return x.reshape(kv_heads, group, rows, m, n).swapaxes(1, 2)

    def allowed(self, step: _Step) -> Array:
        """Elements ``[R, m, n]`` that exist and that the mask allows."""
        listed = jnp.repeat(step.valid, self.block_q if step.by_column else self.block_kv, 1)
        listed = listed[:, :, None] if step.by_column else listed[:, None, :]
        if not step.partial:
            return listed
        mask = self.mask
        t = _positions(step.i, self.block_q)
        s = _positions(step.j, self.block_kv)
        ok = listed & (t < mask.q_lengths)[:, :, None] & (s < mask.kv_lengths)[:, None, :]
        q_data, kv_data = iter(self.q_rules), iter(self.kv_rules)
        for rule in mask.rules:
            q = tuple(_take(next(q_data), step.i) for _ in rule.q_data())
            kv = tuple(_take(next(kv_data), step.j) for _ in rule.kv_data())
            ok &= rule.allowed(q, kv, t, s)
        if mask.bits is not None:
            words = mask.bits.at[step.ids].get(mode="clip")
            shift = jnp.arange(32, dtype=jnp.uint32)
            bits = (words[..., None] >> shift) & jnp.uint32(1)
            bits = bits.reshape(*words.shape[:-1], -1)[..., : self.block_kv] != 0
            ok &= arrange_pairs(bits, step.by_column)
        return ok

    def product(self, spec: str, x: Array, y: Array) -> Array:
        return jnp.einsum(
            spec, x, y, preferred_element_type=self.acc, precision=self.precision
        )

    # ------------------------------------------------------------------- passes

    def forward(self) -> tuple[Array, Array]:
        """``out [T, H, Dv]`` and ``lse [H, T]``."""
        config = Config.choose(self.block_q, self.block_kv, self.num_heads, self.platform)
        heads = (self.num_kv_heads, self.group)

        def step_fn(carry, step):
            top, total, out, poisoned = carry
            s, _ = self.scores(step)
            v, bad = _take_heads(self.v, step.j)[:, :, 0], _take_heads(self.v_bad, step.j)
            new_top = jnp.maximum(top, s.max(-1))
            base = jnp.where(new_top == -jnp.inf, 0, new_top)
            p = jnp.exp(s - base[..., None])
            keep = jnp.exp(top - base)
            total = total * keep + p.sum(-1)
            pv = self.product("krgmn,krnd->krgmd", p.astype(self.dtype), v)
            poisoned |= ((s != -jnp.inf) & bad[:, :, :, None, :]).any(-1)
            return new_top, total, out * keep[..., None] + pv, poisoned

        def rows_fn(rows, store):
            shape = (heads[0], len(rows), heads[1], self.block_q)
            start = (
                jnp.full(shape, -jnp.inf, self.acc),
                jnp.zeros(shape, self.acc),
                jnp.zeros((*shape, self.value_dim), self.acc),
                jnp.zeros(shape, bool),
            )
            top, total, out, poisoned = self.walk(rows, False, config.width, step_fn, start)
            some = jnp.where(total == 0, 1, total)
            out = jnp.where(poisoned[..., None], jnp.nan, out / some[..., None])
            lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(some))
            return (
                store[0].at[:, rows].set(out.astype(self.dtype), mode="drop"),
                store[1].at[:, rows].set(lse, mode="drop"),
            )

        shape = (heads[0], self.nq, heads[1], self.block_q)
        store = (
            jnp.zeros((*shape, self.value_dim), self.dtype),
            jnp.zeros(shape, self.acc),
        )
        out, lse = self.over_rows(self.single.by_row, config.rows, rows_fn, store)
        return self.merge_query(out), self.merge_stat(lse)

    def backward(self, dout: Array, lse: Array, delta: Array) -> tuple:
        """Gradients of q, k, v ``[T or S, H or K, D]`` and of the bias."""
        self.k_clean = _split_bad(self.k)[1]
        self.q_clean = _split_bad(self.q)[1]
        self.dout = self.by_query(dout)
        self.dout_bad, self.dout_clean = _split_bad(self.dout)
        # Rows that see nothing have lse = -inf; any finite value keeps exp() at 0 there.
        self.lse = self.per_query(jnp.where(lse == -jnp.inf, 0, lse), 0)
        self.delta = self.per_query(delta, 0)
        dq, shared, dq_bias, pairs = self.backward_rows()
        dk, dv, dkv_bias = self.backward_columns()
        reads = Reads(
            shared,
            tuple(_unblocked(x, self.num_q) for x in dq_bias),
            tuple(_unblocked(x, self.num_kv) for x in dkv_bias),
            pairs,
        )
        dq = self.merge_query(dq)
        dk, dv = (self.merge_key(x) for x in (dk, dv))
        return dq, dk, dv, self.term.gradient(reads)

    def logit_gradient(self, step: _Step) -> tuple[Array, Array, Any]:
        """``p`` and ``ds``, both ``[K, R, G, m, n]``, and the bias pullback."""
        s, pullback = self.scores(step)
        seen = s != -jnp.inf
        lse, delta = (_take_stat(x, step.i) for x in (self.lse, self.delta))
        p = jnp.exp(s - lse[..., None])
        v = _take_heads(self.v, step.j)[:, :, 0]
        dp = self.product("krgmd,krnd->krgmn", _take_heads(self.dout, step.i), v)
        bad = _take_heads(self.v_bad, step.j)[:, :, :, None, :]
        dp = jnp.where(bad, jnp.nan, dp)
        ds = jnp.where(seen, p * (dp - delta[..., None]), 0)
        return jnp.where(seen, p, 0), ds, pullback

    def backward_rows(self) -> tuple[Array, tuple, tuple, Any]:
        """dq by query block, and what the bias reads by query, by block or everywhere."""
        config = Config.choose(self.block_q, self.block_kv, self.num_heads, self.platform)

        def step_fn(carry, step):
            dq, reads = carry
            _, ds, pullback = self.logit_gradient(step)
            k = _take_heads(self.k_clean, step.j)[:, :, 0]
            dq = dq + self.product("krgmn,krnd->krgmd", ds.astype(self.dtype), k)
            if pullback is None:
                return dq, reads
            grads = pullback(ds)[0]
            far = jnp.iinfo(jnp.int32).max
            i = jnp.where(step.valid, step.pair_i, far)
            ids = None if step.ids is None else jnp.where(step.valid, step.ids, far)
            return dq, Reads(
                tuple(a + b.astype(a.dtype) for a, b in zip(reads.shared, grads.shared, strict=True)),
                tuple(a + b.astype(a.dtype) for a, b in zip(reads.q, grads.q, strict=True)),
                (),
                self.term.write_pairs(reads.pairs, i, step.pair_j, ids, grads.pairs),
            )

        def rows_fn(rows, store):
            dq_store, shared, q_store, pairs = store
            shape = (self.num_kv_heads, len(rows), self.group, self.block_q, self.head_dim)
            q_start = tuple(
                jnp.zeros((len(rows), *x.shape[1:]), self.acc) for x in self.q_bias
            )
            start = (jnp.zeros(shape, self.acc), Reads(shared, q_start, (), pairs))
            dq, reads = self.walk(rows, False, config.width, step_fn, start)
            dq = (dq * self.scale).astype(self.dtype)
            return (
                dq_store.at[:, rows].set(dq, mode="drop"),
                reads.shared,
                tuple(
                    s.at[rows].set(x.astype(s.dtype), mode="drop")
                    for s, x in zip(q_store, reads.q, strict=True)
                ),
                reads.pairs,
            )

        store = (
            jnp.zeros(self.q.shape, self.dtype),
            tuple(jnp.zeros(x.shape, self.acc) for x in self.term.shared()),
            tuple(jnp.zeros(x.shape, x.dtype) for x in self.q_bias),
            self.term.empty_pairs(),
        )
        return self.over_rows(self.single.by_row, config.rows, rows_fn, store)

    def backward_columns(self) -> tuple[Array, Array, tuple]:
        """dk and dv by key block, and what the bias reads by key."""
        config = Config.choose(self.block_kv, self.block_q, self.num_heads, self.platform)

        def step_fn(carry, step):
            dk, dv, kv_bias = carry
            p, ds, pullback = self.logit_gradient(step)
            q = _take_heads(self.q_clean, step.i)
            dout = _take_heads(self.dout_clean, step.i)
            bad = _take_heads(self.dout_bad, step.i)[..., None]
            p = jnp.where(bad & (p != 0), jnp.nan, p)
            dk = dk + self.product("krgmn,krgmd->krnd", ds.astype(self.dtype), q)
            dv = dv + self.product("krgmn,krgmd->krnd", p.astype(self.dtype), dout)
            if pullback is not None:
                grads = pullback(ds)[0].kv
                kv_bias = tuple(
                    a + b.astype(a.dtype) for a, b in zip(kv_bias, grads, strict=True)
                )
            return dk, dv, kv_bias

        def rows_fn(rows, store):
            shape = (self.num_kv_heads, len(rows), self.block_kv)
            start = (
                jnp.zeros((*shape, self.head_dim), self.acc),
                jnp.zeros((*shape, self.value_dim), self.acc),
                tuple(jnp.zeros((len(rows), *x.shape[1:]), self.acc) for x in self.kv_bias),
            )
            dk, dv, kv_bias = self.walk(rows, True, config.width, step_fn, start)
            values = ((dk * self.scale)[:, :, None], dv[:, :, None])
            new = tuple(
                s.at[:, rows].set(x.astype(s.dtype), mode="drop")
                for s, x in zip(store[:2], values, strict=True)
            )
            return (
                *new,
                tuple(
                    s.at[rows].set(x.astype(s.dtype), mode="drop")
                    for s, x in zip(store[2], kv_bias, strict=True)
                ),
            )

        store = (
            jnp.zeros(self.k.shape, self.dtype),
            jnp.zeros(self.v.shape, self.dtype),
            tuple(jnp.zeros(x.shape, x.dtype) for x in self.kv_bias),
        )
        return self.over_rows(self.single.by_column, config.rows, rows_fn, store)

    # -------------------------------------------------------------------- loops

    def over_rows(self, lists: tuple[Lists, Lists], rows: int, fn: Callable, store: Any) -> Any:
        """Calls ``fn(rows, store)`` for all rows, longest lists first, ``rows`` at a time.

        Rows of similar length share a group, so no group waits long for one of its rows.
        """
        load = lists[0].counts[0] + lists[1].counts[0]
        n = load.shape[0]
        rows = min(rows, n)
        order = jnp.argsort(-load).astype(jnp.int32)
        order = jnp.pad(order, (0, -n % rows), constant_values=n)
        store = vary_like(store, self.single)
        if n <= rows:
            return fn(order, store)

        def body(g, store):
            return fn(lax.dynamic_slice(order, (g * rows,), (rows,)), store)

        return lax.fori_loop(0, len(order) // rows, body, store)

    def walk(
        self, rows: Array, by_column: bool, width: int, fn: Callable, carry: Any
    ) -> Any:
        """Folds ``fn(carry, step)`` over the blocks listed for ``rows``: partial, then full."""
        lists = self.single.by_column if by_column else self.single.by_row
        carry = vary_like(carry, (self.single, rows))
        for one, partial in zip(lists, (True, False), strict=True):
            capacity = one.indices.shape[-1]
            if capacity == 0:
                continue
            counts = one.counts[0].at[rows].get(mode="fill", fill_value=0)
            take = min(width, capacity)
            at = jnp.minimum(rows, one.counts.shape[-1] - 1)

            def body(n, carry, one=one, partial=partial, counts=counts, take=take, at=at):
                slots = n * take + jnp.arange(take, dtype=jnp.int32)
                valid = slots < counts[:, None]
                slots = jnp.minimum(slots, one.indices.shape[-1] - 1)
                listed = one.indices[0, at[:, None], slots]
                ids = None if one.ids is None else one.ids[0, at[:, None], slots]
                own = at[:, None]
                i, j = (listed, own) if by_column else (own, listed)
                return fn(carry, _Step(i, j, ids, valid, partial, by_column))

            trips = (counts.max() + take - 1) // take
            if capacity <= take:
                # One step holds every list: no loop, and XLA fuses it with its neighbours.
                carry = body(0, carry)
            else:
                carry = lax.fori_loop(0, trips, body, carry)
        return carry

    # ------------------------------------------------------------------ unblocking

    def merge_query(self, x: Array) -> Array:
        x = x.transpose(1, 3, 0, 2, 4).reshape(-1, self.num_heads, x.shape[-1])
        return x[: self.num_q]

    def merge_key(self, x: Array) -> Array:
        x = x[:, :, 0].transpose(1, 2, 0, 3).reshape(-1, self.num_kv_heads, x.shape[-1])
        return x[: self.num_kv]

    def merge_stat(self, x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(self.num_heads, -1)[:, : self.num_q]


@dataclasses.dataclass(frozen=True)
class _Step:
    """One tile: query blocks ``i`` against key blocks ``j``, one of them ``[R, 1]``."""

    i: Array
    j: Array
    ids: Array | None
    valid: Array  # [R, W]
    partial: bool
    by_column: bool

    @property
    def pair_i(self) -> Array:
        return jnp.broadcast_to(self.i, self.valid.shape)

    @property
    def pair_j(self) -> Array:
        return jnp.broadcast_to(self.j, self.valid.shape)


def _blocked(x: Array, block: int) -> Array:
    """``[N, ...]`` to ``[n, block, ...]``, padded with zeros."""
    x = jnp.pad(x, [(0, -x.shape[0] % block)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, block, *x.shape[1:])


def _unblocked(x: Array, length: int) -> Array:
    return x.reshape(-1, *x.shape[2:])[:length]


def _take(x: Array, index: Array) -> Array:
    """Blocks ``index [R, W]`` of ``[n, b, ...]``, side by side: ``[R, W * b, ...]``."""
    x = x[index]
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _take_heads(x: Array, index: Array) -> Array:
    """Blocks ``index [R, W]`` of ``[K, n, G, b, ...]``: ``[K, R, G, W * b, ...]``."""
    x = jnp.moveaxis(x[:, index], 2, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


_take_stat = _take_heads


def _split_bad(x: Array) -> tuple[Array, Array]:
    """Which vectors ``[..., D]`` hold a NaN or infinity, and ``x`` with zeros there."""
    finite = jnp.isfinite(x)
    return ~finite.all(-1), jnp.where(finite, x, 0)


def _positions(index: Array, block: int) -> Array:
    """Element indices ``[R, W * block]`` of blocks ``index [R, W]``."""
    at = index[..., None] * block + jnp.arange(block, dtype=jnp.int32)
    return at.reshape(index.shape[0], -1)
