"""The mean of attention over parts of a row's blocks, weighted by exp(lse)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from . import _registers as r

Array = Any
Sums = tuple[Array, Array, Array]
"""Weighted outputs ``[64, D]``, largest lse and sum of weights ``[64]``."""


def start(columns: int) -> Sums:
    """Of no parts."""
    zero = plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), r.OPERAND)
    top = plgpu.layout_cast(jnp.full((64,), -jnp.inf, jnp.float32), r.ROW)
    return zero, top, plgpu.layout_cast(jnp.zeros((64,), jnp.float32), r.ROW)


def add(sums: Sums, parts: Sequence[Array], lses: Sequence[Array]) -> Sums:
    """With more parts ``[64, D]`` float32; lse -inf is a part that saw nothing."""
    acc, top, total = sums
    new = functools.reduce(jnp.maximum, lses, top)
    base = jnp.where(new == -jnp.inf, 0.0, new)
    weight = jnp.exp(top - base)
    acc, total = acc * weight[:, None], total * weight
    for part, x in zip(parts, lses, strict=True):
        weight = jnp.exp(x - base)
        # What a part did not write must not count, not even as NaN.
        wide = jnp.broadcast_to(weight[:, None], part.shape)
        acc += jnp.where(wide == 0, 0.0, part) * wide
        total += weight
    return acc, new, total


def end(sums: Sums) -> tuple[Array, Array]:
    """The mean and its lse: 0 and -inf where no part saw anything."""
    acc, top, total = sums
    values = acc / jnp.where(total == 0, 1.0, total)[:, None]
    return values, jnp.where(top == -jnp.inf, 0.0, top) + jnp.log(total)
