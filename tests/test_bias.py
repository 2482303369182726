"""BlockBias and DistanceBias: values, refusals, gradients at distance 0."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jsparse import BlockBias, BlockMask, DistanceBias, patterns
from tests.support import oracle
from tests.support.cases import random_mask

COORDS = np.random.default_rng(0).uniform(-1000, 1000, (40, 3)).astype(np.float32)


def near(coords):
    """Points within a few ångström of others, far from the origin."""
    shift = np.random.default_rng(1).uniform(-4, 4, (30, 3)).astype(np.float32)
    return coords[:30] + shift


@pytest.mark.parametrize(
    "bias",
    [
        DistanceBias.linear(np.array([0.5, 2.0]), COORDS, near(COORDS)),
        DistanceBias.quadratic(np.array([0.5, 2.0]), COORDS, near(COORDS)),
        DistanceBias.table(
            np.random.default_rng(2).standard_normal((2, 9)), 8.0, COORDS, near(COORDS)
        ),
        DistanceBias.gaussian(
            np.random.default_rng(3).standard_normal((2, 6)),
            np.linspace(0, 8, 6),
            1.0,
            COORDS,
            near(COORDS),
        ),
    ],
    ids=lambda b: b.form,
)
def test_distance_values_are_exact_far_from_the_origin(bias):
    mask = BlockMask.from_blocks([0], [0], q_len=40, kv_len=30)
    truth = oracle.dense_bias(bias, mask, 2)[0]
    np.testing.assert_allclose(bias.dense(), truth, rtol=2e-6, atol=2e-6)


def test_table_is_clamped_beyond_its_end():
    x = np.array([[0, 0, 0], [0, 0, 500]], np.float32)
    bias = DistanceBias.table(np.array([[1.0, 2.0, 7.0]]), 4.0, x)
    np.testing.assert_allclose(bias.dense()[0], [[1, 7], [7, 1]])


@pytest.mark.parametrize("form", ["linear", "quadratic", "table", "gaussian"])
def test_gradient_of_coinciding_points_is_finite(form):
    x = np.zeros((3, 3), np.float32)
    weights = np.ones((1, 3), np.float32)

    def total(x):
        bias = {
            "linear": lambda: DistanceBias.linear(weights[:, 0], x),
            "quadratic": lambda: DistanceBias.quadratic(weights[:, 0], x),
            "table": lambda: DistanceBias.table(weights, 4.0, x),
            "gaussian": lambda: DistanceBias.gaussian(weights, np.arange(3.0), 1.0, x),
        }[form]()
        return bias.dense().sum()

    assert not np.asarray(jax.grad(total)(x)).any()


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: DistanceBias.table(np.ones((2, 1)), 4.0, COORDS),
            "at least two entries",
        ),
        (lambda: DistanceBias.table(np.ones(5), 4.0, COORDS), r"expected \[H, n\]"),
        (lambda: DistanceBias.table(np.ones((2, 5)), 0.0, COORDS), "max_distance=0.0"),
        (
            lambda: DistanceBias.table(np.ones((2, 5)), np.nan, COORDS),
            "max_distance=nan",
        ),
        (lambda: DistanceBias.linear(np.ones((2, 1)), COORDS), r"expected \[H\]"),
        (lambda: DistanceBias.linear(np.ones(2), COORDS[:, :2]), r"\(40, 2\)"),
        (
            lambda: DistanceBias.gaussian(np.ones((2, 3)), np.ones(4), 1.0, COORDS),
            r"centers \(4,\)",
        ),
        (
            lambda: DistanceBias.gaussian(np.ones((2, 3)), np.ones(3), -1.0, COORDS),
            "width=-1.0",
        ),
        (
            lambda: DistanceBias.linear(np.array([1, np.inf]), COORDS),
            r"linear: slope is inf at \(1,\), one of 1 numbers that are not finite",
        ),
        (
            lambda: DistanceBias.quadratic(
                np.ones(1), COORDS, jax.numpy.full((7, 3), np.nan)
            ),
            r"quadratic: kv_coords is nan at \(0, 0\), one of 21 numbers",
        ),
        (
            lambda: DistanceBias.table(np.array([[0, -np.inf]]), 4.0, COORDS),
            r"table: values is -inf at \(0, 1\).* leave it out of the mask",
        ),
        (
            lambda: DistanceBias.gaussian(
                np.ones((2, 3)), np.full(3, np.nan), 1.0, COORDS
            ),
            r"gaussian: centers is nan at \(0,\), one of 3 numbers",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def with_one_wrong(value):
    """The name and the call of each array of a `DistanceBias`, given ``value``."""
    one, two = np.ones(1), np.ones((1, 2))
    return {
        "linear: slope": lambda: DistanceBias.linear(value, COORDS),
        "linear: coords": lambda: DistanceBias.linear(one, value),
        "quadratic: slope": lambda: DistanceBias.quadratic(value, COORDS),
        "quadratic: kv_coords": lambda: DistanceBias.quadratic(one, COORDS, value),
        "table: values": lambda: DistanceBias.table(value, 4.0, COORDS),
        "gaussian: weights": lambda: DistanceBias.gaussian(value, one, 1.0, COORDS),
        "gaussian: centers": lambda: DistanceBias.gaussian(two, value, 1.0, COORDS),
    }


NAMES = list(with_one_wrong(None))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value, dtype",
    [
        ([1j], "complex128"),
        (jax.numpy.array([1j]), "complex64"),
        (["1"], "<U1"),
        ([True], "bool"),
    ],
)
def test_values_must_be_real_numbers(name, value, dtype):
    message = f"DistanceBias.{name} has dtype {dtype}; expected real numbers"
    with pytest.raises(TypeError, match=message):
        with_one_wrong(value)[name]()
    if isinstance(value, jax.Array):
        with pytest.raises(TypeError, match=message):
            jax.jit(lambda x: with_one_wrong(x)[name]())(value)


@pytest.mark.parametrize("name", NAMES)
def test_values_must_be_one_array(name):
    message = f"DistanceBias.{name} is not a rectangular array .* Give every row"
    with pytest.raises(ValueError, match=message):
        with_one_wrong([[0.0, 1.0], [1.0]])[name]()
    message = f"DistanceBias.{name} is a list of traced values.* with jnp.stack"
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda x: with_one_wrong([x, x])[name]())(1.0)


@pytest.mark.parametrize(
    "value, what",
    [
        (np.ones(3), r" has shape \(3,\)"),
        ("4.0", "='4.0'"),
        (True, "=True"),
        (None, "=None"),
        ([1.0, 2.0], r"=\[1.0, 2.0\]"),
    ],
)
def test_distances_must_be_one_number(value, what):
    expected = f"{what}; expected one number of ångström"
    with pytest.raises(TypeError, match=f"table: max_distance{expected}"):
        DistanceBias.table(np.ones((2, 5)), value, COORDS)
    with pytest.raises(TypeError, match=f"gaussian: width{expected}"):
        DistanceBias.gaussian(np.ones((2, 3)), np.ones(3), value, COORDS)


def test_traced_numbers_need_not_be_finite():
    """They may belong to padding, which no mask lets anybody see."""

    def make(coords):
        return DistanceBias.linear(np.ones(1), coords).dense()

    coords = np.where(np.arange(40)[:, None] < 30, COORDS, np.nan)
    found = np.asarray(jax.jit(make)(coords))
    np.testing.assert_allclose(found[0, :30, :30], make(COORDS)[0, :30, :30], rtol=1e-6)


def test_traced_distances_are_refused():
    def make(width):
        return DistanceBias.gaussian(np.ones((2, 3)), np.ones(3), width, COORDS)

    with pytest.raises(TypeError, match="known before tracing"):
        jax.jit(make)(1.0)


def test_block_bias_takes_the_masks_blocks():
    rng = np.random.default_rng(4)
    mask = random_mask(rng, (37, 75, 8, 32), 9)
    dense = rng.standard_normal((2, 37, 75)).astype(np.float32)
    made = BlockBias.from_dense(mask, dense)
    assert made.values.shape == (1, 2, mask.num_blocks, 8, 32)
    placed = oracle.dense_bias(made, mask, 2)[0]
    blocks = mask.block_states()[0, 0].astype(bool)
    listed = np.repeat(np.repeat(blocks, 8, 0), 32, 1)[:37, :75]
    np.testing.assert_array_equal(placed, np.where(listed, dense, 0))


def test_block_bias_from_a_function_of_arrays_is_differentiable():
    mask = patterns.window(64, left=4, right=4, block_q=16, block_kv=16)
    pairs = np.random.default_rng(5).standard_normal((64, 64)).astype(np.float32)

    def total(weight):
        bias = BlockBias.from_function(mask, lambda t, s, w: w * pairs[t, s], weight)
        return bias.values.sum()

    pairs = jax.numpy.asarray(pairs)
    listed = np.kron(mask.block_states()[0, 0].astype(bool), np.ones((16, 16), bool))
    np.testing.assert_allclose(
        jax.grad(total)(1.0), np.asarray(pairs)[listed].sum(), rtol=1e-4
    )


def test_block_bias_refuses_what_it_cannot_place():
    mask = BlockMask.from_blocks([0], [0], q_len=8, block_q=8, block_kv=8)
    two = BlockMask.stack([mask, mask], "head")
    with pytest.raises(ValueError, match="2 head patterns; expected one of each"):
        BlockBias.from_function(two, lambda t, s: t - s)
    with pytest.raises(ValueError, match=r"shape \(8, 9\); expected \[8, 8\]"):
        BlockBias.from_dense(mask, np.zeros((8, 9)))
