"""Gradients of the xla backend where values or cotangents are NaN or infinite.

A row that attends to such a value is NaN, so its ``delta`` is, and with it every
gradient that the row takes part in; the kernel itself sees zeros in the value's place.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import block_sparse_attention
from tests.support.cases import CASES

KEY = 40


def gradients(case, lse_alone=False):
    """``dq, dk, dbias`` under jit; with ``lse_alone`` the cotangent of out is zero."""
    found = _gradients(
        *(getattr(case, f.name) for f in dataclasses.fields(case)), lse_alone
    )
    return [np.asarray(x) for x in found]


@functools.partial(jax.jit, static_argnums=7)
def _gradients(q, k, v, mask, bias, dout, dlse, lse_alone):
    def total(q, k, bias):
        out, lse = block_sparse_attention(
            q, k, v, mask, bias=bias, return_lse=True, implementation="xla"
        )
        out = jnp.zeros_like(out) if lse_alone else out
        return (out * dout).sum() + jnp.where(jnp.isfinite(lse), lse * dlse, 0).sum()

    return jax.grad(total, (0, 1, 2))(q, k, bias)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dout", ["normal", "zero", "bad", "large"])
def test_bad_value_reaches_the_gradients_of_its_rows(value, dout):
    rng = np.random.default_rng(17)
    case = CASES["plain"](rng)
    # Elements of bias -inf are masked: what they hide reaches nobody.
    hidden = rng.random((case.mask.q_len, case.mask.kv_len)) < 0.3
    seen = case.mask.to_dense()[0, 0] & ~hidden
    rows = seen[:, KEY]
    assert 0 < rows.sum() < seen.any(1).sum()
    assert (case.mask.to_dense()[0, 0] & hidden)[:, KEY].any()
    cotangent = case.dout.copy()
    if dout == "zero":
        cotangent[:] = 0
    elif dout == "bad":
        cotangent[rows] = np.where(rng.random(16) < 0.5, np.nan, -np.inf)
    elif dout == "large":
        cotangent *= 1e30
    clean = dataclasses.replace(
        case, bias=np.where(hidden, -np.inf, 0).astype(np.float32), dout=cotangent
    )
    poisoned = clean.v.copy()
    poisoned[KEY, 1, 3] = value
    found = gradients(dataclasses.replace(clean, v=poisoned))
    truth = gradients(clean)
    keys = seen[rows].any(0)
    for name, x, y, bad in zip(("dq", "dk"), found, truth, (rows, keys), strict=False):
        assert np.isnan(x[bad, 1]).all(), name
        np.testing.assert_array_equal(x[~bad], y[~bad], err_msg=name)
        np.testing.assert_array_equal(x[:, 0], y[:, 0], err_msg=f"{name}, other head")
    dbias = found[2]
    assert np.isnan(dbias[seen & rows[:, None]]).all()
    assert not dbias[~seen].any()
    np.testing.assert_array_equal(dbias[~rows], truth[2][~rows])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_value_reaches_the_gradient_through_lse_alone(value):
    # 0 * NaN is NaN, also where the compiler knows that the cotangent is zero.
    case = CASES["plain"](np.random.default_rng(18))
    case.bias = np.zeros((case.mask.q_len, case.mask.kv_len), np.float32)
    rows = case.mask.to_dense()[0, 0][:, KEY]
    poisoned = case.v.copy()
    poisoned[KEY, 1, 3] = value
    dq = gradients(dataclasses.replace(case, v=poisoned), lse_alone=True)[0]
    clean = gradients(case, lse_alone=True)[0]
    assert np.isnan(dq[rows, 1]).all()
    np.testing.assert_array_equal(dq[~rows], clean[~rows])
