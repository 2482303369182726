"""Every configuration that the backend may choose lowers for an H100, without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from jsparse import block_sparse_attention
from jsparse.backends import mosaic_gpu
from jsparse.pallas_kernels.mosaic_gpu import (
    _bias,
    _biased,
    _candidates,
    _distance,
    _persistent,
    _tables,
    bwd_dbias_sm90,
    bwd_dkv_sm90,
    bwd_dq_sm90,
    fwd_sm90,
)
from jsparse.pallas_kernels.mosaic_gpu._gradient import BackwardConfig
from tests.backends.test_score_function import KERNELS as SCORES
from tests.pallas_kernels.launches import DISTANCES, H100, KERNELS, TUNED, Launch
from tests.support.cases import MOVES, random_mask

SIZES = range(16, mosaic_gpu.LARGEST_HEAD + 1, 16)
DIMS = ((16, 16), (48, 48), (80, 80), (96, 96), (192, 192))
DIMS += ((64, 128), (128, 16), (192, 128), (64, 192))
SCRATCH = {
    "forward": fwd_sm90.scratch_spec,
    "dq": bwd_dq_sm90.scratch_spec,
    "dkv": bwd_dkv_sm90.scratch_spec,
    "dbias": bwd_dbias_sm90.scratch_spec,
}
BLOCKS: Any = tuple(itertools.product(*mosaic_gpu.BLOCKS.values()))


POSSIBLE = [
    Launch(kernel, (dim, value_dim), blocks, rules=True, launch=launch)
    for kernel, blocks, launch in itertools.product(TUNED, BLOCKS, fwd_sm90.LAUNCHES)
    for dim, value_dim in itertools.product(SIZES, repeat=2)
]
OF_EACH_CONFIG = {(x.kernel, x.blocks, x.config()): x for x in POSSIBLE}
"""The launch with the widest heads."""


@pytest.mark.parametrize("launch", OF_EACH_CONFIG.values(), ids=str)
def test_every_config_lowers(launch):
    assert "mosaic_gpu" in launch.lower()


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("kernel", TUNED)
def test_head_sizes_lower(kernel, dims):
    assert "mosaic_gpu" in Launch(kernel, dims, rules=True).lower()


@pytest.mark.parametrize("kernel", TUNED)
def test_every_config_fits_into_shared_memory(kernel):
    for launch in POSSIBLE:
        if launch.kernel == kernel:
            config = launch.config()
            scratch = SCRATCH[kernel](config, launch.rows, *launch.dims, "bfloat16")
            _persistent.check_smem(kernel, config, scratch)


BIASED = [
    Launch(kernel, (dim, value_dim), blocks, rules=True, bias=bias, shared=False)
    for kernel, blocks in itertools.product(KERNELS, BLOCKS)
    for dim, value_dim in itertools.product(
        range(16, mosaic_gpu.LARGEST_HEAD_WITH_BIAS + 1, 16), repeat=2
    )
    for bias in ("float32", "bfloat16")
]
BIASED_OF_EACH_CONFIG = {(x.kernel, x.blocks, x.config()): x for x in BIASED}


@pytest.mark.parametrize("launch", BIASED_OF_EACH_CONFIG.values(), ids=str)
def test_every_config_beside_a_bias_lowers(launch):
    assert "mosaic_gpu" in launch.lower()


def test_every_config_beside_a_bias_fits_into_shared_memory():
    for launch in BIASED:
        config, rows = launch.config(), launch.rows
        scratch = SCRATCH[launch.kernel](
            config, rows, *launch.dims, "bfloat16", launch.bias_dtype
        )
        _persistent.check_smem(launch.kernel, config, scratch)


@pytest.mark.parametrize("bias", ["block", "float16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_lowers_with_bias(kernel, bias):
    for heads, bits in (((4, 2), True), ((2, 2), False)):
        launch = Launch(kernel, heads=heads, bits=bits, bias=bias)
        assert "mosaic_gpu" in launch.lower()


@pytest.mark.parametrize("bias", ["key", "entry", *DISTANCES])
@pytest.mark.parametrize(
    "blocks, heads, on_host",
    [((128, 128), (4, 2), True), ((64, 32), (2, 2), False)],
    ids=str,
)
@pytest.mark.parametrize("kernel", TUNED)
def test_lowers_with_a_bias_that_is_not_streamed(kernel, blocks, heads, on_host, bias):
    launch = Launch(kernel, (128, 64), blocks, heads, on_host=on_host, bias=bias)
    assert "mosaic_gpu" in dataclasses.replace(launch, shared=on_host).lower()


@pytest.mark.parametrize("bias", ["float16", "key", "entry", *DISTANCES, SCORES[0]])
@pytest.mark.parametrize("kernel", ["dq", "dkv"])
def test_lowers_without_the_gradient_of_a_bias(kernel, bias):
    launch = Launch(kernel, bias=bias, shared=False, constant=True)
    assert "mosaic_gpu" in launch.lower()


@pytest.mark.parametrize("bias", _distance.MOST)
@pytest.mark.parametrize("kernel", TUNED)
def test_as_many_weights_as_there_may_be_fit_into_shared_memory(kernel, bias):
    sizes = range(16, mosaic_gpu.LARGEST_HEAD_WITH_BIAS + 1, 16)
    for dims, blocks in itertools.product(itertools.product(sizes, sizes), BLOCKS):
        launch = Launch(kernel, (dims[0], dims[1]), blocks, bias=bias)
        config = launch.config()
        room: dict[str, int] = {"points": True}
        if kernel == "dq":
            room["lane_sums"] = _bias.lane_sums(launch.bias_shape())
            assert room["lane_sums"] > _distance.MOST[bias]
        scratch = SCRATCH[kernel](config, launch.rows, *dims, "bfloat16", **room)
        _persistent.check_smem(kernel, config, scratch)


def test_row_sums_have_room_for_items_beyond_the_last_row():
    walker = _biased.BiasedWalker(
        **BackwardConfig(tile_rows=64).walker(),
        block_rows=64,
        block_columns=128,
        group=1,
        rows_are_queries=True,
        any_partial=True,
        items_per_worker=1,
        scale=1.0,
        row_sums=3,
        lane_sums=5,
    )
    shapes = [x.shape for x in walker.sums_type(2, 4, 650, 128, 7)]
    assert shapes == [(3, 2, 4, 768), (3, 7, 64), (2, 12, 4, 5), (7, 1, 5)]


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("kernel", TUNED)
def test_lowers_with_a_score_function(kernel, name):
    launch = Launch(kernel, (64, 32), (64, 32), (4, 2), rules=True, bias=name)
    assert "mosaic_gpu" in launch.lower()


CANDIDATE_DIMS = tuple((n, n) for n in (16, 32, 48, 64, 80, 96, 128))


def launches_of_candidates() -> dict[str, Launch]:
    """Each config worth measuring that no heads choose, at the widest that it fits."""
    found = {}
    for dims, blocks, kernel, launch in itertools.product(
        CANDIDATE_DIMS, BLOCKS, TUNED, fwd_sm90.LAUNCHES
    ):
        sizes = (dims[0], dims[1], blocks[0], blocks[1])
        key = _tables.Key("sm90", kernel, *sizes, launch)
        for config in _candidates.candidates(key, "bfloat16")[1:]:
            if (kernel, blocks, config) not in OF_EACH_CONFIG:
                name = f"{kernel}-{blocks}-{_tables.fields_of(config)}"
                found[name] = Launch(kernel, dims, blocks, rules=True, given=config)
    return found


CANDIDATES = launches_of_candidates()


# A sixth of them: the tuner itself names a candidate that does not lower.
@pytest.mark.parametrize("name", list(CANDIDATES)[::6])
def test_candidates_lower(name):
    assert "mosaic_gpu" in CANDIDATES[name].lower()


@pytest.mark.parametrize("key", _tables.shipped(), ids=str)
def test_the_table_lowers(key):
    sizes = (key.head_dim, key.value_dim), (key.block_q, key.block_kv)
    bias = {"16 bits": "bfloat16", "32 bits": "float32"}.get(key.bias, key.bias)
    launch = Launch(key.kernel, *sizes, rules=True, bias=bias)
    assert launch.config() == _candidates.chosen(key)
    assert "mosaic_gpu" in launch.lower()


@pytest.mark.parametrize("kernel", TUNED)
def test_a_config_that_is_tried_reaches_its_kernel(kernel, monkeypatch):
    """And no other; before and after, the chosen one is what is traced."""
    used = {}
    for name, (run, _) in TUNED.items():

        def spy(*arguments, name=name, run=run, config, **rest):
            used[name] = config
            return run(*arguments, config=config, **rest)

        module = {"forward": "fwd", "dq": "bwd_dq", "dkv": "bwd_dkv"}[name]
        monkeypatch.setattr(getattr(mosaic_gpu, f"{module}_sm90"), run.__name__, spy)
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: None)
    mask = random_mask(np.random.default_rng(0), (300, 500, 128, 128), 12)
    q, k = (jax.ShapeDtypeStruct((n, 2, 64), "bfloat16") for n in (300, 500))
    asked = {}

    def configs(mask):
        """What is traced."""
        used.clear()
        attend = functools.partial(
            block_sparse_attention, mask=mask, implementation="mosaic_gpu"
        )
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
            jax.eval_shape(lambda q, k, v: jax.vjp(attend, q, k, v)[1](q), q, k, k)
        return dict(used)

    def listen(key):
        asked[key.kernel] = key

    with _tables.trying(listen):
        before = configs(mask)
    config = _candidates.candidates(asked[kernel], "bfloat16")[1]
    assert before == {name: _candidates.chosen(key) for name, key in asked.items()}
    with _tables.trying({asked[kernel]: _tables.fields_of(config)}.get):
        assert configs(mask) == before | {kernel: config}
    assert configs(mask) == before


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
@pytest.mark.parametrize("kernel", TUNED)
def test_lowers_with(kernel, changes):
    assert "mosaic_gpu" in Launch(kernel, **changes).lower()


@pytest.mark.parametrize("kernel", TUNED)
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
    assert not [word for word in MOVES if word.replace("-", "_") in text]


@pytest.mark.parametrize("part", [jax.P("x"), jax.P(None, None, "x")], ids=str)
def test_gradients_lower_on_an_explicit_mesh(part, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: None)
    mask = random_mask(np.random.default_rng(0), (300, 500, 128, 64), 12)
    mesh = AbstractMesh((2,), ("x",), (AxisType.Explicit,), abstract_device=H100)
    sharding = jax.NamedSharding(mesh, part)
    q, k = (
        jax.ShapeDtypeStruct((2, n, 2, 16), "bfloat16", sharding=sharding)
        for n in (300, 500)
    )

    def loss(q, k, v):
        out = block_sparse_attention(q, k, v, mask, implementation="mosaic_gpu")
        return out.astype("float32").sum()

    with use_abstract_mesh(mesh):
        gradients = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)
        text = gradients.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3
    assert not [word for word in MOVES if word.replace("-", "_") in text]


def test_tiles_of_queries_divide_the_block_and_take_no_turns_alone():
    config = Launch("forward").config()
    with pytest.raises(ValueError, match="tile_q=32; expected 64 or 128"):
        dataclasses.replace(config, tile_q=32)
    with pytest.raises(ValueError, match="tile_q=64 has one warpgroup"):
        dataclasses.replace(config, tile_q=64, ping_pong=True)
    wide = dataclasses.replace(config, tile_q=128)
    with pytest.raises(ValueError, match="tile_q=128.* for block_q=64"):
        Launch("forward", blocks=(64, 128), given=wide).lower()


def test_rows_of_backward_items_are_one_or_two_warpgroups_that_take_turns():
    config = Launch("dq").config()
    with pytest.raises(ValueError, match="tile_rows=32; expected 64 or 128"):
        dataclasses.replace(config, tile_rows=32)
    with pytest.raises(ValueError, match="tile_rows=64 has one warpgroup"):
        dataclasses.replace(config, tile_rows=64, ping_pong=True)
    assert [config.rows(block) for block in (32, 64, 128)] == [32, 64, 128]
    half = dataclasses.replace(config, tile_rows=64)
    assert [half.rows(block) for block in (32, 64, 128)] == [32, 64, 64]


@pytest.mark.parametrize(
    "bias", [None, "bfloat16", "block", "entry", "linear", "table"]
)
@pytest.mark.parametrize("kernel", ["dq", "dkv"])
def test_backward_items_of_half_a_block(kernel, bias):
    launch = Launch(kernel, dims=(32, 32), bias=bias)
    half = BackwardConfig(tile=32, num_stages=3, teams=2, tile_rows=64)
    dataclasses.replace(launch, given=half).lower()


def test_steps_that_overlap_need_three_stages():
    few = dataclasses.replace(Launch("dq").config(), num_stages=2)
    launch = Launch("dq", given=few)
    with pytest.raises(ValueError, match="num_stages=2; expected at least 3"):
        launch.lower()


@pytest.mark.parametrize("kernel", TUNED)
def test_a_config_that_does_not_fit_is_refused(kernel):
    launch = Launch(kernel, dims=(128, 128))
    big = dataclasses.replace(launch.config(), num_stages=9)
    launch = dataclasses.replace(launch, given=big)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        launch.lower()
