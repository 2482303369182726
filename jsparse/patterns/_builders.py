"""Host builders of general patterns: dense masks, windows, segments, strides, random.

Each returns a `BlockMask` that lists exactly the blocks with an allowed element, and
calls full exactly those where every element is allowed. NumPy and SciPy only; structure
patterns (`_structure.py`) build on the same helpers. Users call them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from jsparse.patterns._arguments import as_numpy, count
from jsparse.patterns._bits import bit_mask, dense_strips
from jsparse.patterns._block_mask import BlockMask, check_sizes, from_parts
from jsparse.patterns._parts import Part, Sizes, pack, unique, whole_blocks
from jsparse.patterns._rules import Segments, Window

Array = Any

from_blocks = BlockMask.from_blocks


def from_dense(mask: Array, *, block_q: int = 128, block_kv: int = 128) -> BlockMask:
    """The block mask of a dense boolean mask.

    Bits are stored only if some block is really partial; a block that merely reaches
    beyond T or S needs none.

    Args:
        mask: ``[T, S]``, ``[H, T, S]`` or ``[B, H, T, S]`` bool, True where query t
            sees key s; H and B may be 1 for a pattern that all heads or batch entries
            share.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask ``[B or 1, H or 1]``.

    Raises:
        TypeError: for a mask that is traced.
        ValueError: for other shapes, an axis of length 0, or values that are not bool.

    Example:
        >>> causal = np.tril(np.ones((4, 4), bool))
        >>> from_dense(causal, block_q=2, block_kv=2).block_states()[0, 0].tolist()
        [[1, 0], [2, 1]]
    """
    mask = as_numpy("from_dense: mask", mask)
    if mask.ndim not in (2, 3, 4) or 0 in mask.shape:
        raise ValueError(
            f"from_dense: mask has shape {mask.shape}; expected [T, S], [H, T, S] or "
            "[B, H, T, S] with no axis of length 0."
        )
    if mask.dtype != bool:
        raise ValueError(
            f"from_dense: mask has dtype {mask.dtype}; expected bool, True where a "
            "query sees a key. Compare first, e.g. mask > -1e9 for an additive mask."
        )
    q_len, kv_len = mask.shape[-2:]
    sizes = check_sizes("from_dense", q_len, kv_len, block_q, block_kv)
    heads = mask.shape[-3] if mask.ndim > 2 else 1
    patterns = mask.reshape(-1, q_len, kv_len)
    return bit_mask((dense_strips(m, sizes) for m in patterns), heads, sizes)


def window(
    q_len: int,
    *,
    left: int | None,
    right: int | None,
    kv_len: int | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Each query sees the keys around its own index: ``t - left <= s <= t + right``.

    Args:
        q_len: number of queries T.
        left: keys seen before the query's index; None for all of them.
        right: keys seen after the query's index; None for all of them. ``left=None,
            right=0`` is causal attention.
        kv_len: number of keys S; T if not given. Index t of the queries faces index t
            of the keys whatever the lengths.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask with a `Window` rule.

    Raises:
        TypeError: for numbers that are traced.
        ValueError: for sizes below 1, or a negative ``left`` or ``right``.

    Example:
        >>> mask = window(4, left=1, right=0, block_q=2, block_kv=2)
        >>> mask.to_dense()[0, 0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]

    References:
        Beltagy et al., Longformer, 2020 (sliding window).
    """
    sizes = check_sizes("window", q_len, kv_len, block_q, block_kv)
    t = np.arange(sizes.q_len, dtype=np.int64)
    start, stop = np.zeros_like(t), np.full_like(t, sizes.kv_len)
    if left is not None:
        left = min(count("window: left", left, 0), sizes.q_len)
        start = np.clip(t - left, 0, sizes.kv_len)
    if right is not None:
        right = min(count("window: right", right, 0), sizes.kv_len)
        stop = np.minimum(t + right + 1, sizes.kv_len)
    return interval_mask(start, stop, sizes)


