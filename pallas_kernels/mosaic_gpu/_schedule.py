"""The work list of a launch: which worker computes which part of which row, and when.

Made from the block counts: on the host with NumPy, balanced by a list scheduler, where
the pattern is known before tracing; on the device in a few vector operations where it
is traced. A kernel only reads the arrays. A row here is a row of blocks: of queries for
the forward and dq kernels, of keys for the dk and dv kernel.

An item is ``NUM_FIELDS`` int32: batch, query head, row, first and number of its partial
list entries, first and number of its full ones (both as positions in the flattened
lists), the workspace slot of its partial result, or -1 if the item is the whole row and
writes the output itself, the bit block of its first partial entry, and the column of
its first block, which spares the load warps a read before the first tile. Fields 10 and
11 are unused.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._common import NUM_FIELDS

Array = Any
ROW_COST = 1.0
"""Fixed cost of an item in units of one block: load the row, start, write out."""
MIN_PART = 3
"""Fewest blocks of a part of a split row."""
MERGE_COST = 4.0
"""Cost of merging the parts of split rows, whatever their number: a second kernel."""
MOST_PARTS = 8
"""Most parts of a row that is split on the device."""
MOST_COMPARED = 4096
"""Most rows that are sorted by comparing each with all."""
MOST_TOGETHER = 16
"""Entries that share a bias and run side by side: more would crowd their keys out."""


class Blocks(NamedTuple):
    """Blocks of one kind, listed by row.

    Attributes:
        count: ``[B or 1, H or 1, n]`` int32.
        column: ``[B or 1, H or 1, n, capacity]`` int32.
    """

    count: Array
    column: Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Work of one launch; arrays are NumPy's if made on the host.

    Attributes:
        count: ``[workers]`` int32, items of each worker.
        items: ``[workers, most, NUM_FIELDS]`` int32, zero beyond the count.
        split_rows: ``[s, 3]`` int32: batch, head, row of each row that has slots,
            ascending.
        split_slots: ``[s, parts]`` int32 workspace slots of its parts, -1 where a row
            has fewer.
        num_slots: workspace slots in use.
        any_partial: whether there may be partial blocks.
    """

    count: Array
    items: Array
    split_rows: Array
    split_slots: Array
    num_slots: int
    any_partial: bool


