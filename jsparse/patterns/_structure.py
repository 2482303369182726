"""Host builders of structure patterns: distances, neighbours, contacts, atom windows.

Coordinates are in ångström. A pattern is exact to the element: `radius` and
`atom_windows` compute their elements by a rule, the others store bits, made a few query
blocks at a time. NumPy and SciPy only; users and the command line call them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse

from jsparse.patterns._arguments import as_numpy, count
from jsparse.patterns._bits import (
    Strip,
    bit_mask,
    element_strip,
    pair_strips,
    strip_rows,
)
from jsparse.patterns._block_mask import BlockMask, check_sizes, from_parts
from jsparse.patterns._builders import from_dense, interval_mask, window_spans
from jsparse.patterns._neighbors import (
    active_blocks,
    check_coords,
    check_cutoff,
    nearest,
)
from jsparse.patterns._parts import Part, Sizes, pack
from jsparse.patterns._rules import Distance

Array = Any


def radius(
    coords: Array,
    cutoff: float,
    *,
    kv_coords: Array | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Each query sees the keys within a distance.

    ``|coords[t] - kv_coords[s]| <= cutoff``: an atom sees itself and every atom in the
    same place.

    Args:
        coords: ``[T, 3]`` positions of the queries, ångström; read as float32.
        cutoff: the distance, ångström, above 0.
        kv_coords: ``[S, 3]`` positions of the keys, ångström; ``coords`` if not given.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask with a `Distance` rule. Blocks that only just touch the cut-off may be
        listed although no element passes the rule in float32.

    Raises:
        TypeError: for coordinates or a cut-off that are not numbers, or traced.
        ValueError: for other shapes, no atoms, coordinates that are not finite, or a
            cut-off that is not above 0 or wider than any structure.

    Example:
        >>> line = [[0, 0, 0], [4, 0, 0], [8, 0, 0], [12, 0, 0]]
        >>> mask = radius(line, 5.0, block_q=2, block_kv=2)
        >>> mask.to_dense()[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """
    q, kv = _check_both("radius", coords, kv_coords)
    cutoff = check_cutoff("radius: cutoff", cutoff)
    sizes = check_sizes("radius", len(q), len(kv), block_q, block_kv)
    rows, cols, full = active_blocks(q, kv, cutoff, sizes.block_q, sizes.block_kv)
    rule = Distance(q[None], kv[None], np.full((1, 1), cutoff, np.float32))
    return from_parts([[Part(rows, cols, full)]], sizes, rules=(rule,))


