"""Gradients of the keys and values: rows are keys, columns are queries.

Everything is computed transposed, ``s = k q^T``, so that probabilities and the logits'
gradient are left operands in registers: ``dv = p dout``, ``dk = ds q``; four products a
step. Where registers do not hold both sums, one launch computes dk and one dv. See
`_persistent` for the roles and the walk. Query heads that share a key head follow one
another in the schedule; their sums stay in registers from item to item.
May assume what `fwd_sm90` does; called by the adapter.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

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
MOST_COLUMNS = 256
"""Of the sums of a launch: half as many registers a thread."""


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

    For head sizes above 128, what fits; beside a bias (see `_bias.kind`), or one that
    has ``lane_sums`` in the dq kernel, too.
    """
    sizes = head_dim, value_dim, block_q, block_kv
    measured = None if lane_sums else _tables.find("dkv", *sizes, bias=bias)
    if measured is not None:
        return BackwardConfig(**measured, num_ctas=num_ctas)
    if bias is not None:
        dims, room = (block_kv, head_dim, value_dim, jnp.bfloat16), _biased.room(bias)
        most = _biased.largest_step(bias, head_dim, value_dim)
        configs = gradient.beside_bias(block_kv, block_q, num_ctas, **most)
        return _biased.first_fit(configs, lambda c: scratch_spec(c, *dims, **room))
    widest = max(head_dim, value_dim)
    narrow = widest <= 64
    if widest > 128:
        found = BackwardConfig(tile=32, num_stages=2)
    elif block_kv <= 64:
        found = BackwardConfig(tile=64, num_stages=2, teams=2 if narrow else 1)
    elif narrow:
        found = BackwardConfig(tile=128, num_stages=2)
    else:
        found = BackwardConfig(tile=64, num_stages=2)
    return dataclasses.replace(found, tile=min(found.tile, block_q), num_ctas=num_ctas)


def scratch_spec(
    config: BackwardConfig,
    tile_kv: int,
    head_dim: int,
    value_dim: int,
    dtype,
    bias_dtype=None,
    points=False,
    entries=False,
) -> dict:
    """Shared memory of one CTA; the estimate and the launch both read it.

    A launch for dk or dv alone leaves some of it unused.
    """
    c, wgs = config, _persistent.warpgroups(tile_kv)
    tile = lambda lead, *sizes: _tiles.scratch((c.teams, *lead), *sizes, dtype)
    parts = sum(_tiles.parts(dim, dtype)[0] for dim in (head_dim, value_dim))
    bar = lambda count, arrivals: _persistent.barriers(c.teams, count, arrivals)
    of_lists = _entries.COPIES * entries
    row = plgpu.SMEM((c.teams, c.num_stages, c.tile), jnp.float32)
    of_bias = _biased.arrivals(wgs, 64, bias_dtype)
    return dict(
        k=tile((c.num_fixed_stages, wgs), 64, head_dim),
        v=tile((c.num_fixed_stages, wgs), 64, value_dim),
        q=tile((c.num_stages,), c.tile, head_dim),
        dout=tile((c.num_stages,), c.tile, value_dim),
        lse2=row,
        delta=row,
        **_persistent.staging(tile, wgs, c.staged, dk=head_dim, dv=value_dim),
        item=_persistent.item_slots(c.teams, c.num_fixed_stages),
        fixed_full=bar(c.num_fixed_stages, 1 + wgs * parts),
        fixed_free=bar(c.num_fixed_stages, wgs),
        queries_full=bar(c.num_stages, 2 + parts + of_bias + points + of_lists),
        queries_free=bar(c.num_stages, wgs),
        **_biased.bias_stream(
            bar, (c.teams, c.num_stages, wgs), (c.tile, 64), bias_dtype
        ),
        **_biased.points_scratch(c, c.tile, points),
        **_biased.entries_scratch(c, wgs, c.tile, entries),
    )


