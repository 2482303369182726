"""Attention of structure models as functions: projected arrays in, attention out.

Each function is the attention inside one layer of a published model, without its
projections: it takes q, k, v, the bias and the gate as the layer's linear maps made
them, chooses the block mask, and calls `jsparse.block_sparse_attention`. None makes an
array of queries x keys, and a bias that rows or samples share is not copied for them.
Flax is not needed.

Arrays have the axis order of `jax.nn.dot_product_attention`: ``[*B, T, H, D]``, and
``[*B, H, T, S]`` for a bias.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jsparse._ranks import promotes_ranks
from jsparse.bias import BlockBias, DistanceBias, EntryBias, ScoreFunction
from jsparse.nn import _neighbors, _windows
from jsparse.ops import block_sparse_attention
from jsparse.ops._attention import Implementation
from jsparse.ops._checks import check_dtypes, check_scale
from jsparse.patterns import BlockMask, Segments, device
from jsparse.patterns._integers import as_keys

Array = Any

_DENSE_BLOCK = 128  # of masks that leave out nothing but padding
_OTHER_BIASES = BlockBias, DistanceBias, EntryBias, ScoreFunction


@promotes_ranks
def triangle_attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array,
    *,
    node: Literal["starting", "ending"],
    gate: Array | None = None,
    mask: Array | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """Triangle attention around the starting or the ending node of each edge.

    ``out[i, j] = sigmoid(gate[i, j]) * sum_n p[n] v_n`` with ``p = softmax_n(scale *
    q[i, j] . k_n + b_n)``. Around the starting node ``k_n = k[i, n]``, ``v_n = v[i,
    n]`` and ``b_n = bias[j, n]``; around the ending node ``k_n = k[n, j]``, ``v_n =
    v[n, j]`` and ``b_n = bias[n, i]``.

    All rows i (columns j) share one bias, which is never copied for them; its gradient
    is summed where it is computed.

    Args:
        q: ``[*B, N, N, H, D]`` float; the first N counts i, the second j.
        k: ``[*B, N, N, K, D]`` of the same dtype; K divides H.
        v: ``[*B, N, N, K, Dv]`` of the same dtype.
        bias: ``[*B or 1, H or 1, N, N]`` float, the projection of the pair
            representation, indexed as that is, for either node.
        node: the node that the edges attended to have in common.
        gate: ``[*B, N, N, H, Dv]``, before its sigmoid; none if not given.
        mask: ``[*B or 1, N]`` bool, the tokens that exist; all if not given. Edges of
            other tokens give 0 and are seen by nobody.
        scale: multiplies ``q . k``; ``1 / sqrt(D)`` if not given.
        implementation: the backend, see `jsparse.block_sparse_attention`.

    Returns:
        ``[*B, N, N, H, Dv]`` in the dtype of q.

    Raises:
        TypeError: for mixed or non-float dtypes, or a mask that is not bool.
        ValueError: for shapes that do not fit together, or another node.
        NotImplementedError: if the named implementation cannot take this problem.

    Example:
        >>> import jax
        >>> from jsparse.nn.functional import triangle_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 20, 20, 4, 32))
        >>> bias = jax.random.normal(jax.random.key(1), (4, 20, 20))
        >>> triangle_attention(q, k, v, bias, node="ending").shape
        (20, 20, 4, 32)

    References:
        Abramson et al., AlphaFold 3, 2024: algorithms 14 and 15; before it, Jumper et
        al., AlphaFold 2, 2021: algorithms 13 and 14.
    """
    who = "triangle_attention"
    if node not in ("starting", "ending"):
        raise ValueError(f"{who}: node={node!r}; expected 'starting' or 'ending'.")
    q, k, v = _arrays(who, "N, N", q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[-4] != q.shape[-3] or x.shape[-3] != q.shape[-3]:
            raise ValueError(
                f"{who}: {name} has shape {x.shape}; expected [*B, N, N, H, D] with "
                f"both N equal, and to those of q, {q.shape}."
            )
    batch, length, heads = q.shape[:-4], q.shape[-3], q.shape[-2]
    bias = _bias(who, bias, (*batch, heads, length, length))
    mask = _tokens(who, mask, batch, length)
    if node == "ending":
        q, k, v = (jnp.swapaxes(x, -4, -3) for x in (q, k, v))
        bias = jnp.swapaxes(bias, -1, -2)

    def rows(q, k, v, bias, mask):
        return block_sparse_attention(
            *(q, k, v, _dense_mask(length, mask, rows=mask)),
            bias=bias,
            scale=scale,
            implementation=implementation,
        )

    out = _map_batch(rows, len(batch), (q, k, v, bias, mask), (4, 4, 4, 3, 1))
    if node == "ending":
        out = jnp.swapaxes(out, -4, -3)
    edges = None if mask is None else mask[..., :, None] & mask[..., None, :]
    return _gated(who, out, gate, edges)


@promotes_ranks
def pair_bias_attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array,
    *,
    gate: Array | None = None,
    mask: Array | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """Attention among tokens with a pair bias, shared by all samples or one for each.

    ``out[t] = sigmoid(gate[t]) * sum_s p[t, s] v[s]`` with ``p[t] = softmax_s(scale *
    q[t] . k[s] + bias[t, s])``.

    Diffusion samples are batch axes: give them to q, k, v and leave them out of
    ``bias``, which is then not copied for them.

    Args:
        q: ``[*B, N, H, D]`` float.
        k: ``[*B, N, K, D]`` of the same dtype; K divides H.
        v: ``[*B, N, K, Dv]`` of the same dtype.
        bias: ``[*B or 1, H or 1, N, N]`` float.
        gate: ``[*B, N, H, Dv]``, before its sigmoid; none if not given.
        mask: ``[*B or 1, N]`` bool, the tokens that exist; all if not given. The others
            give 0 and are seen by nobody.
        scale: multiplies ``q . k``; ``1 / sqrt(D)`` if not given.
        implementation: the backend, see `jsparse.block_sparse_attention`.

    Returns:
        ``[*B, N, H, Dv]`` in the dtype of q.

    Raises:
        TypeError: for mixed or non-float dtypes, or a mask that is not bool.
        ValueError: for shapes that do not fit together.
        NotImplementedError: if the named implementation cannot take this problem.

    Example:
        >>> import jax
        >>> from jsparse.nn.functional import pair_bias_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 5, 200, 16, 48))
        >>> bias = jax.random.normal(jax.random.key(1), (16, 200, 200))
        >>> pair_bias_attention(q, k, v, bias).shape
        (5, 200, 16, 48)

    References:
        Abramson et al., AlphaFold 3, 2024: algorithm 24, with heads of 24 channels in
        the pairformer and of 48 in the diffusion transformer.
    """
    who = "pair_bias_attention"
    q, k, v = _arrays(who, "N", q, k, v)
    batch, length, heads = q.shape[:-3], q.shape[-3], q.shape[-2]
    if k.shape[-3] != length:
        raise ValueError(
            f"{who}: q has {length} tokens and k has {k.shape[-3]}; expected the same."
        )
    bias = _bias(who, bias, (*batch, heads, length, length))
    mask = _tokens(who, mask, batch, length)

    def sample(q, k, v, bias, mask):
        return block_sparse_attention(
            *(q, k, v, _dense_mask(length, mask)),
            bias=bias,
            scale=scale,
            implementation=implementation,
        )

    out = _map_batch(sample, len(batch), (q, k, v, bias, mask), (3, 3, 3, 3, 1))
    return _gated(who, out, gate, mask)


@promotes_ranks
def atom_window_attention(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | BlockBias | None = None,
    *,
    num_atoms: Array | None = None,
    gate: Array | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """Attention of atoms in windows of 32 queries and 128 keys.

    Window w holds the queries ``32 w`` to ``32 w + 31`` and sees 128 atoms from
    ``start[w] = 32 w - 48`` on, moved so that they lie within ``[0, num_atoms)``:
    ``out[t] = sigmoid(gate[t]) * sum_c p[t, c] v[start + c]`` with ``p[t] = softmax_c(
    scale * q[t] . k[start + c] + bias[w, t - 32 w, c])``. With fewer than 128 atoms
    every atom sees all of them. Atoms beyond ``num_atoms`` give 0 and are seen by
    nobody; windows without atoms cost nothing.

    Args:
        q: ``[*B, N, H, D]`` float.
        k: ``[*B, N, K, D]`` of the same dtype; K divides H.
        v: ``[*B, N, K, Dv]`` of the same dtype.
        bias: ``[*B or 1, W, H or 1, 32, 128]`` float with ``W = ceil(N / 32)``; where
            no atom is, it may be anything. Or a `BlockBias` for the mask
            ``patterns.device.atom_windows(num_atoms, padded_to=N)``, which saves moving
            the values to blocks. None if not given.
        num_atoms: scalar integer, the atoms that really exist; N if not given. It may
            be traced: one compilation serves every number.
        gate: ``[*B, N, H, Dv]``, before its sigmoid; none if not given.
        scale: multiplies ``q . k``; ``1 / sqrt(D)`` if not given.
        implementation: the backend, see `jsparse.block_sparse_attention`.

    Returns:
        ``[*B, N, H, Dv]`` in the dtype of q.

    Raises:
        TypeError: for mixed or non-float dtypes, or atoms that are not counted by an
            integer.
        ValueError: for shapes that do not fit together, or more atoms than N.
        NotImplementedError: if the named implementation cannot take this problem.

    Example:
        >>> import jax
        >>> from jsparse.nn.functional import atom_window_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 480, 4, 32))
        >>> bias = jax.random.normal(jax.random.key(1), (15, 4, 32, 128))
        >>> atom_window_attention(q, k, v, bias, num_atoms=170).shape
        (480, 4, 32)

    References:
        Abramson et al., AlphaFold 3, 2024: algorithms 7 and 24, and the shifts at both
        ends of its code. That code lets queries of a structure with fewer than 128
        atoms also see padding; here they do not.
    """
    who = "atom_window_attention"
    q, k, v = _arrays(who, "N", q, k, v)
    batch, length, heads = q.shape[:-3], q.shape[-3], q.shape[-2]
    if k.shape[-3] != length:
        raise ValueError(
            f"{who}: q has {length} atoms and k has {k.shape[-3]}; expected the same."
        )
    if num_atoms is None:
        mask, exists = _windows.known_mask(length), None
    else:
        if isinstance(num_atoms, int | np.integer) and num_atoms > length:
            raise ValueError(
                f"{who}: num_atoms={num_atoms}; expected at most {length}, the atoms "
                "of q."
            )
        mask = device.atom_windows(num_atoms, padded_to=length)
        exists = jnp.arange(length) < num_atoms
    if isinstance(bias, BlockBias):
        out = block_sparse_attention(
            *(q, k, v, mask), bias=bias, scale=scale, implementation=implementation
        )
        return _gated(who, out, gate, exists)
    if bias is not None:
        windows = -(-length // _windows.QUERIES)
        shape = (*batch, windows, heads, _windows.QUERIES, _windows.KEYS)
        bias = _bias(who, bias, shape, core=4)

    def sample(q, k, v, bias):
        if bias is not None:
            bias = _windows.window_bias(bias[None], mask)
        return block_sparse_attention(
            *(q, k, v, mask), bias=bias, scale=scale, implementation=implementation
        )

    out = _map_batch(sample, len(batch), (q, k, v, bias), (3, 3, 3, 4))
    return _gated(who, out, gate, exists)


@promotes_ranks
def neighbor_attention(
    q: Array,
    k: Array,
    v: Array,
    index: Array,
    bias: Array | DistanceBias | None = None,
    *,
    gate: Array | None = None,
    capacity: int = 32,
    block_q: int = 64,
    block_kv: int = 64,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """Attention through neighbour lists, which may change from step to step.

    ``out[t] = sigmoid(gate[t]) * sum_n p[n] v[index[t, n]]`` with ``p = softmax_n(scale
    * q[t] . k[index[t, n]] + bias[t, n])``. The entries of a row are a set: a key named
    twice counts once, with the bias of its first entry, and negative entries are
    padding. A row that names nothing gives 0.

    Blocks that hold no pair are left out, so neighbours should have numbers near each
    other: the order of the sequence, or that of `jsparse.patterns.order`. What belongs
    to the blocks (bits, and ``bias``) is kept in tables whose size is static,
    ``capacity`` blocks for each query block on the mean. If the lists touch more, as
    those of noisy coordinates do, the queries are taken in parts that surely fit: the
    result is the same, nothing overflows. Where the tables hold every block, that is
    for at most ``capacity * block_kv`` keys, neither choice is compiled. Lists of
    all keys are no case of their own: in parts, their blocks are like any others.

    Under ``jax.vmap`` JAX computes both choices; give samples as batch axes instead.

    Args:
        q: ``[*B, T, H, D]`` float.
        k: ``[*B, S, K, D]`` of the same dtype; K divides H.
        v: ``[*B, S, K, Dv]`` of the same dtype.
        index: ``[*B or 1, T, n]`` integer, the keys of each query. An entry of S or
            more is an error, or padding where ``index`` is traced.
        bias: ``[*B or 1, H or 1, T, n]`` float, one value for each entry of ``index``,
            or a `DistanceBias`; none if not given.
        gate: ``[*B, T, H, Dv]``, before its sigmoid; none if not given.
        capacity: key blocks that the tables have room for, per query block on the mean.
            A block takes ``block_q * block_kv / 8`` bytes, and with an array of bias
            ``H * block_q * block_kv`` of its numbers more, but in ``"mosaic_gpu"``,
            which reads the bias as it is.
        block_q: queries per block.
        block_kv: keys per block.
        scale: multiplies ``q . k``; ``1 / sqrt(D)`` if not given.
        implementation: the backend, see `jsparse.block_sparse_attention`.

    Returns:
        ``[*B, T, H, Dv]`` in the dtype of q.

    Raises:
        TypeError: for mixed or non-float dtypes, or entries that are not integers.
        ValueError: for shapes or sizes that do not fit together, or entries beyond S.
        NotImplementedError: if the named implementation cannot take this problem.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jsparse.nn.functional import neighbor_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 300, 4, 32))
        >>> index = jnp.arange(300)[:, None] + jnp.array([[-1, 0, 7]])
        >>> neighbor_attention(q, k, v, index.clip(max=299)).shape
        (300, 4, 32)

    References:
        RFdiffusion3 (RosettaCommons/foundry): 128 keys an atom, 32 a token, chosen from
        the coordinates of each sample at each step. Its gather path counts duplicates;
        here, as in its dense path, they count once.
    """
    who = "neighbor_attention"
    q, k, v = _arrays(who, "T", q, k, v)
    batch, length, heads = q.shape[:-3], q.shape[-3], q.shape[-2]
    index = _index(who, index, (*batch, length), k.shape[-3])
    for name, size in (
        *(("capacity", capacity), ("block_q", block_q), ("block_kv", block_kv)),
    ):
        integer = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if not integer or size < 1:
            raise ValueError(
                f"{who}: {name}={size!r}; expected an integer of at least 1 that is "
                "known before tracing."
            )
    if bias is not None and not isinstance(bias, DistanceBias):
        bias = _bias(who, bias, (*batch, heads, length, index.shape[-1]))
        bias = _flat(bias, batch, 3)
    out = _neighbors.attend(
        *(x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)),
        _flat(index, batch, 2),
        bias,
        tables=_neighbors.Tables(
            *(int(capacity), int(block_q), int(block_kv)),
            check_scale(scale, q.shape[-1]),
            implementation,
        ),
    )
    return _gated(who, out.reshape(*batch, *out.shape[1:]), gate)


# --------------------------------------------------------------------------- arguments


def _arrays(who: str, tokens: str, q: Any, k: Any, v: Any) -> tuple[Array, ...]:
    """q, k, v as arrays with a token axis or two; the operation checks the rest."""
    rank = 3 + tokens.count(",")
    found = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if np.ndim(x) < rank:
            raise ValueError(
                f"{who}: {name} has shape {np.shape(x)}; expected [*B, {tokens}, H, D]."
            )
        if 0 in np.shape(x):
            raise ValueError(
                f"{who}: {name} has shape {np.shape(x)}; expected no axis of size 0."
            )
        found.append(jnp.asarray(x))
    check_dtypes(who, (q, k, v), found)
    shapes = [x.shape[:-rank] for x in found]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"{who}: q, k, v have batch axes {', '.join(map(str, shapes))}; expected "
            "the same."
        )
    return tuple(found)


def _bias(who: str, bias: Any, full: tuple[int, ...], core: int = 3) -> Array:
    """The bias with at least its ``core`` last axes, of which only H may be 1."""
    if bias is None or isinstance(bias, _OTHER_BIASES):
        raise TypeError(
            f"{who}: bias is a {type(bias).__name__}; expected an array. With another "
            "kind of bias, or none, call block_sparse_attention."
        )
    bias = jnp.asarray(bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(
            f"{who}: bias has dtype {bias.dtype}; expected a floating-point type."
        )
    shape = (1,) * (core - bias.ndim) + bias.shape
    wanted = full[max(0, len(full) - len(shape)) :]
    may_be_one = {*range(len(shape) - core), len(shape) - 3}
    if len(shape) != len(wanted) or any(
        have != want and not (have == 1 and axis in may_be_one)
        for axis, (have, want) in enumerate(zip(shape, wanted, strict=True))
    ):
        raise ValueError(
            f"{who}: bias has shape {bias.shape}, which does not broadcast to {full}; "
            "expected each axis of batch or heads to be full or 1, the others full."
        )
    return bias.reshape(shape)


def _tokens(who: str, mask: Any, batch: tuple[int, ...], length: int) -> Array | None:
    """The mask of tokens ``[*B or 1, N]``."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"{who}: mask has dtype {mask.dtype}; expected bool, True for the tokens "
            "that exist."
        )
    full = (*batch, length)
    if not _fits(mask.shape, full):
        raise ValueError(
            f"{who}: mask has shape {mask.shape}, which does not broadcast to {full}; "
            "expected one flag for each token, not for each pair."
        )
    return mask


