"""The Flax layer: parameters, what it computes, compilations, gradients, refusals."""

from __future__ import annotations

import functools
import pickle
import re
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse import (
    BlockBias,
    BlockMask,
    CapacityError,
    DistanceBias,
    block_sparse_attention,
    patterns,
)
from jsparse.nn import BlockSparseAttention
from tests.patterns.oracle import untyped

T, FEATURES, CUTOFF = 90, 12, 6.0
radius = functools.partial(patterns.radius, block_q=16, block_kv=16)


def make(num_heads=4, in_features=FEATURES, seed=0, **options: Any):
    return BlockSparseAttention(num_heads, in_features, **options, rngs=nnx.Rngs(seed))


def chain(seed: int, length: int = T) -> np.ndarray:
    """Coordinates of a random walk, so that neighbours in space are mostly near."""
    steps = np.random.default_rng(seed).normal(size=(length, 3))
    return np.cumsum(steps, axis=0, dtype=np.float32)


def normal(seed: int, *shape: int, dtype: Any = jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@nnx.jit
def apply(layer, *inputs, mask, bias=None):
    """The layer, one compilation for all tests with the same shapes and options."""
    return layer(*inputs, mask=mask, bias=bias)


def reference_of(layer: BlockSparseAttention) -> BlockSparseAttention:
    """The same parameters, computed by the reference implementation."""
    copy = nnx.clone(layer)
    copy.implementation = "reference"
    return copy


def assert_close(got: Any, want: Any, tolerance: float = 2e-5):
    assert jax.tree_util.tree_structure(got) == jax.tree_util.tree_structure(want)
    pairs = zip(*map(jax.tree_util.tree_leaves, (got, want)), strict=True)
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1 + abs(b).max()))


# ------------------------------------------------------------- parameters and values


def ones(key, shape, dtype):
    return jnp.ones(shape, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "normalize_qk": True},
        {"num_kv_heads": 1, "qkv_features": 32, "out_features": 5, "use_bias": False},
        {"in_kv_features": 7, "kernel_init": nnx.initializers.normal(0.5)},
        {"bias_init": nnx.initializers.normal(), "out_kernel_init": ones},
        {"bias_init": ones, "out_bias_init": nnx.initializers.normal()},
    ],
    ids="+".join,
)
def test_is_flax_attention_with_another_core(options: dict[str, Any]):
    """Same names, shapes and initial values as Flax's layer, and the same result."""
    layer = make(**options)
    flax_layer = nnx.MultiHeadAttention(
        4, FEATURES, **options, decode=False, rngs=nnx.Rngs(0)
    )
    assert_close(nnx.state(layer), nnx.state(flax_layer), 0)

    mask = radius(chain(0), CUTOFF)
    dense = jnp.asarray(mask.to_dense()[0])
    assert 0.05 < dense.mean() < 0.9
    x = normal(1, 2, T, FEATURES)
    kv = normal(2, 2, T, options.get("in_kv_features", FEATURES))
    want = nnx.jit(lambda layer: layer(x, kv, mask=dense))(flax_layer)
    assert_close(apply(layer, x, kv, mask=mask), want)


def test_keys_and_values_of_another_length():
    layer = make(in_kv_features=5, num_kv_heads=2)
    x, k, v = normal(0, 3, T, FEATURES), normal(1, 3, 40, 5), normal(2, 3, 40, 5)
    mask = radius(chain(0), 9.0, kv_coords=chain(0)[::2][:40])
    out = apply(layer, x, k, v, mask=mask)
    assert out.shape == (3, T, FEATURES)
    assert_close(out, apply(reference_of(layer), x, k, v, mask=mask))
    assert abs(out - apply(layer, x, k, mask=mask)).max() > 1e-2


def test_inputs_stand_in_for_each_other():
    layer, mask = make(), radius(chain(0), CUTOFF)
    x, y = normal(0, T, FEATURES), normal(1, T, FEATURES)
    one, both = apply(layer, x, mask=mask), apply(layer, x, y, mask=mask)
    assert_close(one, apply(layer, x, x, x, mask=mask), 1e-6)
    assert_close(both, apply(layer, x, y, y, mask=mask), 1e-6)
    assert abs(one - both).max() > 1e-2


