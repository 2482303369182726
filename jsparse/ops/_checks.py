"""Every check of the op's arguments, and their canonical form.

All refusals happen here, before anything is traced or launched. What passes comes out
as `Operands`, where each leaf has one axis per batch axis of q (size 1 where shared).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jsparse import backends
from jsparse.backends import _score
from jsparse.backends._contract import (
    HostPattern,
    Operands,
    Problem,
    accumulator_dtype,
)
from jsparse.bias import Bias, BlockBias, DistanceBias, EntryBias, ScoreFunction
from jsparse.pallas_kernels._common import platform
from jsparse.patterns import BlockMask
from jsparse.patterns._arguments import number

Array = Any
_OP = "block_sparse_attention"
_NO_MASK = "A boolean mask belongs in the BlockMask: patterns.from_dense."


def canonical(
    q: Array, k: Array, v: Array, mask: BlockMask, bias: Bias | None
) -> Operands:
    """Checks the arguments and gives every leaf its batch axes.

    Raises:
        TypeError: for a mask that is not a `BlockMask`, mixed or non-float dtypes, also
            of a bias, or a score function that is not element-wise.
        ValueError: for shapes that do not fit together.
    """
    given = (q, k, v)
    q, k, v = (_as_array(*named) for named in zip("qkv", given, strict=True))
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"{_OP}: mask is a {type(mask).__name__}; expected a BlockMask. Build one "
            "with jsparse.patterns, e.g. patterns.from_dense(mask)."
        )
    _check_arrays(q, k, v)
    check_dtypes(_OP, given, (q, k, v))
    _check_mask(q, k, mask)
    batch = q.shape[:-3]
    return Operands(
        q, k, v, _batched_mask(mask, batch), _batched_bias(bias, q, k, mask)
    )


def describe(operands: Operands, pattern: HostPattern | None) -> Problem:
    """The static description that backends judge."""
    q, k, v, mask, bias = operands
    kinds = {
        BlockBias: "block",
        EntryBias: "entry",
        ScoreFunction: "score_fn",
        type(None): None,
    }
    form = getattr(bias, "form", "dense")
    kind = kinds.get(type(bias), form)
    values: Any = getattr(bias, "values", bias)
    streamed = kind in ("dense", "block")
    weights = 0
    if isinstance(bias, DistanceBias):
        weights = bias.weights.shape[-1]
    elif isinstance(bias, EntryBias):
        weights = bias.index.shape[-1]
    elif isinstance(bias, ScoreFunction):
        weights = max((x.size for x in bias.arrays), default=0)
    return Problem(
        batch=math.prod(q.shape[:-3]),
        q_len=q.shape[-3],
        kv_len=k.shape[-3],
        num_heads=q.shape[-2],
        num_kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        dtype=str(q.dtype),
        block_q=mask.block_q,
        block_kv=mask.block_kv,
        mask_heads=mask.num_heads,
        most_blocks=mask.num_q_blocks * (mask.capacity.kv + mask.capacity.full_kv),
        rules=tuple(type(r).__name__ for r in mask.rules),
        bits=mask.bits is not None,
        bias=kind,
        platform=platform(q),
        bias_weights=weights,
        score=bias.function if isinstance(bias, ScoreFunction) else None,
        bias_dtype=str(values.dtype) if streamed else None,
        bias_by_key=kind == "dense" and values.shape[-2] == 1,
        mean_blocks=None if pattern is None else _mean_blocks(pattern.mask),
    )


def _mean_blocks(mask: BlockMask) -> float | None:
    counts = mask.kv_num_blocks, mask.full_kv_num_blocks
    if not all(getattr(x, "is_fully_addressable", True) for x in counts):
        return None  # other processes hold parts of them
    partial, full = (np.asarray(x).sum(-1) for x in counts)
    return float(np.mean(partial + full))


def check_scale(scale: float | None, head_dim: int) -> float:
    """The logits' scale; ``1 / sqrt(D)`` if None."""
    if scale is None:
        return head_dim**-0.5
    try:
        found = number(scale)
    except (TypeError, ValueError) as err:
        raise TypeError(
            f"{_OP}: scale is {scale!r}; expected a number known before tracing. "
            "Multiply q by a learned scale instead and pass scale=1.0."
        ) from err
    if not math.isfinite(found):
        raise ValueError(f"{_OP}: scale={found}; expected a finite number.")
    return found


def check_implementation(name: str) -> None:
    """Refuses what is neither ``"auto"`` nor the name of a backend."""
    known = ("auto", *backends.IMPLEMENTATIONS)
    if name not in known:
        raise ValueError(
            f"{_OP}: implementation={name!r}; expected one of "
            f"{', '.join(map(repr, known))}."
        )


