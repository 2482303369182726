"""Block-sparse attention forward for Hopper: config, scratch, kernel, launch.

Persistent CTAs of three warpgroups: one loads with TMA, two compute 64 query rows each.
A CTA walks the items of its schedule; an item is a row of blocks, or a part of one.
May assume: q, k, v are 16-bit, head sizes are multiples of 16, the lists are valid.
Called by the adapter; knows nothing of BlockMask.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._common import LOG2E, MAX_SMEM_BYTES, NUM_FIELDS, tile_transforms
from . import _warpgroup as wg
from ._schedule import Schedule

Array = Any
COMPUTE_WGS = 2
"""Warpgroups that share the keys of a block, 64 query rows each."""
BLOCK_KV = 128
FIRST_NAMED_BARRIER = 8
"""Mosaic numbers its own barriers from 0."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the forward kernel is built.

    Attributes:
        tile_kv: keys of one step.
        num_stages: key and value tiles in flight.
        num_q_stages: query tiles in flight.
        ping_pong: whether the two compute warpgroups take turns on the tensor core.
        lazy: powers of two by which a row maximum must grow before the sums are
            rescaled; 0 rescales at every step.
        q_in_registers: whether queries are kept in registers, not read from shared
            memory by every product.
        teams: pairs of compute warpgroups in a CTA; each pair walks items of its own
            and has a load warpgroup of its own.
        num_ctas: CTAs of the launch; one fits on a multiprocessor.
    """

    tile_kv: int = 128
    num_stages: int = 3
    num_q_stages: int = 1
    ping_pong: bool = True
    lazy: float = 8.0
    q_in_registers: bool = False
    teams: int = 1
    num_ctas: int = 132

    @property
    def num_workers(self) -> int:
        """Walkers of the schedule."""
        return self.num_ctas * self.teams

    def __post_init__(self):
        if self.tile_kv not in (32, 64, 128):
            raise ValueError(f"tile_kv={self.tile_kv}; expected 32, 64 or 128.")
        if self.num_stages < 2:
            raise ValueError(f"num_stages={self.num_stages}; expected at least 2.")
        if self.num_q_stages not in (1, 2):
            raise ValueError(f"num_q_stages={self.num_q_stages}; expected 1 or 2.")
        if self.teams not in (1, 2):
            raise ValueError(f"teams={self.teams}; expected 1 or 2.")

    @classmethod
    def choose(cls, head_dim: int, value_dim: int, num_ctas: int) -> Config:
        """The heuristic: what was fastest on an H100 (README.md has the figures)."""
        widest = max(head_dim, value_dim)
        if widest <= 32:
            return cls(
                tile_kv=64, num_stages=4, ping_pong=False, teams=2, num_ctas=num_ctas
            )
        if widest <= 64:
            return cls(num_stages=4, num_q_stages=2, lazy=0.0, num_ctas=num_ctas)
        return cls(num_stages=2, q_in_registers=True, num_ctas=num_ctas)


def scratch_spec(config: Config, head_dim: int, value_dim: int, dtype) -> dict:
    """Shared memory of one CTA; the estimate and the launch both read it."""
    c = config
    q_shape = (c.teams, c.num_q_stages, COMPUTE_WGS, 64, head_dim)
    k_shape = (c.teams, c.num_stages, c.tile_kv, head_dim)
    v_shape = (c.teams, c.num_stages, c.tile_kv, value_dim)
    tile = lambda shape: plgpu.SMEM(shape, dtype, transforms=tile_transforms(shape[-1]))
    bar = lambda count, arrivals=1: plgpu.Barrier(
        num_arrivals=arrivals, num_barriers=(c.teams, count)
    )
    return dict(
        q=tile(q_shape),
        k=tile(k_shape),
        v=tile(v_shape),
        out=tile((c.teams, COMPUTE_WGS, 64, value_dim)),
        lse=plgpu.SMEM((c.teams, COMPUTE_WGS, 64), jnp.float32),
        q_full=bar(c.num_q_stages, COMPUTE_WGS),
        q_free=bar(c.num_q_stages, COMPUTE_WGS),
        k_full=bar(c.num_stages),
        k_free=bar(c.num_stages, COMPUTE_WGS),
        v_full=bar(c.num_stages),
        v_free=bar(c.num_stages, COMPUTE_WGS),
    )


def smem_bytes(config: Config, head_dim: int, value_dim: int) -> int:
    """Shared memory that `scratch_spec` needs, barriers aside."""
    spec = scratch_spec(config, head_dim, value_dim, jnp.bfloat16)
    arrays = [x for x in spec.values() if not isinstance(x, plgpu.Barrier)]
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)


def forward(
    q: Array,
    k: Array,
    v: Array,
    kv_indices: Array,
    full_kv_indices: Array,
    schedule: Schedule,
    *,
    scale: float,
    config: Config,
    bits: Array | None = None,
    q_lengths: Array | None = None,
    kv_lengths: Array | None = None,
) -> tuple[Array, Array]:
    """Attention over the blocks of a schedule.

    Args:
        q: ``[B, T, H, D]`` float16 or bfloat16.
        k: ``[B, S, K, D]``.
        v: ``[B, S, K, Dv]``.
        kv_indices: ``[n]`` int32, flattened lists of partial blocks.
        full_kv_indices: ``[m]`` int32, flattened lists of full blocks.
        schedule: from `make_schedule`.
        scale: factor of the logits; above 0.
        config: see `Config`.
        bits: ``[B or 1, n, 128, tile_kv / 32]`` uint32 or None, allowed elements of the
            partial blocks.
        q_lengths: ``[B]`` int32 or None (T), queries that exist, for partial blocks.
        kv_lengths: ``[B]`` int32 or None (S), keys that exist, for partial blocks.

    Returns:
        out: ``[B, T, H, Dv]``.
        lse: ``[B, H, T]`` float32, natural logarithm.

    Raises:
        ValueError: for a config that does not fit into shared memory, or scale <= 0.
    """
    batch, q_len, heads, head_dim = q.shape
    value_dim = v.shape[-1]
    need = smem_bytes(config, head_dim, value_dim)
    if need > MAX_SMEM_BYTES - 1024:
        raise ValueError(
            f"forward: {config} needs {need} bytes of shared memory; a multiprocessor "
            f"has {MAX_SMEM_BYTES}. Use fewer stages."
        )
    if scale <= 0:
        raise ValueError(f"forward: scale={scale}; expected a positive number.")
    kv_len = k.shape[1]
    q, k, v = (_pad_rows(x) for x in (q, k, v))
    q_pad = -(-q_len // 128) * 128
    slots = max(schedule.num_slots, 1)
    out_type = (
        jax.ShapeDtypeStruct((batch, q.shape[1], heads, value_dim), q.dtype),
        jax.ShapeDtypeStruct((batch, heads, q_pad), jnp.float32),
        jax.ShapeDtypeStruct((slots, 128, value_dim), jnp.float32),
        jax.ShapeDtypeStruct((slots, 128), jnp.float32),
    )
    body = _Kernel(
        config=config,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=q.dtype,
        scale=scale,
        group=heads // k.shape[2],
        has_bits=bits is not None,
        bits_per_entry=bits.shape[1] if bits is not None and bits.shape[0] > 1 else 0,
        any_partial=bool((schedule.items[..., 4] > 0).any()),
        any_split=schedule.num_slots > 0,
        items_per_cta=schedule.items.shape[1],
    )
    run = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[scratch_spec(config, head_dim, value_dim, q.dtype)],
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=config.teams * (COMPUTE_WGS + 1),
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True
        ),
    )
    # NumPy constants where possible: a computed array would be one more launch.
    full = lambda n: np.full((batch,), n, np.int32)
    lengths = [
        full(q_len) if q_lengths is None else q_lengths,
        full(kv_len) if kv_lengths is None else kv_lengths,
    ]
    stack = np.stack if q_lengths is None and kv_lengths is None else jnp.stack
    lengths = stack(lengths, axis=1).reshape(-1)
    if not body.any_partial:
        # Unused; XLA would launch a kernel to fill an array of equal elements.
        lengths = schedule.cta_count
    lengths = jnp.asarray(lengths)
    if bits is None:
        bits = jnp.asarray(schedule.cta_count.reshape(1, 1, -1))
    else:
        flat = bits.reshape(-1, *bits.shape[2:])
        bits = jax.lax.bitcast_convert_type(flat, jnp.int32)
    cta_count = jnp.asarray(schedule.cta_count)
    items = jnp.asarray(schedule.items.reshape(-1))
    out, lse, part_out, part_lse = run(
        q, k, v, cta_count, items, kv_indices, full_kv_indices, lengths, bits
    )
    if schedule.num_slots:
        out, lse = merge(out, lse, part_out, part_lse, schedule)
    return out[:, :q_len], lse[..., :q_len]


def _pad_rows(x: Array) -> Array:
    """Rounds the length up to the 8 rows that a tiled TMA copy needs."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))


