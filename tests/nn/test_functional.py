"""Attention of model shapes, against the published formulas written out in plain jnp.

Each formula here is its paper's, line by line, on whole arrays. It runs in float64 for
the truth and in the tested dtype for the error that plain code makes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jsparse import BlockBias, DistanceBias
from jsparse.nn import functional
from jsparse.patterns import device
from tests.support.meshes import mesh_of_two

Array = Any
FLOOR = {"float32": 3e-6, "bfloat16": 2.64e-3}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def qkv(seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v = (normal(seed + n, *shape) for n in range(3))
    return q, k, v


# --------------------------------------------------------------- the published formulas


def softmax_of(logits: Array, allowed: Array) -> Array:
    """Over the last axis, among what is allowed; 0 where nothing is."""
    logits = jnp.where(allowed, logits, -jnp.inf)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def product(spec: str, x: Array, y: Array) -> Array:
    wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
    return jnp.einsum(spec, x, y, preferred_element_type=wide, precision="highest")


def triangle(q, k, v, bias, gate, *, node, mask):
    """AlphaFold 3, algorithm 14 (starting) and 15 (ending), lines 5 and 6."""
    logits, out, b = {
        # a_ijk = softmax_k(q_ij . k_ik / sqrt(c) + b_jk);  o_ij = g_ij * a_ijk v_ik
        "starting": ("ijhc,ikhc->hijk", "hijk,ikhc->ijhc", bias[:, None, :, :]),
        # a_ijk = softmax_k(q_ij . k_kj / sqrt(c) + b_ki);  o_ij = g_ij * a_ijk v_kj
        "ending": (
            *("ijhc,kjhc->hijk", "hijk,kjhc->ijhc"),
            jnp.swapaxes(bias, 1, 2)[:, :, None, :],
        ),
    }[node]
    affinity = product(logits, q, k) * q.shape[-1] ** -0.5
    weights = softmax_of(affinity + b.astype(affinity.dtype), mask)
    out = product(out, weights.astype(v.dtype), v).astype(q.dtype)
    out = jax.nn.sigmoid(gate) * out
    return jnp.where((mask[:, None] & mask)[..., None, None], out, 0)


def pair_bias(q, k, v, bias, gate, *, mask):
    """AlphaFold 3, algorithm 24, lines 9 and 10, of samples ``[B, N, H, c]``."""
    affinity = product("bihc,bjhc->bhij", q, k) * q.shape[-1] ** -0.5
    affinity += bias.astype(affinity.dtype)
    weights = softmax_of(affinity, mask[:, None, None, :])
    out = product("bhij,bjhc->bihc", weights.astype(v.dtype), v).astype(q.dtype)
    return jnp.where(mask[..., None, None], jax.nn.sigmoid(gate) * out, 0)


def atom_windows(q, k, v, bias, *, num_atoms):
    """AlphaFold 3, algorithm 7: atoms l and m meet in the window of centre c.

    ``|l - c| < 16`` and ``|m - c| < 64`` with ``c = 15.5, 47.5, ...``; the runs of keys
    are moved inside, as in its code. ``bias`` is ``[W, H, 32, 128]``.
    """
    length = q.shape[-3]
    atom = np.arange(length)
    centre = atom // 32 * 32 + 15.5
    start = np.clip(centre - 63.5, 0, max(num_atoms - 128, 0)).astype(int)
    run = atom - start[:, None]
    allowed = (run >= 0) & (run < 128) & (atom < num_atoms)
    allowed &= (atom < num_atoms)[:, None]
    affinity = product("bihc,bjhc->bhij", q, k) * q.shape[-1] ** -0.5
    where = (atom // 32)[:, None], atom[:, None] % 32, np.clip(run, 0, 127)
    pairs = jnp.moveaxis(bias, 2, -1)[:, where[0], where[1], where[2]]
    affinity += jnp.moveaxis(pairs, -1, 1).astype(affinity.dtype)
    weights = softmax_of(affinity, allowed)
    return product("bhij,bjhc->bihc", weights.astype(v.dtype), v).astype(q.dtype)


def neighbors(q, k, v, bias, *, index):
    """RFdiffusion3's gather: keys and values of each query, duplicates left out."""
    first = (index[..., :, None] == index[..., None, :]).argmax(-1)
    counts = (index >= 0) & (first == np.arange(index.shape[-1]))
    gather = jax.vmap(lambda x, i: x[i])
    keys, values = (gather(x, np.maximum(index, 0)) for x in (k, v))
    affinity = product("bthc,btnhc->bhtn", q, keys) * q.shape[-1] ** -0.5
    affinity += bias.astype(affinity.dtype)
    weights = softmax_of(affinity, counts[:, None])
    return product("bhtn,btnhc->bthc", weights.astype(v.dtype), values).astype(q.dtype)


