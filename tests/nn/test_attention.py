"""The Flax layer: parameters, what it computes, compilations, gradients, refusals."""

from __future__ import annotations

import functools
import pickle

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jsparse import BlockBias, BlockMask, CapacityError, DistanceBias, patterns
from jsparse.nn import BlockSparseAttention

T, FEATURES, CUTOFF = 90, 12, 6.0
radius = functools.partial(patterns.radius, block_q=16, block_kv=16)


def make(num_heads=4, in_features=FEATURES, *args, seed=0, **kwargs):
    return BlockSparseAttention(
        num_heads, in_features, *args, **kwargs, rngs=nnx.Rngs(seed)
    )


def chain(seed: int, length: int = T) -> np.ndarray:
    """Coordinates of a random walk, so that neighbours in space are mostly near."""
    steps = np.random.default_rng(seed).normal(size=(length, 3))
    return np.cumsum(steps, axis=0, dtype=np.float32)


def normal(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_close(got, want, tolerance=2e-5):
    got, want = (
        jax.tree_util.tree_leaves(
            nnx.to_pure_dict(x) if isinstance(x, nnx.State) else x
        )
        for x in (got, want)
    )
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1 + abs(b).max()))


def reference_of(layer: BlockSparseAttention) -> BlockSparseAttention:
    """The same parameters, computed by the reference implementation."""
    copy = nnx.clone(layer)
    copy.implementation = "reference"
    return copy


# ------------------------------------------------------------- parameters and values


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "qkv_features": 32, "out_features": 5},
        {"normalize_qk": True},
        {"use_bias": False},
        {"kernel_init": nnx.initializers.normal(0.5), "out_kernel_init": jnp.ones},
        {"bias_init": nnx.initializers.normal(), "out_bias_init": jnp.ones},
        {"in_kv_features": 7},
    ],
    ids=lambda options: "+".join(options) or "defaults",
)
def test_is_flax_attention_with_another_core(options):
    """Same names, shapes and initial values as Flax's layer, and the same result."""
    options = {
        name: (lambda key, shape, dtype: jnp.ones(shape, dtype))
        if value is jnp.ones
        else value
        for name, value in options.items()
    }
    layer = make(**options)
    flax_layer = nnx.MultiHeadAttention(
        4, FEATURES, **options, decode=False, rngs=nnx.Rngs(0)
    )
    ours, theirs = nnx.state(layer), nnx.state(flax_layer)
    assert jax.tree_util.tree_structure(ours) == jax.tree_util.tree_structure(theirs)
    assert jax.tree_util.tree_all(
        jax.tree_util.tree_map(lambda a, b: bool((a == b).all()), ours, theirs)
    )

    mask = radius(chain(0), CUTOFF)
    dense = mask.to_dense()[0]
    assert 0.05 < dense.mean() < 0.9
    x = normal(1, 2, T, FEATURES)
    kv = normal(2, 2, T, options.get("in_kv_features", FEATURES))
    assert_close(layer(x, kv, mask=mask), flax_layer(x, kv, mask=jnp.asarray(dense)))


def test_keys_and_values_of_another_length():
    layer = make(in_kv_features=5, num_kv_heads=2)
    x, k, v = normal(0, 3, T, FEATURES), normal(1, 3, 40, 5), normal(2, 3, 40, 5)
    mask = radius(chain(0), 9.0, kv_coords=chain(0)[::2][:40])
    out = layer(x, k, v, mask=mask)
    assert out.shape == (3, T, FEATURES)
    assert_close(out, reference_of(layer)(x, k, v, mask=mask))
    assert abs(out - layer(x, k, mask=mask)).max() > 1e-2


def test_inputs_stand_in_for_each_other():
    layer, mask = make(), radius(chain(0), CUTOFF)
    x, y = normal(0, T, FEATURES), normal(1, T, FEATURES)
    assert (layer(x, mask=mask) == layer(x, x, x, mask=mask)).all()
    assert (layer(x, y, mask=mask) == layer(x, y, y, mask=mask)).all()
    assert (layer(x, y, mask=mask) != layer(x, mask=mask)).any()


