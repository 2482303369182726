"""AlphaFold 3's atom windows with a number of atoms that may be traced.

`device.py` makes this builder public. The lists need no capacity: every query block
that holds atoms lists the same number of consecutive key blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse._ranks import promotes_ranks
from jsparse.patterns._arguments import count
from jsparse.patterns._block_mask import BlockMask
from jsparse.patterns._builders import window_spans
from jsparse.patterns._device_checks import check_grid
from jsparse.patterns._parts import Sizes
from jsparse.patterns._rules import Window

Array = Any

QUERIES, KEYS = 32, 128


@promotes_ranks
def atom_windows(
    num_atoms: Array,
    *,
    padded_to: int | None = None,
    block_q: int = 64,
    block_kv: int = 64,
) -> BlockMask:
    """AlphaFold 3's atom windows, 32 queries x 128 keys, of a traced number of atoms.

    The pattern is that of `jsparse.patterns.atom_windows`. Here every query block that
    holds an atom lists the same number of consecutive key blocks, ``kv_indices[0, 0, i,
    0]`` and those after it, although the first and the last need fewer, so block ``n``
    of a `BlockBias` is key block ``n % capacity`` of query block ``n // capacity``.
    Query blocks without atoms list nothing. Memory grows with T, not with its square.

    Args:
        num_atoms: scalar integer, atoms that really exist; it decides the shift of the
            last windows. A traced value is clipped to 0..T.
        padded_to: length T = S of the atom arrays; ``num_atoms`` if not given.
        block_q: queries per block.
        block_kv: keys per block.

    Returns:
        A mask ``[1, 1]`` with a `Window` rule. With a number known before tracing its
        arrays are NumPy's, and the same for the same arguments.

    Raises:
        ValueError: for sizes below 1, no ``padded_to`` where ``num_atoms`` is traced,
            or less than ``num_atoms``.
        TypeError: for a traced ``num_atoms`` that is not an integer.

    Example:
        >>> import jax
        >>> from jsparse.patterns import device
        >>> make = jax.jit(lambda n: device.atom_windows(n, padded_to=2400))
        >>> make(1000).kv_num_blocks[0, 0, 13:18].tolist()
        [3, 3, 3, 0, 0]

    References:
        Abramson et al., AlphaFold 3, 2024: algorithm 7 and its feature code.
    """
    if not isinstance(num_atoms, jax.Array):
        number = count("atom_windows: num_atoms", num_atoms, 0)
        length = number if padded_to is None else padded_to
        sizes = check_grid("atom_windows", length, None, block_q, block_kv)
        if sizes.q_len < number:
            raise ValueError(
                f"atom_windows: padded_to={padded_to} is less than num_atoms={number}; "
                "expected at least that. Pass the length of the atom arrays."
            )
        return _known(number, sizes)
    if num_atoms.ndim or not jnp.issubdtype(num_atoms.dtype, jnp.integer):
        raise TypeError(
            f"atom_windows: num_atoms has shape {num_atoms.shape} and dtype "
            f"{num_atoms.dtype}; expected one integer. Use jax.vmap for several."
        )
    if padded_to is None:
        raise ValueError(
            "atom_windows: padded_to is missing; expected the length of the atom "
            "arrays, which must be known when num_atoms is an array."
        )
    sizes = check_grid("atom_windows", padded_to, None, block_q, block_kv)
    return _build(jnp, jnp.clip(num_atoms, 0, sizes.q_len).astype(jnp.int32), sizes)


@functools.lru_cache(maxsize=64)
def _known(num_atoms: int, sizes: Sizes) -> BlockMask:
    """One mask for the same arguments: callers that plan by its pattern plan once."""
    return _build(np, np.int32(num_atoms), sizes)


def _build(xp: Any, num_atoms: Array, sizes: Sizes) -> BlockMask:
    """The mask, in NumPy or in JAX."""
    nq, nk = sizes.grid
    t = xp.arange(nq * sizes.block_q, dtype=np.int32)
    start, stop = window_spans(xp, t, num_atoms, QUERIES, KEYS)

    width = _width(sizes)
    first = start[:: sizes.block_q] // sizes.block_kv
    first = xp.minimum(first, nk - width).astype(np.int32)
    used = t[:: sizes.block_q] < num_atoms
    slots = xp.arange(width, dtype=np.int32)
    rows = xp.where(used, np.int32(width), 0), first[:, None] + slots

    # `first` never falls, so the rows that list a key block are neighbours too.
    order = xp.where(used, first, nk + width)
    column = xp.arange(nk, dtype=np.int32)
    low = xp.searchsorted(order, column - (width - 1), side="left").astype(np.int32)
    high = xp.searchsorted(order, column, side="right").astype(np.int32)
    reach = max(width * sizes.block_kv + KEYS - 1, (2 * width - 1) * sizes.block_kv)
    slots = xp.arange(min(nq, -(-reach // sizes.block_q)), dtype=np.int32)
    columns = (high - low).astype(np.int32), xp.minimum(low[:, None] + slots, nq - 1)

    lists = {}
    for side, (counts, indices) in (("kv", rows), ("q", columns)):
        lists[f"{side}_num_blocks"] = counts[None, None]
        lists[f"{side}_indices"] = indices[None, None]
        lists[f"full_{side}_num_blocks"] = xp.zeros_like(counts)[None, None]
        lists[f"full_{side}_indices"] = xp.zeros((1, 1, len(counts), 0), np.int32)
    return BlockMask(
        **lists,
        rules=(Window(start[None, : sizes.q_len], stop[None, : sizes.q_len]),),
        q_lengths=xp.reshape(num_atoms, 1),
        kv_lengths=xp.reshape(num_atoms, 1),
        **sizes._asdict(),
    )


def _width(sizes: Sizes) -> int:
    """The most key blocks that the windows of one query block touch."""
    most = (KEYS + sizes.block_kv - 2) // sizes.block_kv + 1  # shifted to any place
    row = np.arange(sizes.grid[0]) * sizes.block_q
    last = np.minimum(row + sizes.block_q, sizes.q_len) - 1
    begin = row // QUERIES * QUERIES + (QUERIES - KEYS) // 2
    end = last // QUERIES * QUERIES + (QUERIES + KEYS) // 2 - 1
    spans = end // sizes.block_kv - begin // sizes.block_kv + 1
    return min(sizes.grid[1], max(most, int(spans.max())))
