"""In which order the steps of a launch add their parts of dq.

The kernel of all gradients walks rows of keys. Each of its steps adds its part of dq,
in float32, to a sum that other workers add to as well. A sum repeats bit for bit if its
parts come in one order, and few workers wait for others if that is the order in which
they would come: so the schedule is played beforehand, one unit of time a step.

Nobody waits for ever: a part waits only for parts of less time, or of the same and of a
worker before, and so does all that its worker does before.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jsparse.pallas_kernels.mosaic_gpu._schedule import ROW_COST, Blocks, Schedule

MOST_STEPS = 1 << 22
"""Of a launch: what a host sorts in some seconds, and 32 MB of turns."""
FEWEST = 16
"""Steps of a tile, on average, for which its sums are worth their way through memory.

Cases with fewer and with more were timed; see ``ffi/README.md``.
"""
MIN_PARTS = 4
"""Parts that a sum may always have."""
SHARE = 3
"""A sum has at most a third as many parts as a worker has steps of a head."""
SUMS_BESIDE_A_BIAS = 3
"""Most sums of a tile beside a bias, whose way through the L2 cache drives them out."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Rows begin at multiples of it: evenly spread, whichever rows run side by side."""


class Turns(NamedTuple):
    """See ``jsparse_turns`` in ``ffi/include/jsparse/backward.h``.

    Attributes:
        turns: ``[steps, 2]`` int32, the sum of each step and its place among its parts.
        sums_of: ``[B, H, tiles, 2]`` int32, first and number of each tile's sums.
        num_sums: sums in all.
    """

    turns: np.ndarray
    sums_of: np.ndarray
    num_sums: int


def worth(steps: int, tiles: int) -> bool:
    """Whether dq of so many tiles, of so many steps, is computed by key."""
    return max(FEWEST * tiles, 1) <= steps <= MOST_STEPS


def num_steps(partial: Blocks, full: Blocks, batch: int, heads: int, split: int) -> int:
    """Steps of a launch in which a block is ``split`` steps."""
    blocks = partial.count + full.count
    return int(np.broadcast_to(blocks, (batch, heads, blocks.shape[-1])).sum()) * split


def with_turns(
    schedule: Schedule,
    partial: Blocks,
    full: Blocks,
    shape: tuple[int, int, int],
    split: int,
    most_sums: int | None = None,
) -> tuple[Schedule, Turns]:
    """A schedule made on the host, whose items know their turns, and those.

    A tile with many parts has several sums, which take turns: each part is waited for,
    also by those for which it is not ready in time.

    Args:
        schedule: by rows of keys.
        partial: the lists that it was made of.
        full: the lists that it was made of.
        shape: batch entries, query heads and tiles of queries.
        split: tiles of a block, each a step.
        most_sums: of a tile.
    """
    used = np.arange(schedule.items.shape[1]) < schedule.count[:, None]
    worker = np.nonzero(used)[0]
    items = schedule.items[used].astype(np.int64)
    batch, head, row, first_partial, num_partial, first_full, num_full = items.T[:7]
    steps = (num_partial + num_full) * split
    first_turn = np.cumsum(steps) - steps
    # Each worker starts at 0.
    end = np.cumsum(steps + int(ROW_COST) * split)
    start = end - steps
    start -= np.concatenate([[0], end])[np.searchsorted(worker, worker)]

    which = np.repeat(np.arange(len(items)), steps)
    nth = np.arange(len(which)) - first_turn[which]
    block, tile = np.divmod(nth, split)
    begin = ((row * GOLDEN) % 1 * (1 << 16)).astype(np.int64)
    column = np.zeros_like(block)
    kinds = (partial, first_partial, num_partial), (full, first_full, num_full)
    for lists, first, count in kinds:
        here = (block >= 0) & (block < count[which])
        at, of = block[here], which[here]
        at = (at + (begin * count >> 16)[of]) % count[of]
        column[here] = lists.column.reshape(-1)[first[of] + at]
        block = block - count[which]
    place = (batch * shape[1] + head)[which] * shape[2] + column * split + tile

    order = np.lexsort((worker[which], start[which] + nth, place))
    count = np.bincount(place, minlength=np.prod(shape))
    rank = np.empty_like(place)
    rank[order] = np.arange(len(place)) - (np.cumsum(count) - count)[place[order]]
    of_head = -(-len(place) // (shape[0] * shape[1] * len(schedule.count)))
    sums = -(-count // max(MIN_PARTS, of_head // SHARE))
    if most_sums is not None:
        sums = np.minimum(sums, most_sums)
    first_sum = np.cumsum(sums) - sums
    turn, nth_sum = np.divmod(rank, sums[place])

    fields = schedule.items.copy()
    fields[used, 10], fields[used, 11] = first_turn, begin
    turns = Turns(
        np.stack([first_sum[place] + nth_sum, turn], 1).astype(np.int32),
        np.stack([first_sum, sums], 1).astype(np.int32).reshape(*shape, 2),
        int(sums.sum()),
    )
    return dataclasses.replace(schedule, items=fields), turns
