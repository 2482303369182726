"""Probabilities and the logits' gradient, recomputed from lse, on one warpgroup's tile.

``p = exp(s * scale - lse)`` and ``ds = p * (dp - delta)``, with lse in base 2 and +inf
for a row that saw nothing, so that its p is 0. The element test comes after the
exponential: a NaN in lse must not reach elements that do not count; where there are
such elements, ds is 0 wherever p is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir.dialects import arith

from . import _registers as r
from ._schedule import Schedule


def _tile(columns: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=r.ACC)


def _rows() -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=r.ROW)


def load_rows() -> Callable:
    """``f(ref, first) -> values``: 64 rows of a flat float32 array in global memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), r.SCALAR), return_type=_rows())
    def f(_, ref, first):
        at = arith.addi(first.registers.item(), r.first_row())
        values = [r.global_word(ref, at, 8 * half, r.f32()) for half in range(2)]
        return r.from_scalars(values, (64,), r.ROW.to_mgpu())

    return f


def probabilities_by_row(columns: int, scale_log2: float) -> Callable:
    """``f(s, lse2) -> p`` with one lse for each row."""

    @plgpu.inline_mgpu(arg_types=(r.ACC, r.ROW), return_type=_tile(columns))
    def f(_, s, lse2):
        scale, lse2 = r.number(scale_log2), r.scalars(lse2)
        p = [
            r.exp2(r.fma_neg(x, scale, lse2[(i >> 1) & 1]))
            for i, x in enumerate(r.scalars(s))
        ]
        return r.accumulator(p, (64, columns))

    return f


def logits_gradient_by_row(columns: int, partial: bool) -> Callable:
    """``f(p, dp, delta) -> ds`` with one delta for each row."""

    @plgpu.inline_mgpu(arg_types=(r.ACC, r.ACC, r.ROW), return_type=_tile(columns))
    def f(_, p, dp, delta):
        delta = r.scalars(delta)
        ds = [
            _times(x, r.sub(y, delta[(i >> 1) & 1]), partial)
            for i, (x, y) in enumerate(zip(r.scalars(p), r.scalars(dp), strict=True))
        ]
        return r.accumulator(ds, (64, columns))

    return f


def probabilities_by_column(columns: int, scale_log2: float) -> Callable:
    """``f(s, lse2) -> p``; lse2 is a row ``[columns]`` in shared memory."""

    @plgpu.inline_mgpu(arg_types=(r.ACC, plgpu.RefType()), return_type=_tile(columns))
    def f(_, s, lse2):
        scale, lse2 = r.number(scale_log2), r.shared_pairs(lse2, columns // 8)
        p = [
            r.exp2(r.fma_neg(x, scale, lse2[_column(i)]))
            for i, x in enumerate(r.scalars(s))
        ]
        return r.accumulator(p, (64, columns))

    return f


def logits_gradient_by_column(columns: int, partial: bool) -> Callable:
    """``f(p, dp, delta) -> ds``; delta is a row ``[columns]`` in shared memory."""

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, r.ACC, plgpu.RefType()), return_type=_tile(columns)
    )
    def f(_, p, dp, delta):
        delta = r.shared_pairs(delta, columns // 8)
        ds = [
            _times(x, r.sub(y, delta[_column(i)]), partial)
            for i, (x, y) in enumerate(zip(r.scalars(p), r.scalars(dp), strict=True))
        ]
        return r.accumulator(ds, (64, columns))

    return f


def _times(p, x, partial: bool):
    """``p * x``; in a partial block 0 where p is 0, whatever x is."""
    if not partial:
        return r.mul(p, x)
    text = (
        "{ .reg .pred q; .reg .f32 t; mul.rn.f32 t, $1, $2; "
        "setp.eq.f32 q, $1, 0f00000000; selp.f32 $0, 0f00000000, t, q; }"
    )
    return r.asm(r.f32(), [p, x], text, "=f,f,f")


def _column(register: int) -> int:
    """Which of the thread's columns an accumulator's register belongs to."""
    return register >> 2 << 1 | register & 1


def await_all(*columns: int, but: int = 0) -> Callable:
    """``f(x, ...) -> x, ...``: waits until only the newest products are in flight."""

    @plgpu.inline_mgpu(
        arg_types=(r.ACC,) * len(columns), return_type=tuple(map(_tile, columns))
    )
    def f(_, *tiles):
        values = [r.scalars(x) for x in tiles]
        text = f"wgmma.wait_group.sync.aligned {but};"
        flat = r.tied([*itertools.chain(*values)], text)
        out = []
        for n, x in zip(columns, values, strict=True):
            out.append(r.accumulator(flat[: len(x)], (64, n)))
            flat = flat[len(x) :]
        return tuple(out)

    return f


def add_logits_gradient(columns: int, partial: bool) -> Callable:
    """``f(total, p, dp, delta) -> total + ds``; see `logits_gradient_by_row`."""

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, r.ACC, r.ACC, r.ROW), return_type=_tile(columns)
    )
    def f(_, total, p, dp, delta):
        delta = r.scalars(delta)
        sums = []
        for i, (x, y, sum_) in enumerate(
            zip(*map(r.scalars, (p, dp, total)), strict=True)
        ):
            change = r.sub(y, delta[(i >> 1) & 1])
            if partial:
                change = r.zero_with(change, x)
            sums.append(r.fma(x, change, sum_))
        # Computed here, not beside the products that are started next.
        return r.accumulator(r.tied(sums, ""), (64, columns))

    return f


