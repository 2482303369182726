"""Parts of split rows, combined by the kernel on a CPU and by NumPy in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.pallas_kernels.mosaic_gpu._schedule import Schedule
from jsparse.pallas_kernels.mosaic_gpu.merge_sm90 import merge
from tests.pallas_kernels.emulation import emulated

ROWS, HEADS = 3, 2


def made_schedule(rng, every: bool, most: int) -> Schedule:
    """Rows with one to ``most`` parts; all rows, or three of the six."""
    which = np.arange(ROWS * HEADS)[:: 1 if every else 2]
    counts = rng.integers(1, most + 1, len(which))
    counts[0] = most
    first = np.cumsum(counts) - counts
    nth = np.arange(most)
    return Schedule(
        count=np.zeros(1, np.int32),
        items=np.zeros((1, 1, 1), np.int32),
        split_rows=np.stack([0 * which, which // ROWS, which % ROWS], 1),
        split_slots=np.where(nth < counts[:, None], first[:, None] + nth, -1),
        num_slots=int(counts.sum()),
        any_partial=False,
    )


def expected(schedule: Schedule, arrays):
    """Every row's parts by the definition, in float64."""
    out, lse, part_out, part_lse = (np.array(x, np.float64) for x in arrays)
    block_q = part_lse.shape[1]
    for (b, h, i), slots in zip(schedule.split_rows, schedule.split_slots, strict=True):
        slots = slots[slots >= 0]
        logs = part_lse[slots]
        total = np.logaddexp.reduce(logs, 0)
        with np.errstate(invalid="ignore"):
            weights = np.where(np.isneginf(total), 0, np.exp(logs - total))
        parts = np.where(weights[..., None] == 0, 0, part_out[slots])
        values = (parts * weights[..., None]).sum(0)
        rows = slice(i * block_q, min((i + 1) * block_q, out.shape[1]))
        out[b, rows, h] = values[: rows.stop - rows.start]
        lse[b, h, i * block_q : (i + 1) * block_q] = total
    return out, lse


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(
    "value_dim, block_q, most", [(64, 128, 3), (64, 64, 9), (128, 128, 5), (16, 64, 2)]
)
def test_parts_are_weighted_by_their_sums(every, value_dim, block_q, most):
    rng = np.random.default_rng(most)
    schedule = made_schedule(rng, every, most)
    length = ROWS * block_q - 13
    out = rng.normal(size=(1, length, HEADS, value_dim))
    lse = rng.normal(size=(1, HEADS, ROWS * block_q))
    part_out = rng.normal(size=(schedule.num_slots, block_q, value_dim))
    part_lse = 5 * rng.normal(size=(schedule.num_slots, block_q))
    # Nothing was seen by one part of some rows, nor by any part of one row.
    part_lse[::2, 5:9] = -np.inf
    part_out[::2, 5:9] = np.nan
    part_lse[:, 11] = -np.inf
    arrays = [jnp.asarray(x, jnp.float32) for x in (out, lse, part_out, part_lse)]
    arrays[0] = arrays[0].astype(jnp.bfloat16)
    with emulated():
        found = merge(*arrays, schedule=schedule)
    truth = expected(schedule, arrays)
    np.testing.assert_allclose(np.asarray(found[0], np.float64), truth[0], 2e-2, 4e-3)
    np.testing.assert_allclose(np.asarray(found[1], np.float64), truth[1], 1e-6, 1e-6)


def test_a_part_that_is_nan_reaches_its_row_alone():
    rng = np.random.default_rng(0)
    schedule = made_schedule(rng, True, 2)
    out, lse = jnp.zeros((1, ROWS * 64, HEADS, 64)), jnp.zeros((1, HEADS, ROWS * 64))
    part_out = np.ones((schedule.num_slots, 64, 64), np.float32)
    part_lse = np.zeros((schedule.num_slots, 64), np.float32)
    part_out[1, 7], part_lse[1, 7] = np.nan, np.nan
    with emulated():
        found = merge(out.astype(jnp.bfloat16), lse, part_out, part_lse, schedule)
    for x in (np.asarray(found[0], np.float32)[0, :, :, 0], found[1][0].T):
        assert np.argwhere(np.isnan(x)).tolist() == [[7, 0]]
