"""What the kernels share: persistent CTAs that walk the items of a schedule.

A CTA has one to four teams. A team is one load warp, which fetches tiles with TMA, and
one compute warpgroup for each 64 rows of a block; the load warps share a warpgroup. An
item is a row of blocks, or a part of one: *fixed* tiles, loaded once (the rows), and
*streams*, a tile for each step (the columns: partial blocks first, then full ones). A
stream's tile is freed for the load warp by every compute warpgroup of the team.

Of a block of 32 rows a warpgroup computes 64; `crop` drops the second half. Outputs
leave by shared memory, or, where they are too wide for what is left of it, straight
from registers, in whole blocks (`rows_of`, `write`).

A column that some rows do not see must not reach them as 0 * NaN. Entries of partial
blocks that have a column with a value that is not finite are therefore flagged; there,
and only there, such columns' tiles are set to zero in shared memory (`Walker.clean`),
and a NaN reaches the rows that do see the column by another way: see the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._common import MAX_SMEM_BYTES, NUM_FIELDS
from . import _bias, _elements, _entries, _tiles
from . import _registers as r
from ._bias import Bias, BlockBias, EntryBias, Streamed, TilePlace
from ._elements import Elements, Position
from ._manual_axes import per_device
from ._schedule import Schedule

Array = Any
FIRST_NAMED_BARRIER = 8
"""Mosaic numbers its own barriers from 0."""
LOAD_REGISTERS = 24
FLAGGED = 1 << 30
"""Added to the list entry of a partial block with a column that is not finite."""
HALF = NUM_FIELDS
"""In what `Walker.await_item` returns: which 64 rows this warpgroup computes."""
WIDEST_STAGED = 128
"""Columns of an output that leaves by shared memory."""
COMPUTE_REGISTERS = {1: 240, 2: 240, 3: 160, 4: 112}
"""Of a thread, by compute warpgroups of a CTA: what the load warpgroup leaves."""


class Lists(NamedTuple):
    """The pattern of a launch, in global memory.

    Attributes:
        partial: ``[n]`` int32, flattened lists of partial blocks.
        full: ``[m]`` int32, flattened lists of full blocks.
        elements: test of the partial blocks, or None if there are none.
        count: ``[workers]`` int32, items of each worker.
        items: flattened `Schedule.items`.
        bias: added to the scaled logits, or None.
    """

    partial: Array
    full: Array
    elements: Elements | None
    count: Array
    items: Array
    bias: Bias | None

    @classmethod
    def of(
        cls,
        partial: Array,
        full: Array,
        elements: Elements,
        schedule: Schedule,
        bias: Bias | None,
    ) -> Lists:
        """The lists of a schedule, as arrays on the device."""
        # The load warpgroup reads one entry of each list, whether it needs it or not.
        flat = lambda x: x.reshape(-1) if x.size else np.zeros(1, np.int32)
        if isinstance(bias, BlockBias):
            numbers = tuple(flat(x) for x in bias.numbers)
            bias = dataclasses.replace(bias, numbers=numbers)
        lists = cls(
            flat(partial),
            flat(full),
            elements if schedule.any_partial else None,
            schedule.count,
            schedule.items.reshape(-1),
            bias,
        )
        return jax.tree_util.tree_map(jnp.asarray, lists)


class Stream(NamedTuple):
    """Arrays whose tiles are loaded and freed together: ``(array, scratch name)``.

    Arrays are ``[B, C, heads, D]`` (tiles) or ``[B, heads, C]`` (one value a column).
    """

    name: str
    arrays: Sequence[tuple[Array, str]]


class Seen(NamedTuple):
    """What a step knows of its partial block.

    Attributes:
        at: where the warpgroup's tile stands.
        flagged: whether a column of the block has a value that is not finite.
        words: bits of its elements, as `_elements.fetch` returns them.
    """

    at: Position
    flagged: Array
    words: Array | None


class TeamBarriers(NamedTuple):
    """The barriers of one team, by stage."""

    all: Array
    team: Any

    def __getitem__(self, stage):
        return self.all.at[self.team, stage]


@dataclasses.dataclass(frozen=True)
class Teams:
    """How a CTA is divided into teams, and a kernel launched.

    Attributes:
        block_rows: rows of an item: 32, or 64 for each compute warpgroup; those of a
            block of the pattern, or of a tile of it.
        teams: teams of a CTA.
    """

    block_rows: int
    teams: int

    @property
    def wgs(self) -> int:
        """Compute warpgroups of a team."""
        return warpgroups(self.block_rows)

    def load(self, arrays, lists, s: dict) -> None:
        """The work of a team's load warp."""
        raise NotImplementedError

    def compute(self, arrays, lists, outs, s: dict) -> None:
        """The work of each of its compute warpgroups."""
        raise NotImplementedError

    def launch(
        self,
        arrays: tuple[Array, ...],
        lists: Any,
        out_type: Sequence[jax.ShapeDtypeStruct],
        scratch: dict,
        num_ctas: int,
        name: str,
    ) -> list[Array]:
        """Runs the kernel on arrays in, arrays out."""
        inputs, tree = jax.tree_util.tree_flatten((arrays, lists))

        def body(*refs):
            ins, outs, s = refs[: len(inputs)], refs[len(inputs) : -1], refs[-1]
            arrays_, lists_ = jax.tree_util.tree_unflatten(tree, ins)
            self.split_roles(arrays_, lists_, outs, s)

        run = plgpu.kernel(
            body,
            out_type=tuple(out_type),
            scratch_types=[scratch],
            grid=(num_ctas,),
            grid_names=("cta",),
            num_threads=self.teams * self.wgs + 1,
            thread_name="wg",
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True
            ),
        )
        return per_device(run)(*inputs)

    def split_roles(self, arrays, lists, outs, s) -> None:
        """The last warpgroup loads, a warp for each team; the others compute."""
        index, compute_wgs = lax.axis_index("wg"), self.wgs * self.teams

        @pl.when(index == compute_wgs)
        def _load():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _warps(team):
                @pl.when(team < self.teams)
                def _one():
                    self.load(arrays, lists, self.of_team(s, team))

        @pl.when(index < compute_wgs)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS[compute_wgs], action="increase")
            team = self.of_team(s, lax.div(index, jnp.int32(self.wgs)))
            self.compute(arrays, lists, outs, team)

    def of_team(self, s: dict, team) -> dict:
        """The scratch of one team and what all share, and its number in the CTA."""
        if self.teams == 1:
            team = 0

        def own(name, ref):
            if name.startswith("shared_"):
                return ref
            barrier = name.endswith(("_full", "_free"))
            return TeamBarriers(ref, team) if barrier else ref.at[team]

        return {name: own(name, ref) for name, ref in s.items()} | dict(team=team)

    def row_half(self):
        """Which 64 rows of a block this warpgroup computes.

        A shuffle, which compilers leave where it stands: not for loops.
        """
        return lax.rem(lax.axis_index("wg"), jnp.int32(self.wgs))


