"""The whole Mosaic backend on a CPU; `emulation` says what runs and what is stood in.

Held to the house rule, twice the error of plain jnp: how exactly registers compute is
for the contract suite on a GPU.
"""

from __future__ import annotations

import dataclasses
import faulthandler

import jax
import numpy as np
import pytest

from jsparse import block_sparse_attention
from jsparse.backends import _hopper, _mosaic_bias, mosaic_gpu
from jsparse.bias import BlockBias
from jsparse.pallas_kernels.mosaic_gpu import (
    _schedule,
    bwd_dbias_sm90,
    bwd_dkv_sm90,
    bwd_dq_sm90,
    fwd_sm90,
)
from jsparse.pallas_kernels.mosaic_gpu._gradient import BackwardConfig
from jsparse.patterns import BlockMask
from tests.backends import test_contract as contract
from tests.backends import test_score_function as score_function
from tests.pallas_kernels.emulation import emulated
from tests.support.cases import (
    CASES,
    Case,
    biases,
    cast_bias,
    make_case,
    random_mask,
    uneven_rows,
    with_bias,
    with_entries,
)

SIZES = {
    "128 x 128": (150, 300, 128, 128),
    "64 x 64": (150, 200, 64, 64),
    "64 x 128": (100, 300, 64, 128),
    "128 x 64": (150, 150, 128, 64),
    "64 x 32": (100, 110, 64, 32),
    "128 x 32": (150, 110, 128, 32),
}
HALVES = (170, 180, 128, 128)
"""The last half of a block is one beyond the last row, of queries and of keys."""

NUM_CTAS = 3
"""Few, so that each has several items, and as each is emulated, items or not."""