def test_gate_multiplies_the_heads():
    layer, plain = make(use_gate=True), make()
    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    start = np.float32(1 / (1 + np.exp(-1.0)))  # sigmoid of the bias, 1, for any input
    assert_close(apply(layer, x, mask=mask), apply(plain, x, mask=mask) * start)

    # A gate that is shut on all heads but one leaves that head.
    assert layer.gate is not None and layer.gate.bias is not None
    layer.gate.bias[...] = jnp.full((4, 3), -100.0).at[2].set(100.0)
    kernel = plain.out.kernel[...]
    plain.out.kernel[...] = jnp.zeros_like(kernel).at[2].set(kernel[2])
    assert_close(apply(layer, x, mask=mask), apply(plain, x, mask=mask))

    # It is computed from the inputs of the queries: head 0 opens where x[0] > 0.
    layer.gate.kernel[...] = jnp.zeros((FEATURES, 4, 3)).at[0, 0].set(1e6)
    layer.gate.bias[...] = jnp.full((4, 3), -1e6).at[0].set(0)
    plain.out.kernel[...] = jnp.zeros_like(kernel).at[0].set(kernel[0])
    y = normal(2, T, FEATURES)
    want = jnp.where(x[:, :1] > 0, apply(plain, x, y, mask=mask), 0)
    assert_close(apply(layer, x, y, mask=mask), want)


def test_a_query_that_sees_nothing_gives_the_bias_of_out():
    layer = make(use_gate=True, out_bias_init=nnx.initializers.normal())
    dense = np.eye(T, dtype=bool)
    dense[5] = False
    mask = patterns.from_dense(dense, block_q=16, block_kv=16)
    out = apply(layer, normal(0, T, FEATURES), mask=mask)
    assert layer.out.bias is not None
    assert (out[5] == layer.out.bias[...]).all()
    assert (out[4] != layer.out.bias[...]).any()


# ---------------------------------------------------------------------------- dtypes


def dtypes_of(layer: BlockSparseAttention) -> set[str]:
    return {str(p.dtype) for p in jax.tree_util.tree_leaves(nnx.state(layer))}


def test_dtype_is_of_the_computation_and_param_dtype_of_the_parameters():
    options: dict[str, Any] = {"use_gate": True, "num_kv_heads": 2}
    layer = make(**options, normalize_qk=True, dtype=jnp.bfloat16)
    exact = make(**options, normalize_qk=True)
    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    bias = DistanceBias.linear(jnp.full(4, 0.5), chain(0))
    assert dtypes_of(layer) == {"float32"}
    with jax.numpy_dtype_promotion("standard"):  # for Flax's LayerNorm
        out = apply(layer, x, mask=mask, bias=bias)
        want = apply(exact, x, mask=mask, bias=bias)
    assert out.dtype == jnp.bfloat16
    assert_close(out, want, 2e-2)

    low = make(**options, param_dtype=jnp.bfloat16)
    assert dtypes_of(low) == {"bfloat16"}
    out = apply(low, x.astype(jnp.bfloat16), mask=mask)
    assert out.dtype == jnp.bfloat16


