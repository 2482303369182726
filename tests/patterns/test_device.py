from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.patterns import (
    BlockMask,
    CapacityError,
    Distance,
    Segments,
    Window,
    device,
)

INT_MAX = np.iinfo(np.int32).max


def _blocks_of(dense, block_q, block_kv):
    """Which blocks of ``[T, S]`` hold an allowed element."""
    q_len, kv_len = dense.shape
    dense = np.pad(dense, ((0, -q_len % block_q), (0, -kv_len % block_kv)))
    tiles = dense.reshape(-1, block_q, dense.shape[1] // block_kv, block_kv)
    return tiles.any((1, 3))


def _check(mask, dense):
    """Elements, blocks, lists and transposed lists are those of ``[B, T, S]``."""
    blocks = np.stack([_blocks_of(d, mask.block_q, mask.block_kv) for d in dense])
    np.testing.assert_array_equal(mask.to_dense()[:, 0], dense)
    np.testing.assert_array_equal(mask.block_states()[:, 0] == 1, blocks)
    np.testing.assert_array_equal(mask.full_kv_num_blocks, 0)
    for prefix, active in (("kv", blocks), ("q", blocks.swapaxes(1, 2))):
        counts = np.asarray(getattr(mask, f"{prefix}_num_blocks"))
        indices = np.asarray(getattr(mask, f"{prefix}_indices"))
        assert counts.dtype == indices.dtype == np.int32
        for b, row in np.ndindex(active.shape[:2]):
            want = np.flatnonzero(active[b, row])
            np.testing.assert_array_equal(indices[b, 0, row, : len(want)], want)
            np.testing.assert_array_equal(indices[b, 0, row, len(want) :], 0)
            assert counts[b, 0, row] == len(want)
    needed = np.zeros((len(dense), 4), np.int32)
    needed[:, 0], needed[:, 2] = blocks.sum(2).max(1), blocks.sum(1).max(1)
    np.testing.assert_array_equal(mask.needed_capacity, needed)


def _near(q, kv, cutoff):
    """``[T, S]`` bool in float64; asserts that no pair lies on the cut-off."""
    gap = np.linalg.norm(q[:, None].astype(float) - kv[None].astype(float), axis=-1)
    assert (np.abs(gap - cutoff)[np.isfinite(gap)] > 1e-5).all()
    return gap <= cutoff


def _points(rng, count, kind):
    if kind == "uniform":
        x = rng.uniform(0, 40, (count, 3))
    elif kind == "chain":
        x = np.cumsum(rng.standard_normal((count, 3)), axis=0)
    elif kind == "clusters":
        centres = rng.uniform(-300, 300, (4, 3))
        x = centres[rng.integers(0, 4, count)] + rng.standard_normal((count, 3))
    else:  # far from the origin, where float32 is coarse
        x = 5000 + np.cumsum(rng.standard_normal((count, 3)), axis=0)
    return x.astype(np.float32)


# ------------------------------------------------------------------------- radius


@pytest.mark.parametrize("kind", ["uniform", "chain", "clusters", "far"])
@pytest.mark.parametrize("blocks", [(16, 16), (20, 12), (1, 5), (128, 128)])
def test_radius_is_the_distance_rule_in_the_fewest_blocks(kind, blocks):
    rng = np.random.default_rng(len(kind) + blocks[0])
    x = _points(rng, 203, kind)
    block_q, block_kv = blocks
    mask = device.radius(x, 6.0, block_q=block_q, block_kv=block_kv, capacity=203)
    _check(mask, _near(x, x, 6.0)[None])


def test_radius_finds_pairs_that_no_first_atom_shows():
    # Two blocks whose boxes overlap, with their only near pair at the end of a box: a
    # block must be kept until its atoms themselves were tested.
    q, kv = (np.zeros((32, 3), np.float32) for _ in range(2))
    q[:, 0] = np.arange(32) * 100
    kv[:, 0] = np.arange(32) * 100 + 50
    q[23] = kv[15]
    q[23, 2] = 3
    dense = _near(q, kv, 4.0)
    assert dense.sum() == 1
    for at in (16, 32):
        mask = device.radius(q, 4.0, kv_coords=kv, block_q=at, block_kv=at, capacity=2)
        _check(mask, dense[None])


def test_radius_counts_pairs_at_exactly_the_cutoff():
    # Neighbouring blocks touch in one pair only, and that one lies on the cut-off.
    x = np.zeros((64, 3), np.float32)
    x[:, 0] = np.arange(64)
    mask = device.radius(x, 1.0, block_q=4, block_kv=4, capacity=3)
    t = np.arange(64)
    _check(mask, (np.abs(t[:, None] - t) <= 1)[None])


def test_radius_lists_every_pair_that_some_rounding_of_the_rule_allows():
    rng = np.random.default_rng(17)
    kv = rng.standard_normal((1500, 3))
    kv = (kv * 5 / np.linalg.norm(kv, axis=1, keepdims=True)).astype(np.float32)
    mask = device.radius(
        np.zeros((1, 3)), 5.0, kv_coords=kv, block_q=1, block_kv=1, capacity=1500
    )
    squared = kv[:, 0] * kv[:, 0] + kv[:, 1] * kv[:, 1] + kv[:, 2] * kv[:, 2]
    allowed = squared <= np.float32(25)
    assert 100 < allowed.sum() < 1400
    np.testing.assert_array_equal(mask.to_dense()[0, 0, 0], allowed)
    assert mask.num_blocks == 1500


def test_radius_of_zero_sees_coinciding_atoms_only():
    x = np.repeat(np.arange(30, dtype=np.float32), 2)[:, None] * np.ones(3, np.float32)
    mask = device.radius(x, 0, block_q=3, block_kv=3, capacity=2)
    t = np.arange(60) // 2
    _check(mask, (t[:, None] == t)[None])


@pytest.mark.parametrize("at_a_time", [1, 40])
def test_radius_tests_any_number_of_blocks_at_a_time(monkeypatch, at_a_time):
    monkeypatch.setattr(device, "_BOX_PAIRS", at_a_time * 4)
    monkeypatch.setattr(device, "_ATOM_PAIRS", at_a_time * 15 * 15)
    x = _points(np.random.default_rng(3), 190 + at_a_time, "uniform")
    mask = device.radius(x, 5.0, block_q=15, block_kv=15, capacity=16)
    _check(mask, _near(x, x, 5.0)[None])


def test_radius_of_other_keys_and_batches():
    rng = np.random.default_rng(4)
    q = np.stack([_points(rng, 90, "chain") for _ in range(3)])
    kv, cutoff = _points(rng, 70, "chain"), np.array([3.0, 6.0, 9.0], np.float32)
    mask = device.radius(
        q, cutoff, kv_coords=kv, block_q=16, block_kv=8, capacity=9, q_capacity=6
    )
    assert mask.capacity == (9, 0, 6, 0)
    assert (mask.batch_size, mask.num_heads) == (3, 1)
    _check(mask, np.stack([_near(q[b], kv, cutoff[b]) for b in range(3)]))


def test_radius_of_one_structure_with_a_cutoff_for_each_batch_entry():
    x, cutoff = _points(np.random.default_rng(4), 70, "chain"), [3.0, 6.0]
    mask = device.radius(x, np.asarray(cutoff), block_q=16, block_kv=8, capacity=9)
    _check(mask, np.stack([_near(x, x, c) for c in cutoff]))


def test_radius_ignores_what_lies_beyond_the_lengths():
    rng = np.random.default_rng(5)
    x = np.stack([_points(rng, 100, "chain") for _ in range(2)])
    lengths = np.array([37, 80])
    dense = np.zeros((2, 100, 100), bool)
    for b, n in enumerate(lengths):
        dense[b, :n, :n] = _near(x[b, :n], x[b, :n], 7.0)
        x[b, n:] = [[np.nan], [np.inf], [0.0], [1e30]] * ((100 - n) // 4) + [[1.0]] * (
            (100 - n) % 4
        )
    build = jax.jit(
        lambda x, n: device.radius(
            x, 7.0, block_q=16, block_kv=8, capacity=13, q_length=n
        )
    )
    mask = build(x, lengths)
    np.testing.assert_array_equal(mask.q_lengths, lengths)
    np.testing.assert_array_equal(mask.kv_lengths, lengths)
    _check(mask, dense)
    nothing = build(x, np.array([0, 200]))  # traced lengths are clipped
    assert not nothing.to_dense()[0].any()
    np.testing.assert_array_equal(nothing.q_lengths, [0, 100])


def test_radius_takes_unequal_lengths_of_one_structure():
    x = _points(np.random.default_rng(5), 60, "chain")
    mask = device.radius(
        x, 7.0, block_q=16, block_kv=16, capacity=4, q_length=20, kv_length=37
    )
    dense = _near(x, x, 7.0)
    dense[20:], dense[:, 37:] = False, False
    _check(mask, dense[None])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_radius_isolates_atoms_that_are_not_finite(bad):
    x = _points(np.random.default_rng(6), 60, "chain")
    x[[0, 17, 59], [0, 1, 2]] = bad
    x[20:30] = bad  # a whole block
    mask = device.radius(x, 8.0, block_q=10, block_kv=5, capacity=12)
    with np.errstate(invalid="ignore"):
        dense = _near(x, x, 8.0)
    seen = np.isfinite(x).all(1)
    assert not dense[~seen].any()
    assert dense[seen].any(1).all()
    _check(mask, dense[None])


def test_radius_does_not_let_an_infinite_cutoff_see_infinite_atoms():
    x = np.zeros((20, 3), np.float32)
    x[7] = np.inf
    build = jax.jit(lambda c: device.radius(x, c, block_q=4, block_kv=4, capacity=5))
    dense = np.ones((1, 20, 20), bool)
    dense[:, 7] = dense[:, :, 7] = False
    _check(build(np.float32(np.inf)), dense)
    for cutoff in (np.nan, -1.0):
        _check(build(np.float32(cutoff)), np.zeros((1, 20, 20), bool))


def test_radius_is_the_same_eagerly_and_under_jit_and_vmap():
    rng = np.random.default_rng(7)
    x = np.stack([_points(rng, 77, "chain") for _ in range(3)])

    def build(x, n):
        return device.radius(x, 5.0, block_q=16, block_kv=16, capacity=5, q_length=n)

    lengths = np.array([77, 50, 1], np.int32)
    mapped = jax.jit(jax.vmap(build))(x, lengths).check()
    for b in range(3):
        one = build(x[b], lengths[b])
        _check(one, _crop(_near(x[b], x[b], 5.0), int(lengths[b]))[None])
        got = jax.tree_util.tree_map(lambda y, b=b: y[b], mapped)
        jax.tree_util.tree_map(np.testing.assert_array_equal, got, one)


def _crop(dense, length):
    dense[length:], dense[:, length:] = False, False
    return dense


def test_one_compilation_serves_every_structure_of_a_bucket():
    traces = []

    @jax.jit
    def build(x, n, cutoff):
        traces.append(None)
        return device.radius(x, cutoff, block_q=16, block_kv=16, capacity=6, q_length=n)

    rng = np.random.default_rng(8)
    for n, cutoff in ((96, 4.0), (61, 6.0)):
        x = np.zeros((96, 3), np.float32)
        x[:n] = _points(rng, n, "chain")
        _check(build(x, n, cutoff).check(), _crop(_near(x, x, cutoff), n)[None])
    assert len(traces) == 1


def test_radius_takes_no_part_in_gradients():
    x = _points(np.random.default_rng(9), 40, "chain")

    def loss(x):
        mask = device.radius(x, 5.0, block_q=8, block_kv=8, capacity=5)
        rule = mask.rules[0]
        assert isinstance(rule, Distance)
        return rule.q_coords.sum() + (x * mask.kv_num_blocks[0, 0].sum()).sum()

    with jax.numpy_dtype_promotion("standard"):
        value, grad = jax.value_and_grad(loss)(x)
    blocks = int(_blocks_of(_near(x, x, 5.0), 8, 8).sum())
    np.testing.assert_array_equal(grad, np.full_like(x, blocks))
    assert np.isfinite(value)


def test_radius_takes_any_real_coordinates():
    x = np.arange(60).reshape(20, 3) % 7
    want = device.radius(np.float32(x), 3.5, block_q=4, block_kv=4, capacity=5)
    for form in (x, x.astype(np.float64), x.tolist(), jnp.asarray(x, jnp.bfloat16)):
        mask = device.radius(form, 3.5, block_q=4, block_kv=4, capacity=5)
        np.testing.assert_array_equal(mask.to_dense(), want.to_dense())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"coords": np.zeros((5, 2))}, r"coords has shape \(5, 2\); expected \[N, 3\]"),
        ({"coords": np.zeros(3)}, r"coords has shape \(3,\)"),
        ({"coords": np.zeros((0, 3))}, "q_len=0"),
        ({"kv_coords": np.zeros((0, 3))}, "kv_len=0"),
        ({"kv_coords": np.zeros((5, 4))}, r"kv_coords has shape \(5, 4\)"),
        ({"cutoff": -1.0}, r"cutoff=-1.0; expected a distance"),
        ({"cutoff": np.nan}, "cutoff=nan"),
        ({"cutoff": np.inf}, "cutoff=inf"),
        ({"cutoff": np.zeros((2, 1))}, r"cutoff has shape \(2, 1\)"),
        ({"cutoff": np.ones(2), "q_length": [1, 2, 3]}, "cutoff has 2, q_length has 3"),
        ({"block_q": 0}, "block_q=0"),
        ({"block_kv": 2.0}, "block_kv=2.0"),
        ({"capacity": 0}, "capacity=0; expected an integer of at least 1"),
        ({"capacity": True}, "capacity=True"),
        ({"q_capacity": -3}, "q_capacity=-3"),
        ({"q_length": 9}, "q_length=9; expected 0 to 8"),
        ({"kv_length": -1}, "kv_length=-1; expected 0 to 8"),
    ],
)
def test_radius_refuses_bad_arguments(change, message):
    good: dict[str, Any] = {"coords": np.zeros((8, 3)), "cutoff": 1.0, "capacity": 2}
    device.radius(**good)
    with pytest.raises(ValueError, match=message):
        device.radius(**{**good, **change})


