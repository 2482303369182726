"""The whole Mosaic backend on a CPU; `emulation` says what runs and what is stood in.

Its numbers are held to those of the contract suite.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jsparse import BlockMask, block_sparse_attention
from jsparse.backends import mosaic_gpu
from tests.backends import test_contract as contract
from tests.pallas_kernels.emulation import emulated
from tests.support.cases import CASES, Case, make_case, random_mask

SIZES = {
    "128 x 128": (150, 300, 128, 128),
    "64 x 64": (150, 200, 64, 64),
    "64 x 128": (100, 300, 64, 128),
    "128 x 64": (150, 150, 128, 64),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Takes every problem, on a GPU of three multiprocessors that is not there."""
    if jax.default_backend() == "gpu":
        pytest.skip("the contract suite runs the kernels themselves")
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: None)
    monkeypatch.setattr(mosaic_gpu, "_num_multiprocessors", lambda: 3)
    contract.run.clear_cache()
    with emulated():
        yield


def check(case: Case, static: bool = False) -> None:
    """Outputs and gradients against float64; the mask traced, or closed over."""
    case = case.cast("bfloat16")
    if static:
        run = functools.partial(
            contract.run.__wrapped__, "mosaic_gpu", mask=case.mask, bias=None
        )
        found = jax.jit(run)(case.q, case.k, case.v, dout=case.dout, dlse=case.dlse)
    else:
        found = contract.run_case("mosaic_gpu", case)
    for name, x, y in zip(contract.NAMES, found, contract.expected(case), strict=False):
        if np.all(np.isneginf(y) | (y == 0)):
            np.testing.assert_array_equal(np.asarray(x, np.float64), y, err_msg=name)
        else:
            limit = 2e-6 if name == "lse" else contract.HALF_LIMIT
            assert contract.error(x, y) <= limit, (name, contract.error(x, y))


@pytest.mark.parametrize(
    "name", ["plain", "batch_and_head_patterns", "window", "distance", "groups"]
)
def test_traced_patterns(name):
    check(CASES[name](np.random.default_rng(0), SIZES["128 x 128"]))


@pytest.mark.parametrize("name", ["grouped_query", "segments", "lengths", "nothing"])
def test_known_patterns(name):
    check(CASES[name](np.random.default_rng(0), SIZES["128 x 128"]), static=True)


@pytest.mark.parametrize("sizes", list(SIZES)[1:])
def test_small_blocks(sizes):
    check(CASES["plain"](np.random.default_rng(0), SIZES[sizes]))


@pytest.mark.parametrize("dim", [24, 128])
def test_head_sizes(dim):
    rng = np.random.default_rng(dim)
    mask = random_mask(rng, SIZES["128 x 128"], 5)
    check(make_case(rng, mask, heads=(1, 1), dims=(dim, dim)))


@pytest.mark.parametrize("static", [True, False])
def test_split_rows(static):
    # One row of 12 blocks for three multiprocessors.
    rng = np.random.default_rng(1)
    full = np.arange(12) % 2 == 0
    mask = BlockMask.from_blocks(
        np.zeros(12, int),
        np.arange(12),
        q_len=100,
        kv_len=1536,
        block_kv=128,
        elements=rng.random((12, 128, 128)) < 0.5,
        full=full,
    )
    check(make_case(rng, mask, heads=(1, 1)), static)


def test_negative_scale():
    rng = np.random.default_rng(2)
    mask = random_mask(rng, SIZES["128 x 128"], 5)
    case = make_case(rng, mask, heads=(1, 1)).cast("bfloat16")

    def loss(q, implementation):
        out = block_sparse_attention(
            q, case.k, case.v, mask, scale=-0.5, implementation=implementation
        )
        return (out * case.dout).sum()

    ours, plain = (
        jax.jit(jax.grad(loss), static_argnums=1)(case.q, name)
        for name in ("mosaic_gpu", "reference")
    )
    assert contract.error(ours, plain) < 1e-2


@pytest.mark.parametrize("where", ["k", "v", "dout"])
def test_nan_stays_where_attention_carries_it(where):
    contract.test_nan_stays_where_attention_carries_it("mosaic_gpu", where)
