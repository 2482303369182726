"""Two H100s: no array moves between them, and XLA compiles what is empty."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jsparse import block_sparse_attention
from jsparse.nn.functional import neighbor_attention
from tests.compiled.conftest import compiled, mesh_of
from tests.support.cases import MOVES, one_kind, random_mask

SIZES = (300, 500, 128, 64)


def qkv(heads: int = 2) -> list[jax.ShapeDtypeStruct]:
    lengths = SIZES[0], SIZES[1], SIZES[1]
    return [jax.ShapeDtypeStruct((2, n, heads, 64), jnp.bfloat16) for n in lengths]


def both_passes(attend):
    def run(dout, *args):
        out, pull = jax.vjp(attend, *args)
        return out, pull(dout)

    return run


@pytest.mark.parametrize("full", [None, False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_nothing_moves(kind, full):
    mesh, rng, part = mesh_of(2, kind), np.random.default_rng(0), jax.P("x")
    both = full is None
    mask = random_mask(rng, SIZES, 8) if both else one_kind(rng, SIZES, full)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask, implementation="mosaic_gpu")

    if kind is AxisType.Auto:
        attend = jax.shard_map(
            attend, mesh=mesh.abstract_mesh, in_specs=(part,) * 3, out_specs=part
        )
    q, k, v = qkv()
    text = compiled(both_passes(attend), q, q, k, v, mesh=mesh, spec=part).as_text()
    assert not [word for word in MOVES if word in text]


def test_neighbor_lists_that_devices_build():
    """Each for its samples; only gradients of shared keys are summed."""
    mesh, part = mesh_of(2), jax.P("x")
    q, k, _ = qkv()
    index = jax.ShapeDtypeStruct((2, SIZES[0], 9), jnp.int32)

    def attend(q, index, k, v):
        k, v = (jnp.broadcast_to(x[0], (len(q), *x.shape[1:])) for x in (k, v))
        return neighbor_attention(
            q, k, v, index, capacity=2, implementation="mosaic_gpu"
        )

    def run(dout, q, index, k, v):
        out, pull = jax.vjp(lambda q, k, v: attend(q, index, k, v), q, k, v)
        dq, dk, dv = pull(dout)
        return out, dq, jax.lax.psum(dk, "x"), jax.lax.psum(dv, "x")

    on_devices = jax.shard_map(
        run,
        mesh=mesh.abstract_mesh,
        in_specs=(part, part, part, part, part),
        out_specs=(part, part, jax.P(), jax.P()),
    )
    text = compiled(on_devices, q, q, index, k, k, mesh=mesh, spec=part).as_text()
    moves = [word for word in MOVES if word in text]
    assert set(moves) <= {"all-reduce"}
