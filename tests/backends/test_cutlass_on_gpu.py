"""What only a GPU can show of the CUDA kernels, beside the contract suite.

Outputs and gradients: every head size, block and dtype against float64; every case in
every block; the same bits a thousand times, also from two threads at once; lists that
split rows of queries and of keys; and all of it beside a bias.
"""

from __future__ import annotations

import concurrent.futures
import functools
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import BlockMask
from jsparse.backends import cutlass
from tests.backends import test_contract as contract
from tests.support.cases import (
    CASES,
    Case,
    growing_logits,
    make_case,
    of_all_blocks,
    pair,
    random_mask,
    uneven_rows,
    with_bias,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cutlass_on_gpu")]


BIASES = (
    *("dense", "dense_shared_batch", "dense_shared_heads", "dense_2d"),
    *("per_key", "block", "block_shared_heads"),
)


def check(case: Case, dtype: str, results: int = 5, static: bool = False) -> None:
    """Compares the first results with float64, and all bits with a second run.

    With a mask that is known before tracing all gradients may be one launch.
    """
    case = case.cast(dtype)
    run_case = contract.run_known if static else contract.run_case
    run = functools.partial(run_case, "cutlass", case)
    poison(jax.eval_shape(run))
    found = run()
    contract.check_sixteen_bit(found[:results], case, contract.LIMITS[dtype])
    if case.bias is not None:
        contract.check_sixteen_bit_bias(case, found[5], contract.LIMITS[dtype])
    poison(found)
    leaves = map(jax.tree_util.tree_leaves, (run(), found))
    for x, y in zip(*leaves, strict=True):
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


@pytest.mark.parametrize("dtype", cutlass.DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (16, 16)])
@pytest.mark.parametrize("dims", [(16, 24), (32, 32), (48, 64), (96, 80), (128, 128)])
def test_all_gradients_in_one_launch(one_launch, dims, heads, dtype):
    # From some items a CTA to some CTAs an item.
    rng = np.random.default_rng(dims[0])
    mask = random_mask(rng, (1900, 2600, 128, 128), 200)
    check(make_case(rng, mask, heads=heads, dims=dims), dtype, static=True)


@pytest.mark.parametrize("name", CASES)
def test_every_case_in_one_launch(one_launch, name):
    case = CASES[name](np.random.default_rng(0), (700, 900, 128, 128))
    check(case, "bfloat16", static=True)


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_where_nan_goes_in_one_launch(one_launch, monkeypatch, where):
    monkeypatch.setitem(contract.BLOCKS, "cutlass", (300, 500, 128, 128))
    contract.check_where_nan_goes(contract.run_known, "cutlass", where)


@pytest.mark.parametrize("dim", cutlass.HEAD_SIZES)
def test_many_wait_for_one(one_launch, dim):
    # Every row of keys has the same few blocks of queries.
    rng = np.random.default_rng(dim)
    rows, columns = (x.reshape(-1) for x in np.indices((3, 500)))
    mask = BlockMask.from_blocks(rows, columns, q_len=384, kv_len=64000)
    check(make_case(rng, mask, heads=(2, 1), dims=(dim, dim)), "bfloat16", static=True)


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
    test_the_same_bits_a_thousand_times(dim, "dense_2d")


@pytest.mark.parametrize("kind", [None, "dense_shared_batch", "per_key", "block"])
@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("static", [True, False])
def test_split_rows(one_launch, static, side, kind):
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (9, 30), (200, 3900, 128, 128))
    if side == "columns":
        mask = mask.transpose()
    case = make_case(rng, mask, dims=(64, 64)).cast("bfloat16")
    case = case if kind is None else with_bias(case, kind)
    run = contract.run_known if static else contract.run_case
    call = functools.partial(run, "cutlass", case)
    poison(jax.eval_shape(call))
    found, truth = call(), contract.expected(case)
    for name, x, y in zip(contract.NAMES, found, truth, strict=False):
        limit = 2e-6 if name == "lse" else contract.HALF_LIMIT
        assert contract.error(x, y) <= limit, name
    if kind is not None:
        contract.check_sixteen_bit_bias(case, found[5])


@pytest.mark.parametrize("dim", cutlass.HEAD_SIZES)
def test_the_same_bits_of_one_launch(one_launch, dim):
    check_the_same_bits(dim, None, static=True)


@pytest.mark.parametrize("kind", [None, "dense_2d", "per_key", "block"])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_the_same_bits_a_thousand_times(dim, kind):
    check_the_same_bits(dim, kind, static=False)


