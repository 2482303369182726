"""The only custom derivative and the only batching rule of the library.

``attend`` maps `Operands` to ``(out, lse)``. The gradient of a bias may cost as much as
all others; it is not computed where the bias is not differentiated. Both directions are
`custom_vmap` functions whose rule prepends a batch axis to every leaf, of size 1 where
a leaf is not mapped. A bias shared under ``vmap`` is therefore never copied, and its
gradient comes back summed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from jsparse.backends._contract import Backend, HostPattern, Operands, vary_like
from jsparse.ops import _sharding

Array = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    backend: Backend, scale: float, pattern: HostPattern | None, operands: Operands
) -> tuple[Array, Array]:
    """Attention through ``backend``; the residuals are operands, out and lse.

    ``pattern`` is the operands' mask where its values are known: as an operand it is
    traced here.
    """
    return _batched_forward(backend, scale, pattern)(operands)


def _attend_fwd(backend, scale, pattern, operands):
    leaves, tree = jax.tree_util.tree_flatten(operands)
    operands = tree.unflatten([x.value for x in leaves])
    of_bias = jax.tree_util.tree_leaves(tree.unflatten(leaves).bias)
    # What is static must not be an array: that there is something, or nothing, says it.
    bias_gradient = () if any(x.perturbed for x in of_bias) else None
    out, lse = _batched_forward(backend, scale, pattern)(operands)
    kept = jax.tree_util.tree_map(lambda x: x if x.size else _Empty.of(x), operands)
    return (out, lse), (kept, out, lse, bias_gradient)


def _attend_bwd(backend, scale, pattern, residuals, cotangents):
    kept, out, lse, bias_gradient = residuals
    operands = jax.tree_util.tree_map(
        lambda x: x.array() if isinstance(x, _Empty) else x,
        kept,
        is_leaf=lambda x: isinstance(x, _Empty),
    )
    dout, dlse = map(_instantiate, cotangents, (out, lse))
    grads = gradients(
        *(backend, scale, pattern, operands, out, lse, dout, dlse),
        bias_gradient=bias_gradient is not None,
    )
    dq, dk, dv, dbias = grads
    no_mask: Any = None
    return (Operands(dq, dk, dv, no_mask, dbias),)


def gradients(
    backend: Backend,
    scale: float,
    pattern: HostPattern | None,
    operands: Operands,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
    *,
    bias_gradient: bool,
) -> tuple[Array, Array, Array, Any]:
    """Gradients of q, k, v and bias, None for what has none."""
    backward = _batched_backward(backend, scale, pattern, bias_gradient)
    grads = backward(operands, out, lse, dout, dlse)
    bias = operands.bias if bias_gradient else None
    primals = (operands.q, operands.k, operands.v, bias)
    dq, dk, dv, dbias = jax.tree_util.tree_map(_sharding.sum_devices, grads, primals)
    # Integers of a score function have no gradient, which JAX spells None.
    dbias = jax.tree_util.tree_map(
        lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, dbias
    )
    return dq, dk, dv, dbias


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Empty:
    """Stands for an array without elements among the residuals.

    The array itself, carried from one pass to the other, crashes the compiler inside
    `jax.shard_map` (JAX 0.11.2).
    """

    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, x: Array) -> _Empty:
        return cls(x.shape, x.dtype)

    def array(self) -> Array:
        return jnp.zeros(self.shape, self.dtype)


def _instantiate(cotangent: Array | SymbolicZero, primal: Array) -> Array:
    """Zeros as an array."""
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    return vary_like(jnp.zeros(primal.shape, primal.dtype), primal)


attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


@functools.lru_cache(maxsize=16)
def _batched_forward(
    backend: Backend, scale: float, pattern: HostPattern | None
) -> Callable:
    def on_device(operands, whole):
        return backend.forward(operands, scale, pattern if whole else None)

    @custom_vmap
    def forward(operands):
        return _sharding.forward(on_device, operands)

    @forward.def_vmap
    def rule(axis_size, in_batched, operands):
        del axis_size
        return forward(_add_axis(operands, in_batched[0])), (True, True)

    return forward


@functools.lru_cache(maxsize=16)
def _batched_backward(
    backend: Backend, scale: float, pattern: HostPattern | None, bias_gradient: bool
) -> Callable:
    def on_device(operands, out, lse, dout, dlse, whole):
        known = pattern if whole else None
        return backend.backward(
            operands, scale, known, out, lse, dout, dlse, bias_gradient
        )

    @custom_vmap
    def backward(operands, *rows):
        return _sharding.backward(on_device, operands, rows, bias_gradient)

    @backward.def_vmap
    def rule(axis_size, in_batched, operands, *rows):
        rows = [
            _add_axis(x, b) if b else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, b in zip(rows, in_batched[1:], strict=True)
        ]
        grads = backward(_add_axis(operands, in_batched[0]), *rows)
        mapped = in_batched[0]
        bias = mapped.bias if bias_gradient else None
        batched = (mapped.q, mapped.k, mapped.v, bias)
        # What was shared over the mapped axis has been summed over it by the backend.
        grads = jax.tree_util.tree_map(lambda g, b: g if b else g[0], grads, batched)
        return grads, batched

    return backward


def _add_axis(tree: Any, batched: Any) -> Any:
    return jax.tree_util.tree_map(lambda x, b: x if b else x[None], tree, batched)