def backward_dkv(
    q: Array,
    k: Array,
    v: Array,
    dout: Array,
    lse2: Array,
    delta: Array,
    q_indices: Array,
    full_q_indices: Array,
    elements: Elements,
    schedule: Schedule,
    *,
    blocks: tuple[int, int],
    scale: float,
    config: BackwardConfig,
    bias: Bias | None = None,
) -> tuple[Array, Array, Array | None]:
    """Computes dk and dv, and sums for dbias, over the blocks of a schedule.

    Args:
        q: ``[B, T, H, D]`` float16 or bfloat16.
        k: ``[B, S, K, D]``.
        v: ``[B, S, K, Dv]``.
        dout: ``[B, T, H, Dv]``, of the same dtype.
        lse2: ``[B, H, nq * block_q]`` float32, base 2; +inf where a row saw nothing or
            does not exist.
        delta: as ``lse2``: ``sum(dout * out) - dlse``; finite where lse2 is +inf.
        q_indices: int32, flattened lists of partial blocks by key block.
        full_q_indices: int32, flattened lists of full blocks by key block.
        elements: test of the partial blocks; rows are keys; ``bad`` tells of queries:
            of q, dout, lse2 or delta.
        schedule: from `_schedule`, of these lists; with ``group`` where query heads
            share key heads.
        blocks: ``block_q`` and ``block_kv``.
        scale: factor of the logits; above 0.
        config: see `BackwardConfig`.
        bias: as in the forward pass, whose probabilities these are.

    Returns:
        dk: ``[B, S, K, D]`` in the dtype of k.
        dv: ``[B, S, K, Dv]``.
        sums: ``[n, B, H, S]`` float32, of ds by key, or see
            `_distance.add_distance_sums` and `_score.products_gradient`; None where the
            bias needs none.

    Raises:
        ValueError: for a config that does not fit into shared memory.
    """
    kv_len, head_dim, value_dim = k.shape[1], q.shape[-1], v.shape[-1]
    tile_kv = config.rows(blocks[1])
    scratch = scratch_spec(
        *(config, tile_kv, head_dim, value_dim, q.dtype),
        *_bias.in_smem(bias, rows_are_queries=False)[:3],
    )
    _persistent.check_smem("backward_dkv", config, scratch)
    kernel = _BackwardDkv(
        **config.walker(),
        block_rows=tile_kv,
        block_columns=blocks[0],
        group=q.shape[2] // k.shape[2],
        rows_are_queries=False,
        any_partial=schedule.any_partial,
        items_per_worker=schedule.items.shape[1],
        scale=scale,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=q.dtype,
        sums=("dk", "dv"),
        row_sums=_bias.row_sums(bias, rows_are_queries=False),
    )
    lists = Lists.of(q_indices, full_q_indices, elements, schedule, bias)
    arrays, found, sums = (q, k, v, dout, lse2, delta), [], None
    slots = max(schedule.num_slots, 1)
    for part in kernel.launches():
        out_type = part.out_type(k.shape, kv_len, blocks[1], slots, lse2.shape[1])
        room = scratch | part.sums_scratch()
        outs = part.launch(
            arrays, lists, out_type, room, config.num_ctas, part.kernel_name
        )
        if part.row_sums:
            *outs, whole, parts = outs
            sums = _biased.merge_sums(whole, parts, schedule, tile_kv, kv_len)
        half = len(outs) // 2
        for whole, parts in zip(outs[:half], outs[half:], strict=True):
            whole = gradient.merge(whole, parts, schedule)
            found.append(_persistent.crop(whole, kv_len, tile_kv))
    return *found, sums


def _start(products: dict[str, Product], operands: dict[str, tuple]) -> dict:
    """Issues the products that have operands, in the operands' order."""
    found = start(*(products[name] for name in operands))(
        *itertools.chain(*operands.values())
    )
    found = found if len(operands) > 1 else (found,)
    return dict(zip(operands, found, strict=True))


