"""One batch entry of the xla backend: blocked arrays, tiles, and the walks over them.

Arrays that belong to heads are kept as ``[K, blocks, G, block, ...]`` with K key heads
and G query heads for each. ``R`` is the number of rows taken together, ``m`` and ``n``
are the queries and keys of a tile. Called by `xla.py` only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jsparse.backends._contract import (
    Operands,
    accumulator_dtype,
    matmul_precision,
    vary_like,
)
from jsparse.backends._xla_bias import (
    Reads,
    ScoreTerm,
    Term,
    arrange_pairs,
    make_term,
)

Array = Any


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


class Tiles:
    """Blocked arrays of one batch entry, and the walks over them."""

    def __init__(self, single: Single, scale: float):
        q, k, v, mask, bias = single.operands
        self.single, self.scale, self.mask = single, scale, mask
        self.num_q, self.num_heads, self.head_dim = q.shape
        self.num_kv, self.num_kv_heads, self.value_dim = v.shape
        self.group = self.num_heads // self.num_kv_heads
        self.block_q, self.block_kv = mask.block_q, mask.block_kv
        self.nq, self.nk = (
            -(-self.num_q // self.block_q),
            -(-self.num_kv // self.block_kv),
        )
        self.acc, self.dtype = accumulator_dtype(q), q.dtype
        self.precision = matmul_precision(q)
        self.q, self.k = self.by_query(q), self.by_key(k)
        # 0 * NaN is NaN: products see zeros, and whoever attends gets the NaN back.
        self.v_bad, self.v = _split_bad(self.by_key(v))
        self.q_rules = [
            _blocked(x, self.block_q) for r in mask.rules for x in r.q_data()
        ]
        self.kv_rules = [
            _blocked(x, self.block_kv) for r in mask.rules for x in r.kv_data()
        ]
        self.term: Term = make_term(bias, self.block_q, self.block_kv)
        self.q_bias = tuple(_blocked(x, self.block_q) for x in self.term.q_data())
        self.kv_bias = tuple(_blocked(x, self.block_kv) for x in self.term.kv_data())

    def config(self, block: int, listed: int) -> Config:
        return Config.choose(block, listed, self.num_heads, jax.default_backend())

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

    def scores(self, step: Step) -> tuple[Array, Any]:
        """Logits ``[K, R, G, m, n]``, -inf where unseen, and the bias pullback.

        The pullback, if there is a bias, takes their gradient to that of the products
        and of the bias's `Reads`.
        """
        q = _take_heads(self.q, step.i)
        k = _take_heads(self.k, step.j)[:, :, 0]
        s = self.product("krgmd,krnd->krgmn", q, k) * self.scale
        allowed = self.allowed(step)[:, None]
        pullback = None
        if self.single.operands.bias is not None:
            place = self.place(step)
            reads = Reads(
                self.term.read_shared(place),
                tuple(_take(x, step.i) for x in self.q_bias),
                tuple(_take(x, step.j) for x in self.kv_bias),
                self.term.read_pairs(step.pair_i, step.pair_j, step.ids),
            )

            def biased(s: Array, reads: Reads) -> Array:
                if isinstance(self.term, ScoreTerm):
                    counts = jnp.broadcast_to(allowed, s.shape)
                    return self.term.scores(s, reads, counts, place)
                values = self.term.values(reads, step.by_column)
                return s + self.all_heads(values, s.shape)

            s, pullback = jax.vjp(biased, s, reads)
        return jnp.where(allowed, s, -jnp.inf), pullback

    def place(self, step: Step) -> tuple[Array, ...] | None:
        """What a `ScoreTerm` must know of a tile: indices and heads of its logits."""
        if not isinstance(self.term, ScoreTerm):
            return None
        i = _positions(step.i, self.block_q)[None, :, None, :, None]
        j = _positions(step.j, self.block_kv)[None, :, None, None, :]
        heads = self.term.bias.arrays[-1]
        return i, j, heads.reshape(self.num_kv_heads, 1, self.group, 1, 1)

    def all_heads(self, x: Array, shape: tuple[int, ...]) -> Array:
        """``[H or 1, R, m or 1, n]`` to ``shape``, ``[K, R, G, m, n]``."""
        kv_heads, rows, group, m, n = shape
        x = jnp.broadcast_to(x, (kv_heads * group, rows, m, n)).astype(self.acc)
        return x.reshape(kv_heads, group, rows, m, n).swapaxes(1, 2)

    def allowed(self, step: Step) -> Array:
        """Elements ``[R, m, n]`` that exist and that the mask allows."""
        listed = jnp.repeat(
            step.valid, self.block_q if step.by_column else self.block_kv, 1
        )
        listed = listed[:, :, None] if step.by_column else listed[:, None, :]
        if not step.partial:
            return listed
        mask = self.mask
        t = _positions(step.i, self.block_q)
        s = _positions(step.j, self.block_kv)
        ok = (
            listed
            & (t < mask.q_lengths)[:, :, None]
            & (s < mask.kv_lengths)[:, None, :]
        )
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
        config = self.config(self.block_q, self.block_kv)
        heads = (self.num_kv_heads, self.group)

        def step_fn(carry, step):
            top, total, out, poisoned = carry
            s, _ = self.scores(step)
            v, bad = (
                _take_heads(self.v, step.j)[:, :, 0],
                _take_heads(self.v_bad, step.j),
            )
            new_top = jnp.maximum(top, s.max(-1))
            base = jnp.where(new_top == -jnp.inf, 0, new_top)
            p = jnp.exp(s - base[..., None])
            keep = jnp.exp(top - base)
            total = total * keep + p.sum(-1)
            pv = self.product("krgmn,krnd->krgmd", p.astype(self.dtype), v)
            # A pass over the tile that clean values never need.
            poisoned |= lax.cond(
                bad.any(),
                lambda: ((s != -jnp.inf) & bad[:, :, :, None, :]).any(-1),
                lambda: vary_like(jnp.zeros_like(poisoned), s),
            )
            return new_top, total, out * keep[..., None] + pv, poisoned

        def rows_fn(rows, store):
            shape = (heads[0], len(rows), heads[1], self.block_q)
            start = (
                jnp.full(shape, -jnp.inf, self.acc),
                jnp.zeros(shape, self.acc),
                jnp.zeros((*shape, self.value_dim), self.acc),
                jnp.zeros(shape, bool),
            )
            top, total, out, poisoned = self.walk(
                rows, False, config.width, step_fn, start
            )
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
        # Rows that see nothing have lse = -inf; any finite value keeps exp() at 0.
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

    def logit_gradient(self, step: Step) -> tuple[Array, Array, Reads | None]:
        """``p`` and ``ds``, both ``[K, R, G, m, n]``, and what the bias gets of ds."""
        s, pullback = self.scores(step)
        seen = s != -jnp.inf
        lse, delta = (_take_heads(x, step.i) for x in (self.lse, self.delta))
        p = jnp.exp(s - lse[..., None])
        v = _take_heads(self.v, step.j)[:, :, 0]
        dp = self.product("krgmd,krnd->krgmn", _take_heads(self.dout, step.i), v)
        # v has zeros for NaN and infinity: a row that attends to one has out, and so
        # delta, of NaN, whatever dout is.
        ds = jnp.where(seen, p * (dp - delta[..., None]), 0)
        ds, grads = (ds, None) if pullback is None else pullback(ds)
        return jnp.where(seen, p, 0), ds, grads

    def backward_rows(self) -> tuple[Array, tuple, tuple, Any]:
        """By query block: dq, and the bias's gradients by query, block or shared."""
        config = self.config(self.block_q, self.block_kv)

        def step_fn(carry, step):
            dq, reads = carry
            _, ds, grads = self.logit_gradient(step)
            k = _take_heads(self.k_clean, step.j)[:, :, 0]
            dq = dq + self.product("krgmn,krnd->krgmd", ds.astype(self.dtype), k)
            if grads is None:
                return dq, reads
            far = jnp.iinfo(jnp.int32).max
            i = jnp.where(step.valid, step.pair_i, far)
            ids = None if step.ids is None else jnp.where(step.valid, step.ids, far)
            return dq, Reads(
                self.term.add_shared(reads.shared, grads.shared, self.place(step)),
                _add(reads.q, grads.q),
                (),
                self.term.write_pairs(reads.pairs, i, step.pair_j, ids, grads.pairs),
            )

        def rows_fn(rows, store):
            dq_store, shared, q_store, pairs = store
            shape = (
                self.num_kv_heads,
                len(rows),
                self.group,
                self.block_q,
                self.head_dim,
            )
            q_start = tuple(
                jnp.zeros((len(rows), *x.shape[1:]), self.acc) for x in self.q_bias
            )
            start = (jnp.zeros(shape, self.acc), Reads(shared, q_start, (), pairs))
            dq, reads = self.walk(rows, False, config.width, step_fn, start)
            dq = (dq * self.scale).astype(self.dtype)
            return (
                dq_store.at[:, rows].set(dq, mode="drop"),
                reads.shared,
                _put(q_store, rows, reads.q),
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
        """By key block: dk, dv, and the bias's gradient by key."""
        config = self.config(self.block_kv, self.block_q)

        def step_fn(carry, step):
            dk, dv, kv_bias = carry
            p, ds, grads = self.logit_gradient(step)
            q = _take_heads(self.q_clean, step.i)
            dout = _take_heads(self.dout_clean, step.i)
            bad = _take_heads(self.dout_bad, step.i)[..., None]
            p = jnp.where(bad & (p != 0), jnp.nan, p)
            dk = dk + self.product("krgmn,krgmd->krnd", ds.astype(self.dtype), q)
            dv = dv + self.product("krgmn,krgmd->krnd", p.astype(self.dtype), dout)
            if grads is not None:
                kv_bias = _add(kv_bias, grads.kv)
            return dk, dv, kv_bias

        def rows_fn(rows, store):
            shape = (self.num_kv_heads, len(rows), self.block_kv)
            start = (
                jnp.zeros((*shape, self.head_dim), self.acc),
                jnp.zeros((*shape, self.value_dim), self.acc),
                tuple(
                    jnp.zeros((len(rows), *x.shape[1:]), self.acc) for x in self.kv_bias
                ),
            )
            dk, dv, kv_bias = self.walk(rows, True, config.width, step_fn, start)
            dk, dv = (x[:, :, None].astype(self.dtype) for x in (dk * self.scale, dv))
            return (
                store[0].at[:, rows].set(dk, mode="drop"),
                store[1].at[:, rows].set(dv, mode="drop"),
                _put(store[2], rows, kv_bias),
            )

        store = (
            jnp.zeros(self.k.shape, self.dtype),
            jnp.zeros(self.v.shape, self.dtype),
            tuple(jnp.zeros(x.shape, x.dtype) for x in self.kv_bias),
        )
        return self.over_rows(self.single.by_column, config.rows, rows_fn, store)

    # -------------------------------------------------------------------- loops

    def over_rows(
        self, lists: tuple[Lists, Lists], rows: int, fn: Callable, store: Any
    ) -> Any:
        """Calls ``fn(rows, store)`` for all rows, ``rows`` of them at a time.

        Rows of similar length share a group, so no group waits long for one of its
        rows. One at a time they keep their order: neighbours read the same blocks,
        which a CPU's cache still holds.
        """
        load = lists[0].counts[0] + lists[1].counts[0]
        n = load.shape[0]
        rows = min(rows, n)
        order = jnp.argsort(-load) if rows > 1 else jnp.arange(n)
        order = order.astype(jnp.int32)
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
        """Folds ``fn(carry, step)`` over the listed blocks: partial, then full."""
        lists = self.single.by_column if by_column else self.single.by_row
        carry = vary_like(carry, (self.single, rows))
        for one, partial in zip(lists, (True, False), strict=True):
            capacity = one.indices.shape[-1]
            if capacity == 0:
                continue
            counts = one.counts[0].at[rows].get(mode="fill", fill_value=0)
            take = min(width, capacity)
            at = jnp.minimum(rows, one.counts.shape[-1] - 1)

            def body(
                n, carry, one=one, partial=partial, counts=counts, take=take, at=at
            ):
                slots = n * take + jnp.arange(take, dtype=jnp.int32)
                valid = slots < counts[:, None]
                slots = jnp.minimum(slots, one.indices.shape[-1] - 1)
                listed = one.indices[0, at[:, None], slots]
                ids = None if one.ids is None else one.ids[0, at[:, None], slots]
                own = at[:, None]
                i, j = (listed, own) if by_column else (own, listed)
                return fn(carry, Step(i, j, ids, valid, partial, by_column))

            trips = (counts.max() + take - 1) // take
            if capacity <= take:
                # One step holds every list: no loop, and XLA fuses it with its
                # neighbours.
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
class Step:
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


def _add(total: tuple[Array, ...], grads: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a + b.astype(a.dtype) for a, b in zip(total, grads, strict=True))


def _put(
    store: tuple[Array, ...], rows: Array, values: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Writes blocks ``rows`` of each array; rows beyond the end are dropped."""
    return tuple(
        a.at[rows].set(b.astype(a.dtype), mode="drop")
        for a, b in zip(store, values, strict=True)
    )


def _split_bad(x: Array) -> tuple[Array, Array]:
    """Which vectors ``[..., D]`` hold a NaN or infinity, and ``x`` with zeros there."""
    finite = jnp.isfinite(x)
    return ~finite.all(-1), jnp.where(finite, x, 0)


def _positions(index: Array, block: int) -> Array:
    """Element indices ``[R, W * block]`` of blocks ``index [R, W]``."""
    at = index[..., None] * block + jnp.arange(block, dtype=jnp.int32)
    return at.reshape(index.shape[0], -1)
