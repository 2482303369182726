"""Which blocks of points come close, and which points are nearest.

Pure NumPy and SciPy on the host; knows nothing of masks. The structure builders
(`radius`, `knn`) and `order` call it. Coordinates are rounded to float32 first,
because that is what the element test of a kernel sees; every decision below is
taken on those rounded values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from ._arguments import NO_REAL, as_numpy, number, refuse_traced

MAX_CUTOFF = 1e4
"""Largest distance accepted, in ångström: wider than any structure."""

MAX_PAIRS = 2**28
"""Most active block pairs returned; as arrays they take 2.4 GB."""

# Float32 rounds the element test dx*dx + dy*dy + dz*dz <= cutoff*cutoff, and the
# tests below, by less than 5e-7 of the distance each, with or without fused
# multiply-adds. Four times that separates "may pass" from "cannot pass". The
# absolute part covers squares that underflow when the cut-off itself is tiny.
_RELATIVE_MARGIN = 2e-6
_ABSOLUTE_MARGIN = 1e-5

_PART = 8  # points of one part of a block
_SLAB = 16  # boxes handled together; also how many share one outer box
_CHUNK = 2**17  # float32 elements of one temporary: stays in the L2 cache
_MARKS = 2**28  # bytes: one for each block pair of a band of rows
_QUERIES = 2**21  # neighbours asked for at once


def check_coords(name: str, coords: Any) -> np.ndarray:
    """Coordinates as a contiguous float32 array, or a clear error.

    Args:
        name: how messages call the argument, e.g. `"radius: coords"`.
        coords: `[N, 3]`, N >= 1, finite, in ångström; anything NumPy can read.

    Returns:
        float32 `[N, 3]`.

    Raises:
        TypeError: the values are not real numbers, or traced.
        ValueError: the shape is wrong, there is no point, or a value is not
            finite in float32.

    Example:
        >>> check_coords("radius: coords", [[0, 1, 2]])
        array([[0., 1., 2.]], dtype=float32)
    """
    rows = "[N, 3] in ångström. Give every atom exactly three numbers."
    given = as_numpy(name, coords, rows)
    if given.ndim != 2 or given.shape[1] != 3:
        raise ValueError(
            f"{name} has shape {given.shape}; expected [N, 3] in ångström. Pass "
            "Cartesian coordinates, e.g. structure.coords."
        )
    if len(given) == 0:
        raise ValueError(
            f"{name} has shape {given.shape}: no atom; expected at least one. Drop "
            "empty chains or groups before building a pattern."
        )
    try:
        if given.dtype.kind in NO_REAL:
            raise TypeError(f"{given.dtype} has no real value in ångström")
        with np.errstate(over="ignore"):
            out = np.ascontiguousarray(given, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} has dtype {given.dtype}, which cannot be read as float32 "
            f"({error}); expected real numbers in ångström. Convert it first."
        ) from error
    bad = ~np.isfinite(out).all(axis=1)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{name} is not finite (in float32) at atom {first}: "
            f"{given[first].tolist()}, and at {int(bad.sum()) - 1} other atoms; "
            "expected finite ångström values. Drop atoms without a position."
        )
    return out


def check_cutoff(name: str, cutoff: Any) -> float:
    """A distance in ångström as a float, or a clear error.

    Args:
        name: how messages call the argument, e.g. `"radius: cutoff"`.
        cutoff: number with 0 < cutoff <= `MAX_CUTOFF`.

    Returns:
        The distance in ångström.

    Raises:
        TypeError: not a number, or traced.
        ValueError: not finite, not positive, or beyond `MAX_CUTOFF`.

    Example:
        >>> check_cutoff("radius: cutoff", 10)
        10.0
    """
    refuse_traced(name, cutoff)
    try:
        value = number(cutoff)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} is {cutoff!r}; expected one distance in ångström, e.g. 10.0."
        ) from error
    if not 0 < value <= MAX_CUTOFF:
        raise ValueError(
            f"{name} is {value}; expected ångström with 0 < cutoff <= "
            f"{MAX_CUTOFF:g}. Neighbourhoods of atoms are usually 5 to 20 Å."
        )
    return value


def check_block(name: str, block: Any) -> int:
    """A block size as an int >= 1, or a clear error.

    Args:
        name: how messages call the argument, e.g. `"radius: block_q"`.
        block: whole number of points.

    Returns:
        The block size.

    Raises:
        TypeError: not a whole number, or traced.
        ValueError: less than one.

    Example:
        >>> check_block("radius: block_q", 128)
        128
    """
    refuse_traced(name, block)
    try:
        if isinstance(block, bool):
            raise TypeError("a bool is no size")
        value = operator.index(block)
    except TypeError as error:
        raise TypeError(
            f"{name} is {block!r}; expected a whole number of points, e.g. 128."
        ) from error
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1, e.g. 128.")
    return value


def active_blocks(
    q_coords: Any, kv_coords: Any, cutoff: float, block_q: int, block_kv: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of blocks that hold at least one pair of points within the cut-off.

    Blocks are consecutive runs of `block_q` or `block_kv` points; the last may be
    short. A pair of blocks is listed when its closest pair of points lies within
    `cutoff * (1 + 2e-6) + 1e-5`, so none that a float32 element test
    `dx*dx + dy*dy + dz*dz <= cutoff*cutoff` needs is ever missing. It is `full`
    when the farthest corners of the bounding boxes lie within
    `cutoff * (1 - 2e-6) - 1e-5` and neither block is short, so that every element
    passes that test; a block may pass it everywhere and yet not be called full.

    Time grows with the number of points and of close pairs, not with the
    square, in any order of the points. Beside the result, memory stays below
    about 0.5 GB for a million points.

    Args:
        q_coords: `[T, 3]` query points, ångström. The same object as `kv_coords`
            is prepared once.
        kv_coords: `[S, 3]` key points, ångström.
        cutoff: distance in ångström.
        block_q: points per query block.
        block_kv: points per key block.

    Returns:
        `rows` int32 `[n]`, `cols` int32 `[n]`, `full` bool `[n]`, sorted by row,
        then column.

    Raises:
        TypeError: an argument is not a number.
        ValueError: bad coordinates, cut-off or block size, or more than
            `MAX_PAIRS` active pairs.

    Example:
        >>> x = np.array([[0, 0, 0], [1, 0, 0], [8, 0, 0], [30, 0, 0]])
        >>> rows, cols, full = active_blocks(x, x, 10.0, 2, 2)
        >>> list(zip(rows.tolist(), cols.tolist(), full.tolist()))
        [(0, 0, True), (0, 1, False), (1, 0, False), (1, 1, False)]
    """
    cutoff = check_cutoff("cutoff", cutoff)
    block_q = check_block("block_q", block_q)
    block_kv = check_block("block_kv", block_kv)
    x = check_coords("q_coords", q_coords)
    y = x if kv_coords is q_coords else check_coords("kv_coords", kv_coords)
    with np.errstate(over="ignore"):
        q = _split(x, block_q)
        kv = q if y is x and block_q == block_kv else _split(y, block_kv)
        reach = _squared(cutoff * (1 + _RELATIVE_MARGIN) + _ABSOLUTE_MARGIN)
        inside = _squared(cutoff * (1 - _RELATIVE_MARGIN) - _ABSOLUTE_MARGIN)
        if _is_scattered(x, y, q, kv, reach):
            chunks = _pairs_by_point(x, y, block_q, block_kv, reach)
        else:
            chunks = _pairs_by_block(q, kv, reach, inside)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        total = 0
        for rows, cols in chunks:
            total += len(rows)
            if total > MAX_PAIRS:
                raise ValueError(
                    f"cutoff {cutoff:g} Å makes more than {MAX_PAIRS} active block "
                    f"pairs of {block_q} x {block_kv} among {len(x)} x {len(y)} "
                    "points; expected a sparse pattern. Use a smaller cut-off or "
                    "larger blocks."
                )
            full = q.whole[rows] & kv.whole[cols]
            full &= _farthest(q, kv, rows, cols) <= inside
            found.append((rows.astype(np.int32), cols.astype(np.int32), full))
    rows, cols, full = (np.concatenate(part) for part in zip(*found, strict=True))
    return rows, cols, full