def test_gate_multiplies_the_heads():
    layer, plain = make(use_gate=True), make()
    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    start = 1 / (1 + np.exp(-1.0))  # sigmoid of the bias, 1, whatever the input
    assert_close(layer(x, mask=mask), plain(x, mask=mask) * np.float32(start))

    # A gate per head that is shut on all heads but one leaves that head.
    assert layer.gate is not None and layer.gate.bias is not None
    layer.gate.bias[...] = jnp.full((4, 3), -100.0).at[2].set(100.0)
    plain.out.kernel[...] = plain.out.kernel[...] * (jnp.arange(4) == 2)[:, None, None]
    assert_close(layer(x, mask=mask), plain(x, mask=mask))

    # It is computed from the queries' inputs.
    layer.gate.kernel[...] = normal(2, FEATURES, 4, 3)
    layer.gate.bias[...] = jnp.zeros((4, 3))
    heads = []
    plain.out = lambda x: heads.append(x) or x
    plain(x, mask=mask)
    logits = jnp.einsum("tf,fhd->thd", x, layer.gate.kernel[...])
    assert_close(
        layer(x, mask=mask), layer.out(heads[0] / (1 + jnp.exp(-logits))), 1e-4
    )


def test_a_query_that_sees_nothing_gives_the_bias_of_out():
    layer = make(use_gate=True, out_bias_init=nnx.initializers.normal())
    dense = np.eye(T, dtype=bool)
    dense[5] = False
    mask = patterns.from_dense(dense, block_q=16, block_kv=16)
    out = layer(normal(0, T, FEATURES), mask=mask)
    assert layer.out.bias is not None
    assert (out[5] == layer.out.bias[...]).all()
    assert (out[4] != layer.out.bias[...]).any()


@pytest.mark.parametrize("kind", ["dense", "block", "distance"])
def test_every_bias_reaches_the_logits(kind):
    layer, mask, coords = make(), radius(chain(0), CUTOFF), chain(0)
    slope = jnp.array([0.1, 0.4, 1.0, 3.0])
    distance = DistanceBias.linear(slope, coords)
    dense = distance.dense()
    bias = {
        "dense": dense,
        "block": BlockBias.from_dense(mask, dense),
        "distance": distance,
    }[kind]
    x = normal(1, 2, T, FEATURES)
    out = layer(x, mask=mask, bias=bias)
    assert_close(out, reference_of(layer)(x, mask=mask, bias=dense))
    assert abs(out - layer(x, mask=mask)).max() > 1e-2


# ---------------------------------------------------------------------------- dtypes


def test_dtype_is_of_the_computation_and_param_dtype_of_the_parameters():
    options = {"use_gate": True, "normalize_qk": True, "num_kv_heads": 2}
    layer, exact = make(**options, dtype=jnp.bfloat16), make(**options)
    mask, coords = radius(chain(0), CUTOFF), chain(0)
    bias = DistanceBias.linear(jnp.full(4, 0.5), coords)
    x = normal(1, T, FEATURES)
    assert {p.dtype for p in jax.tree_util.tree_leaves(nnx.state(layer))} == {
        jnp.dtype("float32")
    }
    out = layer(x, mask=mask, bias=bias)
    assert out.dtype == jnp.bfloat16
    assert_close(out, exact(x, mask=mask, bias=bias), 2e-2)
    assert (layer(x, mask=mask, bias=bias) == out).all()

    low = make(**options, param_dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree_util.tree_leaves(nnx.state(low))} == {
        jnp.dtype("bfloat16")
    }
    assert low(x.astype(jnp.bfloat16), mask=mask).dtype == jnp.bfloat16


def test_mixed_inputs_promote_as_in_flax():
    layer = make()
    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        out = layer(x, mask=mask)
    assert out.dtype == jnp.float32
    assert_close(out, layer(x.astype(jnp.float32), mask=mask))


def test_bias_keeps_its_precision_in_bfloat16():
    """A bias of 256 + n/8 would lose the n/8, and so the choice of key, in bfloat16."""
    layer = make(num_heads=1, dtype=jnp.bfloat16)
    mask = patterns.from_dense(np.ones((T, T), bool), block_q=16, block_kv=16)
    bias = 4096.0 + 8.0 * (jnp.arange(T, dtype=jnp.float32) == 7)
    x = normal(0, T, FEATURES)
    only = np.zeros((T, T), bool)
    only[:, 7] = True
    want = layer(x, mask=patterns.from_dense(only, block_q=16, block_kv=16))
    assert_close(layer(x, mask=mask, bias=bias[None]), want, 5e-2)


# ---------------------------------------------------------------------- compilations


class Counter:
    """A jitted function of ``(layer, x, *args)`` that counts how often it is traced."""

    def __init__(self, function):
        self.traces = 0

        def counted(*args):
            self.traces += 1
            return function(*args)

        self.call = nnx.jit(counted)


