"""The backward pass alone: what `jax.vjp` gives, and of some keys their share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jsparse import BlockBias, BlockMask, CapacityError, block_sparse_attention
from jsparse.bias import ScoreFunction
from jsparse.ops import gradients
from tests.backends import test_contract as contract
from tests.support.cases import CASES, SIZES, Case, biases, make_case, random_mask
from tests.support.meshes import mesh_of_two

EPS = 3e-6


def alone(implementation: Any, case: Case, **options):
    """dq, dk, dv and dbias of a case from its own out and lse."""
    out, lse = contract.run_case(implementation, case)[:2]
    dlse = jnp.where(jnp.isfinite(lse), case.dlse, 0)

    @jax.jit
    def run(q, k, v, out, lse, dout, dlse, bias):
        rows = out, lse, dout, dlse
        return gradients(
            *(q, k, v, case.mask, *rows),
            bias=bias,
            implementation=implementation,
            **options,
        )

    return run(case.q, case.k, case.v, out, lse, case.dout, dlse, case.bias)


@pytest.mark.parametrize("name", ["plain", "grouped_query", "batch_and_head_patterns"])
@pytest.mark.parametrize("implementation", contract.BACKENDS)
def test_gives_what_vjp_gives(implementation, name):
    case = contract.named(implementation, name, np.random.default_rng(0))
    _, _, *truth = contract.run_case(implementation, case)
    for x, y in zip(alone(implementation, case)[:3], truth, strict=False):
        np.testing.assert_allclose(x, y, rtol=0, atol=EPS * np.abs(y).max())


@pytest.mark.parametrize("kind", ["dense_shared_heads", "block", "gaussian"])
@pytest.mark.parametrize("implementation", contract.WITH_BIAS)
def test_gradient_of_a_bias(implementation, kind):
    rng = np.random.default_rng(1)
    mask = random_mask(rng, SIZES, 8)
    case = make_case(rng, mask, batch=(2,), heads=(2, 1))
    case.bias = biases(rng, mask, 2, 2)[kind]
    *_, truth = contract.run_case(implementation, case)
    *_, found = alone(implementation, case)
    assert type(found) is type(jax.tree.map(jnp.asarray, case.bias))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=EPS * (np.abs(y).max() + 1))
    *qkv, nothing = alone(implementation, case, bias_gradient=False)
    assert nothing is None
    assert all(np.isfinite(x).all() for x in qkv)


@pytest.mark.parametrize("implementation", contract.WITH_BIAS)
def test_integers_of_a_score_function_have_no_gradient(implementation):
    def score(score, q_index, kv_index, head, slope, kind):
        return score - slope[head] * jnp.where(kind[q_index] == kind[kv_index], 1, 2)

    case = CASES["plain"](np.random.default_rng(2))
    length = max(SIZES[:2])
    arrays = np.ones(2, np.float32), np.arange(length, dtype=np.int32) % 3
    case.bias = ScoreFunction(score, arrays)
    *_, found = alone(implementation, case)
    slope, kind = found.arrays
    assert slope.shape == (2,)
    assert np.abs(slope).min() > 0
    assert kind is None


@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        *(pytest.param(x, marks=pytest.mark.gpu) for x in ("mosaic_gpu", "cutlass")),
    ],
)
def test_some_keys_give_their_share(implementation):
    q_len, _, block_q, block_kv = contract.sizes_of(implementation)
    kv_len, rng = 4 * block_kv, np.random.default_rng(3)
    rows = -(-q_len // block_q)

    def mask_of(first, last):
        pairs = [(n, m) for n in range(rows) for m in range(first, last)]
        return BlockMask.from_blocks(
            *zip(*[(n, m - first) for n, m in pairs], strict=True),
            q_len=q_len,
            kv_len=(last - first) * block_kv,
            block_q=block_q,
            block_kv=block_kv,
        )

    case = contract.made(implementation, rng, mask_of(0, 4))
    out, lse, dq, dk, dv, _ = contract.run_case(implementation, case)
    found = []
    for first, last in ((0, 1), (1, 4)):
        keys = slice(first * block_kv, last * block_kv)
        part = gradients(
            case.q,
            *(case.k[..., keys, :, :], case.v[..., keys, :, :]),
            mask_of(first, last),
            *(out, lse, case.dout, case.dlse),
            implementation=implementation,
        )
        found.append(part[:3])
    assert kv_len == case.k.shape[-3]
    share, of_k, of_v = zip(*found, strict=True)
    limit = contract.limit_of(implementation, EPS)
    assert contract.error(sum(x.astype(jnp.float32) for x in share), dq) < limit
    assert contract.error(jnp.concatenate(of_k, -3), dk) < limit
    assert contract.error(jnp.concatenate(of_v, -3), dv) < limit


@pytest.mark.parametrize("implementation", contract.WITH_BIAS)
def test_on_a_mesh_with_explicit_axes(implementation):
    mesh = mesh_of_two(AxisType.Explicit)
    rng = np.random.default_rng(7)
    case = make_case(rng, random_mask(rng, SIZES, 8), batch=(2,))
    rows = *contract.run_case(implementation, case)[:2], case.dout

    @jax.jit
    def run(q, k, v, *rows):
        return gradients(q, k, v, case.mask, *rows, implementation=implementation)[:3]

    truth = run(case.q, case.k, case.v, *rows)
    with jax.set_mesh(mesh):
        args = jax.device_put((case.q, case.k, case.v, *rows), jax.P("x"))
        found = run(*args)
    for x, y in zip(found, truth, strict=True):
        assert jax.typeof(x).sharding.spec[0] == "x"
        np.testing.assert_allclose(x, y, rtol=0, atol=EPS * np.abs(y).max())


def test_overflow_is_never_silent():
    case = CASES["plain"](np.random.default_rng(4))
    needed = np.array([[*case.mask.capacity]], np.int32)
    case.mask = dataclasses.replace(case.mask, needed_capacity=needed + 1)
    rows = np.zeros_like(case.dout), case.dlse, case.dout
    with pytest.raises(CapacityError):
        gradients(case.q, case.k, case.v, case.mask, *rows)
    found = jax.jit(gradients)(case.q, case.k, case.v, case.mask, *rows)
    assert all(np.isnan(x).any() for x in found[:3])


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("out", lambda x: x[..., :3], r"out has shape .* expected \(.*\) and float32"),
        (
            "lse",
            lambda x: x.swapaxes(-1, -2),
            r"lse has .* expected \(.*\) and float32,",
        ),
        ("dout", lambda x: x[:7], "dout has shape"),
        ("dlse", lambda x: x[..., 1:], "dlse has shape"),
    ],
)
def test_other_rows_are_refused(name, change, message):
    case = CASES["plain"](np.random.default_rng(5))
    rows = {"out": case.dout, "lse": case.dlse, "dout": case.dout, "dlse": case.dlse}
    rows[name] = change(rows[name])
    with pytest.raises(ValueError, match=message):
        gradients(case.q, case.k, case.v, case.mask, *rows.values())


def test_rows_of_another_dtype_are_refused():
    case = CASES["plain"](np.random.default_rng(5))
    rows = case.dout, case.dlse, case.dout.astype(np.float16)
    with pytest.raises(TypeError, match="gradients: dout has .* and dtype float16"):
        gradients(case.q, case.k, case.v, case.mask, *rows)


@pytest.mark.parametrize("implementation", contract.WITH_BIAS)
def test_vmap_gives_each_its_own(implementation):
    """Also of what they share."""
    rng = np.random.default_rng(8)
    mask = random_mask(rng, SIZES, 8)
    case = make_case(rng, mask, batch=(2,), heads=(2, 1))
    bias = rng.standard_normal((2, *SIZES[:2])).astype(np.float32)
    k, v = case.k[0], case.v[0]

    def one(q, dout, bias):
        out, lse = block_sparse_attention(
            q, k, v, mask, bias=bias, return_lse=True, implementation=implementation
        )
        return gradients(
            *(q, k, v, mask, out, lse, dout), bias=bias, implementation=implementation
        )

    found = jax.jit(jax.vmap(one, (0, 0, None)))(case.q, case.dout, bias)
    alone = [jax.jit(one)(*x, bias) for x in zip(case.q, case.dout, strict=True)]
    for x, *y in zip(found, *alone, strict=True):
        truth = np.stack(y)
        np.testing.assert_allclose(x, truth, rtol=0, atol=EPS * np.abs(truth).max())


def test_a_bias_as_nested_lists():
    case = CASES["plain"](np.random.default_rng(9))
    bias = np.ones((1, *SIZES[:2]), np.float32)
    rows = case.dout, case.dlse, case.dout
    args = case.q, case.k, case.v, case.mask, *rows
    found, truth = (gradients(*args, bias=x)[3] for x in (bias.tolist(), bias))
    np.testing.assert_array_equal(found, truth)


def test_the_bias_is_checked_as_in_the_forward_pass():
    case = CASES["plain"](np.random.default_rng(6))
    bias = BlockBias(np.zeros((1, 1, 1, 2, 2), np.float32))
    with pytest.raises(ValueError, match="BlockBias"):
        gradients(
            *(case.q, case.k, case.v, case.mask),
            *(case.dout, case.dlse, case.dout),
            bias=bias,
        )
