"""What only a GPU can show of the Mosaic backend, beside the contract suite.

Every head size, block and dtype against float64; the same bits a thousand times; sizes
beyond 16 and 32 bits; memory and compilation.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import BlockMask, DistanceBias, block_sparse_attention
from jsparse.backends import mosaic_gpu
from jsparse.nn.functional import atom_window_attention
from jsparse.pallas_kernels.mosaic_gpu import bwd_dkv_sm90, bwd_dq_sm90, fwd_sm90
from jsparse.pallas_kernels.mosaic_gpu._gradient import BackwardConfig
from tests.backends import test_contract as contract
from tests.backends import test_score_function as score_function
from tests.support.cases import (
    CASES,
    ENTRIES,
    Case,
    biases,
    cast_bias,
    make_case,
    pair,
    random_mask,
    uneven_rows,
    with_bias,
    with_entries,
)

pytestmark = pytest.mark.gpu
FP16_LIMIT = 1e-3
"""As good as bfloat16's limit: the error of float16 is an eighth, or cancellation."""

attend = functools.partial(block_sparse_attention, implementation="mosaic_gpu")


def check(case: Case, dtype: str) -> None:
    case = case.cast(dtype)
    found, truth = contract.run_case("mosaic_gpu", case), contract.expected(case)
    like = ("reference",)
    if isinstance(case.bias, DistanceBias):
        # It can leave a row a single key, where ds is a small difference of dp and
        # delta; the kernels' delta comes from the rounded output, as xla's does.
        like += ("xla",)
    # Compiled for the CPU: XLA tries out products on a GPU, for longer than the test.
    with jax.default_device(jax.devices("cpu")[0]):
        others = [contract.run_case(name, case) for name in like]
    limit = FP16_LIMIT if dtype == "float16" else contract.HALF_LIMIT
    for name, x, y, *rest in zip(contract.NAMES, found, truth, *others, strict=False):
        bound = max(limit, *(2 * contract.error(z, y) for z in rest))
        assert contract.error(x, y) <= (2e-6 if name == "lse" else bound), name
    if case.bias is not None:
        contract.check_sixteen_bit_bias(case, found[5], limit, like)


