"""Attention over parts of a row's blocks, combined in place: Hopper kernel.

One warpgroup for 64 query rows and a few columns, so that many parts are loaded at
once, in the order of their slots: what takes time is one load after another.
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

from . import _mean as mean
from . import _persistent, _tiles
from . import _registers as r
from ._manual_axes import per_device
from ._persistent import Output
from ._schedule import Schedule

Array = Any
COLUMNS = 16
"""Of the output, for one warpgroup; divides every head size."""
AT_ONCE = 16
"""Parts that a warpgroup loads at once: 8 registers a thread for each."""


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
    value_dim, wgs = out.shape[-1], _persistent.warpgroups(part_lse.shape[1])
    chunks, most_parts = value_dim // COLUMNS, schedule.split_slots.shape[1]
    at_once = min(AT_ONCE, most_parts)
    rounds = -(-most_parts // at_once)
    padding = rounds * at_once - most_parts
    slots = np.pad(schedule.split_slots, ((0, 0), (0, padding)), constant_values=-1)

    def body(places, slots, part_out, part_lse, out, lse, s):
        split = lax.div(lax.axis_index("rows"), jnp.int32(wgs))
        half = lax.rem(lax.axis_index("rows"), jnp.int32(wgs)) * 64
        chunk = lax.axis_index("columns")
        rows, columns = pl.ds(half, 64), pl.ds(chunk * COLUMNS, COLUMNS)

        def some_parts(n, carry):
            first = (split * rounds + n) * at_once
            which = [slots[first + j] for j in range(at_once)]
            of = [jnp.maximum(slot, 0) for slot in which]
            load = functools.partial(plgpu.load, optimized=False)
            parts = [load(part_out.at[i, rows, columns], layout=r.OPERAND) for i in of]
            lses = [load(part_lse.at[i, rows], layout=r.ROW) for i in of]
            lses = [
                jnp.where(jnp.broadcast_to(slot, (64,)) < 0, -jnp.inf, x)
                for slot, x in zip(which, lses, strict=True)
            ]
            return mean.add(carry, parts, lses)

        sums = lax.fori_loop(0, rounds, some_parts, mean.start(COLUMNS))
        values, row_lse = mean.end(sums)
        b, h, i = (places[3 * split + j] for j in range(3))
        here = pl.ds(i * wgs * 64 + half, 64)
        values, first = values.astype(out.dtype), chunk * COLUMNS
        write = functools.partial(_persistent.write, s, 0)
        write(Output(values, "out", out, (b, here, h), first))
        pl.when(chunk == 0)(lambda: write(Output(row_lse, "lse", lse, (b, h, here))))

        plgpu.wait_smem_to_gmem(0)

    tile = functools.partial(_tiles.scratch, dtype=out.dtype)
    scratch = dict(
        **_persistent.staging(tile, 1, True, out=COLUMNS),
        lse=plgpu.SMEM((1, 64), jnp.float32),
    )
    kernel = plgpu.kernel(
        body,
        scratch_types=[scratch],
        grid=(len(slots) * wgs, chunks),
        grid_names=("rows", "columns"),
        kernel_name="jsparse_fwd_merge",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True
        ),
    )

    def in_place(places, slots, part_out, part_lse, out, lse):
        refs = jax.new_ref(out), jax.new_ref(lse)
        kernel(places, slots, part_out, part_lse, *refs)
        return [jax.freeze(ref) for ref in refs]

    lists = (schedule.split_rows, slots)
    flat = [jnp.asarray(x.reshape(-1), jnp.int32) for x in lists]
    merged = per_device(in_place)(*flat, part_out, part_lse, out, lse)
    # In a loop XLA may let a kernel write to its place among the loop's results; one
    # that works in place then leaves that unwritten.
    out, lse = lax.optimization_barrier(merged)
    return out, lse
