"""Dense definitions that the pattern tests compare with, and random masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from jsparse.patterns import BlockMask, BlockState, Distance, Segments, Window

LISTS = [
    (False, "kv_num_blocks", "kv_indices"),
    (True, "full_kv_num_blocks", "full_kv_indices"),
]


def untyped(value) -> Any:
    """The value without its type, where a test passes what annotations forbid."""
    return value


def rule_elements(rule, q_len, kv_len):
    """``[T, S]`` bool of one rule, element by element as its docstring says."""
    out = np.zeros((q_len, kv_len), bool)
    for t in range(q_len):
        for s in range(kv_len):
            if isinstance(rule, Segments):
                out[t, s] = rule.q_ids[0, t] == rule.kv_ids[0, s]
            elif isinstance(rule, Window):
                at, other = (t, s) if rule.side == "q" else (s, t)
                out[t, s] = rule.start[0, at] <= other < rule.stop[0, at]
            else:
                gap = np.float64(rule.q_coords[0, t]) - np.float64(rule.kv_coords[0, s])
                out[t, s] = (gap**2).sum() <= np.float64(rule.cutoff[0, 0]) ** 2
    return out


def states_of(dense, block_q, block_kv):
    """The states that describe ``[..., T, S]`` with the fewest partial blocks."""
    q_len, kv_len = dense.shape[-2:]
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    out = np.zeros((*dense.shape[:-2], nq, nk), np.int8)
    for i in range(nq):
        for j in range(nk):
            tile = dense[
                ..., i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv
            ]
            out[..., i, j] = np.where(
                tile.any((-2, -1)), BlockState.PARTIAL, BlockState.EMPTY
            )
            if tile.shape[-2:] == (block_q, block_kv):
                out[..., i, j][tile.all((-2, -1))] = BlockState.FULL
    return out


def check_lists(mask):
    """The four lists agree with each other, ascend, and are no wider than needed."""
    states = mask.block_states()
    for side, name in ((states, ""), (states.swapaxes(2, 3), "transposed ")):
        for is_full, counts_name, indices_name in LISTS:
            if name:
                counts_name = counts_name.replace("kv", "q")
                indices_name = indices_name.replace("kv", "q")
            counts, indices = getattr(mask, counts_name), getattr(mask, indices_name)
            assert counts.dtype == indices.dtype == np.int32
            assert indices.shape == (*counts.shape, counts.max())
            state = BlockState.FULL if is_full else BlockState.PARTIAL
            for at in np.ndindex(counts.shape):
                expected = np.flatnonzero(side[at] == state)
                np.testing.assert_array_equal(indices[at][: counts[at]], expected)
                assert (indices[at][counts[at] :] == 0).all()
    partial = int(mask.kv_num_blocks.sum((1, 2)).max())
    if mask.bits is not None:
        words = -(-mask.block_kv // 32)
        assert mask.bits.shape == (mask.batch_size, partial, mask.block_q, words)
        assert mask.bits.dtype == np.uint32


def check_exact(mask, dense):
    """The mask is ``dense`` in the fewest blocks, none partial that could be full."""
    dense = np.asarray(dense)
    dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
    np.testing.assert_array_equal(mask.to_dense(), dense)
    states = states_of(dense, mask.block_q, mask.block_kv)
    np.testing.assert_array_equal(mask.block_states(), states)
    check_lists(mask)


SIZES = st.tuples(
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from([1, 3, 8, 40]),
    st.sampled_from([4, 7, 32, 40]),
)
RULES = ("segments", "window", "distance")


def make_rule(kind, rng, q_len, kv_len):
    if kind == "segments":
        return Segments(
            rng.integers(0, 3, (1, q_len), np.int32),
            rng.integers(0, 3, (1, kv_len), np.int32),
        )
    if kind == "window":
        start = rng.integers(0, kv_len + 1, (1, q_len), np.int32)
        width = rng.integers(0, kv_len + 1, (1, q_len), np.int32)
        return Window(start, np.minimum(start + width, kv_len).astype(np.int32))
    x, y = (rng.standard_normal((1, n, 3)).astype(np.float32) for n in (q_len, kv_len))
    return Distance(x, y, np.full((1, 1), 1.5, np.float32))


@st.composite
def masks(draw, sizes=None, kinds=None):
    """A mask and its dense form; pairs may be none, all, or repeated."""
    q_len, kv_len, block_q, block_kv = sizes or draw(SIZES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    count = draw(st.sampled_from([0, 1, 3, 3 * nq * nk]))
    rows, cols = rng.integers(0, nq, count), rng.integers(0, nk, count)
    if kinds is None:
        kinds = draw(st.sets(st.sampled_from(RULES)))
    rules = tuple(make_rule(kind, rng, q_len, kv_len) for kind in sorted(kinds))
    elements = rng.random((count, block_q, block_kv)) < 0.4
    if not draw(st.booleans()):
        elements = None
    full = rng.random(count) < 0.3
    if rules or not draw(st.booleans()):
        full = None
    dense = np.zeros((nq * block_q, nk * block_kv), bool)
    for n, (i, j) in enumerate(zip(rows, cols, strict=True)):
        tile = np.s_[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
        if elements is None or (full is not None and full[n]):
            dense[tile] = True
        else:
            dense[tile] |= elements[n]
    dense = dense[:q_len, :kv_len]
    for rule in rules:
        dense = dense & rule_elements(rule, q_len, kv_len)
    mask = BlockMask.from_blocks(
        rows,
        cols,
        q_len=q_len,
        kv_len=kv_len,
        block_q=block_q,
        block_kv=block_kv,
        full=full,
        elements=elements,
        rules=rules,
    )
    return mask, dense[None, None]


@st.composite
def alike(draw, count=2):
    """Several masks of equal sizes, each with its dense form."""
    sizes = draw(SIZES)
    return [draw(masks(sizes)) for _ in range(count)]
