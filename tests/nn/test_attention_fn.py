"""`attention_fn`: block-sparse attention inside Flax's own layer."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse import DistanceBias, patterns
from jsparse.nn import BlockSparseAttention, attention_fn

T, FEATURES = 70, 8


def coords(seed: int = 0) -> np.ndarray:
    steps = np.random.default_rng(seed).normal(size=(T, 3))
    return np.cumsum(steps, axis=0, dtype=np.float32)


def radius_mask(seed: int = 0):
    return patterns.radius(coords(seed), 6.0, block_q=16, block_kv=16)


def inputs(seed: int = 1, *batch: int):
    return jax.random.normal(jax.random.key(seed), (*batch, T, FEATURES))


def flax_layer(**options: Any):
    options = {"decode": False, **options}
    return nnx.MultiHeadAttention(4, FEATURES, **options, rngs=nnx.Rngs(0))


@nnx.jit
def apply(layer, x, mask=None):
    return layer(x, mask=mask)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2, "normalize_qk": True}, {"dtype": jnp.bfloat16}],
    ids=["defaults", "grouped", "bfloat16"],
)
def test_takes_the_place_of_dense_attention(options):
    mask = radius_mask()
    x = inputs(1, 2, 3)
    out = apply(flax_layer(attention_fn=attention_fn(mask), **options), x)
    with jax.numpy_dtype_promotion("standard"):  # for JAX's attention in bfloat16
        want = apply(flax_layer(**options), x, jnp.asarray(mask.to_dense()[0]))
    assert out.dtype == want.dtype
    tolerance = 2e-2 if "dtype" in options else 2e-5
    out, want = (np.asarray(a, np.float32) for a in (out, want))
    np.testing.assert_allclose(out, want, rtol=0, atol=tolerance)


def test_a_mask_given_to_the_call_may_be_traced():
    layer, traces = flax_layer(attention_fn=attention_fn()), []

    @nnx.jit
    def call(layer, x, mask):
        traces.append(x)
        return layer(x, mask=mask)

    for seed in (0, 1):
        mask, x = radius_mask(seed).pad_to(T, capacity=5), inputs(seed)
        want = apply(flax_layer(), x, jnp.asarray(mask.to_dense()[0]))
        np.testing.assert_allclose(call(layer, x, mask), want, rtol=0, atol=2e-5)
    assert len(traces) == 1


def test_bias_and_implementation_are_passed_on():
    mask, x = radius_mask(), inputs()
    bias = DistanceBias.linear(jnp.array([0.1, 0.3, 1.0, 3.0]), coords())
    layer = BlockSparseAttention(4, FEATURES, rngs=nnx.Rngs(0))
    want = nnx.jit(lambda layer: layer(x, mask=mask, bias=bias))(layer)
    for implementation in ("xla", "reference"):
        attend = attention_fn(mask, bias=bias, implementation=implementation)
        out = apply(flax_layer(attention_fn=attend), x)
        np.testing.assert_allclose(out, want, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="implementation='fast'"):
        attention_fn(mask, implementation="fast")  # pyright: ignore[reportArgumentType]

    q = jax.random.normal(jax.random.key(3), (T, 4, 2))
    fixed, free = attention_fn(mask, bias=bias), attention_fn(mask)
    called = jax.jit(lambda q: free(q, q, q, bias=bias))(q)
    np.testing.assert_array_equal(called, jax.jit(lambda q: fixed(q, q, q))(q))
    with pytest.raises(ValueError, match=r"a bias is given to attention_fn and to"):
        fixed(q, q, q, bias=bias)


def test_dtype_is_of_the_computation():
    q = jax.random.normal(jax.random.key(3), (T, 4, 2))
    attend = jax.jit(lambda q, k: attention_fn(radius_mask())(q, k, k, dtype=q.dtype))
    low = attend(q.astype(jnp.bfloat16), q)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), attend(q, q), rtol=0, atol=0.05)


def test_dropout_is_refused_unless_it_is_off():
    layer = flax_layer(attention_fn=attention_fn(radius_mask()), dropout_rate=0.25)
    x = inputs()
    with pytest.raises(ValueError, match=r"dropout_rate=0.25; expected 0, as the"):
        layer(x, deterministic=False, rngs=nnx.Rngs(0))
    want = flax_layer(attention_fn=attention_fn(radius_mask()))
    out = nnx.jit(lambda layer, x: layer(x, deterministic=True))(layer, x)
    np.testing.assert_array_equal(out, apply(want, x))


@pytest.mark.parametrize(
    "call, message",
    [
        ({"sow_weights": True}, "sow_weights=True; expected False"),
        (
            {"is_causal": True},
            "is_causal=True; expected False. Put it in the BlockMask: mask & patterns."
            "window(",
        ),
        (
            {"mask": np.ones((T, T), bool)},
            "the call's mask is a ndarray; expected a BlockMask, or none where "
            "attention_fn has one. Put a dense mask in the BlockMask: mask & patterns."
            "from_dense(dense).",
        ),
        (
            {"mask": radius_mask()},
            "a BlockMask is given to attention_fn and to the call; expected one",
        ),
    ],
)
def test_refuses_what_it_cannot_do(call, message):
    layer = flax_layer(attention_fn=attention_fn(radius_mask()))
    with pytest.raises(ValueError, match="attention_fn: " + re.escape(message)):
        layer(inputs(), **call)


def test_refuses_to_guess_a_mask():
    with pytest.raises(ValueError, match="no BlockMask; expected one, in attention_fn"):
        flax_layer(attention_fn=attention_fn())(inputs())
    with pytest.raises(TypeError, match="mask is a ndarray; expected a BlockMask"):
        attention_fn(np.ones((T, T), bool))  # pyright: ignore[reportArgumentType]
