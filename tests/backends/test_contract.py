"""What every backend must do, run for each registered one.

The oracle is dense attention in NumPy float64 (`tests.support.oracle`). An error counts
against the error that plain dense jnp (``reference``) makes at the same dtype: at most
twice that, plus a rounding floor.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.dtypes import float0

from jsparse import (
    BlockBias,
    BlockMask,
    DistanceBias,
    block_sparse_attention,
    patterns,
)
from jsparse.backends import cutlass
from tests.support import oracle
from tests.support.cases import (
    CASES,
    ENTRIES,
    MOVES,
    SIZES,
    Case,
    biases,
    make_case,
    one_kind,
    random_mask,
    with_entries,
)

BACKENDS = [
    "xla",
    "reference",
    *(pytest.param(name, marks=pytest.mark.gpu) for name in ("mosaic_gpu", "cutlass")),
]
WITH_BIAS = BACKENDS[:2]
HALF = {"mosaic_gpu": "bfloat16", "cutlass": "bfloat16"}
"""Kernels take 16-bit inputs and the blocks below; the others get float32."""
BLOCKS = {"mosaic_gpu": (300, 500, 128, 64), "cutlass": (300, 500, 128, 64)}
HALF_LIMIT = 2.64e-3
"""1.1 times what FlexAttention and FlashAttention-4 reach in bfloat16, 2.4e-3."""
LIMITS = {"bfloat16": HALF_LIMIT, "float16": 1e-3}
NAMES = ("out", "lse", "dq", "dk", "dv")


def sizes_of(implementation: str) -> tuple[int, int, int, int]:
    return BLOCKS.get(implementation, SIZES)


def cast_for(implementation: str, case: Case) -> Case:
    dtype = HALF.get(implementation)
    return case if dtype is None else case.cast(dtype)


def named(implementation: str, name: str, rng: np.random.Generator) -> Case:
    """A case of `CASES` in the sizes and dtype that the backend takes."""
    return cast_for(implementation, CASES[name](rng, sizes_of(implementation)))


def made(implementation: str, *args: Any, **options: Any) -> Case:
    """`make_case` in the dtype that the backend takes."""
    return cast_for(implementation, make_case(*args, **options))


def limit_of(implementation: str, limit: float) -> float:
    """Largest relative error: ``limit`` in float32."""
    return max(limit, HALF_LIMIT) if implementation in HALF else limit


def results(implementation, q, k, v, mask, bias, dout, dlse):
    """``out, lse, dq, dk, dv, dbias`` with random cotangents."""

    def attend(q, k, v, bias):
        return block_sparse_attention(
            q, k, v, mask, bias=bias, return_lse=True, implementation=implementation
        )

    (out, lse), pullback = jax.vjp(attend, q, k, v, bias)
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0)
    *grads, dbias = pullback((dout, dlse))
    # Integers have no gradient, which JAX spells with a dtype of its own.
    dbias = jax.tree_util.tree_map(lambda x: x if x.dtype != float0 else None, dbias)
    return (out, lse, *grads, dbias)


run = jax.jit(results, static_argnums=0)


def run_case(implementation: str, case: Case):
    arrays = (getattr(case, f.name) for f in dataclasses.fields(case))
    return run(implementation, *arrays)


def run_known(implementation: str, case: Case):
    """`run_case` with a mask that is known before tracing."""
    run = jax.jit(functools.partial(results, implementation, mask=case.mask))
    arrays = (case.q, case.k, case.v)
    return run(*arrays, bias=case.bias, dout=case.dout, dlse=case.dlse)


def expected(case: Case):
    """The oracle's results, batch entry by batch entry, and the dense dbias."""
    batch = case.q.shape[:-3]
    count = int(np.prod(batch))
    heads = case.q.shape[-2]
    elements = case.mask.to_dense()
    bias = oracle.dense_bias(case.bias, case.mask, heads)
    q, k, v, dout, dlse = (
        np.asarray(x, np.float64).reshape(count, *x.shape[len(batch) :])
        for x in (case.q, case.k, case.v, case.dout, case.dlse)
    )
    scale = case.q.shape[-1] ** -0.5
    found = [
        oracle.attention(
            q[b],
            k[b],
            v[b],
            elements[min(b, len(elements) - 1)],
            bias[min(b, len(bias) - 1)],
            scale,
            dout[b],
            dlse[b],
        )
        for b in range(count)
    ]
    stacked = oracle.Result(*(np.stack(x) for x in zip(*found, strict=True)))
    shaped = [x.reshape(*batch, *x.shape[1:]) for x in stacked[:5]]
    return (*shaped, stacked.dbias)


