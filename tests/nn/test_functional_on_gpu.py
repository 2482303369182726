"""Attention of model shapes on the Mosaic kernels, against the same formulas."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import BlockBias, DistanceBias
from jsparse.nn import functional
from jsparse.patterns import device
from tests.nn import test_functional as formulas
from tests.nn.test_functional import normal, qkv

pytestmark = pytest.mark.gpu

check = functools.partial(formulas.check, dtype="bfloat16")


def on_kernels(function, *args, **options):
    return function(*args, **options, implementation="mosaic_gpu")


@pytest.mark.parametrize("node", ["starting", "ending"])
def test_triangle_attention(node):
    length = 140
    mask = np.arange(length) % 70 < 61
    args = (
        *qkv(0, length, length, 2, 32),
        normal(3, 2, length, length),
        normal(4, length, length, 2, 32),
    )

    def ours(q, k, v, bias, gate):
        attend = functools.partial(on_kernels, functional.triangle_attention)
        return attend(q, k, v, bias, node=node, gate=gate, mask=mask)

    check(ours, functools.partial(formulas.triangle, node=node, mask=mask), *args)


@pytest.mark.parametrize("head_dim, samples", [(24, 1), (48, 3), (64, 2)])
def test_pair_bias_attention(head_dim, samples):
    length, heads = 350, 4
    mask = np.arange(length) < np.array([length, 190, 0])[:samples, None]
    args = (
        *qkv(10, samples, length, heads, head_dim),
        normal(13, heads, length, length),
        normal(14, samples, length, heads, head_dim),
    )

    def ours(q, k, v, bias, gate):
        attend = functools.partial(on_kernels, functional.pair_bias_attention)
        return attend(q, k, v, bias, gate=gate, mask=None if samples == 1 else mask)

    check(ours, functools.partial(formulas.pair_bias, mask=mask), *args)


@pytest.mark.parametrize("length, num_atoms", [(513, 400), (70, 45), (257, 257)])
def test_atom_window_attention(length, num_atoms):
    bias = normal(24, 2, -(-length // 32), 4, 32, 128)

    def ours(q, k, v, bias):
        attend = functools.partial(on_kernels, functional.atom_window_attention)
        return attend(q, k, v, bias, num_atoms=num_atoms)

    formula = functools.partial(formulas.atom_windows, num_atoms=num_atoms)
    check(ours, formula, *qkv(20, 2, length, 4, 32), bias)


def test_a_bias_of_windows_on_blocks():
    q, k, v = (x.astype("bfloat16") for x in qkv(20, 260, 2, 32))
    mask = device.atom_windows(200, padded_to=260)
    bias = BlockBias.from_function(
        mask, lambda t, s: ((t * 7 + s * 5) % 11).astype(np.float32)
    )
    attend = functools.partial(functional.atom_window_attention, num_atoms=200)
    found = on_kernels(attend, q, k, v, bias)
    q, k, v = (x.astype("float32") for x in (q, k, v))
    truth = attend(q, k, v, bias, implementation="xla")
    assert formulas.error(found, truth) < formulas.FLOOR["bfloat16"]


@pytest.mark.parametrize("capacity", [32, 2])
def test_neighbor_attention(capacity):
    length, kv_len = 150, 400
    index = formulas.lists(length, kv_len)
    q = normal(31, 2, length, 2, 32)
    k, v = normal(32, 2, 2, kv_len, 2, 32)
    bias = normal(33, 2, 2, length, 9)

    def ours(q, k, v, bias):
        attend = functools.partial(on_kernels, functional.neighbor_attention)
        return attend(q, k, v, index, bias, capacity=capacity)

    check(ours, functools.partial(formulas.neighbors, index=index), q, k, v, bias)


def test_neighbors_with_a_bias_by_distance():
    index, coords = formulas.lists(300, 300, batch=1)[0], 3 * normal(35, 300, 3)
    distance = np.linalg.norm(coords[:, None] - coords[index], axis=-1)

    def ours(q, k, v, slope):
        bias = DistanceBias.linear(slope, coords)
        attend = functools.partial(on_kernels, functional.neighbor_attention)
        return attend(q, k, v, index, bias)

    def formula(q, k, v, slope):
        bias = -slope[:, None, None].astype(float) * jnp.asarray(distance, float)
        attend = functools.partial(formulas.neighbors, index=index[None])
        return attend(*(x[None] for x in (q, k, v, bias)))[0]

    check(ours, formula, *qkv(36, 300, 2, 32), np.array([0.25, 1.0]))


def test_what_does_not_exist_may_be_nan():
    length, exists = 300, 190
    mask = np.arange(length) < exists
    q, k, v = (
        np.where(mask[:, None, None], x, np.nan).astype("bfloat16")
        for x in qkv(40, length, 2, 32)
    )
    bias = normal(43, 2, length, length)
    bias[:, ~mask], bias[..., ~mask] = np.nan, np.nan

    @jax.jit
    def gradients(q, k, v, bias):
        attend = functools.partial(on_kernels, functional.pair_bias_attention)
        return formulas.results(functools.partial(attend, mask=mask), *(q, k, v, bias))

    for x in gradients(q, k, v, bias):
        assert np.isfinite(np.asarray(x, np.float32)).all()
