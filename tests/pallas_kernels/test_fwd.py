"""The Hopper forward kernel: lowered anywhere, run where there is one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jsparse.pallas_kernels.mosaic_gpu import fwd_sm90
from jsparse.pallas_kernels.mosaic_gpu._schedule import make_schedule
from jsparse.patterns import BlockMask
from tests.support import oracle

HEADS = {"plain": (2, 2, 1), "grouped, a pattern each": (4, 2, 4)}


def random_mask(rng, heads: int) -> BlockMask:
    """Full, partial, empty and ragged blocks, with bits."""
    masks = []
    for _ in range(heads):
        rows, cols = np.nonzero(rng.random((4, 3)) < 0.7)
        keep = rows != 2
        rows, cols = rows[keep], cols[keep]
        elements = rng.random((len(rows), 128, 128)) < 0.3
        full = rng.random(len(rows)) < 0.5
        masks.append(
            BlockMask.from_blocks(
                rows, cols, q_len=500, kv_len=333, full=full, elements=elements
            )
        )
    return BlockMask.stack(masks, "head")


def launch(mask: BlockMask, q, k, v, config):
    """``forward`` on a mask's arrays."""
    schedule = make_schedule(
        mask.kv_num_blocks,
        mask.capacity.kv,
        mask.full_kv_num_blocks,
        mask.capacity.full_kv,
        batch=q.shape[0],
        heads=q.shape[2],
        num_ctas=config.num_workers,
    )
    return fwd_sm90.forward(
        q,
        k,
        v,
        jnp.asarray(mask.kv_indices).reshape(-1),
        jnp.asarray(mask.full_kv_indices).reshape(-1),
        schedule,
        scale=q.shape[-1] ** -0.5,
        config=config,
        bits=jnp.asarray(mask.bits),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 128])
def test_lowers_for_an_h100_without_a_gpu(head_dim, dtype):
    mask = random_mask(np.random.default_rng(0), 2)
    config = fwd_sm90.Config.choose(head_dim, head_dim, 132)
    q = jax.ShapeDtypeStruct((1, 500, 2, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, 333, 2, head_dim), dtype)
    device = AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(lambda q, k, v: launch(mask, q, k, v, config)).trace(q, k, k)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_impossible_configs_are_refused():
    choose = fwd_sm90.Config.choose(64, 64, 132)
    for change in (
        {"tile_kv": 96},
        {"num_stages": 1},
        {"num_q_stages": 3},
        {"teams": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(choose, **change)
    big = dataclasses.replace(fwd_sm90.Config.choose(128, 128, 132), num_stages=8)
    mask = random_mask(np.random.default_rng(0), 2)
    q = jnp.zeros((1, 500, 2, 128), "bfloat16")
    with pytest.raises(ValueError, match="bytes of shared memory"):
        launch(mask, q, q[:, :333], q[:, :333], big)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [("bfloat16", 2.64e-3), ("float16", 4e-4)])
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_against_float64(heads, head_dim, dtype, limit):
    num_heads, num_kv_heads, patterns = HEADS[heads]
    rng = np.random.default_rng(head_dim)
    mask = random_mask(rng, patterns)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, n, h, head_dim)), dtype)
        for n, h in ((500, num_heads), (333, num_kv_heads), (333, num_kv_heads))
    )
    config = fwd_sm90.Config.choose(head_dim, head_dim, 132)
    run = jax.jit(lambda q, k, v: launch(mask, q, k, v, config))
    out, lse = run(q, k, v)
    none = np.zeros((num_heads, 500, 333))
    exact = [np.asarray(x[0].astype(jnp.float32), np.float64) for x in (q, k, v)]
    truth = oracle.attention(
        exact[0],
        exact[1],
        exact[2],
        mask.to_dense()[0],
        none,
        head_dim**-0.5,
        np.zeros_like(exact[0]),
        np.zeros((num_heads, 500)),
    )
    out = np.asarray(out[0].astype(jnp.float32), np.float64)
    assert np.linalg.norm(out - truth.out) <= limit * np.linalg.norm(truth.out)
    np.testing.assert_allclose(lse[0], truth.lse, rtol=1e-5, atol=1e-4)
    for _ in range(3):
        again = run(q, k, v)
        assert bool((again[0][0].astype(jnp.float32) == out.astype(np.float32)).all())