def merge(
    out: Array, lse: Array, part_out: Array, part_lse: Array, schedule: Schedule
) -> tuple[Array, Array]:
    """Combines the parts of split rows: a mean of outputs weighted by exp(lse)."""
    rows, slots = jnp.asarray(schedule.split_rows), jnp.asarray(schedule.split_slots)
    parts = jnp.where(slots[..., None] >= 0, part_lse[slots], -jnp.inf)
    top = parts.max(1)
    top0 = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(parts - top0[:, None])
    total = weights.sum(1)
    weights = weights / jnp.where(total == 0, 1, total)[:, None]
    values = jnp.where(weights[..., None] > 0, part_out[slots], 0)
    values = (values * weights[..., None]).sum(1).astype(out.dtype)
    row_lse = top0 + jnp.log(total)
    if len(schedule.split_rows) * 128 == math.prod(lse.shape):
        batch, heads, q_pad = lse.shape
        values = values.reshape(batch, heads, q_pad, -1).swapaxes(1, 2)
        return values[:, : out.shape[1]], row_lse.reshape(lse.shape)
    b, h, i = rows.T
    t = i[:, None] * 128 + jnp.arange(128)
    out = out.at[b[:, None], t, h[:, None]].set(
        values, mode="drop", unique_indices=True
    )
    lse = lse.at[b[:, None], h[:, None], t].set(row_lse, unique_indices=True)
    return out, lse


