"""The work list of a launch: every block once, no worker far above its fair share."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse.pallas_kernels.mosaic_gpu import _schedule
from jsparse.pallas_kernels.mosaic_gpu._schedule import (
    MERGE_COST,
    MIN_PART,
    MOST_PARTS,
    ROW_COST,
    Blocks,
    Schedule,
    schedule_on_device,
    schedule_on_host,
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Sizes of a launch; ``lead`` are the axes of the counts, 1 where shared."""

    lead: tuple[int, int]
    rows: int
    workers: int
    batch: int = 1
    heads: int = 1
    group: int = 1
    tiles: int = 1
    share: int = 1
    capacities: tuple[int, int] = (6, 40)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Batch entries, heads and rows of the launch."""
        return self.batch, self.heads, self.rows * self.tiles

    def columns(self, kind: int) -> np.ndarray:
        """A list of each row, all columns of the launch different."""
        shape = (*self.lead, self.rows, self.capacities[kind])
        return np.arange(np.prod(shape), dtype=np.int32).reshape(shape) * 2 + kind

    def schedule(self, make: Callable, partial, full) -> Schedule:
        return make(
            Blocks(partial, self.columns(0)),
            Blocks(full, self.columns(1)),
            batch=self.batch,
            heads=self.heads,
            workers=self.workers,
            group=self.group,
            tiles=self.tiles,
            share=self.share,
        )


@functools.partial(jax.jit, static_argnums=0)
def _traced(launch: Launch, partial, full):
    return vars(launch.schedule(schedule_on_device, partial, full))


def on_device(launch: Launch, partial, full) -> Schedule:
    return Schedule(**jax.device_get(_traced(launch, partial, full)))


def on_host(launch: Launch, partial, full) -> Schedule:
    return launch.schedule(schedule_on_host, partial, full)


MAKERS = (on_host, on_device)

LAUNCHES = (
    Launch((1, 1), rows=1, workers=1),
    Launch((1, 1), rows=1, workers=7),
    Launch((1, 1), rows=3, workers=8, heads=2),
    Launch((1, 1), rows=8, workers=8),
    Launch((1, 1), rows=23, workers=4),
    Launch((2, 1), rows=5, workers=3, batch=2, heads=2),
    Launch((1, 3), rows=4, workers=32, batch=2, heads=3),
    Launch((2, 3), rows=9, workers=5, batch=2, heads=3),
    Launch((1, 1), rows=6, workers=4, capacities=(0, 11)),
    Launch((1, 1), rows=6, workers=4, capacities=(7, 0)),
    Launch((1, 1), rows=5, workers=3, heads=4, group=2),
    Launch((2, 4), rows=3, workers=4, batch=2, heads=4, group=4),
    Launch((1, 6), rows=2, workers=9, heads=6, group=3),
    Launch((2, 1), rows=5, workers=7, batch=2, heads=2, tiles=2),
    Launch((1, 1), rows=3, workers=8, tiles=2),
    Launch((1, 1), rows=3, workers=8, tiles=2, share=2),
    Launch((2, 1), rows=7, workers=6, batch=2, share=3),
    Launch((1, 2), rows=2, workers=28, heads=2, share=2),
)


@st.composite
def counts(draw, launch: Launch) -> tuple[np.ndarray, np.ndarray]:
    """Partial and full blocks of every row; often empty, now and then all."""
    shape = (*launch.lead, launch.rows)
    size = int(np.prod(shape))

    def some(capacity):
        number = st.sampled_from([0, 0, capacity]) | st.integers(0, capacity)
        drawn = draw(st.lists(number, min_size=size, max_size=size))
        return np.array(drawn, np.int32).reshape(shape)

    return some(launch.capacities[0]), some(launch.capacities[1])


def per_worker(schedule: Schedule) -> list[np.ndarray]:
    """The items that each worker reads."""
    walks = zip(schedule.items, schedule.count, strict=True)
    return [items[:count] for items, count in walks]


def items_of(schedule: Schedule) -> Iterator[tuple[int, ...]]:
    for items in per_worker(schedule):
        yield from map(tuple, items.tolist())


def totals(launch: Launch, partial, full) -> np.ndarray:
    """Blocks of each row of the launch."""
    total = np.repeat(partial + full, launch.tiles, -1)
    return np.broadcast_to(total, (launch.batch, launch.heads, total.shape[-1]))


def blocks_of(launch: Launch, partial, full) -> collections.Counter:
    """Every block to compute: row, list, position in it, and number of its bits."""
    found = collections.Counter()
    for b, h, tile in np.ndindex(launch.grid):
        i = tile // launch.tiles
        entry = min(b, partial.shape[0] - 1), min(h, partial.shape[1] - 1), i
        row = int(np.ravel_multi_index(entry, partial.shape))
        bits = partial[entry[0]].reshape(-1)
        first_bit = int(bits[: entry[1] * launch.rows + i].sum())
        for n in range(partial[entry]):
            position = row * launch.capacities[0] + n
            found[b, h, tile, "partial", position, first_bit + n] += 1
        for n in range(full[entry]):
            found[b, h, tile, "full", row * launch.capacities[1] + n, None] += 1
    return found


def blocks_in(schedule: Schedule) -> collections.Counter:
    """The blocks that the items of a schedule compute, as `blocks_of` names them."""
    found = collections.Counter()
    for b, h, i, p0, pn, f0, fn, _, bits, *_ in items_of(schedule):
        for n in range(pn):
            found[b, h, i, "partial", p0 + n, bits + n] += 1
        for n in range(fn):
            found[b, h, i, "full", f0 + n, None] += 1
    return found


def check_first_columns(launch: Launch, schedule: Schedule) -> None:
    """An item names the column of its first block, or 0 if it has none."""
    for _, _, _, p0, pn, f0, fn, _, _, first, *_ in items_of(schedule):
        expected = 0
        if pn or fn:
            kind, position = (0, p0) if pn else (1, f0)
            expected = launch.columns(kind).reshape(-1)[position]
        assert first == expected


def check_starts(launch: Launch, schedule: Schedule) -> None:
    """Walkers read an entry of both lists, also where an item has none of one."""
    for _, _, _, p0, _, f0, *_ in items_of(schedule):
        for kind, start in enumerate((p0, f0)):
            assert 0 <= start < max(launch.columns(kind).size, 1)


def check_slots(launch: Launch, schedule: Schedule) -> None:
    """A row is one item that writes it, or parts in slots that it shares with no other.

    Where it is split, the schedule lists the slots for the merge, row by row.
    """
    slots = collections.defaultdict(list)
    for items in per_worker(schedule)[:: launch.share]:
        for b, h, i, _, _, _, _, slot, *_ in items.tolist():
            slots[b, h, i].append(slot)
    assert set(slots) == set(np.ndindex(launch.grid))
    split = {row: sorted(x) for row, x in slots.items() if x != [-1]}
    listed = {
        tuple(row): [x for x in parts if x >= 0]
        for row, parts in zip(
            schedule.split_rows.tolist(), schedule.split_slots.tolist(), strict=True
        )
    }
    assert listed == split
    assert schedule.split_rows.tolist() == [list(row) for row in sorted(split)]
    used = sorted(slot for parts in split.values() for slot in parts)
    assert used == list(range(schedule.num_slots))


def check_sharing(launch: Launch, schedule: Schedule) -> None:
    """Workers that share items walk the same ones, with about as many blocks each."""
    walks = per_worker(schedule)
    for first in range(0, launch.workers, launch.share):
        shared = np.stack(walks[first : first + launch.share])
        assert (shared[..., [0, 1, 2, 7]] == shared[:1][..., [0, 1, 2, 7]]).all()
        blocks = shared[..., [4, 6]].sum(-1)
        assert (blocks.max(0, initial=0) - blocks.min(0, initial=99) <= 1).all()


def check_order(launch: Launch, schedule: Schedule, total: np.ndarray) -> None:
    """Each worker goes head by head, and from long to short rows within a head.

    Where heads form groups, those of a row follow one another without a gap.
    """
    for items in per_worker(schedule):
        b, h, i = items[:, :3].T
        first = h // launch.group * launch.group
        length = [
            total[b_, h_ : h_ + launch.group, i_].sum()
            for b_, h_, i_ in zip(b, first, i, strict=True)
        ]
        order = list(zip(b, first, np.negative(length), strict=True))
        assert order == sorted(order)
        if launch.group > 1:
            jobs = items[:, :3].reshape(-1, launch.group, 3)
            heads = jobs[:, :1, 1] + np.arange(launch.group)
            assert (jobs[:, :, 1] == heads).all()
            assert (heads[:, 0] % launch.group == 0).all()
            assert (jobs[..., [0, 2]] == jobs[:, :1, [0, 2]]).all()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@given(data=st.data())
def test_every_block_is_computed_once(launch, make, data):
    partial, full = data.draw(counts(launch))
    schedule = make(launch, partial, full)
    assert schedule.count.shape == (launch.workers,)
    assert schedule.items.dtype == schedule.count.dtype == np.int32
    assert blocks_in(schedule) == blocks_of(launch, partial, full)
    check_first_columns(launch, schedule)
    check_starts(launch, schedule)
    check_slots(launch, schedule)
    check_sharing(launch, schedule)
    check_order(launch, schedule, totals(launch, partial, full))
    for items, count in zip(schedule.items, schedule.count, strict=True):
        assert not items[count:].any()
    assert schedule.any_partial >= partial.any()
    assert schedule.any_partial <= (launch.capacities[0] > 0)


def loads(launch: Launch, schedule: Schedule) -> np.ndarray:
    """Cost of the items of each worker, or of those that share them, in blocks."""
    each = [
        items[:, [4, 6]].sum() + ROW_COST * len(items) / launch.group / launch.share
        for items in per_worker(schedule)
    ]
    return np.reshape(each, (-1, launch.share)).sum(1)


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@given(data=st.data())
def test_no_worker_is_far_above_the_mean(launch, data):
    partial, full = data.draw(counts(launch))
    load = loads(launch, on_host(launch, partial, full))
    longest = 2 * MIN_PART - 1
    if launch.group > 1:
        total = totals(launch, partial, full)
        shape = launch.batch, -1, launch.group, launch.grid[-1]
        longest = total.reshape(shape).sum(2).max()
    # The worker that is free first is not above the mean, and takes one piece more.
    merge = MERGE_COST if launch.group == 1 else 0
    assert load.max() <= load.mean() + longest + ROW_COST + merge


@given(data=st.data())
def test_parts_of_a_row_are_not_too_short(data):
    launch = Launch((1, 1), rows=5, workers=8)
    schedule = on_host(launch, *data.draw(counts(launch)))
    lengths = collections.defaultdict(list)
    for item in items_of(schedule):
        lengths[item[:3]].append(item[4] + item[6])
    assert all(min(x) >= MIN_PART for x in lengths.values() if len(x) > 1)


@pytest.mark.parametrize("longest, split", [(30, True), (8, False), (3, False)])
def test_rows_are_split_where_that_saves_more_than_a_merge(longest, split):
    launch = Launch((1, 1), rows=5, workers=9)
    full = np.array([[[0, 3, longest, 2, 1]]])
    schedule = on_host(launch, np.zeros_like(full), full)
    assert schedule.split_rows[:, 2].tolist() == ([2] if split else [])


def test_one_long_row_does_not_hold_up_the_launch():
    launch = Launch((1, 1), rows=40, workers=8, capacities=(0, 200))
    full = np.random.default_rng(0).integers(0, 9, (1, 1, 40))
    full[0, 0, 7] = 200
    schedule = on_host(launch, np.zeros_like(full), full)
    assert [0, 0, 7] in schedule.split_rows.tolist()
    load = loads(launch, schedule)
    assert load.max() <= 1.1 * load.mean()


def test_rows_of_a_traced_pattern_are_dealt_to_and_fro():
    launch = Launch((1, 1), rows=16, workers=4, heads=2)
    full = np.random.default_rng(0).permutation(16)[None, None]
    load = loads(launch, on_device(launch, np.zeros_like(full), full))
    np.testing.assert_array_equal(load, load[0])


@pytest.mark.parametrize("group, one_bias", [(1, (True, False)), (2, (False, False))])
def test_many_rows_are_sorted_and_few_are_compared(group, one_bias, monkeypatch):
    rng = np.random.default_rng(1)
    shape = (3, 1, 25)
    partial, full = (
        Blocks(rng.integers(0, 4, shape), rng.integers(0, 9, (*shape, 4)))
        for _ in range(2)
    )

    def schedule():
        sizes = {
            "batch": 3,
            "heads": 4,
            "workers": 8,
            "group": group,
            "one_bias": one_bias,
        }
        return vars(schedule_on_device(partial, full, **sizes))

    compared = schedule()
    monkeypatch.setattr(_schedule, "MOST_COMPARED", 299)
    jax.tree.map(np.testing.assert_array_equal, compared, schedule())


@pytest.mark.parametrize(
    "rows, workers, parts", [(3, 8, 6), (1, 100, MOST_PARTS), (8, 8, 1), (9, 8, 1)]
)
def test_few_rows_of_a_traced_pattern_are_cut_evenly(rows, workers, parts):
    launch = Launch((1, 1), rows=rows, workers=workers)
    full = np.arange(20, 20 + rows)[None, None]
    schedule = on_device(launch, np.zeros_like(full), full)
    lengths = collections.defaultdict(list)
    for item in items_of(schedule):
        lengths[item[2]].append(item[4] + item[6])
    for found in lengths.values():
        assert len(found) == parts
        assert max(found) - min(found) <= 1