def error(found, truth) -> float:
    """Relative norm error; both -inf is agreement."""
    found, truth = (np.asarray(x, np.float64) for x in (found, truth))
    assert found.shape == truth.shape
    both = np.isneginf(found) & np.isneginf(truth)
    found, truth = np.where(both, 0, found), np.where(both, 0, truth)
    return np.linalg.norm(found - truth) / max(np.linalg.norm(truth), 1e-30)


def check(
    implementation: str, case: Case, floor: float, half_limit: float = HALF_LIMIT
) -> None:
    found, truth = run_case(implementation, case), expected(case)
    plain = run_case("reference", case)
    half = implementation in HALF
    for name, x, y, z in zip(NAMES, found, truth, plain, strict=False):
        if np.all(np.isneginf(y) | (y == 0)):
            np.testing.assert_array_equal(np.asarray(x, np.float64), y, err_msg=name)
        else:
            limit = 2 * error(z, y) * (implementation != "reference") + floor
            if half and name != "lse":
                limit = half_limit
            assert error(x, y) <= limit, (name, error(x, y), limit)


def check_sixteen_bit(found: Any, case: Case, limit: float) -> None:
    """Compares results with float64; an error may be twice that of ``reference``."""
    # Compiled for the CPU: XLA tries out products on a GPU, for longer than the test.
    with jax.default_device(jax.devices("cpu")[0]):
        plain = run_case("reference", case)
    for name, x, y, z in zip(NAMES, found, expected(case), plain, strict=False):
        bound = 2e-6 if name == "lse" else max(limit, 2 * error(z, y))
        assert error(x, y) <= bound, (name, error(x, y), bound)


# ------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_values_and_gradients(implementation, name):
    check(
        implementation,
        named(implementation, name, np.random.default_rng(0)),
        floor=2e-6,
    )


@st.composite
def masks(draw, sizes=SIZES) -> BlockMask:
    """Any mask of one bucket: empty rows or columns, one block, all, ragged lengths."""
    q_len, kv_len, block_q, block_kv = sizes
    lengths = draw(st.integers(1, q_len)), draw(st.integers(1, kv_len))
    grid = -(-lengths[0] // block_q), -(-lengths[1] // block_kv)
    pair = st.tuples(st.integers(0, grid[0] - 1), st.integers(0, grid[1] - 1))
    pairs = np.array(draw(st.lists(pair, max_size=30)), int).reshape(-1, 2)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (len(pairs), block_q, block_kv)
    mask = BlockMask.from_blocks(
        *pairs.T,
        q_len=lengths[0],
        kv_len=lengths[1],
        block_q=block_q,
        block_kv=block_kv,
        full=rng.random(len(pairs)) < 0.4,
        elements=rng.random(shape) < draw(st.sampled_from([0.05, 0.5, 1.0])),
    )
    return mask.pad_to(q_len, kv_len, capacity=5, num_bits=15)


@pytest.mark.parametrize("implementation", BACKENDS)
@given(data=st.data())
def test_any_mask(implementation, data):
    mask = data.draw(masks(sizes_of(implementation)))
    case = made(implementation, np.random.default_rng(1), mask)
    # Of a few numbers the error is that of rounding twice, not its mean.
    check(implementation, case, floor=3e-6, half_limit=2.0**-8)


KINDS = sorted(
    biases(
        np.random.default_rng(0), CASES["plain"](np.random.default_rng(0)).mask, 2, 1
    )
)


PATTERNS = [("plain", kind) for kind in KINDS] + [
    ("batch_and_head_patterns", kind) for kind in ("dense", "per_key", "block", "table")
]


@pytest.mark.parametrize("pattern, kind", PATTERNS)
@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_bias(implementation, pattern, kind):
    rng = np.random.default_rng(2)
    case = CASES[pattern](rng)
    assert 0 < np.sum(case.mask.full_kv_num_blocks) < case.mask.num_blocks
    if pattern == "plain":
        case = make_case(rng, case.mask, batch=(2,), heads=(4, 2))
    case.bias = biases(rng, case.mask, case.q.shape[-2], 2)[kind]
    check(implementation, case, floor=3e-6)
    _check_bias_gradient(case, run_case(implementation, case)[5], expected(case)[5])


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("patterns", [1, 2])
def test_bias_by_entry(patterns, kind):
    case = with_entries(kind, SIZES, patterns=patterns, dim=16)
    check("reference", case, floor=3e-6)
    _check_bias_gradient(case, run_case("reference", case)[5], expected(case)[5])
    with pytest.raises(NotImplementedError, match="an entry bias"):
        run_case("xla", case)


def _check_bias_gradient(case: Case, found, dense) -> None:
    """Compares with the dense dbias, pushed along random directions of the bias."""
    rng = np.random.default_rng(3)
    leaves, tree = jax.tree_util.tree_flatten(case.bias)
    grads = jax.tree_util.tree_leaves(found)
    heads = case.q.shape[-2]
    # Integers, which have no gradient, come last.
    for n, (leaf, grad) in enumerate(zip(leaves, grads, strict=False)):
        assert grad.shape == leaf.shape
        if getattr(case.bias, "form", None) == "table" and leaf is case.bias.knots:
            assert not np.asarray(grad).any()
            continue
        direction, step = rng.standard_normal(leaf.shape), 1e-6
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in leaves]
            moved[n] = moved[n] + sign * step * direction
            bias = jax.tree_util.tree_unflatten(tree, moved)
            ends.append(oracle.dense_bias(bias, case.mask, heads))
        change = (ends[0] - ends[1]) / (2 * step)
        truth = np.sum(np.broadcast_to(change, dense.shape) * dense)
        scale = np.linalg.norm(grad) * np.linalg.norm(direction)
        value = np.sum(np.asarray(grad, np.float64) * direction)
        assert abs(value - truth) <= 2e-5 * scale + 1e-6, (n, value, truth)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_sixteen_bits(implementation, dtype):
    rng = np.random.default_rng(4)
    block_q, block_kv = BLOCKS.get(implementation, (256, 256, 32, 32))[2:]
    mask = random_mask(rng, (256, 256, block_q, block_kv), 30)
    case = make_case(rng, mask, dims=(32, 32)).cast(dtype)
    if implementation not in HALF:
        case.bias = rng.standard_normal((2, 256, 256)).astype(np.float32)
    found, truth = run_case(implementation, case), expected(case)
    assert found[0].dtype == found[2].dtype == dtype
    assert found[1].dtype == np.float32
    for name, x, y in zip(NAMES, found, truth, strict=False):
        limit = 5e-3 if implementation == "reference" else HALF_LIMIT
        assert error(x, y) <= limit, (name, error(x, y))


