"""Score functions: values, gradients and refusals, on every backend that takes them.

The oracle is dense attention in float64 that calls the function on whole arrays and is
differentiated by JAX; it shares no code with `jsparse.backends._score`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import ScoreFunction, block_sparse_attention, patterns
from jsparse.backends import _score
from tests.backends.test_contract import WITH_BIAS, _sizes, error
from tests.support.cases import CASES, Case, make_case, random_mask
from tests.support.scores import FUNCTIONS, arrays_of

PROBLEMS = [(name, "grouped_query") for name in FUNCTIONS] + [
    ("by_token", pattern)
    for pattern in ("batch_and_head_patterns", "window", "nothing", "long_lists")
]
KERNELS = tuple(name for name in FUNCTIONS if name != "relative")
"""What the kernels take: no learned array is read by query and by key."""
NAMES = ("out", "lse", "dq", "dk", "dv")


def results(implementation, function, case: Case, q, k, v, mask, learned, others):
    """``out, lse, dq, dk, dv`` and the gradients of the arrays."""

    def attend(q, k, v, learned):
        bias = ScoreFunction(function, (*learned, *others))
        return block_sparse_attention(
            q, k, v, mask, bias=bias, return_lse=True, implementation=implementation
        )

    (out, lse), pullback = jax.vjp(attend, q, k, v, learned)
    dlse = jnp.where(jnp.isfinite(lse), case.dlse, 0)
    *grads, learned = pullback((jnp.asarray(case.dout, out.dtype), dlse))
    return (out, lse, *grads, *learned)


def run(implementation: str, name: str, case: Case) -> tuple:
    function = FUNCTIONS[name]
    learned, others = arrays_of(name, case)
    if case.q.dtype == np.float64:
        learned = tuple(x.astype(np.float64) for x in learned)
    f = functools.partial(results, implementation, function, case)
    return jax.jit(f)(case.q, case.k, case.v, case.mask, learned, others)


def expected(name: str, case: Case) -> tuple:
    """The same from the definition, in float64."""
    return expected_of(FUNCTIONS[name], *arrays_of(name, case), case)


def summed_by(name: str, case: Case) -> dict[int, float]:
    """Of each scalar's gradient, which may be small, what queries add without signs."""
    learned, others = arrays_of(name, case)
    scalars = [n for n, x in enumerate(learned) if np.ndim(x) == 0]

    def function(s, i, j, h, *arrays):
        own, more = list(arrays[: len(learned)]), arrays[len(learned) :]
        for n, by_query in zip(scalars, more, strict=False):
            own[n] = own[n] + by_query[i]
        return FUNCTIONS[name](s, i, j, h, *own, *more[len(scalars) :])

    zeros = [np.zeros(case.q.shape[-3])] * len(scalars)
    found = expected_of(function, (*learned, *zeros), others, case)
    parts = found[5 + len(learned) :]
    return {5 + n: float(np.abs(x).sum()) for n, x in zip(scalars, parts, strict=True)}


def expected_of(function, learned, others, case: Case) -> tuple:
    """``expected`` of any function and arrays."""
    elements = case.mask.to_dense()
    heads, group = case.q.shape[-2], case.q.shape[-2] // case.k.shape[-2]

    def attend(q, k, v, learned):
        k, v = (jnp.repeat(x, group, -2) for x in (k, v))
        s = jnp.einsum("...thd,...shd->...hts", q, k) * q.shape[-1] ** -0.5
        i, j, h = (
            jnp.arange(n, dtype=jnp.int32).reshape(n, *(1,) * after)
            for n, after in ((s.shape[-2], 1), (s.shape[-1], 0), (heads, 2))
        )
        s = function(s, i, j, h, *learned, *others)
        seen = elements.reshape(*elements.shape[: s.ndim - 3], *elements.shape[-3:])
        seen = seen & (s != -jnp.inf)
        s = jnp.where(seen, s, -1e300)
        top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
        w = jnp.where(seen, jnp.exp(s - top), 0)
        total = w.sum(-1, keepdims=True)
        out = jnp.einsum(
            "...hts,...shd->...thd", w / jnp.where(total == 0, 1, total), v
        )
        lse = jnp.log(jnp.where(total == 0, 1, total)) + top
        return out, jnp.where(total == 0, -jnp.inf, lse)[..., 0]

    with jax.enable_x64(True):
        arrays = (case.q, case.k, case.v, list(learned)), case.dout, case.dlse
        args, dout, dlse = jax.tree_util.tree_map(
            lambda x: jnp.asarray(np.asarray(x), jnp.float64), arrays
        )
        (out, lse), pullback = jax.vjp(attend, *args)
        dlse = jnp.where(jnp.isfinite(lse), dlse, 0)
        *grads, learned = pullback((dout, dlse))
        return (out, lse, *grads, *learned)


