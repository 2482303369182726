"""What the custom derivative asks a backend for."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jsparse import block_sparse_attention
from jsparse.backends import xla
from jsparse.bias import DistanceBias
from jsparse.patterns import window

MASK = window(128, left=32, right=32, block_q=64, block_kv=64)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 128, 2, 16)).astype(np.float32)
    dense = rng.standard_normal((2, 128, 128)).astype(np.float32)
    points = rng.standard_normal((128, 3)).astype(np.float32)
    linear = DistanceBias.linear(np.ones(2), points)
    return q, k, v, {"dense": dense, "linear": linear}


@pytest.fixture
def asked(monkeypatch):
    """For each backward pass that is traced, whether it shall have dbias."""
    found, backward = [], xla.backward

    def listen(*args):
        found.append(args[-1])
        return backward(*args)

    monkeypatch.setattr(xla, "backward", listen)
    jax.clear_caches()  # of traces in which it was not heard
    return found


@pytest.mark.parametrize(
    "transform, kind",
    [
        ("", "dense"),
        ("vmap", "linear"),
        ("checkpoint", "dense"),
        ("jit", "dense"),
        ("jit", "linear"),
    ],
)
def test_only_a_bias_that_is_differentiated_gets_a_gradient(
    kind, transform, problem, asked
):
    q, k, v, biases = problem

    def attend(q, bias):
        out = block_sparse_attention(q, k[0], v[0], MASK, bias=bias)
        return (out * out).sum()

    alone = jax.grad(attend)
    both = jax.grad(attend, (0, 1))
    if transform == "vmap":
        alone, both = jax.vmap(alone, (0, None)), jax.vmap(both, (0, None))
    elif transform == "jit":
        alone, both = jax.jit(alone), jax.jit(both)
    elif transform == "checkpoint":
        alone = jax.grad(jax.checkpoint(attend))
        both = jax.grad(jax.checkpoint(attend), (0, 1))
    q = q if transform == "vmap" else q[0]
    dq = alone(q, biases[kind])
    assert set(asked) == {False}
    asked.clear()
    jax.clear_caches()
    found, dbias = both(q, biases[kind])
    assert set(asked) == {True}
    np.testing.assert_allclose(dq, found, rtol=1e-5, atol=1e-6)
    assert any(np.abs(x).max() > 0 for x in jax.tree_util.tree_leaves(dbias))


def _squares(q, k, v, bias, implementation):
    out = block_sparse_attention(
        q, k, v, MASK, bias=bias, implementation=implementation
    )
    return (out * out).sum()


def _each(loss, axes):
    return jax.vmap(jax.grad(loss, (0, 1, 2, 3)), axes)


def _all(loss, axes):
    return jax.grad(lambda *args: jax.vmap(loss, axes)(*args).sum(), (0, 1, 2, 3))


def _in_a_loop(f):
    return lambda *args: jax.lax.scan(lambda c, _: (c + f(*args), None), 0.0, length=2)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, axes: _each(f, axes),
        lambda f, axes: jax.jit(_each(f, axes)),
        lambda f, axes: _each(jax.jit(f), axes),
        lambda f, axes: jax.vmap(jax.jit(jax.grad(f, (0, 1, 2, 3))), axes),
        lambda f, axes: _each(jax.checkpoint(f), axes),
        lambda f, axes: _each(lambda *x: _in_a_loop(f)(*x)[0], axes),
        lambda f, axes: _all(f, axes),
        lambda f, axes: jax.jit(_all(f, axes)),
        lambda f, axes: _all(jax.jit(f), axes),
        lambda f, axes: _all(jax.checkpoint(f), axes),
        lambda f, axes: _all(lambda *x: _in_a_loop(f)(*x)[0], axes),
    ],
)
def test_gradients_of_a_vmap_and_vmap_of_gradients(transformed, problem):
    """Sums of what is shared there, one for each here."""
    q, k, v, biases = problem
    axes = (0, None, None, None)

    def run(implementation):
        loss = functools.partial(_squares, implementation=implementation)
        return transformed(loss, axes)(q, k[0], v[0], biases["dense"])

    for found, truth in zip(run("xla"), run("reference"), strict=True):
        np.testing.assert_allclose(
            found, truth, rtol=0, atol=1e-5 * np.abs(truth).max()
        )


def _pulled(f, cotangents):
    """Of each cotangent alone."""
    return lambda *args: jax.vmap(jax.vjp(f, *args)[1])(cotangents)


def _weighted(f, cotangents):
    """Of a loss for each cotangent."""

    def loss(c, *args):
        return (f(*args) * c).sum()

    of_args = jax.grad(loss, (1, 2, 3, 4))
    return lambda *args: jax.vmap(of_args, (0, *4 * [None]))(cotangents, *args)


def _jacobian(f, cotangents):
    def losses(*args):
        return (cotangents * f(*args)).sum((1, 2, 3))

    return jax.jacrev(losses, (0, 1, 2, 3))


def _both(f, cotangents):
    """Of each of two queries, and of the two together."""
    axes = (0, None, None, None)

    def run(q, *args):
        queries, many = np.stack([q, 2 * q]), np.stack([cotangents, cotangents], 1)
        each = jax.vmap(_pulled(f, cotangents), axes)
        together = _pulled(jax.vmap(f, axes), many)
        return *each(queries, *args), *together(queries, *args)

    return run


@pytest.mark.parametrize("of_cotangents", [_pulled, _weighted, _jacobian, _both])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_gradients_of_several_cotangents(of_cotangents, wrap, problem):
    """Each has its own, though the forward pass is that of all."""
    q, k, v, biases = problem
    cotangents = np.random.default_rng(1).standard_normal((3, *q[0].shape))

    def run(implementation):
        def attend(q, k, v, bias):
            return block_sparse_attention(
                q, k, v, MASK, bias=bias, implementation=implementation
            )

        f = of_cotangents(wrap(attend), cotangents.astype(np.float32))
        return f(q[0], k[0], v[0], biases["dense"])

    for found, truth in zip(run("xla"), run("reference"), strict=True):
        np.testing.assert_allclose(
            found, truth, rtol=0, atol=1e-5 * np.abs(truth).max()
        )


def test_gradients_of_nested_vmaps(problem):
    q, k, v, biases = problem
    queries, axes = np.stack([q, 2 * q, 3 * q]), (0, None, None, None)

    def run(implementation):
        loss = functools.partial(_squares, implementation=implementation)

        def inner(*args):
            return jax.vmap(loss, axes)(*args).sum()

        args = queries, k[0], v[0], biases["dense"]
        return *_each(inner, axes)(*args), *_all(inner, axes)(*args)

    for found, truth in zip(run("xla"), run("reference"), strict=True):
        np.testing.assert_allclose(
            found, truth, rtol=0, atol=1e-5 * np.abs(truth).max()
        )


def test_unused_outputs_have_no_cotangent(problem):
    q, k, v, biases = (x[0] if isinstance(x, np.ndarray) else x for x in problem)

    def attend(q, part):
        return block_sparse_attention(
            q, k, v, MASK, bias=biases["dense"], return_lse=True
        )[part].sum()

    for part in (0, 1):
        found = jax.grad(attend)(q, part)
        with jax.numpy_dtype_promotion("standard"):
            step = 1e-2 * np.sign(found)
            gain = attend(q + step, part) - attend(q - step, part)
        np.testing.assert_allclose(gain, 2 * np.vdot(found, step), rtol=2e-2)