@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_gradient_of_a_shared_bias_is_summed_in_float32(implementation):
    # Summed over 256 entries in bfloat16, the error would be four times the limit.
    rng = np.random.default_rng(6)
    mask = patterns.window(16, left=16, right=16, block_q=16, block_kv=16)
    q, k, v, dout = rng.standard_normal((4, 256, 16, 1, 8)).astype(jnp.bfloat16)
    bias = rng.standard_normal((16, 16)).astype(jnp.bfloat16)

    def gradient(implementation, dtype):
        *qkv, b, d = (x.astype(dtype) for x in (q, k, v, bias, dout))
        return run(implementation, *qkv, mask, b, d, jnp.zeros((256, 1, 16)))[-1]

    found = gradient(implementation, jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert error(found, gradient("reference", jnp.float32)) <= 4e-3


@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_float64(implementation):
    with jax.enable_x64(True):
        case = named(implementation, "grouped_query", np.random.default_rng(5)).cast(
            "float64"
        )
        found, truth = run_case(implementation, case), expected(case)
    assert found[0].dtype == np.float64
    for name, x, y in zip(NAMES, found, truth, strict=False):
        assert error(x, y) <= 1e-13, name


def test_reference_has_second_derivatives():
    case = CASES["one_block"](np.random.default_rng(6))

    def loss(q):
        out = block_sparse_attention(
            q, case.k, case.v, case.mask, implementation="reference"
        )
        return (out * case.dout).sum()

    direction = (
        np.random.default_rng(7).standard_normal(case.q.shape).astype(np.float32)
    )
    gradient = jax.jit(jax.grad(loss))
    _, second = jax.jvp(gradient, (case.q,), (direction,))
    step = np.float32(1e-2)
    numeric = (
        gradient(case.q + step * direction) - gradient(case.q - step * direction)
    ) / (2 * step)
    assert np.abs(second).max() > 1e-3
    np.testing.assert_allclose(second, numeric, atol=2e-3)


# --------------------------------------------------------------- rows, NaN, infinity


@pytest.mark.parametrize("implementation", BACKENDS)
def test_queries_that_see_nothing(implementation):
    rng = np.random.default_rng(8)
    case = made(implementation, rng, random_mask(rng, sizes_of(implementation), 2))
    blind = ~case.mask.to_dense()[0, 0].any(1)
    assert blind.any()
    assert not blind.all()
    out, lse, dq, _, _, _ = run_case(implementation, case)
    assert not np.asarray(out)[blind].any()
    assert np.isneginf(np.asarray(lse)[:, blind]).all()
    assert np.isfinite(np.asarray(lse)[:, ~blind]).all()
    assert not np.asarray(dq)[blind].any()


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_nan_stays_where_attention_carries_it(implementation, where):
    check_where_nan_goes(run_case, implementation, where)


def check_where_nan_goes(run_case: Any, implementation: str, where: str) -> None:
    """Of a NaN in one row of q, k, v or dout; with a traced mask or a known one."""
    if (implementation, where) == ("reference", "dout"):
        pytest.skip("JAX differentiates the products of reference, which pass it on")
    case = named(implementation, "plain", np.random.default_rng(9))
    clean = run_case(implementation, case)
    seen = case.mask.to_dense()[0, 0]
    key = int(np.argmax(seen.sum(0) * (seen.sum(0) < seen.any(1).sum())))
    row = int(np.argmax(seen.sum(1)))
    array = np.array(getattr(case, where))
    array[key if where in "kv" else row, 1, 3] = np.nan
    found = run_case(implementation, dataclasses.replace(case, **{where: array}))
    rows = seen[:, key].copy() if where in "kv" else np.arange(len(seen)) == row
    keys = seen[rows].any(0)
    touched = {"dq": rows, "dk": keys, "dv": keys}
    if where != "dout":
        touched |= {"out": rows, "lse": rows}
    if where in "kv":
        # The poisoned key itself may be NaN everywhere its gradient depends on it.
        touched["dk"] = touched["dv"] = keys | (np.arange(len(keys)) == key)
    for name, x, y in zip(NAMES, found, clean, strict=False):
        x, y = np.asarray(x), np.asarray(y)
        if name == "lse":
            x, y = x.T, y.T
        bad = touched.get(name, np.zeros(len(x), bool))
        np.testing.assert_array_equal(x[~bad], y[~bad], err_msg=name)
        np.testing.assert_array_equal(x[:, 0], y[:, 0], err_msg=f"{name}, other head")
    if where != "dout":
        assert np.isnan(np.asarray(found[0])[rows, 1]).any(-1).all()
    else:
        assert np.isnan(np.asarray(found[4])[keys, 1]).any(-1).all()


@pytest.mark.parametrize("on_blocks", [False, True], ids=["dense", "block"])
@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_bias_of_minus_infinity_masks_the_element(implementation, on_blocks):
    rng = np.random.default_rng(10)
    case = named(implementation, "everything", rng)
    keep = rng.random(case.mask.to_dense().shape[2:]) < 0.4
    keep[3] = False
    dense = np.where(keep, 0.0, -np.inf).astype(np.float32)
    case.bias = BlockBias.from_dense(case.mask, dense) if on_blocks else dense
    found = run_case(implementation, case)
    truth = oracle.attention(
        case.q, case.k, case.v, keep[None], 0.0, 0.25, case.dout, case.dlse
    )
    for name, x, y in zip(NAMES, found, truth, strict=False):
        assert error(x, y) < limit_of(implementation, 3e-6), name
    if on_blocks:
        assert not np.asarray(found[5].values)[np.isneginf(case.bias.values)].any()
    else:
        assert not np.asarray(found[5])[~keep].any()


def check_bias_hides_bad_values(implementation: str) -> None:
    """A key that only the bias hides, in a block that is not full."""
    dense = np.ones((64, 64), bool)
    dense[0, 63] = False
    mask = patterns.from_dense(dense, block_q=64, block_kv=64)
    case = make_case(np.random.default_rng(33), mask, heads=(1, 1))
    bias, v = np.zeros((64, 64), np.float32), np.array(case.v)
    bias[:, 20], bias[7, 20], v[20, 0, 3] = -np.inf, 0, np.nan
    case = dataclasses.replace(case, bias=bias, v=v).cast("bfloat16")
    out = np.asarray(run_case(implementation, case)[0], np.float32)
    np.testing.assert_array_equal(np.isnan(out).any((1, 2)), np.arange(64) == 7)


@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_bias_hides_bad_values(implementation):
    if implementation in ("reference", "cutlass"):
        pytest.skip("there p is 0, and 0 times NaN is NaN")
    check_bias_hides_bad_values(implementation)


def check_sixteen_bit_bias(
    case: Case,
    found: Any,
    limit: float = HALF_LIMIT,
    like: tuple[str, ...] = ("reference",),
) -> None:
    """Compares each array of a bias's gradient with what jnp computes in float32.

    Slopes and points get sums of a whole row, where an error of delta, which comes from
    the rounded output, does not average out. ``like`` are the implementations that may
    be half as wrong.
    """
    if isinstance(case.bias, DistanceBias):
        limit *= 1.5
    with jax.default_device(jax.devices("cpu")[0]):  # see the tests on a GPU
        truth = run_case("reference", case.cast("float32"))[5]
        others = [run_case(name, case)[5] for name in like]
    leaves = [jax.tree_util.tree_leaves(x) for x in (found, truth, *others)]
    for x, y, *rest in zip(*leaves, strict=True):
        assert error(x, y) <= max(limit, *(2 * error(z, y) for z in rest))


@pytest.mark.parametrize("on_blocks", [False, True], ids=["dense", "block"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_bad_bias_reaches_only_its_row(implementation, value, on_blocks):
    case = named(implementation, "plain", np.random.default_rng(11))
    dense = np.zeros((case.mask.q_len, case.mask.kv_len), np.float32)
    row, key = np.argwhere(case.mask.to_dense()[0, 0])[40]

    def results_of(dense):
        bias = BlockBias.from_dense(case.mask, dense) if on_blocks else dense
        return run_case(implementation, dataclasses.replace(case, bias=bias))

    clean = results_of(dense)
    dense[row, key] = value
    found = results_of(dense)
    others = np.arange(case.mask.q_len) != row
    for x, y in zip((found[0], found[2]), (clean[0], clean[2]), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[others], np.asarray(y)[others])
        assert np.isnan(np.asarray(x)[row]).any()


def check_bad_bias(implementation: str, value: float, on_blocks: bool) -> None:
    """A bias of -inf masks its element, of another bad value reaches only its row."""
    if value == -np.inf:
        test_bias_of_minus_infinity_masks_the_element(implementation, on_blocks)
    else:
        test_bad_bias_reaches_only_its_row(implementation, value, on_blocks)


def check_memory_of_a_shared_bias(implementation: Any) -> None:
    """64 entries share 64 MB: nothing so large is allocated beside the gradient."""
    rng, length = np.random.default_rng(11), 2048
    mask = random_mask(rng, (length, length, 128, 128), 600, elements=False)
    case = make_case(rng, mask, batch=(64,), heads=(4, 4), dims=(32, 32))
    case = case.cast("bfloat16")
    bias = jnp.zeros((4, length, length), jnp.float32)

    def gradients(q, k, v, bias, dout):
        def attend(q, k, v, bias):
            return block_sparse_attention(
                q, k, v, mask, bias=bias, implementation=implementation
            )

        out, pullback = jax.vjp(attend, q, k, v, bias)
        return out, *pullback(dout)

    args = (case.q, case.k, case.v, bias, case.dout)
    memory: Any = jax.jit(gradients).lower(*args).compile().memory_analysis()
    ends = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 0.05 * ends + 64e6


@pytest.mark.parametrize("form", ["linear", "quadratic", "table"])
@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_an_atom_without_a_place_reaches_only_who_sees_it(implementation, form):
    case = named(implementation, "plain", np.random.default_rng(24))
    seen = case.mask.to_dense()[0, 0]
    key = int(np.argmax(seen.sum(0) * (seen.sum(0) < seen.any(1).sum())))
    rng = np.random.default_rng(25)
    lengths = case.mask.q_len, case.mask.kv_len
    x, y = (rng.standard_normal((n, 3)) for n in lengths)

    @jax.jit
    def attend(y):  # where the coordinates are known, they are refused
        weights = (np.ones((2, 5)), 4.0) if form == "table" else (np.ones(2),)
        bias = getattr(DistanceBias, form)(*weights, x, y)
        return run(implementation, *arrays, bias, case.dout, case.dlse)[0]

    arrays = (case.q, case.k, case.v, case.mask)
    clean = np.asarray(attend(y))
    y[key] = np.nan
    found = np.asarray(attend(y))
    np.testing.assert_array_equal(found[~seen[:, key]], clean[~seen[:, key]])
    assert np.isnan(found[seen[:, key]]).all()


@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_bad_bias_outside_the_mask_is_never_seen(implementation):
    case = named(implementation, "plain", np.random.default_rng(11))
    case.bias = np.zeros((case.mask.q_len, case.mask.kv_len), np.float32)
    clean = run_case(implementation, case)
    case.bias[~case.mask.to_dense()[0, 0]] = np.nan
    found = run_case(implementation, case)
    for name, x, y in zip(NAMES, found, clean, strict=False):
        np.testing.assert_array_equal(x, y, err_msg=name)


# ------------------------------------------------------------------ transformations


@pytest.mark.parametrize("implementation", BACKENDS)
def test_same_bits_on_every_run(implementation):
    case = named(implementation, "long_lists", np.random.default_rng(12))
    if implementation not in HALF:
        shape = (2, case.mask.q_len, case.mask.kv_len)
        case.bias = np.random.default_rng(12).standard_normal(shape).astype(np.float32)
    first = run_case(implementation, case)
    for _ in range(10):
        for x, y in zip(first, run_case(implementation, case), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_static_and_traced_masks_agree(implementation):
    case = named(implementation, "plain", np.random.default_rng(13))

    @jax.jit
    def closed_over(q, k, v):
        return block_sparse_attention(q, k, v, case.mask, implementation=implementation)

    out, traced = closed_over(case.q, case.k, case.v), run_case(implementation, case)[0]
    if implementation in HALF:  # rows are split elsewhere where the lists are known
        assert error(out, traced) < HALF_LIMIT
    else:
        np.testing.assert_array_equal(out, traced)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_masks_of_one_bucket_share_a_compilation(implementation):
    rng = np.random.default_rng(14)
    traces = []

    @jax.jit
    def attend(q, k, v, mask):
        traces.append(1)
        return block_sparse_attention(q, k, v, mask, implementation=implementation)

    block = max(sizes_of(implementation)[2], 8)
    for length in (2 * block + 4, 4 * block + 5):
        small = random_mask(rng, (length, length, block, block), 9)
        bucket = small.pad_to(5 * block, capacity=9, num_bits=9)
        case = made(implementation, rng, bucket)
        out = attend(case.q, case.k, case.v, case.mask)
        assert error(out, expected(case)[0]) < limit_of(implementation, 3e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("kind", [None, "dense_2d", "block", "table"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_vmap_keeps_what_is_shared(implementation, kind):
    if kind is not None and implementation in HALF:
        pytest.skip("takes no bias")
    rng = np.random.default_rng(15)
    mask = named(implementation, "plain", rng).mask
    case = made(implementation, rng, mask, batch=(3,))
    case.bias = biases(rng, mask, 2, 1).get(kind)
    truth = run_case(implementation, case)

    @jax.jit
    def one(q, k, v, dout, dlse, bias):
        return jax.vmap(
            lambda *a: run(implementation, a[0], a[1], a[2], mask, bias, a[3], a[4])
        )(q, k, v, dout, dlse)

    found = one(case.q, case.k, case.v, case.dout, case.dlse, case.bias)
    for name, x, y in zip(NAMES, found, truth, strict=False):
        assert error(x, y) < limit_of(implementation, 1e-6), name

    def loss(bias):
        def row(q, k, v, dout):
            out = block_sparse_attention(
                q, k, v, mask, bias=bias, implementation=implementation
            )
            return (out * dout).sum()

        return jax.vmap(row)(case.q, case.k, case.v, case.dout).sum()

    if kind is None:
        return
    zero = dataclasses.replace(case, dlse=np.zeros_like(case.dlse))
    truth = jax.tree_util.tree_leaves(run_case(implementation, zero)[5])
    for x, y in zip(
        jax.tree_util.tree_leaves(jax.jit(jax.grad(loss))(case.bias)),
        truth,
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_vmap_over_masks(implementation):
    rng, sizes = np.random.default_rng(16), sizes_of(implementation)
    batched = named(implementation, "batch_patterns", rng)
    masks = [
        random_mask(rng, sizes, 9).pad_to(*sizes[:2], capacity=9, num_bits=9)
        for _ in "ab"
    ]
    stacked = jax.tree_util.tree_map(lambda *x: np.stack(x), *masks)
    attend = functools.partial(block_sparse_attention, implementation=implementation)
    out = jax.jit(jax.vmap(attend))(batched.q, batched.k, batched.v, stacked)
    for n, mask in enumerate(masks):
        q, k, v = (
            np.asarray(x[n], np.float32) for x in (batched.q, batched.k, batched.v)
        )
        truth = block_sparse_attention(q, k, v, mask, implementation="reference")
        assert error(out[n], truth) < limit_of(implementation, 2e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_vmap_over_some_lists_of_a_mask(implementation):
    check_vmap_over_some_lists(implementation)


def check_vmap_over_some_lists(implementation: Any) -> None:
    """What is listed differs from entry to entry, how much is listed does not."""
    length, rng = 3 * 64, np.random.default_rng(31)
    rows, columns = np.arange(3), (np.array([0, 1, 2]), np.array([1, 2, 0]))
    make = functools.partial(BlockMask.from_blocks, rows, q_len=length)
    masks = [make(x, block_q=64, block_kv=64) for x in columns]
    lists = [
        np.stack([np.asarray(getattr(x, name)) for x in masks])
        for name in ("full_kv_indices", "full_q_indices")
    ]
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, length, 1, 16)), jnp.bfloat16)
        for _ in range(3)
    )

    @jax.jit
    @jax.vmap
    def both(q, k, v, by_query, by_key):
        mask = dataclasses.replace(
            masks[0], full_kv_indices=by_query, full_q_indices=by_key
        )

        def attend(q, k, v):
            return block_sparse_attention(q, k, v, mask, implementation=implementation)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(q)

    found = jax.block_until_ready(both(q, k, v, *lists))
    for n, mask in enumerate(masks):
        arrays = [np.asarray(x[n], np.float32) for x in (q, k, v)]
        attend = functools.partial(
            block_sparse_attention, mask=mask, implementation="reference"
        )
        out, pull = jax.vjp(attend, *arrays)
        for x, y in zip(found, (out, *pull(arrays[0])), strict=True):
            assert error(np.asarray(x[n], np.float32), y) < 1e-2


def _bias_gradient(rows: int, length: int):
    """Compiled gradient of a bias ``[H, N, N]`` shared by many rows under vmap."""
    rng = np.random.default_rng(17)
    mask = random_mask(
        rng, (length, length, 64, 64), (length // 64) ** 2 * 2, elements=False
    )
    case = make_case(rng, mask, batch=(rows,), heads=(2, 2))

    def loss(bias):
        def row(q, k, v):
            return block_sparse_attention(
                q, k, v, mask, bias=bias, implementation="xla"
            ).sum()

        return jax.vmap(row)(case.q, case.k, case.v).sum()

    bias = jnp.zeros((2, length, length))
    return jax.jit(jax.grad(loss)).lower(bias).compile(), bias


def test_shared_bias_is_never_copied_per_row():
    few, bias = _bias_gradient(2, 512)
    many, _ = _bias_gradient(32, 512)
    reports: list[Any] = [x.memory_analysis() for x in (few, many)]
    extra = [x.temp_size_in_bytes for x in reports]
    per_row = 6 * 512 * 2 * 16 * 4  # q, k, v and their gradients
    assert extra[1] - extra[0] <= 30 * 2 * per_row
    assert extra[1] < 32 * bias.nbytes / 2


def test_no_dense_array_is_made():
    rng = np.random.default_rng(18)
    length = 4096
    mask = random_mask(rng, (length, length, 64, 64), 400, elements=False)
    coords = rng.standard_normal((length, 3)).astype(np.float32)
    bias = DistanceBias.table(np.ones((1, 8), np.float32), 4.0, coords)
    case = make_case(rng, mask, heads=(1, 1), bias=bias)
    arrays = (getattr(case, f.name) for f in dataclasses.fields(case))
    jaxpr = jax.make_jaxpr(run, static_argnums=0)("xla", *arrays)
    largest = max(_sizes(jaxpr.jaxpr))
    assert largest < length * length / 8


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for param in eqn.params.values():
            for sub in param if isinstance(param, tuple | list) else (param,):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from _sizes(inner)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_checkpoint(implementation):
    case = named(implementation, "plain", np.random.default_rng(19))

    def loss(q, wrap):
        def attend(q):
            return block_sparse_attention(
                q, case.k, case.v, case.mask, implementation=implementation
            )

        return (wrap(attend)(q) * case.dout).sum()

    plain, saved = (
        jax.jit(jax.grad(loss), static_argnums=1)(case.q, w)
        for w in (lambda f: f, jax.checkpoint)
    )
    assert error(saved, plain) < limit_of(implementation, 1e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_export(implementation):
    case = named(implementation, "plain", np.random.default_rng(20))

    @jax.jit
    def gradient(q, k, v, mask, dout):
        def loss(q):
            out = block_sparse_attention(q, k, v, mask, implementation=implementation)
            return (out * dout).sum()

        return jax.grad(loss)(q)

    args = (case.q, case.k, case.v, case.mask, case.dout)
    exported = jax.export.export(
        gradient,
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call(x) for x in cutlass.TARGETS
        ],
    )(*args)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(*args), gradient(*args))


@pytest.mark.parametrize("kind", ["dense_2d", "block", "linear", "table"])
@pytest.mark.parametrize("name", ["window", "distance", "groups"])
def test_export_of_a_bias_and_rules(name, kind):
    """Arguments of the program that is read again, like any array."""
    case = CASES[name](rng := np.random.default_rng(21))
    case.bias = biases(rng, case.mask, 2, 1)[kind]

    @jax.jit
    def attend(q, k, v, mask, bias):
        return block_sparse_attention(q, k, v, mask, bias=bias, implementation="xla")

    args = case.q, case.k, case.v, case.mask, case.bias
    again = jax.export.deserialize(jax.export.export(attend)(*args).serialize())
    np.testing.assert_array_equal(again.call(*args), attend(*args))


@pytest.mark.parametrize(
    "split, full", [("batch", None), ("heads", None), ("batch", False), ("batch", True)]
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_shard_map(implementation, split, full):
    """Blocks of both kinds, or full ones only, or none of them."""
    devices = jax.devices()[:2]
    if jax.default_backend() == "cpu" and len(devices) < 2:
        pytest.skip("needs two devices")
    rng = np.random.default_rng(21)
    mask = named(implementation, "plain", rng).mask
    if full is not None:
        mask = one_kind(rng, sizes_of(implementation), full)
        assert 0 in mask.capacity
    case = made(implementation, rng, mask, batch=(2,))
    if implementation not in HALF:
        case.bias = rng.standard_normal((2, *SIZES[:2])).astype(np.float32)
    mesh = jax.make_mesh(
        (len(devices),), ("x",), (jax.sharding.AxisType.Auto,), devices=devices
    )
    part = jax.P("x") if split == "batch" else jax.P(None, None, "x")
    bias_part = jax.P("x") if split == "heads" and case.bias is not None else jax.P()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(part, part, part, bias_part), out_specs=part
    )
    def attend(q, k, v, bias):
        return block_sparse_attention(
            q, k, v, case.mask, bias=bias, implementation=implementation
        )

    @jax.jit
    def gradients(q, k, v, bias):
        def loss(q, k, v, bias):
            return (attend(q, k, v, bias) * case.dout).sum()

        return jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)

    args = [
        x if x is None else jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        for x, spec in zip(
            (case.q, case.k, case.v, case.bias), (part,) * 3 + (bias_part,), strict=True
        )
    ]
    text = gradients.lower(*args).compile().as_text() or ""
    assert not [word for word in MOVES if word in text]
    found = gradients(*args)
    zero = dataclasses.replace(case, dlse=np.zeros_like(case.dlse))
    for x, y in zip(found, run_case(implementation, zero)[2:], strict=True):
        if y is None:
            continue
        assert error(x, y) < limit_of(implementation, 3e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_overflow_is_never_silent(implementation):
    case = named(implementation, "plain", np.random.default_rng(22))
    needed = np.array([[*case.mask.capacity]], np.int32)
    fits = dataclasses.replace(
        case, mask=dataclasses.replace(case.mask, needed_capacity=needed)
    )
    assert np.isfinite(run_case(implementation, fits)[0]).all()
    over = dataclasses.replace(
        case, mask=dataclasses.replace(case.mask, needed_capacity=needed + 1)
    )
    out, lse, *grads = run_case(implementation, over)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()
    assert all(np.isnan(x).any() for x in grads[:3])


def test_block_bias_from_function_and_dense_agree():
    rng = np.random.default_rng(23)
    case = CASES["plain"](rng)
    dense = rng.standard_normal((2, *SIZES[:2])).astype(np.float32)
    bias = BlockBias.from_dense(case.mask, dense)
    elements = case.mask.to_dense()[0]
    placed = oracle.dense_bias(bias, case.mask, 2)[0]
    np.testing.assert_array_equal(
        np.where(elements, placed, 0), np.where(elements, dense, 0)
    )