def test_radius_refuses_bad_types():
    x = np.zeros((8, 3))
    with pytest.raises(TypeError, match="coords has dtype complex"):
        device.radius(x.astype(complex), 1.0, capacity=1)
    with pytest.raises(TypeError, match="cutoff has dtype bool"):
        device.radius(x, True, capacity=1)
    with pytest.raises(TypeError, match="cutoff has dtype <U2; expected real numbers"):
        device.radius(x, "10", capacity=1)
    with pytest.raises(TypeError, match=r"q_length .* float"):
        device.radius(x, 1.0, capacity=1, q_length=3.0)
    with pytest.raises(ValueError, match="known when the function is traced"):
        jax.jit(lambda n: device.radius(x, 1.0, capacity=n))(3)
    with pytest.raises(ValueError, match="less than 2"):
        device.radius(np.zeros((50_000, 3)), 1.0, block_q=1, block_kv=1, capacity=1)


@pytest.mark.parametrize(
    "build, name",
    [
        (lambda x: device.radius(x, 5.0, capacity=1), "radius: coords"),
        (lambda x: device.neighbors(x, capacity=1), "neighbors: index"),
    ],
)
def test_lists_must_be_arrays(build, name):
    with pytest.raises(ValueError, match=f"{name} is not a rectangular array"):
        build([[0, 1, 2], [1]])
    with pytest.raises(TypeError, match=f"{name} is a list of traced values.*stack"):
        jax.jit(lambda x: build([x, x]))(np.zeros(3, int))


