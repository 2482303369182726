"""Block-sparse attention through the Pallas Mosaic-GPU kernels, on Hopper GPUs.

Chooses configs and launches; `jsparse.backends._hopper` makes of the operands what the
kernels take. The kernels themselves are in `jsparse.pallas_kernels`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from jsparse.backends import _hopper
from jsparse.backends._contract import HostPattern, Operands, Problem
from jsparse.backends._mosaic_bias import (
    bias_blocks,
    distance_gradient,
    entry_gradient,
    like,
    score_gradient,
    zero_unlisted,
)
from jsparse.bias import Bias, DistanceBias, EntryBias, ScoreFunction
from jsparse.pallas_kernels.mosaic_gpu import (
    _bias,
    _distance,
    _score,
    bwd_dbias_sm90,
    bwd_dkv_sm90,
    bwd_dq_sm90,
    fwd_sm90,
    neighbors_sm90,
)
from jsparse.patterns import Distance

Array = Any
_SixArrays = tuple[Array, Array, Array, Array, Array, Array]

name = "mosaic_gpu"
differentiable = False

DTYPES = ("bfloat16", "float16")
LARGEST_HEAD = 256
BLOCKS = {"block_q": (64, 128), "block_kv": (32, 64, 128)}
LARGEST_HEAD_WITH_BIAS = 128


def why_not(problem: Problem) -> str | None:
    """What the kernels were built and tested for."""
    if reason := _hopper.wrong_device(problem):
        return reason
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype}; expected {' or '.join(DTYPES)}"
    if max(problem.head_dim, problem.value_dim) > LARGEST_HEAD:
        size = max(problem.head_dim, problem.value_dim)
        return f"head size {size}; expected at most {LARGEST_HEAD}"
    for side, taken in BLOCKS.items():
        size = getattr(problem, side)
        if size not in taken:
            *most, last = taken
            return f"{side}={size}; expected {', '.join(map(str, most))} or {last}"
    if problem.bias is not None:
        return _why_not_bias(problem, problem.bias)
    return None


def _why_not_bias(problem: Problem, kind: str) -> str | None:
    if problem.score is not None and (reason := _score.why_not(problem.score)):
        return reason
    size = max(problem.head_dim, problem.value_dim)
    if size > LARGEST_HEAD_WITH_BIAS:
        return (
            f"head size {size} with a bias; expected at most {LARGEST_HEAD_WITH_BIAS}"
        )
    most = _distance.MOST.get(kind, problem.bias_weights)
    if problem.bias_weights > most:
        return (
            f"a {kind} bias with {problem.bias_weights} weights a head; "
            f"expected at most {most}"
        )
    most = neighbors_sm90.MOST_ENTRIES
    if kind == "entry" and problem.bias_weights > most:
        return f"lists of {problem.bias_weights} entries; expected at most {most}"
    most = 2**31 - 1  # kernels count in 32 bits
    if kind == "score_fn" and problem.bias_weights > most:
        return (
            f"a score function with an array of {problem.bias_weights} elements; "
            f"expected at most {most}"
        )
    return None


# ----------------------------------------------------------------------- entry points


def forward(
    operands: Operands, scale: float, pattern: HostPattern | None
) -> tuple[Array, Array]:
    """See `Backend.forward`."""
    call = _hopper.Call.of(operands, scale, pattern)
    lists, num_ctas = call.rows, _hopper.num_multiprocessors()
    lists_of_all = math.prod(call.q.shape[::2])
    computed = _bias.kind(call.bias) in _bias.COMPUTED
    launch = fwd_sm90.launch_of(
        lists_of_all * call.mask.num_q_blocks,
        lists_of_all * (lists.partial.column[0, 0].size + lists.full.column[0, 0].size),
        computed or any(isinstance(rule, Distance) for rule in call.mask.rules),
        num_ctas,
    )
    config = fwd_sm90.Config.choose(
        *(*call.dims, *call.blocks, num_ctas, launch, _bias.kind(call.bias)),
    )
    schedule = call.schedule(
        lists,
        config.num_workers,
        tiles=call.mask.block_q // config.tile_q,
        share=config.num_sharing,
    )
    bad = call.bad_keys(call.v)
    out, lse = fwd_sm90.forward(
        *(call.q, call.k, call.v),
        *call.entries(lists, bad, call.blocks[1]),
        call.elements(bad),
        schedule,
        blocks=call.blocks,
        scale=call.scale,
        config=config,
        bias=call.launched("kv"),
    )
    value_dim = operands.v.shape[-1]
    out = out[..., :value_dim].reshape(*call.batch, *out.shape[1:3], value_dim)
    return out, lse.reshape(*call.batch, *lse.shape[1:])


def backward(
    operands: Operands,
    scale: float,
    pattern: HostPattern | None,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
    bias_gradient: bool,
) -> tuple[Array, Array, Array, Bias | None]:
    """See `Backend.backward`."""
    call = _hopper.Call.of(operands, scale, pattern)
    if call.bias is not None and not bias_gradient:
        constant = dataclasses.replace(call.bias, constant=True)
        call = dataclasses.replace(call, bias=constant)
    q, k, v = call.q, call.k, call.v
    sizes = (*call.dims, *call.blocks, _hopper.num_multiprocessors())
    beside = _bias.kind(call.bias), _bias.lane_sums(call.bias)
    config = bwd_dq_sm90.choose(*sizes, *beside)
    lists = call.rows
    block_q, block_kv = call.blocks
    tiles = block_q // config.rows(block_q)
    schedule = call.schedule(lists, config.num_workers, tiles=tiles)
    of_queries = call.statistics(out, lse, dout, dlse)
    dout = call.flat(_hopper.pad_dim(dout))
    arrays = (q, k, v, dout, of_queries.lse2, of_queries.delta)

    bad_keys = call.bad_keys(k)
    dq, of_bias = bwd_dq_sm90.backward_dq(
        *arrays,
        *call.entries(lists, bad_keys, block_kv),
        call.elements(bad_keys),
        schedule,
        blocks=call.blocks,
        scale=call.scale,
        config=config,
        bias=call.launched("kv"),
    )
    config = bwd_dkv_sm90.choose(*sizes, *beside)
    lists, group = call.columns, call.q.shape[2] // call.k.shape[2]
    tiles = block_kv // config.rows(block_kv)
    dk, dv, by_key = bwd_dkv_sm90.backward_dkv(
        *arrays,
        *call.entries(lists, of_queries.bad, block_q),
        call.transposed_elements(of_queries.bad),
        call.schedule(lists, config.num_workers, group, tiles),
        blocks=call.blocks,
        scale=call.scale,
        config=config,
        bias=call.launched("q"),
    )
    if call.sign != 1:
        dq = dq * jnp.asarray(call.sign, dq.dtype)
    grads = (
        call.sum_shared(g, x) for g, x in zip((dq, dk, dv), operands[:3], strict=True)
    )
    dlse = jnp.where(of_queries.blind, 0, dlse)
    found = _Found(of_bias.by_row, by_key, of_bias.by_pair, of_bias.values, dlse)
    return (*grads, _bias_gradient(call, arrays, found, operands.bias))


class _Found(NamedTuple):
    """What the kernels found of a bias's gradient, and dlse ``[*B, H, T]``.

    By row of the dq and of the dk and dv kernel, by pair, and values: see
    `bwd_dq_sm90.BiasGradient`.
    """

    by_query: Array | None
    by_key: Array | None
    by_pair: Array | None
    values: Array | None
    dlse: Array


def _bias_gradient(
    call: _hopper.Call, arrays: _SixArrays, found: _Found, primal: Bias | None
) -> Bias | None:
    """The gradient of a bias: from what was found if it suffices, else by a kernel.

    ``arrays`` are q, k, v, dout, lse2 and delta.
    """
    bias: Any = call.bias
    if bias is None or bias.constant:
        return None
    if isinstance(primal, DistanceBias):
        dlse = found.dlse.reshape(-1, *found.dlse.shape[-2:])
        return distance_gradient(bias, *found[:3], dlse, primal, call.batch)
    if isinstance(primal, EntryBias):
        return entry_gradient(found.values, bias.counted, primal, call.batch)
    if isinstance(primal, ScoreFunction):
        dlse = found.dlse.reshape(-1, *found.dlse.shape[-2:])
        return score_gradient(bias, *found[:2], dlse, primal, call.batch)
    by_key = None if found.by_key is None else jnp.moveaxis(found.by_key, 0, 2)
    return streamed_bias_gradient(call, arrays, by_key, found.values, primal)


def streamed_bias_gradient(
    call: _hopper.Call,
    arrays: _SixArrays,
    by_key: Array | None,
    values: Array | None,
    primal: Bias | None,
) -> Bias:
    """The gradient of a dense or block bias: what was found of it, or by a kernel.

    Args:
        call: the call.
        arrays: q, k, v, dout, lse2 and delta.
        by_key: ``[B, H, 1, S]``, of a bias by key, of all who share it.
        values: as those of the bias, with anything in blocks that are not listed.
        primal: the bias.
    """
    bias: Any = call.bias
    if by_key is not None:
        return like(by_key, primal, call.batch)
    if values is not None:
        values = zero_unlisted(values, bias, call.mask, call.rows.known)
        return like(values, primal, call.batch)
    dims = arrays[0].shape[-1], arrays[2].shape[-1]
    sizes = (*dims, *call.blocks, _hopper.num_multiprocessors())
    config = bwd_dbias_sm90.choose(*sizes, bias.values.dtype)
    any_partial = call.rows.partial.column.shape[-1] > 0
    values = bwd_dbias_sm90.backward_dbias(
        *arrays,
        bias_blocks(bias, call.mask),
        call.elements(call.bad_keys(call.k)) if any_partial else None,
        bias,
        blocks=call.blocks,
        scale=call.scale,
        config=config,
    )
    return like(values, primal, call.batch)
