"""Attention over parts of a row's blocks, combined: Hopper kernel.

A mean of the parts' outputs, weighted by exp(lse). One warpgroup for 64 query rows; the
parts come a few at a time, so that their loads overlap, in the order of their slots.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _persistent
from . import _registers as r
from ._manual_axes import per_device
from ._schedule import Schedule

Array = Any
IN_FLIGHT = 256
"""Columns of parts that a warpgroup loads at once: 128 registers a thread."""


def merge(
    out: Array, lse: Array, part_out: Array, part_lse: Array, schedule: Schedule
) -> tuple[Array, Array]:
    """Fills in the rows of a launch that were split.

    Args:
        out: ``[B, T, H, Dv]``, the rows that were not.
        lse: ``[B, H, nq * block_q]`` float32.
        part_out: ``[slots, block_q, Dv]`` float32.
        part_lse: ``[slots, block_q]`` float32, natural logarithm.
        schedule: of the launch.

    Returns:
        ``out`` and ``lse`` with all rows.
    """
    split, block_q = schedule.split_rows, part_lse.shape[1]
    if len(split) * block_q == lse.size:
        return _merged(split, part_out, part_lse, schedule, out, lse)
    nth = np.arange(len(split), dtype=np.int32)
    compact = (
        jax.ShapeDtypeStruct((1, len(split) * block_q, 1, out.shape[-1]), out.dtype),
        jax.ShapeDtypeStruct((1, 1, len(split) * block_q), lse.dtype),
    )
    places = np.stack([0 * nth, 0 * nth, nth], 1)
    values, row_lse = _merged(places, part_out, part_lse, schedule, *compact)
    b, h, i = jnp.asarray(split).T
    t = i[:, None] * block_q + jnp.arange(block_q)
    values = values.reshape(len(split), block_q, -1)
    out = out.at[b[:, None], t, h[:, None]].set(
        values, mode="drop", unique_indices=True
    )
    row_lse = row_lse.reshape(-1, block_q)
    return out, lse.at[b[:, None], h[:, None], t].set(row_lse, unique_indices=True)


def _merged(
    places: np.ndarray,
    part_out: Array,
    part_lse: Array,
    schedule: Schedule,
    out: Any,
    lse: Any,
) -> tuple[Array, Array]:
    """The split rows, each at its place (batch, head, row) in arrays like the last two.

    The kernel writes each of these arrays' rows that has a place, and no other.
    """
    value_dim, wgs = out.shape[-1], _persistent.warpgroups(part_lse.shape[1])
    at_once = max(1, min(IN_FLIGHT // value_dim, schedule.split_slots.shape[1]))
    rounds = -(-schedule.split_slots.shape[1] // at_once)
    padding = rounds * at_once - schedule.split_slots.shape[1]
    slots = np.pad(schedule.split_slots, ((0, 0), (0, padding)), constant_values=-1)

    def body(places, slots, part_out, part_lse, out, lse, s):
        split = lax.div(lax.axis_index("rows"), jnp.int32(wgs))
        half = lax.rem(lax.axis_index("rows"), jnp.int32(wgs)) * 64
        rows = pl.ds(half, 64)

        def some_parts(n, carry):
            acc, top, total = carry
            first = (split * rounds + n) * at_once
            which = [slots[first + j] for j in range(at_once)]
            of = [jnp.maximum(slot, 0) for slot in which]
            load = functools.partial(plgpu.load, optimized=False)
            parts = [load(part_out.at[i, rows], layout=r.OPERAND) for i in of]
            lses = [load(part_lse.at[i, rows], layout=r.ROW) for i in of]
            lses = [
                jnp.where(jnp.broadcast_to(slot, (64,)) < 0, -jnp.inf, x)
                for slot, x in zip(which, lses, strict=True)
            ]
            new = functools.reduce(jnp.maximum, lses, top)
            base = jnp.where(new == -jnp.inf, 0.0, new)
            weight = jnp.exp(top - base)
            acc, total = acc * weight[:, None], total * weight
            for part, x in zip(parts, lses, strict=True):
                weight = jnp.exp(x - base)
                # What a slot holds that no part wrote must not count, not even as NaN.
                wide = jnp.broadcast_to(weight[:, None], part.shape)
                acc += jnp.where(wide == 0, 0.0, part) * wide
                total += weight
            return acc, new, total

        acc = plgpu.layout_cast(jnp.zeros((64, value_dim), jnp.float32), r.OPERAND)
        top = plgpu.layout_cast(jnp.full((64,), -jnp.inf, jnp.float32), r.ROW)
        total = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), r.ROW)
        acc, top, total = lax.fori_loop(0, rounds, some_parts, (acc, top, total))
        values = acc / jnp.where(total == 0, 1.0, total)[:, None]
        row_lse = jnp.where(top == -jnp.inf, 0.0, top) + jnp.log(total)
        b, h, i = (places[3 * split + j] for j in range(3))
        here = pl.ds(i * wgs * 64 + half, 64)
        _persistent.write(
            s,
            0,
            [
                (values.astype(out.dtype), "out", out.at[b, here, h]),
                (row_lse, "lse", lse.at[b, h, here]),
            ],
        )
        plgpu.wait_smem_to_gmem(0)

    tile = lambda *shape: _persistent.tiles(shape, out.dtype)
    scratch = dict(
        **_persistent.staging(tile, 1, out=value_dim),
        lse=plgpu.SMEM((1, 64), jnp.float32),
    )
    run = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (out, lse)),
        scratch_types=[scratch],
        grid=(len(places) * wgs,),
        grid_names=("rows",),
        kernel_name="jsparse_fwd_merge",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True
        ),
    )
    flat = [jnp.asarray(x.reshape(-1), jnp.int32) for x in (places, slots)]
    out, lse = per_device(run)(*flat, part_out, part_lse)
    return out, lse