def test_mixed_inputs_promote_as_in_flax():
    layer, mask = make(param_dtype=jnp.bfloat16, use_gate=True), radius(chain(0), 6.0)
    x = normal(1, T, FEATURES, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        out = apply(layer, x, x.astype(jnp.float32), mask=mask)
        want = apply(layer, x.astype(jnp.float32), mask=mask)
    assert out.dtype == want.dtype == jnp.float32
    assert_close(out, want, 2e-2)  # query and gate are bfloat16 in one of them


def test_bias_keeps_its_precision_in_bfloat16():
    """Of the biases 4096 and 4110, equal in bfloat16, the larger takes all weight."""
    layer = make(num_heads=1, dtype=jnp.bfloat16)
    bias = jnp.full((1, T), 4096.0).at[0, 7].set(4110.0)
    only = np.zeros((2, T, T), bool)
    only[0], only[1, :, 7] = True, True
    every, seventh = (patterns.from_dense(x, block_q=16, block_kv=16) for x in only)
    x = normal(0, T, FEATURES)
    out = apply(layer, x, mask=every, bias=bias)
    assert_close(out, apply(layer, x, mask=seventh), 5e-2)


# ---------------------------------------------------------------------- compilations


class Counter:
    """A jitted function that counts how often it is traced."""

    def __init__(self, function):
        self.traces = 0

        def counted(*args):
            self.traces += 1
            return function(*args)

        self.call = nnx.jit(counted)


def padded(x, length: int):
    return jnp.pad(x, ((0, length - len(x)), (0, 0)))


def test_a_mask_closed_over_is_static():
    layer, mask = make(), radius(chain(0), CUTOFF)
    static = Counter(lambda layer, x: layer(x, mask=mask))
    for seed in (0, 1):
        layer.query.kernel[...] = normal(seed, FEATURES, 4, 3)  # new weights, too
        x = normal(seed, T, FEATURES)
        want = apply(reference_of(layer), x, mask=mask)
        assert_close(static.call(layer, x), want)
    assert static.traces == 1


def test_a_mask_passed_in_compiles_once_for_each_bucket():
    layer = make(use_gate=True, num_kv_heads=2)
    traced = Counter(lambda layer, x, mask: layer(x, mask=mask))
    seen = set()
    for seed, length in enumerate([90, 128, 77, 40, 64, 101]):
        bucket = -(-length // 64) * 64
        mask, x = radius(chain(seed, length), CUTOFF), normal(seed, length, FEATURES)
        in_bucket = mask.pad_to(bucket, capacity=8)
        out = traced.call(layer, padded(x, bucket), in_bucket)
        seen.add(bucket)
        assert traced.traces == len(seen)
        if length in (77, 128, 40):
            assert_close(out[:length], apply(reference_of(layer), x, mask=mask))
    assert seen == {64, 128}


def test_a_bias_passed_in_shares_the_compilation_of_the_bucket():
    layer, slope = make(), jnp.array([0.1, 0.2, 0.4, 0.8])
    traced = Counter(lambda layer, x, mask, bias: layer(x, mask=mask, bias=bias))
    for seed, length in enumerate([90, 70]):
        coords, x = chain(seed, length), normal(seed, length, FEATURES)
        mask = radius(coords, CUTOFF)
        bias = DistanceBias.linear(slope, padded(coords, 128))
        in_bucket = mask.pad_to(128, capacity=8)
        out = traced.call(layer, padded(x, 128), in_bucket, bias)
        bias = DistanceBias.linear(slope, coords)
        want = apply(reference_of(layer), x, mask=mask, bias=bias)
        assert_close(out[:length], want)
    assert traced.traces == 1


def test_a_mask_built_under_jit_compiles_once_for_each_bucket():
    layer = make()

    def build_and_attend(layer, x, coords, length):
        mask = patterns.device.radius(
            coords, CUTOFF, block_q=16, block_kv=16, capacity=8, q_length=length
        )
        return layer(x, mask=mask), mask

    built = Counter(build_and_attend)
    for seed, length in enumerate([90, 128, 77]):
        coords, x = chain(seed, length), normal(seed, length, FEATURES)
        out, mask = built.call(
            layer, padded(x, 128), padded(coords, 128), jnp.int32(length)
        )
        mask.check()
        want = apply(reference_of(layer), x, mask=radius(coords, CUTOFF))
        assert_close(out[:length], want)
    assert built.traces == 1


def test_a_mask_that_ran_out_of_capacity_is_not_silent():
    layer = make()

    @nnx.jit
    def build_and_attend(layer, x, coords):
        mask = patterns.device.radius(coords, 1e3, block_q=16, block_kv=16, capacity=2)
        return layer(x, mask=mask), mask

    out, mask = build_and_attend(layer, normal(0, T, FEATURES), chain(0))
    assert np.isnan(out).all()
    with pytest.raises(CapacityError, match="needs 6"):
        mask.check()


def test_a_module_may_hold_a_mask():
    class Model(nnx.Module):
        def __init__(self, mask: BlockMask):
            self.attend = make()
            self.mask = nnx.data(mask)

        def __call__(self, x):
            return self.attend(x, mask=self.mask)

    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    model = Model(mask)
    loss = nnx.jit(nnx.value_and_grad(lambda model, x: weighted(model(x))))
    out, grads = loss(model, x)
    assert_close(out, weighted(apply(model.attend, x, mask=mask)), 1e-4)
    assert set(grads) == {"attend"}


# ------------------------------------------------------------------- transformations


def weighted(out):
    """A scalar whose cotangent is random."""
    return (out * normal(9, *out.shape)).sum()


@nnx.jit
def gradients(layer, x, mask):
    """Of a random cotangent, with respect to parameters and inputs."""

    def loss(layer, x):
        return weighted(layer(x, mask=mask)[..., :T, :])

    return nnx.grad(loss, argnums=(0, 1))(layer, x)


def test_gradients_are_those_of_the_reference():
    layer = make(use_gate=True, num_kv_heads=2, normalize_qk=True)
    mask, x = radius(chain(0), CUTOFF), normal(1, 2, T, FEATURES)
    got, want = gradients(layer, x, mask), gradients(reference_of(layer), x, mask)
    assert_close(got, want, 1e-4)
    assert set(got[0]) == {
        "query", "key", "value", "gate", "out", "query_ln", "key_ln"
    }  # fmt: skip
    sizes = [float(abs(g).max()) for g in jax.tree_util.tree_leaves(got)]
    assert min(sizes) > 1e-2


def test_gradients_are_the_same_bits_every_time_and_in_a_bucket():
    layer, mask, x = make(), radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    first = gradients(layer, x, mask)
    assert_close(gradients(layer, x, mask), first, 0)
    in_bucket = mask.pad_to(128, capacity=9)
    grads, dx = gradients(layer, padded(x, 128), in_bucket)
    assert_close((grads, dx[:T]), first)
    assert (dx[T:] == 0).all()


class WithBias(nnx.Module):
    """A layer with a learned bias of each kind."""

    def __init__(self, kind: str, mask: BlockMask):
        self.attend, self.kind = make(), kind
        n = mask.num_blocks
        shape = {"dense": (4, T, T), "block": (1, 4, n, 16, 16), "distance": (4, 8)}
        self.values = nnx.Param(normal(5, *shape[kind]))

    def __call__(self, x, *, mask):
        bias = values = self.values[...]
        if self.kind == "block":
            bias = BlockBias(values)
        elif self.kind == "distance":
            bias = DistanceBias.table(values, 8.0, jnp.asarray(chain(0)))
        return self.attend(x, mask=mask, bias=bias)


@pytest.mark.parametrize("kind", ["dense", "block", "distance"])
def test_gradients_reach_a_learned_bias(kind):
    mask, x = radius(chain(0), CUTOFF), normal(1, 2, T, FEATURES)
    model = WithBias(kind, mask)
    got = gradients(model, x, mask)
    model.attend.implementation = "reference"
    assert_close(got, gradients(model, x, mask), 1e-4)
    assert abs(got[0]["values"][...]).max() > 1e-2


def test_vmap_over_inputs_masks_and_layers():
    layers = [make(use_gate=True, seed=n) for n in range(3)]
    masks = [radius(chain(n), CUTOFF).pad_to(T, capacity=6) for n in range(3)]
    x = normal(1, 3, T, FEATURES)
    same_mask = jax.jit(jax.vmap(lambda x: layers[0](x, mask=masks[0])))(x)
    assert_close(same_mask, apply(layers[0], x, mask=masks[0]))

    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    states = jax.tree_util.tree_map(stack, *map(nnx.state, layers))
    ensemble = nnx.merge(nnx.graphdef(layers[0]), states)
    stacked = jax.tree_util.tree_map(stack, *masks)
    each = nnx.jit(nnx.vmap(lambda layer, x, mask: layer(x, mask=mask)))
    want = [apply(f, a, mask=m) for f, a, m in zip(layers, x, masks, strict=True)]
    assert_close(each(ensemble, x, stacked), jnp.stack(want))


def test_rematerialisation_changes_nothing():
    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES)

    class Remat(nnx.Module):
        def __init__(self):
            self.attend = make()

        def __call__(self, x, *, mask):
            return nnx.remat(lambda f, x, mask: f(x, mask=mask))(self.attend, x, mask)

    grads, dx = gradients(Remat(), x, mask)
    assert_close((grads["attend"], dx), gradients(make(), x, mask))


# ---------------------------------------------------------------- state and the bridge


def test_state_splits_merges_and_pickles():
    options: dict[str, Any] = {"use_gate": True, "normalize_qk": True}
    layer, other = make(**options), make(**options, seed=1)
    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    assert not rest
    out = apply(layer, x, mask=mask)
    assert_close(apply(nnx.merge(graphdef, params), x, mask=mask), out, 0)

    stored = pickle.dumps(jax.device_get(nnx.to_pure_dict(params)))
    assert abs(apply(other, x, mask=mask) - out).max() > 1e-2
    nnx.update(other, pickle.loads(stored))
    assert_close(apply(other, x, mask=mask), out, 0)


def test_shapes_are_known_without_any_memory():
    layer = nnx.eval_shape(lambda: make(qkv_features=8, num_kv_heads=2))
    shapes = jax.tree_util.tree_leaves(nnx.state(layer))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in shapes)
    assert layer.key.kernel.shape == (FEATURES, 2, 2)