# -------------------------------------------------------------------------- comparison


def results(function: Callable[..., Array], *args: Array) -> tuple[Array, ...]:
    """The output and, with a random cotangent, the gradients of all arguments."""
    out, pull = jax.vjp(function, *args)
    cotangent = jnp.asarray(normal(99, *out.shape), out.dtype)
    return out, *pull(cotangent)


def error(found: Array, truth: Array) -> float:
    found, truth = (np.asarray(x, np.float64) for x in (found, truth))
    assert found.shape == truth.shape
    return float(np.linalg.norm(found - truth) / max(np.linalg.norm(truth), 1e-30))


def check(ours: Callable, formula: Callable, *args: Array, dtype="float32"):
    """At most twice the error of the formula at the same dtype, and a floor."""
    args = tuple(np.asarray(jnp.asarray(x, dtype)) for x in args)
    found = jax.jit(functools.partial(results, ours))(*args)
    with jax.default_device(jax.devices("cpu")[0]):
        plain = jax.jit(functools.partial(results, formula))(*args)
        with jax.enable_x64(True):
            wide = [x.astype(np.float64) for x in args]
            truth = jax.jit(functools.partial(results, formula))(*wide)
            truth = [np.asarray(x) for x in truth]
    assert found[0].dtype == dtype
    for n, (x, y, z) in enumerate(zip(found, truth, plain, strict=True)):
        assert error(x, y) <= 2 * error(z, y) + FLOOR[dtype], n
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("node", ["starting", "ending"])
def test_triangle_attention(node, dtype):
    length = 21
    mask = np.arange(length) % 7 != 3
    args = (
        *qkv(0, length, length, 2, 16),
        normal(3, 2, length, length),
        normal(4, length, length, 2, 16),
    )

    def ours(q, k, v, bias, gate):
        return functional.triangle_attention(
            q, k, v, bias, node=node, gate=gate, mask=mask
        )

    check(ours, functools.partial(triangle, node=node, mask=mask), *args, dtype=dtype)


@pytest.mark.parametrize(
    "head_dim, samples, dtype, padded",
    [(24, 1, "float32", False), (48, 3, "float32", True), (48, 3, "bfloat16", True)],
)
def test_pair_bias_attention(head_dim, samples, dtype, padded):
    length, heads = 150, 4
    mask = np.ones((samples, length), bool)
    if padded:
        mask[1, 90:] = mask[2] = False  # the last sample has no token at all
    args = (
        *qkv(10, samples, length, heads, head_dim),
        normal(13, heads, length, length),
        normal(14, samples, length, heads, head_dim),
    )

    def ours(q, k, v, bias, gate):
        return functional.pair_bias_attention(
            q, k, v, bias, gate=gate, mask=mask if padded else None
        )

    check(ours, functools.partial(pair_bias, mask=mask), *args, dtype=dtype)


