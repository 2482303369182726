"""Named attention problems that cover the semantics every backend must obey."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import BlockBias, BlockMask, DistanceBias
from jsparse.bias import EntryBias
from jsparse.patterns import Distance, Segments, Window, device


@dataclasses.dataclass
class Case:
    """Inputs and random cotangents of one call; arrays are NumPy."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: BlockMask
    bias: Any
    dout: np.ndarray
    dlse: np.ndarray

    def cast(self, dtype) -> Case:
        """The same case with q, k, v and dout rounded to ``dtype``."""
        names = ("q", "k", "v", "dout")
        cast = {n: jnp.asarray(getattr(self, n)).astype(dtype) for n in names}
        if cast["q"].dtype.itemsize == 8:
            cast["dlse"] = jnp.asarray(self.dlse).astype(dtype)
        return dataclasses.replace(self, **cast)


def random_mask(
    rng: np.random.Generator,
    sizes: tuple[int, int, int, int],
    count: int,
    *,
    elements: bool = True,
    rules: tuple = (),
) -> BlockMask:
    """``count`` random block pairs; without rules, about half of them full."""
    q_len, kv_len, block_q, block_kv = sizes
    rows = rng.integers(0, -(-q_len // block_q), count)
    cols = rng.integers(0, -(-kv_len // block_kv), count)
    return BlockMask.from_blocks(
        rows,
        cols,
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        full=None if rules else rng.random(count) < 0.5,
        elements=rng.random((count, block_q, block_kv)) < 0.5 if elements else None,
        rules=rules,
    )


def of_all_blocks(q_len: int, kv_len: int, block_kv: int = 128) -> BlockMask:
    """A mask whose rows list every block, partial only where tokens end."""
    shape = -(-q_len // 128), -(-kv_len // block_kv)
    rows, cols = (x.reshape(-1) for x in np.indices(shape))
    return BlockMask.from_blocks(
        rows, cols, q_len=q_len, kv_len=kv_len, block_kv=block_kv
    )


def uneven_rows(
    rng: np.random.Generator,
    counts: tuple[int, int],
    sizes: tuple[int, int, int, int],
) -> BlockMask:
    """Two rows of so many blocks, every other block full."""
    q_len, kv_len, block_q, block_kv = sizes
    count = sum(counts)
    return BlockMask.from_blocks(
        np.repeat([0, 1], counts),
        np.concatenate([np.arange(n) for n in counts]),
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        elements=rng.random((count, block_q, block_kv)) < 0.5,
        full=np.arange(count) % 2 == 0,
    )


def one_kind(
    rng: np.random.Generator, sizes: tuple[int, int, int, int], full: bool
) -> BlockMask:
    """Three blocks that are all full, or all partial."""
    q_len, kv_len, block_q, block_kv = sizes
    return BlockMask.from_blocks(
        *([0, 1, 2], [1, 0, 1]),
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        elements=full | (rng.random((3, block_q, block_kv)) < 0.5),
    )


def make_case(
    rng: np.random.Generator,
    mask: BlockMask,
    *,
    batch: tuple[int, ...] = (),
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16),
    bias: Any = None,
) -> Case:
    """Standard-normal inputs and cotangents for a mask."""
    q_len, kv_len = mask.q_len, mask.kv_len

    def normal(*shape):
        return rng.standard_normal((*batch, *shape)).astype(np.float32)

    return Case(
        q=normal(q_len, heads[0], dims[0]),
        k=normal(kv_len, heads[1], dims[0]),
        v=normal(kv_len, heads[1], dims[1]),
        mask=mask,
        bias=bias,
        dout=normal(q_len, heads[0], dims[1]),
        dlse=normal(heads[0], q_len),
    )


def growing_logits(rng: np.random.Generator, dim: int) -> Case:
    """Six full blocks a row, each with logits three times those of the one before."""
    mask = BlockMask.from_blocks(
        np.repeat([0, 1], 6), np.tile(np.arange(6), 2), q_len=256, kv_len=768
    )
    case = make_case(rng, mask, heads=(1, 1), dims=(dim, dim))
    growth = 3.0 ** (np.arange(768) // 128)
    return dataclasses.replace(case, k=case.k * growth[:, None, None])


MOVES = ("all-gather", "all-to-all", "collective-permute")
"""Operations of compiled HLO that bring whole arrays to other devices."""

SIZES = (37, 75, 8, 32)  # ragged in both directions, several blocks each way


def _fraction(length: int, part: float) -> int:
    return max(1, round(length * part))


def _plain(rng, sizes=SIZES):
    return make_case(rng, random_mask(rng, sizes, 12))


def _long_lists(rng, sizes=SIZES):
    # More listed blocks than one step of any backend takes: its loops really loop.
    _, _, block_q, block_kv = sizes
    sizes = (4 * block_q + 6, 18 * block_kv + 24, block_q, block_kv)
    mask = random_mask(rng, sizes, 160)
    return make_case(rng, mask)


def _grouped_query(rng, sizes=SIZES):
    return make_case(rng, random_mask(rng, sizes, 9), heads=(4, 2), dims=(16, 24))


def _head_patterns(rng, sizes=SIZES):
    masks = [random_mask(rng, sizes, 9) for _ in range(4)]
    return make_case(rng, BlockMask.stack(masks, "head"), heads=(4, 2))


def _batch_patterns(rng, sizes=SIZES):
    masks = [random_mask(rng, sizes, 9) for _ in range(2)]
    return make_case(rng, BlockMask.stack(masks, "batch"), batch=(2,))


def _batch_and_head_patterns(rng, sizes=SIZES):
    rows = [
        BlockMask.stack([random_mask(rng, sizes, 12) for _ in range(2)], "head")
        for _ in range(2)
    ]
    return make_case(rng, BlockMask.stack(rows, "batch"), batch=(2,))


def _segments(rng, sizes=SIZES):
    ids = [rng.integers(0, 3, (1, n)).astype(np.int32) for n in sizes[:2]]
    return make_case(rng, random_mask(rng, sizes, 12, rules=(Segments(*ids),)))


def _window(rng, sizes=SIZES):
    start = rng.integers(0, _fraction(sizes[1], 0.5), (1, sizes[0])).astype(np.int32)
    rule = Window(start, start + np.int32(_fraction(sizes[1], 0.25)))
    return make_case(rng, random_mask(rng, sizes, 12, rules=(rule,)))


def _distance(rng, sizes=SIZES):
    q, kv = (rng.standard_normal((1, n, 3)).astype(np.float32) for n in sizes[:2])
    rule = Distance(q, kv, np.full((1, 1), 1.5, np.float32))
    return make_case(rng, random_mask(rng, sizes, 12, rules=(rule,), elements=False))


def _lengths(rng, sizes=SIZES):
    q_len, kv_len, *blocks = sizes
    lengths = (_fraction(q_len, 0.8), _fraction(kv_len, 0.55))
    small = random_mask(rng, (*lengths, *blocks), 6)
    return make_case(rng, small.pad_to(q_len, kv_len, capacity=6))


def _groups(rng, sizes=SIZES):
    _, _, *blocks = sizes
    masks = [
        random_mask(rng, (n, n + blocks[1] // 3, *blocks), 4)
        for n in (_fraction(blocks[0], x) for x in (0.6, 3, 2.1))
    ]
    return make_case(rng, BlockMask.concatenate(masks))


def _one_block(rng, sizes=SIZES):
    q_len, _, block, _ = sizes
    mask = BlockMask.from_blocks([2], [1], q_len=q_len, block_q=block, block_kv=block)
    return make_case(rng, mask)


def _nothing(rng, sizes=SIZES):
    q_len, _, block, _ = sizes
    mask = BlockMask.from_blocks([], [], q_len=q_len, block_q=block, block_kv=block)
    return make_case(rng, mask)


def _everything(rng, sizes=SIZES):
    q_len, kv_len, block_q, block_kv = sizes
    grid = -(-q_len // block_q), -(-kv_len // block_kv)
    rows, cols = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    mask = BlockMask.from_blocks(
        rows, cols, q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv
    )
    return make_case(rng, mask)


CASES: dict[str, Callable[..., Case]] = {
    f.__name__.lstrip("_"): f
    for f in (
        _plain,
        _long_lists,
        _grouped_query,
        _head_patterns,
        _batch_patterns,
        _batch_and_head_patterns,
        _segments,
        _window,
        _distance,
        _lengths,
        _groups,
        _one_block,
        _nothing,
        _everything,
    )
}


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def biases(rng: np.random.Generator, mask: BlockMask, heads: int, batch: int) -> dict:
    """One bias of every kind for a mask."""
    q_len, kv_len = mask.q_len, mask.kv_len
    x, y = (3 * _normal(rng, n, 3) for n in (q_len, kv_len))
    xs = np.stack([x] * batch) + _normal(rng, batch, 1, 1)
    per_pattern = np.asarray(mask.kv_num_blocks) + np.asarray(mask.full_kv_num_blocks)
    blocks = int(per_pattern.sum((1, 2)).max())
    block_heads = 1 if mask.num_heads > 1 else heads
    return {
        "dense": _normal(rng, batch, heads, q_len, kv_len),
        "dense_shared_batch": _normal(rng, 1, heads, q_len, kv_len),
        "dense_shared_heads": _normal(rng, batch, 1, q_len, kv_len),
        "dense_2d": _normal(rng, q_len, kv_len),
        "per_key": _normal(rng, heads, 1, kv_len),
        "block": BlockBias(
            _normal(
                rng, mask.batch_size, block_heads, blocks, mask.block_q, mask.block_kv
            )
        ),
        "block_shared_heads": BlockBias(
            _normal(rng, 1, 1, blocks, mask.block_q, mask.block_kv)
        ),
        "linear": DistanceBias.linear(np.abs(_normal(rng, heads)), x, y),
        "quadratic": DistanceBias.quadratic(np.abs(_normal(rng, 1)), xs, y),
        "table": DistanceBias.table(_normal(rng, heads, 7), 6.0, x, y),
        "gaussian": DistanceBias.gaussian(
            _normal(rng, heads, 5), np.linspace(0, 6, 5), 1.5, xs, y
        ),
    }


def cast_bias(bias: Any, dtype: str) -> Any:
    """The values of a bias in another dtype; one by distance is float32 always."""
    if isinstance(bias, DistanceBias):
        return bias

    def cast(x):
        return jnp.asarray(x).astype(dtype if x.dtype.kind != "i" else x.dtype)

    return jax.tree_util.tree_map(cast, bias)


def with_bias(case: Case, kind: str, dtype: str = "float32") -> Case:
    """The case with a bias; a dense one has no batch axis where the case has none."""
    batch = case.q.shape[:-3]
    heads, count = case.q.shape[-2], int(np.prod(batch))
    made = biases(np.random.default_rng(8), case.mask, heads, count)[kind]
    if not batch and isinstance(made, np.ndarray) and made.ndim == 4:
        made = made[0]
    return dataclasses.replace(case, bias=cast_bias(made, dtype))


ENTRIES = {
    "entry": (2, True, 24),
    "entry_shared_heads": (2, False, 21),
    "entry_shared_batch": (1, True, 24),
}
"""Of an `EntryBias`: batch entries, of two in all, whether heads have their own, and
entries of a list, not always what TMA copies."""


def with_entries(
    kind: str, sizes: tuple[int, int, int, int], *, patterns: int = 1, dim: int = 32
) -> Case:
    """A case of two batch entries beside one of `ENTRIES`.

    Lists name keys of some blocks, in any order, some of them twice, and some that do
    not exist. Nobody may read the values of entries that do not count.
    """
    rng = np.random.default_rng(14)
    q_len, kv_len, block_q, block_kv = sizes
    batch, own_heads, length = ENTRIES[kind]
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    some = np.arange(max(1, nk // 2))
    shape = patterns, q_len, length
    near = rng.permuted(np.tile(np.arange(nk), (patterns, nq, 1)), axis=2)
    block = near[:, np.arange(q_len)[:, None] // block_q, rng.choice(some, shape[1:])]
    index = block * block_kv + rng.integers(0, block_kv, shape)
    absent = (rng.random(shape) < 0.1) | (index >= kv_len)
    index = np.where(absent, rng.integers(-9, 0, shape), index)
    mask = device.neighbors(
        jnp.asarray(index),
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        capacity=len(some),
        q_capacity=nq,
    )
    mask = jax.tree_util.tree_map(np.asarray, mask)
    case = make_case(rng, mask, batch=(2,), heads=(4, 2), dims=(dim, dim))
    values = _normal(rng, batch, 4 if own_heads else 1, *shape[1:])
    counted = _counted(index, kv_len)
    counted = counted if batch == patterns else counted.any(0)
    values = np.where(counted[..., None, :, :], values, np.nan).astype(np.float32)
    return dataclasses.replace(case, bias=EntryBias(values, index.astype(np.int32)))


def _counted(index: np.ndarray, kv_len: int) -> np.ndarray:
    """Which entries of lists exist, and are the first of their key."""
    counted = (index >= 0) & (index < kv_len)
    for n in range(1, index.shape[-1]):
        counted[..., n] &= (index[..., :n] != index[..., n : n + 1]).all(-1)
    return counted


def pair(
    sizes: tuple[int, int, int, int], dim: int = 32, batch: tuple[int, ...] = (2,)
) -> Case:
    """Two batch entries, query heads that share key heads."""
    rng = np.random.default_rng(12)
    mask = random_mask(rng, sizes, 12)
    return make_case(rng, mask, batch=batch, heads=(4, 2), dims=(dim, dim))