def test_sizes_are_never_traced():
    with pytest.raises(TypeError, match="radius: block_q is traced.*sizes are static"):
        jax.jit(lambda n: device.radius(np.eye(3), 1.0, block_q=n, capacity=1))(8)


def test_builders_obey_64_bits_and_the_nan_checker():
    x = _points(np.random.default_rng(16), 40, "chain")
    index = np.arange(40)[:, None] // np.arange(1, 4)
    with jax.enable_x64(True), jax.debug_nans(True):
        near = device.radius(
            x.astype(np.float64), 5.0, block_q=8, block_kv=8, capacity=5
        )
        listed = device.neighbors(index, block_q=8, block_kv=8, capacity=5)
    _check(near, _near(x, x, 5.0)[None])
    _check(listed, _listed(index[None], 40))
    rule = near.rules[0]
    assert isinstance(rule, Distance)
    assert rule.q_coords.dtype == rule.cutoff.dtype == np.float32
    assert near.q_lengths.dtype == listed.kv_lengths.dtype == np.int32
    assert near.needed_capacity is not None
    assert near.needed_capacity.dtype == np.int32


# ----------------------------------------------------------------------- overflow


def test_overflow_raises_eagerly_with_the_capacity_needed():
    x = _points(np.random.default_rng(10), 100, "uniform")
    blocks = _blocks_of(_near(x, x, 20.0), 8, 4)
    need_kv, need_q = int(blocks.sum(1).max()), int(blocks.sum(0).max())
    sizes = {"block_q": 8, "block_kv": 4}
    message = f"kv has {need_kv - 1} and needs {need_kv}; q has 2 and needs {need_q}"
    with pytest.raises(CapacityError, match=message):
        device.radius(x, 20.0, capacity=need_kv - 1, q_capacity=2, **sizes)
    fits = device.radius(x, 20.0, capacity=need_kv, q_capacity=need_q, **sizes)
    _check(fits, _near(x, x, 20.0)[None])