@pytest.mark.parametrize("name, pattern", PROBLEMS)
def test_values_and_gradients(name, pattern):
    case = CASES[pattern](np.random.default_rng(0))
    found, plain = (run(x, name, case) for x in ("xla", "reference"))
    truth, sums = expected(name, case), summed_by(name, case)
    for n, (x, y, z) in enumerate(zip(found, truth, plain, strict=True)):
        what = NAMES[n] if n < 5 else f"array {n - 5}"
        of_xla, of_plain, bound = error(x, y), error(z, y), 4e-6
        if n in sums:  # rounding is that of what is summed, which is more
            of_xla, of_plain = (abs(float(g) - float(y)) / sums[n] for g in (x, z))
            bound = 1e-6
        assert of_plain <= bound, (what, of_plain)
        assert of_xla <= 2 * of_plain + bound, (what, of_xla)


@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_sixteen_bits(implementation):
    rng = np.random.default_rng(2)
    case = make_case(rng, random_mask(rng, (256, 256, 32, 32), 30), dims=(32, 32))
    case = case.cast("bfloat16")
    found, truth = run(implementation, "alibi", case), expected("alibi", case)
    assert found[0].dtype == found[2].dtype == jnp.bfloat16
    assert found[1].dtype == found[5].dtype == jnp.float32
    for x, y in zip(found, truth, strict=True):
        assert error(x, y) <= 6e-3


@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_float64(implementation):
    with jax.enable_x64(True):
        case = CASES["grouped_query"](np.random.default_rng(3)).cast("float64")
        found = run(implementation, "soft_cap", case)
    assert found[0].dtype == np.float64
    for x, y in zip(found[:5], expected("soft_cap", case), strict=False):
        assert error(x, y) <= 1e-13


# ------------------------------------------------------------------ values that are bad