def knn(
    coords: Array,
    k: int,
    *,
    kv_coords: Array | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Each query sees its ``k`` nearest keys; of equal distances, the lower indices.

    An atom is its own nearest neighbour and counts as one of the ``k``, unless ``k`` or
    more atoms with lower indices lie in the same place.

    Args:
        coords: ``[T, 3]`` positions of the queries, ångström; read as float32.
        k: number of keys, 1 to S.
        kv_coords: ``[S, 3]`` positions of the keys, ångström; ``coords`` if not given.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask with bits, or only full blocks where none is partial.

    Raises:
        TypeError: for coordinates that are not numbers, or what is traced.
        ValueError: for other shapes, no atoms, coordinates that are not finite, or a
            ``k`` out of range.

    Example:
        >>> line = [[0, 0, 0], [1, 0, 0], [3, 0, 0], [7, 0, 0]]
        >>> knn(line, 2, block_q=2, block_kv=2).to_dense()[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    q, kv = _check_both("knn", coords, kv_coords)
    k = count("knn: k", k, 1)
    if k > len(kv):
        raise ValueError(
            f"knn: k={k}, but there are {len(kv)} keys; expected at most {len(kv)}. "
            "Use a smaller k."
        )
    sizes = check_sizes("knn", len(q), len(kv), block_q, block_kv)
    return bit_mask([_index_strips(nearest(q, kv, k), sizes)], 1, sizes)


def neighbors(
    index: Array, *, kv_len: int | None = None, block_q: int = 128, block_kv: int = 128
) -> BlockMask:
    """Each query sees the keys that its row of an index list names.

    Args:
        index: ``[T, k]`` or ``[B, T, k]`` integer. A key that a row names twice counts
            once; negative entries are padding and name no key.
        kv_len: number of keys S; T if not given.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask ``[B or 1, 1]`` with bits, or only full blocks where none is partial.

    Raises:
        TypeError: for an index that is traced.
        ValueError: for other shapes, entries that are not integers, or keys beyond S.

    Example:
        >>> mask = neighbors([[0, 1], [1, -1], [2, 2], [0, 3]], block_q=2, block_kv=2)
        >>> mask.to_dense()[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]

    References:
        RFdiffusion3 (RosettaCommons/foundry) attends through such lists: 128 keys an
        atom, 32 a token, for each sample.
    """
    rows = "[T, k] or [B, T, k]. Pad short rows with -1."
    index = as_numpy("neighbors: index", index, rows)
    if index.ndim not in (2, 3) or index.dtype.kind not in "iu" or index.size == 0:
        raise ValueError(
            f"neighbors: index has shape {index.shape} and dtype {index.dtype}; "
            "expected integers [T, k] or [B, T, k], no axis of length 0. Pad short "
            "rows with -1."
        )
    sizes = check_sizes("neighbors", index.shape[-2], kv_len, block_q, block_kv)
    if index.max() >= sizes.kv_len:
        raise ValueError(
            f"neighbors: index names key {index.max()}; expected 0 to "
            f"{sizes.kv_len - 1}, or negative entries as padding. Pass kv_len if there "
            "are more keys."
        )
    batch = index.reshape(-1, *index.shape[-2:])
    return bit_mask((_index_strips(x, sizes) for x in batch), 1, sizes)


def contacts(
    pairs: Array,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    symmetric: bool = True,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Query t sees key s where the two are in contact.

    Nothing sees itself unless the contacts say so; add ``window(n, left=0, right=0)``
    with ``|`` for the diagonal.

    Args:
        pairs: ``[n, 2]`` integer, (query, key) of each contact, duplicates allowed; or
            ``[T, S]`` bool, a contact map.
        q_len: number of queries T, for pairs; a contact map has its own.
        kv_len: number of keys S, for pairs; T if not given.
        symmetric: also lets s see t; needs T = S.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask with bits, or only full blocks where none is partial.

    Raises:
        TypeError: for contacts that are traced.
        ValueError: for other shapes or types, indices out of range, lengths that are
            missing or do not fit, or ``symmetric`` with T != S.

    Example:
        >>> mask = contacts([[0, 3], [1, 2]], q_len=4, block_q=2, block_kv=2)
        >>> mask.to_dense()[0, 0].astype(int).tolist()
        [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    """
    pairs = _check_pairs("contacts", pairs)
    is_map = pairs.dtype == bool
    if is_map:
        for name, length, have in zip(
            ("q_len", "kv_len"), (q_len, kv_len), pairs.shape, strict=True
        ):
            if length not in (None, have):
                raise ValueError(
                    f"contacts: {name}={length}, but the contact map has shape "
                    f"{pairs.shape}. Leave {name} out."
                )
        q_len, kv_len = pairs.shape
    if q_len is None:
        raise ValueError(
            "contacts: q_len is missing; expected the number of queries, which pairs "
            "do not tell. Pass q_len=len(structure) or the number of residues."
        )
    sizes = check_sizes("contacts", q_len, kv_len, block_q, block_kv)
    if symmetric and sizes.q_len != sizes.kv_len:
        raise ValueError(
            f"contacts: symmetric contacts between {sizes.q_len} queries and "
            f"{sizes.kv_len} keys; expected equal numbers. Pass symmetric=False."
        )
    if is_map:
        dense = pairs | pairs.T if symmetric else pairs
        return from_dense(dense, block_q=block_q, block_kv=block_kv)
    _check_range("contacts", pairs, (sizes.q_len, sizes.kv_len))
    q, kv = pairs.T
    if symmetric:
        q, kv = np.concatenate([q, kv]), np.concatenate([kv, q])
    return bit_mask([pair_strips(q, kv, sizes)], 1, sizes)


def atom_windows(
    num_atoms: int,
    *,
    queries: int = 32,
    keys: int = 128,
    padded_to: int | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """AlphaFold 3's local atom attention: subsets of queries, each with a run of keys.

    Subset ``i`` holds queries ``queries * i`` to ``queries * (i + 1) - 1`` and sees the
    ``keys`` atoms around its centre, which start at
    ``queries * i + (queries - keys) / 2``. A run that would leave ``[0, num_atoms)`` is
    shifted back inside; with fewer atoms than ``keys`` all atoms are seen.

    Args:
        num_atoms: atoms that really exist; it decides the shift at the end.
        queries: queries per subset.
        keys: keys of each subset; ``keys - queries`` is even.
        padded_to: length T = S of the atom arrays, e.g. 24 per token; ``num_atoms`` if
            not given. The padding sees nothing and costs nothing.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask with a `Window` rule.

    Raises:
        TypeError: for numbers that are traced.
        ValueError: for sizes below 1, an odd ``keys - queries``, or ``padded_to`` below
            ``num_atoms``.

    Example:
        >>> mask = atom_windows(1000, padded_to=2400, block_q=32, block_kv=32)
        >>> seen = mask.to_dense()[0, 0]
        >>> [np.flatnonzero(seen[t])[[0, -1]].tolist() for t in (0, 100, 999)]
        [[0, 127], [48, 175], [872, 999]]

    References:
        Abramson et al., AlphaFold 3, 2024: atom cross attention in its feature code.
    """
    num_atoms = count("atom_windows: num_atoms", num_atoms, 1)
    queries = count("atom_windows: queries", queries, 1)
    keys = count("atom_windows: keys", keys, 1)
    if (keys - queries) % 2:
        raise ValueError(
            f"atom_windows: queries={queries} and keys={keys} cannot be centred on "
            "each other; expected both even or both odd, e.g. 32 and 128."
        )
    length = num_atoms if padded_to is None else padded_to
    sizes = check_sizes("atom_windows", length, None, block_q, block_kv)
    if sizes.q_len < num_atoms:
        raise ValueError(
            f"atom_windows: padded_to={sizes.q_len} is less than num_atoms="
            f"{num_atoms}; expected at least that. Pass the length of the atom arrays."
        )
    t = np.arange(sizes.q_len, dtype=np.int64)
    start, stop = window_spans(np, t, num_atoms, queries, keys)
    return interval_mask(start, stop, sizes, num_atoms)


def expand(
    pairs: Array,
    q_residue: Array,
    kv_residue: Array | None = None,
    *,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """A pattern of residues on their atoms: t sees s where residue(t) sees residue(s).

    Args:
        pairs: ``[n, 2]`` integer, the (query, key) residues of each pair, duplicates
            allowed; or ``[R, R']`` bool. Nothing is made symmetric, and atoms of a
            residue see each other only if the residue sees itself. A residue-level
            `BlockMask` is passed as ``mask.to_dense()[0, 0]``.
        q_residue: ``[T]`` integer, residue of each query atom, from 0, in any order.
        kv_residue: ``[S]`` integer, residue of each key atom; ``q_residue`` if not
            given.
        block_q: query atoms per block.
        block_kv: key atoms per block.

    Returns:
        A mask with bits, or only full blocks where none is partial.

    Raises:
        TypeError: for pairs or residues that are traced.
        ValueError: for other shapes or types, or residues out of range.

    Example:
        >>> mask = expand([[0, 1], [1, 1]], [0, 0, 0, 1], block_q=2, block_kv=2)
        >>> mask.to_dense()[0, 0].astype(int).tolist()
        [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    """
    pairs = _check_pairs("expand", pairs)
    is_map = pairs.dtype == bool
    bounds = pairs.shape if is_map else (None, None)
    q = _check_residue("q_residue", q_residue, bounds[0])
    kv = (
        q if kv_residue is None else _check_residue("kv_residue", kv_residue, bounds[1])
    )
    sizes = check_sizes("expand", len(q), len(kv), block_q, block_kv)
    if is_map:
        return bit_mask([_residue_strips(pairs.__getitem__, q, kv, sizes)], 1, sizes)
    _check_range("expand", pairs, None)
    # Residues without atoms drop out, so numbers may be as large as they like.
    q_names, q = np.unique(q, return_inverse=True)
    kv_names, kv = np.unique(kv, return_inverse=True)
    known = np.isin(pairs[:, 0], q_names) & np.isin(pairs[:, 1], kv_names)
    row = np.searchsorted(q_names, pairs[known, 0])
    col = np.searchsorted(kv_names, pairs[known, 1])
    sees = scipy.sparse.csr_array(
        (np.ones(len(row), bool), (row, col)), shape=(len(q_names), len(kv_names))
    )

    def rows_of(residues: np.ndarray) -> np.ndarray:
        return sees[residues].toarray()

    return bit_mask([_residue_strips(rows_of, q, kv, sizes)], 1, sizes)


def _index_strips(index: np.ndarray, sizes: Sizes) -> Iterator[Strip]:
    """Strips of an index list ``[T, k]`` whose negative entries are padding."""
    step = strip_rows(sizes)
    for first in range(0, sizes.grid[0], step):
        kv = index[first * sizes.block_q : (first + step) * sizes.block_q]
        q = np.arange(len(kv))[:, None] + first * sizes.block_q
        real = kv >= 0
        q, kv = np.broadcast_to(q, kv.shape)[real], kv[real]
        yield element_strip(first, step, q, kv, sizes)


def _residue_strips(
    rows_of: Callable[[np.ndarray], np.ndarray],
    q: np.ndarray,
    kv: np.ndarray,
    sizes: Sizes,
) -> Iterator[Strip]:
    """Strips of one query block each; ``rows_of(residues)`` is a bool matrix."""
    nq, nk = sizes.grid
    block = np.arange(sizes.kv_len) // sizes.block_kv
    shape = (int(kv.max()) + 1, nk)
    blocks_of = scipy.sparse.csr_array(
        (np.ones(len(kv), bool), (kv, block)), shape=shape
    )
    # Keys beyond S belong to one more residue, which nothing sees.
    keys = np.full(nk * sizes.block_kv, shape[0])
    keys[: sizes.kv_len] = kv
    keys = keys.reshape(nk, sizes.block_kv)
    for row in range(nq):
        atoms = q[row * sizes.block_q : (row + 1) * sizes.block_q]
        residues, which = np.unique(atoms, return_inverse=True)
        sees = rows_of(residues)[:, : shape[0]]
        cols = np.unique(blocks_of[np.flatnonzero(sees.any(0))].indices)
        # Packed once for each residue, then copied to its atoms.
        packed = pack(np.pad(sees, [(0, 0), (0, 1)])[:, keys[cols]])
        words = np.zeros((len(cols), sizes.block_q, sizes.words), np.uint32)
        words[:, : len(atoms)] = packed[which].swapaxes(0, 1)
        yield np.full(len(cols), row), cols, words


def _check_both(who: str, coords: Array, kv_coords: Array | None):
    q = check_coords(f"{who}: coords", coords)
    return q, q if kv_coords is None else check_coords(f"{who}: kv_coords", kv_coords)


def _check_pairs(who: str, pairs: Array) -> np.ndarray:
    """A bool matrix, or pairs ``[n, 2]`` int64; indices are not checked yet."""
    pairs = as_numpy(f"{who}: pairs", pairs)
    if pairs.ndim == 2 and pairs.dtype == bool and pairs.size:
        return pairs
    if pairs.shape == (0,):
        pairs = pairs.reshape(0, 2)
    if (
        pairs.ndim != 2
        or pairs.shape[1] != 2
        or (pairs.size and pairs.dtype.kind not in "iu")
    ):
        raise ValueError(
            f"{who}: pairs has shape {pairs.shape} and dtype {pairs.dtype}; expected "
            "integers [n, 2] or a bool matrix with no axis of length 0. Compare a "
            "matrix of distances first, e.g. distances < 8."
        )
    return pairs.astype(np.int64)


def _check_range(who: str, pairs: np.ndarray, lengths: tuple[int, int] | None) -> None:
    """Refuses pairs with a negative index, or one beyond the given lengths."""
    for side, x in zip(("query", "key"), pairs.T, strict=True):
        length = None if lengths is None else lengths[side == "key"]
        if x.size and (x.min() < 0 or (length is not None and x.max() >= length)):
            expected = "0 or more" if length is None else f"0 to {length - 1}"
            raise ValueError(
                f"{who}: the {side} indices of pairs span {x.min()} to {x.max()}; "
                f"expected {expected}. Number atoms or residues from 0."
            )


def _check_residue(name: str, residue: Array, bound: int | None) -> np.ndarray:
    residue = as_numpy(f"expand: {name}", residue)
    if residue.ndim != 1 or residue.size == 0 or residue.dtype.kind not in "iu":
        raise ValueError(
            f"expand: {name} has shape {residue.shape} and dtype {residue.dtype}; "
            "expected integers [n], one residue for each atom, at least one. Pass e.g. "
            "structure.residue_index."
        )
    if residue.min() < 0 or (bound is not None and residue.max() >= bound):
        expected = "0 or more" if bound is None else f"0 to {bound - 1}, as in pairs"
        raise ValueError(
            f"expand: {name} spans {residue.min()} to {residue.max()}; expected "
            f"{expected}. Number the residues from 0 over the whole structure."
        )
    return residue.astype(np.int64)
