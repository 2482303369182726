"""The work list of a launch: which CTA computes which part of which row, in what order.

Made on the host with NumPy from the block counts. A kernel's adapter calls
`make_schedule` once per pattern; the kernel only reads the arrays.

An item is ``NUM_FIELDS`` int32: batch, head, query block, first and number of its
partial list entries, first and number of its full ones (both as positions in the
flattened lists), the workspace slot of its partial result, or -1 if the item is the
whole row and writes ``out`` itself, and the bit block of its first partial entry.
"""

from __future__ import annotations

import dataclasses
import heapq
import math

import numpy as np

from .._common import NUM_FIELDS

ROW_COST = 1.0
"""Fixed cost of an item in units of one block: load q, start, write out."""
MIN_PART = 3
"""Fewest blocks of a part of a split row."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Work of one launch.

    Attributes:
        cta_count: ``[num_ctas]`` int32, items of each CTA.
        items: ``[num_ctas, most, NUM_FIELDS]`` int32, zero beyond the count.
        split_rows: ``[s, 3]`` int32: batch, head, query block of each row that several
            items share.
        split_slots: ``[s, parts]`` int32 workspace slots of its parts, -1 where a row
            has fewer.
        num_slots: workspace slots in use.
    """

    cta_count: np.ndarray
    items: np.ndarray
    split_rows: np.ndarray
    split_slots: np.ndarray
    num_slots: int


def make_schedule(
    kv_num_blocks: np.ndarray,
    kv_capacity: int,
    full_kv_num_blocks: np.ndarray,
    full_kv_capacity: int,
    *,
    batch: int,
    heads: int,
    num_ctas: int,
    split: bool = True,
    heads_together: int = 1,
) -> Schedule:
    """Balances the rows of a pattern over persistent CTAs.

    Items come head by head, so that the keys and values in use stay in the L2 cache,
    and longest first within a head; each goes to the CTA that is free first. A row that
    would end after the fair share of a CTA is cut there and the rest goes on elsewhere
    (McNaughton's wrap-around rule), so only the last rows are split, or the only ones.

    Args:
        kv_num_blocks: ``[B or 1, H or 1, nq]`` partial blocks of each row.
        kv_capacity: width of the partial list.
        full_kv_num_blocks: as ``kv_num_blocks``, for full blocks.
        full_kv_capacity: width of the full list.
        batch: batch entries of the launch.
        heads: query heads of the launch.
        num_ctas: CTAs of the launch.
        split: whether rows may be split.
        heads_together: heads whose rows are sorted as one.

    Returns:
        The schedule. Its order is a function of the arguments only.
    """
    partial, full = np.asarray(kv_num_blocks), np.asarray(full_kv_num_blocks)
    shape = (batch, heads, partial.shape[-1])
    # Bits are counted within a batch entry, in list order, heads outermost.
    per_entry = partial.reshape(partial.shape[0], -1).astype(np.int64)
    first_bits = (np.cumsum(per_entry, 1) - per_entry).reshape(partial.shape)
    index = np.arange(partial.size, dtype=np.int64).reshape(partial.shape)
    partial, full, index, first_bits = (
        np.broadcast_to(x, shape).reshape(-1)
        for x in (partial, full, index, first_bits)
    )
    total = partial.astype(np.int64) + full
    b, h, i = np.unravel_index(np.arange(len(total)), shape)
    order = np.lexsort((i, -total, (b * heads + h) // heads_together))
    pieces = _assign(total, order, num_ctas, split)
    pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]
    owner, rows, begin, end = pieces.T
    slots, which, split_slots = _slots(rows, len(total))
    items = np.zeros((len(rows), NUM_FIELDS), np.int32)
    items[:, 0], items[:, 1], items[:, 2] = b[rows], h[rows], i[rows]
    p_begin, p_end = (np.minimum(x, partial[rows]) for x in (begin, end))
    items[:, 3] = index[rows] * kv_capacity + p_begin
    items[:, 4] = p_end - p_begin
    items[:, 5] = index[rows] * full_kv_capacity + (begin - p_begin)
    items[:, 6] = (end - begin) - (p_end - p_begin)
    items[:, 7] = slots
    items[:, 8] = first_bits[rows] + p_begin
    count = np.bincount(owner, minlength=num_ctas)
    padded = np.zeros((num_ctas, max(1, int(count.max())), NUM_FIELDS), np.int32)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    padded[owner, nth] = items
    split_rows = np.stack([b[which], h[which], i[which]], 1).astype(np.int32)
    return Schedule(
        count.astype(np.int32),
        padded,
        split_rows,
        split_slots,
        int(slots.max(initial=-1)) + 1,
    )


def _assign(
    total: np.ndarray, order: np.ndarray, num_ctas: int, split: bool
) -> np.ndarray:
    """``[n, 4]``: CTA, row, first and end block of each piece, in the order made."""
    fair = (total.sum() + ROW_COST * len(total)) / num_ctas
    if len(total) < num_ctas:
        # Each CTA then starts about one piece, whoever its row belongs to.
        fair = total.sum() / num_ctas + ROW_COST
    free = [(0.0, cta) for cta in range(num_ctas)]
    pieces = []
    for row in order.tolist():
        begin, end = 0, int(total[row])
        while True:
            at, cta = free[0]
            room = max(math.ceil(fair - at - ROW_COST), MIN_PART)
            stop = end
            if split and end - begin > room + 1 and end - begin >= 2 * MIN_PART:
                stop = min(begin + room, end - MIN_PART)
            heapq.heapreplace(free, (at + stop - begin + ROW_COST, cta))
            pieces.append((cta, row, begin, stop))
            begin = stop
            if begin == end:
                break
    return np.asarray(pieces, np.int64).reshape(-1, 4)


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
