"""Gradient of the queries: rows are queries, columns are keys.

``s = q k^T``, ``dp = dout v^T``, ``p = exp(s - lse)``, ``ds = p (dp - delta)``,
``dq = ds k``: three products a step. See `_persistent` for the roles and the walk.
Where a key or value has a NaN, lse or delta of its queries has one.
May assume what `fwd_sm90` does; called by the adapter.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from . import _bias, _biased, _entries, _persistent, _tables, _tiles
from . import _gradient as gradient
from . import _registers as r
from ._bias import Bias
from ._biased import BiasedWalker
from ._elements import Elements
from ._gradient import BackwardConfig
from ._persistent import HALF, Lists, Output, Stream
from ._schedule import Schedule
from ._softmax import operand
from ._wgmma import Product, start, wait

Array = Any


class BiasGradient(NamedTuple):
    """What the gradient of a bias is made of; None what it is not.

    Attributes:
        by_row: ``[n, B, H, T]`` float32 sums, see `_distance.add_distance_sums` and
            `_score.products_gradient`.
        by_pair: ``[B, H, n]`` float32 sums, see `DistanceBias`.
        values: as ``bias.values``, of a streamed one that no two heads or batch entries
            share; undefined in blocks that the lists do not have. Of a bias by entry
            ``[B, H, n]``, undefined where there is no set bit.
    """

    by_row: Array | None
    by_pair: Array | None
    values: Array | None


def choose(
    head_dim: int,
    value_dim: int,
    block_q: int = 128,
    block_kv: int = 128,
    num_ctas: int = 132,
    bias: str | None = None,
    lane_sums: int = 0,
) -> BackwardConfig:
    """The table's, or the heuristic's: what was fastest on an H100 (see README.md).

    For head sizes above 128, what fits; beside a bias (see `_bias.kind`), or its
    ``lane_sums``, too.
    """
    sizes = head_dim, value_dim, block_q, block_kv
    measured = None if lane_sums else _tables.find("dq", *sizes, bias=bias)
    if measured is not None:
        return BackwardConfig(**measured, num_ctas=num_ctas)
    if bias is not None:
        dims = block_q, head_dim, value_dim, jnp.bfloat16
        room = _biased.room(bias) | dict(lane_sums=lane_sums)
        room |= dict(values=_bias.kind_in_smem(bias).values)
        most = _biased.largest_step(bias, head_dim, value_dim)
        configs = gradient.beside_bias(block_q, block_kv, num_ctas, **most, stages=3)
        return _biased.first_fit(configs, lambda c: scratch_spec(c, *dims, **room))
    widest = max(head_dim, value_dim)
    if widest > 128:
        found = BackwardConfig(tile=32, num_stages=3)
    elif block_q == 64:
        found = BackwardConfig(tile=64, num_stages=3, teams=2 if widest <= 64 else 1)
    elif widest <= 64:
        pp = widest <= 32
        found = BackwardConfig(128, num_stages=3, num_fixed_stages=2, ping_pong=pp)
    else:
        found = BackwardConfig(tile=64, num_stages=3)
    return dataclasses.replace(found, tile=min(found.tile, block_kv), num_ctas=num_ctas)


def scratch_spec(
    config: BackwardConfig,
    tile_q: int,
    head_dim: int,
    value_dim: int,
    dtype,
    bias_dtype=None,
    points=False,
    entries=False,
    values=None,
    lane_sums=0,
) -> dict:
    """Shared memory of one CTA; the estimate and the launch both read it."""
    c, wgs = config, tile_q // 64
    tile = lambda lead, *sizes: _tiles.scratch((c.teams, *lead), *sizes, dtype)
    of_q, of_v = (_tiles.parts(dim, dtype)[0] for dim in (head_dim, value_dim))
    bar = lambda count, arrivals: _persistent.barriers(c.teams, count, arrivals)
    of_lists = _entries.COPIES * entries
    of_bias = _biased.arrivals(wgs, c.tile, bias_dtype)
    return dict(
        q=tile((c.num_fixed_stages, wgs), 64, head_dim),
        dout=tile((c.num_fixed_stages, wgs), 64, value_dim),
        k=tile((c.num_stages,), c.tile, head_dim),
        v=tile((c.num_stages,), c.tile, value_dim),
        **_persistent.staging(tile, wgs, c.staged, dq=head_dim),
        item=_persistent.item_slots(c.teams, c.num_fixed_stages),
        fixed_full=bar(
            c.num_fixed_stages, 1 + wgs * (of_q + of_v + (values is not None))
        ),
        fixed_free=bar(c.num_fixed_stages, wgs),
        k_full=bar(c.num_stages, of_q + of_bias + points + of_lists),
        k_free=bar(c.num_stages, wgs),
        v_full=bar(c.num_stages, of_v),
        v_free=bar(c.num_stages, wgs),
        **_biased.bias_stream(
            bar, (c.teams, c.num_stages, wgs), (64, c.tile), bias_dtype
        ),
        **_biased.points_scratch(c, c.tile, points),
        **_biased.entries_scratch(c, wgs, c.tile, entries),
        **_biased.values_scratch(c.teams, c.num_fixed_stages, wgs, values),
        **_biased.lane_sums_scratch(c.teams, wgs, lane_sums),
    )


def backward_dq(
    q: Array,
    k: Array,
    v: Array,
    dout: Array,
    lse2: Array,
    delta: Array,
    kv_indices: Array,
    full_kv_indices: Array,
    elements: Elements,
    schedule: Schedule,
    *,
    blocks: tuple[int, int],
    scale: float,
    config: BackwardConfig,
    bias: Bias | None = None,
) -> tuple[Array, BiasGradient]:
    """Computes dq, and what makes dbias, over the blocks of a schedule.

    Args:
        q: ``[B, T, H, D]`` float16 or bfloat16.
        k: ``[B, S, K, D]``.
        v: ``[B, S, K, Dv]``.
        dout: ``[B, T, H, Dv]``, of the same dtype.
        lse2: ``[B, H, nq * block_q]`` float32, base 2; +inf where a row saw nothing or
            does not exist.
        delta: as ``lse2``: ``sum(dout * out) - dlse``; finite where lse2 is +inf.
        kv_indices: int32, flattened lists of partial blocks.
        full_kv_indices: int32, flattened lists of full blocks.
        elements: test of the partial blocks; rows are queries; ``bad`` tells of k.
        schedule: from `_schedule`, of these lists, with ``block_q // tile_rows`` items
            for each row.
        blocks: ``block_q`` and ``block_kv``.
        scale: factor of the logits; above 0.
        config: see `BackwardConfig`.
        bias: as in the forward pass, whose probabilities these are.

    Returns:
        dq: ``[B, T, H, D]`` in the dtype of q.
        of_bias: see `BiasGradient`.

    Raises:
        ValueError: for a config that does not fit into shared memory.
    """
    _, q_len, heads, head_dim = q.shape
    value_dim, tile_q = v.shape[-1], config.rows(blocks[0])
    if config.num_stages < 3:
        # A step holds its own tiles and the last step's, and waits for the next step's.
        raise ValueError(
            f"backward_dq: num_stages={config.num_stages}; expected at least 3."
        )
    lane_sums = _bias.lane_sums(bias)
    scratch = _biased.with_values(
        lambda *of_bias: scratch_spec(
            *(config, tile_q, head_dim, value_dim, q.dtype),
            *of_bias,
            lane_sums=lane_sums,
        ),
        _bias.in_smem(bias, rows_are_queries=True),
    )
    _persistent.check_smem("backward_dq", config, scratch)
    slots = max(schedule.num_slots, 1)
    rows = _persistent.rows_of(q_len, blocks[0], head_dim, config.staged)
    out_type = [
        jax.ShapeDtypeStruct((q.shape[0], rows, heads, head_dim), q.dtype),
        jax.ShapeDtypeStruct((slots, tile_q, head_dim), jnp.float32),
    ]
    written = _bias.own_gradient(bias, q.shape[0], heads)
    kernel = _BackwardDq(
        **config.walker(),
        block_rows=tile_q,
        block_columns=blocks[1],
        group=heads // k.shape[2],
        rows_are_queries=True,
        any_partial=schedule.any_partial,
        items_per_worker=schedule.items.shape[1],
        scale=scale,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=q.dtype,
        row_sums=_bias.row_sums(bias, rows_are_queries=True),
        lane_sums=lane_sums,
        writes_bias=written is not None,
    )
    out_type += kernel.sums_type(q.shape[0], heads, q_len, blocks[0], slots)
    if written is not None:
        out_type.append(written)
    lists = Lists.of(kv_indices, full_kv_indices, elements, schedule, bias)
    arrays = (q, k, v, dout, lse2, delta)
    scratch |= kernel.sums_scratch()
    dq, parts, *sums = kernel.launch(
        arrays, lists, out_type, scratch, config.num_ctas, "jsparse_bwd_dq"
    )
    dq = gradient.merge(dq, parts, schedule)[:, :q_len]
    values = None if written is None else sums.pop()
    by_row = by_pair = None
    if sums:
        by_row = _biased.merge_sums(*sums[:2], schedule, tile_q, q_len)
    if lane_sums:
        by_pair = _biased.merge_lane_sums(*sums[2:], schedule)
    return dq, BiasGradient(by_row, by_pair, values)


@dataclasses.dataclass(frozen=True)
class _BackwardDq(BiasedWalker):
    head_dim: int
    value_dim: int
    dtype: Any

    def tiles(self, arrays):
        q, k, v, dout, _, _ = arrays
        fixed = [(q, "q"), (dout, "dout")]
        return fixed, [Stream("k", [(k, "k")]), Stream("v", [(v, "v")])]

    def attend(self, fields, arrays, lists, s, step0, stage):
        """Computes dq of 64 rows: ``ds k`` of a block beside ``q k^T`` of the next."""
        tile, dim, w = self.tile, self.head_dim, fields[HALF]
        qk = Product(tile, dim, dim)
        dov = Product(tile, self.value_dim, self.value_dim)
        dsk = Product(dim, dim, accumulate=True)
        probabilities = gradient.probabilities_by_row(tile, self.scale_log2)
        logits_gradient = [
            gradient.logits_gradient_by_row(tile, partial) for partial in (False, True)
        ]
        to_operand = operand(tile, self.dtype)
        total = self.total_steps(fields)
        mask = self.masked(fields, lists, fill=0.0)

        q, dout = s["q"].at[stage, w], s["dout"].at[stage, w]
        lse2, delta = (
            gradient.rows(x, fields[0], fields[1], fields[2] * self.block_rows + w * 64)
            for x in arrays[4:]
        )
        slot, seen = self.first_slot(step0), self.look_first(fields, lists)
        plgpu.barrier_wait(s["k_full"][slot])
        plgpu.barrier_wait(s["v_full"][slot])
        self.take_turn(s, w)
        logits, dp = start(qk, dov)(q, s["k"].at[slot], dout, s["v"].at[slot])
        self.pass_turn(s, w)
        bias = self.read_bias(fields, lists, jnp.int32(0), s, slot, stage)
        x, dp = gradient.await_all(tile, tile)(logits, dp)
        plgpu.barrier_arrive(s["v_free"][slot])
        logits = self.with_bias(fields, lists, x, bias)
        p = self.mask_first(fields, mask, seen, probabilities(logits, lse2))
        ds = logits_gradient[self.any_partial](p, dp, delta)
        rows = self.no_sums()
        rows, ds = self.pass_bias(
            fields, lists, rows, x, p, ds, bias, s, slot, self.any_partial
        )
        ds = to_operand(ds)
        self.clean_first(fields, lists, seen, [s["k"].at[slot]])
        dq = plgpu.layout_cast(jnp.zeros((64, dim), jnp.float32), r.ACC)
        following = self.following(slot)
        self.await_operands(jnp.int32(1), total, following, s, ["k", "v"])
        start_all = start(qk, dov, dsk)

        def step(n, carry, seen):
            dq, ds, rows, before, slot = carry
            self.take_turn(s, w)
            logits, dp, dq = start_all(
                *(q, s["k"].at[slot], dout, s["v"].at[slot]),
                *(dq, ds, s["k"].at[before]),
            )
            self.pass_turn(s, w)
            bias = self.read_bias(fields, lists, n, s, slot, stage)
            x = wait((64, tile), 2)(logits)
            if seen is not None:
                # Also a branch, which ptxas does not move the test across: with it
                # before the products, distances took twice as long.
                self.clean(fields, lists, seen, [s["k"].at[slot]])
            logits = self.with_bias(fields, lists, x, bias)
            p = probabilities(logits, lse2)
            if seen is not None:
                p = mask(seen, p)
            dp = wait((64, tile), 1)(dp)
            plgpu.barrier_arrive(s["v_free"][slot])
            partial = seen is not None
            ds = logits_gradient[partial](p, dp, delta)
            rows, ds = self.pass_bias(
                fields, lists, rows, x, p, ds, bias, s, slot, partial
            )
            self.free_bias(s, before, pending=1)
            following = self.following(slot)
            self.await_operands(n + 1, total, following, s, ["k", "v"])
            dq, ds = gradient.await_all(dim, tile)(dq, ds)
            plgpu.barrier_arrive(s["k_free"][before])
            return dq, to_operand(ds), rows, slot, following

        carry = dq, ds, rows, slot, following
        dq, ds, rows, last, _ = self.steps(fields, lists, step, carry, 1)
        self.free_bias(s, last, pending=0)
        self.free_fixed(s, stage)
        dq = start(dsk)(dq, ds, s["k"].at[last])
        dq = wait((64, dim), 0)(dq)
        plgpu.barrier_arrive(s["k_free"][last])
        return dq, rows

    def nothing(self):
        zero = jnp.zeros((64, self.head_dim), jnp.float32)
        return plgpu.layout_cast(zero, r.ACC), self.no_sums()

    def store(self, result, fields, outs, s):
        """64 rows of dq, or parts of them."""
        result, sums = result
        dq, parts, *rest = outs
        self.store_sums(sums, fields, rest, s)
        b, h, row, part = fields[0], fields[1], fields[2], fields[7]
        w = fields[HALF]
        rows = self.rows_out(row, w)

        def whole():
            values = gradient.scaled(self.head_dim, self.scale, self.dtype)(result)
            _persistent.write(s, w, Output(values, "dq", dq, (b, rows, h)))

        def one_part():
            values = gradient.scaled(self.head_dim, self.scale, jnp.float32)(result)
            parts[part, pl.ds(w * 64, 64)] = values

        pl.when(part < 0)(whole)
        pl.when(part >= 0)(one_part)