@pytest.mark.parametrize(
    "length, num_atoms, dtype",
    [
        (200, 170, "float32"),
        (513, 400, "float32"),
        (70, 45, "float32"),
        (257, 257, "bfloat16"),
    ],
)
def test_atom_window_attention(length, num_atoms, dtype):
    bias = normal(24, 2, -(-length // 32), 2, 32, 128)

    def ours(q, k, v, bias):
        return functional.atom_window_attention(q, k, v, bias, num_atoms=num_atoms)

    formula = functools.partial(atom_windows, num_atoms=num_atoms)
    check(ours, formula, *qkv(20, 2, length, 2, 8), bias, dtype=dtype)


def test_atoms_may_be_counted_by_a_traced_number():
    length, args, traces = 260, qkv(20, 260, 2, 8), []
    bias = normal(24, 9, 2, 32, 128)

    @jax.jit
    def ours(num_atoms, *args):
        traces.append(num_atoms)
        attend = functional.atom_window_attention
        return results(functools.partial(attend, num_atoms=num_atoms), *args)

    for num_atoms in (1, 128, 129, 200, length):
        want = results(
            lambda q, k, v, b, n=num_atoms: atom_windows(
                *(x[None] for x in (q, k, v, b)), num_atoms=n
            )[0],
            *map(jnp.asarray, (*args, bias)),
        )
        found = ours(num_atoms, *args, bias)
        for x, y in zip(found, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=5e-6)
    assert len(traces) == 1


def test_a_bias_of_windows_may_be_given_on_blocks():
    q, k, v = qkv(20, 260, 2, 8)
    mask = device.atom_windows(200, padded_to=260)

    def value(t, s):
        return ((t * 7 + s * 5) % 11).astype(np.float32)

    blocks = BlockBias.from_function(mask, value)
    start = np.clip(np.arange(9) * 32 - 48, 0, 72)[:, None, None]
    t = np.arange(9)[:, None, None] * 32 + np.arange(32)[:, None]
    windows = value(t, start + np.arange(128))
    attend = functools.partial(functional.atom_window_attention, num_atoms=200)
    found = attend(q, k, v, blocks)
    assert error(found, attend(q, k, v, windows[:, None])) < 1e-5
    assert error(found, attend(q, k, v)) > 0.1


def lists(length: int, kv_len: int, batch: int = 2) -> np.ndarray:
    """Duplicates, padding between entries, and rows that name nothing."""
    rng = np.random.default_rng(30)
    index = rng.integers(-4, kv_len, (batch, length, 9)).astype(np.int32)
    index[..., 7] = index[..., 2]
    index[:, ::11] = -1
    return index


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capacity", [32, 2])
def test_neighbor_attention(capacity, dtype):
    length, kv_len = 75, 150
    index = lists(length, kv_len)
    q = normal(31, 2, length, 2, 16)
    k, v = normal(32, 2, 2, kv_len, 2, 16)
    bias = normal(33, 2, 2, length, 9)

    def ours(q, k, v, bias):
        return functional.neighbor_attention(
            *(q, k, v, index, bias), capacity=capacity, block_q=16, block_kv=16
        )

    formula = functools.partial(neighbors, index=index)
    found = check(ours, formula, q, k, v, bias, dtype=dtype)
    assert not np.asarray(found[0], np.float32)[:, ::11].any()


@pytest.mark.parametrize("capacity", [32, 2])
@pytest.mark.parametrize("shared", ["lists", "bias", "heads", "both"])
def test_what_samples_of_neighbor_lists_share(shared, capacity):
    index, (k, v) = lists(75, 150), normal(32, 2, 2, 150, 2, 8)
    q, bias = normal(31, 2, 75, 2, 8), normal(33, 2, 2, 75, 9)
    if shared in ("lists", "both"):
        index = index[:1]
    if shared in ("bias", "both"):
        bias = bias[:1]
    if shared == "heads":
        bias = bias[:, :1]

    def ours(q, k, v, bias):
        return functional.neighbor_attention(
            *(q, k, v, index, bias), capacity=capacity, block_q=16, block_kv=16
        )

    def formula(q, k, v, bias):
        whole = np.broadcast_to(index, (2, *index.shape[1:]))
        return neighbors(
            q, k, v, jnp.broadcast_to(bias, (2, 2, *bias.shape[2:])), index=whole
        )

    check(ours, formula, q, k, v, bias)


@pytest.mark.parametrize("length, capacity", [(5, 1), (40, 2), (64, 7), (130, 1)])
def test_rows_that_touch_more_than_a_table_for_all_holds(length, capacity):
    """Of the first lengths there is one query block only, and no part beside it."""
    index = np.random.default_rng(39).integers(0, 300, (length, 9))
    q, (k, v) = normal(31, length, 2, 8), normal(32, 2, 300, 2, 8)

    def ours(q, k, v):
        return functional.neighbor_attention(
            q, k, v, index, capacity=capacity, block_q=64, block_kv=16
        )

    def formula(q, k, v):
        nothing = jnp.zeros((1, 2, *index.shape), q.dtype)
        return neighbors(q[None], k[None], v[None], nothing, index=index[None])[0]

    check(ours, formula, q, k, v)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64"])
def test_lists_of_any_integers(dtype):
    q, (k, v) = normal(31, 40, 2, 8), normal(32, 2, 300, 2, 8)
    index = np.random.default_rng(40).integers(0, 100, (40, 5))
    attend = functools.partial(functional.neighbor_attention, block_q=16, block_kv=16)
    truth = attend(q, k, v, index.astype(np.int32))
    for run in (attend, jax.jit(attend)):
        np.testing.assert_array_equal(run(q, k, v, index.astype(dtype)), truth)


@pytest.mark.parametrize("capacity", [2, 10])
@pytest.mark.parametrize("part", [jax.P("x"), jax.P(None, None, "x")], ids=str)
@pytest.mark.parametrize("kind", ["none", "array", "distance"])
def test_neighbor_lists_on_an_explicit_mesh(kind, part, capacity):
    """Lists of each sample are where its queries are."""
    mesh = mesh_of_two(AxisType.Explicit)
    index, coords = lists(150, 150), normal(35, 150, 3)
    q, (k, v) = normal(31, 2, 150, 4, 8), normal(32, 2, 2, 150, 2, 8)
    bias = np.ones(4, np.float32) if kind == "distance" else normal(33, 4, 150, 9)

    @jax.jit
    def run(q, k, v, bias, index):
        def attend(q, k, v, bias):
            given = {"none": None, "array": bias}.get(kind)
            if kind == "distance":
                given = DistanceBias.linear(bias, coords)
            return functional.neighbor_attention(
                *(q, k, v, index, given), capacity=capacity, block_q=16, block_kv=16
            )

        out, pull = jax.vjp(attend, q, k, v, bias)
        return out, *pull(out)

    truth = run(q, k, v, bias, index)
    with jax.set_mesh(mesh):
        args = *jax.device_put((q, k, v), part), bias
        whose = jax.device_put(index, part) if part == jax.P("x") else index
        found = run(*args, whose)
        assert jax.typeof(found[0]).sharding.spec[: len(part)] == (*part,)
    for x, y in zip(found, truth, strict=True):
        assert error(x, y) < FLOOR["float32"]


@pytest.mark.parametrize("capacity", [2, 10])
def test_gradients_of_each_sample_under_vmap(capacity):
    """Also of what samples share."""
    index, (k, v) = lists(75, 150), normal(32, 2, 150, 2, 8)
    q, bias = normal(31, 2, 75, 2, 8), normal(33, 2, 75, 9)

    def loss(q, k, v, bias, index):
        out = functional.neighbor_attention(
            *(q, k, v, index, bias), capacity=capacity, block_q=16, block_kv=16
        )
        return (out * out).sum()

    one = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    found = jax.vmap(one, (0, None, None, None, 0))(q, k, v, bias, index)
    alone = [one(*x[:1], k, v, bias, *x[1:]) for x in zip(q, index, strict=True)]
    for x, *y in zip(found, *alone, strict=True):
        assert error(x, np.stack(y)) < FLOOR["float32"]


def near_and_far(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Two lists for tables of 2 blocks a row: one that fits, one that does not."""
    near = np.arange(length)[:, None] + np.array([0, 3])
    near = np.where(near < length, near, -1)
    return near, np.random.default_rng(38).integers(0, length, (length, 2))


@pytest.mark.parametrize("length", [160, 150])
def test_neighbors_in_parts_or_at_once_are_the_same(length):
    """A last part that begins where the one before ends, and one that begins sooner."""
    q, k, v = qkv(34, 2, length, 2, 8)
    coords = 3 * normal(37, 2, length, 3)

    @functools.partial(jax.jit, static_argnames="capacity")
    def ours(index, q, k, v, slope, coords, capacity):
        def attend(q, k, v, slope, coords):
            bias = DistanceBias.linear(slope, coords)
            return functional.neighbor_attention(
                *(q, k, v, index, bias), capacity=capacity, block_q=16, block_kv=16
            )

        return results(attend, q, k, v, slope, coords)

    slope, lists = jnp.array([0.1, 1.0]), near_and_far(length)
    for index in lists:
        some, every = (ours(index, q, k, v, slope, coords, capacity=n) for n in (2, 10))
        for x, y in zip(some, every, strict=True):
            assert error(x, y) < FLOOR["float32"]
        mask = device.neighbors(index, block_q=16, block_kv=16, capacity=10)
        assert (int(mask.num_blocks) <= 20) == (index is lists[0])


@pytest.mark.parametrize("with_bias", [False, True])
def test_devices_that_choose_differently(with_bias):
    """Inside `shard_map` one device takes parts and one does not; keys are shared."""
    mesh = mesh_of_two(AxisType.Auto)
    index, (k, v) = np.stack(near_and_far(150)), normal(32, 2, 150, 2, 8)
    q, bias = normal(31, 2, 150, 2, 8), normal(33, 2, 150, 2)
    some = functools.partial(
        functional.neighbor_attention, capacity=2, block_q=16, block_kv=16
    )
    every = functools.partial(some, capacity=10)
    part = jax.P("x")

    def of_batch(attend, q, k, v, bias, index):
        k, v = (jnp.broadcast_to(x, (len(q), *x.shape)) for x in (k, v))
        return attend(q, k, v, index, bias if with_bias else None)

    sharded = jax.shard_map(
        functools.partial(of_batch, some),
        mesh=mesh,
        in_specs=(part, jax.P(), jax.P(), jax.P(), part),
        out_specs=part,
    )
    found, truth = (
        jax.jit(lambda *x, f=f: results(lambda *x: f(*x, index), *x))(q, k, v, bias)
        for f in (sharded, functools.partial(of_batch, every))
    )
    for x, y in zip(found, truth, strict=True):
        assert error(x, y) < FLOOR["float32"]


def test_second_derivatives_of_the_reference():
    q, k, v = qkv(34, 40, 2, 8)
    index = np.arange(40)[:, None] // [1, 2, 3]

    def loss(q, capacity):
        out = functional.neighbor_attention(
            *(q, k, v, index),
            capacity=capacity,
            block_q=16,
            block_kv=16,
            implementation="reference",
        )
        return (out**3).sum()

    def twice(q, capacity):
        return jax.grad(lambda q: (jax.grad(loss)(q, capacity) * v).sum())(q)

    some, every = (jax.jit(twice, static_argnums=1)(q, n) for n in (1, 3))
    assert np.abs(every).max() > 0
    assert error(some, every) < FLOOR["float32"]


# ----------------------------------------------------------------- what does not exist


def test_what_does_not_exist_may_be_nan():
    length, exists = 150, 90
    mask = np.arange(length) < exists
    q, k, v = (np.where(mask[:, None, None], x, np.nan) for x in qkv(40, length, 2, 8))
    bias = normal(43, 2, length, length)
    want = functional.pair_bias_attention(
        q[:exists], k[:exists], v[:exists], bias[:, :exists, :exists]
    )
    found = functional.pair_bias_attention(q, k, v, bias, mask=mask)
    assert error(found[:exists], want) < FLOOR["float32"]
    assert not np.asarray(found)[exists:].any()
    windows = normal(43, 5, 2, 32, 128)
    clean = functional.atom_window_attention(q, k, v, windows, num_atoms=exists)
    windows[3:], windows[2, :, 26:], windows[..., exists:] = np.nan, np.nan, np.nan
    found = functional.atom_window_attention(q, k, v, windows, num_atoms=exists)
    np.testing.assert_array_equal(found, clean)
    assert np.isfinite(found).all()
    assert not np.asarray(found)[exists:].any()
    gate = np.where(mask[:, None, None], normal(49, length, 2, 8), np.nan)

    def tokens(gate):
        return functional.pair_bias_attention(q, k, v, bias, gate=gate, mask=mask)

    def atoms(gate):
        return functional.atom_window_attention(
            q, k, v, windows, gate=gate, num_atoms=exists
        )

    for gated in (tokens, atoms):
        out, pull = jax.vjp(gated, gate)
        assert np.isfinite(out).all()
        assert not np.asarray(out)[exists:].any()
        assert np.isfinite(pull(jnp.ones_like(out))[0]).all()


def test_only_blocks_with_padding_are_tested():
    tokens = np.arange(400) < 290
    tokens[140] = False
    rows = np.array([True, False])
    mask = jax.jit(functional._dense_mask, static_argnums=0)(400, tokens, rows)
    pairs = tokens[:, None] & tokens & rows[:, None, None]
    np.testing.assert_array_equal(mask.to_dense()[:, 0], pairs)
    states = [[2, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(mask.block_states()[0, 0], states)
    assert not mask.block_states()[1].any()


@pytest.mark.parametrize("node", ["starting", "ending"])
def test_edges_that_do_not_exist_may_be_nan(node):
    """Neither values nor gradients of the others see them."""
    length, exists = 12, 7
    mask = np.arange(length) < exists
    edges = (mask[:, None] & mask)[..., None, None]
    arrays = [np.where(edges, x, np.nan) for x in qkv(44, length, length, 2, 8)]
    gate = np.where(edges, normal(48, length, length, 2, 8), np.nan)
    bias = normal(47, 2, length, length)

    def pulled(arrays, bias, gate, mask):
        def attend(q, k, v, bias, gate):
            return functional.triangle_attention(
                q, k, v, bias, node=node, gate=gate, mask=mask
            )

        out, pull = jax.vjp(attend, *arrays, bias, gate)
        return out, *pull(jnp.where(out == 0, 0, 1.0))

    part = slice(exists)
    small = [x[part, part] for x in (*arrays, gate)]
    wanted = pulled(small[:3], bias[:, part, part], small[3], None)
    found = pulled(arrays, bias, gate, mask)
    for n, (x, y) in enumerate(zip(found, wanted, strict=True)):
        x, y = (np.moveaxis(z, 0, -1) if n == 4 else z for z in (x, y))
        np.testing.assert_allclose(x[part, part], y, rtol=1e-4, atol=1e-5)
        rest = np.array(x)
        rest[part, part] = 0
        assert not rest.any()


def test_triangle_rows_that_do_not_exist_are_zero():
    q, k, v = qkv(44, 12, 12, 2, 8)
    bias, mask = normal(47, 2, 12, 12), np.arange(12) < 7
    for node in ("starting", "ending"):
        found = np.asarray(
            functional.triangle_attention(q, k, v, bias, node=node, mask=mask)
        )
        assert not found[7:].any()
        assert not found[:, 7:].any()
        assert (found[:7, :7] != 0).all()


# --------------------------------------------------------------------- transformations


def test_batch_axes_and_vmap_agree_with_a_loop():
    args = qkv(50, 3, 12, 12, 2, 8)
    biases, masks = normal(53, 3, 2, 12, 12), np.arange(12) < np.array([[5], [12], [0]])
    triangle = functools.partial(functional.triangle_attention, node="ending")

    def one(q, k, v, bias, mask):
        return triangle(q, k, v, bias, mask=mask)

    loop = np.stack([one(*x) for x in zip(*args, biases, masks, strict=True)])
    batched = one(*args, biases, masks)
    mapped = jax.jit(jax.vmap(one))(*args, biases, masks)
    for found in (batched, mapped):
        np.testing.assert_allclose(found, loop, rtol=0, atol=2e-6)
    shared = triangle(*args, biases[:1], mask=masks[:1])
    np.testing.assert_allclose(shared[0], loop[0], rtol=0, atol=2e-6)


def test_neighbor_lists_of_each_sample_under_vmap():
    index, (k, v) = lists(75, 150), normal(32, 2, 2, 150, 2, 8)
    q, bias = normal(31, 2, 75, 2, 8), normal(33, 2, 2, 75, 9)
    attend = functools.partial(
        functional.neighbor_attention, capacity=2, block_q=16, block_kv=16
    )
    found = jax.jit(jax.vmap(attend))(q, k, v, index, bias)
    np.testing.assert_allclose(found, attend(q, k, v, index, bias), rtol=0, atol=2e-6)


def test_gradients_have_the_same_bits_on_every_run():
    index, (k, v) = lists(75, 150), normal(32, 2, 2, 150, 2, 8)
    arrays = normal(31, 2, 75, 2, 8), k, v, normal(33, 2, 2, 75, 9)

    @jax.jit
    def ours(q, k, v, bias):
        def attend(q, k, v, bias):
            return functional.neighbor_attention(
                *(q, k, v, index, bias), capacity=2, block_q=16, block_kv=16
            )

        return results(attend, q, k, v, bias)

    first = ours(*arrays)
    for _ in range(5):
        for x, y in zip(first, ours(*arrays), strict=True):
            np.testing.assert_array_equal(x, y)


def test_every_implementation_is_passed_on():
    q, k, v = qkv(60, 40, 2, 8)
    index, bias = np.arange(40)[:, None] // [1, 2, 3], normal(63, 2, 40, 40)
    pairs = np.broadcast_to(q, (40, 40, 2, 8))
    for call in (
        lambda **o: functional.triangle_attention(
            pairs, pairs, pairs, bias, node="starting", **o
        ),
        lambda **o: functional.pair_bias_attention(q, k, v, bias, **o),
        lambda **o: functional.atom_window_attention(q, k, v, **o),
        lambda **o: functional.neighbor_attention(q, k, v, index, **o),
    ):
        want, found = (call(implementation=x) for x in ("reference", "xla"))
        assert error(found, want) < FLOOR["float32"]
        with pytest.raises(ValueError, match="implementation='fast'; expected one of"):
            call(implementation="fast")
        assert error(call(scale=0.0), want) > 0.01


# ------------------------------------------------------------------------------ memory


def temporaries(function: Callable, *shapes: Any) -> int:
    """Bytes that the compiled output and gradients take beside arguments and results.

    Made of shapes alone: nothing is computed.
    """
    compiled = jax.jit(functools.partial(results, function)).lower(*shapes).compile()
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("mapped", [False, True], ids=["batch", "vmap"])
def test_samples_share_the_bias(mapped):
    length, heads = 512, 2

    def attend(q, k, v, bias):
        if not mapped:
            return functional.pair_bias_attention(q, k, v, bias)
        one = functools.partial(functional.pair_bias_attention, bias=bias)
        return jax.vmap(one)(q, k, v)

    def needed(samples: int) -> int:
        x = shape(samples, length, heads, 8)
        return temporaries(attend, x, x, x, shape(heads, length, length))

    bias, sample = 4 * heads * length**2, 4 * length * heads * 8
    # Each sample adds its own arrays: some of q's size, and none of the bias's.
    few, many = needed(2), needed(34)
    assert many - few <= 32 * 12 * sample < 32 * bias / 2
    assert many < 4 * bias


@pytest.mark.parametrize("node", ["starting", "ending"])
def test_rows_share_the_bias(node):
    length, heads = 256, 2
    x = shape(length, length, heads, 8)
    attend = functools.partial(functional.triangle_attention, node=node)
    bias, pairs = 4 * heads * length**2, 4 * length**2 * heads * 8
    needed = temporaries(attend, x, x, x, shape(heads, length, length))
    assert needed < 12 * pairs + 4 * bias < length * bias / 2


def test_windows_and_neighbors_make_no_array_of_all_pairs():
    length, heads = 16384, 2
    x = shape(length, heads, 8)
    every = length**2  # bytes, were it one for each pair
    windows = shape(length // 32, heads, 32, 128)
    assert temporaries(functional.atom_window_attention, x, x, x, windows) < every / 2
    index = jnp.zeros((length, 16), jnp.int32)

    def attend(q, k, v, bias):
        return functional.neighbor_attention(q, k, v, index, bias, capacity=4)

    def without(q, k, v):
        return functional.neighbor_attention(q, k, v, index)

    bias = shape(heads, length, 16)
    assert temporaries(attend, x, x, x, bias) < every
    assert temporaries(without, x, x, x) < every / 2


# ---------------------------------------------------------------------------- refusals

Q = np.ones((6, 2, 4), np.float32)
P = np.ones((6, 6, 2, 4), np.float32)
BIAS = np.zeros((2, 6, 6), np.float32)
LISTS = np.zeros((6, 3), np.int32)


def test_numbers_of_any_kind():
    """What JAX and NumPy make of a number counts as one."""
    run = functools.partial(functional.neighbor_attention, Q, Q, Q, LISTS)
    found = run(scale=jnp.float32(0.5), capacity=np.int64(3))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(found, run(scale=0.5, capacity=3))


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda: functional.triangle_attention(P, P, P, BIAS, node="middle"),  # pyright: ignore[reportArgumentType]
            *(ValueError, "node='middle'; expected 'starting' or 'ending'"),
        ),
        (
            lambda: functional.triangle_attention(Q, Q, Q, BIAS, node="ending"),
            *(ValueError, r"q has shape (6, 2, 4); expected [*B, N, N, H, D]"),
        ),
        (
            lambda: functional.triangle_attention(P, P[:5], P[:5], BIAS, node="ending"),
            *(ValueError, "k has shape (5, 6, 2, 4); expected [*B, N, N, H, D] with"),
        ),
        (
            lambda: functional.triangle_attention(
                P, P, P, np.zeros((6, 2, 6, 6), np.float32), node="ending"
            ),
            *(ValueError, "(6, 2, 6, 6), which does not broadcast to (2, 6, 6)"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q, Q, BIAS[:, :5]),
            *(ValueError, "bias has shape (2, 5, 6), which does not broadcast to"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q, Q, BIAS[:, :1]),
            *(ValueError, "bias has shape (2, 1, 6), which does not broadcast to"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q, Q, BIAS > 0),
            *(TypeError, "bias has dtype bool; expected a floating-point type"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q[:5], Q[:5], BIAS),
            *(ValueError, "q has 6 tokens and k has 5; expected the same"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q[None], Q, BIAS),
            *(ValueError, "q, k, v have batch axes (), (1,), (); expected the same"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q, Q, BIAS, mask=BIAS[0] == 0),
            *(ValueError, "mask has shape (6, 6), which does not broadcast to (6,)"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q, Q, BIAS, mask=np.ones(6)),
            *(TypeError, "mask has dtype float32; expected bool"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q, Q, BIAS, gate=Q[:, 0]),
            *(ValueError, "gate has shape (6, 4); expected that of the result"),
        ),
        (
            lambda: functional.atom_window_attention(Q, Q, Q, num_atoms=7),
            *(ValueError, "num_atoms=7; expected at most 6, the atoms of q"),
        ),
        (
            lambda: functional.atom_window_attention(Q, Q[:5], Q[:5]),
            *(ValueError, "q has 6 atoms and k has 5; expected the same"),
        ),
        (
            lambda: functional.atom_window_attention(Q, Q, Q, BIAS[None]),
            *(ValueError, "(1, 2, 6, 6), which does not broadcast to (1, 2, 32, 128)"),
        ),
        (
            lambda: functional.atom_window_attention(
                Q, Q, Q, BlockBias(np.zeros((1, 2, 1, 64, 32), np.float32))
            ),
            *(ValueError, "expected [B or 1, H or 1, n, 64, 64]"),
        ),
        (
            lambda: functional.neighbor_attention(Q, Q, Q, LISTS[:5]),
            *(ValueError, "index has shape (5, 3); expected (6,) and one more axis"),
        ),
        (
            lambda: functional.neighbor_attention(Q, Q, Q, LISTS * 1.0),
            *(TypeError, "index has dtype float64; expected integers"),
        ),
        (
            lambda: functional.neighbor_attention(Q, Q, Q, LISTS + 6),
            *(ValueError, "index names key 6; expected 0 to 5, or negative entries"),
        ),
        (
            lambda: functional.neighbor_attention(Q, Q, Q, LISTS, BIAS),
            *(ValueError, "(2, 6, 6), which does not broadcast to (2, 6, 3)"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q, Q, None),
            *(TypeError, "bias is a NoneType; expected an array"),
        ),
        (
            lambda: functional.neighbor_attention(
                Q, Q, Q, LISTS, BlockBias(np.zeros((1, 2, 1, 64, 64), np.float32))
            ),
            *(TypeError, "bias is a BlockBias; expected an array"),
        ),
        (
            lambda: functional.pair_bias_attention(Q, Q, Q, BIAS, gate=Q > 0),
            *(TypeError, "gate has dtype bool; expected a floating-point type"),
        ),
        (
            lambda: functional.neighbor_attention(Q, Q[:0], Q[:0], LISTS),
            *(ValueError, "k has shape (0, 2, 4); expected no axis of size 0"),
        ),
        (
            lambda: functional.pair_bias_attention(Q.astype(float), Q, Q, BIAS),
            *(TypeError, "dtypes float64, float32, float32; expected one dtype"),
        ),
        (
            lambda: functional.neighbor_attention(Q, Q, Q, LISTS, scale="small"),  # pyright: ignore[reportArgumentType]
            *(TypeError, "scale is 'small'; expected a number known before tracing"),
        ),
        (
            lambda: functional.neighbor_attention(Q, Q, Q, LISTS, capacity=0),
            *(ValueError, "capacity=0; expected an integer of at least 1"),
        ),
    ],
)
def test_refused(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