@pytest.mark.parametrize("dtype", mosaic_gpu.DTYPES)
@pytest.mark.parametrize("block_kv", mosaic_gpu.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", mosaic_gpu.BLOCKS["block_q"])
@pytest.mark.parametrize("dim", [16, 24, 32, 48, 64, 96, 128, 160, 192, 256])
def test_every_head_size_block_and_dtype(dim, block_q, block_kv, dtype):
    rng = np.random.default_rng(dim)
    sizes = (block_q * 4 - 9, block_kv * 5 + 7, block_q, block_kv)
    check(make_case(rng, random_mask(rng, sizes, 12), dims=(dim, dim)), dtype)


@pytest.mark.parametrize("launch", fwd_sm90.LAUNCHES)
@pytest.mark.parametrize("blocks", [(128, 128), (128, 32), (64, 128), (64, 64)])
@pytest.mark.parametrize("dim", [16, 48, 64, 128])
def test_forward_of_every_launch(dim, blocks, launch, monkeypatch):
    monkeypatch.setattr(fwd_sm90, "launch_of", lambda *_: launch)
    rng = np.random.default_rng(dim)
    sizes = (blocks[0] * 9 - 9, blocks[1] * 8 + 7, *blocks)
    case = make_case(rng, random_mask(rng, sizes, 50), dims=(dim, dim))
    case = case.cast("bfloat16")
    run = jax.jit(functools.partial(attend, return_lse=True))
    found = run(case.q, case.k, case.v, case.mask)
    truth = contract.expected(case)
    assert contract.error(found[0], truth[0]) < contract.HALF_LIMIT
    assert contract.error(found[1], truth[1]) < 2e-6


@pytest.mark.parametrize("block_kv", [128, 32])
@pytest.mark.parametrize(
    "dims",
    [(64, 32), (32, 128), (128, 16), (192, 128), (64, 192), (256, 80), (224, 144)],
    ids=str,
)
def test_values_of_another_size(dims, block_kv):
    rng = np.random.default_rng(1)
    mask = random_mask(rng, (500, 600, 128, block_kv), 12)
    check(make_case(rng, mask, heads=(4, 2), dims=dims), "bfloat16")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block_q", mosaic_gpu.BLOCKS["block_q"])
def test_every_case_in_narrow_blocks(block_q, name):
    rng, sizes = np.random.default_rng(0), (300, 340, block_q, 32)
    check(CASES[name](rng, sizes), "bfloat16")


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("dims", [(16, 16), (192, 256)], ids=str)
def test_nan_in_wide_heads_and_narrow_blocks(dims, where, monkeypatch):
    def plain(rng, sizes):
        return make_case(rng, random_mask(rng, sizes, 12), dims=dims)

    monkeypatch.setitem(contract.CASES, "plain", plain)
    monkeypatch.setitem(contract.BLOCKS, "mosaic_gpu", (300, 340, 64, 32))
    contract.test_nan_stays_where_attention_carries_it("mosaic_gpu", where)


@pytest.mark.parametrize("static", [True, False])
def test_split_rows_of_wide_heads_in_narrow_blocks(static):
    rng = np.random.default_rng(7)
    mask = uneven_rows(rng, (9, 30), (200, 950, 128, 32))
    case = make_case(rng, mask, dims=(192, 256)).cast("bfloat16")
    found = (contract.run_known if static else contract.run_case)("mosaic_gpu", case)
    for x, y in zip(found[:5], contract.expected(case)[:5], strict=True):
        assert contract.error(x, y) < contract.HALF_LIMIT


def test_split_rows_in_a_loop():
    """XLA may let a kernel write to its place among a loop's results."""
    rng = np.random.default_rng(8)
    mask = uneven_rows(rng, (9, 30), (256, 3840, 128, 128))
    case = make_case(rng, mask, batch=(3,), dims=(32, 32)).cast("bfloat16")
    arrays = case.q, case.k, case.v
    one = jax.jit(lambda q, k, v: attend(q, k, v, mask))
    found = jax.jit(lambda *arrays: jax.lax.map(lambda x: one(*x), arrays))(*arrays)
    for n, x in enumerate(found):
        np.testing.assert_array_equal(x, one(*(y[n] for y in arrays)))


NARROW = (
    fwd_sm90.Config(64, tile_kv=64, num_stages=4, ping_pong=False, teams=2),
    fwd_sm90.Config(64, num_q_stages=2, ping_pong=False, lazy=0.0),
    fwd_sm90.Config(64, num_stages=2, ping_pong=False, teams=2, share=True),
    fwd_sm90.Config(64, tile_kv=64, num_stages=2, ping_pong=False, teams=3, share=True),
)


@pytest.mark.parametrize("config", NARROW, ids=str)
@pytest.mark.parametrize("name", ["plain", "window", "distance", "grouped_query"])
def test_items_of_half_a_block(name, config, monkeypatch):
    monkeypatch.setattr(fwd_sm90.Config, "choose", lambda *_: config)
    check(CASES[name](np.random.default_rng(6), (300, 700, 128, 128)), "bfloat16")


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "window", "grouped_query"),
        *("dense", "block", "per_key", "linear", "entry"),
    ],
)
def test_backward_items_of_half_a_block(name, monkeypatch):
    for module, teams in ((bwd_dq_sm90, 2), (bwd_dkv_sm90, 3)):
        half = BackwardConfig(tile=32, num_stages=3, teams=teams, tile_rows=64)
        monkeypatch.setattr(module, "choose", lambda *_, half=half: half)
    sizes = (300, 700, 128, 128)
    if name in CASES:
        case = CASES[name](np.random.default_rng(6), sizes)
    elif name in ENTRIES:
        case = with_entries(name, sizes)
    else:
        case = with_bias(pair(sizes), name, "float32")
    check(case, "bfloat16")


@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", contract.KINDS)
def test_every_bias(kind, bias_dtype):
    check(with_bias(pair((503, 647, 128, 128)), kind, bias_dtype), "bfloat16")


@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ENTRIES)
def test_every_bias_by_entry(kind, bias_dtype):
    case = with_entries(kind, (503, 647, 128, 64), patterns=2)
    case.bias = cast_bias(case.bias, bias_dtype)
    check(case, "bfloat16")


