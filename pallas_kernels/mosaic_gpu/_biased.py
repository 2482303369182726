"""What a walker does with a bias: reads it, adds it, sums its gradient by row.

A streamed bias has a tile for each warpgroup and step, one by distance the points of a
step's columns; the others are read by position (see `_bias` and `_distance`), or spread
over a tile (`_entries`). The gradient of a streamed bias that nobody shares is the dq
kernel's ds: it takes the place of the tile in shared memory, and leaves from there. So
does that of a bias by entry, one by one.
Of a bias by key or by distance, the dq and the dk and dv kernel sum up for each row
what its gradient is made of, and the dq kernel, for each item, what a table's or
Gaussians' is. A score function is a bias that also changes the gradient of the products
(see `_score`). Called by the kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .._common import LOG2E
from . import _bias, _distance, _entries, _persistent, _score, _tiles
from . import _gradient as gradient
from . import _registers as r
from ._bias import BlockBias, EntryBias, KeyBias, TilePlace
from ._distance import DistanceBias
from ._elements import Position
from ._entries import TileEntries
from ._persistent import HALF, Lists, Walker
from ._schedule import Schedule
from ._score import Score

Array = Any


class _Entries(NamedTuple):
    """What a step knows of a bias by entry: which are its, and where its values are."""

    at: TileEntries
    listed: Array
    tile: Array


@dataclasses.dataclass(frozen=True)
class BiasedWalker(Walker):
    """A walker whose logits may have a bias.

    Attributes:
        scale: factor of the logits.
        row_sums: sums of each row that the gradient of the bias needs.
        lane_sums: sums over all pairs that it needs.
        writes_bias: whether the last output is the gradient of a bias.
    """

    scale: float
    row_sums: int = dataclasses.field(default=0, kw_only=True)
    lane_sums: int = dataclasses.field(default=0, kw_only=True)
    writes_bias: bool = dataclasses.field(default=False, kw_only=True)

    def read_bias(self, fields, lists: Lists, n, s: dict, slot, stage=None):
        """What step n needs of the bias: its values, or where they stand.

        ``stage`` is that of the item's fixed tiles. Called while the step's products
        are in flight, which do not touch those registers. The tile of a streamed bias
        is free then, unless its gradient shall take its place: see `free_bias`.
        """
        bias = lists.bias
        if bias is None:
            return None
        if isinstance(bias, Score):
            return self.position(fields, lists, n)
        if isinstance(bias, DistanceBias):
            table = None
            if bias.form == "table":
                read = _distance.read_table(bias.weights.shape[-1])
                table = read(bias, bias.entry(*fields[:2]))
            columns = _distance.read_columns(self.tile)(s["points"].at[slot])
            return _distance.Read(fields[0], self.first_row(fields), columns, table)
        if isinstance(bias, EntryBias):
            b, h = bias.entry(*fields[:2])
            values = jnp.int32(b * bias.values.shape[1] + h)
            at = self.entries_of(fields, lists, n, values)
            found = _Entries(
                at, s["entry_list"].at[slot], s["entries"].at[fields[HALF]]
            )
            own = s["values"].at[stage, fields[HALF]] if "values" in s else None
            _entries.spread(self.entry_sizes(bias))(bias, *found, own)
            return found
        if isinstance(bias, KeyBias):
            b, h = bias.entry(*fields[:2])
            if not self.rows_are_queries:
                return gradient.rows(bias.values, b, h, self.first_row(fields))
            _, heads, length = bias.values.shape
            return (b * heads + h) * length + self.position(fields, lists, n).column
        if "bias_full" in s:
            plgpu.barrier_wait(s["bias_full"][slot])
        shape = (64, self.tile) if self.rows_are_queries else (self.tile, 64)
        load = _tiles.load(*shape, bias.values.dtype, not self.rows_are_queries)
        values = load(s["bias"].at[slot, fields[HALF]])
        if self.writes_bias:
            return _bias.Tile(values, self.bias_place(fields, lists, n))
        plgpu.barrier_arrive(s["bias_free"][slot])
        return _bias.Tile(values, None)

    def bias_place(self, fields, lists: Lists, n) -> TilePlace:
        """Where the tile of step n stands in a streamed bias."""
        at, bias, number = self.position(fields, lists, n), lists.bias, 0
        if isinstance(bias, BlockBias):
            nth = lax.div(n, jnp.int32(self.steps_per_block))
            number = self.listed(fields, bias.numbers, nth)
        return TilePlace(*bias.entry(*fields[:2]), at.row, at.column, number)

    def entries_of(self, fields, lists: Lists, n, values) -> TileEntries:
        """Which entries are step n's; ``values`` is the number of theirs."""
        bias, per_block = lists.bias, jnp.int32(self.steps_per_block)
        count, blocks, _ = bias.lists.shape
        first = fields[0] * blocks if count > 1 else jnp.int32(0)
        of_rows = jnp.int32(bias.blocks[0 if self.rows_are_queries else 1])
        row = lax.rem(self.first_row(fields), of_rows)
        return TileEntries(values, first, row, lax.rem(n, per_block) * self.tile)

    def entry_sizes(self, bias: EntryBias) -> _entries.Sizes:
        """What `_entries` must know."""
        return _entries.Sizes(self.tile, bias.blocks, self.rows_are_queries)

    def with_bias(self, fields, lists: Lists, x, read):
        """A step's products ``x``, with the bias over the scale of the logits."""
        bias, scale = lists.bias, self.scale
        if bias is None:
            return x
        if isinstance(bias, Score):
            return _score.new_logits(bias, *self.score_options)(x, fields[1], read)
        if isinstance(bias, DistanceBias):
            slopes = self.row_sums > 0
            add = _distance.with_bias(self.tile, scale, self.rows_tested, slopes)
            return add(x, bias, bias.entry(*fields[:2]), read)
        if isinstance(bias, EntryBias):
            values = _entries.read(self.tile)(read.tile)
            return _bias.add_tile(self.tile, scale, jnp.float32)(x, values)
        if not isinstance(bias, KeyBias):
            return _bias.add_tile(self.tile, scale, bias.values.dtype)(x, read.values)
        if self.rows_are_queries:
            return _bias.add_columns(self.tile, scale)(x, bias.values, read)
        return _bias.add_rows(self.tile, scale)(x, read)

    @property
    def score_options(self) -> tuple:
        return self.tile, self.scale, self.rows_tested, self.rows_are_queries

    def position(self, fields, lists: Lists, n) -> Position:
        """Where this warpgroup's tile of step n is, without bits."""
        per_block = jnp.int32(self.steps_per_block)
        listed = lists.partial, lists.full
        block = self.listed(fields, listed, lax.div(n, per_block))
        column = block * self.block_columns + lax.rem(n, per_block) * self.tile
        return Position(fields[0], self.first_row(fields), column, jnp.int32(0))

    def first_row(self, fields):
        """First of the rows that this warpgroup computes."""
        return fields[2] * self.block_rows + fields[HALF] * 64

    def no_sums(self) -> list:
        """The row sums before the first step."""
        zero = jnp.zeros((64,), jnp.float32)
        return [plgpu.layout_cast(zero, r.ROW) for _ in range(self.row_sums)]

    def pass_bias(
        self, fields, lists: Lists, sums: list, x, p, ds, read, s: dict, slot, partial
    ):
        """The sums with a step's, and the gradient of its products.

        ``x`` and ``read`` are what `with_bias` took; ds is of what it returned.
        ``partial`` tells whether the block may be.
        """
        if self.writes_bias and isinstance(lists.bias, EntryBias):
            out = s["bias_gradient"]
            at = read.at._replace(values=fields[0] * out.shape[1] + fields[1])
            put = _entries.write(self.entry_sizes(lists.bias))
            put(lists.bias, out, at, read.listed, read.tile, ds)
        elif self.writes_bias:
            tile, dtype = s["bias"].at[slot, fields[HALF]], lists.bias.values.dtype
            values = gradient.scaled(self.tile, 1.0, dtype)(ds)
            _tiles.store(self.tile, dtype)(tile, values)
            plgpu.commit_smem()
            _bias.write(lists.bias, s["bias_gradient"], read.place, tile)
        if not isinstance(lists.bias, Score):
            return self.add_sums(fields, lists, sums, p, ds, read, s, partial), ds
        f = _score.products_gradient(lists.bias, *self.score_options)
        return f(sums, x, p, ds, fields[1], read)

    def free_fixed(self, s: dict, stage) -> None:
        """Frees an item's fixed tiles, the values of its queries among them."""
        if "values" in s:
            r.fence_reads()()
        plgpu.barrier_arrive(s["fixed_free"][stage])

    def free_bias(self, s: dict, slot, pending: int) -> None:
        """Frees the tile of a step once at most ``pending`` gradients have not left.

        Where the gradient takes its place; others are free once they are read.
        """
        if self.writes_bias and "bias_free" in s:
            plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
            plgpu.barrier_arrive(s["bias_free"][slot])

    def add_sums(
        self, fields, lists: Lists, sums: list, p, ds, read, s: dict, partial: bool
    ) -> list:
        """Adds a step, of which `read_bias` returned ``read``, to the sums."""
        if not self.row_sums:
            return sums
        bias = lists.bias
        if not isinstance(bias, DistanceBias):
            return [gradient.add_to_rows(self.tile)(sums[0], ds)]
        sizes = self.tile, self.rows_tested
        add = _distance.with_sums(*sizes, self.rows_are_queries, partial)
        lanes = s["lanes"].at[fields[HALF]] if self.lane_sums else None
        return add(sums, p, ds, bias, bias.entry(*fields[:2]), read, lanes)

    def store_sums(self, sums: list, fields, outs, s: dict) -> None:
        """Writes an item's sums to the outputs of `sums_type`, whole and parts."""
        if not self.row_sums:
            return
        b, h, row, part = fields[0], fields[1], fields[2], fields[7]
        w, (whole, parts, *rest) = fields[HALF], outs
        sums = [gradient.whole_rows()(x) for x in sums]

        def write_to(places):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for n, x in enumerate(sums):
                s["sums"].at[n, w][...] = x
            plgpu.commit_smem()
            for n, place in enumerate(places):
                plgpu.copy_smem_to_gmem(s["sums"].at[n, w], place)

        rows, out = pl.ds(w * 64, 64), self.rows_out(row, w)
        each = range(self.row_sums)
        pl.when(part < 0)(lambda: write_to([whole.at[n, b, h, out] for n in each]))
        pl.when(part >= 0)(lambda: write_to([parts.at[n, part, rows] for n in each]))
        if self.lane_sums:
            self.store_lane_sums(fields, *rest, s)

    def store_lane_sums(self, fields, whole, parts, s: dict) -> None:
        """Writes a warpgroup's sums over all pairs of an item, and begins anew."""
        b, h, row, part = fields[0], fields[1], fields[2], fields[7]
        w, (_, rows, heads, count) = fields[HALF], whole.shape
        lanes, store = s["lanes"].at[w], _distance.store_lane_sums(self.lane_sums)

        def one_part():
            store(lanes, parts, (part * self.wgs + w) * count)

        def all_of_it():
            store(lanes, whole, ((b * rows + row * self.wgs + w) * heads + h) * count)

        plgpu.commit_smem()  # the sums of all four warps are there
        pl.when(part < 0)(all_of_it)
        pl.when(part >= 0)(one_part)
        plgpu.commit_smem()  # and have been read
        self.clear_lane_sums(s)

    def clear_lane_sums(self, s: dict) -> None:
        """Sets every thread's own sums over pairs to 0."""
        if self.lane_sums:
            shape = self.lane_sums, 128
            own = plgpu.Layout.WG_STRIDED(shape, vec_size=1)
            zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), own)
            s["lanes"].at[self.row_half()][...] = zero

    def compute(self, arrays, lists: Lists, outs, s: dict) -> None:
        self.clear_lane_sums(s)
        if self.writes_bias:
            s = s | dict(bias_gradient=outs[-1])
        super().compute(arrays, lists, outs, s)

    def sums_type(
        self, batch: int, heads: int, length: int, block: int, slots: int
    ) -> list:
        """Outputs of `store_sums`: sums by row, and of each warpgroup's pairs.

        For every item of the pattern's blocks, ``block`` rows each: these copies go on
        where an array ends.
        """
        blocks = -(-length // block) * _persistent.warpgroups(block)
        shapes = []
        if n := self.row_sums:
            shapes += [(n, batch, heads, blocks * 64), (n, slots, self.wgs * 64)]
        if n := self.lane_sums:
            shapes += [(batch, blocks, heads, n), (slots, self.wgs, n)]
        return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def sums_scratch(self) -> dict:
        """Shared memory of `store_sums`."""
        if not self.row_sums:
            return {}
        shape = (self.teams, self.row_sums, self.wgs, 64)
        lanes = lane_sums_scratch(self.teams, self.wgs, self.lane_sums)
        return dict(sums=plgpu.SMEM(shape, jnp.float32)) | lanes

    @property
    def scale_log2(self) -> float:
        """What makes logits in base 2 of what `with_bias` returns."""
        return self.scale * LOG2E


def room(bias: str) -> dict:
    """What a backward config leaves room for beside a kind of bias.

    One that is computed takes as many registers as a streamed one of 32 bits; a table
    or Gaussians take more, and sums in shared memory in place of tiles.
    """
    if bias in ("table", "gaussian"):
        return dict(points=True)
    if bias == "entry":
        return dict(entries=True)
    return dict(bias_dtype=_bias.STREAMED.get(bias, jnp.float32))


def largest_step(bias: str, head_dim: int, value_dim: int) -> dict:
    """Columns of a backward step beside a kind of bias, and warpgroups of a CTA.

    The most that leave enough registers.
    """
    narrow = max(head_dim, value_dim) <= 64
    if bias in ("table", "gaussian"):
        return dict(widest=32, wgs=2)
    if bias == "entry":
        return dict(widest=64, wgs=3 if narrow else 2)
    return dict(widest=128 if bias == "16 bits" and narrow else 64, wgs=2)


def first_fit(configs: Iterable, scratch: Callable) -> Any:
    """The first config whose ``scratch(config)`` fits, or the last."""
    for config in configs:
        if _persistent.fits(scratch(config)):
            break
    return config


def bias_stream(
    bar: Callable, lead: tuple[int, ...], shape: tuple[int, int], dtype: Any
) -> dict:
    """Shared memory and barriers of a bias whose tiles have that dtype; None: nothing.

    They arrive with the first stream, see `arrivals`: a wait less in every step.
    ``lead`` are teams, stages and warpgroups; ``shape`` is a warpgroup's tile.
    """
    if dtype is None:
        return {}
    _, stages, wgs = lead
    return dict(bias=_tiles.scratch(lead, *shape, dtype), bias_free=bar(stages, wgs))


def late_bias_stream(
    bar: Callable, lead: tuple[int, ...], shape: tuple[int, int], dtype: Any
) -> dict:
    """`bias_stream` with a barrier for its arrival: products start before it."""
    if dtype is None:
        return {}
    _, stages, wgs = lead
    full = bar(stages, arrivals(wgs, shape[1], dtype))
    return dict(bias_full=full, **bias_stream(bar, lead, shape, dtype))


def arrivals(wgs: int, columns: int, dtype: Any) -> int:
    """Copies of a step's bias, ``columns`` keys; dtype None: there is none."""
    return 0 if dtype is None else wgs * _tiles.parts(columns, dtype)[0]


def points_scratch(config: Any, columns: int, points: bool) -> dict:
    """Shared memory of the points of a step's columns; they are of the first stream."""
    shape = (config.teams, config.num_stages, 3, columns)
    return dict(points=plgpu.SMEM(shape, jnp.float32)) if points else {}


def entries_scratch(config: Any, wgs: int, columns: int, entries: bool) -> dict:
    """Shared memory of a bias by entry: the entries of steps, and one step's values.

    The former are of the first stream.
    """
    if not entries:
        return {}
    return dict(
        entry_list=_entries.list_scratch((config.teams, config.num_stages)),
        entries=_entries.tile_scratch((config.teams, wgs), columns),
    )


def values_scratch(teams: int, stages: int, wgs: int, values: tuple | None) -> dict:
    """Shared memory of the values of an item's queries, of their length and dtype."""
    if values is None:
        return {}
    return dict(values=_entries.value_scratch((teams, stages, wgs), *values))


def with_values(make: Callable, of_bias: _bias.InSmem) -> dict:
    """``make(*of_bias)``, the scratch of a CTA, without values if they do not fit."""
    scratch = make(*of_bias)
    if of_bias.values is not None and not _persistent.fits(scratch):
        return make(*of_bias[:3])
    return scratch


def lane_sums_scratch(teams: int, wgs: int, count: int) -> dict:
    """Shared memory of ``count`` sums over all pairs for each thread."""
    shape = (teams, wgs, count, 128)
    return dict(lanes=plgpu.SMEM(shape, jnp.float32)) if count else {}


def merge_sums(whole: Array, parts: Array, schedule: Schedule, block_rows: int, length):
    """``[n, B, H, length]``: row sums, those of split rows' parts added up."""
    out = []
    for x, pieces in zip(whole, parts, strict=True):
        x = jnp.swapaxes(x, 1, 2)[..., None]
        x = gradient.merge(x, pieces[..., None], schedule)
        out.append(jnp.swapaxes(_persistent.crop(x, length, block_rows)[..., 0], 1, 2))
    return jnp.stack(out)


def merge_lane_sums(whole: Array, parts: Array, schedule: Schedule) -> Array:
    """``[B, H, n]``: sums over all pairs."""
    return gradient.merge(whole, parts, schedule).sum(1)