def _at(ref, index):
    return ref.at[index]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel body; a class so that its phases share the static sizes by name."""

    config: Config
    head_dim: int
    value_dim: int
    dtype: Any
    scale: float
    group: int
    has_bits: bool
    bits_per_entry: int
    any_partial: bool
    any_split: bool
    items_per_cta: int

    def __call__(self, q, k, v, cta_count, items, *rest):
        kv_indices, full_indices, lengths, bits, *rest = rest
        out, lse, part_out, part_lse, s = rest
        lists = (cta_count, items, kv_indices, full_indices, lengths, bits)
        index, compute_wgs = lax.axis_index("wg"), COMPUTE_WGS * self.config.teams
        few, many = (24, 240) if self.config.teams == 1 else (32, 104)

        @pl.when(index >= compute_wgs)
        def _load():
            plgpu.set_max_registers(few, action="decrease")
            self.load(q, k, v, lists, self.of_team(s, index - compute_wgs))

        @pl.when(index < compute_wgs)
        def _compute():
            plgpu.set_max_registers(many, action="increase")
            team = lax.div(index, jnp.int32(COMPUTE_WGS))
            self.compute(lists, out, lse, part_out, part_lse, self.of_team(s, team))

    def of_team(self, s, team):
        """The scratch of one team, and its number in the launch."""
        if self.config.teams == 1:
            team = 0
        refs = {name: _at(ref, team) for name, ref in s.items()}
        return refs | dict(team=team)

    def worker(self, s):
        return lax.axis_index("cta") * self.config.teams + s["team"]

    def row_half(self):
        """Which 64 rows of a block this warpgroup computes."""
        return lax.rem(lax.axis_index("wg"), jnp.int32(COMPUTE_WGS))

    # ------------------------------------------------------------------- walking

    def walk(self, s, lists, body, carry):
        """Calls ``body(fields, carry)`` for each item; fields are read one ahead."""
        cta_count, items = lists[:2]
        worker = self.worker(s)
        count = cta_count[worker]

        def read(n):
            at = (worker * self.items_per_cta + n) * NUM_FIELDS
            return [items[at + f] for f in range(NUM_FIELDS)]

        def step(n, carry):
            fields, carry = carry
            following = read(jnp.minimum(n + 1, self.items_per_cta - 1))
            return following, body(fields, carry)

        return lax.fori_loop(0, count, step, (read(jnp.int32(0)), carry))[1]

    # --------------------------------------------------------------------- load

    def load(self, q, k, v, lists, s):
        """Producer: query tiles and, one block ahead in the lists, keys and values."""
        c = self.config
        kv_indices, full_indices = lists[2:4]
        per_block = BLOCK_KV // c.tile_kv

        def item(fields, carry):
            b, h, row, p0, pn, f0, fn = fields[:7]
            h_kv = h if self.group == 1 else lax.div(h, jnp.int32(self.group))
            count, step0 = carry
            total = pn + fn

            def entry(n):
                if not self.any_partial:
                    return full_indices[f0 + jnp.minimum(n, fn - 1)]
                partial = kv_indices[p0 + jnp.minimum(n, jnp.maximum(pn - 1, 0))]
                full = full_indices[f0 + jnp.clip(n - pn, 0, jnp.maximum(fn - 1, 0))]
                return jnp.where(n < pn, partial, full)

            @pl.when(total > 0)
            def _q():
                qs = lax.rem(count, jnp.int32(c.num_q_stages))
                plgpu.barrier_wait(s["q_free"].at[qs])
                for w in range(COMPUTE_WGS):
                    plgpu.copy_gmem_to_smem(
                        q.at[b, pl.ds(row * 128 + w * 64, 64), h],
                        s["q"].at[qs, w],
                        s["q_full"].at[qs],
                    )

            def kv(n, block):
                slot = lax.rem(step0 + n, jnp.int32(c.num_stages))
                following = entry(lax.div(n + 1, jnp.int32(per_block)))
                start = block * BLOCK_KV + lax.rem(n, jnp.int32(per_block)) * c.tile_kv
                at = (b, pl.ds(start, c.tile_kv), h_kv)
                plgpu.barrier_wait(s["k_free"].at[slot])
                plgpu.copy_gmem_to_smem(k.at[at], s["k"].at[slot], s["k_full"].at[slot])
                plgpu.barrier_wait(s["v_free"].at[slot])
                plgpu.copy_gmem_to_smem(v.at[at], s["v"].at[slot], s["v_full"].at[slot])
                return following

            lax.fori_loop(0, total * per_block, kv, entry(jnp.int32(0)))
            return count + (total > 0).astype(jnp.int32), step0 + total * per_block

        self.walk(s, lists, item, (jnp.int32(0), jnp.int32(0)))

    # ------------------------------------------------------------------ compute

    def compute(self, lists, out, lse, part_out, part_lse, s):
        """Consumer: 64 rows of each item."""
        c = self.config
        w = self.row_half()
        for i in range(c.num_stages):
            plgpu.barrier_arrive(s["k_free"].at[i])
            plgpu.barrier_arrive(s["v_free"].at[i])
        for i in range(c.num_q_stages):
            plgpu.barrier_arrive(s["q_free"].at[i])
        if c.ping_pong:
            # Warpgroup 1 gives the first turn to warpgroup 0.
            @pl.when(w == 1)
            def _():
                self.pass_turn(s, w)

        def item(fields, carry):
            _, _, _, _, pn, _, fn = fields[:7]
            count, step0 = carry
            total = pn + fn
            qs = lax.rem(count, jnp.int32(c.num_q_stages))
            q_tile = s["q"].at[qs, w]

            @pl.when(total > 0)
            def _rows():
                plgpu.barrier_wait(s["q_full"].at[qs])
                acc, m, l = self.attend(fields, lists, q_tile, step0, s, qs)
                self.store(acc, m, l, fields, out, lse, part_out, part_lse, s)

            @pl.when(total == 0)
            def _empty():
                zero = jnp.zeros((64, self.value_dim), jnp.float32)
                acc = plgpu.layout_cast(zero, wg.ACC)
                m = plgpu.layout_cast(jnp.full((64,), -jnp.inf, jnp.float32), wg.ROW)
                l = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), wg.ROW)
                self.store(acc, m, l, fields, out, lse, part_out, part_lse, s)

            steps = total * (BLOCK_KV // c.tile_kv)
            return count + (total > 0).astype(jnp.int32), step0 + steps

        self.walk(s, lists, item, (jnp.int32(0), jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)

    def take_turn(self, s, w):
        wg.named_barrier("sync")(FIRST_NAMED_BARRIER + 2 * s["team"] + w)

    def pass_turn(self, s, w):
        wg.named_barrier("arrive")(FIRST_NAMED_BARRIER + 2 * s["team"] + 1 - w)

    def masked(self, fields, lists):
        """``f(n, logits)``: the element test of partial entry n of an item."""
        b, _, row, p0 = fields[:4]
        kv_indices, lengths, bits = lists[2], lists[4], lists[5]
        first = self.row_half() * 64
        q_left = lengths[2 * b] - row * 128 - first
        tile_kv = self.config.tile_kv
        per_block = jnp.int32(BLOCK_KV // tile_kv)
        test = wg.apply_mask(tile_kv, self.has_bits)

        def f(n, logits):
            nth, part = lax.div(n, per_block), lax.rem(n, per_block)
            start = kv_indices[p0 + nth] * BLOCK_KV + part * tile_kv
            kv_left = lengths[2 * b + 1] - start
            block = fields[8] + nth + b * self.bits_per_entry
            return test(logits, bits, block, first, part, q_left, kv_left)

        return f

    def attend(self, fields, lists, q_tile, step0, s, qs):
        """Online softmax over the item's blocks: QK of one block beside PV of the last.

        While a warpgroup computes the softmax of block n, its PV of block n - 1 and the
        other warpgroup's products run on the tensor core.
        """
        c = self.config
        w = self.row_half()
        k_transforms = tile_transforms(self.head_dim)
        v_transforms = tile_transforms(self.value_dim)
        in_regs = c.q_in_registers
        issue_qk = wg.issue_qk(c.tile_kv, k_transforms, in_regs)
        issue_pv = wg.issue_pv(self.value_dim, v_transforms)
        issue_both = wg.issue_qk_pv(
            c.tile_kv, self.value_dim, k_transforms, v_transforms, in_regs
        )
        scale_log2 = self.scale * LOG2E
        softmax = wg.softmax_step(c.tile_kv, scale_log2, c.lazy)
        end_step = wg.end_step(c.tile_kv, self.value_dim, self.dtype, c.lazy > 0)
        per_block = BLOCK_KV // c.tile_kv
        partial = fields[4] * per_block
        total = partial + fields[6] * per_block
        mask = self.masked(fields, lists) if self.any_partial else None
        s_shape, o_shape = (64, c.tile_kv), (64, self.value_dim)
        slot_of = lambda n: lax.rem(step0 + n, jnp.int32(c.num_stages))

        m = plgpu.layout_cast(jnp.full((64,), -jnp.inf, jnp.float32), wg.ROW)
        l = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), wg.ROW)
        acc = plgpu.layout_cast(jnp.zeros(o_shape, jnp.float32), wg.ACC)

        if in_regs:
            q_tile = plgpu.load(q_tile, layout=wg.OPERAND)
            plgpu.barrier_arrive(s["q_free"].at[qs])
        slot = slot_of(jnp.int32(0))
        plgpu.barrier_wait(s["k_full"].at[slot])
        if c.ping_pong:
            self.take_turn(s, w)
        logits = issue_qk(q_tile, s["k"].at[slot])
        if c.ping_pong:
            self.pass_turn(s, w)
        logits = wg.wait(s_shape, 0)(logits)
        plgpu.barrier_arrive(s["k_free"].at[slot])
        if self.any_partial:
            logits = lax.cond(
                partial > 0, lambda x: mask(jnp.int32(0), x), lambda x: x, logits
            )
        p, m, l, _ = softmax(logits, m, l)
        p = wg.operand(c.tile_kv, self.dtype)(p)
        self.await_operands(jnp.int32(1), total, slot, slot_of, s)

        def step(n, carry, is_partial=False):
            acc, p, m, l, before = carry
            slot = slot_of(n)
            if c.ping_pong:
                self.take_turn(s, w)
            logits, acc = issue_both(q_tile, s["k"].at[slot], acc, p, s["v"].at[before])
            if c.ping_pong:
                self.pass_turn(s, w)
            logits = wg.wait(s_shape, 1)(logits)
            plgpu.barrier_arrive(s["k_free"].at[slot])
            if is_partial:
                logits = mask(n, logits)
            p, m, l, alpha = softmax(logits, m, l)
            # Waiting here also keeps ptxas from moving the wait for PV, which
            # follows, up into the softmax: it does not cross a branch.
            self.await_operands(n + 1, total, slot, slot_of, s)
            acc, p = end_step(acc, p, alpha)
            plgpu.barrier_arrive(s["v_free"].at[before])
            return acc, p, m, l, slot

        carry = acc, p, m, l, slot
        first_full = jnp.int32(1)
        if self.any_partial:
            partial_step = functools.partial(step, is_partial=True)
            carry = lax.fori_loop(1, partial, partial_step, carry)
            first_full = jnp.maximum(partial, 1)
        acc, p, m, l, last = lax.fori_loop(first_full, total, step, carry)
        if not in_regs:
            plgpu.barrier_arrive(s["q_free"].at[qs])
        acc = issue_pv(acc, p, s["v"].at[last])
        acc = wg.wait(o_shape, 0)(acc)
        plgpu.barrier_arrive(s["v_free"].at[last])
        return acc, m, l

    def await_operands(self, n, total, before, slot_of, s):
        """Waits for the keys of block n, if there is one, and the values before it."""

        @pl.when(n < total)
        def _():
            plgpu.barrier_wait(s["k_full"].at[slot_of(n)])

        plgpu.barrier_wait(s["v_full"].at[before])

    def store(self, acc, m, l, fields, out, lse, part_out, part_lse, s):
        """Epilogue: 64 finished rows, or parts of them, leave by shared memory."""
        b, h, row, part = fields[0], fields[1], fields[2], fields[7]
        w = self.row_half()
        o_smem, lse_smem = s["out"].at[w], s["lse"].at[w]
        rows = pl.ds(row * 128 + w * 64, 64)

        def whole():
            values, row_lse = wg.finish(self.value_dim, self.dtype)(acc, m, l)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_smem[...] = values
            lse_smem[...] = row_lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem, out.at[b, rows, h])
            plgpu.copy_smem_to_gmem(lse_smem, lse.at[b, h, rows])

        def one_part():
            values, row_lse = wg.finish(self.value_dim, jnp.float32)(acc, m, l)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            lse_smem[...] = row_lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_smem, part_lse.at[part, pl.ds(w * 64, 64)])
            part_out[part, pl.ds(w * 64, 64)] = values

        if not self.any_split:
            whole()
            return
        pl.when(part < 0)(whole)
        pl.when(part >= 0)(one_part)
