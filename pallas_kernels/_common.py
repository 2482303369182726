"""What every kernel shares: units, fields of items, limits, swizzles."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
NUM_FIELDS = 12
"""int32 fields of one work item; see `mosaic_gpu._schedule`. A multiple of 16 bytes."""
MAX_SMEM_BYTES = 227 * 1024


def swizzle_bytes(row: int) -> int:
    """The widest TMA swizzle that a row of so many bytes fills."""
    for size in (128, 64, 32):
        if row % size == 0:
            return size
    raise ValueError(
        f"row={row} bytes; expected a multiple of 32. Pad the head size with zeros."
    )


@functools.cache
def compute_capability() -> str:
    """Of the GPU, such as ``"9.0"``."""
    return str(jax.devices("gpu")[0].compute_capability)


def platform(x: Any = None) -> str:
    """Where JAX computes: where ``x`` is, if that is known, or as it was told to."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return next(iter(x.devices())).platform
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def on_hopper() -> bool:
    """Whether JAX computes on a GPU that these kernels were built for."""
    return platform() == "gpu" and compute_capability() == "9.0"


def divided(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of an int32 that is not negative, in a kernel."""
    by = jnp.int32(n)
    return lax.div(x, by), lax.rem(x, by)
