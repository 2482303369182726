"""The whole Mosaic backend on a CPU; `emulation` says what runs and what is stood in.

Held to the house rule, twice the error of plain jnp: how exactly registers compute is
for the contract suite on a GPU.
"""

from __future__ import annotations

import faulthandler
import functools

import jax
import numpy as np
import pytest

from jsparse import block_sparse_attention
from jsparse.backends import mosaic_gpu
from jsparse.pallas_kernels.mosaic_gpu import _schedule, fwd_sm90
from tests.backends import test_contract as contract
from tests.pallas_kernels.emulation import emulated
from tests.support.cases import CASES, Case, make_case, random_mask, uneven_rows

SIZES = {
    "128 x 128": (150, 300, 128, 128),
    "64 x 64": (150, 200, 64, 64),
    "64 x 128": (100, 300, 64, 128),
    "128 x 64": (150, 150, 128, 64),
    "64 x 32": (100, 110, 64, 32),
    "128 x 32": (150, 110, 128, 32),
}
LONGEST = 120
"""Seconds of a test; each takes about ten, or for ever where a kernel waits in vain."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch, capsys):
    """Takes every problem, on a GPU of three multiprocessors that is not there."""
    if jax.default_backend() == "gpu":
        pytest.skip("the contract suite runs the kernels themselves")
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: None)
    monkeypatch.setattr(mosaic_gpu, "_num_multiprocessors", lambda: 3)
    with emulated(), capsys.disabled():
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        yield
        faulthandler.cancel_dump_traceback_later()


def check(case: Case, static: bool = False) -> None:
    """Outputs and gradients against float64; the mask traced, or closed over."""
    case = case.cast("bfloat16")
    if static:
        run = functools.partial(
            contract.results, "mosaic_gpu", mask=case.mask, bias=None
        )
        found = jax.jit(run)(case.q, case.k, case.v, dout=case.dout, dlse=case.dlse)
    else:
        found = contract.run_case("mosaic_gpu", case)
    plain, truth = contract.run_case("reference", case), contract.expected(case)
    for name, x, y, z in zip(contract.NAMES, found, truth, plain, strict=False):
        if np.all(np.isneginf(y) | (y == 0)):
            np.testing.assert_array_equal(np.asarray(x, np.float64), y, err_msg=name)
        else:
            limit = 2 * contract.error(z, y) + 2e-6
            assert contract.error(x, y) <= limit, (name, contract.error(x, y), limit)


@pytest.mark.parametrize("name", ["batch_and_head_patterns", "groups"])
def test_traced_patterns(name):
    check(CASES[name](np.random.default_rng(0), SIZES["128 x 128"]))


@pytest.mark.parametrize("name", ["grouped_query", "nothing"])
def test_known_patterns(name):
    check(CASES[name](np.random.default_rng(0), SIZES["128 x 128"]), static=True)


@pytest.mark.parametrize("sizes", list(SIZES)[1:4])
def test_small_blocks(sizes):
    check(CASES["plain"](np.random.default_rng(0), SIZES[sizes]))


@pytest.mark.parametrize(
    "sizes, dims",
    [
        ("128 x 128", (128, 128)),
        ("128 x 128", (256, 256)),
        ("128 x 32", (192, 128)),
        ("64 x 32", (64, 192)),
    ],
)
def test_large_heads(sizes, dims):
    rng = np.random.default_rng(3)
    mask = random_mask(rng, SIZES[sizes], 5)
    check(make_case(rng, mask, heads=(1, 1), dims=dims))


def test_rules():
    rng, sizes = np.random.default_rng(0), SIZES["128 x 32"]
    cases = [CASES[name](rng, sizes) for name in ("segments", "window", "distance")]
    rules = sum((case.mask.rules for case in cases), ())
    mask = random_mask(rng, sizes, 12, rules=rules)
    check(make_case(rng, mask, heads=(1, 1)))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("launch", ["few_blocks", "few_rows"])
def test_split_rows(launch, static, monkeypatch):
    # Rows of 1 and 6 blocks, fewer than workers: the longer one comes first.
    monkeypatch.setattr(fwd_sm90, "launch_of", lambda *_: launch)
    monkeypatch.setattr(_schedule, "MERGE_COST", 0.0)
    rng = np.random.default_rng(1)
    mask = uneven_rows(rng, (1, 6), (200, 700, 128, 128))
    check(make_case(rng, mask, heads=(1, 1)), static)


@pytest.mark.parametrize("teams", [2, 3])
@pytest.mark.parametrize("name", ["grouped_query", "window"])
def test_teams_that_share_items(name, teams, monkeypatch):
    shares = fwd_sm90.Config(
        64, tile_kv=64, num_stages=2, ping_pong=False, teams=teams, share=True
    )
    monkeypatch.setattr(fwd_sm90.Config, "choose", lambda *_: shares)
    check(CASES[name](np.random.default_rng(8), SIZES["128 x 128"]))


@pytest.mark.parametrize("static", [True, False])
def test_items_of_half_a_block(static, monkeypatch):
    half = fwd_sm90.Config(64, tile_kv=64, num_stages=2, ping_pong=False, teams=2)
    monkeypatch.setattr(fwd_sm90.Config, "choose", lambda *_: half)
    rng, sizes = np.random.default_rng(5), (170, 700, 128, 128)
    mask = uneven_rows(rng, (2, 6), sizes)
    case = CASES["window"](rng, sizes)
    check(make_case(rng, mask, heads=(2, 1)), static)
    check(case, static)


def test_negative_scale():
    rng = np.random.default_rng(2)
    mask = random_mask(rng, SIZES["64 x 64"], 5)
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


@pytest.mark.parametrize("where", ["k", "v", "q", "dout"])
def test_nan_stays_where_attention_carries_it(where, monkeypatch):
    monkeypatch.setitem(contract.BLOCKS, "mosaic_gpu", SIZES["64 x 64"])
    contract.test_nan_stays_where_attention_carries_it("mosaic_gpu", where)
