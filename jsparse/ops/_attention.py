"""The public operation and its backward pass: signatures, meaning, a few lines."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jsparse._ranks import promotes_ranks
from jsparse.backends._contract import (
    Backend,
    HostPattern,
    Operands,
    Problem,
    vary_like,
)
from jsparse.bias import Bias
from jsparse.ops import _dispatch, _sharding
from jsparse.ops._checks import canonical, check_rows, check_scale, describe
from jsparse.ops._dispatch import Choice, choose, refusals
from jsparse.ops._vjp import attend
from jsparse.ops._vjp import gradients as _gradients
from jsparse.patterns import BlockMask

Array = Any
Implementation = Literal["auto", "mosaic_gpu", "cutlass", "xla", "reference"]


@overload
def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    implementation: Implementation = "auto",
) -> Array: ...


@overload
def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    implementation: Implementation = "auto",
) -> tuple[Array, Array]: ...


@promotes_ranks
def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Array | tuple[Array, Array]:
    """Attention over the blocks and elements that a mask allows.

    ``out[t] = sum_s p[t, s] v[s]`` with ``p[t] = softmax_s(scale * q[t] . k[s] +
    bias[t, s])`` over the keys s that query t sees. Softmax and sums are computed in
    float32 (float64 for float64 inputs). With a `ScoreFunction` the exponents are what
    it makes of ``scale * q[t] . k[s]``. A query that sees nothing gives 0, with
    ``lse = -inf`` and zero gradients. A NaN or infinity in k or v reaches exactly the
    rows that attend to it, by the mask: on a Hopper GPU a bias or score of -inf does
    not keep those in v from the other rows of its block. Results are the same bits on
    every run.

    Differentiable once with respect to q, k, v and every array of the bias, also
    through ``lse`` (``implementation="reference"``: to any order); works under ``jit``,
    ``vmap``, ``grad``, ``jax.checkpoint``, ``jax.shard_map`` (under ``jit``) and
    ``jax.export``. A bias shared over batch axes or under ``vmap`` is not copied, and
    its gradient is summed in place; the ``vmap`` of a gradient has one for each.

    Args:
        q: ``[*B, T, H, D]`` float queries. As everywhere in JAX, NumPy's float64
            becomes float32 unless ``jax_enable_x64`` is on; it does not count as the
            same dtype as float32.
        k: ``[*B, S, K, D]`` keys of the same dtype; K divides H.
        v: ``[*B, S, K, Dv]`` values of the same dtype.
        mask: which blocks and elements are computed. Closed over, the pattern is
            static; passed into a jitted function it is traced. If a traced mask ran
            out of capacity, the outputs of that batch entry are NaN (see
            `BlockMask.check`).
        bias: added to the scaled logits: an array ``[*B or 1, H or 1, T or 1, S]``, a
            `BlockBias`, an `EntryBias` or a `DistanceBias`; or a `ScoreFunction`, which
            replaces them. An element with bias or score -inf is masked; on a Hopper GPU
            also one whose bias over ``scale`` is beyond float32.
        scale: multiplies ``q . k``; ``1 / sqrt(D)`` if not given.
        return_lse: also return the log-sum-exp.
        implementation: ``"auto"`` takes the first backend that can, of the kernels for
            Hopper GPUs in each pass the one that was measured to be faster, see
            `choice`; ``"reference"`` is dense jnp, differentiable to any order.

    Returns:
        ``out [*B, T, H, Dv]`` in the dtype of q; with ``return_lse`` also ``lse
        [*B, H, T]``, natural log, float32 (float64 for float64 inputs).

    Raises:
        TypeError: for mixed or non-float dtypes, a mask that is not a `BlockMask`, or a
            score function that is not element-wise.
        ValueError: for shapes that do not fit, or an unknown implementation.
        CapacityError: for a concrete mask that ran out of capacity.
        NotImplementedError: if the named implementation cannot take this problem.

    Example:
        >>> import jax, jsparse
        >>> mask = jsparse.patterns.window(256, left=16, right=16)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 256, 4, 32))
        >>> out, lse = jsparse.block_sparse_attention(q, k, v, mask, return_lse=True)
        >>> out.shape, lse.shape
        ((256, 4, 32), (4, 256))

    References:
        FlashAttention (Dao et al. 2022) for the online softmax and the backward pass;
        FlexAttention (PyTorch) for the block lists.
    """
    operands = canonical(q, k, v, _within_bits(mask), bias)
    scale = check_scale(scale, operands.q.shape[-1])
    pattern = HostPattern.of(mask)
    backend = choose(implementation, describe(operands, pattern))
    if backend.differentiable:
        out, lse = _differentiable(backend, scale, operands)
    else:
        result = attend(backend, scale, pattern, operands)
        out, lse = cast(tuple[Array, Array], result)
    if mask.needed_capacity is not None:
        out, lse = _poison_overflow(out, lse, mask)
    return (out, lse) if return_lse else out


@promotes_ranks
def gradients(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array | None = None,
    *,
    bias: Bias | None = None,
    bias_gradient: bool = True,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> tuple[Array, Array, Array, Bias | None]:
    """The backward pass alone, for derivatives of your own that keep ``out`` and lse.

    What ``jax.vjp`` of `block_sparse_attention` gives for the cotangents ``dout`` and
    ``dlse``, without the forward pass. Given a part of the keys, with ``out`` and
    ``lse`` of all, it gives dk and dv of the part, and its share of dq.

    Works under ``jit``, ``vmap`` and ``jax.shard_map``. Only that of ``"reference"`` is
    differentiable itself.

    Args:
        q: as for `block_sparse_attention`.
        k: likewise.
        v: likewise.
        mask: likewise.
        out: ``[*B, T, H, Dv]``, the output.
        lse: ``[*B, H, T]`` float32, natural log.
        dout: the cotangent of ``out``, like ``out``.
        dlse: the cotangent of ``lse``, like ``lse``; zero if not given.
        bias: as for `block_sparse_attention`.
        bias_gradient: whether to compute that of the bias, which may cost as much as
            all others.
        scale: as for `block_sparse_attention`.
        implementation: likewise. ``"reference"`` differentiates its own forward pass,
            so it must be given all keys.

    Returns:
        Gradients of q, k, v and ``bias``, each like its primal; of the bias None where
        there is none or it is not asked for. Integers have none.

    Raises:
        TypeError: as `block_sparse_attention`, and for outputs or cotangents of other
            dtypes.
        ValueError: likewise, and for other shapes.
        CapacityError: likewise.
        NotImplementedError: likewise.

    Example:
        >>> import jax, jsparse
        >>> from jsparse.ops import gradients
        >>> mask = jsparse.patterns.window(256, left=16, right=16)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 256, 4, 32))
        >>> out, lse = jsparse.block_sparse_attention(q, k, v, mask, return_lse=True)
        >>> dq, dk, dv, _ = gradients(q, k, v, mask, out, lse, 2 * out)
        >>> dq.shape, dk.shape, dv.shape
        ((256, 4, 32), (256, 4, 32), (256, 4, 32))

    References:
        FlashAttention (Dao et al. 2022), whose backward pass needs no more than these;
        ring attention (Liu et al. 2023) for keys a part at a time.
    """
    operands = canonical(q, k, v, _within_bits(mask), bias)
    scale = check_scale(scale, operands.q.shape[-1])
    pattern = HostPattern.of(mask)
    backend = choose(implementation, describe(operands, pattern))
    rows = check_rows(operands, out=out, lse=lse, dout=dout, dlse=dlse)
    if mask.needed_capacity is not None:
        rows = *rows[:2], *_poison_overflow(*rows[2:], mask)
    bias_gradient = bias_gradient and bias is not None
    if backend.differentiable:
        grads = _differentiated(backend, scale, operands, *rows[2:])
    else:
        grads = _gradients(
            *(backend, scale, pattern, operands, *rows), bias_gradient=bias_gradient
        )
    dq, dk, dv, dbias = grads
    if not bias_gradient:
        return dq, dk, dv, None
    if not dataclasses.is_dataclass(bias):
        bias = jnp.asarray(bias)
    # The canonical form of a bias differs by axes of size 1.
    leaves, tree = jax.tree_util.tree_flatten(bias)
    found = jax.tree_util.tree_leaves(dbias, is_leaf=lambda x: x is None)
    pairs = zip(found, leaves, strict=True)
    dbias = [None if g is None else g.reshape(np.shape(x)) for g, x in pairs]
    return dq, dk, dv, tree.unflatten(dbias)


def _differentiable(
    backend: Backend, scale: float, operands: Operands
) -> tuple[Array, Array]:
    """Attention that JAX differentiates."""

    def on_device(operands, _):
        return backend.forward(operands, scale, None)

    return _sharding.forward(on_device, operands)


def _differentiated(
    backend: Backend, scale: float, operands: Operands, dout: Array, dlse: Array
) -> tuple[Array, Array, Array, Any]:
    """What JAX makes of `_differentiable`; None for integers."""
    q, k, v, mask, bias = operands

    def attend(q, k, v, bias):
        return _differentiable(backend, scale, Operands(q, k, v, mask, bias))

    results, pull = jax.vjp(attend, q, k, v, bias)
    cotangents = vary_like((dout, dlse), results)
    return jax.tree_util.tree_map(
        lambda x: None if x.dtype == jax.dtypes.float0 else x, pull(cotangents)
    )


def support(
    q: Array, k: Array, v: Array, mask: BlockMask, *, bias: Bias | None = None
) -> dict[str, str | None]:
    """Which implementations can take these arguments here, and why the others cannot.

    Args:
        q: as for `block_sparse_attention`.
        k: likewise.
        v: likewise.
        mask: likewise.
        bias: likewise.

    Returns:
        For each implementation, in the order that ``"auto"`` tries them, None or the
        reason for its refusal.

    Raises:
        TypeError: as `block_sparse_attention`, for arguments that none takes.
        ValueError: likewise.

    Example:
        >>> import jax, jsparse
        >>> from jsparse.ops import support
        >>> mask = jsparse.patterns.window(256, left=16, right=16)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 256, 4, 32))
        >>> [name for name, reason in support(q, k, v, mask).items() if reason is None]
        ['xla', 'reference']
    """
    return refusals(_describe(q, k, v, mask, bias))


def choice(
    q: Array, k: Array, v: Array, mask: BlockMask, *, bias: Bias | None = None
) -> Choice:
    """Which implementations ``"auto"`` takes for these arguments here, and why.

    Args:
        q: as for `block_sparse_attention`.
        k: likewise.
        v: likewise.
        mask: likewise.
        bias: likewise.

    Returns:
        Names of the implementation of the ``forward`` and of the ``backward`` pass, and
        the ``reason``.

    Raises:
        TypeError: as `block_sparse_attention`, for arguments that none takes.
        ValueError: likewise.

    Example:
        >>> import jax, jsparse
        >>> from jsparse.ops import choice
        >>> mask = jsparse.patterns.window(256, left=16, right=16)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 256, 4, 32))
        >>> choice(q, k, v, mask)
        Choice(forward='xla', backward='xla', reason='xla comes first')
    """
    return _dispatch.choice("auto", _describe(q, k, v, mask, bias))


def _describe(
    q: Array, k: Array, v: Array, mask: BlockMask, bias: Bias | None
) -> Problem:
    operands = canonical(q, k, v, mask, bias)
    return describe(operands, HostPattern.of(mask))


def _poison_overflow(out: Array, lse: Array, mask: BlockMask) -> tuple[Array, Array]:
    """Turns batch entries whose block lists overflowed into NaN, gradients included."""
    factor = jnp.where(_overflowed(mask), jnp.nan, 1.0)
    batch = out.shape[:-3] if factor.size > 1 else (1,) * (out.ndim - 3)
    out_factor = factor.reshape(*batch, 1, 1, 1).astype(out.dtype)
    lse_factor = factor.reshape(*batch, 1, 1).astype(lse.dtype)
    return out * out_factor, lse * lse_factor


def _within_bits(mask: BlockMask) -> BlockMask:
    """A traced mask whose lists are empty where they overflowed.

    They may name more blocks than there are bits, which kernels would read.
    """
    known = not isinstance(getattr(mask, "needed_capacity", None), jax.core.Tracer)
    if known or mask.bits is None:
        return mask
    fits = ~_overflowed(mask)[:, None, None]
    counts = {
        name: jnp.where(fits, getattr(mask, name), 0)
        for name in ("kv_num_blocks", "q_num_blocks")
    }
    return dataclasses.replace(mask, **counts)


def _overflowed(mask: BlockMask) -> Array:
    """Whether each batch entry ran out of capacity, ``[B or 1]``."""
    needed = jnp.asarray(mask.needed_capacity)
    return (needed > jnp.asarray(mask.capacity, needed.dtype)).any(-1)
