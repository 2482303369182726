"""Every configuration that the backend may choose lowers for an H100, without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from jsparse import block_sparse_attention
from jsparse.backends import mosaic_gpu
from tests.pallas_kernels.launches import H100, KERNELS, Launch
from tests.support.cases import random_mask

DIMS = ((16, 16), (32, 32), (48, 48), (64, 64), (80, 80), (96, 96), (128, 128))
DIMS += ((64, 128), (128, 16))
BLOCKS = tuple(itertools.product(mosaic_gpu.BLOCKS, repeat=2))


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lowers(kernel, blocks, dims):
    assert "mosaic_gpu" in Launch(kernel, dims, blocks, rules=True).lower()


@pytest.mark.parametrize("kernel", KERNELS)
def test_these_are_all_the_configs(kernel):
    choose = KERNELS[kernel][1]
    sizes = range(16, mosaic_gpu.LARGEST_HEAD + 1, 16)
    possible = {
        choose(*dims, *blocks)
        for dims in itertools.product(sizes, repeat=2)
        for blocks in BLOCKS
    }
    assert possible == {choose(*dims, *blocks) for dims in DIMS for blocks in BLOCKS}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"dtype": "float16", "dims": (128, 128)},
        {"heads": (4, 1)},
        {"bits": False},
        {"bits": False, "rules": True},
        {"rules": True, "on_host": False},
        {"heads": (4, 2), "on_host": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lowers_with(kernel, changes):
    assert "mosaic_gpu" in Launch(kernel, **changes).lower()


@pytest.mark.parametrize("kernel", KERNELS)
def test_impossible_configs_are_refused(kernel):
    config = Launch(kernel).config()
    tile = "tile_kv" if kernel == "forward" else "tile"
    for change in ({tile: 96}, {"num_stages": 1}, {"teams": 5}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(config, **change)


@pytest.mark.parametrize("part", [jax.P("x"), jax.P(None, None, "x")], ids=str)
def test_gradients_lower_inside_shard_map(part, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: None)
    mask = random_mask(np.random.default_rng(0), (300, 500, 128, 64), 12)
    mesh = AbstractMesh((2,), ("x",), (AxisType.Auto,), abstract_device=H100)
    q, k = (jax.ShapeDtypeStruct((2, n, 2, 16), "bfloat16") for n in (300, 500))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(part,) * 3, out_specs=part)
    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask, implementation="mosaic_gpu")

    def loss(*qkv):
        return attend(*qkv).astype("float32").sum()

    with use_abstract_mesh(mesh):
        gradients = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)
        text = gradients.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3


def test_steps_that_overlap_need_three_stages(monkeypatch):
    launch = Launch("dq")
    few = dataclasses.replace(launch.config(), num_stages=2)
    monkeypatch.setattr(Launch, "config", lambda self: few)
    with pytest.raises(ValueError, match="num_stages=2; expected at least 3"):
        launch.lower()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_config_that_does_not_fit_is_refused(kernel, monkeypatch):
    launch = Launch(kernel, dims=(128, 128))
    big = dataclasses.replace(launch.config(), num_stages=9)
    monkeypatch.setattr(Launch, "config", lambda self: big)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        launch.lower()
