"""The backward kernels in a simulated CTA, from the public operation down.

As in `test_simulated`: load warps, compute warpgroups, element tests, stores and the
handlers are the kernels' own code; the forward pass is the CUDA kernel's too.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jsparse.backends import _hopper, cutlass
from tests.backends import test_contract as contract
from tests.support.cases import CASES, Case, make_case, random_mask, uneven_rows


def check(case: Case, dtype: str = "bfloat16") -> None:
    case = case.cast(dtype)
    found = contract.run_case("cutlass", case)
    contract.check_sixteen_bit(found, case, contract.LIMITS[dtype])


@pytest.mark.parametrize("blocks", [(128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(on_cpu, name, blocks):
    check(CASES[name](np.random.default_rng(0), (260, 340, *blocks)))


@pytest.mark.parametrize("dtype", cutlass.DTYPES)
@pytest.mark.parametrize("block_kv", cutlass.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", cutlass.BLOCKS["block_q"])
@pytest.mark.parametrize("dims", [(24, 24), (64, 48), (96, 128)], ids=str)
def test_every_kernel(on_cpu, dims, block_q, block_kv, dtype):
    rng = np.random.default_rng(dims[0])
    sizes = (block_q * 2 - 9, block_kv * 2 + 7, block_q, block_kv)
    mask = random_mask(rng, sizes, 5)
    check(make_case(rng, mask, heads=(2, 1), dims=dims), dtype)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dim, heads", [(32, (2, 2)), (64, (4, 2)), (128, (2, 1))])
def test_the_order_of_threads_changes_nothing(on_cpu, monkeypatch, dim, heads, seed):
    # Several items and many steps a team: every stage of every ring is used again.
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 1)
    rng = np.random.default_rng(5)
    mask = random_mask(rng, (250, 380, 128, 128), 5)
    case = make_case(rng, mask, heads=heads, dims=(dim, dim)).cast("bfloat16")
    expected = contract.run_case("cutlass", case)
    on_cpu.set_seed(1000 * (seed + 1))
    try:
        found = contract.run_case("cutlass", case)
        jax.block_until_ready(found)
    finally:
        on_cpu.set_seed(0)
    for x, y in zip(found[2:5], expected[2:5], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("static", [True, False])
def test_split_rows(on_cpu, monkeypatch, static, side):
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 8)
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (9, 12), (200, 800, 128, 64))
    if side == "columns":
        mask = mask.transpose()
    case = make_case(rng, mask, heads=(1, 1)).cast("bfloat16")
    run = contract.run_known if static else contract.run_case
    found, truth = run("cutlass", case), contract.expected(case)
    for name, x, y in zip(contract.NAMES[2:], found[2:5], truth[2:5], strict=True):
        assert contract.error(x, y) <= contract.HALF_LIMIT, name


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_stays_where_attention_carries_it(on_cpu, where):
    contract.test_nan_stays_where_attention_carries_it("cutlass", where)


@pytest.mark.parametrize("split, full", [("batch", False), ("heads", None)])
def test_shard_map(on_cpu, split, full):
    contract.test_shard_map("cutlass", split, full)


def test_export(on_cpu):
    contract.test_export("cutlass")


def test_vmap_over_masks(on_cpu):
    contract.test_vmap_over_masks("cutlass")