def attend(case: Case, function, *arrays, implementation: Any = "xla"):
    return block_sparse_attention(
        *(case.q, case.k, case.v, case.mask),
        bias=ScoreFunction(function, arrays),
        implementation=implementation,
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_a_bad_score_reaches_only_its_row(implementation, value):
    case = CASES["plain"](np.random.default_rng(4))
    row, key = np.argwhere(case.mask.to_dense()[0, 0])[40]

    def gradient(value):
        def f(s, i, j, h, a):
            return jnp.where((i == row) & (j == key), value, a * s)

        def loss(q):
            out = block_sparse_attention(
                *(q, case.k, case.v, case.mask),
                bias=ScoreFunction(f, (jnp.ones(()),)),
                implementation=implementation,
            )
            return (out * case.dout).sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(case.q)

    others = np.arange(case.mask.q_len) != row
    for x, y in zip(gradient(jnp.float32(value)), gradient(0.0), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_array_equal(x[others], y[others])
        assert np.isnan(x[row]).any()


@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_what_the_mask_leaves_out_is_not_differentiated(implementation):
    """Above the diagonal the logarithm is NaN, and so is its derivative."""
    case = CASES["everything"](np.random.default_rng(5))
    rows, cols = np.tril_indices(case.mask.q_len, -1, case.mask.kv_len)
    dense = np.zeros((case.mask.q_len, case.mask.kv_len), bool)
    dense[rows, cols] = True
    case.mask = patterns.from_dense(dense, block_q=8, block_kv=32)

    def f(s, i, j, h, w):
        return s + jnp.log(w * (i - j).astype(s.dtype))

    def loss(q, w):
        out = block_sparse_attention(
            *(q, case.k, case.v, case.mask),
            bias=ScoreFunction(f, (w,)),
            implementation=implementation,
        )
        return (out * case.dout).sum()

    for x in jax.jit(jax.grad(loss, (0, 1)))(case.q, jnp.float32(0.5)):
        assert np.isfinite(x).all()


# ---------------------------------------------------------------------- transformations


@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_closed_over_arrays_are_like_arguments(implementation):
    case = CASES["plain"](np.random.default_rng(6))

    def loss(table, slope, closed):
        if closed:
            bias = ScoreFunction(
                lambda s, i, j, h: s + table[h, jnp.abs(i - j) % 5] * slope
            )
        else:
            bias = ScoreFunction(
                lambda s, i, j, h, t, m: s + t[h, jnp.abs(i - j) % 5] * m,
                (table, slope),
            )
        out = block_sparse_attention(
            *(case.q, case.k, case.v, case.mask),
            bias=bias,
            implementation=implementation,
        )
        return (out * case.dout).sum()

    table = np.random.default_rng(7).standard_normal((2, 5)).astype(np.float32)
    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    found, truth = (
        gradient(table, np.float32(0.7), closed) for closed in (True, False)
    )
    for x, y in zip(found, truth, strict=True):
        assert np.abs(y).max() > 0
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mapped", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_vmap(implementation, mapped):
    rng = np.random.default_rng(8)
    mask = CASES["plain"](rng).mask
    case = make_case(rng, mask, batch=(3,))
    slopes = np.abs(rng.standard_normal((3, 2) if mapped else 2)).astype(np.float32)
    f = FUNCTIONS["alibi"]

    def one(q, k, v, slopes):
        return block_sparse_attention(
            q,
            k,
            v,
            mask,
            bias=ScoreFunction(f, (slopes,)),
            implementation=implementation,
        )

    def together(slopes):
        axes = (0, 0, 0, 0 if mapped else None)
        out = jax.vmap(one, axes)(case.q, case.k, case.v, slopes)
        return (out * case.dout).sum()

    def apart(slopes):
        outs = [
            one(case.q[n], case.k[n], case.v[n], slopes[n] if mapped else slopes)
            for n in range(3)
        ]
        return (jnp.stack(outs) * case.dout).sum()

    found, truth = (jax.jit(jax.value_and_grad(x))(slopes) for x in (together, apart))
    for x, y in zip(found, truth, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_checkpoint_and_the_same_bits(implementation):
    case = CASES["long_lists"](np.random.default_rng(9))
    learned, _ = arrays_of("relative", case)

    def loss(arrays, wrap):
        f = functools.partial(attend, case, FUNCTIONS["relative"])
        out = wrap(lambda *x: f(*x, implementation=implementation))(*arrays)
        return (out * case.dout).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(learned, lambda f: f)
    for x, y in zip(plain, gradient(learned, jax.checkpoint), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(plain, gradient(learned, lambda f: f), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["by_token", "soft_cap"])
@pytest.mark.parametrize("implementation", WITH_BIAS)
def test_shard_map_and_export(implementation, name):
    devices = jax.devices()[:2]
    if jax.default_backend() == "cpu" and len(devices) < 2:
        pytest.skip("needs two devices")
    rng = np.random.default_rng(16)
    case = make_case(rng, CASES["plain"](rng).mask, batch=(2,))
    learned, others = arrays_of(name, case)

    def alone(q, k, v, learned):
        return block_sparse_attention(
            *(q, k, v, case.mask),
            bias=ScoreFunction(FUNCTIONS[name], (*learned, *others)),
            implementation=implementation,
        )

    mesh = jax.make_mesh(
        (len(devices),), ("x",), (jax.sharding.AxisType.Auto,), devices=devices
    )
    part = jax.P("x")
    split = jax.shard_map(
        alone, mesh=mesh, in_specs=(part, part, part, jax.P()), out_specs=part
    )

    def gradient(f):
        def loss(q, learned):
            return (f(q, case.k, case.v, learned) * case.dout).sum()

        return jax.jit(jax.grad(loss, (0, 1)))

    found, truth = (gradient(f)(case.q, learned) for f in (split, alone))
    for x, y in zip(*map(jax.tree_util.tree_leaves, (found, truth)), strict=True):
        assert error(x, y) < 3e-6
    exported = jax.export.export(gradient(alone))(case.q, learned)
    again = jax.export.deserialize(exported.serialize()).call(case.q, learned)
    for x, y in zip(*map(jax.tree_util.tree_leaves, (again, truth)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_bias_is_a_pytree_of_its_arrays():
    case = CASES["one_block"](np.random.default_rng(10))
    bias = ScoreFunction(FUNCTIONS["alibi"], (np.ones(2, np.float32),))

    def loss(bias):
        out = block_sparse_attention(case.q, case.k, case.v, case.mask, bias=bias)
        return (out * case.dout).sum()

    found = jax.jit(jax.grad(loss))(bias)
    assert isinstance(found, ScoreFunction)
    assert found.arrays[0].shape == (2,)


def test_a_derivative_of_its_own_is_used():
    case = CASES["one_block"](np.random.default_rng(11))

    @jax.custom_vjp
    def straight(x):
        return jnp.round(x)

    straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def gradient(f):
        def loss(q):
            bias = ScoreFunction(lambda s, i, j, h: f(s))
            out = block_sparse_attention(q, case.k, case.v, case.mask, bias=bias)
            return (out * case.dout).sum()

        return jax.jit(jax.grad(loss))(case.q)

    assert not np.asarray(gradient(jnp.round)).any()
    assert np.abs(gradient(straight)).max() > 1e-3


def test_no_dense_array_is_made():
    rng, length = np.random.default_rng(12), 4096
    mask = random_mask(rng, (length, length, 64, 64), 400, elements=False)
    case = make_case(rng, mask, heads=(1, 1))
    jaxpr = jax.make_jaxpr(lambda q: run("xla", "relative", case))(case.q)
    assert max(_sizes(jaxpr.jaxpr)) < length * length / 8


def test_sums_of_a_sorted_index():
    rng = np.random.default_rng(13)
    store = rng.standard_normal((5, 7)).astype(np.float32)
    index = rng.integers(0, 5, (40, 1)), rng.integers(0, 7, (1, 30))
    values = rng.standard_normal((40, 30)).astype(np.float32)
    truth = store.astype(np.float64)
    np.add.at(truth, index, values)
    index = tuple(map(jnp.asarray, index))
    found = jax.jit(_score.add_sorted)(jnp.asarray(store), index, values)
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- refusals


def shows(x):
    jax.debug.print("{}", x)
    return x


TABLE = np.ones((4, 9), np.float32)
REFUSED = {
    "vector": (
        lambda s, i, j, h, t: s + t[h][j],
        "slice of shape .*all indices at once",
    ),
    "whole": (lambda s, i, j, h, t: (s + t).sum(), r"array of shape \(4, 9\) whole"),
    "reduction": (lambda s, i, j, h, t: s - jnp.max(s), "reduce_max, which is not"),
    "softmax": (lambda s, i, j, h, t: jax.nn.softmax(s), "cannot be traced"),
    "indexing": (lambda s, i, j, h, t: s[0], "cannot be traced.*scalar"),
    "branch": (lambda s, i, j, h, t: s if s > 0 else -s, "cannot be traced.*Bool"),
    "dtype": (lambda s, i, j, h, t: s.astype(jnp.bfloat16), r"returns bfloat16\[\]"),
    "mask": (lambda s, i, j, h, t: i >= j, r"returns bool\[\]; expected one scalar"),
    "shape": (lambda s, i, j, h, t: t, r"returns float32\[4, 9\]"),
    "two": (lambda s, i, j, h, t: (s, s), r"float32\[\], float32\[\]; expected one"),
    "index of score": (
        lambda s, i, j, h, t: s + t[0, s.astype(jnp.int32)],
        "index out of the score",
    ),
    "effect": (lambda s, i, j, h, t: shows(s), "has side effects"),
    "condition": (
        lambda s, i, j, h, t: jax.lax.cond(i > j, lambda: s, lambda: -s),
        "cond, which is not element-wise",
    ),
    "arguments": (lambda s, i, j, h: s, "a scalar score, .* and 1 arrays"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, message = REFUSED[name]
    case = CASES["one_block"](np.random.default_rng(14))
    with pytest.raises(TypeError, match=message):
        attend(case, function, TABLE)


def test_refused_bias():
    case = CASES["one_block"](np.random.default_rng(15))
    args: Any = (case.q, case.k, case.v, case.mask)
    table: Any = TABLE
    with pytest.raises(TypeError, match="arrays of type ndarray; expected a tuple"):
        block_sparse_attention(*args, bias=ScoreFunction(FUNCTIONS["alibi"], table))
    with pytest.raises(TypeError, match="score function is 3; expected a function"):
        block_sparse_attention(*args, bias=ScoreFunction(3))
    with pytest.raises(TypeError, match="array 0 of .*expected an array"):
        block_sparse_attention(*args, bias=ScoreFunction(FUNCTIONS["alibi"], ("x",)))
