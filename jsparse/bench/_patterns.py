"""Patterns of the named cases: mostly the active key blocks of each query block.

Every list is made of fixed seeds in a fixed order of draws, so that a case means the
same blocks on every machine and in every peer's script. Blocks are 128 x 128.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
from scipy.spatial import KDTree

BLOCK = 128

_ATOM_DENSITY = 0.04  # heavy atoms per cubic ångström in a ribosome's neighbourhoods

Columns = list[np.ndarray]
"""For each query block its key blocks, ascending."""


def random_tiles(rows: int, tiles: int, seed: int = 0) -> Columns:
    """``tiles`` blocks over ``rows x rows``, spread evenly over the rows.

    Example:
        >>> [len(columns) for columns in random_tiles(3, 4)]
        [1, 1, 2]
    """
    rng = np.random.default_rng(seed)
    ends = [(row * tiles) // rows for row in range(rows + 1)]
    sizes = np.diff(ends).tolist()
    return [np.sort(rng.choice(rows, size, replace=False)) for size in sizes]


def uniform(rows: int, per_row: int, seed: int = 0) -> Columns:
    """``per_row`` random blocks in every row.

    Example:
        >>> [len(columns) for columns in uniform(3, 2)]
        [2, 2, 2]
    """
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(rows, per_row, replace=False)) for _ in range(rows)]


def band_and_random(rows: int, band: int, extra: int, seed: int = 0) -> Columns:
    """A band of ``band`` blocks on each side and about ``extra`` far ones.

    What a neighbourhood graph looks like along a space-filling curve.

    Example:
        >>> all(row in columns for row, columns in enumerate(band_and_random(8, 1, 2)))
        True
    """
    rng = np.random.default_rng(seed)
    out = []
    for row in range(rows):
        near = np.arange(max(0, row - band), min(rows, row + band + 1))
        # The number is drawn before the blocks: the order decides the lists.
        count = rng.integers(extra // 2, extra + extra // 2 + 1)
        out.append(np.union1d(near, rng.choice(rows, count, replace=False)))
    return out


def band_at_density(rows: int, percent: int, seed: int = 0) -> Columns:
    """About ``percent`` of all blocks: in each row half in a band, half far ones.

    Example:
        >>> sum(len(columns) for columns in band_at_density(128, 5))
        819
        >>> [len(columns) for columns in band_at_density(3, 100)]
        [3, 3, 3]
    """
    rng = np.random.default_rng(seed)
    ends = [row * rows * percent // 100 for row in range(rows + 1)]
    out = []
    for row, count in enumerate(np.diff(ends).tolist()):
        nearest_first = np.argsort(np.abs(np.arange(rows) - row), kind="stable")
        near = -(-count // 2)
        far = rng.choice(nearest_first[near:], count - near, replace=False)
        out.append(np.sort(np.concatenate([nearest_first[:near], far])))
    return out


def diagonal(rows: int) -> Columns:
    """Only the diagonal.

    Example:
        >>> [columns.tolist() for columns in diagonal(2)]
        [[0], [1]]
    """
    return [np.array([row]) for row in range(rows)]


def ribosome() -> Columns:
    """The 100,000 atoms of 6ZU5 nearest its centre, file order, 10 Å.

    Rows are uneven: 24.5 blocks on the mean, 321 at most (the ions of the RNA chains).

    Example:
        >>> columns = ribosome()
        >>> len(columns), max(len(row) for row in columns)
        (782, 321)
    """
    file = resources.files("jsparse.bench") / "data" / "ribosome100k_128.npz"
    with file.open("rb") as handle, np.load(handle) as lists:
        count, index = lists["cnt"], lists["idx"].astype(np.int64)
    return [row[:n] for row, n in zip(index, count, strict=True)]


def ball(count: int) -> np.ndarray:
    """``count`` points, uniform in a ball as dense as a large complex; ångström.

    Example:
        >>> ball(1000).shape
        (1000, 3)
    """
    rng = np.random.default_rng(0)
    radius = (3 * count / (4 * np.pi * _ATOM_DENSITY)) ** (1 / 3)
    directions = rng.standard_normal((count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = radius * rng.random((count, 1)) ** (1 / 3)
    return (directions * lengths).astype(np.float32)


def nearest(points: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` nearest of each point, itself among them, ``[N, count]`` int32.

    Example:
        >>> nearest(np.array([[0.0, 0, 0], [3, 0, 0], [4, 0, 0]]), 2).tolist()
        [[0, 1], [1, 2], [2, 1]]
    """
    _, index = KDTree(points).query(points, count)
    return np.asarray(index, np.int32)
