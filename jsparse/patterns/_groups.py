"""Arrays of several groups as one, and back: the layout of `BlockMask.concatenate`.

A grouped launch works on one long axis on which every problem starts at a multiple of
the block. `join_groups` lays the arrays of the problems out that way and `split_groups`
cuts the result apart again. Groups are host data, so both run under `jit` when the mask
is closed over.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jsparse.patterns._block_mask import BlockMask

Array = Any
Side = Literal["q", "kv"]


def join_groups(
    arrays: Sequence[Array], mask: BlockMask, side: Side = "q", axis: int = 0
) -> jax.Array:
    """Joins one array for each group into the axis that ``mask`` describes.

    Args:
        arrays: for each group, in order, an array with T_g (or S_g) entries on
            ``axis``; other sizes and the dtype are common to all.
        mask: a mask made by `BlockMask.concatenate`.
        side: ``"q"`` for arrays of queries, ``"kv"`` for arrays of keys.
        axis: the axis of the queries or keys, e.g. -3 for ``[*B, T_g, H, D]``.

    Returns:
        One array with T (or S) entries on ``axis``; zero between the groups.

    Raises:
        ValueError: for a mask without groups, another number of arrays, lengths, shapes
            or dtypes that do not fit.
        TypeError: for a mask that is no `BlockMask`, or whose groups are traced.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsparse.patterns import BlockMask, join_groups, split_groups
        >>> a = BlockMask.from_blocks([0], [0], q_len=3, block_q=4, block_kv=4)
        >>> b = BlockMask.from_blocks([0], [0], q_len=2, block_q=4, block_kv=4)
        >>> mask = BlockMask.concatenate([a, b])
        >>> joined = join_groups([jnp.array([1, 2, 3]), jnp.array([4, 5])], mask)
        >>> joined.tolist()
        [1, 2, 3, 0, 4, 5, 0, 0]
        >>> [x.tolist() for x in split_groups(joined, mask)]
        [[1, 2, 3], [4, 5]]
    """
    spans, total = _spans("join_groups", mask, side)
    arrays = [jnp.asarray(x) for x in arrays]
    if len(arrays) != len(spans):
        raise ValueError(
            f"join_groups: {len(arrays)} arrays for {len(spans)} groups; expected one "
            "array for each group, in the order of the masks that were concatenated."
        )
    axes = [_axis("join_groups", x, axis) for x in arrays]
    first = arrays[0]
    for n, (x, at, (_, length)) in enumerate(zip(arrays, axes, spans, strict=True)):
        if x.shape[at] != length:
            raise ValueError(
                f"join_groups: array {n} has shape {x.shape}; expected {length} "
                f"entries on axis {axis}, the {side} length of group {n}."
            )
        if x.dtype != first.dtype or _others(x, at) != _others(first, axes[0]):
            raise ValueError(
                f"join_groups: array {n} is {x.dtype} {x.shape} and array 0 is "
                f"{first.dtype} {first.shape}; expected one dtype and one shape but "
                f"for axis {axis}."
            )
    at = axes[0]
    ends = [start for start, _ in spans[1:]] + [total]
    pieces = []
    for x, (start, length), end in zip(arrays, spans, ends, strict=True):
        width = [(0, 0)] * x.ndim
        width[at] = (0, end - start - length)
        pieces.append(jnp.pad(x, width))
    return jnp.concatenate(pieces, axis=at)


def split_groups(
    array: Array, mask: BlockMask, side: Side = "q", axis: int = 0
) -> list[Array]:
    """Cuts an array in the joined layout into one array for each group.

    Args:
        array: an array with T (or S) entries on ``axis``.
        mask: a mask made by `BlockMask.concatenate`.
        side: ``"q"`` for arrays of queries, such as the output of attention; ``"kv"``
            for arrays of keys.
        axis: the axis of the queries or keys: -3 for ``[*B, T, H, D]``, -1 for an
            ``lse [*B, H, T]``.

    Returns:
        For each group an array with T_g (or S_g) entries on ``axis``.

    Raises:
        ValueError: for a mask without groups, or another length on ``axis``.
        TypeError: for a mask that is no `BlockMask`, or whose groups are traced.

    Example:
        >>> import numpy as np
        >>> from jsparse.patterns import BlockMask, split_groups
        >>> one = BlockMask.from_blocks([0], [0], q_len=3, block_q=4, block_kv=4)
        >>> mask = BlockMask.concatenate([one, one])
        >>> [x.tolist() for x in split_groups(np.arange(8), mask)]
        [[0, 1, 2], [4, 5, 6]]
    """
    spans, total = _spans("split_groups", mask, side)
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    at = _axis("split_groups", array, axis)
    if array.shape[at] != total:
        raise ValueError(
            f"split_groups: the array has shape {array.shape}; expected {total} "
            f"entries on axis {axis}, the {side} length of the mask."
        )
    before = (slice(None),) * at
    return [array[(*before, slice(start, start + n))] for start, n in spans]


def _spans(who: str, mask: BlockMask, side: Side) -> tuple[list[tuple[int, int]], int]:
    """Start and length of every group on one side, and the length of all."""
    if side not in ("q", "kv"):
        raise ValueError(f"{who}: side={side!r}; expected 'q' or 'kv'.")
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"{who}: mask is a {type(mask).__name__}; expected a BlockMask made by "
            "BlockMask.concatenate."
        )
    if mask.groups is None:
        raise ValueError(
            f"{who}: {mask!r} has no groups; expected a mask made by "
            "BlockMask.concatenate."
        )
    if isinstance(mask.groups, Tracer):
        raise TypeError(
            f"{who}: the groups of the mask are traced, and array shapes depend on "
            "them. Call it outside jit, or close over the mask instead of passing it."
        )
    first = 0 if side == "q" else 2
    spans = [(int(n), int(m)) for n, m in np.asarray(mask.groups)[:, first : first + 2]]
    return spans, mask.q_len if side == "q" else mask.kv_len


def _axis(who: str, x: Array, axis: int) -> int:
    axis = operator.index(axis)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"{who}: axis={axis}, but an array has shape {x.shape}; expected one of "
            "its axes."
        )
    return axis % x.ndim


def _others(x: Array, axis: int) -> tuple[int, ...]:
    return (*x.shape[:axis], *x.shape[axis + 1 :])