def schedule_on_host(
    partial: Blocks,
    full: Blocks,
    *,
    batch: int,
    heads: int,
    workers: int,
    group: int = 1,
    tiles: int = 1,
    share: int = 1,
    one_bias: tuple[bool, bool] = (False, False),
) -> Schedule:
    """Balances the rows of a known pattern over persistent workers.

    Items come head by head, so that what is loaded stays in the L2 cache, and longest
    first within a head; each goes to the worker that is free first. A few heads or
    batch entries that share a bias take turns, row by row, so that its tiles stay there
    too. A row that would end after the fair share of a worker is cut there and the rest
    goes on elsewhere (McNaughton's wrap-around rule), so only the last rows are split,
    or the only ones; none is where that gains less than `MERGE_COST`.

    Args:
        partial: partial blocks, NumPy arrays.
        full: full blocks.
        batch: batch entries of the launch.
        heads: query heads of the launch.
        workers: walkers of the schedule.
        group: query heads whose items must follow one another on one worker, because
            they add to one result; above 1 nothing is split.
        tiles: rows of the launch that share a list: the tiles of a row of blocks.
        share: workers, one after another, that compute each item together: an even part
            of its blocks each.
        one_bias: whether batch entries, and whether heads, share a bias.

    Returns:
        The schedule, a function of the arguments only.
    """
    rows = _Rows.of(np, partial, full, batch, heads, tiles)
    b, h, i = np.unravel_index(np.arange(len(rows.total)), rows.shape)
    if group == 1:
        outer, inner = _turns(b, h, batch, heads, one_bias)
        order = np.lexsort((inner, i, -rows.total, outer))
        jobs = rows.total, order, workers // share
        pieces = _assign(*jobs, split=False)
        cost = _costs(pieces, workers // share)
        # Cuts could save no more than what the longest is above the mean.
        if cost.max() - cost.mean() > MERGE_COST:
            cut = _assign(*jobs, split=True)
            saved = cost.max() - _costs(cut, workers // share).max()
            pieces = cut if saved > MERGE_COST else pieces
    else:
        pieces = _assign_groups(rows, b, h, i, workers, group)
    slots, split, split_slots = _slots(pieces[:, 1], len(rows.total))
    pieces = np.concatenate([pieces, slots[:, None]], 1)
    owner, which, begin, end, slots = _shared(pieces, share).T
    items = rows.items(np, which, begin, end, slots)
    count = np.bincount(owner, minlength=workers)
    padded = np.zeros((workers, max(1, int(count.max())), NUM_FIELDS), np.int32)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    padded[owner, nth] = items
    return Schedule(
        count.astype(np.int32),
        padded,
        np.stack([b[split], h[split], i[split]], 1).astype(np.int32),
        split_slots,
        int(slots.max(initial=-1)) + 1,
        bool(partial.count.any()),
    )


def schedule_on_device(
    partial: Blocks,
    full: Blocks,
    *,
    batch: int,
    heads: int,
    workers: int,
    group: int = 1,
    tiles: int = 1,
    share: int = 1,
    one_bias: tuple[bool, bool] = (False, False),
) -> Schedule:
    """`schedule_on_host` for traced lists.

    Rows go to the workers in turns, head by head and longest first within a head, to
    and fro. If there are too few for the workers, each is cut into the same number of
    even parts.
    """
    rows = _Rows.of(jnp, partial, full, batch, heads, tiles)
    num_rows, num_ctas, parts = len(rows.total), workers // share, 1
    if group == 1 and num_rows * share < num_ctas:
        parts = min(MOST_PARTS, -(-2 * num_ctas // (num_rows * share)))
    b, h, i = np.unravel_index(np.arange(num_rows), rows.shape)
    if group == 1:
        outer, inner = _turns(b, h, batch, heads, one_bias)
        order = _longest_first(outer, rows.total, (inner, i))
    else:
        # Heads of a group one after another; the row's place is that of their sum.
        load = rows.total.reshape(batch, heads // group, group, -1).sum(2)
        load = jnp.repeat(load, group, 1).reshape(-1)
        order = _longest_first(b * heads + h // group * group, load, (h, i))
    which = jnp.repeat(order, parts)
    part = jnp.tile(jnp.arange(parts), num_rows)
    begin = rows.total[which] * part // parts
    end = rows.total[which] * (part + 1) // parts
    slots = which * parts + part if parts > 1 else jnp.full(len(which), -1)
    which, slots, begin, length = (
        jnp.repeat(x, share) for x in (which, slots, begin, end - begin)
    )
    nth = np.tile(np.arange(share), len(which) // share)
    cuts = (begin + length * n // share for n in (nth, nth + 1))
    items = rows.items(jnp, which, *cuts, slots)
    turns = -(-len(items) // (workers * group))
    padded = jnp.zeros((turns * workers * group, NUM_FIELDS), jnp.int32)
    padded = padded.at[: len(items)].set(items)
    used = np.arange(len(padded)) < len(items)

    def dealt(xp, x):
        """``[workers, turns * group, ...]``, to and fro."""
        x = x.reshape(turns, num_ctas, share, group, -1)
        back = np.arange(turns)[:, None, None, None, None] % 2 == 1
        x = xp.where(back, x[:, ::-1], x)
        return xp.moveaxis(x, 0, 2).reshape(workers, turns * group, -1)

    split = np.arange(num_rows if parts > 1 else 0)
    return Schedule(
        dealt(np, used).sum((1, 2)).astype(np.int32),
        dealt(jnp, padded),
        np.stack([b[split], h[split], i[split]], 1).astype(np.int32),
        np.arange(len(split) * parts, dtype=np.int32).reshape(-1, parts),
        len(split) * parts,
        partial.column.shape[-1] > 0,
    )


def _longest_first(outer: np.ndarray, load: Array, ties: tuple) -> Array:
    """Rows by a key known before tracing, the longest first, then by ``ties``.

    That is ``lexsort((*ties, -load, outer))``. A row's place is the number of rows that
    come before it: comparing all with all is one launch, a sort of few rows many.
    """
    base = np.lexsort((*ties, outer)).astype(np.int32)
    if len(base) > MOST_COMPARED:
        return jnp.lexsort((*ties, -load, outer))
    load, nth = load[base], jnp.arange(len(base), dtype=jnp.int32)
    most = load.max(initial=0)
    key = outer[base].astype(np.int32) * (most + 1) + most - load
    tied = (key == key[:, None]) & (nth < nth[:, None])
    before = (key < key[:, None]) | tied
    place = before.sum(1, dtype=jnp.int32)
    return jnp.zeros_like(base).at[place].set(base, unique_indices=True)


def _turns(b, h, batch: int, heads: int, one_bias: tuple[bool, bool]):
    """Outer and inner sort keys of each row: entries of one outer key run together."""
    over_batch, over_heads = one_bias
    entry = h * batch + b if over_batch else b * heads + h
    sharers = (batch if over_batch else 1) * (heads if over_heads else 1)
    together = min(sharers, MOST_TOGETHER)
    return entry // together, entry % together


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Every row of a launch, flattened over ``shape = (batch, heads, n)``."""

    shape: tuple[int, int, int]
    blocks: tuple[Blocks, Blocks]
    partial: Array
    total: Array
    index: np.ndarray
    first_bits: Array

    @classmethod
    def of(
        cls,
        xp: Any,
        partial: Blocks,
        full: Blocks,
        batch: int,
        heads: int,
        tiles: int,
    ) -> _Rows:
        """Rows of the lists, each ``tiles`` times."""
        counts = xp.asarray(partial.count)
        shape = (batch, heads, counts.shape[-1] * tiles)
        # Bits are counted within a batch entry, in list order, heads outermost.
        per_entry = counts.reshape(counts.shape[0], -1)
        first_bits = (xp.cumsum(per_entry, 1) - per_entry).reshape(counts.shape)
        index = np.arange(counts.size).reshape(counts.shape)

        def flat(np_, x):
            return np_.broadcast_to(np_.repeat(x, tiles, -1), shape).reshape(-1)

        return cls(
            shape,
            (partial, full),
            flat(xp, counts),
            flat(xp, counts + xp.asarray(full.count)),
            flat(np, index),
            flat(xp, first_bits),
        )

    def items(self, xp, which, begin, end, slots) -> Array:
        """Items of blocks ``begin`` to ``end`` of rows ``which``."""
        partial = self.partial[which]
        p_begin, p_end = xp.minimum(begin, partial), xp.minimum(end, partial)
        numbers = p_end - p_begin, end - begin - (p_end - p_begin)
        index, starts, columns = xp.asarray(self.index)[which], [], []
        skipped = p_begin, begin - p_begin
        for blocks, skip, number in zip(self.blocks, skipped, numbers, strict=True):
            column = xp.asarray(blocks.column)
            # Walkers read an entry of either list, also of one that has none for them.
            start = index * column.shape[-1] + xp.where(number > 0, skip, 0)
            # An empty list, or the end of one, is read here and not used.
            column = xp.concatenate([column.reshape(-1), xp.zeros(1, column.dtype)])
            starts.append(start)
            columns.append(column[xp.minimum(start, len(column) - 1)])
        first = xp.where(numbers[0] > 0, *columns)
        fields = [
            *xp.unravel_index(which, self.shape),
            *(starts[0], numbers[0], starts[1], numbers[1]),
            *(slots, self.first_bits[which] + p_begin),
            xp.where(end > begin, first, 0),
            *(xp.zeros_like(begin), xp.zeros_like(begin)),
        ]
        return xp.stack(fields, 1).astype(xp.int32)


def _assign_groups(rows: _Rows, b, h, i, workers: int, group: int) -> np.ndarray:
    """Pieces as in `_assign`, where ``group`` heads of a row make one job."""
    batch, heads, n = rows.shape
    jobs = (batch, heads // group, group, n)
    load = rows.total.reshape(jobs).sum(2).reshape(-1)
    job_head = np.arange(len(load)) // n
    order = np.lexsort((np.arange(len(load)), -load, job_head))
    made = _assign(load, order, workers, split=False)
    ids = np.arange(len(rows.total)).reshape(jobs).swapaxes(2, 3).reshape(-1, group)
    which = ids[made[:, 1]].reshape(-1)
    owner = np.repeat(made[:, 0], group)
    begin = np.zeros_like(which)
    return np.stack([owner, which, begin, rows.total[which]], 1)


def _assign(
    total: np.ndarray, order: np.ndarray, workers: int, split: bool
) -> np.ndarray:
    """``[n, 4]``: worker, row, first and end block of each piece, in the order made."""
    fair = (total.sum() + ROW_COST * len(total)) / workers
    if len(total) < workers:
        # Each worker then starts about one piece, whoever its row belongs to.
        fair = total.sum() / workers + ROW_COST
    free = [(0.0, worker) for worker in range(workers)]
    pieces = []
    for row in order.tolist():
        begin, end = 0, int(total[row])
        while True:
            at, worker = free[0]
            room = max(math.ceil(fair - at - ROW_COST), MIN_PART)
            stop = end
            if split and end - begin > room + 1 and end - begin >= 2 * MIN_PART:
                stop = min(begin + room, end - MIN_PART)
            heapq.heapreplace(free, (at + stop - begin + ROW_COST, worker))
            pieces.append((worker, row, begin, stop))
            begin = stop
            if begin == end:
                break
    return np.asarray(pieces, np.int64).reshape(-1, 4)


def _shared(pieces: np.ndarray, share: int) -> np.ndarray:
    """``[n * share, 5]``: pieces by worker, each cut for ``share`` of them."""
    owner, which, begin, end, slots = pieces[:, :, None].swapaxes(0, 1)
    nth = np.arange(share)
    cuts = [begin + (end - begin) * n // share for n in (nth, nth + 1)]
    parts = np.broadcast_arrays(owner * share + nth, which, *cuts, slots)
    parts = np.stack([x.reshape(-1) for x in parts], 1)
    return parts[np.argsort(parts[:, 0], kind="stable")]


def _costs(pieces: np.ndarray, workers: int) -> np.ndarray:
    """What each worker has to do."""
    worker, _, begin, end = pieces.T
    return np.bincount(worker, end - begin + ROW_COST, workers)


def _slots(rows: np.ndarray, num_rows: int):
    """Workspace slots of the pieces, the rows that have several, and their slots."""
    parts = np.bincount(rows, minlength=num_rows)
    which = np.flatnonzero(parts > 1)
    slots = np.full(len(rows), -1, np.int64)
    shared = np.flatnonzero(parts[rows] > 1)
    shared = shared[np.argsort(rows[shared], kind="stable")]
    slots[shared] = np.arange(len(shared))
    nth = np.arange(int(parts.max(initial=1)) if len(which) else 0)
    first = np.cumsum(parts[which]) - parts[which]
    split_slots = np.where(nth < parts[which, None], first[:, None] + nth, -1)
    return slots, which, split_slots.astype(np.int32)