LONGEST = 600
"""Seconds of a test; each takes about ten, a hundred on a busy machine, or for ever
where a kernel waits in vain."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch, capsys):
    """Takes every problem, on a GPU of few multiprocessors that is not there."""
    if jax.default_backend() == "gpu":
        pytest.skip("the contract suite runs the kernels themselves")
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: None)
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: NUM_CTAS)
    for module, name in (
        *((contract, "run_case"), (contract, "run_known")),
        (score_function, "run"),
    ):
        monkeypatch.setattr(module, name, to_the_end(getattr(module, name)))
    with emulated(), capsys.disabled():
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        yield
        faulthandler.cancel_dump_traceback_later()
    jax.clear_caches()  # of 100 MB a test


def to_the_end(f):
    """``f`` that returns when all is computed.

    The threads of a kernel wait for one another. What runs beside them would take
    threads from the same pool, and they could wait for ever.
    """
    return lambda *args, **options: jax.block_until_ready(f(*args, **options))


def check(case: Case, static: bool = False) -> tuple:
    """Outputs and gradients against float64; the mask traced, or closed over.

    Returns:
        What was found, the gradient of the bias last.
    """
    case = case.cast("bfloat16")
    found = (contract.run_known if static else contract.run_case)("mosaic_gpu", case)
    plain, truth = contract.run_case("reference", case), contract.expected(case)
    for name, x, y, z in zip(contract.NAMES, found, truth, plain, strict=False):
        if np.all(np.isneginf(y) | (y == 0)):
            np.testing.assert_array_equal(np.asarray(x, np.float64), y, err_msg=name)
        else:
            limit = 2 * contract.error(z, y) + 2e-6
            assert contract.error(x, y) <= limit, (name, contract.error(x, y), limit)
    return found


@pytest.mark.parametrize("name", ["batch_and_head_patterns", "groups"])
def test_traced_patterns(name):
    check(CASES[name](np.random.default_rng(0), SIZES["128 x 128"]))


def test_vmap_over_some_lists_of_a_mask():
    contract.check_vmap_over_some_lists("mosaic_gpu")


def test_bias_hides_bad_values():
    contract.check_bias_hides_bad_values("mosaic_gpu")


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


@pytest.mark.parametrize("launch, static", [("few_blocks", True), ("few_rows", False)])
def test_split_rows(launch, static, monkeypatch):
    # Rows of 1 and 6 blocks, fewer than workers: the longer one comes first.
    monkeypatch.setattr(fwd_sm90, "launch_of", lambda *_: launch)
    monkeypatch.setattr(_schedule, "MERGE_COST", 0.0)
    rng = np.random.default_rng(1)
    mask = uneven_rows(rng, (1, 6), (200, 700, 128, 128))
    check(make_case(rng, mask, heads=(1, 1)), static)


BIASES = [
    ("dense_shared_batch", "float32", "128 x 128"),
    ("dense", "bfloat16", "64 x 32"),
    ("dense_shared_heads", "float16", "128 x 64"),
    ("dense_2d", "float32", "64 x 64"),
    ("per_key", "float32", "64 x 128"),
    ("block", "bfloat16", "128 x 128"),
    ("block_shared_heads", "float32", "64 x 32"),
    ("linear", "float32", "64 x 64"),
    ("quadratic", "float32", "64 x 32"),
    ("table", "float32", "64 x 64"),
    ("gaussian", "float32", "128 x 64"),
]


@pytest.mark.parametrize("kind, dtype, sizes", BIASES)
def test_bias(kind, dtype, sizes):
    rng = np.random.default_rng(4)
    mask = random_mask(rng, SIZES[sizes], 5)
    case = make_case(rng, mask, batch=(2,), heads=(2, 1))
    case.bias = cast_bias(biases(rng, mask, 2, 2)[kind], dtype)
    found = check(case)
    contract.check_sixteen_bit_bias(case.cast("bfloat16"), found[5])


@pytest.mark.parametrize(
    "kind, sizes, patterns, dtype",
    [
        ("entry", "64 x 64", 1, "bfloat16"),
        ("entry", "128 x 32", 2, "float32"),
        ("entry_shared_heads", "64 x 128", 2, "float16"),
        ("entry_shared_batch", "128 x 128", 1, "float32"),
    ],
)
def test_bias_by_entry(kind, sizes, patterns, dtype):
    case = with_entries(kind, SIZES[sizes], patterns=patterns, dim=16)
    case.bias = cast_bias(case.bias, dtype)
    found = check(case)
    contract.check_sixteen_bit_bias(case.cast("bfloat16"), found[5])


def test_two_stages_beside_a_bias_by_entry():
    """Lists come before there is a place for values, given back a step later."""
    dim, sizes = 80, (60, 400, 64, 64)  # three blocks a row
    config = fwd_sm90.Config.choose(dim, dim, 64, 64, NUM_CTAS, "few_rows", "entry")
    assert config.num_stages == 2
    check(with_entries("entry", sizes, dim=dim))


@pytest.mark.parametrize("kind", ["block", "dense_shared_heads", "table"])
def test_bias_beside_batch_and_head_patterns(kind):
    rng = np.random.default_rng(6)
    case = CASES["batch_and_head_patterns"](rng, (100, 150, 64, 64))
    case.bias = biases(rng, case.mask, 2, 2)[kind]
    found = check(case)
    contract.check_sixteen_bit_bias(case.cast("bfloat16"), found[5])


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("kind, dtype", [("dense", "float32"), ("block", "bfloat16")])
def test_bias_that_nobody_shares(kind, dtype, static, monkeypatch):
    monkeypatch.setattr(bwd_dbias_sm90, "backward_dbias", None)
    rng = np.random.default_rng(7)
    mask = random_mask(rng, SIZES["64 x 64"], 5)
    case = make_case(rng, mask, heads=(2, 1))
    case.bias = cast_bias(biases(rng, mask, 2, 1)[kind], dtype)
    if kind == "dense":
        case.bias = case.bias[0]  # there is no batch
    elif not static:
        # A block that no list has: its gradient is 0, whatever memory holds.
        more = ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0))
        case.bias = BlockBias(np.pad(case.bias.values, more))
    found = check(case, static)
    contract.check_sixteen_bit_bias(case.cast("bfloat16"), found[5])


@pytest.mark.parametrize("kind", ["dense", "block"])
@pytest.mark.parametrize("every", [True, False])
def test_a_gradient_without_gaps_is_taken_as_it_is(kind, every, monkeypatch):
    given = []

    def listen(bias, mask):
        given.append(bias)
        return bias_blocks(bias, mask)

    bias_blocks = _mosaic_bias.bias_blocks
    monkeypatch.setattr(_mosaic_bias, "bias_blocks", listen)
    rng = np.random.default_rng(7)
    rows, columns = np.divmod(np.arange(6 if every else 5), 2)
    mask = BlockMask.from_blocks(
        rows, columns, q_len=192, kv_len=128, block_q=64, block_kv=64
    )
    case = make_case(rng, mask, heads=(2, 1))
    case.bias = biases(rng, mask, 2, 1)[kind]
    if kind == "dense":
        case.bias = case.bias[0]  # there is no batch
    found = check(case, static=True)
    contract.check_sixteen_bit_bias(case.cast("bfloat16"), found[5])
    assert bool(given) == (kind == "dense" and not every)


@pytest.mark.parametrize("kind", ["dense_2d", "block", "linear", "table", "gaussian"])
def test_bias_without_a_gradient(kind, monkeypatch):
    monkeypatch.setattr(bwd_dbias_sm90, "backward_dbias", None)
    rng = np.random.default_rng(7)
    mask = random_mask(rng, SIZES["64 x 64"], 5)
    case = make_case(rng, mask, heads=(2, 1))
    bias = biases(rng, mask, 2, 1)[kind]
    case = dataclasses.replace(case, bias=bias).cast("bfloat16")
    launch, found = bwd_dq_sm90.backward_dq, []
    monkeypatch.setattr(
        bwd_dq_sm90,
        "backward_dq",
        lambda *args, **options: found.append(launch(*args, **options)) or found[-1],
    )

    def gradients(implementation, case):
        def attend(q, k, v):
            return block_sparse_attention(
                q, k, v, case.mask, bias=case.bias, implementation=implementation
            )

        @jax.jit
        def pull(dout, *qkv):
            return jax.vjp(attend, *qkv)[1](dout)

        return jax.block_until_ready(pull(case.dout, case.q, case.k, case.v))

    plain, truth = (gradients("reference", x) for x in (case, case.cast("float32")))
    for x, y, z in zip(gradients("mosaic_gpu", case), truth, plain, strict=True):
        assert contract.error(x, y) <= 2 * contract.error(z, y) + 2e-6
    ((_, of_bias),) = found
    assert of_bias == (None, None, None)


@pytest.mark.parametrize("sizes", ["64 x 64", "128 x 128"])
def test_outputs_straight_from_registers(sizes, monkeypatch):
    for where in (fwd_sm90.Config, bwd_dq_sm90, bwd_dkv_sm90):
        choose = where.choose

        def unstaged(*args, choose=choose):
            return dataclasses.replace(choose(*args), staged=False)

        monkeypatch.setattr(where, "choose", unstaged)
    rng = np.random.default_rng(9)
    mask = random_mask(rng, SIZES[sizes], 5)
    check(make_case(rng, mask, heads=(2, 1)))


@pytest.mark.parametrize(
    "kind, count",
    [("dense_shared_batch", 2), ("dense_shared_heads", 3), ("block_shared_heads", 3)],
)
def test_shares_of_a_bias(kind, count, monkeypatch):
    monkeypatch.setattr(bwd_dbias_sm90, "num_shares", lambda *_: count)
    rng = np.random.default_rng(8)
    mask = random_mask(rng, SIZES["64 x 64"], 5)
    case = make_case(rng, mask, batch=(3,), heads=(2, 1))
    case.bias = biases(rng, mask, 2, 3)[kind]
    found = check(case)
    contract.check_sixteen_bit_bias(case.cast("bfloat16"), found[5])


@pytest.mark.parametrize(
    "tiles, visits, workers, expected",
    [
        (144, 768, 132, 6),  # triangle attention: two rounds for 1.09 of work
        (144, 1, 132, 1),
        (4096, 128, 132, 1),
        (8, 768, 132, 8),
        (132, 5, 132, 1),
    ],
)
def test_number_of_shares(tiles, visits, workers, expected):
    assert bwd_dbias_sm90.num_shares(tiles, visits, workers) == expected


@pytest.mark.parametrize("lead", [(3, 1), (1, 2)], ids=str)
def test_bias_shared_over_some_batch_axes(lead):
    rng = np.random.default_rng(5)
    mask = random_mask(rng, (60, 70, 64, 64), 3)
    case = make_case(rng, mask, batch=(3, 2), heads=(1, 1)).cast("bfloat16")
    case.bias = rng.standard_normal((*lead, 1, 60, 70)).astype(np.float32)
    found = contract.run_case("mosaic_gpu", case)
    plain = contract.run_case("reference", case)
    truth = contract.run_case("reference", case.cast("float32"))
    for x, y, z in zip(found, truth, plain, strict=True):
        assert contract.error(x, y) <= 2 * contract.error(z, y) + 2e-6


@pytest.mark.parametrize(
    "value, on_blocks",
    [(-np.inf, False), (-np.inf, True), (np.inf, False), (np.nan, True)],
)
def test_bad_bias(value, on_blocks, monkeypatch):
    monkeypatch.setitem(contract.BLOCKS, "mosaic_gpu", SIZES["64 x 64"])
    contract.check_bad_bias("mosaic_gpu", value, on_blocks)


def test_bad_bias_outside_the_mask(monkeypatch):
    monkeypatch.setitem(contract.BLOCKS, "mosaic_gpu", SIZES["64 x 64"])
    contract.test_bad_bias_outside_the_mask_is_never_seen("mosaic_gpu")


@pytest.mark.parametrize("form", ["linear", "quadratic", "table"])
def test_an_atom_without_a_place(form, monkeypatch):
    monkeypatch.setitem(contract.BLOCKS, "mosaic_gpu", SIZES["64 x 64"])
    contract.test_an_atom_without_a_place_reaches_only_who_sees_it("mosaic_gpu", form)


@pytest.mark.parametrize("kind", ["per_key", "linear", "table", "gaussian"])
def test_sums_of_split_rows(kind, monkeypatch):
    monkeypatch.setattr(_schedule, "MERGE_COST", 0.0)
    rng = np.random.default_rng(1)
    mask = uneven_rows(rng, (1, 6), (200, 700, 128, 128))
    case = make_case(rng, mask, heads=(1, 1))
    case.bias = biases(rng, mask, 1, 1)[kind]
    found = check(case, static=True)
    # Gaussians overlap: as of slopes, their gradients take the error of delta, which
    # comes from the rounded output, in xla too.
    like = ("reference", "xla")
    contract.check_sixteen_bit_bias(case.cast("bfloat16"), found[5], like=like)


SCORES = [
    ("alibi", "grouped_query", "64 x 64"),
    ("by_token", "batch_and_head_patterns", "64 x 32"),
    ("by_token", "window", "64 x 128"),
    ("causal", "plain", "128 x 64"),
    ("soft_cap", "plain", "64 x 64"),
    ("computed", "lengths", "64 x 64"),
    ("fixed", "plain", "64 x 32"),
]


@pytest.mark.parametrize("name, pattern, sizes", SCORES)
def test_score_function(name, pattern, sizes):
    case = CASES[pattern](np.random.default_rng(9), SIZES[sizes]).cast("bfloat16")
    found, plain = (score_function.run(x, name, case) for x in ("mosaic_gpu", "xla"))
    truth = score_function.expected(name, case)
    for n, (x, y, z) in enumerate(zip(found, truth, plain, strict=True)):
        limit = 2 * contract.error(z, y) + (2e-6 if n < 5 else contract.HALF_LIMIT)
        assert contract.error(x, y) <= limit, (n, contract.error(x, y), limit)


def half_a_block(teams: int) -> fwd_sm90.Config:
    """Whose items are of half a block, of the forward kernel."""
    fields = {"num_stages": 2, "ping_pong": False, "num_ctas": NUM_CTAS}
    return fwd_sm90.Config(64, tile_kv=64, teams=teams, **fields)


@pytest.mark.parametrize("name, teams", [("grouped_query", 2), ("window", 3)])
def test_teams_that_share_items(name, teams, monkeypatch):
    shares = dataclasses.replace(half_a_block(teams), share=True)
    monkeypatch.setattr(fwd_sm90.Config, "choose", lambda *_: shares)
    check(CASES[name](np.random.default_rng(8), SIZES["128 x 128"]))


@pytest.mark.parametrize("static", [True, False])
def test_items_of_half_a_block(static, monkeypatch):
    monkeypatch.setattr(fwd_sm90.Config, "choose", lambda *_: half_a_block(teams=2))
    rng, sizes = np.random.default_rng(5), HALVES
    if static:
        case = make_case(rng, uneven_rows(rng, (1, 2), sizes), heads=(2, 1))
    else:
        case = CASES["window"](rng, sizes)
    check(case, static)


@pytest.mark.parametrize("kind", ["dense_2d", "block", "per_key", "linear"])
def test_bias_beside_items_of_half_a_block(kind, monkeypatch):
    monkeypatch.setattr(fwd_sm90.Config, "choose", lambda *_: half_a_block(teams=2))
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (1, 2), HALVES)
    case = make_case(rng, mask, heads=(2, 1))
    case.bias = biases(rng, mask, 2, 1)[kind]
    check(case)


def backward_of_half_a_block(monkeypatch):
    half = BackwardConfig(num_stages=3, teams=2, tile_rows=64, num_ctas=NUM_CTAS)
    for module in (bwd_dq_sm90, bwd_dkv_sm90):
        monkeypatch.setattr(module, "choose", lambda *_: half)


@pytest.mark.parametrize("name", ["uneven", "window", "grouped_query"])
def test_backward_items_of_half_a_block(name, monkeypatch):
    backward_of_half_a_block(monkeypatch)
    rng, sizes = np.random.default_rng(5), HALVES
    if name == "uneven":
        case = make_case(rng, uneven_rows(rng, (1, 2), sizes), heads=(2, 1))
    else:
        case = CASES[name](rng, sizes)
    check(case, static=name != "window")


@pytest.mark.parametrize("kind", ["dense", "block", "per_key", "linear", "table"])
def test_bias_beside_backward_items_of_half_a_block(kind, monkeypatch):
    backward_of_half_a_block(monkeypatch)
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (1, 2), HALVES)
    check(with_bias(make_case(rng, mask, heads=(2, 1)), kind))


def test_negative_scale():
    rng = np.random.default_rng(2)
    mask = random_mask(rng, SIZES["64 x 64"], 5)
    case = make_case(rng, mask, heads=(1, 1)).cast("bfloat16")

    def loss(q, implementation):
        out = block_sparse_attention(
            q, case.k, case.v, mask, scale=-0.5, implementation=implementation
        )
        return (out * case.dout).sum()

    gradient = to_the_end(jax.jit(jax.grad(loss), static_argnums=1))
    ours, plain = (gradient(case.q, name) for name in ("mosaic_gpu", "reference"))
    assert contract.error(ours, plain) < 1e-2


def test_nan_stays_where_attention_carries_it(monkeypatch):
    monkeypatch.setitem(contract.BLOCKS, "mosaic_gpu", SIZES["64 x 64"])
    for where in ("k", "v", "q", "dout"):
        contract.test_nan_stays_where_attention_carries_it("mosaic_gpu", where)


def test_what_no_query_sees_leaves_the_gradient_of_a_shared_bias():
    rng = np.random.default_rng(11)
    mask = random_mask(rng, SIZES["64 x 64"], 5)
    case = make_case(rng, mask, batch=(2,), heads=(1, 1)).cast("bfloat16")
    case.bias = rng.standard_normal((mask.q_len, mask.kv_len)).astype(np.float32)
    clean = contract.run_case("mosaic_gpu", case)[5]
    seen = mask.to_dense()[0, 0]
    rows = seen.sum(0)
    key = int(np.argmax((rows > 0) * (len(seen) - rows)))
    v = np.array(case.v)
    v[:, key] = np.nan
    found = contract.run_case("mosaic_gpu", dataclasses.replace(case, v=v))[5]
    blind = ~seen[:, key]
    np.testing.assert_array_equal(found[blind], clean[blind])
    assert np.isnan(np.asarray(found)[~blind]).any(1).all()
