"""The order in which the steps of the kernel of all gradients add to dq."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jsparse.backends import _turns
from jsparse.pallas_kernels.mosaic_gpu._schedule import Blocks, schedule_on_host

BATCH, HEADS, QUERY_BLOCKS = 2, 4, 7


def random_lists(rng, rows: int = 9, hub: int | None = None) -> tuple[Blocks, Blocks]:
    """Partial and full lists by key block; all rows have the block ``hub`` if any."""
    shape, most = (BATCH, 1, rows), 4
    made = []
    for kind in range(2):
        count = rng.integers(0, most + 1, shape).astype(np.int32)
        order = rng.permuted(np.tile(np.arange(3), (*shape, 1)), axis=-1)
        column = np.zeros((*shape, most), np.int32)
        column[..., :3] = order + kind * 3
        count = np.minimum(count, 3)
        if hub is not None and kind == 1:
            column[..., 3], count = column[..., 0], count + 1
            column[..., 0] = hub
        made.append(Blocks(count, column))
    return made[0], made[1]


def made(lists, workers: int, split: int = 1, group: int = 1, most_sums=None):
    partial, full = lists
    launch: Any = {"batch": BATCH, "heads": HEADS, "workers": workers, "group": group}
    schedule = schedule_on_host(partial, full, **launch)
    shape = BATCH, HEADS, QUERY_BLOCKS * split
    return _turns.with_turns(schedule, partial, full, shape, split, most_sums)


def steps_of(schedule, lists, split: int) -> list[list[tuple[int, tuple[int, ...]]]]:
    """For each worker, the number in ``turns`` of each step, and its tile."""
    found = []
    for count, items in zip(schedule.count, schedule.items, strict=True):
        steps = []
        for x in items[:count]:
            blocks = [
                round_from(kind.column.reshape(-1)[at : at + count], x[11])
                for kind, (at, count) in zip(lists, (x[3:5], x[5:7]), strict=True)
            ]
            tiles = (np.concatenate(blocks)[:, None] * split + np.arange(split)).ravel()
            steps += [(x[10] + n, (x[0], x[1], tile)) for n, tile in enumerate(tiles)]
        found.append(steps)
    return found


def round_from(blocks, begin: int):
    return np.roll(blocks, -(len(blocks) * begin >> 16))


@pytest.mark.parametrize("hub", [None, 6])
@pytest.mark.parametrize("workers, split, group", [(1, 1, 1), (5, 1, 2), (40, 2, 1)])
def test_every_step_adds_to_its_tile_in_a_turn_of_its_own(workers, split, group, hub):
    lists = random_lists(np.random.default_rng(workers), hub=hub)
    schedule, turns = made(lists, workers, split, group)
    taken: dict[int, list[int]] = {}
    numbers = []
    for steps in steps_of(schedule, lists, split):
        for number, tile in steps:
            numbers.append(number)
            total, turn = turns.turns[number]
            first, count = turns.sums_of[tile]
            assert first <= total < first + count
            taken.setdefault(total, []).append(turn)
    assert sorted(numbers) == list(range(len(turns.turns)))
    assert sorted(taken) == list(range(turns.num_sums))
    for each in taken.values():
        assert sorted(each) == list(range(len(each)))
    assert len(numbers) == _turns.num_steps(*lists, BATCH, HEADS, split)


@pytest.mark.parametrize("seed", range(4))
def test_no_worker_waits_for_ever(seed):
    rng = np.random.default_rng(seed)
    lists = random_lists(rng, hub=6)
    schedule, turns = made(lists, 11)
    waiting = [list(reversed(x)) for x in steps_of(schedule, lists, 1)]
    taken = np.zeros(turns.num_sums, int)
    left = sum(map(len, waiting))
    while left:
        ready = [
            x for x in waiting if x and turns.turns[x[-1][0], 1] == taken[own(turns, x)]
        ]
        assert ready, "every worker waits"
        steps = ready[rng.integers(len(ready))]
        taken[own(turns, steps)] += 1
        steps.pop()
        left -= 1


def own(turns, steps) -> int:
    return int(turns.turns[steps[-1][0], 0])


def test_no_tile_has_more_sums_than_it_may():
    lists = random_lists(np.random.default_rng(0), rows=60, hub=6)
    _, turns = made(lists, 12, most_sums=2)
    assert turns.sums_of[..., 1].max() == 2
    assert len(np.unique(turns.turns, axis=0)) == len(turns.turns)


def test_a_tile_with_many_parts_has_several_sums():
    rng = np.random.default_rng(0)
    lists = random_lists(rng, rows=60, hub=6)
    _, turns = made(lists, 12)
    of_head = -(-len(turns.turns) // (BATCH * HEADS * 12))
    parts = np.bincount(turns.turns[:, 0])
    assert parts.max() <= max(of_head // _turns.SHARE, _turns.MIN_PARTS)
    assert turns.sums_of[..., 6, 1].min() > 1
    again = made(lists, 12)[1]
    np.testing.assert_array_equal(turns.turns, again.turns)


def test_steps_add_in_the_order_in_which_they_come():
    # One row of keys a worker, which all begin at another of the same two blocks.
    rows = 3
    none = Blocks(np.zeros((1, 1, rows), np.int32), np.zeros((1, 1, rows, 0), np.int32))
    column = np.array([[0, 1], [0, 1], [0, 1]], np.int32)[None, None]
    full = Blocks(np.full((1, 1, rows), 2, np.int32), column)
    schedule = schedule_on_host(none, full, batch=1, heads=1, workers=rows)
    schedule, turns = _turns.with_turns(schedule, none, full, (1, 1, 2), 1)
    of_row = {
        int(items[0, 2]): turns.turns[items[0, 10] : items[0, 10] + 2].tolist()
        for items in schedule.items
    }
    begins = [int(items[0, 11]) * 2 >> 16 for items in schedule.items]
    assert begins == [0, 1, 0]
    assert of_row == {0: [[0, 0], [1, 1]], 1: [[1, 0], [0, 2]], 2: [[0, 1], [1, 2]]}


def test_a_launch_without_blocks_has_no_turns():
    none = Blocks(np.zeros((1, 1, 3), np.int32), np.zeros((1, 1, 3, 0), np.int32))
    schedule = schedule_on_host(none, none, batch=1, heads=1, workers=2)
    _, turns = _turns.with_turns(schedule, none, none, (1, 1, 5), 1)
    assert turns.turns.shape == (0, 2) and turns.num_sums == 0
    assert not turns.sums_of.any()
