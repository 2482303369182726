"""The backward kernels in a simulated CTA, from the public operation down.

As in `test_simulated`: load warps, compute warpgroups, element tests, stores and the
handlers are the kernels' own code; the forward pass is the CUDA kernel's too.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jsparse import BlockMask
from jsparse.backends import _hopper, _turns, cutlass
from tests.backends import test_contract as contract
from tests.backends.conftest import one_launch as one_launch
from tests.ffi.test_simulated import check_the_order_of_threads
from tests.support.cases import CASES, Case, make_case, random_mask, uneven_rows


def check(case: Case, dtype: str = "bfloat16", run=contract.run_case) -> None:
    case = case.cast(dtype)
    found = run("cutlass", case)
    contract.check_sixteen_bit(found, case, contract.LIMITS[dtype])


@pytest.mark.parametrize("blocks", [(128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(on_cpu, name, blocks):
    check(CASES[name](np.random.default_rng(0), (260, 340, *blocks)))


@pytest.mark.parametrize("dtype", cutlass.DTYPES)
@pytest.mark.parametrize("block_kv", cutlass.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", cutlass.BLOCKS["block_q"])
@pytest.mark.parametrize("dims", [(24, 24), (40, 48), (70, 72)], ids=str)
def test_every_kernel(on_cpu, dims, block_q, block_kv, dtype):
    rng = np.random.default_rng(dims[0])
    sizes = (block_q * 2 - 9, block_kv * 2 + 7, block_q, block_kv)
    mask = random_mask(rng, sizes, 5)
    check(make_case(rng, mask, heads=(2, 1), dims=dims), dtype)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("dim, heads", [(32, (2, 2)), (64, (4, 2)), (128, (2, 1))])
def test_the_order_of_threads_changes_nothing(
    on_cpu, one_launch, monkeypatch, dim, heads, static, seed
):
    # Several items and many steps a team: every stage of every ring is used again. CTAs
    # that wait for one another are four, and add to few sums.
    ctas, kv_len, blocks = (4, 1000, 14) if static else (1, 380, 5)
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: ctas)
    rng = np.random.default_rng(5)
    mask = random_mask(rng, (250, kv_len, 128, 128), blocks)
    case = make_case(rng, mask, heads=heads, dims=(dim, dim)).cast("bfloat16")
    run = contract.run_known if static else contract.run_case
    check_the_order_of_threads(on_cpu, lambda: run("cutlass", case), seed)


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("block_kv", [64, 128])
@pytest.mark.parametrize("static", [True, False])
def test_split_rows(on_cpu, one_launch, monkeypatch, static, side, block_kv):
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 8)
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (9, 12), (200, 800 * block_kv // 64, 128, block_kv))
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


# ---------------------------------------------------------- all gradients in one launch


@pytest.mark.parametrize("name", [name for name in CASES if name != "nothing"])
def test_every_case_in_one_launch(on_cpu, one_launch, name):
    case = CASES[name](np.random.default_rng(0), (260, 340, 128, 128))
    assert launches_of(case) == 1
    check(case, run=contract.run_known)


@pytest.mark.parametrize("dtype", cutlass.DTYPES)
@pytest.mark.parametrize("dims", [(24, 24), (40, 48), (70, 72)], ids=str)
def test_every_kernel_of_all_gradients(on_cpu, one_launch, dims, dtype):
    # Many steps an item, of few tiles: each has several sums.
    rng = np.random.default_rng(dims[0])
    mask = random_mask(rng, (500, 500, 128, 128), 14)
    case = make_case(rng, mask, heads=(2, 1), dims=dims)
    assert launches_of(case) == 1
    check(case, dtype, run=contract.run_known)


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_where_nan_goes_in_one_launch(on_cpu, one_launch, monkeypatch, where):
    monkeypatch.setitem(contract.BLOCKS, "cutlass", (200, 330, 128, 128))
    contract.check_where_nan_goes(contract.run_known, "cutlass", where)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dim", [24, 64, 96])
def test_a_bad_key_is_cleared_for_dq_alone(on_cpu, one_launch, dim, value):
    # Its own gradients are those of two launches, which read it as it is; and the steps
    # after those of partial blocks do too.
    rng = np.random.default_rng(4)
    rows, columns = (x.reshape(-1) for x in np.indices((3, 2)))
    elements = rng.random((6, 128, 128)) < 0.02  # few see it, and few what they see
    mask = BlockMask.from_blocks(
        rows,
        columns,
        q_len=300,
        kv_len=250,
        elements=elements,
        full=columns * rows == 2,
    )
    case = make_case(rng, mask, heads=(2, 1), dims=(dim, dim)).cast("bfloat16")
    k = np.array(case.k)
    k[70, 0, dim // 2] = value
    case = dataclasses.replace(case, k=k)
    found, expected = (
        run("cutlass", case) for run in (contract.run_known, contract.run_case)
    )
    for name, x, y in zip(contract.NAMES[2:], found[2:5], expected[2:5], strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y), err_msg=name)
        finite = np.isfinite(y)
        assert finite.any()
        assert contract.error(x[finite], y[finite]) <= contract.HALF_LIMIT, name


def test_two_launches_where_one_is_not_made_for_it(on_cpu, one_launch, monkeypatch):
    rng = np.random.default_rng(0)
    wide, narrow = (CASES["plain"](rng, (260, 340, 128, n)) for n in (128, 64))
    assert [launches_of(case) for case in (wide, narrow)] == [1, 2]
    for name, limit in (("MOST_STEPS", 3), ("FEWEST", 5)):
        with monkeypatch.context() as patch:
            patch.setattr(_turns, name, limit)
            assert launches_of(wide) == 2
    assert launches_of(CASES["nothing"](rng, (260, 340, 128, 128))) == 2


def launches_of(case: Case) -> int:
    """Of the backward pass, with a known mask."""
    case = case.cast("bfloat16")
    jax.clear_caches()
    run = jax.jit(functools.partial(contract.results, "cutlass", mask=case.mask))
    text = run.lower(
        case.q, case.k, case.v, bias=case.bias, dout=case.dout, dlse=case.dlse
    ).as_text()
    counts = [text.count(f"@{x}(") for x in cutlass.TARGETS[1:]]
    return sum(counts)


@pytest.mark.parametrize("split, full", [("batch", False), ("heads", None)])
def test_shard_map(on_cpu, split, full):
    contract.test_shard_map("cutlass", split, full)


def test_export(on_cpu):
    contract.test_export("cutlass")


def test_vmap_over_masks(on_cpu):
    contract.test_vmap_over_masks("cutlass")
