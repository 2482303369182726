"""The check that results are judged by: it must pass right rows and no others."""

from __future__ import annotations

import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import block_sparse_attention, patterns
from jsparse.measure import (
    _rows,
    check_rows,
    choose_rows,
    expect_rows,
    within_cutoff,
)


@pytest.fixture(scope="module")
def problem() -> Any:
    rng = np.random.default_rng(3)
    coords = rng.uniform(0, 30, (400, 3)).astype(np.float32)
    mask = patterns.radius(coords, 8.0, block_q=32, block_kv=32)
    q, k, v, dout = (
        jnp.asarray(rng.standard_normal((400, 2, 16), np.float32)) for _ in range(4)
    )
    rows = choose_rows(400, 50)
    return coords, mask, (q, k, v), dout, rows


def dense(q, k, v, allowed):
    """Attention of every row, element by element, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for h in range(q.shape[1]):
        for t in range(len(q)):
            seen = np.flatnonzero(allowed[t])
            if len(seen) == 0:
                continue
            logits = k[seen, h] @ q[t, h] / np.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            out[t, h] = weights @ v[seen, h] / weights.sum()
    return out


def test_expected_rows_are_dense_attention(problem):
    coords, mask, (q, k, v), _, rows = problem
    allowed = mask.to_dense()[0, 0]
    found = check_rows(
        dense(q, k, v, allowed), rows, q, k, v, within_cutoff(coords, rows, 8)
    )
    assert found.ok
    assert found.max_error < 1e-14
    assert found.rows == 50


def test_accepts_the_operation(problem):
    coords, mask, (q, k, v), _, rows = problem
    out = block_sparse_attention(q, k, v, mask)
    found = check_rows(out, rows, q, k, v, within_cutoff(coords, rows, 8.0))
    assert found.ok
    assert 0 < found.max_error <= found.tolerance < 1e-4


@pytest.mark.parametrize("damage", ["scaled", "one element", "nan", "other cut-off"])
def test_rejects_wrong_rows(problem, damage):
    coords, mask, (q, k, v), _, rows = problem
    cutoff = 8.0
    if damage == "other cut-off":
        mask, cutoff = patterns.radius(coords, 7.9, block_q=32, block_kv=32), 8.0
    out = np.array(block_sparse_attention(q, k, v, mask))
    if damage == "scaled":
        out *= 1.001
    elif damage == "one element":
        out[rows[7], 1, 3] += 1e-3
    elif damage == "nan":
        out[rows[0], 0, 0] = np.nan
    found = check_rows(out, rows, q, k, v, within_cutoff(coords, rows, cutoff))
    assert not found.ok


def test_damage_outside_the_rows_is_not_looked_at(problem):
    coords, mask, (q, k, v), _, rows = problem
    out = np.array(block_sparse_attention(q, k, v, mask))
    out[np.setdiff1d(np.arange(400), rows)] = np.nan
    assert check_rows(out, rows, q, k, v, within_cutoff(coords, rows, 8.0)).ok


def test_gradient_of_q(problem):
    coords, mask, (q, k, v), dout, rows = problem
    _, pull = jax.vjp(lambda q: block_sparse_attention(q, k, v, mask), q)
    (dq,) = pull(dout)
    near = within_cutoff(coords, rows, 8.0)
    assert check_rows(dq, rows, q, k, v, near, dout=dout).ok
    assert not check_rows(dq * 1.01, rows, q, k, v, near, dout=dout).ok
    assert not check_rows(dq, rows, q, k, v, near, dout=dout * 1.01).ok


def test_rows_that_see_nothing_are_zero():
    x = np.ones((3, 1, 4), np.float32)
    nothing = (np.zeros((3, 3), bool),)
    assert check_rows(x * 0, np.arange(3), x, x, x, nothing).ok
    assert not check_rows(x, np.arange(3), x, x, x, nothing).ok


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_tolerance_follows_the_dtype(problem, dtype):
    coords, mask, (q, k, v), _, rows = problem
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    near = within_cutoff(coords, rows, 8.0)
    found = check_rows(block_sparse_attention(q, k, v, mask), rows, q, k, v, near)
    assert found.ok
    assert found.tolerance > 1e-3


@pytest.mark.parametrize("y, inside", [(6.0000005, False), (5.9999995, True)])
def test_pair_at_the_cutoff_may_be_read_either_way(y, inside):
    # In float32 these two are 10 Å apart to within rounding, but not exactly.
    coords = np.array([[0, 0, 0], [0, y, 8], [1, 0, 0]], np.float32)
    rows = np.arange(3)
    near = within_cutoff(coords, rows, 10.0)
    assert [m[0].tolist() for m in near] == [
        [True, inside, True],
        [True, False, True],
        [True, True, True],
    ]
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 1, 4), np.float32) for _ in range(3))
    for reading in near:
        found = check_rows(dense(q, k, v, reading), rows, q, k, v, near)
        assert found.ok
        assert found.uncertain_rows == 2
    third = near[0].copy()
    third[0] = [True, False, False]
    assert not check_rows(dense(q, k, v, third), rows, q, k, v, near).ok


def test_exact_pair_at_the_cutoff_is_inside():
    coords = np.array([[0, 0, 0], [0, 6, 8], [50, 0, 0]], np.float32)
    near = within_cutoff(coords, np.array([0]), 10.0)
    assert near[0].tolist() == [[True, True, False]]


def test_rows_of_a_long_sequence_take_little_memory():
    length = 102_400
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        jnp.asarray(rng.standard_normal((length, 1, 8), np.float32), jnp.float16)
        for _ in range(4)
    )
    rows = choose_rows(length, 64)
    allowed = np.zeros((len(rows), length), bool)
    for mask, row in zip(allowed, rows // 128 * 128, strict=True):
        mask[row : row + 128] = True
    every = np.broadcast_to(np.True_, (8, length))
    tracemalloc.start()
    try:
        for cotangent in (None, dout):
            found = expect_rows(rows, q, k, v, (allowed,), q.dtype, dout=cotangent)
            assert found.check(found.plain).ok
            expect_rows(rows[:8], q, k, v, (every,), q.dtype, dout=cotangent)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < length * length / 50


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_few_keys_and_many_are_summed_alike(share):
    rng = np.random.default_rng(1)
    q, k, v, dout = (rng.standard_normal((60, 2, 8)) for _ in range(4))
    allowed = rng.random((60, 60)) < share
    rows = np.arange(60)
    out = expect_rows(rows, q, k, v, (allowed,), np.float64).exact
    np.testing.assert_allclose(out, dense(q, k, v, allowed), atol=1e-13)
    slow = expect_rows(rows, q, k, v, (allowed,), np.float64, dout=dout).exact
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(_rows, "_SPARSE", 1.0 if share > 0.5 else 0.0)
        other = expect_rows(rows, q, k, v, (allowed,), np.float64, dout=dout).exact
    np.testing.assert_allclose(slow, other, atol=1e-13)


def test_chosen_rows_are_different_and_the_same_each_time():
    rows = choose_rows(10_000)
    assert len(np.unique(rows)) == 256
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, choose_rows(10_000))
    assert (choose_rows(10_000, seed=1) != rows).any()
