"""What only a GPU can show of the CUDA kernels, beside the contract suite.

Outputs and gradients: every head size, block and dtype against float64; every case in
every block; the same bits a thousand times, also from two threads at once; lists that
split rows of queries and of keys.
"""

from __future__ import annotations

import concurrent.futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.backends import cutlass
from tests.backends import test_contract as contract
from tests.support.cases import (
    CASES,
    Case,
    growing_logits,
    make_case,
    random_mask,
    uneven_rows,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cutlass_on_gpu")]


def check(case: Case, dtype: str, results: int = 5) -> None:
    """Compares the first results with float64, and all bits with a second run."""
    case = case.cast(dtype)
    run = functools.partial(contract.run_case, "cutlass", case)
    poison(jax.eval_shape(run))
    found = run()
    contract.check_sixteen_bit(found[:results], case, contract.LIMITS[dtype])
    poison(found)
    for x, y in zip(run(), found, strict=True):
        np.testing.assert_array_equal(x, y)


def poison(results: Any) -> None:
    """Leaves NaN in memory that results of these shapes get."""
    leaves = jax.tree_util.tree_leaves(results)
    copies = [jnp.full(x.shape, jnp.nan, x.dtype) for x in leaves for _ in range(4)]
    jax.block_until_ready(copies)


@pytest.mark.parametrize("dtype", cutlass.DTYPES)
@pytest.mark.parametrize("block_kv", cutlass.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", cutlass.BLOCKS["block_q"])
@pytest.mark.parametrize("dims", [(16, 24), (32, 32), (48, 64), (96, 80), (128, 128)])
def test_every_kernel(dims, block_q, block_kv, dtype):
    rng = np.random.default_rng(dims[0])
    sizes = (block_q * 7 - 9, block_kv * 20 + 7, block_q, block_kv)
    mask = random_mask(rng, sizes, 80)
    check(make_case(rng, mask, heads=(4, 2), dims=dims), dtype)


@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("name", CASES)
def test_every_case(name, blocks):
    check(CASES[name](np.random.default_rng(0), (700, 900, *blocks)), "bfloat16")


@pytest.mark.parametrize("dim", cutlass.HEAD_SIZES)
def test_logits_that_grow(dim):
    case = growing_logits(np.random.default_rng(11), dim)
    check(case, "bfloat16", results=2)


@pytest.mark.parametrize("dtype", cutlass.DTYPES)
@pytest.mark.parametrize("block_kv", cutlass.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", cutlass.BLOCKS["block_q"])
@pytest.mark.parametrize("dim", cutlass.HEAD_SIZES)
def test_every_kernel_of_half_rows(half_rows, dim, block_q, block_kv, dtype):
    test_every_kernel((dim, dim), block_q, block_kv, dtype)


@pytest.mark.parametrize("name", CASES)
def test_every_case_of_half_rows(half_rows, name):
    test_every_case(name, (128, 128))


@pytest.mark.parametrize("dim", cutlass.HEAD_SIZES)
def test_the_same_bits_of_half_rows(half_rows, dim):
    test_the_same_bits_a_thousand_times(dim)


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("static", [True, False])
def test_split_rows(static, side):
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (9, 30), (200, 3900, 128, 128))
    if side == "columns":
        mask = mask.transpose()
    case = make_case(rng, mask, dims=(64, 64)).cast("bfloat16")
    run = contract.run_known if static else contract.run_case
    call = functools.partial(run, "cutlass", case)
    poison(jax.eval_shape(call))
    found, truth = call(), contract.expected(case)
    for name, x, y in zip(contract.NAMES, found, truth, strict=False):
        limit = 2e-6 if name == "lse" else contract.HALF_LIMIT
        assert contract.error(x, y) <= limit, name


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_the_same_bits_a_thousand_times(dim):
    rng = np.random.default_rng(2)
    mask = random_mask(rng, (2000, 3000, 128, 128), 150)
    case = make_case(rng, mask, heads=(4, 2), dims=(dim, dim)).cast("bfloat16")
    arrays = (case.q, case.k, case.v, case.mask, None, case.dout, case.dlse)
    args = jax.device_put(arrays)
    run = functools.partial(contract.run, "cutlass")
    first = run(*args)[:5]

    def differ(_):
        found = run(*args)[:5]
        return sum(int((x != y).sum()) for x, y in zip(found, first, strict=True))

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert sum(threads.map(differ, range(1000))) == 0
