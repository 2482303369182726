"""Bits of patterns whose elements are listed or looked up, not computed by a rule.

A strip is a run of query blocks: its active blocks ``rows [n]``, ``cols [n]`` and their
packed ``words [n, block_q, W]``. Builders make one strip at a time, in ascending order,
and never hold the elements of all blocks. The builders call it; NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from jsparse.patterns._block_mask import BlockMask, from_parts
from jsparse.patterns._parts import Part, Sizes, fold, pack, whole_blocks

Strip = tuple[np.ndarray, np.ndarray, np.ndarray]

_CHUNK = 1 << 24  # elements of a strip if all its blocks are active


def bit_mask(strips: Iterable[Iterable[Strip]], heads: int, sizes: Sizes) -> BlockMask:
    """A mask from the strips of each pattern, patterns listed batch-major."""
    parts = [_settle(s, sizes) for s in strips]
    if any(p.words is not None for p in parts):
        parts = [p.with_words(sizes) for p in parts]
    return from_parts(fold(parts, (len(parts) // heads, heads)), sizes)


def strip_rows(sizes: Sizes) -> int:
    """Query blocks in one strip, so that its elements fit in bounded memory."""
    return max(1, _CHUNK // (sizes.block_q * sizes.block_kv * sizes.grid[1]))


def dense_strips(mask: np.ndarray, sizes: Sizes) -> Iterator[Strip]:
    """Strips of a bool matrix ``[T, S]``."""
    block_q, block_kv = sizes.block_q, sizes.block_kv
    step = strip_rows(sizes)
    for first in range(0, sizes.grid[0], step):
        given = mask[first * block_q : (first + step) * block_q]
        count = -(-len(given) // block_q)
        tiles = np.zeros((count, block_q, sizes.grid[1], block_kv), bool)
        tiles.reshape(count * block_q, -1)[: len(given), : sizes.kv_len] = given
        rows, cols = np.nonzero(tiles.any(1).any(-1))
        yield rows + first, cols, pack(tiles[rows, :, cols])


def pair_strips(q: np.ndarray, kv: np.ndarray, sizes: Sizes) -> Iterator[Strip]:
    """Strips of the elements ``(q[n], kv[n])``, in any order, duplicates allowed."""
    if np.any(q[1:] < q[:-1]):
        order = np.argsort(q, kind="stable")
        q, kv = q[order], kv[order]
    step = strip_rows(sizes)
    firsts = np.arange(0, sizes.grid[0], step)
    edges = np.searchsorted(q, np.append(firsts * sizes.block_q, sizes.q_len))
    for first, a, b in zip(firsts.tolist(), edges[:-1], edges[1:], strict=True):
        yield element_strip(first, step, q[a:b], kv[a:b], sizes)


def element_strip(
    first: int, count: int, q: np.ndarray, kv: np.ndarray, sizes: Sizes
) -> Strip:
    """The strip of ``count`` query blocks from ``first`` with the given elements."""
    block_q, block_kv, nk = sizes.block_q, sizes.block_kv, sizes.grid[1]
    row, t = np.divmod(q - first * block_q, block_q)
    col, s = np.divmod(kv, block_kv)
    code = row.astype(np.int64) * nk + col
    active = np.zeros(count * nk, bool)
    active[code] = True
    slot = np.cumsum(active) - 1
    tiles = np.zeros((int(slot[-1]) + 1, block_q, block_kv), bool)
    tiles.reshape(-1)[(slot[code] * block_q + t) * block_kv + s] = True
    rows, cols = np.divmod(np.flatnonzero(active), nk)
    return rows + first, cols, pack(tiles)


def _settle(strips: Iterable[Strip], sizes: Sizes) -> Part:
    """One part; it has words only if a block forbids an element inside T x S."""
    nq, nk = sizes.grid
    inside_q = (np.arange(nq * sizes.block_q) < sizes.q_len).reshape(nq, -1, 1)
    inside_kv = (np.arange(nk * sizes.block_kv) < sizes.kv_len).reshape(nk, 1, -1)
    inside_kv = pack(inside_kv)
    found = []
    for rows, cols, words in strips:
        # One strip at a time: the comparison needs an array as large as the words.
        every = np.where(inside_q[rows], inside_kv[cols], np.uint32(0))
        allowed = (words == every).all((1, 2))
        found.append((rows.astype(np.int32), cols.astype(np.int32), allowed, words))
    rows, cols, allowed, words = (np.concatenate(x) for x in zip(*found, strict=True))
    full = allowed & whole_blocks(rows, cols, sizes)
    return Part(rows, cols, full, None if allowed.all() else words)