def test_overflow_under_jit_is_reported_per_batch_entry_and_never_read_past():
    x = np.zeros((2, 40, 3), np.float32)
    x[0, :, 0] = np.arange(40) * 10
    build = jax.jit(lambda x: device.radius(x, 5.0, block_q=8, block_kv=8, capacity=2))
    mask = build(x)
    np.testing.assert_array_equal(mask.needed_capacity, [[1, 0, 1, 0], [5, 0, 5, 0]])
    np.testing.assert_array_equal(mask.kv_num_blocks[:, 0], [[1] * 5, [2] * 5])
    np.testing.assert_array_equal(mask.kv_indices[1, 0], [[0, 1]] * 5)
    with pytest.raises(
        CapacityError, match="kv has 2 and needs 5; q has 2 and needs 5"
    ):
        mask.check()
    # Nothing on the host mistakes the cut lists for the pattern, wider ones neither.
    for read in (mask.to_dense, mask.block_states, lambda: mask.pad_to(40, capacity=9)):
        with pytest.raises(CapacityError):
            read()
    with pytest.raises(CapacityError, match="needs 5"):
        jax.vmap(lambda x: device.radius(x, 5.0, block_q=8, block_kv=8, capacity=4))(
            x
        ).check()


# ---------------------------------------------------------------------- neighbors


