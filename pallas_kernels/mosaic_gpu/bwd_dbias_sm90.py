"""Gradient of a streamed bias: an item is a tile of it, owned by one team.

A team computes ``ds = p (dp - delta)`` of its tile for one batch entry and head after
another of those that share it, adds them up in registers and writes the sum once: no
atomics, and zeros where the mask has no block. Where tiles are too few to keep all
teams busy, the visits of each are divided into shares, whose sums are added up after.
Two products a visit, ``s = q k^T``, added to the bias, and ``dp = dout v^T``; each
element is its own, so a NaN needs care only where elements do not count. A bias that
nobody shares has its gradient from the dq kernel.
May assume what `fwd_sm90` does; called by the adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .._common import LOG2E, divided
from . import _bias, _biased, _elements, _persistent, _tiles
from . import _gradient as gradient
from . import _registers as r
from ._bias import DenseBias, Streamed, TilePlace
from ._elements import Elements, Position
from ._gradient import BackwardConfig
from ._persistent import Teams
from ._wgmma import Product, start

Array = Any
CHUNK = 64
"""Most columns of one product."""
MOST_SHARES = 8
IDLE = 1.08
"""Longer than with perfect balance by this factor, a launch is divided further."""
EMPTY, FULL, PARTIAL = 0, 1, 2
"""States of a block; the n-th partial block of a batch entry is ``PARTIAL + n``."""


class Blocks(NamedTuple):
    """The blocks of a bias: those of a `BlockBias` by number, else all, row by row.

    Attributes:
        state: ``[B or 1, H or 1, n]`` int32: `EMPTY`, `FULL`, or `PARTIAL` plus the
            number of the block's bits.
        row: ``[B or 1, n]`` int32, row of a block; None of a `DenseBias`.
        column: as ``row``.
    """

    state: Array
    row: Array | None = None
    column: Array | None = None


class Visits(NamedTuple):
    """What a launch walks over, in global memory.

    Attributes:
        order: int32, blocks ``[b, H or 1, n]`` of the bias, flattened, in the order in
            which they are computed.
        blocks: where they are and who sees them; flattened.
        elements: test of the partial blocks, or None if there are none.
        bias: the bias.
    """

    order: Array
    blocks: Blocks
    elements: Elements | None
    bias: Streamed


def choose(
    head_dim: int,
    value_dim: int,
    block_q: int,
    block_kv: int,
    num_ctas: int = 132,
    bias_dtype: Any = jnp.float32,
) -> BackwardConfig:
    """The widest tile that fits; not measured."""
    configs = [
        BackwardConfig(
            tile=min(tile, block_kv),
            num_stages=stages,
            teams=128 // block_q,
            num_ctas=num_ctas,
        )
        for tile, stages in ((128, 3), (128, 2), (64, 3), (64, 2), (32, 2))
    ]
    sizes = block_q, head_dim, value_dim, jnp.bfloat16, bias_dtype
    return _biased.first_fit(configs, lambda c: scratch_spec(c, *sizes))


def scratch_spec(
    config: BackwardConfig,
    block_q: int,
    head_dim: int,
    value_dim: int,
    dtype,
    bias_dtype,
) -> dict:
    """Shared memory of one CTA; the estimate and the launch both read it."""
    c, wgs, chunk = config, block_q // 64, min(config.tile, CHUNK)
    chunks, stages = c.tile // chunk, (c.teams, c.num_stages)
    words = 4 // jnp.dtype(bias_dtype).itemsize
    bar = lambda count, arrivals: _persistent.barriers(c.teams, count, arrivals)
    row = plgpu.SMEM((*stages, wgs, 64), jnp.float32)
    parts = sum(_tiles.parts(dim, dtype)[0] for dim in (head_dim, value_dim))
    return dict(
        q=_tiles.scratch((*stages, wgs), 64, head_dim, dtype),
        dout=_tiles.scratch((*stages, wgs), 64, value_dim, dtype),
        k=_tiles.scratch((*stages, chunks), chunk, head_dim, dtype),
        v=_tiles.scratch((*stages, chunks), chunk, value_dim, dtype),
        lse2=row,
        delta=row,
        # As it comes and as its gradient leaves; between, what products are added to.
        bias=_tiles.scratch((c.teams, wgs, chunks * words), 64, chunk, bias_dtype),
        visit_full=bar(c.num_stages, 2 * wgs + (wgs + chunks) * parts),
        visit_free=bar(c.num_stages, wgs),
        bias_full=bar(1, wgs * chunks * _tiles.parts(chunk, bias_dtype)[0]),
        bias_free=bar(1, wgs),
    )


def backward_dbias(
    q: Array,
    k: Array,
    v: Array,
    dout: Array,
    lse2: Array,
    delta: Array,
    bias_blocks: Blocks,
    elements: Elements | None,
    bias: Streamed,
    *,
    blocks: tuple[int, int],
    scale: float,
    config: BackwardConfig,
) -> Array:
    """Computes the gradient of a bias, summed over what shares it.

    Args:
        q: ``[B, T, H, D]`` float16 or bfloat16.
        k: ``[B, S, K, D]``.
        v: ``[B, S, K, Dv]``.
        dout: ``[B, T, H, Dv]``, of the same dtype.
        lse2: ``[B, H, nq * block_q]`` float32, base 2; +inf where a row saw nothing or
            does not exist.
        delta: as ``lse2``: ``sum(dout * out) - dlse``; finite where lse2 is +inf.
        bias_blocks: of the bias; see `Blocks`.
        elements: test of the partial blocks; rows are queries. None: no partial blocks.
        bias: as in the forward pass.
        blocks: ``block_q`` and ``block_kv``.
        scale: factor of the logits; above 0.
        config: see `BackwardConfig`; a tile divides ``block_kv``.

    Returns:
        As ``bias.values``.

    Raises:
        ValueError: for a config that does not fit into shared memory.
    """
    dtype = bias.values.dtype
    dims = q.shape[-1], v.shape[-1]
    scratch = scratch_spec(config, blocks[0], *dims, q.dtype, dtype)
    _persistent.check_smem("backward_dbias", config, scratch)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    batch = q.shape[0]
    state = bias_blocks.state
    order = _longest_first(state, bias, batch)
    per_entry = batch // bias.values.shape[0]
    visits_of_a_tile = per_entry * (heads if bias.values.shape[1] == 1 else 1)
    tiles = order.shape[0] * (blocks[1] // config.tile)
    shares = num_shares(tiles, visits_of_a_tile, config.num_workers)
    kernel = _BackwardDbias(
        shares=shares,
        block_rows=blocks[0],
        teams=config.teams,
        block_columns=blocks[1],
        tile=config.tile,
        num_stages=config.num_stages,
        workers=config.num_workers,
        group=group,
        heads=heads,
        batch=batch,
        columns=-(-k.shape[1] // blocks[1]),
        pattern=state.shape,
        head_dim=dims[0],
        value_dim=dims[1],
        bias_dtype=dtype,
        scale=scale,
    )
    flat = jax.tree_util.tree_map(jnp.ravel, bias_blocks)
    visits = Visits(order, flat, elements, bias)
    arrays = (q, k, v, dout, lse2, delta)
    out_type = [jax.ShapeDtypeStruct(bias.values.shape, dtype)]
    if shares > 1:
        parts = (shares, *bias.values.shape[:2], state.shape[-1], *blocks)
        out_type = [jax.ShapeDtypeStruct(parts, jnp.float32)]
    (found,) = kernel.launch(
        arrays, visits, out_type, scratch, config.num_ctas, "jsparse_bwd_dbias"
    )
    return found if shares == 1 else _sum_of_shares(found, bias, kernel.columns)


def num_shares(tiles: int, visits: int, workers: int) -> int:
    """Parts that the visits of each tile are divided into; few, each costs memory.

    Args:
        tiles: of the bias.
        visits: of a tile.
        workers: teams of the launch.
    """

    def length(shares: int) -> float:
        """Over that of perfect balance."""
        return -(-tiles * shares // workers) * workers / (tiles * shares)

    choices = range(1, min(visits, MOST_SHARES) + 1)
    good = [n for n in choices if length(n) < IDLE]
    return good[0] if good else min(choices, key=length)


def _sum_of_shares(parts: Array, bias: Streamed, columns: int) -> Array:
    """The gradient of ``bias.values``, from ``[shares, b, H, n, rows, columns]``."""
    found = parts.sum(0).astype(bias.values.dtype)
    if not isinstance(bias, DenseBias):
        return found
    b, h, blocks, height, width = found.shape
    found = found.reshape(b, h, blocks // columns, columns, height, width)
    found = found.swapaxes(3, 4).reshape(b, h, -1, columns * width)
    _, _, q_len, kv_len = bias.values.shape
    return found[:, :, :q_len, :kv_len]


def _longest_first(state: Array, bias: Streamed, batch: int) -> Array:
    """Blocks of the bias by how many visits they get, most first, else in order."""
    entries, heads = bias.values.shape[:2]
    load = (state != EMPTY).astype(jnp.int32)
    if load.shape[0] > 1:
        load = load.reshape(-1, entries, bias.inner, *load.shape[1:]).sum((0, 2))
    if heads == 1:
        load = load.sum(1, keepdims=True)
    load = jnp.broadcast_to(load, (entries, heads, *load.shape[2:]))
    return jnp.argsort(-load.reshape(-1), stable=True).astype(jnp.int32)


class _Item(NamedTuple):
    """A tile, and which share of its visits.

    Attributes:
        entry: into the first axis of the bias.
        head: into the second.
        block: into the third, or of a dense bias the block's number.
        part: first column in the block.
        share: of the visits.
    """

    entry: Array
    head: Array
    block: Array
    part: Array
    share: Array


class _Seen(NamedTuple):
    """A visit: batch entry, query head, state, first row and column of the tile."""

    batch: Array
    head: Array
    state: Array
    row: Array
    column: Array


@dataclasses.dataclass(frozen=True)
class _BackwardDbias(Teams):
    shares: int
    block_columns: int
    tile: int
    num_stages: int
    workers: int
    group: int
    heads: int
    batch: int
    columns: int
    pattern: tuple[int, int, int]
    head_dim: int
    value_dim: int
    bias_dtype: Any
    scale: float

    @property
    def chunk(self) -> int:
        return min(self.tile, CHUNK)

    @property
    def chunks(self) -> int:
        return self.tile // self.chunk

    # ---------------------------------------------------------------------- walking

    def walk(self, visits: Visits, s: dict, item, carry):
        """``item(at, carry)`` for every tile of this team, part by part of a block."""
        per_block = self.block_columns // self.tile
        total = len_of(visits.order) * per_block * self.shares
        worker = lax.axis_index("cta") * self.teams + s["team"]
        turns = lax.div(total - 1 - worker + self.workers, jnp.int32(self.workers))
        heads, blocks = visits.bias.values.shape[1], self.pattern[2]

        def step(n, carry):
            n, share = divided(worker + n * self.workers, self.shares)
            n, part = divided(n, per_block)
            rest, block = divided(visits.order[n], blocks)
            entry, head = divided(rest, heads)
            return item(_Item(entry, head, block, part * self.tile, share), carry)

        return lax.fori_loop(0, turns, step, carry)

    def visit(self, visits: Visits, at: _Item, body, carry):
        """``body(seen, carry)`` for each entry and head that sees the block."""
        bias = visits.bias
        entries, heads = bias.values.shape[:2]
        per_entry = self.heads if heads == 1 else 1
        count = self.batch // entries * per_entry
        one_pattern = self.pattern[:2] == (1, 1)

        def state_of(b, h):
            own = (b if self.pattern[0] > 1 else 0) * self.pattern[1]
            own += h if self.pattern[1] > 1 else 0
            return visits.blocks.state[own * self.pattern[2] + at.block]

        def unless_empty(state, body, carry):
            return lax.cond(state != EMPTY, body, lambda carry: carry, carry)

        def step(n, carry):
            outer, h = divided(n, per_entry)
            outer, inner = divided(outer, bias.inner)
            b = (outer * entries + at.entry) * bias.inner + inner
            h = h if heads == 1 else at.head
            state = of_all if one_pattern else state_of(b, h)

            def see(carry):
                i, j = self.place(visits, at, b)
                column = j * self.block_columns + at.part
                seen = _Seen(b, h, state, i * self.block_rows, column)
                return body(seen, carry)

            return see(carry) if one_pattern else unless_empty(state, see, carry)

        def every(carry):
            first = at.share * count // self.shares
            last = (at.share + 1) * count // self.shares
            return lax.fori_loop(first, last, step, carry)

        if not one_pattern:
            return every(carry)
        of_all = state_of(0, 0)
        return unless_empty(of_all, every, carry)

    def place(self, visits: Visits, at: _Item, b):
        """Row and column of a block of the bias in batch entry b's grid of blocks."""
        blocks = visits.blocks
        if blocks.row is None:
            return divided(at.block, self.columns)
        _, _, n = self.pattern
        entry = (b if len_of(blocks.row) > n else 0) * n + at.block
        return blocks.row[entry], blocks.column[entry]

    def chunk_places(self, visits: Visits, at: _Item, w):
        """Where a warpgroup's chunks of a tile stand in the bias."""
        i = j = jnp.int32(0)
        if isinstance(visits.bias, DenseBias):
            i, j = divided(at.block, self.columns)
        row, column = i * self.block_rows + w * 64, j * self.block_columns + at.part
        return [
            TilePlace(at.entry, at.head, row, column + c * self.chunk, at.block)
            for c in range(self.chunks)
        ]

    # ------------------------------------------------------------------------- load

    def load(self, arrays, visits: Visits, s: dict) -> None:
        """Producer: the tile of the bias, then the operands of each visit."""
        q, k, v, dout, lse2, delta = arrays

        def fetch(seen, count):
            slot = lax.rem(count, jnp.int32(self.num_stages))
            full, (b, h) = s["visit_full"][slot], seen[:2]
            plgpu.barrier_wait(s["visit_free"][slot])
            for w in range(self.wgs):
                rows = pl.ds(seen.row + w * 64, 64)
                for x, name in ((q, "q"), (dout, "dout")):
                    _tiles.fetch(x, (b, rows, h), s[name].at[slot, w], full)
                for x, name in ((lse2, "lse2"), (delta, "delta")):
                    place = s[name].at[slot, w]
                    plgpu.copy_gmem_to_smem(x.at[b, h, rows], place, full)
            h_kv = lax.div(h, jnp.int32(self.group))
            for c in range(self.chunks):
                columns = pl.ds(seen.column + c * self.chunk, self.chunk)
                for x, name in ((k, "k"), (v, "v")):
                    _tiles.fetch(x, (b, columns, h_kv), s[name].at[slot, c], full)
            return count + 1

        def item(at, count):
            plgpu.barrier_wait(s["bias_free"][0])
            for w in range(self.wgs):
                for c, place in enumerate(self.chunk_places(visits, at, w)):
                    tile = s["bias"].at[w, c]
                    _bias.fetch(visits.bias, place, tile, s["bias_full"][0])
            return self.visit(visits, at, fetch, count)

        self.walk(visits, s, item, jnp.int32(0))
        # Every arrival is waited for: interpret mode checks that barriers end at rest.
        for i in range(self.num_stages):
            plgpu.barrier_wait(s["visit_free"][i])
        plgpu.barrier_wait(s["bias_free"][0])

    # ---------------------------------------------------------------------- compute

    def compute(self, arrays, visits: Visits, outs, s: dict) -> None:
        """Consumer: 64 rows of each tile."""
        (out,), w = outs, self.row_half()
        for i in range(self.num_stages):
            plgpu.barrier_arrive(s["visit_free"][i])
        plgpu.barrier_arrive(s["bias_free"][0])
        round_ = gradient.scaled(self.chunk, 1.0, self.bias_dtype)
        store = _tiles.store(self.chunk, self.bias_dtype)
        sizes = self.tile, self.chunk, self.scale, self.bias_dtype
        load, keep = _tiles.load(64, self.chunk, self.bias_dtype), _bias.keep(*sizes)

        def item(at, count):
            zero = jnp.zeros((64, self.chunk), jnp.float32)
            sums = [plgpu.layout_cast(zero, r.ACC) for _ in range(self.chunks)]
            plgpu.barrier_wait(s["bias_full"][0])
            room = s["bias"].at[w]
            keep(room, *(load(room.at[c]) for c in range(self.chunks)))

            def one(seen, carry):
                count, sums = carry
                slot = lax.rem(count, jnp.int32(self.num_stages))
                plgpu.barrier_wait(s["visit_full"][slot])
                sums = self.add(visits, seen, s, slot, sums)
                plgpu.barrier_arrive(s["visit_free"][slot])
                return count + 1, sums

            count, sums = self.visit(visits, at, one, (count, sums))
            if self.shares > 1:
                self.write_share(at, out, sums)
                r.fence_reads()()
            else:
                r.await_warpgroup()()
                places = self.chunk_places(visits, at, w)
                for c, (place, x) in enumerate(zip(places, sums, strict=True)):
                    tile = s["bias"].at[w, c]
                    store(tile, round_(x))
                    plgpu.commit_smem()
                    _bias.write(visits.bias, out, place, tile)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(s["bias_free"][0])
            return count

        self.walk(visits, s, item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def write_share(self, at: _Item, out, sums: list) -> None:
        """Writes a share's sums, which need no rounding, straight from registers."""
        for c, x in enumerate(sums):
            columns = pl.ds(at.part + c * self.chunk, self.chunk)
            rows = pl.ds(self.row_half() * 64, 64)
            place = out.at[at.share, at.entry, at.head, at.block, rows, columns]
            r.store(place, gradient.scaled(self.chunk, 1.0, jnp.float32)(x))

    def add(self, visits: Visits, seen: _Seen, s: dict, slot, sums: list) -> list:
        """Adds the logits' gradient of a visit to the sums, chunk by chunk.

        While one chunk's is computed, products of the next run.
        """
        running = [self.start_chunk(s, slot, c) for c in range(self.chunks)]
        rows, out = self.rows(s, slot), []
        for c, total in enumerate(sums):
            newer = 2 * (self.chunks - 1 - c)
            found = gradient.await_all(self.chunk, self.chunk, but=newer)(*running[c])
            out.append(self.add_chunk(visits, seen, c, found, total, rows))
        return out

    def start_chunk(self, s: dict, slot, c: int):
        """Starts the products of a chunk: logits over the scale, and dp."""
        w, chunk, room = self.row_half(), self.chunk, s["bias"].at[self.row_half()]
        dim, value_dim = self.head_dim, self.value_dim
        products = start(
            Product(chunk, dim, dim, accumulate=True, transposed=True),
            Product(chunk, value_dim, value_dim),
        )
        of_queries = s["q"].at[slot, w], s["k"].at[slot, c]
        of_values = s["dout"].at[slot, w], s["v"].at[slot, c]
        bias = _bias.kept(chunk, c, self.bias_dtype)(room)
        return products(bias, *of_queries, *of_values)

    def rows(self, s: dict, slot):
        """lse2 and delta of the warpgroup's rows."""
        return [
            plgpu.load(s[x].at[slot, self.row_half()], layout=r.ROW, optimized=False)
            for x in ("lse2", "delta")
        ]

    def add_chunk(self, visits, seen: _Seen, c: int, found, total, rows):
        """Adds a chunk's gradient to its sums."""
        test = self.look(visits, seen, c)
        (logits, dp), (lse2, delta) = found, rows
        p = gradient.probabilities_by_row(self.chunk, self.scale * LOG2E)
        add = gradient.add_logits_gradient(self.chunk, visits.elements is not None)
        return add(total, test(p(logits, lse2)), dp, delta)

    def look(self, visits: Visits, seen: _Seen, c: int) -> Callable:
        """``f(p)``: p, 0 where an element of a partial block does not count.

        Bits are read here, while products run; of a full block, any that exist.
        """
        elements, (b, _, state, row, column) = visits.elements, seen
        if elements is None:
            return lambda p: p
        first = self.row_half() * 64
        column += c * self.chunk
        word = 0
        if elements.bits is not None:
            lead, count, rows, words = elements.bits.shape
            block = jnp.maximum(state - PARTIAL, 0) + (b * count if lead > 1 else 0)
            within = lax.rem(column, jnp.int32(self.block_columns))
            word = (block * rows + first) * words + lax.div(within, jnp.int32(32))
        at = Position(b, row + first, column, jnp.int32(word))
        words = _elements.fetch(elements, self.chunk, 64)(at)
        test = _elements.apply(elements, self.chunk, 0.0, 64)
        return lambda p: lax.cond(
            state >= PARTIAL, lambda p: test(p, at, words), lambda p: p, p
        )


def len_of(x: Array) -> int:
    """Elements of a reference."""
    return math.prod(x.shape)
