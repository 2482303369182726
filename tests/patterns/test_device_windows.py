"""Atom windows of a traced number of atoms, against the host builder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import patterns
from jsparse.patterns import device

BLOCKS = [(64, 64), (128, 128), (64, 32), (128, 64), (48, 40), (200, 64)]


@pytest.mark.parametrize("block_q, block_kv", BLOCKS)
@pytest.mark.parametrize("length", [1, 33, 128, 200, 257, 513])
def test_the_pattern_is_that_of_the_host_builder(length, block_q, block_kv):
    blocks = {"block_q": block_q, "block_kv": block_kv}
    for number in {1, 20, 127, 128, 129, 177, 193, 200, 256, 300, 500, length}:
        if number > length:
            continue
        found = device.atom_windows(number, padded_to=length, **blocks)
        want = patterns.atom_windows(number, padded_to=length, **blocks)
        np.testing.assert_array_equal(found.to_dense(), want.to_dense())
        by_column = found.transpose().block_states()
        np.testing.assert_array_equal(by_column[0, 0].T, found.block_states()[0, 0])
        assert found.q_num_blocks.max() <= found.capacity.q
        listed = found.kv_num_blocks[0, 0]
        rows = -(-number // block_q)
        assert (listed[:rows] == found.capacity.kv).all()
        assert not listed[rows:].any()


def test_a_traced_number_gives_the_same_mask():
    make = jax.jit(lambda n: device.atom_windows(n, padded_to=513))
    for number in (0, 1, 130, 400, 513):
        want = device.atom_windows(number, padded_to=513)
        leaves = map(jax.tree_util.tree_leaves, (make(number), want))
        for x, y in zip(*leaves, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    beyond = make(600)
    np.testing.assert_array_equal(beyond.kv_indices, make(513).kv_indices)


def test_a_known_number_gives_the_very_same_arrays():
    first, second = (device.atom_windows(300, padded_to=512) for _ in "ab")
    assert first.kv_indices is second.kv_indices
    assert isinstance(first.kv_indices, np.ndarray)


def test_memory_grows_with_the_length_alone():
    def size(length):
        mask = device.atom_windows(length)
        return sum(x.nbytes for x in jax.tree_util.tree_leaves(mask))

    assert size(1 << 20) < 17 * size(1 << 16)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda: device.atom_windows(9, padded_to=8),
            ValueError,
            "padded_to=8 is less",
        ),
        (lambda: device.atom_windows(-1), ValueError, "num_atoms is -1"),
        (lambda: device.atom_windows(jnp.int32(9)), ValueError, "padded_to is missing"),
        (
            lambda: device.atom_windows(jnp.float32(9), padded_to=9),
            *(TypeError, "dtype float32; expected one integer"),
        ),
        (
            lambda: device.atom_windows(jnp.arange(2), padded_to=9),
            *(TypeError, "Use jax.vmap for several"),
        ),
        (lambda: device.atom_windows(9, block_q=0), ValueError, "block_q=0"),
    ],
)
def test_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
