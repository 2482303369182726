"""Block masks built on the device: by JAX, eagerly or under `jit` and `vmap`.

For patterns that change while a model runs: diffusion coordinates, neighbour lists of
each sample, learned routing. All sizes are static, so one compilation serves every
structure of a bucket. The price is a *capacity*: how many blocks a row may list. What
does not fit is reported in ``needed_capacity`` and turns the output of attention into
NaN. A builder that runs eagerly raises `CapacityError` by itself; under `jit` or `vmap`
call `BlockMask.check` on the mask that comes out.

Nothing here reads a structure file; `radius` and `neighbors` take plain arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jsparse._ranks import promotes_ranks
from jsparse.patterns._arguments import as_array
from jsparse.patterns._block_mask import NO_CAPACITY, BlockMask
from jsparse.patterns._device_checks import (
    as_cutoff,
    as_lengths,
    as_points,
    check_entries,
    check_grid,
    check_positive,
    check_widths,
    common_batch,
    each,
    with_batch,
)
from jsparse.patterns._device_lists import blocks_and_bits
from jsparse.patterns._device_windows import atom_windows as atom_windows
from jsparse.patterns._integers import as_keys
from jsparse.patterns._parts import Sizes
from jsparse.patterns._rules import (
    Distance,
    ElementRule,
    check_rules,
    squared_distance,
)

Array = Any

_BOX = 8  # consecutive atoms in one of the boxes that a block is made of
_BOX_PAIRS = 1 << 20  # pairs of boxes tested at a time
_ATOM_PAIRS = 1 << 22  # pairs of atoms tested at a time
# A block is listed if a pair comes this close to the rule's test, so that no way of
# rounding the rule (fused multiply-adds, another device) finds a pair outside the list.
_SLACK = np.float32(1 + 1e-6)
_NO, _MAYBE, _YES = range(3)


@promotes_ranks
def radius(
    coords: Array,
    cutoff: Array,
    *,
    kv_coords: Array | None = None,
    block_q: int = 128,
    block_kv: int = 128,
    capacity: int,
    q_capacity: int | None = None,
    q_length: Array | None = None,
    kv_length: Array | None = None,
) -> BlockMask:
    """Atom t sees atom s where ``|coords[t] - kv_coords[s]| <= cutoff``.

    The lists hold the blocks with at least one such pair, found by bounding boxes of
    blocks, then of 8 atoms, then by the pairs themselves where boxes cannot tell; the
    `Distance` rule tests the elements. Memory grows with the number of blocks squared,
    never with the number of pairs. No block is listed as full.

    An atom whose coordinates are not finite sees nothing and is seen by nobody. No
    gradient flows into the mask.

    Args:
        coords: ``[T, 3]`` or ``[B, T, 3]`` float, ångström; computed in float32.
        cutoff: scalar or ``[B]``, ångström. A negative or NaN cut-off is an error, or
            sees nothing where it is traced.
        kv_coords: ``[S, 3]`` or ``[B, S, 3]``; ``coords`` if not given.
        block_q: queries per block.
        block_kv: keys per block.
        capacity: static; key blocks that one query block may list.
        q_capacity: static; query blocks that one key block may list; ``capacity`` if
            not given.
        q_length: scalar or ``[B]`` integer, atoms that really exist: for coordinates
            padded to a bucket. What lies beyond may be anything, also NaN. T if not
            given; a traced value is clipped to 0..T.
        kv_length: the same for ``kv_coords``; without these, ``q_length`` if not given.

    Returns:
        A mask ``[B or 1, 1]`` with a `Distance` rule.

    Raises:
        ValueError: for shapes, block sizes, capacities, lengths or cut-offs that make
            no sense.
        TypeError: for coordinates that are not numbers, lengths that are not integers.
        CapacityError: eagerly, if a list is too narrow; it names the width needed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jsparse.patterns import device
        >>> line = jnp.stack([jnp.arange(512.0), jnp.zeros(512), jnp.zeros(512)], 1)
        >>> mask = jax.jit(lambda x: device.radius(x, 5.0, capacity=3))(line).check()
        >>> mask.kv_num_blocks[0, 0].tolist(), int(mask.to_dense()[0, 0, 100].sum())
        ([2, 3, 3, 2], 11)

    References:
        Bounding boxes of groups of consecutive atoms are the cluster pair lists of
        Páll and Hess, Comput. Phys. Commun. 184, 2641 (2013), as used in GROMACS.
    """
    q = as_points("coords", coords)
    kv = q if kv_coords is None else as_points("kv_coords", kv_coords)
    sizes = check_grid("radius", q.shape[1], kv.shape[1], block_q, block_kv)
    widths = check_widths("radius", capacity, q_capacity)
    same = kv_coords is None and kv_length is None
    if same:
        kv_length = q_length
    q_lengths = as_lengths("radius", "q_length", q_length, sizes.q_len)
    kv_lengths = as_lengths("radius", "kv_length", kv_length, sizes.kv_len)
    cutoff = as_cutoff(cutoff)
    batch = common_batch(
        "radius",
        coords=q.shape[0],
        kv_coords=kv.shape[0],
        cutoff=cutoff.shape[0],
        q_length=q_lengths.shape[0],
        kv_length=kv_lengths.shape[0],
    )
    mask = _radius(
        *(jax.lax.stop_gradient(x) for x in (q, kv, cutoff)),
        q_lengths,
        kv_lengths,
        batch=batch,
        sizes=sizes,
        widths=widths,
        symmetric=same and block_q == block_kv,
    )
    return _checked(mask)


@promotes_ranks
def neighbors(
    index: Array,
    *,
    kv_len: int | None = None,
    block_q: int = 128,
    block_kv: int = 128,
    capacity: int,
    q_capacity: int | None = None,
    num_bits: int | None = None,
    q_length: Array | None = None,
    kv_length: Array | None = None,
) -> BlockMask:
    """Query t sees the keys ``index[t, 0], ..., index[t, k - 1]``.

    The entries of a row are a set: their order does not matter and duplicates count
    once. Negative entries are padding. The elements become bits, packed on the device:
    on a Hopper GPU, for blocks that attention takes there, by kernels that read the
    lists as they are; elsewhere by XLA, which sorts a copy of them.

    Args:
        index: ``[T, k]`` or ``[B, T, k]`` integer, the keys of each query.
        kv_len: number of keys S; T if not given. An entry of S or more is an error, or
            padding where ``index`` is traced.
        block_q: queries per block.
        block_kv: keys per block.
        capacity: static; key blocks that one query block may list.
        q_capacity: static; query blocks that one key block may list; ``capacity`` if
            not given.
        num_bits: static; blocks that all rows of one batch entry may list together: the
            size of ``bits``, ``block_q * block_kv / 8`` bytes each. By default every
            row may use its whole capacity. Rows are uneven, so a multiple of the *mean*
            number of blocks often does with much less memory.
        q_length: scalar or ``[B]`` integer, queries that really exist; rows beyond are
            not read. T if not given; a traced value is clipped to 0..T.
        kv_length: scalar or ``[B]`` integer, keys that really exist; entries beyond are
            padding. S if not given.

    Returns:
        A mask ``[B or 1, 1]`` with bits.

    Raises:
        ValueError: for shapes, sizes or lengths that make no sense, or an entry of S or
            more.
        TypeError: for entries or lengths that are not integers.
        CapacityError: eagerly, if a list or ``bits`` is too small; it names the size
            needed.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsparse.patterns import device
        >>> index = jnp.array([[0, 1, 1], [3, 0, -1], [2, -1, -1], [3, 3, 3]])
        >>> mask = device.neighbors(index, block_q=2, block_kv=2, capacity=2)
        >>> mask.to_dense()[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]

    References:
        The form is RFdiffusion3's (RosettaCommons/foundry): 128 keys an atom and 32 a
        token, rebuilt for every sample at every step. Its gather path counts
        duplicates; here they count once, as in its dense path.
    """
    index = as_array("neighbors: index", index)
    if index.ndim not in (2, 3) or index.shape[-1] == 0:
        raise ValueError(
            f"neighbors: index has shape {index.shape}; expected [T, k] or [B, T, k] "
            "with k of at least 1. Use -1 for queries with fewer neighbours."
        )
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"neighbors: index has dtype {index.dtype}; expected integers. Pass the "
            "numbers of the keys, not a mask or distances."
        )
    sizes = check_grid("neighbors", index.shape[-2], kv_len, block_q, block_kv)
    check_entries(index, sizes.kv_len)
    widths = check_widths("neighbors", capacity, q_capacity)
    if num_bits is None:
        num_bits = sizes.grid[0] * min(widths[0], sizes.grid[1])
    num_bits = check_positive("neighbors", "num_bits", num_bits)
    q_lengths = as_lengths("neighbors", "q_length", q_length, sizes.q_len)
    kv_lengths = as_lengths("neighbors", "kv_length", kv_length, sizes.kv_len)
    index = with_batch(as_keys(index, sizes.kv_len))
    batch = common_batch(
        "neighbors",
        index=index.shape[0],
        q_length=q_lengths.shape[0],
        kv_length=kv_lengths.shape[0],
    )
    mask = _neighbors(
        index,
        q_lengths,
        kv_lengths,
        batch=batch,
        sizes=sizes,
        widths=widths,
        num_bits=num_bits,
    )
    return _checked(mask)


@promotes_ranks
def from_dense_blocks(
    active: Array,
    *,
    q_len: int,
    kv_len: int | None = None,
    block_q: int = 128,
    block_kv: int = 128,
    capacity: int,
    q_capacity: int | None = None,
    full: Array | None = None,
    rules: Sequence[ElementRule] = (),
    q_length: Array | None = None,
    kv_length: Array | None = None,
) -> BlockMask:
    """A mask of the blocks that are True in a block map, for patterns of your own.

    Blocks are listed as partial, their elements tested by lengths and ``rules``, unless
    they are ``full``.

    Args:
        active: ``[nq, nk]`` or ``[B or 1, H or 1, nq, nk]`` bool, blocks to compute.
            Blocks beyond the lengths are left out.
        q_len: number of queries T; ``nq = ceil(T / block_q)``.
        kv_len: number of keys S; T if not given.
        block_q: queries per block.
        block_kv: keys per block.
        capacity: static; key blocks that one query block may list, of those that are
            full and of the others.
        q_capacity: static; query blocks that one key block may list; ``capacity`` if
            not given.
        full: bool, of the shape of ``active``: blocks computed without any element
            test; ``rules`` must allow all their elements. Blocks that reach beyond a
            length are partial all the same. None are full if not given.
        rules: element rules, each ``[B or 1, ...]``.
        q_length: scalar or ``[B]`` integer, queries that really exist; T if not given.
        kv_length: scalar or ``[B]`` integer, keys that really exist; S if not given.

    Returns:
        A mask ``[B or 1, H or 1]``.

    Raises:
        ValueError: for shapes, sizes, lengths or batches that do not fit together.
        TypeError: for a map that is not bool, lengths that are not integers, or rules
            that are none.
        CapacityError: eagerly, if a list is too narrow; it names the width needed.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsparse.patterns import device
        >>> scores = jnp.array([[0.9, 0.1, 0.8], [0.2, 0.7, 0.6], [0.1, 0.3, 0.5]])
        >>> mask = device.from_dense_blocks(scores > 0.4, q_len=300, capacity=3)
        >>> mask.kv_num_blocks[0, 0].tolist(), mask.kv_indices[0, 0].tolist()
        ([2, 2, 1], [[0, 2, 0], [1, 2, 0], [2, 0, 0]])
    """
    sizes = check_grid("from_dense_blocks", q_len, kv_len, block_q, block_kv)
    widths = check_widths("from_dense_blocks", capacity, q_capacity)
    active = as_array("from_dense_blocks: active", active)
    if active.dtype != jnp.bool_:
        raise TypeError(
            f"from_dense_blocks: active has dtype {active.dtype}; expected bool. "
            "Compare scores with a threshold first."
        )
    nq, nk = sizes.grid
    if active.ndim not in (2, 4) or active.shape[-2:] != (nq, nk):
        raise ValueError(
            f"from_dense_blocks: active has shape {active.shape}; expected "
            f"[{nq}, {nk}] or [B, H, {nq}, {nk}], one flag for each block of "
            f"{sizes.q_len} x {sizes.kv_len} elements."
        )
    whole = None if full is None else _map_like("full", full, active)
    if active.ndim == 2:
        active = active[None, None]
    rules = check_rules("from_dense_blocks", rules, sizes)
    q_lengths = as_lengths("from_dense_blocks", "q_length", q_length, sizes.q_len)
    kv_lengths = as_lengths("from_dense_blocks", "kv_length", kv_length, sizes.kv_len)
    leaves = jax.tree_util.tree_leaves(rules)
    batch = common_batch(
        "from_dense_blocks",
        active=active.shape[0],
        q_length=q_lengths.shape[0],
        kv_length=kv_lengths.shape[0],
        **{f"rules[{n}]": np.shape(leaf)[0] for n, leaf in enumerate(leaves)},
    )
    mask = _from_map(
        jnp.broadcast_to(active, (batch, *active.shape[1:])),
        q_lengths,
        kv_lengths,
        rules,
        whole,
        sizes=sizes,
        widths=widths,
    )
    return _checked(mask)


def _map_like(name: str, x: Any, active: Array) -> Array:
    """Another map of the same blocks, ``[B or 1, H or 1, nq, nk]``."""
    x = as_array(f"from_dense_blocks: {name}", x)
    if x.shape != active.shape or x.dtype != jnp.bool_:
        raise ValueError(
            f"from_dense_blocks: {name} has shape {x.shape} and dtype {x.dtype}; "
            f"expected {active.shape} and bool, as active has."
        )
    return x if x.ndim == 4 else x[None, None]


# ------------------------------------------------------------------------ computing


@functools.partial(jax.jit, static_argnames=("batch", "sizes", "widths", "symmetric"))
def _radius(
    q: Array,
    kv: Array,
    cutoff: Array,
    q_lengths: Array,
    kv_lengths: Array,
    *,
    batch: int,
    sizes: Sizes,
    widths: tuple[int, int],
    symmetric: bool,
) -> BlockMask:
    # NaN is far from everything, in every comparison below and in the rule.
    q, kv = (
        jnp.where(jnp.isfinite(x).all(-1, keepdims=True), x, jnp.nan) for x in (q, kv)
    )
    cutoff = jnp.where(cutoff >= 0, cutoff, jnp.nan)

    def blocks(q, kv, cutoff, q_length, kv_length):
        q = _tile(q, q_length, sizes.block_q)
        kv = q if symmetric else _tile(kv, kv_length, sizes.block_kv)
        return _near_blocks(q, kv, cutoff * cutoff * _SLACK, symmetric)

    active = each(blocks, batch, q, kv, cutoff, q_lengths, kv_lengths)
    rule = Distance(q, kv, cutoff[:, None])
    return _from_map(
        active[:, None], q_lengths, kv_lengths, (rule,), sizes=sizes, widths=widths
    )


@functools.partial(jax.jit, static_argnames=("batch", "sizes", "widths", "num_bits"))
def _neighbors(
    index: Array,
    q_lengths: Array,
    kv_lengths: Array,
    *,
    batch: int,
    sizes: Sizes,
    widths: tuple[int, int],
    num_bits: int,
) -> BlockMask:
    lengths = jnp.stack(
        [jnp.broadcast_to(x, batch) for x in (q_lengths, kv_lengths)], 1
    )
    active, bits = blocks_and_bits(index, lengths, sizes, num_bits)
    mask = _from_map(
        active[:, None],
        q_lengths,
        kv_lengths,
        (),
        sizes=sizes,
        widths=widths,
        num_bits=num_bits,
    )
    return dataclasses.replace(mask, bits=bits)


@functools.partial(jax.jit, static_argnames=("sizes", "widths", "num_bits"))
def _from_map(
    active: Array,
    q_lengths: Array,
    kv_lengths: Array,
    rules: tuple[ElementRule, ...],
    full: Any = None,
    *,
    sizes: Sizes,
    widths: tuple[int, int],
    num_bits: int | None = None,
) -> BlockMask:
    """The mask of ``active [B, H, nq, nk]``; ``num_bits`` is the room for its bits."""
    nq, nk = sizes.grid
    starts_q = jnp.arange(nq, dtype=jnp.int32) * sizes.block_q
    starts_kv = jnp.arange(nk, dtype=jnp.int32) * sizes.block_kv
    inside_q = starts_q < q_lengths[:, None]
    inside_kv = starts_kv < kv_lengths[:, None]
    active &= inside_q[:, None, :, None] & inside_kv[:, None, None, :]
    if full is not None:
        whole_q = starts_q + sizes.block_q <= q_lengths[:, None]
        whole_kv = starts_kv + sizes.block_kv <= kv_lengths[:, None]
        full = full & active & whole_q[:, None, :, None] & whole_kv[:, None, None, :]
        active &= ~full
    lists, needed = {}, []
    for side, width in zip(("kv", "q"), widths, strict=True):
        for kind, blocks in (("", active), ("full_", full)):
            if blocks is None:
                counts = jnp.zeros_like(lists[f"{side}_num_blocks"])
                indices = jnp.zeros((*counts.shape, 0), jnp.int32)
            else:
                blocks = blocks if side == "kv" else blocks.swapaxes(-1, -2)
                counts, indices = _block_lists(blocks, width)
            lists[f"{kind}{side}_num_blocks"] = jnp.minimum(counts, width)
            lists[f"{kind}{side}_indices"] = indices
            needed.append(counts.max((1, 2)))
    if num_bits is not None:
        total = active.sum((1, 2, 3), dtype=jnp.int32)
        fits = (total <= num_bits) | (needed[0] > widths[0])
        needed[0] = jnp.where(fits, needed[0], NO_CAPACITY)
    return BlockMask(
        **lists,
        rules=rules,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        needed_capacity=jnp.stack(needed, axis=-1),
        **sizes._asdict(),
    )


def _block_lists(active: Array, width: int) -> tuple[Array, Array]:
    """Counts ``[..., n]`` and ascending indices ``[..., n, width]`` of True blocks."""
    upto = jnp.cumsum(active, axis=-1, dtype=jnp.int32)
    counts = upto[..., -1]
    slots = jnp.arange(width, dtype=jnp.int32)
    # Entry n of a row is where its running count reaches n + 1. Looking that up is a
    # few gathers per entry, where sorting or scattering would touch the whole map. As a
    # loop each of its steps would be three launches on a GPU.
    find = jax.vmap(
        lambda row: jnp.searchsorted(row, slots + 1, method="scan_unrolled")
    )
    indices = find(upto.reshape(-1, upto.shape[-1])).astype(jnp.int32)
    indices = indices.reshape(*counts.shape, width)
    return counts, jnp.where(slots < counts[..., None], indices, 0)


def _near_blocks(q: Array, kv: Array, limit: Array, symmetric: bool) -> Array:
    """Which blocks of atoms ``[n, block, 3]`` hold a pair with distance² <= limit.

    Atoms at NaN do not exist. Each step looks only at the blocks that the one before
    could not decide, and the loops end with the last of these, so that the work follows
    the number of near blocks rather than nq * nk.
    """
    boxes_q, boxes_kv = _boxes(q), _boxes(kv)
    undecided = _box_pairs(_join(boxes_q), _join(boxes_kv), limit)
    if symmetric:
        undecided = jnp.triu(undecided)
    state = jnp.where(undecided, _MAYBE, _NO).astype(jnp.int8)
    first_q, first_kv = q[:, ::_BOX], kv[:, ::_BOX]

    def by_boxes(i, j):
        sure = squared_distance(first_q[i], first_kv[j]) <= limit
        pairs = _box_pairs([x[i] for x in boxes_q], [x[j] for x in boxes_kv], limit)
        near = jnp.where(pairs.any((1, 2)), _MAYBE, _NO)
        return jnp.where(sure.any((1, 2)), _YES, near)

    def by_atoms(i, j):
        near = squared_distance(q[i], kv[j]) <= limit
        return jnp.where(near.any((1, 2)), _YES, _NO)

    state = _decide(
        state, by_boxes, _BOX_PAIRS // (first_q.shape[1] * first_kv.shape[1])
    )
    state = _decide(state, by_atoms, _ATOM_PAIRS // (q.shape[1] * kv.shape[1]))
    active = state == _YES
    return active | active.T if symmetric else active


def _decide(
    state: Array, test: Callable[[Array, Array], Array], at_a_time: int
) -> Array:
    """Replaces ``_MAYBE`` by what ``test(rows, cols)`` finds, some blocks at a time."""
    nk, flat = state.shape[1], state.reshape(-1)
    step = min(max(at_a_time, 1), flat.size)
    upto = jnp.cumsum(flat == _MAYBE, dtype=jnp.int32)
    ranks = jnp.arange(1, step + 1, dtype=jnp.int32)

    def body(carry):
        done, flat = carry
        # The end of the map, beyond every block, for ranks that do not exist.
        block = jnp.searchsorted(upto, done + ranks).astype(jnp.int32)
        found = test(jnp.minimum(block, flat.size - 1) // nk, block % nk)
        return done + step, flat.at[block].set(found.astype(jnp.int8), mode="drop")

    start = (jnp.int32(0), flat)
    _, flat = jax.lax.while_loop(lambda carry: carry[0] < upto[-1], body, start)
    return flat.reshape(state.shape)


def _tile(x: Array, length: Array, block: int) -> Array:
    """Atoms ``[T, 3]`` as ``[n, block, 3]``, NaN for those that do not exist."""
    x = jnp.where(
        (jnp.arange(x.shape[0], dtype=jnp.int32) < length)[:, None], x, jnp.nan
    )
    x = jnp.pad(x, ((0, -x.shape[0] % block), (0, 0)), constant_values=jnp.nan)
    return x.reshape(-1, block, 3)


def _boxes(x: Array) -> list[Array]:
    """Lower and upper corners ``[n, boxes, 3]`` of boxes around ``_BOX`` atoms each."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BOX), (0, 0)), constant_values=jnp.nan)
    x = x.reshape(x.shape[0], -1, _BOX, 3)
    return [jnp.nanmin(x, axis=2), jnp.nanmax(x, axis=2)]


def _join(boxes: list[Array]) -> list[Array]:
    """One box around all boxes of a block."""
    return [jnp.nanmin(boxes[0], axis=1), jnp.nanmax(boxes[1], axis=1)]


def _box_pairs(q: list[Array], kv: list[Array], limit: Array) -> Array:
    """Which boxes ``[..., n, 3]`` and ``[..., m, 3]`` come near; those at NaN do not.

    Rounding is monotone, so the gap between two boxes, rounded as the distances are,
    never exceeds the distance of a pair inside them.
    """
    squared = jnp.float32(0)
    for axis in range(3):
        low_q, high_q = (x[..., :, None, axis] for x in q)
        low_kv, high_kv = (x[..., None, :, axis] for x in kv)
        gap = jnp.maximum(jnp.maximum(low_q - high_kv, low_kv - high_q), 0)
        squared = squared + gap * gap
    return squared <= limit


def _checked(mask: BlockMask) -> BlockMask:
    traced = isinstance(mask.needed_capacity, Tracer)
    return mask if traced else mask.check()