def add_to_rows(columns: int) -> Callable:
    """``f(total, x) -> total``: row sums, split over the four lanes of a row."""

    @plgpu.inline_mgpu(arg_types=(r.ROW, r.ACC), return_type=_rows())
    def f(_, total, x):
        values, totals = r.scalars(x), r.scalars(total)
        sums = [
            r.add(totals[half], r.tree(r.add, r.row_half(values, half), 4))
            for half in range(2)
        ]
        return r.from_scalars(sums, (64,), r.ROW.to_mgpu())

    return f


def whole_rows() -> Callable:
    """``f(total) -> total``: the sums of `add_to_rows`, joined."""

    @plgpu.inline_mgpu(arg_types=(r.ROW,), return_type=_rows())
    def f(_, total):
        sums = [r.across_row(r.add, x) for x in r.scalars(total)]
        return r.from_scalars(sums, (64,), r.ROW.to_mgpu())

    return f


def scaled(columns: int, factor: float, dtype) -> Callable:
    """``f(x) -> factor * x`` in ``dtype``, ready to be stored."""

    @plgpu.inline_mgpu(
        arg_types=(r.ACC,),
        return_type=plgpu.ShapeDtypeStruct((64, columns), dtype, layout=r.OPERAND),
    )
    def f(_, x):
        values = r.scalars(x)
        if factor != 1.0:
            values = [r.mul(v, r.number(factor)) for v in values]
        if jnp.dtype(dtype) == jnp.float32:
            return r.pairs(values, (64, columns))
        return r.packed(values, (64, columns), dtype)

    return f


def rows(values, b, h, first):
    """64 rows of ``values [B, H, n]``, from row ``first``, in the row layout."""
    _, heads, n = values.shape
    return load_rows()(values, (b * heads + h) * n + first)


def merge(whole, parts, schedule: Schedule):
    """Writes the sums of split rows' parts into ``whole [B, n, heads, D]``."""
    if not schedule.num_slots:
        return whole
    slots = jnp.asarray(schedule.split_slots)
    values = jnp.where(slots[..., None, None] >= 0, parts[slots], 0).sum(1)
    b, h, i = jnp.asarray(schedule.split_rows).T
    t = i[:, None] * values.shape[1] + jnp.arange(values.shape[1])
    return whole.at[b[:, None], t, h[:, None]].set(
        values.astype(whole.dtype), mode="drop", unique_indices=True
    )


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How a backward kernel is built.

    Attributes:
        tile: columns of one step.
        num_stages: tiles of a stream in flight.
        num_fixed_stages: fixed tiles in flight.
        ping_pong: whether two compute warpgroups take turns on the tensor core.
        teams: teams of a CTA, each with a load warp of its own.
        staged: whether outputs leave by shared memory, see `fwd_sm90.Config`.
        tile_rows: rows of one item, 64 or 128; a block may hold two such items, or be
            smaller.
        num_ctas: CTAs of the launch; one fits on a multiprocessor.
    """

    tile: int = 64
    num_stages: int = 3
    num_fixed_stages: int = 1
    ping_pong: bool = False
    teams: int = 1
    staged: bool = True
    tile_rows: int = 128
    num_ctas: int = 132

    def __post_init__(self):
        if self.tile_rows not in (64, 128):
            raise ValueError(f"tile_rows={self.tile_rows}; expected 64 or 128.")
        if self.ping_pong and self.tile_rows == 64:
            raise ValueError(
                "tile_rows=64 has one warpgroup; with ping_pong expected 128."
            )
        if self.tile not in (32, 64, 128):
            raise ValueError(f"tile={self.tile}; expected 32, 64 or 128.")
        if self.num_stages < 2:
            raise ValueError(f"num_stages={self.num_stages}; expected at least 2.")
        if self.num_fixed_stages not in (1, 2):
            raise ValueError(
                f"num_fixed_stages={self.num_fixed_stages}; expected 1 or 2."
            )
        if self.teams not in (1, 2, 3, 4):
            raise ValueError(f"teams={self.teams}; expected 1 to 4.")

    @property
    def num_workers(self) -> int:
        """Walkers of the schedule."""
        return self.num_ctas * self.teams

    def rows(self, block: int) -> int:
        """Rows of an item where a block has so many."""
        return min(self.tile_rows, block)

    def walker(self) -> dict:
        """The fields that `_persistent.Walker` shares."""
        names = ("tile", "num_stages", "num_fixed_stages", "ping_pong", "teams")
        return {name: getattr(self, name) for name in (*names, "staged")}


def beside_bias(
    block_rows: int,
    block_columns: int,
    num_ctas: int,
    widest: int,
    wgs: int,
    stages: int = 2,
) -> list[BackwardConfig]:
    """What may leave room for a bias, best first.

    ``widest`` are the most columns of a step, and ``wgs`` the most warpgroups of a CTA,
    for which it leaves registers, ``stages`` those of steps of 128.
    """
    return [
        BackwardConfig(
            tile=min(tile, block_columns),
            num_stages=stages,
            teams=1 if block_rows == 128 else teams,
            staged=staged,
            num_ctas=num_ctas,
        )
        for tile, stages, teams, staged in (
            (128, stages, 2, True),
            *((64, 3, 3, staged) for staged in (True, False) if block_rows <= 64),
            *((64, 4, 2, True), (64, 3, 2, True), (32, 3, 2, True), (32, 3, 1, True)),
            (32, 2, 1, True),
        )
        if tile <= min(widest, max(64, block_columns)) and teams <= wgs
    ]
