"""Checks of the device builders' arguments, traced or not, and their canonical form.

What is traced is checked by shape and dtype, what is concrete also by value. Called by
`device.py` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jsparse.patterns._arguments import as_array, as_reals
from jsparse.patterns._block_mask import check_sizes
from jsparse.patterns._integers import as_int32
from jsparse.patterns._parts import Sizes

Array = Any


def check_grid(
    who: str, q_len: int, kv_len: int | None, block_q: int, block_kv: int
) -> Sizes:
    sizes = check_sizes(who, q_len, kv_len, block_q, block_kv)
    nq, nk = sizes.grid
    if nq * nk > np.iinfo(np.int32).max:
        raise ValueError(
            f"{who}: {nq} x {nk} blocks; expected a block map of less than 2**31. "
            "Use larger blocks."
        )
    return sizes


def check_widths(who: str, capacity: int, q_capacity: int | None) -> tuple[int, int]:
    if q_capacity is None:
        q_capacity = capacity
    return (
        check_positive(who, "capacity", capacity),
        check_positive(who, "q_capacity", q_capacity),
    )


def check_positive(who: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(
            f"{who}: {name}={value!r}; expected an integer of at least 1 that is known "
            "when the function is traced. To find one, build the mask eagerly once: "
            "the CapacityError names what it needs."
        )
    return int(value)


def as_points(name: str, coords: Array) -> Array:
    """Coordinates as ``[B or 1, n, 3]`` float32."""
    x = as_reals(f"radius: {name}", coords)
    if x.ndim not in (2, 3) or x.shape[-1] != 3:
        raise ValueError(
            f"radius: {name} has shape {x.shape}; expected [N, 3] or [B, N, 3] in "
            "ångström. Pass Cartesian coordinates, e.g. structure.coords."
        )
    return with_batch(jnp.asarray(x, jnp.float32))


def as_cutoff(cutoff: Array) -> Array:
    """The cut-off as ``[B or 1]`` float32."""
    x = as_reals("radius: cutoff", cutoff)
    if x.ndim > 1:
        raise ValueError(
            f"radius: cutoff has shape {x.shape}; expected a scalar or one value for "
            "each batch entry."
        )
    if not isinstance(x, Tracer):
        values = np.asarray(x, np.float64)
        if not np.all(np.isfinite(values) & (values >= 0)):
            raise ValueError(
                f"radius: cutoff={cutoff!r}; expected a distance in ångström, finite "
                "and not negative."
            )
    return jnp.asarray(x, jnp.float32).reshape(-1)


def as_lengths(who: str, name: str, length: Array | None, total: int) -> Array:
    """Real lengths as ``[B or 1]`` int32 within 0..total."""
    if length is None:
        return jnp.full((1,), total, jnp.int32)
    x = as_array(f"{who}: {name}", length)
    if x.ndim > 1 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"{who}: {name} has shape {x.shape} and dtype {x.dtype}; expected an "
            "integer, or one for each batch entry."
        )
    if not isinstance(x, Tracer):
        values = np.asarray(x)
        if np.any((values < 0) | (values > total)):
            raise ValueError(
                f"{who}: {name}={length!r}; expected 0 to {total}, the length of the "
                "padded arrays."
            )
    return as_int32(x, 0, total).reshape(-1)


def common_batch(who: str, **sizes: int) -> int:
    """The common batch size of arguments that have it or have 1."""
    found = {n for n in sizes.values() if n != 1}
    if len(found) > 1:
        given = ", ".join(f"{name} has {n}" for name, n in sizes.items())
        raise ValueError(
            f"{who}: batch sizes differ: {given}; expected one size, or 1 for what all "
            "entries share."
        )
    return found.pop() if found else 1


def check_entries(index: Array, kv_len: int) -> None:
    if isinstance(index, Tracer):
        return
    with jax.ensure_compile_time_eval():
        largest = int(index.max())
    if largest >= kv_len:
        raise ValueError(
            f"neighbors: index has an entry of {largest}; expected less than {kv_len}, "
            "the number of keys. Pass kv_len if the keys are not the queries; use -1 "
            "for padding."
        )


def with_batch(x: Array) -> Array:
    return x if x.ndim == 3 else x[None]


def each(f: Callable[..., Any], batch: int, *args: Array) -> Any:
    """``f`` of each batch entry; arguments with one entry are shared."""
    if batch == 1:
        # Not mapped: under vmap the loops carry a select on every array.
        out = f(*(x[0] for x in args))
        return jax.tree_util.tree_map(lambda x: x[None], out)
    return jax.vmap(f)(*(jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in args))
