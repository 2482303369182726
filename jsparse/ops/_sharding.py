"""Arrays whose types say how they are sharded: each device computes what it has.

On a mesh with explicit axes, JAX's default, a type names the mesh axes of each array
axis. Batch entries and heads need nothing of one another, so a call on such arrays is a
`jax.shard_map` of itself, and moves nothing. In other modes, and inside a `shard_map`,
types name no axes, and the call is left as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jsparse.backends._contract import Operands
from jsparse.bias import DistanceBias, EntryBias, ScoreFunction

Array = Any
_OP = "block_sparse_attention"


class Axes(NamedTuple):
    """What the axes of q, k and v are sharded over: mesh axes, or None."""

    mesh: Any
    batch: tuple[Any, ...]
    heads: Any

    @property
    def by_query(self) -> Any:
        """Of ``[*B, T, H, D]``."""
        return jax.P(*self.batch, None, self.heads, None)

    @property
    def statistic(self) -> Any:
        """Of ``[*B, H, T]``."""
        return jax.P(*self.batch, self.heads, None)


def forward(call: Callable, operands: Operands) -> tuple[Array, Array]:
    """``call(operands, whole)``, out and lse, of each device's part.

    ``whole`` tells whether each device has all of the mask.

    Raises:
        ValueError: for arrays sharded over other axes than batch axes and heads, or by
            heads where they cannot be divided.
    """
    axes = axes_of(*operands)
    if axes is None:
        return call(operands, True)
    out = axes.by_query, axes.statistic
    return _run(axes, call, operands, _specs(operands, axes), (), out)


def backward(
    call: Callable, operands: Operands, rows: tuple, bias_gradient: bool
) -> tuple:
    """``call(operands, *rows, whole)``, the gradients, of each device's part.

    ``rows`` are out, lse and their cotangents. What devices share is summed over them.
    """
    axes = axes_of(*operands, rows)
    if axes is None:
        return call(operands, *rows, True)

    def on_device(operands, *rest):
        bias = operands.bias if bias_gradient else None
        grads = call(operands, *rest)
        return jax.tree_util.tree_map(sum_devices, grads, (*operands[:3], bias))

    def like(grad, primal):
        spec = jax.typeof(primal).sharding.spec
        return jax.reshard(grad, jax.NamedSharding(axes.mesh, spec))

    specs = _specs(operands, axes)
    of_rows = 2 * (axes.by_query, axes.statistic)
    rows = tuple(zip(rows, of_rows, strict=True))
    out = (*specs[:3], specs.bias if bias_gradient else None)
    grads = _run(axes, on_device, operands, specs, rows, out)
    primals = (*operands[:3], operands.bias if bias_gradient else None)
    return jax.tree_util.tree_map(like, grads, primals)


def sum_devices(grad: Array, primal: Array) -> Array:
    """Inside `jax.shard_map`, sums the gradient of a replicated array over devices."""
    axes = jax.typeof(grad).mat.varying - jax.typeof(jnp.asarray(primal)).mat.varying
    return jax.lax.psum(grad, tuple(axes)) if axes else grad


def on_devices(
    call: Callable, args: tuple, specs: tuple, out_specs: Any, mesh: Any
) -> Any:
    """``call(*args)`` in a `jax.shard_map`, each array divided as its spec says."""

    def divided(x, spec):
        return jax.reshard(x, jax.NamedSharding(mesh, spec))

    run = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=specs,
        out_specs=out_specs,
        axis_names=set(mesh.explicit_axes),
    )
    # Called eagerly it would run one operation after another: half a minute.
    return jax.jit(run)(*jax.tree_util.tree_map(divided, args, specs))


def _run(
    axes: Axes,
    call: Callable,
    operands: Operands,
    specs: Operands,
    rows: tuple,
    out_specs: Any,
) -> Any:
    """``call(operands, *rows, whole)`` in a `jax.shard_map`; rows come with specs."""
    leaves, tree = jax.tree_util.tree_flatten(operands)
    rank = len(axes.batch)
    # An empty array crashes the compiler inside `jax.shard_map` (JAX 0.11.2).
    pairs = zip(leaves, tree.flatten_up_to(specs), strict=True)
    given = [pair for pair in pairs if pair[0].size]
    given += rows
    arrays, in_specs = zip(*given, strict=True)
    lists = operands.mask.kv_num_blocks
    whole = all(size == 1 for size in lists.shape[:rank])

    def on_device(*given):
        rest = iter(given)
        own = [
            next(rest) if x.size else jnp.zeros((1,) * rank + x.shape[rank:], x.dtype)
            for x in leaves
        ]
        return call(tree.unflatten(own), *rest, whole)

    return on_devices(on_device, arrays, in_specs, out_specs, axes.mesh)


def axes_of(q: Array, k: Array, v: Array, *others: Any) -> Axes | None:
    """What ``[*B, T, H, D]`` arrays are sharded over; None if nothing is sharded.

    Where only others are, such as a bias, every device computes all.

    Raises:
        ValueError: for other axes than batch axes and heads.
    """
    mesh, batch, heads = None, [None] * (q.ndim - 3), None
    for name, x in zip("qkv", (q, k, v), strict=True):
        sharding = _explicit(x)
        if sharding is None:
            continue
        *lead, tokens, own_heads, dim = sharding.spec
        if tokens or dim:
            raise ValueError(
                f"{_OP}: {name} is sharded as {sharding.spec}; expected batch axes and "
                "heads only. Use jax.reshard, or jax.shard_map to say what is computed "
                "where."
            )
        mesh, heads = sharding.mesh, own_heads or heads
        batch = [own or other for own, other in zip(lead, batch, strict=True)]
    if mesh is None:
        found = filter(None, map(_explicit, jax.tree_util.tree_leaves(others)))
        mesh = next((sharding.mesh for sharding in found), None)
    return None if mesh is None else Axes(mesh, tuple(batch), heads)


def _explicit(x: Array) -> Any:
    """How an array is sharded over explicit axes; None if it is not."""
    sharding = jax.typeof(x).sharding
    return sharding if sharding.mesh.explicit_axes and any(sharding.spec) else None


def _specs(operands: Operands, axes: Axes) -> Operands:
    """How each leaf is divided; of a bias, heads follow the batch axes."""
    rank = len(axes.batch)

    def lead(x: Array) -> tuple:
        pairs = zip(axes.batch, x.shape[:rank], strict=True)
        return tuple(own if size > 1 else None for own, size in pairs)

    def shared(x: Array) -> Any:
        return jax.P(*lead(x), *(None,) * (x.ndim - rank))

    def by_head(x: Array) -> Any:
        heads = axes.heads if x.shape[rank] > 1 else None
        return jax.P(*lead(x), heads, *(None,) * (x.ndim - rank - 1))

    def tokens(x: Array) -> Any:
        return jax.P(*lead(x), None, axes.heads, None)

    *qkv, mask, bias = operands
    if axes.heads is not None:
        _check_shared(operands, axes)
    every = jax.tree_util.tree_map
    if isinstance(bias, DistanceBias):
        of_bias = dataclasses.replace(
            every(shared, bias), weights=by_head(bias.weights)
        )
    elif isinstance(bias, EntryBias):
        of_bias = EntryBias(by_head(bias.values), shared(bias.index))
    else:
        of_bias = every(shared if isinstance(bias, ScoreFunction) else by_head, bias)
    q, k, v = map(tokens, qkv)
    return Operands(q, k, v, every(shared, mask), of_bias)


def check_heads(axes: Axes, heads: int, kv_heads: int) -> None:
    """Refuses heads that cannot be divided."""
    names = axes.heads if isinstance(axes.heads, tuple) else (axes.heads,)
    parts = math.prod(axes.mesh.shape[name] for name in names if name is not None)
    if heads % parts or kv_heads % parts:
        raise ValueError(
            f"{_OP}: heads are sharded over {parts} devices, but q has {heads} and k "
            f"{kv_heads} heads; expected multiples of {parts}. Repeat the key heads, "
            "or shard the batch."
        )


def _check_shared(operands: Operands, axes: Axes) -> None:
    """Refuses what cannot be divided by heads."""
    check_heads(axes, operands.q.shape[-2], operands.k.shape[-2])
    for found, what in (
        (operands.mask.num_heads > 1, "the mask has head patterns"),
        (isinstance(operands.bias, ScoreFunction), "the bias is a ScoreFunction"),
    ):
        if found:
            raise ValueError(
                f"{_OP}: heads are sharded, and {what}; expected one pattern for all "
                "heads and another bias. Shard the batch, or use jax.shard_map, where "
                "each device is given its own."
            )