def nearest(q_coords: Any, kv_coords: Any, k: int) -> np.ndarray:
    """Indices of the k key points nearest to each query point, nearest first.

    Equal distances are ordered by index, also at the k-th place, so the result
    does not depend on how the tree was built. A query that is itself among the
    keys finds itself at distance 0.

    Args:
        q_coords: `[T, 3]` query points, ångström.
        kv_coords: `[S, 3]` key points, ångström.
        k: how many, 1 <= k <= S.

    Returns:
        int32 `[T, k]`.

    Raises:
        TypeError: k is not a whole number, or coordinates are not numbers.
        ValueError: k is out of range, or coordinates are bad.

    Example:
        >>> x = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [5, 0, 0]])
        >>> nearest(x, x, 2).tolist()
        [[0, 1], [1, 0], [2, 1], [3, 2]]
    """
    x = check_coords("q_coords", q_coords).astype(np.float64)
    same = kv_coords is q_coords
    y = x if same else check_coords("kv_coords", kv_coords).astype(np.float64)
    k = check_block("k", k)
    if k > len(y):
        raise ValueError(
            f"k is {k}, but there are only {len(y)} key points; expected 1 <= k <= "
            f"{len(y)}. Use a smaller k, or a mask of all blocks."
        )
    tree = KDTree(y)
    out = np.empty((len(x), k), np.int32)
    step = max(1, _QUERIES // (k + 1))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        asked = min(k + 1, len(y))
        answer = tree.query(part, k=asked, workers=-1)
        far, index = (np.asarray(a).reshape(len(part), asked) for a in answer)
        gap = part[:, None] - y[index[:, :k]]
        place = np.lexsort((index[:, :k], np.square(gap).sum(axis=-1)), axis=1)
        out[start : start + step] = np.take_along_axis(index, place, axis=1)
        if asked > k:
            tied = np.flatnonzero(far[:, k] <= far[:, k - 1] * (1 + 1e-12))
            out[start + tied] = _nearest_of_tied(tree, part[tied], far[tied, k - 1], k)
    return out


def _nearest_of_tied(
    tree: KDTree, points: np.ndarray, far: np.ndarray, k: int
) -> np.ndarray:
    """The k nearest where the k-th place is shared: the tree keeps any of them.

    Points at one place have one answer, so many copies of a point cost one look-up.
    """
    out = np.empty((len(points), k), np.int32)
    if len(points) == 0:
        return out
    single, first, back = np.unique(
        points, axis=0, return_index=True, return_inverse=True
    )
    best = np.empty((len(single), k), np.int32)
    for row, (point, radius) in enumerate(zip(single, far[first], strict=True)):
        ball = tree.query_ball_point(point, radius * (1 + 1e-12))
        index = np.sort(np.asarray(ball, np.int64))
        gap = np.square(tree.data[index] - point).sum(axis=-1)
        best[row] = index[np.argsort(gap, kind="stable")[:k]]
    out[:] = best[back.reshape(-1)]
    return out


@dataclass(frozen=True)
class _Blocks:
    """Runs of points as `[3, blocks, parts, _PART]`, with their bounding boxes.

    Short blocks and parts repeat one of their own points, which changes neither
    the smallest nor the largest distance to anything.
    """

    points: np.ndarray  # [3, n, parts, _PART]
    part_low: np.ndarray  # [3, n, parts]
    part_high: np.ndarray
    middle: np.ndarray  # [3, n, parts]: the point nearest to the part's centre
    low: np.ndarray  # [3, n]
    high: np.ndarray
    whole: np.ndarray  # [n]: not short

    def __len__(self) -> int:
        return len(self.whole)


def _split(coords: np.ndarray, block: int) -> _Blocks:
    count = -(-len(coords) // block)
    parts = -(-block // _PART)
    inner = np.minimum(np.arange(parts * _PART), block - 1)
    index = np.minimum(np.arange(count)[:, None] * block + inner, len(coords) - 1)
    points = np.ascontiguousarray(coords.T)[:, index].reshape(3, count, parts, _PART)
    low, high = points.min(axis=-1), points.max(axis=-1)
    centre = low / 2 + high / 2
    nearest_point = np.square(points - centre[..., None]).sum(axis=0).argmin(axis=-1)
    middle = np.take_along_axis(points, nearest_point[None, ..., None], axis=-1)[..., 0]
    whole = (np.arange(count) + 1) * block <= len(coords)
    return _Blocks(
        points, low, high, middle, low.min(axis=-1), high.max(axis=-1), whole
    )


def _squared(distance: float) -> np.float32:
    """The square to compare with; -1, which nothing reaches, if negative."""
    return np.float32(distance * distance if distance > 0 else -1.0)


# The three measures below round each step as the distance of two points does, and
# rounding keeps order: a box is never farther, nor its far corner nearer, than the
# float32 distance of the points in it. Bounding boxes therefore lose nothing.


def _gap(
    a_low: np.ndarray, a_high: np.ndarray, b_low: np.ndarray, b_high: np.ndarray
) -> np.ndarray:
    """Squared distance between boxes; the arguments broadcast, axis 0 is xyz."""
    return _sum_of_squares(
        np.maximum(
            np.maximum(a_low[axis] - b_high[axis], b_low[axis] - a_high[axis]), 0
        )
        for axis in range(3)
    )


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distance between points; the arguments broadcast, axis 0 is xyz."""
    return _sum_of_squares(a[axis] - b[axis] for axis in range(3))


def _farthest(
    q: _Blocks, kv: _Blocks, rows: np.ndarray, cols: np.ndarray
) -> np.ndarray:
    """Squared distance between the farthest corners of the boxes of block pairs."""
    return _sum_of_squares(
        np.maximum(
            q.high[axis, rows] - kv.low[axis, cols],
            kv.high[axis, cols] - q.low[axis, rows],
        )
        for axis in range(3)
    )


def _sum_of_squares(sides: Iterator[np.ndarray]) -> np.ndarray:
    total = next(sides)
    total *= total
    for side in sides:
        side *= side
        total += side
    return total


def _candidates(
    q: _Blocks, kv: _Blocks, reach: np.float32, starts: range
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs whose boxes come within reach, for each slab of q boxes at `starts`."""
    edges = np.arange(0, len(kv), _SLAB)
    outer_low = np.minimum.reduceat(kv.low, edges, axis=1)
    outer_high = np.maximum.reduceat(kv.high, edges, axis=1)
    for start in starts:
        low, high = q.low[:, start : start + _SLAB], q.high[:, start : start + _SLAB]
        slab_low, slab_high = low.min(axis=1)[:, None], high.max(axis=1)[:, None]
        close = _gap(slab_low, slab_high, outer_low, outer_high) <= reach
        cols = (edges[close, None] + np.arange(_SLAB)).ravel()
        cols = cols[cols < len(kv)]
        gap = _gap(
            low[:, :, None],
            high[:, :, None],
            kv.low[:, None, cols],
            kv.high[:, None, cols],
        )
        row, place = np.nonzero(gap <= reach)
        yield row + start, cols[place]


def _is_scattered(
    x: np.ndarray, y: np.ndarray, q: _Blocks, kv: _Blocks, reach: np.float32
) -> bool:
    """Whether the blocks are so wide that their boxes say little.

    True for points in no spatial order. Weighs costs measured on one core: a pair
    of blocks whose boxes are close takes about 1 µs, and 4 µs more if it is 128 by
    128; by point, a point takes 5 µs and each of its neighbours 0.045 µs. Only
    speed depends on the answer.
    """
    if len(q) * len(kv) < 2**14:
        return False
    starts = range(0, len(q), _SLAB * max(1, len(q) // (_SLAB * 64)))
    seen = sum(len(rows) for rows, _ in _candidates(q, kv, reach, starts))
    area = q.points[0, 0].size * kv.points[0, 0].size
    blocks_cost = seen * -(-len(q) // _SLAB) / len(starts) * (1 + 4 * area / 2**14)
    if blocks_cost < 5 * len(x):
        return False
    some_x = x[:: max(1, len(x) // 256)]
    some_y = y[:: max(1, len(y) // 2**15)]
    hits = sum(int((_distance(point, some_y.T) <= reach).sum()) for point in some_x)
    neighbours = hits / len(some_x) * len(y) / len(some_y)
    return blocks_cost > len(x) * (5 + 0.045 * neighbours)


def _pairs_by_block(
    q: _Blocks, kv: _Blocks, reach: np.float32, inside: np.float32
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Active pairs, slab by slab: boxes first, points only where they must decide."""
    chunk = max(1, _CHUNK // (q.middle.shape[2] * kv.middle.shape[2]))
    for rows, cols in _candidates(q, kv, reach, range(0, len(q), _SLAB)):
        active = _farthest(q, kv, rows, cols) <= inside
        open_pairs = np.flatnonzero(~active)
        for start in range(0, len(open_pairs), chunk):
            some = open_pairs[start : start + chunk]
            active[some] = _any_close(q, kv, rows[some], cols[some], reach)
        yield rows[active], cols[active]


def _any_close(
    q: _Blocks, kv: _Blocks, rows: np.ndarray, cols: np.ndarray, reach: np.float32
) -> np.ndarray:
    """Whether any point of block `rows[p]` is within reach of block `cols[p]`."""
    # One point of each part proves most of the active pairs.
    middles = _distance(q.middle[:, rows][..., None], kv.middle[:, cols][:, :, None])
    close = (middles <= reach).any(axis=(1, 2))
    left = np.flatnonzero(~close)
    rows, cols = rows[left], cols[left]
    gap = _gap(
        q.part_low[:, rows][..., None],
        q.part_high[:, rows][..., None],
        kv.part_low[:, cols][:, :, None],
        kv.part_high[:, cols][:, :, None],
    )
    pair, q_part, kv_part = np.nonzero(gap <= reach)
    chunk = max(1, _CHUNK // _PART**2)
    for start in range(0, len(pair), chunk):
        some = slice(start, start + chunk)
        a = q.points[:, rows[pair[some]], q_part[some]]
        b = kv.points[:, cols[pair[some]], kv_part[some]]
        hit = (_distance(a[..., None], b[:, :, None]) <= reach).any(axis=(1, 2))
        close[left[pair[some][hit]]] = True
    return close


def _pairs_by_point(
    x: np.ndarray, y: np.ndarray, block_q: int, block_kv: int, reach: np.float32
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Active pairs for points in no spatial order: every close pair marks its blocks.

    The points are regrouped in space (the leaves of a k-d tree) and whole groups
    compared; the marks, one byte per block pair, are kept for some rows at a time.
    """
    size = 2 * _PART
    count_kv = -(-len(y) // block_kv)
    kv_order = KDTree(y, leafsize=size).indices
    kv = _split(y[kv_order], size)
    kv_block = _block_numbers(kv_order, block_kv, kv)
    step = max(1, _MARKS // count_kv) * block_q
    for start in range(0, len(x), step):
        part = x[start : start + step]
        q_order = KDTree(part, leafsize=size).indices
        q = _split(part[q_order], size)
        q_block = _block_numbers(q_order, block_q, q)
        marks = np.zeros((-(-len(part) // block_q), count_kv), bool)
        flat = marks.reshape(-1)
        for rows, cols in _candidates(q, kv, reach, range(0, len(q), _SLAB)):
            for first in range(0, len(rows), _CHUNK // size**2):
                some = slice(first, first + _CHUNK // size**2)
                a = q.points[:, rows[some]].reshape(3, -1, size, 1)
                b = kv.points[:, cols[some]].reshape(3, -1, 1, size)
                key = q_block[rows[some], :, None] * count_kv
                key = key + kv_block[cols[some], None, :]
                flat[key[_distance(a, b) <= reach]] = True
        for first in range(0, len(marks), _SLAB):
            row, col = np.nonzero(marks[first : first + _SLAB])
            yield row + first + start // block_q, col


def _block_numbers(order: np.ndarray, block: int, groups: _Blocks) -> np.ndarray:
    """Block of each point of each group, `[groups, 2 * _PART]`, padded alike."""
    size = 2 * _PART
    index = np.minimum(np.arange(len(groups) * size), len(order) - 1)
    return (order[index] // block).reshape(-1, size)
