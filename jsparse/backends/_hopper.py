"""What the adapters of the Hopper kernels share: operands as the kernels take them.

One batch axis, head sizes that are multiples of 16, flat block lists, element tests by
row and column, a schedule. Called by `mosaic_gpu` and `cutlass`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.backends._contract import HostPattern, Operands, Problem
from jsparse.backends._mosaic_bias import kernel_bias, launched
from jsparse.pallas_kernels._common import LOG2E, compute_capability
from jsparse.pallas_kernels.mosaic_gpu import _bias
from jsparse.pallas_kernels.mosaic_gpu._elements import (
    ColumnInterval,
    Elements,
    RowInterval,
    Rule,
    SameLabel,
    Within,
)
from jsparse.pallas_kernels.mosaic_gpu._persistent import FLAGGED
from jsparse.pallas_kernels.mosaic_gpu._schedule import (
    Blocks,
    Schedule,
    schedule_on_device,
    schedule_on_host,
)
from jsparse.patterns import BlockMask, Capacity, Distance, Segments, Window

Array = Any
_LISTS = [f"{x}_{y}" for x in Capacity._fields for y in ("num_blocks", "indices")]


def wrong_device(problem: Problem) -> str | None:
    """Why the kernels cannot run where the problem is computed."""
    if problem.platform != "gpu":
        return f"it needs an H100 or H200, and JAX computes on {problem.platform}"
    capability = compute_capability()
    if capability != "9.0":
        return f"it needs compute capability 9.0, and this GPU has {capability}"
    return None


@functools.cache
def num_multiprocessors() -> int:
    """Of the GPU; of an H100 where there is none, so that kernels lower anywhere."""
    if jax.default_backend() != "gpu":
        return 132
    return int(jax.devices("gpu")[0].core_count)


class Lists(NamedTuple):
    """Block lists of a launch by row, ``[B or 1, H or 1, n, ...]``, and on the host."""

    partial: Blocks
    full: Blocks
    known: tuple[Blocks, Blocks] | None


class Statistics(NamedTuple):
    """Of the queries, ``[B, H, nq * block_q]``.

    Attributes:
        lse2: float32, base 2; +inf where a query saw nothing or does not exist.
        delta: float32, ``sum(dout * out) - dlse``; 0 where lse2 is not finite.
        bad: int32, 1 where lse or delta is not finite.
        blind: ``[*B, H, T]`` bool, where a query saw nothing.
    """

    lse2: Array
    delta: Array
    bad: Array
    blind: Array


@dataclasses.dataclass(frozen=True)
class Call:
    """Operands with one batch axis; every array that has it is full or of size 1."""

    q: Array
    k: Array
    v: Array
    mask: BlockMask
    batch: tuple[int, ...]
    scale: float
    sign: float
    known: BlockMask | None
    bias: _bias.Bias | None

    @classmethod
    def of(
        cls,
        operands: Operands,
        scale: float,
        pattern: HostPattern | None,
        multiple: int = 16,
    ) -> Call:
        """The canonical form, head sizes rounded up to a multiple.

        The kernels want a positive scale: q takes the sign.
        """
        batch = operands.batch_shape
        rank, total = len(batch), math.prod(batch)
        sign = 1.0 if scale > 0 else float(np.sign(scale))

        def flat(x):
            return _flatten(jnp, x, x.shape[:rank], batch)

        def full(x):
            return jnp.broadcast_to(flat(x), (total, *x.shape[rank:]))

        mask = _common_lists(jnp, jax.tree_util.tree_map(flat, operands.mask))
        known = None
        if pattern is not None:
            leads = jax.tree_util.tree_map(lambda x: x.shape[:rank], operands.mask)
            known = _known_lists(pattern.mask, leads, batch)
        q = pad_dim(operands.q, multiple)
        if sign != 1:
            q = q * jnp.asarray(sign, q.dtype)
        return cls(
            full(q),
            full(pad_dim(operands.k, multiple)),
            full(pad_dim(operands.v, multiple)),
            mask,
            batch,
            abs(scale) or 1.0,
            sign,
            known,
            kernel_bias(operands.bias, mask, batch),
        )

    @property
    def dims(self) -> tuple[int, int]:
        """Rounded head sizes."""
        return self.q.shape[-1], self.v.shape[-1]

    @property
    def blocks(self) -> tuple[int, int]:
        return self.mask.block_q, self.mask.block_kv

    def flat(self, x: Array) -> Array:
        """Joins the full batch axes of x."""
        return x.reshape(-1, *x.shape[len(self.batch) :])

    def pad_queries(self, x: Array, value: float) -> Array:
        """``[..., H, T]`` to ``[B, H, nq * block_q]``."""
        x = x.reshape(-1, *x.shape[-2:])
        return _pad_last(x, self.mask.num_q_blocks * self.mask.block_q, value)

    def sum_shared(self, grad: Array, primal: Array) -> Array:
        """A gradient in the shape of its primal: padding off, shared axes summed."""
        rank = len(self.batch)
        grad = grad[..., : primal.shape[-1]].reshape(*self.batch, *primal.shape[rank:])
        axes = tuple(i for i in range(rank) if primal.shape[i] < self.batch[i])
        if not axes:
            return grad
        total = grad.astype(jnp.float32).sum(axes, keepdims=True)
        return total.astype(grad.dtype)

    def statistics(
        self, out: Array, lse: Array, dout: Array, dlse: Array
    ) -> Statistics:
        """What the backward kernels read of the forward pass."""
        delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
        delta = jnp.moveaxis(delta, -1, -2) - dlse
        blind, bad = jnp.isneginf(lse), ~jnp.isfinite(lse) | ~jnp.isfinite(delta)
        lse2 = jnp.where(blind, jnp.inf, jnp.where(bad, jnp.nan, lse * LOG2E))
        return Statistics(
            self.pad_queries(lse2, jnp.inf),
            self.pad_queries(jnp.where(bad, 0, delta), 0),
            self.pad_queries(bad, False).astype(jnp.int32),
            blind,
        )

    def launched(self, side: str) -> _bias.Bias | None:
        """The bias for a launch over the lists ``"kv"``, by query block, or ``"q"``."""
        return launched(self.bias, self.mask, side)

    # -------------------------------------------------------------- lists, schedules

    @property
    def rows(self) -> Lists:
        """Lists by query block."""
        return self._lists("kv")

    @property
    def columns(self) -> Lists:
        """Lists by key block."""
        return self._lists("q")

    def _lists(self, side: str) -> Lists:
        def blocks(mask, kind):
            names = f"{kind}{side}_num_blocks", f"{kind}{side}_indices"
            return Blocks(*(getattr(mask, name) for name in names))

        known = None
        if self.known is not None:
            known = blocks(self.known, ""), blocks(self.known, "full_")
        return Lists(blocks(self.mask, ""), blocks(self.mask, "full_"), known)

    def schedule(
        self,
        lists: Lists,
        workers: int,
        group: int = 1,
        tiles: int = 1,
        share: int = 1,
    ) -> Schedule:
        """On the host if the pattern is known, else on the device."""
        make, blocks = schedule_on_device, (lists.partial, lists.full)
        if lists.known is not None:
            make, blocks = schedule_on_host, lists.known
        return make(
            *blocks,
            batch=self.q.shape[0],
            heads=self.q.shape[2],
            workers=workers,
            group=group,
            tiles=tiles,
            share=share,
            one_bias=_shared(self.bias, *self.q.shape[::2]),
        )

    # --------------------------------------------------------------- element tests

    def bad_keys(self, x: Array) -> Array:
        """``[B, K, nkv * block_kv]``, 1 where ``x [B, S, K, D]`` is not finite."""
        bad = jnp.moveaxis(_not_finite(x), 1, 2).astype(jnp.int32)
        return _pad_last(bad, self.mask.num_kv_blocks * self.mask.block_kv, 0)

    def entries(self, lists: Lists, bad: Array, block: int) -> tuple[Array, Array]:
        """The lists for a kernel: blocks with a bad column are flagged in the partial.

        One flag stands for all batch entries and heads that may list the block.
        """
        blocks = (bad != 0).reshape(-1, bad.shape[-1] // block, block).any((0, 2))
        columns = lists.partial.column
        flags = blocks.astype(jnp.int32)[columns]
        return columns + FLAGGED * flags, lists.full.column

    def elements(self, bad: Array) -> Elements:
        """The test of partial blocks; rows are queries."""
        q, kv = self._tokens
        return self._elements(q, kv, self.mask.bits, self.mask.rules, bad)

    def transposed_elements(self, bad: Array) -> Elements:
        """The test of partial blocks; rows are keys."""
        bits, rules = self.mask.bits, tuple(x.transpose() for x in self.mask.rules)
        if bits is not None:
            bits = _transpose_bits(
                bits, self._order_by_key(bits.shape[1]), self.mask.block_kv
            )
        q, kv = self._tokens
        return self._elements(kv, q, bits, rules, bad)

    def _order_by_key(self, count: int) -> Array:
        """``[B or 1, n]``: number by query block of each partial block by key block.

        Known before tracing if the pattern is.
        """
        sizes = count, self.mask.num_kv_blocks
        if self.known is None:
            order = jax.vmap(functools.partial(_order_by_key, jnp, *sizes))
            return order(self.mask.kv_num_blocks, self.mask.kv_indices)
        lists = self.known.kv_num_blocks, self.known.kv_indices
        order = functools.partial(_order_by_key, np, *sizes)
        return np.stack([order(*entry) for entry in zip(*lists, strict=True)])

    @property
    def _tokens(self) -> tuple[_Tokens, _Tokens]:
        """The queries and the keys."""
        m = self.mask
        return (
            _Tokens(m.q_lengths, m.num_q_blocks * m.block_q),
            _Tokens(m.kv_lengths, m.num_kv_blocks * m.block_kv),
        )

    def _elements(self, rows, columns, bits, rules, bad) -> Elements:
        rules = tuple(_kernel_rule(rule, rows, columns) for rule in rules)
        if bits is not None:
            bits = jax.lax.bitcast_convert_type(bits, jnp.int32)
        lengths = None
        if all(isinstance(rule, SameLabel) for rule in rules):  # see `_kernel_rule`
            shape = (self.q.shape[0],)
            both = [jnp.broadcast_to(x.lengths, shape) for x in (rows, columns)]
            lengths = jnp.stack(both, 1).reshape(-1).astype(jnp.int32)
        return Elements(lengths, bad, bits, rules)


class _Tokens(NamedTuple):
    """Queries or keys: ``lengths [B or 1]``, and how many whole blocks hold."""

    lengths: Array
    padded: int


def _kernel_rule(
    rule: Segments | Window | Distance, rows: _Tokens, columns: _Tokens
) -> Rule:
    """A rule by row and column, its arrays padded to whole blocks.

    An interval and a cut-off rule out tokens that do not exist: those have no interval,
    and end those of others; or their coordinates are NaN, and close to nothing.
    """

    def whole(x, tokens):
        return _pad_last(x.astype(jnp.int32), tokens.padded, 0)

    def interval(window, tokens, others):
        exists = np.arange(window.stop.shape[-1]) < tokens.lengths[:, None]
        stop = jnp.clip(window.stop, 0, others.lengths[:, None])
        ends = jnp.maximum(window.start, 0), jnp.where(exists, stop, 0)
        return [whole(x, tokens) for x in ends]

    def by_axis(x, tokens):
        exists = np.arange(x.shape[-2]) < tokens.lengths[:, None]
        x = jnp.where(exists[..., None], x.astype(jnp.float32), jnp.nan)
        return _pad_last(jnp.moveaxis(x, -1, -2), tokens.padded, jnp.nan)

    if isinstance(rule, Segments):
        return SameLabel(whole(rule.q_ids, rows), whole(rule.kv_ids, columns))
    if isinstance(rule, Window):
        if rule.side == "q":
            return RowInterval(*interval(rule, rows, columns))
        return ColumnInterval(*interval(rule, columns, rows))
    cutoff = rule.cutoff[:, 0].astype(jnp.float32)
    coords = by_axis(rule.q_coords, rows), by_axis(rule.kv_coords, columns)
    return Within(*coords, cutoff * cutoff)


def _shared(bias: _bias.Bias | None, batch: int, heads: int) -> tuple[bool, bool]:
    """Whether batch entries, and whether heads, share a bias."""
    return (False, False) if bias is None else bias.shared(batch, heads)


def _not_finite(x: Array) -> Array:
    """Whether any of the numbers along the last axis, of 16 bits, is not finite.

    Two at a time: only an exponent of ones carries into the sign. `isfinite` would
    widen each to 32 bits first; what that costs is in ``pallas_kernels/README.md``.
    """
    fraction = jnp.finfo(x.dtype).nmant
    signs = np.uint32(0x80008000)
    one = np.uint32(0x00010001 << fraction)  # in the last place of both exponents
    words = jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint32)
    return ((((words & (signs - one)) + one) & signs) != 0).any(-1)


def _pad_last(x: Array, length: int, value: float) -> Array:
    width = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
    return jnp.pad(x, width, constant_values=value)


def pad_dim(x: Array, multiple: int = 16) -> Array:
    """Rounds the head size up, with zeros."""
    return _pad_last(x, -(-x.shape[-1] // multiple) * multiple, 0)


def _flatten(xp: Any, x: Array, lead: tuple[int, ...], batch: tuple[int, ...]) -> Array:
    """Joins leading axes ``lead`` into one: of size 1 if all are shared, else full."""
    if math.prod(lead) == 1:
        return x.reshape(1, *x.shape[len(lead) :])
    x = xp.broadcast_to(x, (*batch, *x.shape[len(lead) :]))
    return x.reshape(math.prod(batch), *x.shape[len(lead) :])


def _known_lists(mask: BlockMask, leads: Any, batch: tuple[int, ...]) -> BlockMask:
    """The lists of a known mask as NumPy arrays, with the batch axis of the launch."""
    found = {}
    for name_ in _LISTS:
        x, lead = np.asarray(getattr(mask, name_)), getattr(leads, name_)
        found[name_] = _flatten(np, x.reshape(*lead, *x.shape[1:]), lead, batch)
    return _common_lists(np, dataclasses.replace(mask, **found))


def _common_lists(xp: Any, mask: BlockMask) -> BlockMask:
    """Block lists that have their first axis in common: one number names a row of all.

    Under `jax.vmap` some may be mapped, and others shared.
    """
    lists = {name_: getattr(mask, name_) for name_ in _LISTS}
    batch = max(x.shape[0] for x in lists.values())
    if all(x.shape[0] == batch for x in lists.values()):
        return mask
    shared = {k: xp.broadcast_to(x, (batch, *x.shape[1:])) for k, x in lists.items()}
    return dataclasses.replace(mask, **shared)


def _transpose_bits(bits: Array, order: Array, block_kv: int) -> Array:
    """Bits in the order of the transposed lists, ``[B or 1, n, block_kv, words]``."""
    shape = (max(bits.shape[0], order.shape[0]),)
    bits = jnp.broadcast_to(bits, (*shape, *bits.shape[1:]))
    order = jnp.broadcast_to(order, (*shape, *order.shape[1:]))
    bits = jnp.take_along_axis(bits, order[..., None, None], 1)
    batch, n, block_q, words = bits.shape
    # Squares of 32 queries by 32 keys: [B, n, word of queries, word of keys, query].
    bits = bits.reshape(batch, n, block_q // 32, 32, words).swapaxes(3, 4)
    # Halves of a square trade places, then of its quarters, and so on.
    for size in (16, 8, 4, 2, 1):
        low = sum(1 << i for i in range(32) if not i & size)
        halves = bits.reshape(*bits.shape[:4], -1, 2, size)
        first, second = halves[..., 0, :], halves[..., 1, :]
        swapped = (first >> size ^ second) & np.uint32(low)
        halves = first ^ swapped << size, second ^ swapped
        bits = jnp.stack(halves, -2).reshape(bits.shape)
    # [B, n, word of queries, key]
    bits = bits.reshape(batch, n, block_q // 32, -1)
    return bits.swapaxes(2, 3)[:, :, :block_kv]


def _order_by_key(
    xp: Any, count: int, columns: int, counts: Array, indices: Array
) -> Array:
    """`Call._order_by_key` of one batch entry, with NumPy or jnp."""
    heads, _, capacity = indices.shape
    slots = np.arange(capacity)
    valid = slots < counts[..., None]
    # A stable sort by (head, key block) keeps the query blocks ascending. A GPU sorts
    # keys byte by byte: two bytes take half as long as four.
    last = heads * columns
    key = indices + np.arange(heads, dtype=np.int32)[:, None, None] * columns
    key = xp.where(valid, key, last).reshape(-1)
    key = key.astype(np.uint16 if last < 1 << 16 else np.int32)
    number = xp.cumsum(valid.reshape(-1)) - 1
    order = xp.lexsort((key,))[:count]
    return xp.clip(number[order], 0, count - 1).astype(np.int32)
