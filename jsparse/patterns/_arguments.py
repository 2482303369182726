"""Arguments as arrays and numbers, or an error that names them.

A ``name`` is what messages call an argument, e.g. ``"radius: coords"``: the builder and
its parameter. The builders, `jsparse.bias` and `jsparse.ops` call it.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.errors
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = Any

NO_REAL = "bcmMSTU"
"""Kinds of dtype that NumPy and Python turn into real numbers although they are none:
bools, complex numbers, times and text."""

_ROWS = "rows of equal lengths. Give every row equally many numbers."

# What a builder of `device.py` takes traced.
_ON_DEVICE = {
    "atom_windows: num_atoms": "atom_windows with padded_to",
    "from_blocks: cols": "from_dense_blocks with a capacity",
    "from_blocks: rows": "from_dense_blocks with a capacity",
    "from_blocks: rules": "from_dense_blocks with a capacity",
    "neighbors: index": "neighbors with a capacity",
    "radius: coords": "radius with a capacity",
    "radius: cutoff": "radius with a capacity",
    "radius: kv_coords": "radius with a capacity",
}


def refuse_traced(name: str, value: Any) -> None:
    """Refuses what the host cannot read, anywhere in a pytree of it."""
    if not any(isinstance(x, Tracer) for x in jax.tree_util.tree_leaves(value)):
        return
    there = _ON_DEVICE.get(name)
    advice = f"Use patterns.device.{there}, or do" if there else "Do"
    raise TypeError(
        f"{name} is traced; expected known values, from which the host computes. "
        f"{advice} this outside jit."
    )


def as_numpy(name: str, x: Any, expected: str = _ROWS) -> np.ndarray:
    """What the host reads, as a NumPy array.

    Raises:
        TypeError: it is traced.
        ValueError: its rows have different lengths.
    """
    refuse_traced(name, x)
    return np.asarray(as_array(name, x, expected))


def as_array(name: str, x: Any, expected: str = _ROWS) -> Array:
    """A JAX array as it is, anything else as NumPy, which keeps its values exact.

    Raises:
        TypeError: it is a list of traced values.
        ValueError: its rows have different lengths; ``expected`` says what to give.
    """
    if isinstance(x, jax.Array):
        return x
    try:
        return np.asarray(x)
    except jax.errors.TracerArrayConversionError as error:
        raise TypeError(
            f"{name} is a {type(x).__name__} of traced values; expected one array. "
            "Join them first, e.g. with jnp.stack."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{name} is not a rectangular array ({error}); expected {expected}"
        ) from error


def as_reals(name: str, x: Any) -> Array:
    """Real numbers, traced or not; see `as_array`.

    Raises:
        TypeError: also for what is no real number.
        ValueError: its rows have different lengths.
    """
    x = as_array(name, x)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected real numbers, e.g. float32. Convert "
            "it first."
        )
    return x


def number(value: Any) -> float:
    """One real number as a float; neither a bool nor text, which `float` would read.

    Raises:
        TypeError: it is something else, has axes or is traced.
        ValueError: likewise, as NumPy sees it.

    Example:
        >>> number(10), number(np.float32(0.5))
        (10.0, 0.5)
    """
    array = np.asarray(value)
    if array.ndim or array.dtype.kind in NO_REAL:
        raise TypeError(f"{array.dtype} of shape {array.shape} is no real number")
    return float(value)


def count(name: str, value: int, least: int | None) -> int:
    """An integer of at least ``least`` (None: any), or a ValueError with its name.

    Raises:
        TypeError: it is traced.
        ValueError: it is something else, or less.
    """
    refuse_traced(name, value)
    kind = "an integer" if least is None else f"an integer of at least {least}"
    try:
        if isinstance(value, bool):
            raise TypeError("a bool is no number")
        found = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} is {value!r}; expected {kind}.") from error
    if least is not None and found < least:
        raise ValueError(f"{name} is {found}; expected {kind}.")
    return found