def bucket(length: int) -> int:
    return -(-length // 64) * 64


def padded(x, length: int):
    return jnp.pad(x, ((0, length - len(x)), (0, 0)))


def test_a_mask_closed_over_is_static():
    layer, mask = make(), radius(chain(0), CUTOFF)
    closed = Counter(lambda layer, x: layer(x, mask=mask))
    for seed in (0, 1, 2):
        x = normal(seed, T, FEATURES)
        assert_close(closed.call(layer, x), reference_of(layer)(x, mask=mask))
    layer.query.kernel[...] = layer.query.kernel[...] * 2  # new weights, old program
    closed.call(layer, x)
    assert closed.traces == 1


def test_a_mask_passed_in_compiles_once_for_each_bucket():
    layer = make(use_gate=True, num_kv_heads=2)
    passed = Counter(lambda layer, x, mask: layer(x, mask=mask))
    lengths, buckets = [90, 128, 77, 40, 64], []
    for seed, length in enumerate(lengths):
        coords, size = chain(seed, length), bucket(length)
        mask = radius(coords, CUTOFF)
        in_bucket = mask.pad_to(size, capacity=size // 16)
        x = normal(seed, length, FEATURES)
        out = passed.call(layer, padded(x, size), in_bucket)
        assert_close(out[:length], reference_of(layer)(x, mask=mask))
        buckets.append(size)
        assert passed.traces == len(set(buckets))
    assert set(buckets) == {64, 128}


def test_a_bias_passed_in_shares_the_compilation_of_the_bucket():
    layer, slope = make(), jnp.array([0.1, 0.2, 0.4, 0.8])
    passed = Counter(lambda layer, x, mask, bias: layer(x, mask=mask, bias=bias))
    for seed, length in enumerate([90, 70, 128]):
        coords = chain(seed, length)
        mask = radius(coords, CUTOFF)
        x = normal(seed, length, FEATURES)
        out = passed.call(
            layer,
            padded(x, 128),
            mask.pad_to(128, capacity=8),
            DistanceBias.linear(slope, padded(coords, 128)),
        )
        bias = DistanceBias.linear(slope, coords)
        want = reference_of(layer)(x, mask=mask, bias=bias)
        assert_close(out[:length], want)
    assert passed.traces == 1


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
        want = reference_of(layer)(x, mask=radius(coords, CUTOFF))
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
    want = reference_of(model.attend)(x, mask=mask)
    assert_close(nnx.jit(lambda model, x: model(x))(model, x), want)
    grads = nnx.grad(lambda model: model(x)[3, 4])(model)
    assert set(grads) == {"attend"}


# ------------------------------------------------------------------- transformations


def weighted(out, seed: int = 9):
    """A scalar whose cotangent is random."""
    return (out * normal(seed, *out.shape)).sum()


def test_gradients_of_the_parameters_are_those_of_the_reference():
    layer = make(use_gate=True, num_kv_heads=2, normalize_qk=True)
    mask, x = radius(chain(0), CUTOFF), normal(1, 2, T, FEATURES)

    @nnx.jit
    def loss(layer, x):
        return weighted(layer(x, mask=mask))

    value, (grads, dx) = nnx.value_and_grad(loss, argnums=(0, 1))(layer, x)
    want_value, (want, want_dx) = nnx.value_and_grad(loss, argnums=(0, 1))(
        reference_of(layer), x
    )
    assert_close(value, want_value)
    assert_close(grads, want, 1e-4)
    assert_close(dx, want_dx, 1e-4)
    assert set(grads) == {"query", "key", "value", "gate", "out", "query_ln", "key_ln"}
    # Softmax ignores what all keys share: a bias on every key has no gradient, but for
    # normalised keys it has. Nothing else may be 0.
    zero = [g for g in jax.tree_util.tree_leaves(grads) if not abs(g).max() > 1e-4]
    assert zero == []


class WithBias(nnx.Module):
    """A layer with a learned bias of each kind."""

    def __init__(self, kind: str, mask: BlockMask, coords: np.ndarray):
        self.attend, self.kind = make(), kind
        self.mask, self.coords = nnx.data(mask), coords
        n = mask.num_blocks
        shape = {"dense": (4, T, T), "block": (1, 4, n, 16, 16), "distance": (4, 8)}
        self.values = nnx.Param(normal(5, *shape[kind]))

    def __call__(self, x):
        values = self.values[...]
        bias = values
        if self.kind == "block":
            bias = BlockBias(values)
        elif self.kind == "distance":
            bias = DistanceBias.table(values, 8.0, self.coords)
        return self.attend(x, mask=self.mask, bias=bias)


@pytest.mark.parametrize("kind", ["dense", "block", "distance"])
def test_gradients_reach_a_learned_bias(kind):
    coords = chain(0)
    model = WithBias(kind, radius(coords, CUTOFF), coords)
    x = normal(1, 2, T, FEATURES)
    loss = nnx.jit(lambda model: weighted(model(x)))
    value, grads = nnx.value_and_grad(loss)(model)
    model.attend.implementation = "reference"
    want_value, want = nnx.value_and_grad(loss)(model)
    assert_close(value, want_value)
    assert_close(grads, want, 1e-4)
    assert abs(grads["values"][...]).max() > 1e-2


def test_gradients_of_padded_and_plain_masks_agree():
    """What pads a bucket adds nothing to any gradient."""
    layer, mask, x = make(), radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    grad = nnx.jit(nnx.grad(lambda layer, x, mask: weighted(layer(x, mask=mask)[:T])))
    got = grad(layer, padded(x, 128), mask.pad_to(128, capacity=9))
    assert_close(got, grad(layer, x, mask))


def test_vmap_over_inputs_masks_and_layers():
    layer, mask = make(use_gate=True), radius(chain(0), CUTOFF)
    x = normal(1, 3, T, FEATURES)
    want = layer(x, mask=mask)
    assert_close(jax.vmap(lambda x: layer(x, mask=mask))(x), want)

    masks = [radius(chain(n), CUTOFF).pad_to(T, capacity=6) for n in range(3)]
    stacked = jax.tree_util.tree_map(lambda *m: jnp.stack(m), *masks)
    each = nnx.vmap(lambda layer, x, m: layer(x, mask=m), in_axes=(None, 0, 0))
    want = jnp.stack([layer(x[n], mask=m) for n, m in enumerate(masks)])
    assert_close(each(layer, x, stacked), want)

    layers = [make(seed=n) for n in range(3)]
    graphdef = nnx.graphdef(layers[0])
    states = jax.tree_util.tree_map(lambda *s: jnp.stack(s), *map(nnx.state, layers))
    ensemble = nnx.merge(graphdef, states)
    out = nnx.vmap(lambda layer, x: layer(x, mask=mask))(ensemble, x)
    want = jnp.stack([f(x[n], mask=mask) for n, f in enumerate(layers)])
    assert_close(out, want)


def test_rematerialisation_changes_nothing():
    layer, mask, x = make(), radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    plain = lambda layer, x: layer(x, mask=mask)  # noqa: E731
    loss = lambda f: nnx.jit(nnx.grad(lambda layer: weighted(f(layer, x))))  # noqa: E731
    assert_close(loss(nnx.remat(plain))(layer), loss(plain)(layer))


# ---------------------------------------------------------------- state and the bridge


def test_state_splits_merges_and_pickles():
    layer = make(use_gate=True, normalize_qk=True, num_kv_heads=2)
    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    assert not rest
    out = layer(x, mask=mask)
    assert (nnx.merge(graphdef, params, rest)(x, mask=mask) == out).all()

    stored = pickle.dumps(jax.device_get(nnx.to_pure_dict(nnx.state(layer))))
    other = make(use_gate=True, normalize_qk=True, num_kv_heads=2, seed=1)
    assert (other(x, mask=mask) != out).any()
    nnx.update(other, pickle.loads(stored))
    assert (other(x, mask=mask) == out).all()


def test_shapes_are_known_without_any_memory():
    layer = nnx.eval_shape(lambda: make(qkv_features=8, num_kv_heads=2))
    assert isinstance(layer.query.kernel[...], jax.ShapeDtypeStruct)
    assert layer.key.kernel.shape == (FEATURES, 2, 2)


def test_works_in_a_linen_model():
    mask, x = radius(chain(0), CUTOFF), normal(1, T, FEATURES)

    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            attend = nnx.bridge.to_linen(BlockSparseAttention, 4, FEATURES)
            return attend(x, mask=mask)

    variables = Model().init(jax.random.key(0), x)
    (params,) = variables["params"].values()
    layer = make()
    nnx.update(layer, params)
    assert_close(Model().apply(variables, x), layer(x, mask=mask))


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
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
    with pytest.raises(ValueError, match="BlockSparseAttention") as caught:
        make(**options)
    assert message in str(caught.value)


def test_refuses_sizes_that_are_not_integers():
    with pytest.raises(TypeError, match="qkv_features=6.0; expected an integer"):
        make(qkv_features=6.0)


@pytest.mark.parametrize(
    ("shapes", "message"),
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
    with pytest.raises(ValueError, match="Attention|attention") as caught:
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
    layer = make(implementation="fast")
    with pytest.raises(ValueError, match="implementation='fast'; expected one of"):
        layer(normal(0, T, FEATURES), mask=radius(chain(0), CUTOFF))
