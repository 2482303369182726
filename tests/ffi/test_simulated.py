"""The forward kernel in a simulated CTA, from the public operation down.

Barriers, copies and products are played; load warps, compute warpgroups, element tests,
softmax, stores and the handler are the kernel's own code.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jsparse import block_sparse_attention
from jsparse.backends import _hopper, cutlass
from tests.backends import test_contract as contract
from tests.backends.conftest import half_rows as half_rows
from tests.support.cases import (
    CASES,
    MOVES,
    Case,
    growing_logits,
    make_case,
    random_mask,
    uneven_rows,
)
from tests.support.meshes import mesh_of_two

attend = functools.partial(
    block_sparse_attention, return_lse=True, implementation="cutlass"
)
run = jax.jit(attend)


def check(case: Case, dtype: str = "bfloat16") -> None:
    case = case.cast(dtype)
    found = run(case.q, case.k, case.v, case.mask, bias=case.bias)
    truth = contract.expected(case)
    assert found[0].dtype == dtype
    assert contract.error(found[0], truth[0]) <= contract.LIMITS[dtype]
    assert contract.error(found[1], truth[1]) <= 2e-6


@pytest.mark.parametrize("blocks", [(128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(on_cpu, name, blocks):
    check(CASES[name](np.random.default_rng(0), (330, 340, *blocks)))


@pytest.mark.parametrize("dtype", cutlass.DTYPES)
@pytest.mark.parametrize("block_kv", cutlass.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", cutlass.BLOCKS["block_q"])
@pytest.mark.parametrize("dims", [(24, 24), (40, 48), (70, 72)], ids=str)
def test_every_kernel(on_cpu, dims, block_q, block_kv, dtype):
    rng = np.random.default_rng(dims[0])
    sizes = (block_q * 2 - 9, block_kv * 3 + 7, block_q, block_kv)
    check(make_case(rng, random_mask(rng, sizes, 8), heads=(2, 1), dims=dims), dtype)


@pytest.mark.parametrize("block_kv", cutlass.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", cutlass.BLOCKS["block_q"])
@pytest.mark.parametrize("dim", cutlass.HEAD_SIZES)
def test_every_kernel_of_half_rows(on_cpu, half_rows, dim, block_q, block_kv):
    rng = np.random.default_rng(dim)
    sizes = (block_q * 2 - 9, block_kv * 9 + 7, block_q, block_kv)
    mask = random_mask(rng, sizes, 14)
    check(make_case(rng, mask, heads=(2, 1), dims=(dim, dim)), "float16")


@pytest.mark.parametrize("name", CASES)
def test_every_case_of_half_rows(on_cpu, half_rows, name):
    check(CASES[name](np.random.default_rng(0), (330, 340, 128, 64)))


@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_threads_changes_no_half_row(on_cpu, half_rows, monkeypatch, seed):
    test_the_order_of_threads_changes_nothing(on_cpu, monkeypatch, 64, seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dim", [64, 128])
def test_the_order_of_threads_changes_nothing(on_cpu, monkeypatch, dim, seed):
    # Six or twelve items a team: every stage of every ring is used again.
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 1)
    rng = np.random.default_rng(5)
    mask = random_mask(rng, (380, 640, 128, 128), 10)
    case = make_case(rng, mask, heads=(4, 2), dims=(dim, dim)).cast("bfloat16")
    call = functools.partial(run, case.q, case.k, case.v, case.mask)
    check_the_order_of_threads(on_cpu, call, seed)


def check_the_order_of_threads(library, call, seed: int) -> None:
    """Compares all bits of ``call()`` with those of another order."""
    expected = jax.block_until_ready(call())
    library.set_seed(1000 * (seed + 1))
    try:
        found = jax.block_until_ready(call())
    finally:
        library.set_seed(0)
    leaves = map(jax.tree_util.tree_leaves, (found, expected))
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("workers", [3, 24])
def test_split_rows(on_cpu, monkeypatch, workers, static):
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: workers)
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (9, 12), (200, 1300, 128, 64))
    case = make_case(rng, mask, heads=(1, 1)).cast("bfloat16")
    if static:
        found = jax.jit(functools.partial(attend, mask=mask))(case.q, case.k, case.v)
    else:
        found = run(case.q, case.k, case.v, mask)
    truth = contract.expected(case)
    assert contract.error(found[0], truth[0]) <= contract.HALF_LIMIT
    assert contract.error(found[1], truth[1]) <= 2e-6


@pytest.mark.parametrize("dim", [64, 128])
def test_logits_that_grow(on_cpu, dim):
    check(growing_logits(np.random.default_rng(11), dim))


@pytest.mark.parametrize("where", ["k", "v"])
def test_bad_values_of_half_rows(on_cpu, half_rows, where):
    test_bad_values_stay_where_attention_carries_them(on_cpu, where, np.nan)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_values_stay_where_attention_carries_them(on_cpu, where, value):
    rng = np.random.default_rng(9)
    mask = random_mask(rng, (200, 900, 128, 64), 24)
    case = make_case(rng, mask, heads=(2, 2)).cast("float16")
    clean = run(case.q, case.k, case.v, mask)
    seen = mask.to_dense()[0, 0]
    key = int(np.argmax(seen.sum(0) * (seen.sum(0) < seen.any(1).sum())))
    row = int(np.argmax(seen.sum(1)))
    array = np.array(getattr(case, where))
    array[row if where == "q" else key, 1, 3] = value
    case = dataclasses.replace(case, **{where: array})
    out, lse = (np.asarray(x) for x in run(case.q, case.k, case.v, mask))
    rows = np.arange(len(seen)) == row if where == "q" else seen[:, key]
    if (where, value) != ("k", np.inf):  # a logit may then be -inf
        assert np.isnan(out[rows, 1]).any(-1).all()
    np.testing.assert_array_equal(out[~rows], np.asarray(clean[0])[~rows])
    np.testing.assert_array_equal(out[:, 0], np.asarray(clean[0])[:, 0])
    np.testing.assert_array_equal(lse[0], np.asarray(clean[1])[0])


def test_vmap_over_masks(on_cpu):
    rng, sizes = np.random.default_rng(16), (200, 300, 128, 64)
    masks = [
        random_mask(rng, sizes, 9).pad_to(*sizes[:2], capacity=9, num_bits=9)
        for _ in "ab"
    ]
    stacked = jax.tree_util.tree_map(lambda *x: np.stack(x), *masks)
    case = make_case(rng, masks[0], batch=(2,), heads=(1, 1)).cast("bfloat16")
    out, lse = jax.jit(jax.vmap(attend))(case.q, case.k, case.v, stacked)
    for n, mask in enumerate(masks):
        x, y = run(case.q[n], case.k[n], case.v[n], mask)
        assert contract.error(out[n], x) <= contract.HALF_LIMIT
        assert contract.error(lse[n], y) <= 2e-6


@pytest.mark.parametrize("part", [jax.P("x"), jax.P(None, None, "x")], ids=str)
def test_shard_map_moves_nothing(on_cpu, part):
    rng = np.random.default_rng(21)
    mask = random_mask(rng, (200, 300, 128, 64), 6)
    case = make_case(rng, mask, batch=(2,), heads=(2, 2)).cast("bfloat16")
    mesh = mesh_of_two(AxisType.Auto)
    sharded = jax.jit(
        jax.shard_map(
            lambda q, k, v: attend(q, k, v, mask)[0],
            mesh=mesh,
            in_specs=(part, part, part),
            out_specs=part,
        )
    )
    place = jax.sharding.NamedSharding(mesh, part)
    args = [jax.device_put(x, place) for x in (case.q, case.k, case.v)]
    text = sharded.lower(*args).compile().as_text() or ""
    assert "jsparse_forward" in text
    assert not [word for word in MOVES if word in text]
    truth = contract.expected(case)[0]
    assert contract.error(sharded(*args), truth) <= contract.HALF_LIMIT


def test_export(on_cpu):
    rng = np.random.default_rng(20)
    mask = random_mask(rng, (200, 300, 128, 64), 6)
    case = make_case(rng, mask, heads=(1, 1)).cast("bfloat16")
    args = (case.q, case.k, case.v)
    exported = jax.export.export(
        jax.jit(lambda q, k, v: attend(q, k, v, mask)[0]),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("jsparse_forward")],
    )(*args)
    again = jax.export.deserialize(exported.serialize())
    truth = contract.expected(case)[0]
    assert contract.error(again.call(*args), truth) <= contract.HALF_LIMIT


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("head_dim", cutlass.HEAD_SIZES)
def test_products_read_what_tma_wrote(simulated, head_dim, columns):
    assert simulated.layout_mismatches(head_dim, columns) == 0


def test_exponentials_by_polynomial(simulated):
    x = np.linspace(-126, 0, 100_001, dtype=np.float32)
    x = np.concatenate([x, np.array([-np.inf, -200, np.nan], np.float32)])
    y, pointer = np.empty_like(x), ctypes.POINTER(ctypes.c_float)
    ends = (array.ctypes.data_as(pointer) for array in (x, y))
    simulated.exp2_polynomial(*ends, ctypes.c_int64(len(x)))
    truth = np.exp2(x.astype(np.float64))
    assert np.abs(y[:-3] / truth[:-3] - 1).max() < 7.6e-5
    np.testing.assert_array_equal(y[-3:], [0, 0, np.nan])