@dataclasses.dataclass(frozen=True)
class Walker(Teams):
    """One kernel's static sizes; its phases are the methods.

    Attributes:
        block_columns: columns of a block.
        tile: columns of one step.
        num_stages: tiles of a stream in flight.
        num_fixed_stages: fixed tiles in flight.
        ping_pong: whether two compute warpgroups take turns on the tensor core.
        staged: whether outputs leave by shared memory, if they are not too wide.
        group: query heads that share a key head.
        rows_are_queries: whether rows are queries and columns keys, or the reverse.
        any_partial: whether partial blocks may occur.
        items_per_worker: width of the schedule.
    """

    block_columns: int
    tile: int
    num_stages: int
    num_fixed_stages: int
    ping_pong: bool
    staged: bool
    group: int
    rows_are_queries: bool
    any_partial: bool
    items_per_worker: int

    @property
    def steps_per_block(self) -> int:
        return self.block_columns // self.tile

    def tiles(self, arrays) -> tuple[list[tuple[Array, str]], list[Stream]]:
        """The fixed arrays with their scratch names, and the streams."""
        raise NotImplementedError

    def attend(self, fields, arrays, lists, s, step0, stage):
        """Computes an item with at least one block; returns what `store` takes."""
        raise NotImplementedError

    def nothing(self):
        """What `attend` would return for an item without blocks."""
        raise NotImplementedError

    def store(self, result, fields, outs, s) -> None:
        """Writes an item's result."""
        raise NotImplementedError

    def worker(self, s: dict):
        """Whose items of the schedule this team computes."""
        return lax.axis_index("cta") * self.teams + s["team"]

    def rows_out(self, row, w):
        """Where the w-th 64 rows of a block stand in an output."""
        return pl.ds(row * self.wgs * 64 + w * 64, 64)

    # ------------------------------------------------------------------------- load

    def load(self, arrays, lists: Lists, s: dict) -> None:
        """Producer: each item's fields and fixed tiles, then tiles of the streams.

        Items are read one ahead, and so are block lists.
        """
        fixed, streams = self.tiles(arrays)
        per_block, worker = jnp.int32(self.steps_per_block), self.worker(s)

        def place(n):
            return (worker * self.items_per_worker + n) * NUM_FIELDS

        def read(n):
            n = jnp.minimum(n, self.items_per_worker - 1)
            return [lists.items[place(n) + f] for f in range(NUM_FIELDS)]

        def item(nth, carry):
            fields, step0 = carry
            _, h, _, _, pn, _, fn = fields[:7]
            following_fields = read(nth + 1)
            h_kv = h if self.group == 1 else lax.div(h, jnp.int32(self.group))
            h_row, h_col = (h, h_kv) if self.rows_are_queries else (h_kv, h)
            total = pn + fn

            stage = lax.rem(nth, jnp.int32(self.num_fixed_stages))
            plgpu.barrier_wait(s["fixed_free"][stage])
            copied = lists.items.at[pl.ds(place(nth), NUM_FIELDS)]
            to = s["item"].at[stage, pl.ds(0, NUM_FIELDS)]
            plgpu.copy_gmem_to_smem(copied, to, s["fixed_full"][stage])
            self.load_fixed(fields, h_row, fixed, lists, s, stage)

            step = functools.partial(
                self.load_step, fields, h_col, streams, lists, s, step0
            )
            lax.fori_loop(0, total * per_block, step, fields[9])
            return following_fields, step0 + total * per_block

        first = read(jnp.int32(0)), jnp.int32(0)
        lax.fori_loop(0, lists.count[worker], item, first)
        # Every arrival is waited for: interpret mode checks that barriers end at rest.
        for i in range(self.num_stages):
            for name in self.stream_names(streams, lists):
                plgpu.barrier_wait(s[f"{name}_free"][i])
        for i in range(self.num_fixed_stages):
            plgpu.barrier_wait(s["fixed_free"][i])

    def load_fixed(self, fields, head, fixed, lists: Lists, s: dict, stage) -> None:
        """Fetches an item's rows, and what they have of a bias by entry."""
        b, h, row = fields[:3]
        full = s["fixed_full"][stage]

        def rows(w):
            return pl.ds(row * self.block_rows + w * 64, 64)

        for array, name in fixed:
            for w in range(self.wgs):
                _tiles.fetch(array, (b, rows(w), head), s[name].at[stage, w], full)
        if "values" in s:
            for w in range(self.wgs):
                values = lists.bias.values.at[*lists.bias.entry(b, h), rows(w)]
                plgpu.copy_gmem_to_smem(values, s["values"].at[stage, w], full)

    def load_step(self, fields, head, streams, lists: Lists, s: dict, step0, n, block):
        """Fetches the n-th step's columns of an item; returns the next step's block.

        What belongs to the columns arrives with the first stream.
        """
        bias, per_block = lists.bias, jnp.int32(self.steps_per_block)
        slot = lax.rem(step0 + n, jnp.int32(self.num_stages))
        following = self.listed(
            fields, (lists.partial, lists.full), lax.div(n + 1, per_block)
        )
        part = lax.rem(n, per_block) * self.tile
        column = block * self.block_columns + part
        columns = pl.ds(column, self.tile)
        for stream in streams:
            full = s[f"{stream.name}_full"][slot]
            plgpu.barrier_wait(s[f"{stream.name}_free"][slot])
            for array, name in stream.arrays:
                to = s[name].at[slot]
                if len(array.shape) == 4:
                    _tiles.fetch(array, (fields[0], columns, head), to, full)
                else:
                    copied = array.at[fields[0], head, columns]
                    plgpu.copy_gmem_to_smem(copied, to, full)

            if stream is streams[0]:
                self.load_beside(fields, bias, columns, block, s, slot, full)

        full = s[f"{streams[0].name}_full"][slot]
        if _bias.streamed(bias):
            if "bias_full" in s:
                full = s["bias_full"][slot]
            nth = lax.div(n, per_block)
            self.load_bias(fields, bias, nth, column, s, slot, full)
        return following

    def load_beside(self, fields, bias, columns, block, s: dict, slot, full) -> None:
        """Fetches what a step's columns have of a bias by distance or by entry.

        Before the other streams' places are free: where two steps are in flight, these
        are given back only by who has seen the first stream of the next.
        """
        if "points" in s:
            points = bias.columns_at(fields[0], columns)
            plgpu.copy_gmem_to_smem(points, s["points"].at[slot], full)
        if "entry_list" in s:
            place = self.block_of(fields, bias, block)
            _entries.fetch(bias, place, s["entry_list"].at[slot], full)

    def load_bias(
        self, fields, bias: Streamed, nth, column, s: dict, slot, full
    ) -> None:
        """Fetches the bias of a step of the nth block, a tile for each warpgroup.

        It arrives at ``full``: a barrier of its own, or the first stream's.
        """
        number = 0
        if isinstance(bias, BlockBias):
            number = self.listed(fields, bias.numbers, nth)
        plgpu.barrier_wait(s["bias_free"][slot])
        for w in range(self.wgs):
            row = fields[2] * self.block_rows + w * 64
            first = (row, column) if self.rows_are_queries else (column, row)
            place = TilePlace(*bias.entry(*fields[:2]), *first, number)
            _bias.fetch(bias, place, s["bias"].at[slot, w], full)

    def block_of(self, fields, bias: EntryBias, column) -> tuple:
        """Batch entry, query block and key block of a step of a column of blocks."""
        entry = fields[0] if bias.lists.shape[0] > 1 else 0
        rows = bias.blocks[0 if self.rows_are_queries else 1]
        row = lax.div(fields[2] * self.block_rows, jnp.int32(rows))
        return entry, *((row, column) if self.rows_are_queries else (column, row))

    def stream_names(self, streams: Sequence[Stream], lists: Lists) -> list[str]:
        """Of all streams; that of the bias is freed apart from its step's others."""
        return [x.name for x in streams] + ["bias"] * _bias.streamed(lists.bias)

    def listed(self, fields, lists: tuple[Array, Array], n):
        """The n-th of an item's entries, partial ones first; at most the last."""
        p0, pn, f0, fn = fields[3:7]
        if not self.any_partial:
            return lists[1][f0 + jnp.minimum(n, fn - 1)]
        partial = lists[0][p0 + jnp.minimum(n, jnp.maximum(pn - 1, 0))]
        partial &= FLAGGED - 1
        full = lists[1][f0 + jnp.clip(n - pn, 0, jnp.maximum(fn - 1, 0))]
        return jnp.where(n < pn, partial, full)

    # ---------------------------------------------------------------------- compute

    def compute(self, arrays, lists: Lists, outs, s: dict) -> None:
        """Consumer: 64 rows of each item."""
        _, streams = self.tiles(arrays)
        for i in range(self.num_stages):
            for name in self.stream_names(streams, lists):
                plgpu.barrier_arrive(s[f"{name}_free"][i])
        for i in range(self.num_fixed_stages):
            plgpu.barrier_arrive(s["fixed_free"][i])
        if self.ping_pong:
            # Warpgroup 1 gives the first turn to warpgroup 0.
            w = self.row_half()
            pl.when(w == 1)(functools.partial(self.pass_turn, s, w))
        self.items(arrays, lists, outs, s)
        plgpu.wait_smem_to_gmem(0)

    def items(self, arrays, lists: Lists, outs, s: dict) -> None:
        """Computes and stores one item after another."""

        def item(nth, step0):
            fields, stage = self.await_item(nth, s)
            total = self.total_steps(fields)

            @pl.when(total > 0)
            def _rows():
                result = self.attend(fields, arrays, lists, s, step0, stage)
                self.store(result, fields, outs, s)

            @pl.when(total == 0)
            def _empty():
                self.free_empty(s, stage)
                self.store(self.nothing(), fields, outs, s)

            return step0 + total

        lax.fori_loop(0, lists.count[self.worker(s)], item, jnp.int32(0))

    def await_item(self, nth, s: dict):
        """Fields of the n-th item, and `HALF`; the stage with its fixed tiles."""
        stage = lax.rem(nth, jnp.int32(self.num_fixed_stages))
        plgpu.barrier_wait(s["fixed_full"][stage])
        fields = [s["item"][stage, f] for f in range(NUM_FIELDS)]
        return [*fields, self.row_half()], stage

    def free_empty(self, s: dict, stage) -> None:
        """Frees the fixed tiles of an item without blocks, once its fields are read."""
        r.fence_reads()()
        plgpu.barrier_arrive(s["fixed_free"][stage])

    def first_slot(self, step0):
        """Stage of a stream that holds the first step of an item."""
        return lax.rem(step0, jnp.int32(self.num_stages))

    def following(self, slot):
        """The stage after another: cheaper than a remainder in every step."""
        return jnp.where(slot == self.num_stages - 1, 0, slot + 1)

    def await_operands(self, n, total, slot, s: dict, names: Sequence[str]) -> None:
        """Waits for the tiles of step n, in a slot, if there is one.

        Also a branch, which ptxas does not move a wait for products across; it would
        otherwise move it up into the arithmetic before.
        """

        @pl.when(n < total)
        def _():
            for name in names:
                plgpu.barrier_wait(s[f"{name}_full"][slot])

    def take_turn(self, s: dict, w) -> None:
        """Waits until the other warpgroup has passed the tensor core."""
        if self.ping_pong:
            r.named_barrier("sync")(FIRST_NAMED_BARRIER + 2 * s["team"] + w)

    def pass_turn(self, s: dict, w) -> None:
        """Passes the tensor core to the other warpgroup."""
        if self.ping_pong:
            r.named_barrier("arrive")(FIRST_NAMED_BARRIER + 2 * s["team"] + 1 - w)

    def masked(self, fields, lists: Lists, fill: float) -> Callable | None:
        """``f(seen, x)``: the element test of a step; None if no block is partial."""
        if not self.any_partial:
            return None
        test = _elements.apply(lists.elements, self.tile, fill, self.rows_tested)
        return lambda seen, x: test(x, seen.at, seen.words)

    @property
    def rows_tested(self) -> int:
        """Rows of a block that a warpgroup computes."""
        return min(self.block_rows, 64)

    def entry(self, fields, lists: Lists, n):
        """List entry of partial step n; beyond them, any that exists."""
        at = fields[3] + lax.div(n, jnp.int32(self.steps_per_block))
        return lists.partial[jnp.minimum(at, lists.partial.shape[0] - 1)]

    def look(self, fields, lists: Lists, n, entry) -> Seen:
        """What step n, which is partial, needs of its block: read before its products.

        Read after them, each of these loads would keep a warpgroup waiting.
        """
        elements, (b, _, row) = lists.elements, fields[:3]
        nth = lax.div(n, jnp.int32(self.steps_per_block))
        part = lax.rem(n, jnp.int32(self.steps_per_block)) * self.tile
        words, of_batch, rows_per_block = 0, 0, self.block_rows
        if elements.bits is not None:
            rows_per_block, words = elements.bits.shape[-2:]
            of_batch = elements.bits.shape[1] if elements.bits.shape[0] > 1 else 0
        first = row * self.block_rows + fields[HALF] * 64
        bit_row = (fields[8] + nth + b * of_batch) * rows_per_block
        word = (bit_row + lax.rem(first, rows_per_block)) * words
        word += lax.div(part, jnp.int32(32))
        column = (entry & (FLAGGED - 1)) * self.block_columns + part
        at = Position(b, first, column, word)
        fetch = _elements.fetch(elements, self.tile, self.rows_tested)
        return Seen(at, entry >= FLAGGED, fetch(at))

    def look_first(self, fields, lists: Lists) -> Seen | None:
        """`look` for the first step, if its block is partial; else what is not used."""
        if not self.any_partial:
            return None

        def seen(_):
            first = jnp.int32(0)
            return self.look(fields, lists, first, self.entry(fields, lists, first))

        def nothing(_):
            zero = jnp.int32(0)
            words = _elements.no_words(lists.elements)
            return Seen(Position(*4 * [zero]), zero > 0, words)

        return lax.cond(fields[4] > 0, seen, nothing, 0)

    def token(self, fields, lists: Lists, column):
        """Position of a column in the flattened ``elements.bad``."""
        _, heads, length = lists.elements.bad.shape
        h = fields[1]
        if self.rows_are_queries and self.group > 1:
            h = lax.div(h, jnp.int32(self.group))
        return (fields[0] * heads + h) * length + column

    def clean(self, fields, lists: Lists, seen: Seen, tiles: Sequence[Array]) -> None:
        """Sets columns that are not finite to zero in the tiles of a partial step."""

        @pl.when(seen.flagged)
        def _():
            first = self.token(fields, lists, seen.at.column)
            for tile in tiles:
                count, rows, width = tile.shape
                clear = _elements.zero_columns(rows, count * width)
                clear(tile, lists.elements.bad, first)
            plgpu.commit_smem()

    def steps(self, fields, lists: Lists, step: Callable, carry, first: int):
        """``step(n, carry, seen)`` for the item's steps from ``first`` on.

        ``seen`` is None where the block is full. List entries are read a step ahead.
        """
        partial = fields[4] * self.steps_per_block
        first_full = jnp.int32(first)
        if self.any_partial:

            def masked_step(n, carry):
                entry, carry = carry
                seen = self.look(fields, lists, n, entry)
                following = self.entry(fields, lists, n + 1)
                return following, step(n, carry, seen)

            start = self.entry(fields, lists, jnp.int32(first)), carry
            _, carry = lax.fori_loop(first, partial, masked_step, start)
            first_full = jnp.maximum(partial, first)
        full_step = functools.partial(step, seen=None)
        return lax.fori_loop(first_full, self.total_steps(fields), full_step, carry)

    def mask_first(self, fields, mask: Callable | None, seen: Seen | None, x):
        """Tests the elements of the first step if its block is partial."""
        if mask is None:
            return x
        test = functools.partial(mask, seen)
        return lax.cond(fields[4] > 0, test, lambda x: x, x)

    def clean_first(self, fields, lists: Lists, seen: Seen | None, tiles) -> None:
        """`clean` for the first step, if its block is partial."""
        if self.any_partial:
            step = functools.partial(self.clean, fields, lists, seen, tiles)
            pl.when(fields[4] > 0)(step)

    def total_steps(self, fields):
        """Steps of an item."""
        return (fields[4] + fields[6]) * self.steps_per_block


