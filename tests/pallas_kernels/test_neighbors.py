"""The kernels for neighbour lists: emulated, against XLA's way; lowered for an H100."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, use_abstract_mesh

from jsparse.pallas_kernels.mosaic_gpu import neighbors_sm90
from jsparse.patterns import _device_lists
from jsparse.patterns._parts import Sizes
from tests.pallas_kernels.emulation import emulated
from tests.pallas_kernels.launches import H100


def lists(rng, batch: int, sizes: Sizes, count: int) -> np.ndarray:
    """Near and far keys, each up to three times; some entries are padding."""
    t = np.arange(sizes.q_len)[:, None] * sizes.kv_len // sizes.q_len
    near = t + rng.integers(-40, 40, (batch, sizes.q_len, count))
    far = rng.integers(-9, sizes.kv_len + 9, near.shape)
    keys = np.where(rng.random(near.shape) < 0.9, near, far)
    keys[..., 1::7], keys[..., 2::7] = keys[..., ::7], keys[..., ::7]
    return rng.permuted(keys, axis=-1).astype(np.int32)


@pytest.mark.parametrize(
    "blocks, batch, shared, num_bits",
    [
        ((64, 64), 2, False, 40),
        ((128, 128), 2, True, 20),
        ((64, 32), 1, False, 60),
        ((128, 64), 1, False, 4),
    ],
)
def test_kernels_agree_with_sorting(blocks, batch, shared, num_bits, monkeypatch):
    sizes = Sizes(300, 420, *blocks)
    rng = np.random.default_rng(num_bits)
    index = jnp.asarray(lists(rng, 1 if shared else batch, sizes, 14))
    lengths = jnp.asarray([[300, 420], [201, 333]][:batch], jnp.int32)
    # A few blocks at a time, so that most query blocks take several rounds.
    monkeypatch.setattr(neighbors_sm90, "ROOM", 3 * blocks[0] * blocks[1] // 8)
    _device_lists._by_kernels.cache_clear()
    with emulated():
        active, bits = _device_lists._by_kernels(sizes, num_bits)(index, lengths)
    whole = jnp.broadcast_to(index, (batch, *index.shape[1:]))
    sort = functools.partial(_device_lists._by_sorting, sizes=sizes, num_bits=num_bits)
    expected = jax.vmap(sort)(whole, lengths)
    assert int(expected[0].sum((1, 2)).max()) > 3
    np.testing.assert_array_equal(active, expected[0])
    np.testing.assert_array_equal(bits, expected[1])


def test_mapped_calls_are_one_launch():
    sizes, rng = Sizes(100, 130, 64, 64), np.random.default_rng(1)
    index = jnp.asarray(lists(rng, 3, sizes, 5))
    lengths = jnp.asarray([[100, 130], [70, 130], [100, 20]], jnp.int32)
    _device_lists._by_kernels.cache_clear()
    find = _device_lists._by_kernels(sizes, 6)
    with emulated():
        found = jax.vmap(find)(index[:, None], lengths[:, None])
        shared = jax.vmap(find, (None, 0))(index[:1], lengths[:, None])
    sort = jax.vmap(
        functools.partial(_device_lists._by_sorting, sizes=sizes, num_bits=6)
    )
    for x, y in zip(found, sort(index, lengths), strict=True):
        np.testing.assert_array_equal(x[:, 0], y)
    same = sort(jnp.broadcast_to(index[:1], index.shape), lengths)
    for x, y in zip(shared, same, strict=True):
        np.testing.assert_array_equal(x[:, 0], y)


@pytest.mark.parametrize("block_q", neighbors_sm90.BLOCKS["block_q"])
@pytest.mark.parametrize("block_kv", neighbors_sm90.BLOCKS["block_kv"])
def test_lowers(block_q, block_kv):
    sizes = Sizes(1000, 3000, block_q, block_kv)
    shapes = [jax.ShapeDtypeStruct(x, jnp.int32) for x in ((2, 1000, 24), (2, 2))]
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        traced = jax.jit(_device_lists._by_kernels(sizes, 50)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("jsparse_neighbor") >= 2


@pytest.mark.parametrize(
    "blocks, length, taken",
    [
        ((64, 128), 10_000, True),
        ((32, 64), 10_000, False),
        ((64, 256), 10_000, False),
        ((64, 32), 32 * neighbors_sm90.MOST_KEY_BLOCKS, True),
        ((64, 32), 32 * neighbors_sm90.MOST_KEY_BLOCKS + 1, False),
    ],
)
def test_what_the_kernels_take(blocks, length, taken, monkeypatch):
    monkeypatch.setattr(_device_lists, "on_hopper", lambda: True)
    sizes = Sizes(length, length, *blocks)
    index = jnp.zeros((1, 1, 1), jnp.int32)
    assert _device_lists._kernels_take(index, sizes) == taken
    monkeypatch.setattr(_device_lists, "on_hopper", lambda: False)
    assert not _device_lists._kernels_take(index, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("block_q", neighbors_sm90.BLOCKS["block_q"])
@pytest.mark.parametrize("block_kv", neighbors_sm90.BLOCKS["block_kv"])
def test_on_a_gpu(block_q, block_kv):
    sizes, rng = Sizes(27_626, 20_011, block_q, block_kv), np.random.default_rng(2)
    index = jnp.asarray(lists(rng, 2, sizes, 49))
    lengths = jnp.asarray([[27_626, 20_011], [13_000, 15_000]], jnp.int32)
    for num_bits in (300, 250 * sizes.grid[0]):
        options = {"sizes": sizes, "num_bits": num_bits}
        sort = functools.partial(_device_lists._by_sorting, **options)
        expected = jax.jit(jax.vmap(sort))(index, lengths)
        assert bool((expected[0].sum((1, 2)) > num_bits).all()) == (num_bits == 300)
        find = jax.jit(_device_lists._by_kernels(**options))
        for _ in range(20):
            for x, y in zip(find(index, lengths), expected, strict=True):
                assert bool((x == y).all())