def check_rows(
    operands: Operands, *, out: Any, lse: Any, dout: Any, dlse: Any
) -> tuple[Array, Array, Array, Array]:
    """``out``, ``lse`` and their cotangents; a ``dlse`` of None is zero.

    Raises:
        TypeError: for what is no array, or of another dtype than the operation's
            results.
        ValueError: for other shapes than those.
    """
    q, v = operands.q, operands.v
    *batch, length, heads, _ = q.shape
    of_out = (*q.shape[:-1], v.shape[-1]), q.dtype
    of_lse = (*batch, heads, length), jnp.dtype(accumulator_dtype(q))

    def row(name: str, x: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        x = _as_array(name, x)
        wrong = TypeError if x.dtype != dtype else ValueError
        if x.shape != shape or x.dtype != dtype:
            raise wrong(
                f"gradients: {name} has shape {x.shape} and dtype {x.dtype}; expected "
                f"{shape} and {dtype}, as block_sparse_attention returns them."
            )
        return x

    out, lse = row("out", out, *of_out), row("lse", lse, *of_lse)
    dlse = jnp.zeros_like(lse) if dlse is None else row("dlse", dlse, *of_lse)
    return out, lse, row("dout", dout, *of_out), dlse


def _as_array(name: str, x: Any) -> Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as err:
        raise TypeError(
            f"{_OP}: {name} is a {type(x).__name__}; expected an array ({err})."
        ) from err


def _check_arrays(q: Array, k: Array, v: Array) -> None:
    for name, x, axes in (
        ("q", q, "T, H, D"),
        ("k", k, "S, K, D"),
        ("v", v, "S, K, Dv"),
    ):
        if x.ndim < 3:
            raise ValueError(
                f"{_OP}: {name} has shape {x.shape}; expected [*B, {axes}], at least "
                "three axes."
            )
        _check_float(name, x, "Cast it first.")
        if 0 in x.shape:
            raise ValueError(
                f"{_OP}: {name} has shape {x.shape}; expected no axis of size 0."
            )
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(
            f"{_OP}: q, k, v have batch axes {q.shape[:-3]}, {k.shape[:-3]}, "
            f"{v.shape[:-3]}; expected the same. Broadcast them, or use jax.vmap."
        )
    if k.shape[-3:-1] != v.shape[-3:-1]:
        raise ValueError(
            f"{_OP}: k has {k.shape[-3]} tokens and {k.shape[-2]} heads but v has "
            f"{v.shape[-3]} and {v.shape[-2]}; expected the same."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{_OP}: q has head size {q.shape[-1]} but k has {k.shape[-1]}; expected "
            "the same."
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{_OP}: q has {q.shape[-2]} heads and k has {k.shape[-2]}; expected a "
            "multiple of the key heads, so that each serves equally many query heads. "
            "Heads are axis -2 of both."
        )


def _check_float(name: str, x: Array, advice: str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{_OP}: {name} has dtype {x.dtype}; expected a floating-point type. "
            f"{advice}"
        )


def check_dtypes(who: str, given: Sequence[Any], arrays: Sequence[Array]) -> None:
    """Refuses mixed dtypes, those of NumPy arrays as they were given.

    Unless x64 is on, JAX has made float32 of NumPy's float64 by now. Of all three that
    is what its users expect; of one it would hide that the others hold less.
    """
    dtypes = [
        (x if isinstance(x, np.ndarray) else array).dtype
        for x, array in zip(given, arrays, strict=True)
    ]
    if len(set(dtypes)) > 1:
        names = ", ".join(map(str, dtypes))
        raise TypeError(
            f"{who}: q, k, v have dtypes {names}; expected one dtype. Cast them; "
            "nothing is converted silently."
        )


def _check_mask(q: Array, k: Array, mask: BlockMask) -> None:
    for name, x, axes, want, block in (
        ("q", q, "T, H, D", mask.q_len, mask.block_q),
        ("k", k, "S, K, D", mask.kv_len, mask.block_kv),
    ):
        have = x.shape[-3]
        if have != want:
            advice = f"Rebuild it for {have} tokens"
            advice += ", or pad it with mask.pad_to." if have > want else "."
            if x.shape[-2] == want:
                advice = (
                    "The axes of tokens and heads look swapped: pass "
                    f"jnp.swapaxes({name}, -3, -2)."
                )
            raise ValueError(
                f"{_OP}: {name} has {have} tokens but the mask was built for {want} "
                f"({-(-want // block)} blocks of {block}); {name} has shape {x.shape}, "
                f"expected [*B, {axes}]. {advice}"
            )
    if mask.num_heads not in (1, q.shape[-2]):
        raise ValueError(
            f"{_OP}: the mask has {mask.num_heads} head patterns but q has "
            f"{q.shape[-2]} heads; expected one pattern for all, or one each."
        )
    batch = math.prod(q.shape[:-3])
    if mask.batch_size not in (1, batch):
        raise ValueError(
            f"{_OP}: the mask has {mask.batch_size} batch patterns but q has batch "
            f"axes {q.shape[:-3]} ({batch} entries); expected one pattern for all, or "
            "one each."
        )
    if not isinstance(mask.needed_capacity, jax.core.Tracer):
        mask.check()


def _unfold(x: Array, batch: tuple[int, ...]) -> Array:
    """A leading ``[B or 1]`` axis as the axes of ``batch``, each full or 1."""
    lead = batch if x.shape[0] > 1 else (1,) * len(batch)
    shape = (*lead, *x.shape[1:])
    # Inside `jax.shard_map`, an empty array known before tracing crashes the compiler
    # (JAX 0.11.2): a list of no full blocks, for instance.
    return jnp.asarray(x).reshape(shape) if x.size else jnp.zeros(shape, x.dtype)


def _batched_mask(mask: BlockMask, batch: tuple[int, ...]) -> BlockMask:
    mask = dataclasses.replace(mask, groups=None, needed_capacity=None)
    return jax.tree_util.tree_map(lambda x: _unfold(x, batch), mask)


def _batched_bias(bias: Any, q: Array, k: Array, mask: BlockMask) -> Bias | None:
    batch, num_heads = q.shape[:-3], q.shape[-2]
    if bias is None:
        return None
    if isinstance(bias, BlockBias):
        bias = BlockBias(_as_array("BlockBias.values", bias.values))
        _check_block_bias(bias, mask, math.prod(batch), num_heads)
        return jax.tree_util.tree_map(lambda x: _unfold(x, batch), bias)
    if isinstance(bias, EntryBias):
        values, index = (
            _as_array(f"EntryBias.{name}", getattr(bias, name))
            for name in ("values", "index")
        )
        bias = EntryBias(values, index)
        _check_entry_bias(bias, mask, math.prod(batch), num_heads)
        return EntryBias(*(_unfold(x, batch) for x in (bias.values, bias.index)))
    if isinstance(bias, DistanceBias):
        _check_distance_bias(bias, mask, math.prod(batch), num_heads)
        coords = [
            _unfold(x if x.ndim == 3 else x[None], batch)
            for x in (bias.q_coords, bias.kv_coords)
        ]
        weights, knots = (_unfold(x[None], batch) for x in (bias.weights, bias.knots))
        x, y = coords
        return DistanceBias(weights, x, y, knots, form=bias.form)
    if isinstance(bias, ScoreFunction):
        program, arrays = _score.trace(*_score_function(bias, q))
        lead = (1,) * len(batch)
        arrays = tuple(x.reshape(*lead, *x.shape) for x in arrays)
        return ScoreFunction(program, arrays)
    bias = _as_array("bias", bias)
    _check_float("bias", bias, _NO_MASK)
    rank = len(batch) + 3
    full = (*batch, num_heads, q.shape[-3], k.shape[-3])
    shape = (1,) * (rank - bias.ndim) + bias.shape
    fits = len(shape) == rank and all(
        n in (1, m) for n, m in zip(shape[:-1], full[:-1], strict=True)
    )
    if not fits or shape[-1] != full[-1]:
        raise ValueError(
            f"{_OP}: bias has shape {bias.shape}, which does not broadcast to "
            f"{full} ([*B, H, T, S]); expected each axis but the last to be full or 1."
        )
    return bias.reshape(shape)


def _score_function(bias: ScoreFunction, q: Array) -> tuple:
    """The arguments of `_score.trace`."""
    name = getattr(bias.function, "__name__", repr(bias.function))
    who = f"{_OP}: the score function {name}"
    if not callable(bias.function):
        raise TypeError(
            f"{_OP}: the score function is {bias.function!r}; expected a function of "
            "score, index_q, index_kv, head and the arrays."
        )
    if not isinstance(bias.arrays, tuple | list):
        raise TypeError(
            f"{who} has arrays of type {type(bias.arrays).__name__}; expected a tuple: "
            "ScoreFunction(function, (array,))."
        )
    arrays = [_as_array(f"array {n} of {name}", x) for n, x in enumerate(bias.arrays)]
    return bias.function, accumulator_dtype(q), arrays, who


def _check_block_bias(
    bias: BlockBias, mask: BlockMask, batch: int, num_heads: int
) -> None:
    _check_float("BlockBias.values", bias.values, _NO_MASK)
    shape = bias.values.shape
    blocks = (mask.block_q, mask.block_kv)
    if len(shape) != 5 or shape[-2:] != blocks:
        raise ValueError(
            f"{_OP}: BlockBias.values has shape {shape}; expected [B or 1, H or 1, n, "
            f"{blocks[0]}, {blocks[1]}], the mask's block sizes."
        )
    heads = (1,) if mask.num_heads > 1 else (1, num_heads)
    if shape[0] not in (1, batch) or shape[1] not in heads:
        raise ValueError(
            f"{_OP}: BlockBias.values has shape {shape}; expected {batch} or 1 batch "
            f"entries and {' or '.join(map(str, heads))} heads."
        )
    counts = (mask.kv_num_blocks, mask.full_kv_num_blocks)
    if any(isinstance(x, jax.core.Tracer) for x in counts):
        return
    needed = int(np.sum([np.asarray(x).sum((1, 2)) for x in counts], axis=0).max())
    # A mask of fixed capacity has a bias of fixed size: all that its lists, or its
    # bits, have room for.
    rows = mask.num_heads * mask.num_q_blocks
    sizes = {needed, rows * (mask.capacity.kv + mask.capacity.full_kv)}
    if mask.bits is not None:
        sizes.add(mask.bits.shape[-3])
    if shape[2] < needed or shape[2] not in sizes:
        raise ValueError(
            f"{_OP}: the BlockBias holds {shape[2]} blocks but the mask has {needed}; "
            "it was made for another mask. Make it again, e.g. with "
            "BlockBias.from_function."
        )


def _check_entry_bias(
    bias: EntryBias, mask: BlockMask, batch: int, num_heads: int
) -> None:
    shape, lists = bias.values.shape, bias.index.shape
    if mask.bits is None or mask.capacity.full_kv or mask.num_heads > 1:
        raise ValueError(
            f"{_OP}: an EntryBias needs a mask with bits, one pattern for all heads "
            f"and no full blocks; this has {'no' if mask.bits is None else 'its'} "
            f"bits, {mask.num_heads} head patterns and at most "
            f"{mask.capacity.full_kv} full blocks a row. Make it with "
            "patterns.device.neighbors, or use a BlockBias."
        )
    if len(lists) != 3 or lists[0] not in (1, batch) or lists[1] != mask.q_len:
        raise ValueError(
            f"{_OP}: EntryBias.index has shape {lists}; expected [{batch} or 1, "
            f"{mask.q_len}, n], the lists that the mask was made of."
        )
    _check_float("EntryBias.values", bias.values, "Cast it first.")
    if not jnp.issubdtype(bias.index.dtype, jnp.integer):
        raise TypeError(
            f"{_OP}: EntryBias.index has dtype {bias.index.dtype}; expected integers."
        )
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, num_heads)
    if not fits or shape[2:] != lists[1:]:
        raise ValueError(
            f"{_OP}: EntryBias.values has shape {shape}; expected [{batch} or 1, "
            f"{num_heads} or 1, {lists[1]}, {lists[2]}]: a value for each entry of "
            "index."
        )
    if any(isinstance(x, jax.core.Tracer) for x in (mask.bits, bias.index)):
        return
    index = np.asarray(bias.index)
    named = ((index >= 0) & (index < mask.kv_len)).sum((1, 2))
    needed = np.bitwise_count(np.asarray(mask.bits)).sum((1, 2, 3), dtype=np.int64)
    if (named < needed).any():
        raise ValueError(
            f"{_OP}: EntryBias.index names {named.min()} keys but the mask has "
            f"{needed.max()} set bits; it was made of other lists."
        )


def _check_distance_bias(
    bias: DistanceBias, mask: BlockMask, batch: int, num_heads: int
) -> None:
    for name, x, n in (
        ("q_coords", bias.q_coords, mask.q_len),
        ("kv_coords", bias.kv_coords, mask.kv_len),
    ):
        lead = x.shape[:-2]
        if x.shape[-2:] != (n, 3) or lead not in ((), (1,), (batch,)):
            raise ValueError(
                f"{_OP}: DistanceBias.{name} has shape {x.shape}; expected [{n}, 3] or "
                f"[{batch} or 1, {n}, 3]."
            )
    if bias.weights.shape[0] not in (1, num_heads):
        raise ValueError(
            f"{_OP}: DistanceBias.weights has {bias.weights.shape[0]} heads; expected "
            f"1 or {num_heads}."
        )