@pytest.mark.parametrize("block_kv", mosaic_gpu.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", mosaic_gpu.BLOCKS["block_q"])
@pytest.mark.parametrize(
    "dim, dtype", [(16, "bfloat16"), (48, "float16"), (128, "bfloat16")]
)
def test_bias_by_entry_in_every_block(dim, dtype, block_q, block_kv):
    sizes = (block_q * 4 - 9, block_kv * 5 + 7, block_q, block_kv)
    check(with_entries("entry", sizes, dim=dim), dtype)


@pytest.mark.parametrize("block_kv", mosaic_gpu.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", mosaic_gpu.BLOCKS["block_q"])
@pytest.mark.parametrize(
    "kind, bias_dtype",
    [
        ("dense", "float32"),
        ("dense", "bfloat16"),
        ("block", "float32"),
        ("per_key", "float32"),
        ("quadratic", "float32"),
        ("table", "float32"),
        ("gaussian", "float32"),
    ],
)
def test_bias_in_every_block(kind, bias_dtype, block_q, block_kv):
    sizes = (block_q * 4 - 9, block_kv * 5 + 7, block_q, block_kv)
    check(with_bias(pair(sizes), kind, bias_dtype), "bfloat16")


@pytest.mark.parametrize("dtype", mosaic_gpu.DTYPES)
@pytest.mark.parametrize(
    "kind", ["dense_shared_batch", "per_key", "linear", "table", "gaussian"]
)
@pytest.mark.parametrize("dim", [16, 24, 48, 64, 96, 128])
def test_every_head_size_beside_a_bias(dim, kind, dtype):
    check(with_bias(pair((500, 645, 128, 128), dim), kind), dtype)


@pytest.mark.parametrize(
    "kind",
    [*("dense", "dense_shared_heads", "per_key", "block"), *("linear", "table")],
)
def test_bias_beside_batch_and_head_patterns(kind):
    rng = np.random.default_rng(13)
    case = CASES["batch_and_head_patterns"](rng, (300, 500, 128, 64))
    check(with_bias(case, kind), "bfloat16")


@pytest.mark.parametrize("pattern", ["distance", "window", "segments", "groups"])
def test_bias_beside_rules(pattern):
    rng = np.random.default_rng(9)
    case = CASES[pattern](rng, (300, 500, 128, 64))
    case.bias = biases(rng, case.mask, 2, 1)["dense_2d"]
    check(case, "bfloat16")


@pytest.mark.parametrize(
    "kind", ["dense_shared_heads", "block", "per_key", "linear", "table", "gaussian"]
)
def test_bias_beside_items_of_half_a_block(kind, monkeypatch):
    monkeypatch.setattr(fwd_sm90.Config, "choose", lambda *_: NARROW[0])
    check(with_bias(pair((300, 700, 128, 128)), kind), "bfloat16")


@pytest.mark.parametrize("kind", ["dense_2d", "per_key", "linear", "table", "gaussian"])
@pytest.mark.parametrize("static", [True, False])
def test_split_rows_beside_a_bias(static, kind):
    rng = np.random.default_rng(10)
    mask = uneven_rows(rng, (9, 30), (200, 3900, 128, 128))
    case = make_case(rng, mask, dims=(32, 32))
    case.bias = biases(rng, mask, 2, 1)[kind]
    case = case.cast("bfloat16")
    found = (contract.run_known if static else contract.run_case)("mosaic_gpu", case)
    for x, y in zip(found[:5], contract.expected(case)[:5], strict=True):
        assert contract.error(x, y) < contract.HALF_LIMIT
    like = ("reference", *("xla",) * isinstance(case.bias, DistanceBias))
    contract.check_sixteen_bit_bias(case, found[5], like=like)


def redraw_at_entries(
    rng: np.random.Generator, queries: np.ndarray, keys: np.ndarray, width: float
) -> None:
    """Moves queries until no key is at the distance of a table's entry.

    There the slope jumps, and distances that are rounded differently are on different
    sides: one such pair of 325,000 was 1 % of the gradient of the points.
    """

    def at_entries() -> np.ndarray:
        distance = np.linalg.norm(queries[:, None] - keys, axis=-1)
        entry = width * np.round(distance / width)
        return (np.abs(distance - entry) < 1e-5).any(1)

    while (moved := at_entries()).any():
        queries[moved] = 3 * rng.standard_normal((moved.sum(), 3))


@pytest.mark.parametrize(
    "form, count",
    [("table", n) for n in (2, 32, 33, 64)] + [("gaussian", n) for n in (1, 32)],
)
def test_every_number_of_weights(form, count):
    case, rng = pair((503, 647, 128, 128)), np.random.default_rng(14)
    queries, keys = (3 * rng.standard_normal((n, 3)) for n in (503, 647))
    weights = rng.standard_normal((4, count))
    if form == "table":
        redraw_at_entries(rng, queries, keys, 9 / (count - 1))
        case.bias = DistanceBias.table(weights, 9.0, queries, keys)
    else:
        centers = np.linspace(0, 9, count)
        case.bias = DistanceBias.gaussian(weights, centers, 0.5, queries, keys)
    check(case, "bfloat16")


@pytest.mark.parametrize("on_blocks", [False, True], ids=["dense", "block"])
@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_bad_bias(value, on_blocks):
    contract.check_bad_bias("mosaic_gpu", value, on_blocks)


@pytest.mark.parametrize("block_kv", mosaic_gpu.BLOCKS["block_kv"])
@pytest.mark.parametrize("block_q", mosaic_gpu.BLOCKS["block_q"])
@pytest.mark.parametrize("name", score_function.KERNELS)
def test_score_functions(name, block_q, block_kv):
    case = pair((block_q * 4 - 9, block_kv * 5 + 7, block_q, block_kv))
    check_score_function(name, case)


@pytest.mark.parametrize("pattern", ["batch_and_head_patterns", "distance", "window"])
@pytest.mark.parametrize("name", score_function.KERNELS)
def test_score_functions_beside_patterns(name, pattern):
    case = CASES[pattern](np.random.default_rng(14), (300, 500, 128, 64))
    check_score_function(name, case)


def check_score_function(name: str, case: Case) -> None:
    """Against float64; ``xla`` may be half as wrong."""
    case = case.cast("bfloat16")
    found = score_function.run("mosaic_gpu", name, case)
    with jax.default_device(jax.devices("cpu")[0]):
        plain = score_function.run("xla", name, case)
        truth = score_function.expected(name, case)
    for n, (x, y, z) in enumerate(zip(found, truth, plain, strict=True)):
        limit = max(2 * contract.error(z, y), 2e-6 if n == 1 else contract.HALF_LIMIT)
        assert contract.error(x, y) <= limit, n
    again = score_function.run("mosaic_gpu", name, case)
    for x, y in zip(found, again, strict=True):
        np.testing.assert_array_equal(x, y)


def test_bad_bias_outside_the_mask():
    contract.test_bad_bias_outside_the_mask_is_never_seen("mosaic_gpu")


@pytest.mark.parametrize("form", ["linear", "quadratic", "table"])
def test_an_atom_without_a_place(form):
    contract.test_an_atom_without_a_place_reaches_only_who_sees_it("mosaic_gpu", form)


def test_memory_of_a_shared_bias():
    contract.check_memory_of_a_shared_bias("mosaic_gpu")


@pytest.mark.parametrize(
    "kind", [None, "dense_shared_batch", "block", "table", "gaussian"]
)
def test_the_same_bits_a_thousand_times(kind):
    rng = np.random.default_rng(2)
    mask = random_mask(rng, (2000, 3000, 128, 128), 150)
    case = make_case(rng, mask, batch=(2,), heads=(4, 2), dims=(64, 64))
    case.bias = None if kind is None else biases(rng, mask, 4, 2)[kind]
    case = case.cast("bfloat16")
    mask, bias = case.mask, case.bias

    @jax.jit
    def differs(q, k, v, dout, dlse, first):
        found = contract.run("mosaic_gpu", q, k, v, mask, bias, dout, dlse)
        found = jax.tree_util.tree_leaves(found)
        bits = [
            jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
            for x in found
        ]
        wrong = sum((x != y).sum() for x, y in zip(bits, first or bits, strict=True))
        return wrong, bits

    args = (case.q, case.k, case.v, case.dout, case.dlse)
    _, first = differs(*args, None)
    wrong = sum(differs(*args, first)[0] for _ in range(1000))
    assert int(wrong) == 0


def test_queries_kept_in_registers_are_those_of_their_item(monkeypatch):
    """Of many short items: the next one's come as soon as the tile is given back."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 102_400, 4, 32), jnp.bfloat16)
    bias = jax.random.normal(jax.random.key(1), (3200, 4, 32, 128), jnp.bfloat16)

    def attend_windows(q, k, v, bias):
        return atom_window_attention(q, k, v, bias, implementation="mosaic_gpu")

    expected = np.asarray(jax.jit(attend_windows)(q, k, v, bias), np.float32)
    config = fwd_sm90.Config(
        *(64, 64),
        num_stages=3,
        ping_pong=False,
        q_in_registers=True,
        teams=4,
        staged=False,
    )
    monkeypatch.setattr(fwd_sm90.Config, "choose", lambda *_, **__: config)
    jax.clear_caches()
    try:
        run = jax.jit(lambda *args: attend_windows(*args))
        for _ in range(20):
            found = np.asarray(run(q, k, v, bias), np.float32)
            np.testing.assert_array_equal(found, expected)
    finally:
        jax.clear_caches()


def test_more_than_65536_tokens():
    rng, blocks = np.random.default_rng(3), 600
    rows = np.repeat(np.arange(blocks), 3)
    columns = np.concatenate([rng.choice(blocks, 3, replace=False) for _ in rows[::3]])
    _check_some_rows(rng, rows, columns, blocks, heads=2, dim=64)


def test_more_than_2_to_the_31_elements():
    # 2112 * 128 tokens of 64 heads of 128 channels: 2.2e9 elements an array.
    rng, blocks = np.random.default_rng(4), 2112
    rows = np.arange(blocks)
    _check_some_rows(rng, rows, rng.permutation(blocks), blocks, heads=64, dim=128)


def _check_some_rows(rng, rows, columns, blocks, heads, dim):
    """Outputs and dq of the last head in NumPy, for blocks at the beginning and end."""
    length = blocks * 128
    mask = BlockMask.from_blocks(rows, columns, q_len=length)
    keys = jax.random.split(jax.random.key(int(rng.integers(1 << 30))), 4)
    shape = (length, heads, dim)
    q, k, v, dout = (jax.random.normal(x, shape, jnp.bfloat16) for x in keys)

    @jax.jit
    def run(q, k, v, dout):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return out, *pullback(dout)

    out, dq, dk, dv = run(q, k, v, dout)
    found, truth = [], []

    def take(x, block):
        return np.asarray(x[block * 128 : (block + 1) * 128, -1], np.float64)

    def gather(x, which):
        return np.concatenate([take(x, block) for block in which])

    def probabilities(row):
        seen = columns[rows == row]
        s = take(q, row) @ gather(k, seen).T * dim**-0.5
        p = np.exp(s - s.max(1, keepdims=True))
        return seen, p / p.sum(1, keepdims=True)

    def gradient(row):
        seen, p = probabilities(row)
        dp = take(dout, row) @ gather(v, seen).T
        return seen, p, p * (dp - (p * dp).sum(1, keepdims=True)) * dim**-0.5

    for row in (0, blocks // 2, blocks - 1):
        seen, p, ds = gradient(row)
        found += [take(out, row), take(dq, row)]
        truth += [p @ gather(v, seen), ds @ gather(k, seen)]
    for column in (0, blocks - 1):
        dk_, dv_ = np.zeros((2, 128, dim))
        for row in rows[columns == column]:
            seen, p, ds = gradient(row)
            part = slice(128 * list(seen).index(column), None)
            dk_ += ds[:, part][:, :128].T @ take(q, row)
            dv_ += p[:, part][:, :128].T @ take(dout, row)
        found += [take(dk, column), take(dv, column)]
        truth += [dk_, dv_]
    for x, y in zip(found, truth, strict=True):
        assert contract.error(x, y) < 1.2 * contract.HALF_LIMIT


def test_memory_beyond_inputs_and_outputs():
    rng = np.random.default_rng(5)
    mask = random_mask(rng, (40_000, 40_000, 128, 128), 6000, elements=False)
    case = make_case(rng, mask, heads=(16, 16), dims=(64, 64)).cast("bfloat16")
    args = (case.q, case.k, case.v, case.dout, case.dlse)

    run: Any = contract.run

    def both(q, k, v, dout, dlse):
        return run.__wrapped__("mosaic_gpu", q, k, v, mask, None, dout, dlse)[:5]

    memory: Any = jax.jit(both).lower(*args).compile().memory_analysis()
    ends = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 0.05 * ends + 64e6


def test_compiles_fast_and_once_for_a_bucket():
    rng, traces = np.random.default_rng(6), []

    @jax.jit
    def gradients(q, k, v, dout, mask):
        traces.append(1)
        return jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)[1](dout)

    cases = [
        make_case(
            rng,
            random_mask(rng, (n, n, 128, 128), 30).pad_to(
                2048, capacity=16, num_bits=30
            ),
            dims=(48, 48),
        ).cast("bfloat16")
        for n in (1000, 1500)
    ]
    for case in cases:
        start = time.perf_counter()
        found = gradients(case.q, case.k, case.v, case.dout, case.mask)
        jax.block_until_ready(found)
        assert time.perf_counter() - start < 15
        case.dlse = np.zeros_like(case.dlse)
        for x, y in zip(found, contract.expected(case)[2:5], strict=True):
            assert contract.error(x, y) < contract.HALF_LIMIT
    assert len(traces) == 1
