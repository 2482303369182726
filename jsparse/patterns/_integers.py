"""Integers of lists and positions on the device.

Called by the device builders, and by the attention of neighbour lists.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

Array = Any


def as_int32(x: Array, low: int, high: int) -> Array:
    """Integers as int32; values beyond ``low`` or ``high`` stay beyond or on them."""
    if x.dtype.itemsize >= 4:
        unsigned = jnp.issubdtype(x.dtype, jnp.unsignedinteger)
        x = x.clip(max(low, 0) if unsigned else low, high)
    return jnp.asarray(x, jnp.int32)


def as_keys(index: Array, kv_len: int) -> Array:
    """Numbers of keys as int32; what is none stays none."""
    # Already int32 they stay as they are: a copy of long lists would be kept.
    is_int32 = index.dtype == jnp.int32
    return jnp.asarray(index) if is_int32 else as_int32(index, -1, kv_len)


def divide(x: Array, size: int) -> tuple[Array, Array]:
    """Quotient and remainder of integers that are not negative.

    By powers of two they are a shift and a mask, which XLA computes anew wherever they
    are read; the results of divisions it keeps in memory.
    """
    if size & (size - 1):
        return x // size, x % size
    return x >> (size.bit_length() - 1), x & (size - 1)
