"""Arrays sharded over explicit mesh axes: each device computes its part."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jsparse import (
    BlockBias,
    BlockMask,
    DistanceBias,
    ScoreFunction,
    block_sparse_attention,
)
from jsparse.bias import EntryBias
from jsparse.nn.functional import atom_window_attention
from tests.support.cases import MOVES, random_mask, with_entries
from tests.support.meshes import mesh_of_two
from tests.support.scores import alibi

T, S, HEADS = 70, 90, 4
P = jax.P


@pytest.fixture(scope="module")
def mesh():
    return mesh_of_two(AxisType.Explicit)


def inputs(kv_heads: int = HEADS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(T, HEADS, 8), (S, kv_heads, 8), (S, kv_heads, 8)]
    return [rng.standard_normal((2, *x)).astype(np.float32) for x in shapes]


def pattern_of(seed: int = 1) -> BlockMask:
    return random_mask(np.random.default_rng(seed), (T, S, 16, 32), 9)


def only_partial() -> BlockMask:
    return BlockMask.from_blocks(
        *([0, 1, 3], [1, 0, 2]),
        q_len=T,
        kv_len=S,
        block_q=16,
        block_kv=32,
        elements=np.random.default_rng(2).random((3, 16, 32)) < 0.5,
    )


@functools.partial(jax.jit, static_argnames="implementation")
def results(mask, bias, q, k, v, *, implementation):
    """Output and gradients."""

    def run(q, k, v, bias):
        return block_sparse_attention(
            q, k, v, mask, bias=bias, implementation=implementation
        )

    out, pull = jax.vjp(run, q, k, v, bias)
    return out, *pull(jnp.sin(out))


def check(mesh, arrays, part, mask, bias=None, bias_part=None, implementation="xla"):
    """On two devices as on one, with outputs sharded as inputs; the compiled text."""

    def put(x, part):
        return jax.device_put(x, jax.NamedSharding(mesh, part))

    sharded = [put(x, part) for x in arrays]
    other = bias
    if bias_part is not None:
        other = jax.tree.map(lambda x: put(x, bias_part), bias)
    run = functools.partial(results, implementation=implementation)
    found, truth = run(mask, other, *sharded), run(mask, bias, *arrays)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
    for x in found[:4]:
        assert jax.typeof(x).sharding.spec[: len(part)] == (*part,)
    text = results.lower(mask, other, *sharded, implementation=implementation)
    return text.compile().as_text() or ""


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("part", [P("x"), P(None, None, "x")], ids=str)
def test_batch_entries_and_heads(mesh, part, implementation):
    for pattern in (pattern_of(), only_partial()):
        text = check(mesh, inputs(), part, pattern, implementation=implementation)
        assert not [word for word in MOVES if word in text]


@pytest.mark.parametrize("part", [P("x"), P(None, None, "x")], ids=str)
@pytest.mark.parametrize("kind", ["dense", "block", "distance", "score"])
def test_a_bias_that_devices_share(mesh, kind, part):
    rng, pattern = np.random.default_rng(3), pattern_of()
    bias = {
        "dense": lambda: rng.standard_normal((HEADS, T, S)).astype(np.float32),
        "block": lambda: BlockBias(
            rng.standard_normal((1, 1, pattern.num_blocks, 16, 32)).astype(np.float32)
        ),
        "distance": lambda: DistanceBias.linear(
            np.full(HEADS, 0.1), rng.standard_normal((T, 3)), np.zeros((S, 3))
        ),
        "score": lambda: ScoreFunction(alibi, (np.ones(HEADS, np.float32),)),
    }[kind]()
    if kind == "score" and part != P("x"):
        with pytest.raises(ValueError, match="heads are sharded, and the bias is a Sc"):
            check(mesh, inputs(), part, pattern, bias)
        return
    check(mesh, inputs(), part, pattern, bias)


@pytest.mark.parametrize("part", [P("x"), P(None, None, "x")], ids=str)
@pytest.mark.parametrize("kind", ["entry", "entry_shared_heads"])
def test_a_bias_by_entry(mesh, kind, part):
    case = with_entries(kind, (T, S, 16, 32), dim=8)
    index = case.bias.index

    @jax.jit
    def both(values, q, k, v):
        def run(values, q, k, v):
            bias = EntryBias(values, index)
            return block_sparse_attention(
                q, k, v, case.mask, bias=bias, implementation="reference"
            )

        out, pull = jax.vjp(run, values, q, k, v)
        return out, *pull(jnp.sin(out))

    arrays = case.q, case.k, case.v
    sharded = [jax.device_put(x, jax.NamedSharding(mesh, part)) for x in arrays]
    truth = both(case.bias.values, *arrays)
    for x, y in zip(both(case.bias.values, *sharded), truth, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


def test_a_bias_with_heads_of_its_own(mesh):
    bias = np.random.default_rng(4).standard_normal((HEADS, T, S)).astype(np.float32)
    text = check(
        mesh, inputs(kv_heads=2), P(None, None, "x"), pattern_of(), bias, P("x")
    )
    assert not re.findall("all-gather|all-reduce|all-to-all", text)


def test_only_a_bias_is_sharded(mesh):
    bias = np.random.default_rng(4).standard_normal((HEADS, T, S)).astype(np.float32)
    sharded = jax.device_put(bias, jax.NamedSharding(mesh, P("x")))
    run = functools.partial(results, implementation="xla")
    found, truth = (run(pattern_of(), x, *inputs()) for x in (sharded, bias))
    for x, y in zip(found, truth, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
    assert jax.typeof(found[-1]).sharding.spec[0] == "x"


@pytest.mark.parametrize("what", ["bits", "points"])
def test_only_a_mask_or_points_are_sharded(mesh, what):
    def put(x):
        part = P(*("x" if n == 2 else None for n in x.shape))
        return jax.device_put(x, jax.NamedSharding(mesh, part))

    points = np.random.default_rng(5).standard_normal((2, T, 3))
    bias = DistanceBias.linear(np.full(HEADS, 0.1), points, np.zeros((S, 3)))
    mask = BlockMask.stack([only_partial()] * 2, "batch")
    run = functools.partial(results, implementation="xla")
    truth = run(mask, bias, *inputs())
    if what == "bits":
        mask = jax.tree.map(put, mask)
    else:
        bias = jax.tree.map(put, bias)
    found = run(mask, bias, *inputs())
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


def test_patterns_of_batch_entries(mesh):
    both = BlockMask.stack([pattern_of(5), pattern_of(6)], "batch")
    check(mesh, inputs(), P("x"), both)


def test_vmap_and_eager_calls(mesh):
    arrays, pattern = inputs(), pattern_of()
    run = jax.vmap(lambda q, k, v: block_sparse_attention(q, k, v, pattern))
    truth = run(*arrays)
    with jax.set_mesh(mesh):
        q, k, v = (jax.device_put(x, P("x")) for x in arrays)
        np.testing.assert_allclose(jax.jit(run)(q, k, v), truth, rtol=0, atol=1e-5)
        found = block_sparse_attention(q, k, v, pattern)
        gradient = jax.grad(lambda q: block_sparse_attention(q, k, v, pattern).sum())
        assert jax.typeof(gradient(q)).sharding.spec[0] == "x"
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-5)


def test_model_functions(mesh):
    rng = np.random.default_rng(7)
    q, k, v = rng.standard_normal((3, 2, 150, 2, 8)).astype(np.float32)
    run = jax.jit(functools.partial(atom_window_attention, num_atoms=140))
    sharded = [jax.device_put(x, jax.NamedSharding(mesh, P("x"))) for x in (q, k, v)]
    np.testing.assert_allclose(run(*sharded), run(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "part, kv_heads, heads, message",
    [
        (P(None, "x"), HEADS, 1, r"q is sharded as .*'x'.*; expected batch axes and"),
        (P(None, None, "x"), HEADS, HEADS, "heads are sharded, and the mask has head"),
        (P(None, None, "x"), 1, 1, "over 2 devices, but q has 4 and k 1 heads"),
    ],
)
def test_what_cannot_be_divided_is_refused(mesh, part, kv_heads, heads, message):
    pattern = (
        pattern_of() if heads == 1 else BlockMask.stack([pattern_of()] * heads, "head")
    )
    q, k, v = inputs(kv_heads=kv_heads)
    q = jax.device_put(q, jax.NamedSharding(mesh, part))
    with pytest.raises(ValueError, match=message):
        jax.jit(block_sparse_attention)(q, k, v, pattern)