def test_works_in_a_linen_model():
    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    model = nnx.bridge.to_linen(BlockSparseAttention, 4, FEATURES)
    variables = jax.jit(lambda key: model.init(key, x, mask=mask))(jax.random.key(0))
    assert set(variables["params"]) == {"query", "key", "value", "out"}
    out = jax.jit(lambda v, x: model.apply(v, x, mask=mask))(variables, x)
    assert isinstance(model, flax.linen.Module)
    layer = make()
    nnx.update(layer, variables["params"])
    assert_close(out, apply(layer, x, mask=mask))


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"num_heads": 5},
            "qkv_features=12 does not divide into num_heads=5 heads; expected a "
            "multiple. Pass qkv_features=15, or other heads.",
        ),
        (
            {"num_heads": 4, "num_kv_heads": 3},
            "num_kv_heads=3 does not divide num_heads=4; expected one of [1, 2, 4]",
        ),
        ({"num_kv_heads": 8}, "num_kv_heads=8 does not divide num_heads=4"),
        ({"num_heads": 0}, "num_heads=0; expected an integer of at least 1"),
        ({"out_features": -1}, "out_features=-1; expected an integer of at least 1"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match="BlockSparseAttention: ") as caught:
        make(**options)
    assert message in str(caught.value)


def test_refuses_sizes_that_are_not_integers():
    with pytest.raises(TypeError, match="qkv_features=6.0; expected an integer"):
        make(qkv_features=6.0)