def check_the_same_bits(
    dim: int, kind: str | None, *, static: bool, bias_dtype: str = "float32"
) -> None:
    """Of a thousand runs, by two threads."""
    rng = np.random.default_rng(2)
    mask = random_mask(rng, (2000, 3000, 128, 128), 150)
    case = make_case(rng, mask, heads=(4, 2), dims=(dim, dim)).cast("bfloat16")
    case = case if kind is None else with_bias(case, kind, bias_dtype)
    arrays = {field.name: getattr(case, field.name) for field in fields(case)}
    known = {"mask": arrays.pop("mask")} if static else {}
    args = jax.device_put(arrays)
    run = jax.jit(functools.partial(contract.results, "cutlass", **known))
    first = jax.tree_util.tree_leaves(run(**args))

    def differ(_):
        found = jax.tree_util.tree_leaves(run(**args))
        return sum(int((x != y).sum()) for x, y in zip(found, first, strict=True))

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert sum(threads.map(differ, range(1000))) == 0


# ------------------------------------------------------------------------- with a bias


@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", BIASES)
def test_every_bias(kind, bias_dtype):
    check(with_bias(pair((503, 647, 128, 128)), kind, bias_dtype), "bfloat16")


@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["dense", "per_key", "block"])
def test_every_bias_without_batch_axes(kind, bias_dtype):
    case = pair((503, 647, 128, 128), batch=())
    check(with_bias(case, kind, bias_dtype), "bfloat16")


@pytest.mark.parametrize("dtype", cutlass.DTYPES)
@pytest.mark.parametrize("dim", [32, 48, 64])
@pytest.mark.parametrize(
    "kind", ["dense", "dense_2d", "dense_shared_batch", "block", "block_shared_heads"]
)
def test_all_gradients_beside_a_bias(one_launch, kind, dim, dtype):
    rng = np.random.default_rng(dim)
    mask = random_mask(rng, (1900, 2600, 128, 128), 200)
    case = make_case(rng, mask, heads=(4, 2), dims=(dim, dim))
    check(with_bias(case, kind, dtype), dtype, static=True)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("kind", ["dense", "block"])
def test_the_same_bits_of_all_gradients_beside_a_bias(one_launch, dim, kind):
    check_the_same_bits(dim, kind, static=True, bias_dtype="bfloat16")


@pytest.mark.parametrize("sizes", [(1000, 900), (2048, 1280), (640, 300)], ids=str)
@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [32, 64])
def test_bias_where_rows_have_all_blocks(dim, bias_dtype, sizes):
    case = make_case(np.random.default_rng(dim), of_all_blocks(*sizes), dims=(dim, dim))
    check(with_bias(case, "dense", bias_dtype), "bfloat16", static=True)


@pytest.mark.parametrize("block_kv", cutlass.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", cutlass.BLOCKS["block_q"])
@pytest.mark.parametrize(
    "kind, bias_dtype",
    [
        *(("dense", "float32"), ("dense", "bfloat16"), ("dense_2d", "float32")),
        *(("per_key", "float32"), ("block", "float32"), ("block", "bfloat16")),
    ],
)
def test_bias_in_every_block(kind, bias_dtype, block_q, block_kv):
    sizes = (block_q * 4 - 9, block_kv * 5 + 7, block_q, block_kv)
    check(with_bias(pair(sizes), kind, bias_dtype), "bfloat16")


@pytest.mark.parametrize("dtype", cutlass.DTYPES)
@pytest.mark.parametrize("kind", ["dense", "dense_shared_batch", "per_key", "block"])
@pytest.mark.parametrize("dim", [16, 24, 48, 64, 96, 128])
def test_every_head_size_beside_a_bias(dim, kind, dtype):
    check(with_bias(pair((500, 645, 128, 128), dim), kind), dtype)


@pytest.mark.parametrize("kind", ["dense", "dense_shared_heads", "per_key", "block"])
def test_bias_beside_batch_and_head_patterns(kind):
    rng = np.random.default_rng(13)
    case = CASES["batch_and_head_patterns"](rng, (300, 500, 128, 64))
    check(with_bias(case, kind), "bfloat16")


@pytest.mark.parametrize("pattern", ["distance", "window", "segments", "groups"])
def test_bias_beside_rules(pattern):
    case = CASES[pattern](np.random.default_rng(9), (300, 500, 128, 64))
    check(with_bias(case, "dense_2d"), "bfloat16")


@pytest.mark.parametrize("dim", cutlass.HEAD_SIZES)
@pytest.mark.parametrize("kind", ["dense_shared_heads", "block", "per_key"])
def test_bias_of_half_rows(half_rows, kind, dim):
    check(with_bias(pair((300, 700, 128, 128), dim), kind), "bfloat16")


@pytest.mark.parametrize("on_blocks", [False, True], ids=["dense", "block"])
@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_bad_bias(value, on_blocks):
    contract.check_bad_bias("cutlass", value, on_blocks)


def test_bad_bias_outside_the_mask():
    contract.test_bad_bias_outside_the_mask_is_never_seen("cutlass")


def test_memory_of_a_shared_bias():
    contract.check_memory_of_a_shared_bias("cutlass")