@dataclasses.dataclass(frozen=True)
class _BackwardDkv(BiasedWalker):
    head_dim: int
    value_dim: int
    dtype: Any
    sums: tuple[str, ...]

    @property
    def dims(self) -> dict[str, int]:
        """Columns of the sums that this launch computes."""
        every = dict(dk=self.head_dim, dv=self.value_dim)
        return {name: every[name] for name in self.sums}

    @property
    def kernel_name(self) -> str:
        return "jsparse_bwd_" + ("dkv" if len(self.sums) == 2 else self.sums[0])

    def launches(self) -> list[_BackwardDkv]:
        """One launch for both sums, or one for each."""
        if self.head_dim + self.value_dim <= MOST_COLUMNS:
            return [self]
        return [
            dataclasses.replace(
                self, sums=(name,), row_sums=self.row_sums if name == "dk" else 0
            )
            for name in self.sums
        ]

    def out_type(
        self, shape, length: int, block: int, slots: int, q_heads: int
    ) -> list[jax.ShapeDtypeStruct]:
        """The products, then the parts of rows that are split; then row sums."""
        batch, _, heads, _ = shape
        padded = lambda dim: _persistent.rows_of(length, block, dim, self.staged)
        sums = [
            jax.ShapeDtypeStruct((batch, padded(dim), heads, dim), self.dtype)
            for dim in self.dims.values()
        ] + [
            jax.ShapeDtypeStruct((slots, self.wgs * 64, dim), jnp.float32)
            for dim in self.dims.values()
        ]
        return sums + self.sums_type(batch, q_heads, length, block, slots)

    def tiles(self, arrays):
        q, k, v, dout, lse2, delta = arrays
        of_queries = [(q, "q"), (lse2, "lse2"), (dout, "dout"), (delta, "delta")]
        return [(k, "k"), (v, "v")], [Stream("queries", of_queries)]

    def items(self, arrays, lists, outs, s):
        """As in `Walker`, unless heads share keys: then sums pass between items."""
        if self.group == 1:
            super().items(arrays, lists, outs, s)
            return

        def item(nth, carry):
            step0, sums = carry
            fields, stage = self.await_item(nth, s)
            total = self.total_steps(fields)
            head = lax.rem(fields[1], jnp.int32(self.group))
            sums = lax.cond(head == 0, lambda _: self.nothing(), lambda x: x, sums)
            sums |= dict(rows=self.no_sums())

            def rows(sums):
                return self.attend(fields, arrays, lists, s, step0, stage, sums)

            def no_rows(sums):
                self.free_empty(s, stage)
                return sums

            sums = lax.cond(total > 0, rows, no_rows, sums)
            last = head == self.group - 1
            pl.when(last)(lambda: self.store_products(sums, fields, outs, s))
            self.store_sums(sums["rows"], fields, self.outs_of_sums(outs), s)
            return step0 + total, sums

        start_ = jnp.int32(0), self.nothing()
        lax.fori_loop(0, lists.count[self.worker(s)], item, start_)

    def attend(self, fields, arrays, lists, s, step0, stage, sums=None):
        """Adds an item's part of 64 rows to ``sums``, which are by name."""
        tile, w = self.tile, fields[HALF]
        of_k, of_v = self.head_dim, self.value_dim
        products = dict(
            logits=Product(tile, of_k, of_k),
            dp=Product(tile, of_v, of_v),
            dv=Product(of_v, of_v, accumulate=True),
            dk=Product(of_k, of_k, accumulate=True),
        )
        k, v = s["k"].at[stage, w], s["v"].at[stage, w]
        mask = self.masked(fields, lists, fill=0.0)
        sums = self.accumulate(
            fields, lists, s, step0, (k, v), mask, products, sums or self.nothing()
        )
        plgpu.barrier_arrive(s["fixed_free"][stage])
        return sums

    def probabilities(self, logits, lists, s, slot):
        """The step's p."""
        f = gradient.probabilities_by_column(self.tile, self.scale_log2)
        return f(logits, s["lse2"].at[slot])

    def logits_gradient(self, p, dp, s, slot, partial):
        """The step's ds."""
        f = gradient.logits_gradient_by_column(self.tile, partial)
        return f(p, dp, s["delta"].at[slot])

    def accumulate(self, fields, lists, s, step0, kv, mask, products, sums):
        """Waits for a step's products before the next: the other warpgroup overlaps.

        Run beside the next step's logits, they would need registers for p and ds twice.
        """
        tile, dims, (k, v) = self.tile, self.dims, kv
        to_operand = operand(tile, self.dtype)
        total = self.total_steps(fields)
        first = self.first_slot(step0)
        self.await_operands(jnp.int32(0), total, first, s, ["queries"])

        def step(n, carry, seen):
            sums, slot = carry
            q, dout = s["q"].at[slot], s["dout"].at[slot]
            if seen is not None:
                self.clean(fields, lists, seen, [q, dout])
            operands = dict(logits=(k, q), dp=(v, dout))
            if "dk" not in dims:
                del operands["dp"]
            self.take_turn(s, fields[HALF])
            found = _start(products, operands)
            self.pass_turn(s, fields[HALF])
            bias = self.read_bias(fields, lists, n, s, slot)
            x = wait((64, tile), len(found) - 1)(found["logits"])
            logits = self.with_bias(fields, lists, x, bias)
            p = self.probabilities(logits, lists, s, slot)
            if seen is not None:
                p = mask(seen, p)
            operands, rows = {}, sums["rows"]
            if "dk" in dims:
                dp = wait((64, tile), 0)(found["dp"])
                partial = seen is not None
                ds = self.logits_gradient(p, dp, s, slot, partial)
                rows, ds = self.pass_bias(
                    fields, lists, rows, x, p, ds, bias, s, slot, partial
                )
            if "dv" in dims:
                operands["dv"] = sums["dv"], to_operand(p), dout
            if "dk" in dims:
                operands["dk"] = sums["dk"], to_operand(ds), q
            found = _start(products, operands)
            following = self.following(slot)
            self.await_operands(n + 1, total, following, s, ["queries"])
            done = gradient.await_all(*dims.values())(*(found[x] for x in dims))
            plgpu.barrier_arrive(s["queries_free"][slot])
            return dict(zip(dims, done, strict=True)) | dict(rows=rows), following

        sums, _ = self.steps(fields, lists, step, (sums, first), 0)
        return sums

    def nothing(self):
        return {
            name: plgpu.layout_cast(jnp.zeros((64, dim), jnp.float32), r.ACC)
            for name, dim in self.dims.items()
        } | dict(rows=self.no_sums())

    def store(self, result, fields, outs, s):
        self.store_products(result, fields, outs, s)
        self.store_sums(result["rows"], fields, self.outs_of_sums(outs), s)

    def outs_of_sums(self, outs):
        """The outputs beyond the products and their parts."""
        return outs[2 * len(self.dims) :]

    def store_products(self, result, fields, outs, s):
        """64 rows of dk and dv, or parts of them."""
        outs = outs[: 2 * len(self.dims)]
        b, row, part = fields[0], fields[2], fields[7]
        h = lax.div(fields[1], jnp.int32(self.group))
        w = fields[HALF]
        rows = self.rows_out(row, w)
        half = len(outs) // 2
        places = list(zip(self.dims.items(), outs[:half], outs[half:], strict=True))

        def values(name, dim, dtype):
            factor = self.scale if name == "dk" else 1.0
            return gradient.scaled(dim, factor, dtype)(result[name])

        def whole():
            outputs = [
                Output(values(name, dim, self.dtype), name, out, (b, rows, h))
                for (name, dim), out, _ in places
            ]
            _persistent.write(s, w, *outputs)

        def one_part():
            for (name, dim), _, parts in places:
                parts[part, pl.ds(w * 64, 64)] = values(name, dim, jnp.float32)

        pl.when(part < 0)(whole)
        pl.when(part >= 0)(one_part)
