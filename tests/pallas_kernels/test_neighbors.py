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
from tests.support.ptx import Machine, Memory


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


def both_entry_lists(index, lengths, sizes, by_kernels):
    """`EntryLists` in both ways, and how often lists name each block."""
    room = int(sizes.grid[0] * sizes.grid[1])
    sort = functools.partial(_device_lists._by_sorting, sizes=sizes, num_bits=room)
    whole = jnp.broadcast_to(index, (len(lengths), *index.shape[1:]))
    active, bits = jax.vmap(sort)(whole, lengths)
    counts = active.sum(-1, dtype=jnp.int32)
    sort = functools.partial(_device_lists._entries_by_sorting, sizes=sizes)
    expected = jax.vmap(sort)(whole, lengths)
    t = np.arange(sizes.q_len)[:, None]
    exists = (np.asarray(whole) >= 0) & (whole < lengths[:, 1, None, None])
    b, t, n = np.nonzero(exists & (t < lengths[:, 0, None, None]))
    named = np.zeros((len(lengths), *sizes.grid), int)
    k = np.asarray(whole)[b, t, n] // sizes.block_kv
    np.add.at(named, (b, t // sizes.block_q, k), 1)
    return by_kernels(index, lengths, bits, counts, sizes), expected, named


def check_entry_lists(found, expected, named):
    """The entries of a block may come in any order; ``named`` counts them."""
    found, expected = (jax.tree.map(np.asarray, x) for x in (found, expected))
    np.testing.assert_array_equal(found.counted, expected.counted)
    np.testing.assert_array_equal(found.starts, expected.starts)
    header = neighbors_sm90.HEADER
    for b, q, k in np.ndindex(named.shape):
        start, count = expected.starts[b, q, k], named[b, q, k]
        own = slice(start, start + count)
        for x in (found.lists[b, q], expected.lists[b, q]):
            assert x[start - header : start].tolist() == [count, q, start]
        one, other = (np.sort(x.lists[b, q, own]) for x in (found, expected))
        np.testing.assert_array_equal(one, other)


def entry_lists_by_kernels(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_device_lists, "on_hopper", lambda: True)
        return _device_lists.entry_lists(*args)


@pytest.mark.parametrize(
    "blocks, batch, shared",
    [((64, 64), 2, False), ((128, 128), 2, True), ((64, 32), 1, False)],
)
def test_entries_agree_with_sorting(blocks, batch, shared):
    sizes, rng = Sizes(300, 420, *blocks), np.random.default_rng(batch)
    index = jnp.asarray(lists(rng, 1 if shared else batch, sizes, 14))
    # A list of its own without duplicates, as most are, and an empty one.
    index = index.at[:, 70].set(jnp.arange(14)).at[:, 71].set(-1)
    lengths = jnp.asarray([[300, 420], [201, 333]][:batch], jnp.int32)
    with emulated():
        found = both_entry_lists(index, lengths, sizes, entry_lists_by_kernels)
    assert found[2].sum() > found[1].counted.sum() > 0
    check_entry_lists(*found)


@pytest.mark.parametrize(
    "blocks, count", [((64, 32), 14), ((128, 64), 14), ((64, 64), 1)]
)
def test_instructions(blocks, count, monkeypatch):
    """The kernels' PTX, interpreted, for the last query block, which is not whole."""
    kernels = neighbors_sm90
    own, row, keys, q_len = 1, blocks[0], 190, blocks[0] + 30
    before = 3  # query blocks of other batch entries
    sizes, rng = Sizes(q_len, 200, *blocks), np.random.default_rng(7)
    index = lists(rng, 1, sizes, count)
    index[0, row + 3], index[0, row + 4] = np.arange(count), -1
    lengths = jnp.asarray([[q_len - 1, keys]], jnp.int32)
    _, expected, named = both_entry_lists(index, lengths, sizes, lambda *_: None)
    sort = functools.partial(_device_lists._by_sorting, sizes=sizes, num_bits=20)
    active, bits = map(np.asarray, sort(jnp.asarray(index[0]), lengths[0]))
    bits, (nq, nk) = bits.view(np.int32).reshape(20, -1), sizes.grid
    numbers = (np.cumsum(active) - 1).astype(np.int32)
    first, total = int(active[:own].sum()), int(active.sum())
    empty = expected.lists.shape[-1] - kernels.ALIGNED + kernels.HEADER
    starts = np.pad(expected.starts[0], ((before, 0), (0, 512 - nk)))
    starts[:, nk:] = empty
    size = expected.lists.shape[-1]

    shared = (np.zeros(512, np.int32), np.zeros_like(bits), np.zeros(512, np.int32))
    in_shared = [
        Memory(x, n << 20)
        for n, x in enumerate((*shared, starts[before + own].copy()), 1)
    ]
    counts, tile, extra, ends = in_shared
    given = index.reshape(-1), numbers, bits, starts
    shapes = (before + nq, size), (before + nq, blocks[0] * count)
    out = np.zeros(shapes[0], np.int32), np.zeros(shapes[1], np.int8)
    in_global = [Memory(x, n << 36) for n, x in enumerate((*given, *out), 1)]
    index_, numbers, bits_, starts, found, counted = in_global
    machine = Machine(in_shared + in_global)
    machine.install(monkeypatch, kernels)

    def each_entry(f, *args):
        end = (q_len - 1 - row) * count
        for n in range(0, end, kernels.THREADS * kernels.AT_ONCE):
            machine.each(f, *args, n, end, keys)

    each_entry(kernels.add_to_blocks(count, blocks[1]), index_, counts, row)
    np.testing.assert_array_equal(counts.array[:nk], named[0, own])

    add = kernels.add_bits(count, blocks[0], blocks[1], len(bits))
    each_entry(add, index_, numbers, tile, row, own * nk, first)
    np.testing.assert_array_equal(tile.array[: total - first], bits[first:total])

    each_entry(kernels.count_entries(count), index_, extra, row)
    for n in range(first, total):
        take_off = kernels.take_off_bits(blocks[0], blocks[1] // 32)
        machine.each(take_off, bits_, extra, n)
    exists = (index[0, row:-1] >= 0) & (index[0, row:-1] < keys)
    twice = exists.sum(1) - np.asarray(expected.counted)[0, row:-1].sum(1)
    assert (count == 1 or (twice > 0).sum() > 9) and twice[3] == 0
    np.testing.assert_array_equal(extra.array[:29], twice)
    assert not extra.array[29:].any()

    place = kernels.place_entries(count, blocks[1], size)
    each_entry(place, index_, ends, extra, found, counted, before + own, row)
    machine.each(kernels.close_lists(512, size), starts, ends, found, before + own, own)
    others = np.arange(nq)[:, None] != own
    whole = counted.array[before:].reshape(1, -1, count)[:, :q_len] != 0
    whole[:, :row] = expected.counted[:, :row]
    mine = np.where(others, expected.lists, found.array[before:])
    check_entry_lists(
        _device_lists.EntryLists(mine, expected.starts, whole), expected, named
    )


@pytest.mark.parametrize("block_q", neighbors_sm90.BLOCKS["block_q"])
@pytest.mark.parametrize("block_kv", neighbors_sm90.BLOCKS["block_kv"])
def test_lowers(block_q, block_kv):
    sizes = Sizes(1000, 3000, block_q, block_kv)
    shapes = [jax.ShapeDtypeStruct(x, jnp.int32) for x in ((2, 1000, 24), (2, 2))]

    def both(index, lengths):
        active, bits = _device_lists._by_kernels(sizes, 50)(index, lengths)
        counts = active.sum(-1, dtype=jnp.int32)
        return entry_lists_by_kernels(index, lengths, bits, counts, sizes)

    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        traced = jax.jit(both).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("blocks", "bits", "entries"):
        assert f"jsparse_neighbor_{kernel}" in text


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


@pytest.mark.gpu
@pytest.mark.parametrize("block_q", neighbors_sm90.BLOCKS["block_q"])
@pytest.mark.parametrize("block_kv", neighbors_sm90.BLOCKS["block_kv"])
def test_entries_on_a_gpu(block_q, block_kv):
    sizes, rng = Sizes(3_626, 2_011, block_q, block_kv), np.random.default_rng(3)
    index = jnp.asarray(lists(rng, 2, sizes, 49))
    index = index.at[:, 70].set(jnp.arange(49)).at[:, 71].set(-1)
    lengths = jnp.asarray([[3_626, 2_011], [1_300, 1_500]], jnp.int32)
    for _ in range(5):
        found = both_entry_lists(index, lengths, sizes, _device_lists.entry_lists)
        check_entry_lists(*found)