def _index(who: str, index: Any, full: tuple[int, ...], kv_len: int) -> Array:
    """Neighbour lists ``[*B or 1, T, n]`` int32."""
    index = index if isinstance(index, jax.Array) else np.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"{who}: index has dtype {index.dtype}; expected integers, the numbers of "
            "the keys."
        )
    if not _fits(index.shape[:-1], full) or index.shape[-1] == 0:
        raise ValueError(
            f"{who}: index has shape {index.shape}; expected {full} and one more axis, "
            "the entries of each query, with each batch axis full or 1."
        )
    largest = -1 if isinstance(index, jax.core.Tracer) else np.asarray(index).max()
    if largest >= kv_len:
        raise ValueError(
            f"{who}: index names key {largest}; expected 0 to {kv_len - 1}, or "
            "negative entries as padding."
        )
    return as_keys(index, kv_len)


def _fits(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether ``shape`` has the last axis of ``full`` and broadcasts to it."""
    wanted = full[max(0, len(full) - len(shape)) :]
    return len(shape) == len(wanted) > 0 and all(
        have == want or (have == 1 and axis < len(wanted) - 1)
        for axis, (have, want) in enumerate(zip(shape, wanted, strict=True))
    )


# --------------------------------------------------------------------------- computing


def _map_batch(
    function: Callable[..., Array],
    rank: int,
    arrays: tuple[Any, ...],
    cores: tuple[int, ...],
) -> Array:
    """``function`` over ``rank`` leading axes; arrays without one share it.

    `jax.vmap` and not axes of the operation: what is shared keeps its own shape then,
    the mask of tokens like the bias.
    """
    if rank == 0:
        return function(*arrays)
    size, axes, given = arrays[0].shape[0], [], []
    for x, core in zip(arrays, cores, strict=True):
        if x is None or x.ndim < rank + core:
            axes.append(None)
            given.append(x)
        elif x.shape[0] == size:
            axes.append(0)
            given.append(x)
        else:  # an axis of size 1
            axes.append(None)
            given.append(x[0])

    def inner(*arrays):
        return _map_batch(function, rank - 1, arrays, cores)

    return jax.vmap(inner, in_axes=tuple(axes))(*given)


def _flat(x: Array, batch: tuple[int, ...], core: int) -> Array:
    """All batch axes of x as one, of size 1 if the batch shares it."""
    lead, shape = x.shape[: x.ndim - core], x.shape[x.ndim - core :]
    if all(n == 1 for n in lead):
        return x.reshape(1, *shape)
    return jnp.broadcast_to(x, (*batch, *shape)).reshape(-1, *shape)


def _dense_mask(
    length: int, tokens: Array | None, rows: Array | None = None
) -> BlockMask:
    """All pairs of the tokens ``[N]`` that exist; none in batch entries that do not."""
    if tokens is None:
        return _every_pair(length)
    blocks = -(-length // _DENSE_BLOCK)
    by_block = jnp.pad(tokens, (0, blocks * _DENSE_BLOCK - length))
    by_block = by_block.reshape(blocks, _DENSE_BLOCK)
    some, every = by_block.any(1), by_block.all(1)
    labels = (jnp.where(tokens, 0, n)[None].astype(jnp.int32) for n in (-1, -2))
    pairs, whole = (x[:, None] & x[None, :] for x in (some, every))
    if rows is not None:
        pairs, whole = (rows[:, None, None, None] & x for x in (pairs, whole))
    mask = device.from_dense_blocks(
        pairs,
        q_len=length,
        block_q=_DENSE_BLOCK,
        block_kv=_DENSE_BLOCK,
        capacity=blocks,
        full=whole,
        rules=(Segments(*labels),),
    )
    # Rows as wide as the matrix hold every block.
    return dataclasses.replace(mask, needed_capacity=None)


@functools.lru_cache(maxsize=64)
def _every_pair(length: int) -> BlockMask:
    """One mask for each length: backends that plan by its pattern plan once."""
    blocks = -(-length // _DENSE_BLOCK)
    rows, columns = np.divmod(np.arange(blocks * blocks), blocks)
    return BlockMask.from_blocks(
        *(rows, columns), q_len=length, block_q=_DENSE_BLOCK, block_kv=_DENSE_BLOCK
    )


def _gated(
    who: str, out: Array, gate: Array | None, exists: Array | None = None
) -> Array:
    """``out``, which is 0 where nothing ``exists``, times the sigmoid of the gate."""
    if gate is None:
        return out
    gate = jnp.asarray(gate)
    if not jnp.issubdtype(gate.dtype, jnp.floating):
        raise TypeError(
            f"{who}: gate has dtype {gate.dtype}; expected a floating-point type."
        )
    if gate.shape != out.shape:
        raise ValueError(
            f"{who}: gate has shape {gate.shape}; expected that of the result, "
            f"{out.shape}."
        )
    if exists is not None:
        # Before the sigmoid: 0 times the derivative of a NaN is NaN.
        gate = jnp.where(exists[..., None, None], gate, 0)
    return out * jax.nn.sigmoid(gate).astype(out.dtype)