def _listed(index, kv_len):
    """``[B, T, S]`` bool of ``[B, T, k]``, one entry after another."""
    dense = np.zeros((*index.shape[:2], kv_len), bool)
    for b, t, n in np.ndindex(index.shape):
        if 0 <= index[b, t, n] < kv_len:
            dense[b, t, index[b, t, n]] = True
    return dense


def _list(rng, shape, kv_len):
    """Random entries with many duplicates, padding and some empty rows."""
    index = rng.integers(-kv_len // 3, kv_len, shape, np.int32)
    index[..., 1::3] = index[..., :1]
    index[..., 5, :] = -1
    return index


@pytest.mark.parametrize("blocks", [(16, 32), (8, 40), (20, 12), (1, 5), (128, 128)])
def test_neighbors_is_the_set_of_its_entries(blocks):
    block_q, block_kv = blocks
    index = _list(np.random.default_rng(11), (83, 7), 83)
    mask = device.neighbors(index, block_q=block_q, block_kv=block_kv, capacity=83)
    _check(mask, _listed(index[None], 83))
    words = -(-block_kv // 32)
    assert mask.bits is not None
    assert mask.bits.shape[0] == 1
    assert mask.bits.shape[2:] == (block_q, words)
    assert mask.bits.dtype == jnp.uint32
    _check_pool(mask)


def _check_pool(mask):
    """Bits beyond the used entries, and beyond the block and the lengths, are zero."""
    bits = np.asarray(mask.bits)
    for b, pool in enumerate(bits):
        assert not pool[int(mask.kv_num_blocks[b].sum()) :].any()
    count = np.unpackbits(bits.view(np.uint8)).sum()
    assert count == mask.to_dense().sum()


def test_neighbors_of_other_keys_batches_and_lengths():
    rng = np.random.default_rng(12)
    index = _list(rng, (3, 45, 6), 100)
    q_lengths, kv_lengths = np.array([45, 1, 30]), np.array([100, 100, 64])
    traces = []

    @jax.jit
    def build(x, n, m):
        traces.append(None)
        return device.neighbors(
            x,
            kv_len=100,
            block_q=8,
            block_kv=16,
            capacity=7,
            q_capacity=6,
            q_length=n,
            kv_length=m,
        )

    mask = build(index, q_lengths, kv_lengths)
    dense = _listed(index, 100)
    for b in range(3):
        dense[b, q_lengths[b] :], dense[b, :, kv_lengths[b] :] = False, False
    assert mask.capacity == (7, 0, 6, 0)
    np.testing.assert_array_equal(mask.q_lengths, q_lengths)
    _check(mask, dense)
    _check_pool(mask)
    build(_list(rng, (3, 45, 6), 100), kv_lengths // 3, kv_lengths)
    assert len(traces) == 1


def test_neighbors_is_the_same_eagerly_and_under_jit_and_vmap():
    index = _list(np.random.default_rng(13), (3, 40, 5), 40)

    def build(x):
        return device.neighbors(x, block_q=8, block_kv=8, capacity=5)

    batched = build(index)
    mapped = jax.jit(jax.vmap(build))(index).check()
    for b in range(3):
        one = build(index[b])
        _check(one, _listed(index[b : b + 1], 40))
        got = jax.tree_util.tree_map(lambda y, b=b: y[b], mapped)
        jax.tree_util.tree_map(np.testing.assert_array_equal, got, one)
        np.testing.assert_array_equal(batched.to_dense()[b], one.to_dense()[0])


def test_neighbors_reports_bits_that_do_not_fit():
    index = _list(np.random.default_rng(14), (64, 4), 64)
    blocks = _blocks_of(_listed(index[None], 64)[0], 8, 8)
    total, widest = int(blocks.sum()), int(blocks.sum(1).max())
    sizes = {"block_q": 8, "block_kv": 8, "capacity": 8}
    fits = device.neighbors(index, num_bits=total, **sizes)
    assert fits.bits is not None
    assert fits.bits.shape[1] == total
    _check(fits, _listed(index[None], 64))
    with pytest.raises(CapacityError, match=f"bits has {total - 1} and needs {total}"):
        device.neighbors(index, num_bits=total - 1, **sizes)
    short = jax.jit(lambda x: device.neighbors(x, num_bits=total - 1, **sizes))(index)
    # The op compares this with the capacity to poison its output.
    assert int(short.needed_capacity[0, 0]) == INT_MAX
    with pytest.raises(CapacityError, match=f"narrow: bits has {total - 1} and needs"):
        short.check()
    with pytest.raises(CapacityError, match=f"kv has 1 and needs {widest}; bits has 3"):
        device.neighbors(index, num_bits=3, **{**sizes, "capacity": 1, "q_capacity": 8})


def test_neighbors_treats_entries_beyond_the_keys_as_padding_when_traced():
    index = np.array([[0, 4], [1, 99], [INT_MAX, 2], [-9, -1]], np.int32)
    with pytest.raises(
        ValueError, match="an entry of 2147483647; expected less than 4"
    ):
        device.neighbors(index, block_q=2, block_kv=2, capacity=2)
    build = jax.jit(lambda x: device.neighbors(x, block_q=2, block_kv=2, capacity=2))
    _check(build(index), _listed(index[None], 4))


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64]
)
def test_neighbors_takes_any_integers(dtype):
    index = np.arange(300)[:, None] % 97 + np.arange(3)
    if np.iinfo(dtype).min < 0:
        index[::2, 1] = -(2**40) if dtype is np.int64 else np.iinfo(dtype).min
    want = _listed(index[None], 300)[None]
    forms: list[Any] = [index.astype(dtype)]
    if np.dtype(dtype).itemsize <= 4:
        forms.append(jnp.asarray(index, dtype))
    build = functools.partial(device.neighbors, block_q=64, block_kv=64, capacity=5)
    for form in forms:
        np.testing.assert_array_equal(build(form).to_dense(), want)
    if dtype in (np.uint8, np.uint32):
        np.testing.assert_array_equal(jax.jit(build)(forms[-1]).to_dense(), want)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"index": np.zeros(4, int)}, ValueError, r"index has shape \(4,\)"),
        ({"index": np.zeros((4, 0), int)}, ValueError, r"k of at least 1. Use -1"),
        ({"index": np.zeros((0, 4), int)}, ValueError, "q_len=0"),
        ({"index": np.zeros((4, 2))}, TypeError, "index has dtype float"),
        ({"index": np.zeros((4, 2), bool)}, TypeError, "index has dtype bool"),
        (
            {"index": jnp.full((4, 2), 4)},
            ValueError,
            "entry of 4; expected less than 4",
        ),
        ({"index": np.full((4, 2), 2**40)}, ValueError, "entry of 1099511627776"),
        ({"kv_len": 0}, ValueError, "kv_len=0"),
        ({"capacity": 1.0}, ValueError, r"capacity=1.0"),
        ({"num_bits": 0}, ValueError, "num_bits=0"),
        ({"q_length": 5}, ValueError, "q_length=5; expected 0 to 4"),
        ({"kv_length": [4, 4], "q_length": [1, 2, 3]}, ValueError, "q_length has 3"),
    ],
)
def test_neighbors_refuses_bad_arguments(change, error, message):
    good: dict[str, Any] = {"index": np.zeros((4, 2), int), "capacity": 1}
    device.neighbors(**good)
    with pytest.raises(error, match=message):
        device.neighbors(**{**good, **change})


