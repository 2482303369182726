"""Teams of a CTA that compute an item together, each from a part of its blocks.

The first team combines the parts, in the order of the teams, and writes the rows. The
others hand theirs over in shared memory, once it has come to the same item, and so has
read the parts of the one before. A row is thus spread over warpgroups without a merge
in a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from . import _mean as mean
from . import _registers as r

Array = Any


def scratch_spec(teams: int, value_dim: int) -> dict:
    """Shared memory of the parts of all teams but the first, 64 rows each."""
    columns = 32 if value_dim % 32 == 0 else 16
    transforms = (
        plgpu.TilingTransform((8, columns)),
        plgpu.SwizzleTransform(4 * columns),
    )
    shape = (teams - 1, 64, value_dim)
    return dict(
        shared_out=plgpu.SMEM(shape, jnp.float32, transforms=transforms),
        shared_lse=plgpu.SMEM((teams - 1, 64), jnp.float32),
        shared_given=plgpu.Barrier(num_arrivals=teams - 1),
        shared_taken=plgpu.Barrier(num_arrivals=1),
    )


def combine(values: Array, lse: Array, s: dict, teams: int, write: Callable) -> None:
    """``write(values, lse)`` of the whole item, by the first team.

    Args:
        values: ``[64, Dv]`` float32, this team's part.
        lse: ``[64]`` float32, natural logarithm.
        s: scratch of the team.
        teams: of the CTA.
        write: called once, with an item's values and lse.
    """

    @pl.when(s["team"] > 0)
    def _give():
        plgpu.barrier_wait(s["shared_taken"])
        s["shared_out"].at[s["team"] - 1][...] = values
        s["shared_lse"].at[s["team"] - 1][...] = lse
        plgpu.barrier_arrive(s["shared_given"])

    @pl.when(s["team"] == 0)
    def _take():
        plgpu.barrier_arrive(s["shared_taken"])
        plgpu.barrier_wait(s["shared_given"])
        parts, lses = [values], [lse]
        for i in range(teams - 1):
            parts.append(plgpu.load(s["shared_out"].at[i], layout=r.OPERAND))
            lses.append(plgpu.load(s["shared_lse"].at[i], layout=r.ROW))
        write(*mean.end(mean.add(mean.start(values.shape[1]), parts, lses)))