def warpgroups(block_rows: int) -> int:
    """Compute warpgroups for the rows of a block."""
    return max(1, block_rows // 64)


def barriers(teams: int, count: int, arrivals: int) -> plgpu.Barrier:
    """``count`` barriers for each team."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=(teams, count))


def item_slots(teams: int, stages: int) -> plgpu.SMEM:
    """The fields of items, each where a TMA copy may write: at 128 bytes."""
    return plgpu.SMEM((teams, stages, 32), jnp.int32)


def fits(scratch: dict) -> bool:
    """Whether a multiprocessor has room for the scratch of a CTA."""
    return _bytes(scratch) <= MAX_SMEM_BYTES - 1024


def _bytes(scratch: dict) -> int:
    """Each array starts at a multiple of 1024 bytes."""
    arrays = [x for x in scratch.values() if not isinstance(x, plgpu.Barrier)]
    sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays]
    return sum(-(-size // 1024) * 1024 for size in sizes)


def check_smem(who: str, config: Any, scratch: dict) -> None:
    """Refuses a config whose scratch does not fit, before anything is lowered."""
    if not fits(scratch):
        need = _bytes(scratch)
        raise ValueError(
            f"{who}: {config} needs {need} bytes of shared memory; a multiprocessor "
            f"has {MAX_SMEM_BYTES}. Use fewer stages."
        )


class Output(NamedTuple):
    """64 rows of an output: a tile, or one value a row.

    Attributes:
        values: of the rows.
        name: of their scratch. What has none goes straight from registers.
        array: where they go.
        index: of the rows in it.
        first: column of a tile in it.
    """

    values: Array
    name: str
    array: Array
    index: tuple
    first: Any = 0


def write(s: dict, w, *outputs: Output) -> None:
    """Writes a warpgroup's rows."""
    staged = [x for x in outputs if x.name in s]
    if staged:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for x in staged:
            place = s[x.name].at[w]
            if x.values.ndim == 1:
                place[...] = x.values
            else:
                _tiles.store(x.values.shape[1], x.values.dtype)(place, x.values)
        plgpu.commit_smem()
    for x in outputs:
        if x.name not in s:
            r.store(x.array.at[x.index], x.values)
        elif x.values.ndim == 1:
            plgpu.copy_smem_to_gmem(s[x.name].at[w], x.array.at[x.index])
        else:
            _tiles.write(s[x.name].at[w], x.array, x.index, x.first)


def staging(tile: Callable, wgs: int, staged: bool, **columns: int) -> dict:
    """Shared memory of the outputs that leave by it, made by ``tile(lead, 64, n)``."""
    fit = staged * WIDEST_STAGED
    return {
        name: tile((wgs,), 64, count) for name, count in columns.items() if count <= fit
    }


def rows_of(length: int, block_rows: int, columns: int, staged: bool) -> int:
    """Rows of an output: of whole blocks, unless a copy can end with the array."""
    if block_rows >= 64 and columns <= WIDEST_STAGED and staged:
        return length
    return -(-length // block_rows) * warpgroups(block_rows) * 64


def crop(x: Array, length: int, block_rows: int) -> Array:
    """The first ``length`` rows of an output of `rows_of`."""
    if block_rows < 64:
        batch, _, *rest = x.shape
        x = x.reshape(batch, -1, 64, *rest)[:, :, :block_rows]
        x = x.reshape(batch, -1, *rest)
    return x[:, :length]
