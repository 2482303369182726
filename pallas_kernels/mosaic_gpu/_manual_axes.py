"""Kernels inside `jax.shard_map`: Pallas knows no arrays that vary over manual axes.

JAX keeps, in an array's type, the mesh axes over which its value differs. A kernel sees
one device's values, so the axes are taken off its operands and put on its results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

Array = Any

_drop_p = Primitive("drop_manual_axes")
_drop_p.def_impl(lambda x: x)
_drop_p.def_abstract_eval(lambda x: x.update(manual_axis_type=type(x.mat)()))
mlir.register_lowering(_drop_p, lambda ctx, x: [x])


def per_device(kernel: Callable) -> Callable:
    """``kernel``, from arrays to a list of arrays, where they vary over mesh axes."""

    def f(*operands: Array) -> list[Array]:
        axes = frozenset().union(*(jax.typeof(x).mat.varying for x in operands))
        if not axes:
            return kernel(*operands)
        results = kernel(*map(_drop_p.bind, operands))
        return [jax.lax.pcast(x, tuple(axes), to="varying") for x in results]

    return f