# -------------------------------------------------------------- from_dense_blocks


def test_from_dense_blocks_lists_the_map():
    rng = np.random.default_rng(15)
    active = rng.random((2, 3, 5, 4)) < 0.5
    build = jax.jit(
        lambda a: device.from_dense_blocks(
            a, q_len=37, kv_len=30, block_q=8, block_kv=8, capacity=4, q_capacity=5
        )
    )
    mask = build(active).check()
    assert (mask.batch_size, mask.num_heads) == (2, 3)
    np.testing.assert_array_equal(mask.block_states() == 1, active)
    rows, cols = np.nonzero(active[1, 2])
    want = BlockMask.from_blocks(rows, cols, q_len=37, kv_len=30, block_q=8, block_kv=8)
    np.testing.assert_array_equal(mask.to_dense()[1, 2], want.to_dense()[0, 0])
    flipped = mask.transpose().to_dense()
    np.testing.assert_array_equal(flipped, mask.to_dense().swapaxes(2, 3))


def test_from_dense_blocks_applies_rules_and_lengths_of_each_batch_entry():
    active = np.ones((3, 3), bool)
    ids = np.stack([np.arange(24) // 5, np.arange(24) // 7]).astype(np.int32)
    start = np.arange(24, dtype=np.int32)[None]
    mask = device.from_dense_blocks(
        active,
        q_len=24,
        block_q=8,
        block_kv=8,
        capacity=3,
        rules=(Segments(ids, ids), Window(start - 2, start + 3)),
        kv_length=[24, 9],
    )
    t = np.arange(24)
    dense = (ids[:, :, None] == ids[:, None]) & (np.abs(t[:, None] - t) <= 2)
    dense[1, :, 9:] = False
    np.testing.assert_array_equal(mask.to_dense()[:, 0], dense)
    np.testing.assert_array_equal(mask.kv_num_blocks[:, 0], [[3] * 3, [2] * 3])
    needed = np.asarray(mask.needed_capacity)
    np.testing.assert_array_equal(needed[:, [0, 2]], [[3, 3], [2, 3]])


def test_from_dense_blocks_lists_full_blocks_apart():
    """But for those that reach beyond a length, or are not to be computed."""
    active = np.ones((3, 3), bool)
    active[2, 0] = False
    full = np.zeros((3, 3), bool)
    full[:2, :2] = full[2] = True
    ids = (np.arange(22) >= 16).astype(np.int32)[None]
    mask = jax.jit(
        lambda *maps: device.from_dense_blocks(
            maps[0],
            q_len=22,
            block_q=8,
            block_kv=8,
            capacity=3,
            full=maps[1],
            rules=(Segments(ids, ids),),
            q_length=[22, 12],
        )
    )(active, full)
    mask.check()
    states = [[[2, 2, 1], [2, 2, 1], [0, 1, 1]], [[2, 2, 1], [1, 1, 1], [0, 0, 0]]]
    np.testing.assert_array_equal(mask.block_states()[:, 0], states)
    dense = np.broadcast_to(ids[0][:, None] == ids, (2, 22, 22)).copy()
    dense[1, 12:] = False
    np.testing.assert_array_equal(mask.to_dense()[:, 0], dense)
    assert mask.capacity == (3, 3, 3, 3)
    np.testing.assert_array_equal(mask.needed_capacity[0], [2, 2, 3, 2])


def test_from_dense_blocks_refuses_bad_arguments():
    sizes: dict[str, Any] = {"q_len": 20, "block_q": 8, "block_kv": 8, "capacity": 1}
    eye = np.eye(3, dtype=bool)
    device.from_dense_blocks(eye, **sizes)
    for wrong in (eye[:2], eye.astype(np.int32)):
        with pytest.raises(ValueError, match=r"full has shape .* as active has"):
            device.from_dense_blocks(eye, full=wrong, **sizes)
    with pytest.raises(TypeError, match="active has dtype float"):
        device.from_dense_blocks(eye.astype(np.float32), **sizes)
    for shape in ((2, 3), (1, 3, 3), (3,)):
        with pytest.raises(ValueError, match=r"expected \[3, 3\] or \[B, H, 3, 3\]"):
            device.from_dense_blocks(np.ones(shape, bool), **sizes)
    ids = np.zeros((1, 24), np.int32)
    with pytest.raises(ValueError, match=r"Segments rule .* \(1, 24\); .* 20"):
        device.from_dense_blocks(eye, rules=(Segments(ids, ids),), **sizes)
    with pytest.raises(TypeError, match=r"from_dense_blocks: rules\[0\] is a str"):
        device.from_dense_blocks(eye, rules=["a"], **sizes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        CapacityError, match="kv has 1 and needs 3; q has 1 and needs 3"
    ):
        device.from_dense_blocks(~eye | eye, **sizes)
    ids, both = np.zeros((3, 20), np.int32), np.ones((2, 1, 3, 3), bool)
    with pytest.raises(ValueError, match=r"active has 2, .* rules\[0\] has 3"):
        device.from_dense_blocks(both, rules=(Segments(ids, ids),), **sizes)