@pytest.mark.parametrize(
    "shapes, message",
    [
        (
            [(T, 11)],
            f"inputs_q has shape ({T}, 11); expected [*B, T, {FEATURES}]. The layer "
            f"was made with in_features={FEATURES}.",
        ),
        ([(FEATURES,)], f"inputs_q has shape ({FEATURES},); expected [*B, T,"),
        (
            [(T, FEATURES)],
            f"inputs_k has shape ({T}, {FEATURES}); expected [*B, S, 5]. The layer was "
            "made with in_kv_features=5.",
        ),
        (
            [(T, FEATURES), (T, 5), (T, 6)],
            f"inputs_v has shape ({T}, 6); expected [*B, S, 5]",
        ),
        ([(T, FEATURES), None, (T, 5)], "inputs_v is given without inputs_k"),
        ([(T + 1, FEATURES), (T, 5)], f"q has {T + 1} tokens but the mask was built"),
        ([(2, T, FEATURES), (T, 5)], "batch axes (2,), (), ()"),
    ],
)
def test_refuses_inputs_that_do_not_fit(shapes, message):
    layer = make(in_kv_features=5)
    inputs = [None if shape is None else jnp.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match="ttention: ") as caught:
        layer(*inputs, mask=radius(chain(0), CUTOFF))
    assert message in str(caught.value)


@pytest.mark.parametrize("mask", [None, np.ones((T, T), bool)])
def test_refuses_what_is_not_a_block_mask(mask):
    with pytest.raises(TypeError, match="expected a BlockMask. Build one with"):
        make()(normal(0, T, FEATURES), mask=mask)


def test_the_mask_is_required():
    with pytest.raises(TypeError, match="mask"):
        make()(normal(0, T, FEATURES))  # pyright: ignore[reportCallIssue]


def test_refuses_unknown_implementations():
    """On construction, in the words of the operation."""
    q, mask = normal(0, T, 1, 8), radius(chain(0), CUTOFF)
    with pytest.raises(ValueError, match="implementation='fast'; expected") as of_op:
        block_sparse_attention(q, q, q, mask, implementation=untyped("fast"))
    with pytest.raises(ValueError, match="^" + re.escape(str(of_op.value)) + "$"):
        make(implementation="fast")
