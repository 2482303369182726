"""The custom derivative and the batching rules of the operation.

``attend`` maps `Operands` to ``(out, lse)``. The gradient of a bias may cost as much as
all others; it is not computed where the bias is not differentiated. Both directions are
`custom_vmap` functions whose rule prepends a batch axis to every leaf, of size 1 where
a leaf is not mapped. A bias shared under ``vmap`` is therefore never copied. The
gradient of such a ``vmap`` sums what it shares, so there the backward pass gives the
sum. The ``vmap`` of a gradient has one for each: its shared leaves are copied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from jsparse._ranks import promotes_ranks
from jsparse.backends._contract import Backend, HostPattern, Operands
from jsparse.backends._contract import accumulator_dtype as accumulator_dtype
from jsparse.backends._contract import vary_like as vary_like
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


@promotes_ranks
def _attend_fwd(backend, scale, pattern, operands):
    leaves, tree = jax.tree_util.tree_flatten(operands)
    operands = tree.unflatten([x.value for x in leaves])
    of_bias = jax.tree_util.tree_leaves(tree.unflatten(leaves).bias)
    static = Static(any(x.perturbed for x in of_bias), _vmaps(operands))
    out, lse = _batched_forward(backend, scale, pattern)(operands)
    kept = jax.tree_util.tree_map(lambda x: x if x.size else _Empty.of(x), operands)
    return (out, lse), (kept, out, lse, static)


@promotes_ranks
def _attend_bwd(backend, scale, pattern, residuals, cotangents):
    kept, out, lse, static = residuals
    operands = jax.tree_util.tree_map(
        lambda x: x.array() if isinstance(x, _Empty) else x,
        kept,
        is_leaf=lambda x: isinstance(x, _Empty),
    )
    dout, dlse = map(_instantiate, cotangents, (out, lse))
    rows = out, lse, dout, dlse
    dq, dk, dv, dbias = gradients(
        *(backend, scale, pattern, operands, *rows),
        bias_gradient=static.bias_gradient,
        summed=_mapped_anew(_vmaps((operands, rows)), static.vmaps),
    )
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
    summed: int = 0,
) -> tuple[Array, Array, Array, Any]:
    """Gradients of q, k, v and bias, None for what has none.

    Those of what is shared are sums over so many of the innermost ``vmap``s.
    """
    backward = _batched_backward(backend, scale, pattern, bias_gradient, summed)
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
class Static:
    """What of the forward pass the backward pass knows before tracing.

    Attributes:
        bias_gradient: whether the bias is differentiated.
        vmaps: `_vmaps` of the operands.
    """

    bias_gradient: bool
    vmaps: frozenset[tuple[int, int]] = frozenset()


def _vmaps(tree: Any) -> frozenset[tuple[int, int]]:
    """Which ``vmap``s have the arrays as their tracers: each by its trace and its tag.

    These are identities. JAX has no public name for them; were they called otherwise,
    gradients would still be right, but made of copies.
    """
    found = set()
    for x in jax.tree_util.tree_leaves(tree):
        while isinstance(x, jax.core.Tracer) and hasattr(x, "batch_dim"):
            found.add((id(x._trace), id(getattr(x._trace, "tag", x._trace))))
            x = x.val
    return frozenset(found)


def _mapped_anew(
    backward: frozenset[tuple[int, int]], forward: frozenset[tuple[int, int]]
) -> int:
    """How many ``vmap``s of the backward pass sum what they share.

    That of a function, which is then differentiated, is over when the backward pass
    begins: JAX maps that pass anew, with the same tag, and sums. A ``vmap`` around a
    gradient is at work in both passes, with the same trace, and one of the cotangents
    alone (`jax.jacrev`) is of the backward pass only: both have a gradient for each.
    """
    traces, tags = ({x[n] for x in forward} for n in range(2))
    return sum(trace not in traces and tag in tags for trace, tag in backward)


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
    @promotes_ranks
    def rule(axis_size, in_batched, operands):
        del axis_size
        return forward(_add_axis(operands, in_batched[0])), (True, True)

    return forward


@functools.lru_cache(maxsize=16)
def _batched_backward(
    backend: Backend,
    scale: float,
    pattern: HostPattern | None,
    bias_gradient: bool,
    summed: int,
) -> Callable:
    """The backward pass; see `gradients`."""

    def on_device(operands, out, lse, dout, dlse, whole):
        known = pattern if whole else None
        return backend.backward(
            operands, scale, known, out, lse, dout, dlse, bias_gradient
        )

    @custom_vmap
    def backward(operands, *rows):
        return _sharding.backward(on_device, operands, rows, bias_gradient)

    @backward.def_vmap
    @promotes_ranks
    def rule(axis_size, in_batched, operands, *rows):
        rows = [
            _add_axis(x, b) if b else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, b in zip(rows, in_batched[1:], strict=True)
        ]
        mapped = in_batched[0]
        if not summed:
            bias = mapped.bias
            if bias_gradient:
                bias = jax.tree_util.tree_map(lambda _: True, bias)
            copied = Operands(True, True, True, mapped.mask, bias)
            operands = _copy(operands, mapped, copied, axis_size)
            mapped = copied
        outer = _batched_backward(
            backend, scale, pattern, bias_gradient, max(0, summed - 1)
        )
        grads = outer(_add_axis(operands, mapped), *rows)
        bias = mapped.bias if bias_gradient else None
        batched = (mapped.q, mapped.k, mapped.v, bias)
        # What was shared over the mapped axis has been summed over it by the backend.
        grads = jax.tree_util.tree_map(lambda g, b: g if b else g[0], grads, batched)
        return grads, batched

    return backward


def _copy(tree: Any, batched: Any, wanted: Any, size: int) -> Any:
    """``tree`` with a mapped axis first where it is ``wanted`` and not ``batched``."""

    def copy(x, has, wants):
        return jnp.broadcast_to(x, (size, *x.shape)) if wants and not has else x

    return jax.tree_util.tree_map(copy, tree, batched, wanted)


def _add_axis(tree: Any, batched: Any) -> Any:
    return jax.tree_util.tree_map(lambda x, b: x if b else x[None], tree, batched)
