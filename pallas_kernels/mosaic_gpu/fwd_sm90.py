"""Block-sparse attention forward for Hopper: config, scratch, launch, kernel.

Rows are queries, columns are keys; see `_persistent` for the roles and the walk. A NaN
in a key reaches its queries by the logits; so does one in a value of a flagged block.
May assume: q, k, v are 16-bit, head sizes are multiples of 16, the lists are valid.
Called by the adapter; knows nothing of BlockMask.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from . import (
    _bias,
    _biased,
    _elements,
    _entries,
    _persistent,
    _sharing,
    _tables,
    _tiles,
)
from . import _registers as r
from . import _softmax as softmax
from ._bias import Bias
from ._biased import BiasedWalker
from ._elements import Elements
from ._persistent import HALF, Lists, Output, Stream
from ._schedule import Schedule
from ._wgmma import Product, start, wait
from .merge_sm90 import merge

Array = Any
LAUNCHES = ("many", "distances", "few_blocks", "few_rows")
"""What a config depends on beside sizes; see `launch_of`."""


def launch_of(
    num_rows: int, most_blocks: int, distances: bool, num_ctas: int = 132
) -> str:
    """One of `LAUNCHES`.

    Where there are few blocks for each multiprocessor, latency counts; more are few
    where none has more than a row, which two teams would have to share. Where half of
    them could have all rows, several teams work on one row. Distances of points take
    registers, of which two teams leave too few.

    Args:
        num_rows: rows of blocks, of all heads and batch entries.
        most_blocks: what their lists have room for.
        distances: whether partial blocks test distances.
        num_ctas: multiprocessors.
    """
    few = 16 if num_rows > num_ctas else 64
    if most_blocks < few * num_ctas:
        return "few_rows" if 2 * num_rows <= num_ctas else "few_blocks"
    return "distances" if distances else "many"


@dataclasses.dataclass(frozen=True)
class Config:
    """How the forward kernel is built.

    Attributes:
        tile_q: queries of one item, 64 or 128; a block may hold two such items.
        tile_kv: keys of one step.
        num_stages: key and value tiles in flight.
        num_q_stages: query tiles in flight.
        ping_pong: whether two compute warpgroups take turns on the tensor core.
        lazy: powers of two by which a row maximum must grow before the sums are
            rescaled; 0 rescales at every step.
        q_in_registers: whether queries are kept in registers, not read from shared
            memory by every product.
        teams: teams of a CTA, each with a load warp of its own.
        share: whether the teams compute each item together, a part of its blocks each.
        staged: whether outputs leave by shared memory; else straight from registers,
            which leaves room for more.
        num_ctas: CTAs of the launch; one fits on a multiprocessor.
    """

    tile_q: int = 128
    tile_kv: int = 128
    num_stages: int = 3
    num_q_stages: int = 1
    ping_pong: bool = True
    lazy: float = 8.0
    q_in_registers: bool = False
    teams: int = 1
    share: bool = False
    staged: bool = True
    num_ctas: int = 132

    @property
    def num_workers(self) -> int:
        """Walkers of the schedule."""
        return self.num_ctas * self.teams

    @property
    def num_sharing(self) -> int:
        """Walkers that compute an item together."""
        return self.teams if self.share else 1

    def __post_init__(self):
        if self.tile_q not in (64, 128):
            raise ValueError(f"tile_q={self.tile_q}; expected 64 or 128.")
        if self.ping_pong and self.tile_q == 64:
            raise ValueError(
                f"tile_q={self.tile_q} has one warpgroup; with ping_pong expected 128."
            )
        if self.tile_kv not in (32, 64, 128):
            raise ValueError(f"tile_kv={self.tile_kv}; expected 32, 64 or 128.")
        if self.num_stages < 2:
            raise ValueError(f"num_stages={self.num_stages}; expected at least 2.")
        if self.num_q_stages not in (1, 2):
            raise ValueError(f"num_q_stages={self.num_q_stages}; expected 1 or 2.")
        most = 4 * 64 // self.tile_q
        if not 1 <= self.teams <= most:
            raise ValueError(
                f"teams={self.teams} of {self.tile_q} rows; expected 1 to {most}."
            )
        if self.share and (self.tile_q != 64 or self.teams == 1):
            raise ValueError(
                f"tile_q={self.tile_q}, teams={self.teams}; with share expected "
                "tile_q=64 and several teams."
            )

    @classmethod
    def choose(
        cls,
        head_dim: int,
        value_dim: int,
        block_q: int = 128,
        block_kv: int = 128,
        num_ctas: int = 132,
        launch: str = "many",
        bias: str | None = None,
    ) -> Config:
        """The table's, or the heuristic's: what was fastest on an H100 (see README.md).

        For head sizes above 128, what fits. Beside a bias (see `_bias.kind`) that is
        in shared memory, what leaves room for it. One that is computed takes registers,
        of which steps of 128 keys of wide heads leave too few.
        """
        widest = max(head_dim, value_dim)
        sizes = head_dim, value_dim, block_q, block_kv
        measured = _tables.find("forward", *sizes, launch=launch, bias=bias)
        if measured is not None:
            return cls(**measured, num_ctas=num_ctas)
        if bias is not None and (bias not in _bias.COMPUTED or widest > 64):
            return cls._beside_bias(*sizes, num_ctas, bias)
        if widest > 128:
            turns = block_q == 128
            found = cls(tile_q=block_q, tile_kv=64, num_stages=2, ping_pong=turns)
        elif widest <= 64 and launch == "few_rows":
            found = cls(64, num_stages=2, ping_pong=False, teams=2, share=True)
        elif block_q == 64:
            stages = 4 if widest <= 64 else 2
            found = cls(64, tile_kv=64, num_stages=stages, ping_pong=False, teams=2)
        elif widest <= 64 and launch == "distances":
            found = cls(num_q_stages=2)
        elif widest <= 64 and launch != "many":
            found = cls(num_stages=4, num_q_stages=2, lazy=0.0)
        elif widest <= 64:
            found = cls(tile_kv=64, num_stages=4, ping_pong=False, teams=2)
        else:
            found = cls(num_stages=2, q_in_registers=True)
        tile_kv = min(found.tile_kv, block_kv)
        return dataclasses.replace(found, tile_kv=tile_kv, num_ctas=num_ctas)

    @classmethod
    def _beside_bias(
        cls, head_dim, value_dim, block_q, block_kv, num_ctas, bias
    ) -> Config:
        """The first that fits: four warpgroups and three stages, or two with turns.

        Beside a bias by entry, three warpgroups, with the values of their queries.
        """
        choices = [
            (64, 3, 4),
            (64, 4, 2),
            (64, 3, 2),
            (64, 2, 2),
            (32, 3, 2),
            (32, 2, 2),
        ]
        if bias == "entry" and block_q == 64:
            choices[:1] = [(64, 3, 3)]
        return _biased.first_fit(
            (
                cls(
                    tile_q=block_q,
                    tile_kv=min(tile, block_kv),
                    num_stages=stages,
                    ping_pong=block_q == 128 and wgs == 2,
                    teams=64 * wgs // block_q,
                    num_ctas=num_ctas,
                )
                for tile, stages, wgs in choices
                if wgs == 2 or max(head_dim, value_dim) <= 64
            ),
            lambda c: scratch_spec(
                *(c, block_q, head_dim, value_dim, jnp.bfloat16),
                *_bias.kind_in_smem(bias),
            ),
        )


def scratch_spec(
    config: Config,
    tile_q: int,
    head_dim: int,
    value_dim: int,
    dtype,
    bias_dtype=None,
    points=False,
    entries=False,
    values=None,
) -> dict:
    """Shared memory of one CTA; the estimate and the launch both read it."""
    c, wgs = config, tile_q // 64
    tile = lambda lead, *sizes: _tiles.scratch((c.teams, *lead), *sizes, dtype)
    of_q, of_v = (_tiles.parts(dim, dtype)[0] for dim in (head_dim, value_dim))
    bar = lambda count, arrivals: _persistent.barriers(c.teams, count, arrivals)
    of_lists = _entries.COPIES * entries
    shared = _sharing.scratch_spec(c.teams, value_dim) if c.share else {}
    return dict(
        **shared,
        q=tile((c.num_q_stages, wgs), 64, head_dim),
        k=tile((c.num_stages,), c.tile_kv, head_dim),
        v=tile((c.num_stages,), c.tile_kv, value_dim),
        **_persistent.staging(tile, wgs, c.staged, out=value_dim),
        lse=plgpu.SMEM((c.teams, wgs, 64), jnp.float32),
        item=_persistent.item_slots(c.teams, c.num_q_stages),
        fixed_full=bar(c.num_q_stages, 1 + wgs * (of_q + (values is not None))),
        fixed_free=bar(c.num_q_stages, wgs),
        k_full=bar(c.num_stages, of_q + points + of_lists),
        k_free=bar(c.num_stages, wgs),
        v_full=bar(c.num_stages, of_v),
        v_free=bar(c.num_stages, wgs),
        **_biased.late_bias_stream(
            bar, (c.teams, c.num_stages, wgs), (64, c.tile_kv), bias_dtype
        ),
        **_biased.points_scratch(c, c.tile_kv, points),
        **_biased.entries_scratch(c, wgs, c.tile_kv, entries),
        **_biased.values_scratch(c.teams, c.num_q_stages, wgs, values),
    )


def forward(
    q: Array,
    k: Array,
    v: Array,
    kv_indices: Array,
    full_kv_indices: Array,
    elements: Elements,
    schedule: Schedule,
    *,
    blocks: tuple[int, int],
    scale: float,
    config: Config,
    bias: Bias | None = None,
) -> tuple[Array, Array]:
    """Attention over the blocks of a schedule.

    Args:
        q: ``[B, T, H, D]`` float16 or bfloat16.
        k: ``[B, S, K, D]``.
        v: ``[B, S, K, Dv]``.
        kv_indices: int32, flattened lists of partial blocks.
        full_kv_indices: int32, flattened lists of full blocks.
        elements: test of the partial blocks; rows are queries; ``bad`` tells of v.
        schedule: from `_schedule`, of these lists, with ``block_q // config.tile_q``
            items for each row, for `Config.num_sharing` workers each.
        blocks: ``block_q`` and ``block_kv``.
        scale: factor of the logits; above 0.
        config: see `Config`.
        bias: added to the scaled logits.

    Returns:
        out: ``[B, T, H, Dv]``.
        lse: ``[B, H, T]`` float32, natural logarithm.

    Raises:
        ValueError: for a config that does not fit into shared memory, or scale <= 0.
    """
    batch, q_len, heads, head_dim = q.shape
    value_dim, (block_q, block_kv), tile_q = v.shape[-1], blocks, config.tile_q
    if scale <= 0:
        raise ValueError(f"forward: scale={scale}; expected a positive number.")
    if block_q % tile_q:
        raise ValueError(f"forward: {config} for block_q={block_q}; tile_q divides it.")
    scratch = _biased.with_values(
        lambda *of_bias: scratch_spec(
            *(config, tile_q, head_dim, value_dim, q.dtype), *of_bias
        ),
        _bias.in_smem(bias, rows_are_queries=True),
    )
    _persistent.check_smem("forward", config, scratch)
    q_pad = -(-q_len // block_q) * block_q
    slots = max(schedule.num_slots, 1)
    f32 = jnp.float32
    rows = _persistent.rows_of(q_len, block_q, value_dim, config.staged)
    out_type = (
        jax.ShapeDtypeStruct((batch, rows, heads, value_dim), q.dtype),
        jax.ShapeDtypeStruct((batch, heads, q_pad), f32),
        jax.ShapeDtypeStruct((slots, tile_q, value_dim), f32),
        jax.ShapeDtypeStruct((slots, tile_q), f32),
    )
    kernel = _Forward(
        block_rows=tile_q,
        block_columns=block_kv,
        tile=config.tile_kv,
        num_stages=config.num_stages,
        num_fixed_stages=config.num_q_stages,
        ping_pong=config.ping_pong,
        staged=config.staged,
        teams=config.teams,
        group=heads // k.shape[2],
        rows_are_queries=True,
        any_partial=schedule.any_partial,
        items_per_worker=schedule.items.shape[1],
        scale=scale,
        config=config,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=q.dtype,
    )
    lists = Lists.of(kv_indices, full_kv_indices, elements, schedule, bias)
    out, lse, part_out, part_lse = kernel.launch(
        (q, k, v), lists, out_type, scratch, config.num_ctas, "jsparse_fwd"
    )
    if schedule.num_slots:
        out, lse = merge(out, lse, part_out, part_lse, schedule)
    return out[:, :q_len], lse[..., :q_len]


@dataclasses.dataclass(frozen=True)
class _Forward(BiasedWalker):
    config: Config
    head_dim: int
    value_dim: int
    dtype: Any

    def tiles(self, arrays):
        q, k, v = arrays
        return [(q, "q")], [Stream("k", [(k, "k")]), Stream("v", [(v, "v")])]

    def masked(self, fields, lists, fill):
        """As in `Walker`; before, NaN in columns with a value that is not finite."""
        test = super().masked(fields, lists, fill)
        if test is None:
            return None
        poison = _elements.poison(self.tile)

        def f(seen, logits):
            first = self.token(fields, lists, seen.at.column)
            bad = lambda x: poison(x, lists.elements.bad, first)
            return test(seen, lax.cond(seen.flagged, bad, lambda x: x, logits))

        return f

    def attend(self, fields, arrays, lists, s, step0, stage):
        """Online softmax over the item's blocks: QK of one block beside PV of the last.

        While a warpgroup computes the softmax of block n, its PV of block n - 1 and the
        other warpgroup's products run on the tensor core.
        """
        c, w = self.config, fields[HALF]
        # The values of a bias are freed with the queries.
        in_regs = c.q_in_registers and "values" not in s
        tile, dim = c.tile_kv, self.value_dim
        qk = Product(tile, self.head_dim, None if in_regs else self.head_dim)
        pv = Product(dim, dim, accumulate=True)
        start_qk, start_pv, start_both = start(qk), start(pv), start(qk, pv)
        softmax_step = softmax.softmax_step(tile, self.scale_log2, c.lazy)
        end_step = softmax.end_step(tile, dim, self.dtype, c.lazy > 0)
        total = self.total_steps(fields)
        mask = self.masked(fields, lists, fill=-math.inf)

        m = plgpu.layout_cast(jnp.full((64,), -jnp.inf, jnp.float32), r.ROW)
        l = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), r.ROW)
        acc = plgpu.layout_cast(jnp.zeros((64, dim), jnp.float32), r.ACC)
        q = s["q"].at[stage, w]
        if in_regs:
            q = _tiles.load(64, self.head_dim, self.dtype)(q)
            r.fence_reads()()
            plgpu.barrier_arrive(s["fixed_free"][stage])

        slot, seen = self.first_slot(step0), self.look_first(fields, lists)
        plgpu.barrier_wait(s["k_full"][slot])
        self.take_turn(s, w)
        logits = start_qk(q, s["k"].at[slot])
        self.pass_turn(s, w)
        bias = self.read_bias(fields, lists, jnp.int32(0), s, slot, stage)
        logits = wait((64, tile), 0)(logits)
        plgpu.barrier_arrive(s["k_free"][slot])
        logits = self.with_bias(fields, lists, logits, bias)
        logits = self.mask_first(fields, mask, seen, logits)
        p, m, l, _ = softmax_step(logits, m, l)
        p = softmax.operand(tile, self.dtype)(p)
        following = self.following(slot)
        self.await_operands(jnp.int32(1), total, following, s, ["k"])
        plgpu.barrier_wait(s["v_full"][slot])
        self.clean_first(fields, lists, seen, [s["v"].at[slot]])

        def step(n, carry, seen):
            acc, p, m, l, before, slot = carry
            self.take_turn(s, w)
            logits, acc = start_both(q, s["k"].at[slot], acc, p, s["v"].at[before])
            self.pass_turn(s, w)
            bias = self.read_bias(fields, lists, n, s, slot, stage)
            logits = wait((64, tile), 1)(logits)
            plgpu.barrier_arrive(s["k_free"][slot])
            logits = self.with_bias(fields, lists, logits, bias)
            if seen is not None:
                logits = mask(seen, logits)
            p, m, l, alpha = softmax_step(logits, m, l)
            following = self.following(slot)
            self.await_operands(n + 1, total, following, s, ["k"])
            plgpu.barrier_wait(s["v_full"][slot])
            if seen is not None:
                self.clean(fields, lists, seen, [s["v"].at[slot]])
            acc, p = end_step(acc, p, alpha)
            plgpu.barrier_arrive(s["v_free"][before])
            return acc, p, m, l, slot, following

        carry = acc, p, m, l, slot, following
        acc, p, m, l, last, _ = self.steps(fields, lists, step, carry, 1)
        if not in_regs:
            self.free_fixed(s, stage)
        acc = start_pv(acc, p, s["v"].at[last])
        acc = wait((64, dim), 0)(acc)
        plgpu.barrier_arrive(s["v_free"][last])
        return acc, m, l

    def nothing(self):
        zero = jnp.zeros((64, self.value_dim), jnp.float32)
        m = jnp.full((64,), -jnp.inf, jnp.float32)
        return (
            plgpu.layout_cast(zero, r.ACC),
            plgpu.layout_cast(m, r.ROW),
            plgpu.layout_cast(jnp.zeros((64,), jnp.float32), r.ROW),
        )

    def store(self, result, fields, outs, s):
        """64 finished rows, or parts of them."""
        finish = lambda dtype: softmax.finish(self.value_dim, dtype)(*result)
        if not self.config.share:
            self.write(finish, fields, outs, s)
            return

        def write(values, row_lse):
            self.write(lambda dtype: (values.astype(dtype), row_lse), fields, outs, s)

        _sharing.combine(*finish(jnp.float32), s, self.teams, write)

    def write(self, finish, fields, outs, s):
        """What ``finish(dtype)`` returns, values and lse, to where it belongs."""
        out, lse, part_out, part_lse = outs
        b, h, row, part = fields[0], fields[1], fields[2], fields[7]
        w = fields[HALF]
        rows = self.rows_out(row, w)

        def whole():
            values, row_lse = finish(self.dtype)
            of_row = Output(row_lse, "lse", lse, (b, h, rows))
            _persistent.write(s, w, Output(values, "out", out, (b, rows, h)), of_row)

        def one_part():
            values, row_lse = finish(jnp.float32)
            rows = pl.ds(w * 64, 64)
            _persistent.write(s, w, Output(row_lse, "lse", part_lse, (part, rows)))
            r.store(part_out.at[part, rows], values)

        pl.when(part < 0)(whole)
        pl.when(part >= 0)(one_part)
