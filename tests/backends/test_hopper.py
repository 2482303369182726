"""What the adapters of the Hopper kernels compute beside them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.backends import _hopper


@pytest.mark.parametrize("columns", [9, 40_000])
def test_order_of_blocks_by_key(columns):
    """On the host and traced; with sort keys of two bytes and of four."""
    rng = np.random.default_rng(0)
    heads, rows, capacity, entries = 2, 7, 5, []
    for _ in range(heads * rows):
        some = rng.choice(columns, rng.integers(0, capacity + 1), replace=False)
        entries.append(np.sort(some))
    counts = np.array([len(x) for x in entries], np.int32).reshape(heads, rows)
    unused = np.iinfo(np.int32).max
    lists = [np.pad(x, (0, capacity - len(x)), constant_values=unused) for x in entries]
    indices = np.array(lists, np.int32).reshape(heads, rows, capacity)

    blocks = [
        (h, j, i)
        for h in range(heads)
        for i in range(rows)
        for j in indices[h, i, : counts[h, i]]
    ]
    expected = sorted(range(len(blocks)), key=blocks.__getitem__)
    order = functools.partial(_hopper._order_by_key, count=len(blocks), columns=columns)
    found = order(np, counts=counts, indices=indices)
    np.testing.assert_array_equal(found, expected)
    traced = jax.jit(functools.partial(order, jnp))(counts=counts, indices=indices)
    np.testing.assert_array_equal(traced, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_every_number_that_is_not_finite_is_found(dtype):
    """Beside each other, in both places of a word."""
    limits = jnp.finfo(dtype)
    every = jnp.arange(65536, dtype=jnp.uint16).view(dtype)
    expected = ~np.isfinite(np.asarray(every, np.float32))
    for other in (0, -0.0, limits.max, limits.min, -limits.smallest_subnormal):
        pair = [every, jnp.full_like(every, other)]
        for x in (pair, pair[::-1]):
            found = _hopper._not_finite(jnp.stack(x, axis=-1))
            np.testing.assert_array_equal(found, expected)
