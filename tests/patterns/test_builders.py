"""Host builders against their dense definitions, by block and by element."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse import patterns
from jsparse.patterns import BlockState, _bits
from tests.patterns.oracle import SIZES, check_exact, untyped

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(params=[1, 1 << 24], ids=["strips of one row", "one strip"])
def strip_elements(request, monkeypatch):
    """Elements of a strip: the bits of a long pattern are made in many strips."""
    monkeypatch.setattr(_bits, "_CHUNK", request.param)


def blocks_of(sizes):
    q_len, kv_len, block_q, block_kv = sizes
    return q_len, kv_len, {"block_q": block_q, "block_kv": block_kv}


def random_dense(rng, shape, block_q, block_kv):
    """Empty, full and partial blocks, and empty rows and columns."""
    t, s = np.arange(shape[-2]) // block_q, np.arange(shape[-1]) // block_kv
    levels = rng.choice([0.0, 0.3, 1.0], (*shape[:-2], t[-1] + 1, s[-1] + 1))
    dense = rng.random(shape) < levels[..., t, :][..., s]
    dense[..., rng.random(shape[-2]) < 0.1, :] = False
    dense[..., rng.random(shape[-1]) < 0.1] = False
    return dense


# ------------------------------------------------------------------ from_dense


@given(SIZES, SEEDS, st.sampled_from([(), (1,), (3,), (1, 1), (2, 1), (1, 3), (2, 3)]))
def test_from_dense(sizes, seed, leading):
    q_len, kv_len, blocks = blocks_of(sizes)
    rng = np.random.default_rng(seed)
    dense = random_dense(rng, (*leading, q_len, kv_len), *blocks.values())
    check_exact(patterns.from_dense(dense, **blocks), dense)


@pytest.mark.usefixtures("strip_elements")
def test_from_dense_in_strips():
    dense = random_dense(np.random.default_rng(0), (2, 50, 61), 8, 8)
    check_exact(patterns.from_dense(dense, block_q=8, block_kv=8), dense)


@pytest.mark.parametrize("value", [False, True])
def test_from_dense_of_one_value_needs_no_bits(value):
    dense = np.full((10, 13), value)
    mask = patterns.from_dense(dense, block_q=4, block_kv=5)
    check_exact(mask, dense)
    assert mask.bits is None


def test_from_dense_stores_bits_for_one_missing_element():
    dense = np.ones((10, 13), bool)
    dense[9, 12] = False
    mask = patterns.from_dense(dense, block_q=4, block_kv=5)
    check_exact(mask, dense)
    assert mask.bits is not None


def test_from_dense_of_whole_and_partial_heads():
    dense = np.stack([np.ones((6, 6), bool), np.tri(6, dtype=bool)])
    check_exact(patterns.from_dense(dense, block_q=4, block_kv=4), dense)


def test_from_blocks_is_the_method_of_block_mask():
    assert patterns.from_blocks == patterns.BlockMask.from_blocks


# ---------------------------------------------------------------------- window


@given(
    SIZES,
    st.none() | st.integers(0, 90) | st.just(10**30),
    st.none() | st.integers(0, 90) | st.just(10**30),
)
def test_window(sizes, left, right):
    q_len, kv_len, blocks = blocks_of(sizes)
    t, s = np.arange(q_len)[:, None], np.arange(kv_len)
    dense = np.ones((q_len, kv_len), bool)
    if left is not None:
        dense &= s >= t - min(left, 1000)
    if right is not None:
        dense &= s <= t + min(right, 1000)
    mask = patterns.window(q_len, left=left, right=right, kv_len=kv_len, **blocks)
    check_exact(mask, dense)
    assert mask.bits is None


def test_window_past_the_last_key_lists_no_block():
    mask = patterns.window(20, left=1, right=1, kv_len=6, block_q=4, block_kv=4)
    check_exact(mask, np.abs(np.arange(20)[:, None] - np.arange(6)) <= 1)
    assert mask.block_states()[0, 0, 2:].tolist() == [[0, 0]] * 3


def test_causal_window():
    mask = patterns.window(9, left=None, right=0, block_q=2, block_kv=3)
    check_exact(mask, np.tri(9, dtype=bool))


# -------------------------------------------------------------------- segments


@given(SIZES, SEEDS, st.integers(1, 6), st.booleans())
def test_segments(sizes, seed, count, in_order):
    q_len, kv_len, blocks = blocks_of(sizes)
    rng = np.random.default_rng(seed)
    q_ids, kv_ids = (rng.integers(-2, count, n) for n in (q_len, kv_len))
    if in_order:
        q_ids, kv_ids = np.sort(q_ids), np.sort(kv_ids)
    mask = patterns.segments(q_ids, kv_ids, **blocks)
    check_exact(mask, q_ids[:, None] == kv_ids)
    assert mask.bits is None


@pytest.mark.parametrize("q_batch, kv_batch", [(3, 3), (3, 1), (1, 3), (3, None)])
def test_segments_of_a_batch(q_batch, kv_batch):
    rng = np.random.default_rng(0)
    q_ids = rng.integers(0, 3, (q_batch, 10))
    kv_ids = None if kv_batch is None else rng.integers(0, 3, (kv_batch, 7))
    mask = patterns.segments(q_ids, kv_ids, block_q=3, block_kv=2)
    keys = q_ids if kv_ids is None else kv_ids
    check_exact(mask, (q_ids[:, None, :, None] == keys[:, None, None, :]))
    assert mask.batch_size == 3


def test_segments_with_one_axis_on_one_side():
    q_ids, kv_ids = np.array([0, 1, 1]), np.array([[0, 1], [1, 1]])
    mask = patterns.segments(q_ids, kv_ids, block_q=2, block_kv=2)
    check_exact(mask, (q_ids[:, None] == kv_ids[:, None, None, :]))


def test_segments_with_labels_that_int32_cannot_hold():
    ids = np.array([0, 2**32, 2**40, 2**40, -(2**32), 0])
    mask = patterns.segments(ids, block_q=2, block_kv=2)
    check_exact(mask, ids[:, None] == ids)
    (rule,) = untyped(mask.rules)
    assert rule.q_ids.dtype == rule.kv_ids.dtype == np.int32


def test_segments_keep_narrow_labels():
    mask = patterns.segments(np.array([7, -3, 7], np.int8))
    assert untyped(mask.rules[0]).q_ids.tolist() == [[7, -3, 7]]


# --------------------------------------------------------------------- strided


@given(SIZES, st.integers(1, 90), st.integers(-100, 100))
def test_strided(sizes, stride, offset):
    q_len, kv_len, blocks = blocks_of(sizes)
    mask = patterns.strided(
        q_len, stride=stride, kv_len=kv_len, offset=offset, **blocks
    )
    t, s = np.arange(q_len)[:, None], np.arange(kv_len)
    check_exact(mask, (s - t - offset) % stride == 0)


def test_strided_takes_any_offset():
    far = patterns.strided(9, stride=7, offset=-(7**50) + 2, block_q=4, block_kv=4)
    near = patterns.strided(9, stride=7, offset=2, block_q=4, block_kv=4)
    np.testing.assert_array_equal(far.to_dense(), near.to_dense())


def test_strided_skips_blocks():
    mask = patterns.strided(64, stride=16, block_q=4, block_kv=4)
    assert mask.density == 0.25


# ---------------------------------------------------------------------- global


@given(SIZES, SEEDS, st.sampled_from([0, 1, 2, 50]))
def test_global(sizes, seed, count):
    q_len, kv_len, blocks = blocks_of(sizes)
    index = np.random.default_rng(seed).integers(0, min(q_len, kv_len), count)
    mask = patterns.global_(q_len, index=index, kv_len=kv_len, **blocks)
    dense = np.zeros((q_len, kv_len), bool)
    dense[index], dense[:, index] = True, True
    check_exact(mask, dense)


def test_global_takes_a_range():
    mask = patterns.global_(10, index=range(4), block_q=4, block_kv=4)
    assert mask.block_states()[0, 0].tolist() == [[2, 2, 1], [2, 0, 0], [1, 0, 0]]
    assert mask.bits is None
    assert patterns.global_(10, index=[], block_q=4, block_kv=4).num_blocks == 0


# ---------------------------------------------------------------------- random


@given(SIZES, SEEDS, st.floats(0, 1))
def test_random(sizes, seed, share):
    q_len, kv_len, blocks = blocks_of(sizes)
    nk = -(-kv_len // blocks["block_kv"])
    count = round(share * nk)
    args = {"blocks_per_row": count, "kv_len": kv_len, **blocks}
    mask = patterns.random(q_len, rng=seed, **args)
    states = mask.block_states()[0, 0]
    assert ((states != BlockState.EMPTY).sum(1) == count).all()
    dense = np.repeat(states != 0, blocks["block_q"], 0)[:q_len]
    check_exact(mask, np.repeat(dense, blocks["block_kv"], 1)[:, :kv_len])
    again = patterns.random(q_len, rng=np.random.default_rng(seed), **args)
    np.testing.assert_array_equal(again.block_states(), mask.block_states())


def test_random_draws_every_block_equally_often():
    mask = patterns.random(
        4000, blocks_per_row=3, rng=0, kv_len=10, block_q=1, block_kv=1
    )
    share = mask.to_dense()[0, 0].mean(0)
    np.testing.assert_allclose(share, 0.3, atol=0.04)  # over 5 standard deviations
    other = patterns.random(
        4000, blocks_per_row=3, rng=1, kv_len=10, block_q=1, block_kv=1
    )
    assert (other.to_dense() != mask.to_dense()).any()


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: patterns.from_dense(np.ones(4, bool)), r"from_dense: .*shape \(4,\)"),
        (lambda: patterns.from_dense(np.ones((0, 4), bool)), r"shape \(0, 4\)"),
        (lambda: patterns.from_dense(np.ones((0, 4, 4), bool)), r"shape \(0, 4, 4\)"),
        (lambda: patterns.from_dense(np.ones((4, 4))), r"dtype float64; expected bool"),
        (lambda: patterns.from_dense(np.ones((4, 4), bool), block_q=0), "block_q=0"),
        (lambda: patterns.window(4, left=True, right=1), r"left is True; expected"),
        (lambda: patterns.window(0, left=1, right=1), r"window: q_len=0"),
        (lambda: patterns.window(4, left=-1, right=1), r"window: left is -1; expected"),
        (
            lambda: patterns.window(4, left=1, right=untyped(1.5)),
            r"window: right is 1.5",
        ),
        (lambda: patterns.window(4, left=1, right=1, kv_len=0), r"window: kv_len=0"),
        (lambda: patterns.segments([]), r"segments: q_ids has shape \(0,\)"),
        (lambda: patterns.segments([0.5]), r"q_ids has .*dtype float64; expected"),
        (lambda: patterns.segments([0], [[[0]]]), r"kv_ids has shape \(1, 1, 1\)"),
        (lambda: patterns.segments([[0]] * 2, [[0]] * 3), r"q_ids has 2 batch .* 3"),
        (lambda: patterns.strided(4, stride=0), r"strided: stride is 0; expected"),
        (lambda: patterns.strided(4, stride=2, offset=untyped(0.5)), r"offset is 0.5"),
        (lambda: patterns.strided(-4, stride=2), r"strided: q_len=-4"),
        (
            lambda: patterns.global_(4, index=[4]),
            r"index spans 4 to 4; expected 0 to 3",
        ),
        (lambda: patterns.global_(4, index=[-1]), r"index spans -1 to -1"),
        (lambda: patterns.global_(4, index=[3], kv_len=3), r"expected 0 to 2"),
        (lambda: patterns.global_(4, index=[0.0]), r"dtype float64"),
        (lambda: patterns.global_(4, index=2), r"shape \(\)"),
        (
            lambda: patterns.random(4, blocks_per_row=2, rng=0),
            r"there are 1 key blocks",
        ),
        (lambda: patterns.random(4, blocks_per_row=-1, rng=0), r"blocks_per_row is -1"),
        (
            lambda: patterns.random(4, blocks_per_row=1, rng=untyped(None)),
            r"rng is None",
        ),
        (lambda: patterns.random(4, blocks_per_row=1, rng=-5), r"rng is -5"),
    ],
)
def test_builders_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "build, value, name",
    [
        (patterns.from_dense, np.ones((4, 4), bool), "from_dense: mask"),
        (patterns.segments, np.zeros(4, int), "segments: q_ids"),
        (lambda x: patterns.segments([0], [x, x]), 0, "segments: kv_ids"),
        (lambda x: patterns.global_(4, index=x), np.arange(2), "global_: index"),
        (lambda n: patterns.window(4, left=n, right=0), 1, "window: left"),
        (lambda n: patterns.window(n, left=1, right=0), 4, "window: q_len"),
        (lambda n: patterns.strided(4, stride=n), 2, "strided: stride"),
        (lambda n: patterns.random(4, blocks_per_row=1, rng=n), 0, "random: rng"),
    ],
)
def test_builders_refuse_traced_values(build, value, name):
    with pytest.raises(TypeError, match=f"{name} is traced; expected") as caught:
        jax.jit(build)(value)
    assert "patterns.device" not in str(caught.value)


@pytest.mark.parametrize("build", [patterns.from_dense, patterns.segments])
def test_builders_refuse_ragged_lists(build):
    with pytest.raises(ValueError, match="is not a rectangular array .* every row"):
        build([[1, 0], [1]])
