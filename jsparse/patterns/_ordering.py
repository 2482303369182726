"""Which order of the atoms makes the fewest blocks.

A block is a run of consecutive atoms, so the order decides how many blocks of a
radius pattern are computed. Files list atoms chain by chain, which is already
local; ions and ligands at the end of a chain are not. `order` counts the blocks
of several orders and keeps the best. NumPy and SciPy on the host; called by users
and by the command line before they build a pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._neighbors import active_blocks, check_block, check_coords, check_cutoff

_BITS = 20  # of each coordinate in a Hilbert key: a millionth of the extent


@dataclass(frozen=True)
class OrderingReport:
    """What a radius pattern costs in one order of the atoms.

    Attributes:
        name: the order: `"file"`, `"hilbert"` or `"bisection"`.
        blocks: number of active blocks.
        elements: computed elements, `blocks * block_q * block_kv`.
        density: active blocks / all blocks.
        mean_per_row: mean active key blocks of a query block.
        max_per_row: most active key blocks of a query block.
        unevenness: `max_per_row / mean_per_row`; 1 means even work.
    """

    name: str
    blocks: int
    elements: int
    density: float
    mean_per_row: float
    max_per_row: int
    unevenness: float


@dataclass(frozen=True, eq=False)
class Ordering:
    """A permutation of atoms, and what each order that was tried would cost.

    Attributes:
        permutation: int32 `[N]`; new position `p` holds atom `permutation[p]`.
        inverse: int32 `[N]`; atom `a` is at new position `inverse[a]`.
        method: the order of `permutation`: `"file"`, `"hilbert"` or `"bisection"`.
        candidates: a report for each order that was counted.

    Example:
        >>> x = np.random.default_rng(0).uniform(0, 50, (300, 3))
        >>> ordering = order(x, 10.0, block_q=16, block_kv=16)
        >>> sorted_x = ordering.apply(x)
        >>> bool((ordering.undo(sorted_x) == x).all())
        True
    """

    permutation: np.ndarray
    inverse: np.ndarray
    method: str
    candidates: tuple[OrderingReport, ...]

    def __len__(self) -> int:
        return len(self.permutation)

    @property
    def report(self) -> OrderingReport:
        """The report of the order that was chosen."""
        return next(c for c in self.candidates if c.name == self.method)

    def apply(self, x: Any, axis: int = 0) -> Any:
        """Put the atoms along `axis` of an array into the new order.

        Args:
            x: NumPy or JAX array with `N` entries along `axis`.
            axis: the axis of the atoms.

        Returns:
            An array of the same kind, shape and dtype.

        Raises:
            ValueError: there is no such axis, or it does not have `N` entries.

        Example:
            >>> reverse = np.array([2, 1, 0], np.int32)
            >>> Ordering(reverse, reverse, "file", ()).apply(np.array([5, 6, 7]))
            array([7, 6, 5])
        """
        return self._take("apply", x, self.permutation, axis)

    def undo(self, x: Any, axis: int = 0) -> Any:
        """Put an array in the new order back: `undo(apply(x))` is `x`.

        Args:
            x: NumPy or JAX array with `N` entries along `axis`, e.g. an output of
                attention.
            axis: the axis of the atoms.

        Returns:
            An array of the same kind, shape and dtype.

        Raises:
            ValueError: there is no such axis, or it does not have `N` entries.

        Example:
            >>> ordering = order([[9, 0, 0], [0, 0, 0]], method="hilbert")
            >>> ordering.undo(ordering.apply(np.array([5, 6])))
            array([5, 6])
        """
        return self._take("undo", x, self.inverse, axis)

    def table(self) -> list[dict[str, Any]]:
        """The reports as rows to print, the chosen one marked.

        Returns:
            One dict per candidate: `order`, `chosen`, `blocks`, `elements`,
            `density`, `mean_per_row`, `max_per_row`, `unevenness`.

        Example:
            >>> rows = order([[0, 0, 0]]).table()
            >>> rows[0]["order"], rows[0]["chosen"], rows[0]["blocks"]
            ('file', True, 1)
        """
        return [
            {
                "order": c.name,
                "chosen": c.name == self.method,
                "blocks": c.blocks,
                "elements": c.elements,
                "density": c.density,
                "mean_per_row": c.mean_per_row,
                "max_per_row": c.max_per_row,
                "unevenness": c.unevenness,
            }
            for c in self.candidates
        ]

    def _take(self, name: str, x: Any, index: np.ndarray, axis: int) -> Any:
        array = x if hasattr(x, "take") and hasattr(x, "shape") else np.asarray(x)
        if not -array.ndim <= axis < array.ndim or array.shape[axis] != len(index):
            raise ValueError(
                f"Ordering.{name}: x has shape {tuple(array.shape)}; expected "
                f"{len(index)} atoms along axis {axis}. Name the axis of the atoms, "
                "e.g. axis=0, and pass an array of the structure that was ordered."
            )
        return array.take(index, axis=axis)


def order(
    coords: Any,
    cutoff: float = 10.0,
    *,
    block_q: int = 128,
    block_kv: int = 128,
    method: str = "auto",
) -> Ordering:
    """Find the order of atoms whose radius pattern computes the fewest elements.

    `"file"` keeps the order given. `"hilbert"` follows a 3-D Hilbert curve.
    `"bisection"` halves the atoms again and again across the longest side of their
    box, at multiples of the block, so that each block fills a compact box.
    `"auto"` counts the active blocks of all three and takes the fewest; of equals
    the one with the most even rows, then the first in this list. It is therefore
    never worse than file order. Equal coordinates keep their order.

    Args:
        coords: `[N, 3]`, ångström.
        cutoff: distance of the radius pattern, ångström.
        block_q: atoms per query block.
        block_kv: atoms per key block.
        method: `"auto"`, `"file"`, `"hilbert"` or `"bisection"`.

    Returns:
        The permutation with a report of every order counted: all for `"auto"`,
        else the one asked for.

    Raises:
        TypeError: an argument is not a number, or traced.
        ValueError: unknown method, or bad coordinates, cut-off or block size.

    Example:
        >>> x = np.random.default_rng(0).uniform(0, 60, (1000, 3))
        >>> ordering = order(x, 10.0, block_q=32, block_kv=32)
        >>> ordering.method
        'bisection'
        >>> [c.blocks for c in ordering.candidates]  # file, Hilbert, bisection
        [1024, 360, 298]

    References:
        J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707, 381
        (2004). M. J. Berger and S. H. Bokhari, "A partitioning strategy for
        nonuniform problems on multiprocessors", IEEE Trans. Comput. C-36, 570
        (1987), for recursive coordinate bisection.
    """
    if method != "auto" and method not in _METHODS:
        raise ValueError(
            f"order: method is {method!r}; expected 'auto' or one of "
            f"{', '.join(map(repr, _METHODS))}."
        )
    points = check_coords("order: coords", coords)
    cutoff = check_cutoff("order: cutoff", cutoff)
    block_q = check_block("order: block_q", block_q)
    block_kv = check_block("order: block_kv", block_kv)
    names = tuple(_METHODS) if method == "auto" else (method,)
    found: dict[str, np.ndarray] = {}
    reports = []
    for name in names:
        found[name] = _METHODS[name](points, block_q, block_kv).astype(np.int32)
        placed = points[found[name]]
        reports.append(_report(name, placed, cutoff, block_q, block_kv))
    best = min(reports, key=lambda r: (r.elements, r.max_per_row))
    permutation = found[best.name]
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=np.int32)
    return Ordering(permutation, inverse, best.name, tuple(reports))


def _report(
    name: str, points: np.ndarray, cutoff: float, block_q: int, block_kv: int
) -> OrderingReport:
    rows, _, _ = active_blocks(points, points, cutoff, block_q, block_kv)
    count_q, count_kv = -(-len(points) // block_q), -(-len(points) // block_kv)
    blocks = len(rows)
    mean, most = blocks / count_q, int(np.bincount(rows).max())
    return OrderingReport(
        name=name,
        blocks=blocks,
        elements=blocks * block_q * block_kv,
        density=blocks / (count_q * count_kv),
        mean_per_row=mean,
        max_per_row=most,
        unevenness=most / mean,
    )


def _file(coords: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    return np.arange(len(coords))


def _hilbert(coords: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """Order of the cells of a cubic grid along the curve; one scale for all axes."""
    low = coords.min(axis=0).astype(np.float64)
    extent = float((coords.max(axis=0) - low).max())
    cells = np.zeros((3, len(coords)), np.uint64)
    if extent > 0:
        scaled = (coords - low).T * ((2**_BITS - 1) / extent)
        cells = scaled.astype(np.uint64)
    return np.argsort(_hilbert_keys(cells, _BITS), kind="stable")


def _hilbert_keys(cells: np.ndarray, bits: int) -> np.ndarray:
    """Positions along the curve of cells uint64 `[3, N]` below `2**bits`.

    Skilling's transform of axes to the transposed key, all points at once.
    """
    x = [axis.copy() for axis in cells]
    for bit in range(bits - 1, 0, -1):
        below = np.uint64((1 << bit) - 1)
        for axis in range(3):
            is_set = (x[axis] >> np.uint64(bit)) & np.uint64(1) == 1
            swap = np.where(is_set, 0, (x[0] ^ x[axis]) & below)
            x[0] ^= np.where(is_set, below, swap)
            x[axis] ^= swap
    x[1] ^= x[0]
    x[2] ^= x[1]
    flip = np.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        is_set = (x[2] >> np.uint64(bit)) & np.uint64(1) == 1
        flip ^= np.where(is_set, np.uint64((1 << bit) - 1), np.uint64(0))
    keys = np.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for axis in x:
            keys = (keys << np.uint64(1)) | (
                ((axis ^ flip) >> np.uint64(bit)) & np.uint64(1)
            )
    return keys


def _bisection(coords: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """Halve across the longest side until a segment fits the smaller block.

    Cuts fall on multiples of the larger block, then of the smaller where it
    divides the larger, so segments and blocks coincide. Inside a segment atoms
    keep their order.
    """
    large, small = max(block_q, block_kv), min(block_q, block_kv)
    units = (large, small) if large % small == 0 else (large,)
    pending = [np.arange(len(coords))]
    done = []
    while pending:
        segment = pending.pop()
        unit = next((u for u in units if len(segment) > u), None)
        if unit is None:
            done.append(segment)
            continue
        left = (-(-len(segment) // unit) + 1) // 2 * unit
        points = coords[segment]
        axis = int(np.argmax(points.max(axis=0) - points.min(axis=0)))
        first = _smallest(points[:, axis], left)
        pending += [segment[~first], segment[first]]
    return np.concatenate(done)


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` smallest values; of equals, those that come first."""
    threshold = np.partition(values, count - 1)[count - 1]
    chosen = values < threshold
    ties = np.flatnonzero(values == threshold)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


_METHODS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "file": _file,
    "hilbert": _hilbert,
    "bisection": _bisection,
}