def segments(
    q_ids: Array,
    kv_ids: Array | None = None,
    *,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Each query sees the keys with its own label, e.g. its chain or packed sequence.

    Args:
        q_ids: ``[T]`` or ``[B, T]`` integer labels in any order. No value is special:
            give padding a label of its own, different for queries and keys, and it sees
            nothing and is seen by nobody.
        kv_ids: ``[S]`` or ``[B, S]`` integer labels; ``q_ids`` if not given.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask with a `Segments` rule, one pattern for each batch entry.

    Raises:
        TypeError: for labels that are traced.
        ValueError: for labels that are not integers, or shapes that do not fit.

    Example:
        >>> chains = [0, 0, 1, 1, 1, 0]
        >>> segments(chains, block_q=2, block_kv=2).block_states()[0, 0].tolist()
        [[2, 0, 1], [0, 2, 1], [1, 1, 1]]
    """
    q = _check_ids("q_ids", q_ids)
    kv = q if kv_ids is None else _check_ids("kv_ids", kv_ids)
    sizes = check_sizes("segments", q.shape[1], kv.shape[1], block_q, block_kv)
    if len(q) != len(kv) and 1 not in (len(q), len(kv)):
        raise ValueError(
            f"segments: q_ids has {len(q)} batch entries and kv_ids {len(kv)}; "
            "expected equal numbers, or 1 for labels that all entries share."
        )
    names, labels = np.unique(
        np.concatenate([q.ravel(), kv.ravel()]), return_inverse=True
    )
    labels = labels.astype(np.int32)
    q_labels = labels[: q.size].reshape(q.shape)
    kv_labels = labels[q.size :].reshape(kv.shape)
    batch = max(len(q), len(kv))
    grid = [
        [_same_label(q_labels[b % len(q)], kv_labels[b % len(kv)], len(names), sizes)]
        for b in range(batch)
    ]
    # Labels of any width are counted anew where JAX's int32 would wrap them.
    narrow = np.iinfo(np.int32)
    if narrow.min <= names[0] and names[-1] <= narrow.max:
        q_labels, kv_labels = q.astype(np.int32), kv.astype(np.int32)
    return from_parts(grid, sizes, rules=(Segments(q_labels, kv_labels),))


def strided(
    q_len: int,
    *,
    stride: int,
    kv_len: int | None = None,
    offset: int = 0,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Each query sees every ``stride``-th key: ``(s - t) % stride == offset % stride``.

    Blocks are left out only where ``stride`` exceeds the block. Combine it with a local
    pattern by ``|``, or with causality by ``&``.

    Args:
        q_len: number of queries T.
        stride: distance between two keys that one query sees.
        kv_len: number of keys S; T if not given.
        offset: distance from a query to the next key it sees, modulo ``stride``.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask with a `Segments` rule.

    Raises:
        TypeError: for numbers that are traced.
        ValueError: for sizes or a stride below 1, or an offset that is no integer.

    Example:
        >>> mask = strided(4, stride=2, block_q=2, block_kv=2)
        >>> mask.to_dense()[0, 0].astype(int).tolist()
        [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]

    References:
        Child et al., Generating Long Sequences with Sparse Transformers, 2019.
    """
    sizes = check_sizes("strided", q_len, kv_len, block_q, block_kv)
    stride = count("strided: stride", stride, 1)
    offset = count("strided: offset", offset, None) % stride
    return segments(
        np.arange(sizes.q_len) % stride,
        (np.arange(sizes.kv_len) - offset) % stride,
        block_q=block_q,
        block_kv=block_kv,
    )


def global_(
    q_len: int,
    *,
    index: Array,
    kv_len: int | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """The listed queries see every key, and every query sees the listed keys.

    Combine it with a local pattern by ``|``.

    Args:
        q_len: number of queries T.
        index: ``[n]`` integer, the global positions, e.g. ``range(8)``; duplicates
            count once. They are positions of queries and of keys alike.
        kv_len: number of keys S; T if not given.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask with bits, or only full blocks where none is partial.

    Raises:
        TypeError: for sizes or positions that are traced.
        ValueError: for sizes below 1, or positions out of range of queries or keys.

    Example:
        >>> mask = global_(4, index=[0], block_q=2, block_kv=2)
        >>> mask.to_dense()[0, 0].astype(int).tolist()
        [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]

    References:
        Beltagy et al., Longformer, 2020; Zaheer et al., Big Bird, 2020 (global tokens).
    """
    sizes = check_sizes("global_", q_len, kv_len, block_q, block_kv)
    index = as_numpy("global_: index", index)
    if index.size == 0:
        index = index.astype(np.int64)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise ValueError(
            f"global_: index has shape {index.shape} and dtype {index.dtype}; expected "
            "one axis of integers, e.g. range(8)."
        )
    shortest = min(sizes.q_len, sizes.kv_len)
    if index.size and (index.min() < 0 or index.max() >= shortest):
        raise ValueError(
            f"global_: index spans {index.min()} to {index.max()}; expected 0 to "
            f"{shortest - 1}, positions of both queries and keys."
        )
    nq, nk = sizes.grid
    is_q = np.zeros(nq * sizes.block_q, bool)
    is_kv = np.zeros(nk * sizes.block_kv, bool)
    is_q[index] = is_kv[index] = True
    is_q, is_kv = is_q.reshape(nq, -1), is_kv.reshape(nk, -1)
    inside_q = (np.arange(is_q.size) < sizes.q_len).reshape(is_q.shape)
    inside_kv = (np.arange(is_kv.size) < sizes.kv_len).reshape(is_kv.shape)
    rows, cols = np.nonzero(is_q.any(1)[:, None] | is_kv.any(1))
    words = np.where(
        is_q[rows][:, :, None],
        pack(inside_kv)[cols][:, None],
        pack(is_kv)[cols][:, None],
    )
    words[~inside_q[rows]] = 0
    return bit_mask([[(rows, cols, words)]], 1, sizes)


def random(
    q_len: int,
    *,
    blocks_per_row: int,
    rng: int | np.random.Generator,
    kv_len: int | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Each query block sees ``blocks_per_row`` different key blocks, drawn uniformly.

    Args:
        q_len: number of queries T.
        blocks_per_row: key blocks of each query block, at most ``ceil(S / block_kv)``.
        rng: the seed, or a NumPy generator; required, so that every run is repeatable.
        kv_len: number of keys S; T if not given.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask of whole blocks.

    Raises:
        TypeError: for numbers that are traced.
        ValueError: for sizes below 1, a seed that is none, or more blocks than exist.

    Example:
        >>> mask = random(1024, blocks_per_row=3, rng=0)
        >>> mask.full_kv_num_blocks[0, 0].tolist()
        [3, 3, 3, 3, 3, 3, 3, 3]

    References:
        Zaheer et al., Big Bird, 2020 (random blocks).
    """
    sizes = check_sizes("random", q_len, kv_len, block_q, block_kv)
    nq, nk = sizes.grid
    per_row = count("random: blocks_per_row", blocks_per_row, 0)
    if per_row > nk:
        raise ValueError(
            f"random: blocks_per_row={per_row}, but there are {nk} key blocks; "
            f"expected at most {nk}. Ask for fewer, or use smaller blocks."
        )
    if not isinstance(rng, np.random.Generator):
        rng = np.random.default_rng(count("random: rng", rng, 0))
    drawn = [rng.choice(nk, per_row, replace=False, shuffle=False) for _ in range(nq)]
    cols = np.sort(np.stack(drawn), axis=1).astype(np.int32).ravel()
    rows = np.repeat(np.arange(nq, dtype=np.int32), per_row)
    return from_parts([[Part(rows, cols, whole_blocks(rows, cols, sizes))]], sizes)


def interval_mask(
    start: np.ndarray, stop: np.ndarray, sizes: Sizes, length: int | None = None
) -> BlockMask:
    """A mask where query t sees keys ``start[t] <= s < stop[t]``, within ``[0, S]``.

    ``length`` is the number of queries and keys that really exist, if fewer than T and
    S; the intervals of the others are empty.
    """
    nk, block_kv = sizes.grid[1], sizes.block_kv
    span = np.stack(
        [
            np.arange(sizes.q_len) // sizes.block_q,
            start // block_kv,
            (stop - 1) // block_kv,
        ]
    )[:, start < stop]
    # Most queries touch the same key blocks as the query before them.
    row, first, last = span[:, (np.diff(span, axis=1, prepend=-1) != 0).any(0)]
    width = last - first + 1
    rows = np.repeat(row, width)
    cols = np.arange(len(rows)) - np.repeat(np.cumsum(width) - width - first, width)
    pairs = Part(
        rows.astype(np.int32), cols.astype(np.int32), np.zeros(len(rows), bool)
    )
    rows, cols, full, _ = unique(pairs, nk)
    edges = np.arange(0, sizes.q_len, sizes.block_q)
    full = np.maximum.reduceat(start, edges)[rows] <= cols * block_kv
    full &= np.minimum.reduceat(stop, edges)[rows] >= (cols + 1) * block_kv
    full &= whole_blocks(rows, cols, sizes)
    rule = Window(start[None].astype(np.int32), stop[None].astype(np.int32))
    lengths = None if length is None else np.full((2, 1), length)
    part = Part(rows, cols, full)
    return from_parts([[part]], sizes, rules=(rule,), lengths=lengths)


def _same_label(q: np.ndarray, kv: np.ndarray, labels: int, sizes: Sizes) -> Part:
    """Blocks that share one of the labels 0 to ``labels - 1``."""
    q_has, q_one = _labels_of_blocks(q, sizes.block_q, labels)
    kv_has, kv_one = _labels_of_blocks(kv, sizes.block_kv, labels)
    shared = (q_has @ kv_has.T).tocsr()
    shared.sort_indices()
    found = shared.tocoo()
    rows, cols = found.row.astype(np.int32), found.col.astype(np.int32)
    full = q_one[rows] & kv_one[cols] & whole_blocks(rows, cols, sizes)
    return Part(rows, cols, full)


def _labels_of_blocks(
    ids: np.ndarray, block: int, labels: int
) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Which labels each block holds, ``[blocks, count]``, and whether it holds one."""
    blocks = -(-len(ids) // block)
    code = np.unique(np.arange(len(ids)) // block * labels + ids)
    row, label = np.divmod(code, labels)
    ones = np.ones(len(code), np.int32)
    has = scipy.sparse.csr_array((ones, (row, label)), shape=(blocks, labels))
    return has, np.bincount(row, minlength=blocks) == 1


def _check_ids(name: str, ids: Array) -> np.ndarray:
    """Labels as ``[B or 1, n]``."""
    ids = as_numpy(f"segments: {name}", ids)
    if ids.ndim not in (1, 2) or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"segments: {name} has shape {ids.shape} and dtype {ids.dtype}; expected "
            "integers [n] or [B, n], at least one. Number the segments, e.g. with "
            "np.unique(names, return_inverse=True)[1]."
        )
    return ids.reshape(-1, ids.shape[-1]).astype(np.int64)


def window_spans(
    xp: Any, t: Array, num_atoms: Array, queries: int, keys: int
) -> tuple[Array, Array]:
    """First key, and the one after the last, of atoms t in AlphaFold 3's windows.

    Both are 0 for atoms that do not exist. Computed in ``xp``: NumPy or `jax.numpy`.
    """
    start = t // queries * queries + (queries - keys) // 2
    start = xp.clip(start, 0, xp.maximum(num_atoms - keys, 0))
    exists = t < num_atoms
    stop = xp.where(exists, xp.minimum(start + keys, num_atoms), 0)
    return xp.where(exists, start, 0), stop
