"""The host form of a pattern: sorted block pairs, and their way into block lists.

A `Part` is one pattern (one batch entry, one head). Builders and the operations of
`BlockMask` work on parts; `block_lists` turns a grid of them into the padded arrays
that a `BlockMask` holds. NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

WORD = 32  # keys per word of an element bit mask
_CHUNK = 1 << 24  # elements unpacked at a time

Grid = Sequence[Sequence["Part"]]  # [batch][head]


class Sizes(NamedTuple):
    """Static sizes of a mask."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int

    @property
    def grid(self) -> tuple[int, int]:
        """Number of query blocks and key blocks."""
        return -(-self.q_len // self.block_q), -(-self.kv_len // self.block_kv)

    @property
    def words(self) -> int:
        """Words that hold one row of a block's bits."""
        return -(-self.block_kv // WORD)


class Part(NamedTuple):
    """One pattern: block pairs sorted by (row, col), each at most once.

    ``rows``, ``cols`` are ``[n]`` int32, ``full`` is ``[n]`` bool, and ``words`` is
    ``[n, block_q, ceil(block_kv / 32)]`` uint32, or None where every bit is set.
    """

    rows: np.ndarray
    cols: np.ndarray
    full: np.ndarray
    words: Any = None

    def take(self, index: np.ndarray) -> Part:
        words = None if self.words is None else self.words[index]
        return Part(self.rows[index], self.cols[index], self.full[index], words)

    def with_words(self, sizes: Sizes) -> Part:
        """The same part with its bits written out."""
        if self.words is not None:
            return self
        shape = (len(self.rows), sizes.block_q, sizes.words)
        return self._replace(words=np.full(shape, 0xFFFFFFFF, np.uint32))


def join(parts: Sequence[Part]) -> Part:
    """Puts parts one after another; all or none of them have words."""
    words = [p.words for p in parts if p.words is not None]
    return Part(
        np.concatenate([p.rows for p in parts]),
        np.concatenate([p.cols for p in parts]),
        np.concatenate([p.full for p in parts]),
        np.concatenate(words) if words else None,
    )


def unique(part: Part, num_kv_blocks: int) -> Part:
    """Sorts the pairs; of duplicates, the union: full wins and bits are or-ed."""
    code = part.rows.astype(np.int64) * num_kv_blocks + part.cols
    if np.all(code[1:] > code[:-1]):
        return part
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    full = np.logical_or.reduceat(part.full[order], starts)
    words = part.words
    if words is not None:
        words = np.bitwise_or.reduceat(words[order], starts)
    first = order[starts]
    return Part(part.rows[first], part.cols[first], full, words)


def whole_blocks(rows: np.ndarray, cols: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Which pairs have all their ``block_q * block_kv`` elements inside T x S."""
    inside_q = (rows + 1) * sizes.block_q <= sizes.q_len
    return inside_q & ((cols + 1) * sizes.block_kv <= sizes.kv_len)


def pack(elements: np.ndarray) -> np.ndarray:
    """Packs ``[..., block_kv]`` bool into ``[..., words]`` uint32, lowest bit first."""
    width = -(-elements.shape[-1] // WORD) * WORD
    if width != elements.shape[-1]:
        pad = [(0, 0)] * (elements.ndim - 1) + [(0, width - elements.shape[-1])]
        elements = np.pad(elements, pad)
    packed = np.packbits(elements, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4")


def unpack(words: np.ndarray, block_kv: int) -> np.ndarray:
    """Inverse of `pack`: ``[..., words]`` uint32 to ``[..., block_kv]`` bool."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(packed, axis=-1, count=block_kv, bitorder="little").astype(
        bool
    )


def chunks(count: int, elements: int) -> Iterator[slice]:
    """Slices over ``count`` blocks of ``elements`` elements that bound the memory."""
    step = max(1, _CHUNK // elements)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def fold(flat: Sequence[Part], shape: tuple[int, ...]) -> Grid:
    """Arranges parts, listed batch-major, as ``[batch][head]``."""
    heads = shape[1]
    return [flat[b * heads : (b + 1) * heads] for b in range(shape[0])]


def block_lists(grid: Grid, sizes: Sizes) -> dict[str, np.ndarray | None]:
    """The list and bit arrays of a `BlockMask` from ``[batch][head]`` parts."""
    nq, nk = sizes.grid
    out: dict[str, np.ndarray | None] = {"bits": _stack_bits(grid, sizes)}
    for prefix, by_column, full, n in (
        ("kv", False, False, nq),
        ("full_kv", False, True, nq),
        ("q", True, False, nk),
        ("full_q", True, True, nk),
    ):
        lists = []
        for part in (p for row in grid for p in row):
            keep = part.full == full
            major, minor = part.rows[keep], part.cols[keep]
            if by_column:
                flip = np.lexsort((major, minor))
                major, minor = minor[flip], major[flip]
            lists.append((major, minor))
        shape = (len(grid), len(grid[0]))
        counts, indices = _pad_lists(lists, n)
        out[f"{prefix}_num_blocks"] = counts.reshape(*shape, n)
        out[f"{prefix}_indices"] = indices.reshape(*shape, n, -1)
    return out


def _pad_lists(
    lists: list[tuple[np.ndarray, np.ndarray]], n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts ``[p, n]`` and indices ``[p, n, capacity]`` of sorted pairs."""
    counts = np.stack([np.bincount(major, minlength=n) for major, _ in lists])
    indices = np.zeros((len(lists), n, int(counts.max(initial=0))), np.int32)
    for p, (major, minor) in enumerate(lists):
        first = np.cumsum(counts[p]) - counts[p]
        indices[p, major, np.arange(len(major)) - first[major]] = minor
    return counts.astype(np.int32), indices


def _stack_bits(grid: Grid, sizes: Sizes) -> np.ndarray | None:
    """Bits of the partial blocks, one pool per batch entry, heads outermost."""
    if grid[0][0].words is None:
        return None
    pools = [
        np.concatenate([p.words[~p.full] for p in row if p.words is not None])
        for row in grid
    ]
    size = max(len(p) for p in pools)
    out = np.zeros((len(pools), size, sizes.block_q, sizes.words), np.uint32)
    for b, pool in enumerate(pools):
        out[b, : len(pool)] = pool
    return out
