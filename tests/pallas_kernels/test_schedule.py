"""The work list of a launch: every block once, no CTA far above its fair share."""

from __future__ import annotations

import numpy as np
import pytest

from jsparse.pallas_kernels.mosaic_gpu._schedule import ROW_COST, make_schedule


def patterns():
    rng = np.random.default_rng(0)
    uneven = rng.integers(0, 9, (1, 1, 40))
    uneven[0, 0, 7] = 200
    return {
        "few rows": np.full((1, 1, 5), 30),
        "uneven": uneven,
        "by batch and head": rng.integers(0, 6, (2, 3, 17)),
        "empty": np.zeros((1, 1, 9), int),
    }


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", patterns())
def test_every_block_is_computed_once(name, split):
    full = patterns()[name]
    partial = np.random.default_rng(1).integers(0, 3, full.shape)
    width = int(partial.max()), int(full.max(initial=1))
    schedule = make_schedule(
        *(partial, width[0], full, width[1]),
        batch=2,
        heads=3,
        num_ctas=8,
        split=split,
    )
    shape = (2, 3, full.shape[-1])
    seen = [np.zeros((*shape, n), int) for n in width]
    rows = np.broadcast_to(np.arange(full.size).reshape(full.shape), shape)
    written = np.zeros(shape, int)
    for cta, count in enumerate(schedule.cta_count):
        for b, h, i, p0, pn, f0, fn, slot, _ in schedule.items[cta, :count]:
            row = rows[b, h, i]
            for found, first, number, n in zip(
                seen, (p0, f0), (pn, fn), width, strict=True
            ):
                found[b, h, i, first - row * n : first - row * n + number] += 1
            written[b, h, i] += slot < 0
    for found, counts, n in zip(seen, (partial, full), width, strict=True):
        listed = np.arange(n) < np.broadcast_to(counts, shape)[..., None]
        np.testing.assert_array_equal(found, listed)
    for b, h, i in schedule.split_rows:
        written[b, h, i] += 1
    assert (written == 1).all()
    assert split or not len(schedule.split_rows)


def test_a_long_row_does_not_hold_up_the_launch():
    full = patterns()["uneven"]
    none = np.zeros_like(full)
    schedule = make_schedule(none, 1, full, 200, batch=1, heads=1, num_ctas=8)
    load = [
        (schedule.items[cta, :count, 6] + ROW_COST).sum()
        for cta, count in enumerate(schedule.cta_count)
    ]
    assert max(load) <= 1.2 * np.mean(load)
    assert len(schedule.split_rows) >= 1
