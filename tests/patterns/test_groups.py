from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.patterns import BlockMask, join_groups, split_groups

LENGTHS = [(5, 9), (8, 4), (1, 17)]


def _mask():
    one = [
        BlockMask.from_blocks([0], [0], q_len=t, kv_len=s, block_q=4, block_kv=8)
        for t, s in LENGTHS
    ]
    return BlockMask.concatenate(one)


@pytest.mark.parametrize("side,column", [("q", 0), ("kv", 1)])
@pytest.mark.parametrize("axis", [0, 1, -3, -1])
def test_join_puts_each_group_where_the_mask_says(side, column, axis):
    mask, rng = _mask(), np.random.default_rng(0)
    shape = [2, 3, 2, 5]
    arrays = []
    for lengths in LENGTHS:
        shape[axis] = lengths[column]
        arrays.append(rng.standard_normal(shape).astype(np.float32))
    joined = join_groups(arrays, mask, side, axis)
    assert isinstance(joined, jax.Array)
    expected = np.zeros((mask.q_len, mask.kv_len)[column])
    groups = np.asarray(mask.groups)[:, [2 * column, 2 * column + 1]]
    for n, (start, length) in enumerate(groups):
        piece = np.take(np.asarray(joined), np.arange(start, start + length), axis)
        np.testing.assert_array_equal(piece, arrays[n])
        expected[start : start + length] = 1
    used = np.moveaxis(np.asarray(joined != 0), axis, 0).reshape(len(expected), -1)
    np.testing.assert_array_equal(used.all(1), expected)
    np.testing.assert_array_equal(used.any(1), expected)
    for there, back in zip(arrays, split_groups(joined, mask, side, axis), strict=True):
        np.testing.assert_array_equal(there, back)


def test_padded_mask_leaves_room_at_the_end():
    mask = _mask().pad_to(64, 96)
    arrays = [jnp.ones((t, 2), jnp.bfloat16) for t, _ in LENGTHS]
    joined = join_groups(arrays, mask)
    assert joined.shape == (64, 2)
    assert joined.dtype == jnp.bfloat16
    assert float(joined.sum(dtype=jnp.float32)) == 2 * (5 + 8 + 1)
    assert [len(x) for x in split_groups(joined, mask)] == [5, 8, 1]


def test_runs_under_jit_and_grad():
    mask = _mask()
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(t).astype(np.float32) for t, _ in LENGTHS]
    weights = rng.standard_normal(mask.q_len).astype(np.float32)

    @jax.jit
    def loss(arrays):
        return join_groups(arrays, mask) @ weights

    grads = jax.grad(loss)(arrays)
    for got, want in zip(grads, split_groups(weights, mask), strict=True):
        np.testing.assert_array_equal(got, want)
    split = jax.jit(lambda x: split_groups(x, mask))(weights)
    assert [x.shape for x in split] == [(5,), (8,), (1,)]


def test_refuses_what_does_not_fit():
    mask = _mask()
    good = [np.zeros((t, 2), np.float32) for t, _ in LENGTHS]
    with pytest.raises(ValueError, match="2 arrays for 3 groups"):
        join_groups(good[:2], mask)
    with pytest.raises(
        ValueError, match=r"array 1 has shape \(7, 2\); expected 8 entr"
    ):
        join_groups([good[0], good[1][:7], good[2]], mask)
    with pytest.raises(ValueError, match=r"array 0 has .* the kv length of group 0"):
        join_groups(good, mask, "kv")
    with pytest.raises(ValueError, match="array 2 is int32"):
        join_groups([*good[:2], good[2].astype(np.int32)], mask)
    with pytest.raises(ValueError, match=r"array 1 is float32 \(8, 1\)"):
        join_groups([good[0], good[1][:, :1], good[2]], mask)
    with pytest.raises(ValueError, match="axis=2"):
        join_groups(good, mask, axis=2)
    with pytest.raises(ValueError, match="side='k'; expected 'q' or 'kv'"):
        join_groups(good, mask, "k")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"shape \(19,\); expected 20 entries"):
        split_groups(np.zeros(19), mask)
    with pytest.raises(ValueError, match="axis=-2"):
        split_groups(np.zeros(20), mask, axis=-2)


def test_refuses_masks_without_host_groups():
    single = BlockMask.from_blocks([0], [0], q_len=5)
    with pytest.raises(ValueError, match="has no groups; expected a mask made by"):
        split_groups(np.zeros(5), single)
    with pytest.raises(TypeError, match="mask is a list; expected a BlockMask"):
        split_groups(np.zeros(5), [2, 3])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="join_groups: .* has no groups"):
        join_groups([np.zeros(5)], single)
    with pytest.raises(TypeError, match="close over the mask"):
        jax.jit(lambda m: split_groups(np.zeros(20), m))(_mask())
