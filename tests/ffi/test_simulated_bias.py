"""A bias of the CUDA kernels in a simulated CTA, from the public operation down.

The gradient of a bias that is shared comes from the Mosaic kernel, which is emulated.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import BlockBias, block_sparse_attention
from jsparse.backends import _hopper, cutlass
from tests.backends import test_contract as contract
from tests.backends.conftest import half_rows as half_rows
from tests.backends.conftest import one_launch as one_launch
from tests.ffi.test_simulated import check, check_the_order_of_threads, run
from tests.ffi.test_simulated_backward import launches_of
from tests.pallas_kernels.emulation import emulated
from tests.support.cases import (
    CASES,
    Case,
    make_case,
    of_all_blocks,
    random_mask,
    uneven_rows,
    with_bias,
)

BIASES = (
    *(("dense", "float32"), ("dense_shared_batch", "bfloat16")),
    *(("dense_shared_heads", "float16"), ("dense_2d", "float32")),
    *(("per_key", "float32"), ("block", "bfloat16"), ("block_shared_heads", "float16")),
)
OWN = (
    *(("dense", "float32"), ("dense", "bfloat16"), ("dense", "float16")),
    *(("per_key", "float32"), ("block", "float32"), ("block", "bfloat16")),
)
"""Those of which, without batch axes, the CUDA kernels compute the gradient."""


def check_gradients(case: Case, dtype: str = "bfloat16", known: bool = False) -> None:
    case = case.cast(dtype)
    run = contract.run_known if known else contract.run_case
    found = jax.block_until_ready(run("cutlass", case))
    contract.check_sixteen_bit(found, case, contract.LIMITS[dtype])
    contract.check_sixteen_bit_bias(case, found[5], contract.LIMITS[dtype])


@pytest.mark.parametrize("kind, dtype", BIASES)
def test_every_bias(on_cpu, kind, dtype):
    rng = np.random.default_rng(3)
    mask = random_mask(rng, (200, 333, 128, 64), 7)
    case = make_case(rng, mask, batch=(2,), heads=(2, 1))
    check(with_bias(case, kind, dtype))


@pytest.mark.parametrize("kind, dtype", OWN)
def test_every_gradient(on_cpu, kind, dtype):
    rng = np.random.default_rng(3)
    mask = random_mask(rng, (200, 333, 128, 64), 7)
    check_gradients(with_bias(make_case(rng, mask, heads=(2, 1)), kind, dtype))


@pytest.mark.parametrize("kind", ["dense_2d", "block_shared_heads"])
def test_gradient_of_a_shared_bias(on_cpu, kind):
    rng = np.random.default_rng(3)
    mask = random_mask(rng, (150, 200, 128, 64), 4)
    with emulated():
        check_gradients(with_bias(make_case(rng, mask, heads=(2, 1)), kind))


@pytest.mark.parametrize("block_kv", cutlass.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", cutlass.BLOCKS["block_q"])
@pytest.mark.parametrize("dim", cutlass.HEAD_SIZES)
def test_every_kernel(on_cpu, dim, block_q, block_kv):
    rng = np.random.default_rng(dim)
    sizes = (block_q * 2 - 9, block_kv * 2 + 7, block_q, block_kv)
    case = make_case(rng, random_mask(rng, sizes, 5), heads=(2, 1), dims=(dim, dim))
    kind = "dense" if block_q == block_kv else "block"
    check_gradients(with_bias(case, kind, "bfloat16"), "float16")


@pytest.mark.parametrize("half_rows", ["halves"], indirect=True)
@pytest.mark.parametrize("dim", cutlass.HEAD_SIZES)
def test_every_kernel_of_half_rows(on_cpu, half_rows, dim):
    rng = np.random.default_rng(dim)
    mask = random_mask(rng, (247, 1159, 128, 128), 14)
    case = make_case(rng, mask, heads=(2, 1), dims=(dim, dim))
    check(with_bias(case, "dense" if dim == 64 else "block"))


@pytest.mark.parametrize("sizes", [(512, 256), (390, 333), (600, 150)], ids=str)
@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [24, 64])
def test_rows_of_all_blocks_are_computed_two_by_two(on_cpu, dim, bias_dtype, sizes):
    rng = np.random.default_rng(dim)
    mask = of_all_blocks(*sizes, block_kv=64)
    case = make_case(rng, mask, heads=(2, 1), dims=(dim, dim))
    case = with_bias(case, "dense", bias_dtype).cast("bfloat16")
    found = jax.block_until_ready(contract.run_known("cutlass", case))
    contract.check_sixteen_bit(found, case, contract.LIMITS["bfloat16"])


@pytest.mark.parametrize(
    "name, kind",
    [
        *(("batch_and_head_patterns", "dense"), ("batch_patterns", "per_key")),
        *(("distance", "dense"), ("groups", "block")),
    ],
)
def test_beside_other_patterns(on_cpu, name, kind):
    case = CASES[name](np.random.default_rng(0), (260, 340, 128, 64))
    check_gradients(with_bias(case, kind))


def test_blocks_of_batch_and_head_patterns(on_cpu):
    rng = np.random.default_rng(0)
    case = CASES["batch_and_head_patterns"](rng, (260, 340, 128, 64))
    check(with_bias(case, "block"))


@pytest.mark.parametrize("kind", ["dense", "per_key", "block"])
@pytest.mark.parametrize("side, known", [("rows", True), ("columns", False)])
def test_split_rows(on_cpu, monkeypatch, known, side, kind):
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 8)
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (9, 12), (200, 800, 128, 64))
    if side == "columns":
        mask = mask.transpose()
    case = with_bias(make_case(rng, mask, heads=(1, 1)), kind)
    check_gradients(case, known=known)


# ---------------------------------------------------------- all gradients in one launch


@pytest.mark.parametrize(
    "kind, dtype",
    [
        *(("dense", "bfloat16"), ("dense", "float16"), ("block", "bfloat16")),
        *(("dense_2d", "bfloat16"), ("block_shared_heads", "bfloat16")),
    ],
)
@pytest.mark.parametrize("dim", [24, 64])
def test_all_gradients_in_one_launch(on_cpu, one_launch, dim, kind, dtype):
    # Many steps an item, of few tiles: each has several sums.
    rng = np.random.default_rng(dim)
    mask = random_mask(rng, (500, 469, 128, 128), 13)
    case = make_case(rng, mask, heads=(2, 1), dims=(dim, dim))
    case = with_bias(case, kind, dtype)
    with emulated():
        check_gradients(case, dtype, known=True)
        assert launches_of(with_bias(case, kind, "bfloat16")) == 1


@pytest.mark.parametrize("kind", ["dense", "block"])
def test_split_rows_in_one_launch(on_cpu, one_launch, monkeypatch, kind):
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 8)
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (9, 12), (200, 1600, 128, 128)).transpose()
    case = with_bias(make_case(rng, mask, heads=(1, 1)), kind, "bfloat16")
    check_gradients(case, known=True)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_threads_changes_no_gradient(on_cpu, one_launch, dim, seed):
    rng = np.random.default_rng(5)
    mask = random_mask(rng, (380, 500, 128, 128), 9)
    case = make_case(rng, mask, heads=(2, 1), dims=(dim, dim)).cast("bfloat16")
    case = with_bias(case, "dense", "bfloat16")
    call = functools.partial(contract.run_known, "cutlass", case)
    check_the_order_of_threads(on_cpu, call, seed)


@pytest.mark.parametrize("lead", [(3, 1), (1, 2), (1, 1)], ids=str)
def test_shared_over_some_batch_axes(on_cpu, lead):
    rng = np.random.default_rng(4)
    mask = random_mask(rng, (130, 200, 128, 64), 4)
    case = make_case(rng, mask, batch=(3, 2)).cast("bfloat16")
    bias = rng.standard_normal((*lead, 2, 130, 200)).astype(np.float32)
    out, _ = run(case.q, case.k, case.v, mask, bias=bias)
    q, k, v = (jnp.asarray(x).astype("float32") for x in (case.q, case.k, case.v))
    truth = block_sparse_attention(q, k, v, mask, bias=bias, implementation="reference")
    assert contract.error(out, truth) <= contract.HALF_LIMIT


def test_a_bias_without_a_gradient(on_cpu):
    rng = np.random.default_rng(5)
    mask = random_mask(rng, (200, 333, 128, 64), 7)
    case = with_bias(make_case(rng, mask), "dense_2d").cast("bfloat16")

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(implementation, *arrays):
        def loss(q, k, v):
            attend = functools.partial(block_sparse_attention, bias=case.bias)
            out = attend(q, k, v, mask, implementation=implementation)
            return (out.astype("float32") * case.dout.astype("float32")).sum()

        return jax.grad(loss, (0, 1, 2))(*arrays)

    arrays = case.q, case.k, case.v
    exact = gradients("reference", *(x.astype("float32") for x in arrays))
    for x, y in zip(gradients("cutlass", *arrays), exact, strict=True):
        assert contract.error(x, y) <= 2 * contract.HALF_LIMIT


@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_threads_changes_nothing(on_cpu, monkeypatch, seed):
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 1)
    rng = np.random.default_rng(5)
    mask = random_mask(rng, (250, 380, 128, 128), 5)
    case = make_case(rng, mask, heads=(4, 2), dims=(64, 64)).cast("bfloat16")
    case = with_bias(case, "block")
    call = functools.partial(contract.run_case, "cutlass", case)
    check_the_order_of_threads(on_cpu, call, seed)


# ---------------------------------------------------------------------- bad values


def of_one_head(name: str) -> Case:
    rng = np.random.default_rng(11)
    mask = CASES[name](rng, (260, 340, 128, 64)).mask
    return make_case(rng, mask, heads=(1, 1)).cast("bfloat16")


def placed(case: Case, dense: np.ndarray, on_blocks: bool) -> Any:
    return BlockBias.from_dense(case.mask, dense) if on_blocks else dense


@pytest.mark.parametrize("on_blocks", [False, True], ids=["dense", "block"])
def test_minus_infinity_masks_the_element(on_cpu, on_blocks):
    rng, case = np.random.default_rng(10), of_one_head("everything")
    keep = rng.random(case.mask.to_dense().shape[2:]) < 0.4
    keep[3] = False
    dense = np.where(keep, 0.0, -np.inf).astype(np.float32)
    case.bias = placed(case, dense, on_blocks)
    found, truth = contract.run_case("cutlass", case), contract.expected(case)
    for name, x, y in zip(contract.NAMES, found, truth, strict=False):
        assert contract.error(x, y) <= contract.HALF_LIMIT, name
    assert np.isneginf(found[1][:, 3]).all()
    grad = found[5].values if on_blocks else found[5]
    masked = np.isneginf(case.bias.values if on_blocks else dense)
    assert not np.asarray(grad)[masked].any()


@pytest.mark.parametrize("on_blocks", [False, True], ids=["dense", "block"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_values_reach_only_their_row(on_cpu, value, on_blocks):
    case = of_one_head("plain")
    dense = np.zeros((case.mask.q_len, case.mask.kv_len), np.float32)
    row, key = np.argwhere(case.mask.to_dense()[0, 0])[40]

    def results(dense):
        bias = placed(case, dense, on_blocks)
        return contract.run_case("cutlass", dataclasses.replace(case, bias=bias))

    clean = results(dense)
    dense[row, key] = value
    found, others = results(dense), np.arange(case.mask.q_len) != row
    for n in (0, 2):  # out and dq
        x, y = np.asarray(found[n]), np.asarray(clean[n])
        np.testing.assert_array_equal(x[others], y[others])
        assert np.isnan(x[row]).any()


def test_what_no_query_sees_is_not_read(on_cpu):
    case = of_one_head("plain")
    case.bias = np.zeros((case.mask.q_len, case.mask.kv_len), np.float32)
    clean = contract.run_case("cutlass", case)
    case.bias[~case.mask.to_dense()[0, 0]] = np.nan
    found = contract.run_case("cutlass", case)
    for name, x, y in zip((*contract.NAMES, "dbias"), found, clean, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
