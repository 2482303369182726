"""The public op: what it refuses, with which words, and what it passes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import (
    BlockBias,
    BlockMask,
    CapacityError,
    DistanceBias,
    EntryBias,
    block_sparse_attention,
    patterns,
)
from jsparse.ops import _attention
from tests.support.cases import CASES, make_case

T, S = 40, 56


def arguments(**changes):
    """Valid arguments, with some replaced."""
    rng = np.random.default_rng(0)
    mask = BlockMask.from_blocks(
        [0, 1, 2], [0, 1, 1], q_len=T, kv_len=S, block_q=16, block_kv=32
    )
    shapes = {"q": (2, T, 4, 8), "k": (2, S, 2, 8), "v": (2, S, 2, 6)}
    values: dict[str, Any] = {
        n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()
    }
    values["mask"] = mask
    for name, value in changes.items():
        values[name] = value(values) if callable(value) else value
    return values


def call(changes, **options):
    values = arguments(**changes)
    return block_sparse_attention(
        values["q"],
        values["k"],
        values["v"],
        values["mask"],
        bias=values.get("bias"),
        implementation=values.get("implementation", "auto"),
        **options,
    )


LISTS = (
    np.zeros((1, T, 2), np.float32),
    np.arange(T)[None, :, None] + np.array([0, 9]),
)
"""Values and keys, two for each query."""


def listed(_):
    """A mask with two bits a row."""
    return patterns.device.neighbors(
        LISTS[1][0], kv_len=S, block_q=16, block_kv=32, capacity=2
    )


def entries(first, stop, heads=1):
    """A bias for some entries of the lists."""
    values, index = (x[..., first:stop] for x in LISTS)
    return EntryBias(np.repeat(values[:, None], heads, 1), index)


def cut(name, *index):
    return lambda values: values[name][index]


BAD = {
    "rank": ({"q": cut("q", 0, 0)}, ValueError, "q has shape .*at least three axes"),
    "integers": (
        {"k": lambda v: np.ones(v["k"].shape, np.int32)},
        TypeError,
        "k has dtype int32",
    ),
    "missing": ({"k": lambda _: None}, TypeError, "k is a NoneType; expected an array"),
    "text": ({"bias": "none"}, TypeError, "bias is a str; expected an array"),
    "empty": ({"q": cut("q", slice(None), slice(0))}, ValueError, "no axis of size 0"),
    "mixed": (
        {"v": lambda v: v["v"].astype(np.float16)},
        TypeError,
        "float32, float32, float16; expected one dtype",
    ),
    "batch": ({"k": cut("k", slice(1))}, ValueError, r"batch axes \(2,\), \(1,\)"),
    "tokens": ({"v": cut("v", slice(None), slice(9))}, ValueError, "v has 9 and 2"),
    "head size": (
        {"k": cut("k", ..., slice(4))},
        ValueError,
        "q has head size 8 but k has 4",
    ),
    "heads": (
        {"q": cut("q", slice(None), slice(None), slice(3))},
        ValueError,
        "q has 3 heads and k has 2; expected a multiple",
    ),
    "not a mask": ({"mask": np.ones((T, S), bool)}, TypeError, "mask is a ndarray"),
    "longer than the mask": (
        {"mask": patterns.window(39, left=1, right=1, kv_len=S)},
        ValueError,
        "q has 40 tokens but the mask was built for 39 .*pad_to",
    ),
    "shorter than the mask": (
        {"mask": patterns.window(T, left=1, right=1, kv_len=99)},
        ValueError,
        "k has 56 tokens but the mask was built for 99",
    ),
    "axes of the queries": (
        {"mask": patterns.window(30, left=1, right=1, kv_len=S)},
        ValueError,
        r"q has shape \(2, 40, 4, 8\), expected \[\*B, T, H, D\]. Rebuild it for 40",
    ),
    "axes of the keys": (
        {"mask": patterns.window(T, left=1, right=1, kv_len=99)},
        ValueError,
        r"k has shape \(2, 56, 2, 8\), expected \[\*B, S, K, D\]. Rebuild it for 56",
    ),
    "swapped axes": (
        {"mask": patterns.window(T, left=1, right=1)}
        | dict.fromkeys("qkv", np.zeros((2, 4, T, 8), np.float32)),
        ValueError,
        r"q has 4 tokens .* look swapped: pass jnp.swapaxes\(q, -3, -2\)",
    ),
    "head patterns": (
        {"mask": lambda v: BlockMask.stack([v["mask"]] * 3, "head")},
        ValueError,
        "3 head patterns but q has 4",
    ),
    "batch patterns": (
        {"mask": lambda v: BlockMask.stack([v["mask"]] * 3, "batch")},
        ValueError,
        r"3 batch patterns but q has batch axes \(2,\)",
    ),
    "bias shape": (
        {"bias": np.zeros((3, T, S), np.float32)},
        ValueError,
        r"bias has shape \(3, 40, 56\), which does not broadcast to \(2, 4, 40, 56\)",
    ),
    "bias without keys": (
        {"bias": np.zeros((T, 1), np.float32)},
        ValueError,
        "does not broadcast",
    ),
    "boolean bias": (
        {"bias": np.ones((T, S), bool)},
        TypeError,
        "belongs in the BlockMask",
    ),
    "boolean block bias": (
        {"bias": BlockBias(np.ones((1, 1, 3, 16, 32), bool))},
        TypeError,
        "BlockBias.values has dtype bool; expected a floating-point type. A boolean",
    ),
    "block bias of integers": (
        {"bias": BlockBias(np.ones((1, 1, 3, 16, 32), np.int32))},
        TypeError,
        "BlockBias.values has dtype int32; expected a floating-point type",
    ),
    "block bias of a list": (
        {"bias": BlockBias([1])},
        TypeError,
        "BlockBias.values has dtype int32; expected a floating-point type",
    ),
    "block bias of nothing": (
        {"bias": BlockBias(None)},
        TypeError,
        "BlockBias.values is a NoneType; expected an array",
    ),
    "bias of another block size": (
        {"bias": BlockBias(np.zeros((1, 1, 3, 16, 16), np.float32))},
        ValueError,
        "the mask's block sizes",
    ),
    "bias of another mask": (
        {"bias": BlockBias(np.zeros((1, 1, 2, 16, 32), np.float32))},
        ValueError,
        "holds 2 blocks but the mask has 3; it was made for another mask",
    ),
    "bias of a larger mask": (
        {"bias": BlockBias(np.zeros((1, 1, 9, 16, 32), np.float32))},
        ValueError,
        "holds 9 blocks but the mask has 3; it was made for another mask",
    ),
    "block bias heads": (
        {"bias": BlockBias(np.zeros((1, 3, 3, 16, 32), np.float32))},
        ValueError,
        "expected 2 or 1 batch entries and 1 or 4 heads",
    ),
    "block bias with head patterns": (
        {
            "mask": lambda v: BlockMask.stack([v["mask"]] * 4, "head"),
            "bias": BlockBias(np.zeros((1, 4, 12, 16, 32), np.float32)),
        },
        ValueError,
        "expected 2 or 1 batch entries and 1 heads",
    ),
    "entry bias without bits": (
        {"bias": entries(0, 2)},
        ValueError,
        "needs a mask with bits.*this has no bits, 1 head patterns and at most 1 full",
    ),
    "entry bias heads": (
        {"mask": listed, "bias": entries(0, 2, heads=3)},
        ValueError,
        r"values has shape \(1, 3, 40, 2\); expected \[2 or 1, 4 or 1, 40, 2\]",
    ),
    "entry bias of other queries": (
        {"mask": listed, "bias": EntryBias(*(x[:, 1:] for x in LISTS))},
        ValueError,
        r"EntryBias.index has shape \(1, 39, 2\); expected \[2 or 1, 40, n\]",
    ),
    "entry bias by numbers": (
        {"mask": listed, "bias": EntryBias(LISTS[0][:, None], LISTS[1] * 1.0)},
        TypeError,
        "EntryBias.index has dtype float32; expected integers",
    ),
    "entry bias of integers": (
        {"mask": listed, "bias": EntryBias(LISTS[1][:, None], LISTS[1].tolist())},
        TypeError,
        "EntryBias.values has dtype int32; expected a floating-point type",
    ),
    "entry bias of another mask": (
        {"mask": listed, "bias": entries(0, 1)},
        ValueError,
        "index names 40 keys but the mask has 80 set bits; it was made of other lists",
    ),
    "entry bias for blocks": (
        {"mask": listed, "bias": entries(0, 2), "implementation": "xla"},
        NotImplementedError,
        "'xla' cannot run this: an entry bias.*These can: reference",
    ),
    "coordinates of other atoms": (
        {"bias": DistanceBias.linear(np.ones(4), np.zeros((T, 3)))},
        ValueError,
        r"DistanceBias.kv_coords has shape \(40, 3\); expected \[56, 3\]",
    ),
    "distance weights": (
        {"bias": DistanceBias.linear(np.ones(3), np.zeros((T, 3)), np.zeros((S, 3)))},
        ValueError,
        "has 3 heads; expected 1 or 4",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call(changes)


def test_bad_options():
    with pytest.raises(
        ValueError, match="implementation='flash'; expected one of 'auto'"
    ):
        call({"implementation": "flash"})
    with pytest.raises(
        NotImplementedError, match="'cutlass' cannot run this.*: xla, reference"
    ):
        call({"implementation": "cutlass"})
    with pytest.raises(ValueError, match="scale=nan; expected a finite number"):
        call({}, scale=float("nan"))
    for scale in ("0.5", [1.0, 2.0], 1j, True, np.True_, {}, object(), [[1], []]):
        with pytest.raises(TypeError, match="expected a number known before"):
            call({}, scale=scale)
    with pytest.raises(TypeError, match="known before tracing"):
        jax.jit(lambda s: call({}, scale=s))(1.0)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("wide", ["q", "k", "v"])
def test_float64_beside_float32_is_refused(wide, x64):
    with (
        jax.enable_x64(x64),
        pytest.raises(TypeError, match="dtypes .*float64.*; expected one dtype"),
    ):
        call({wide: lambda values: values[wide].astype(np.float64)})


@pytest.mark.parametrize("x64", [False, True])
def test_numpy_float64_is_read_as_jax_reads_it(x64):
    values = arguments()
    wide = {n: values[n].astype(np.float64) for n in "qkv"}
    with jax.enable_x64(x64):
        out = call(wide)
        same = call({n: jnp.asarray(x) for n, x in wide.items()})
    assert out.dtype == (np.float64 if x64 else np.float32)
    np.testing.assert_array_equal(out, same)


def test_overflow_of_a_concrete_mask_raises_before_anything_runs():
    mask = patterns.window(T, left=1, right=1, kv_len=S, block_q=16, block_kv=32)
    narrow = dataclasses.replace(
        mask, needed_capacity=np.array([[7, 0, 1, 0]], np.int32)
    )
    with pytest.raises(CapacityError, match="kv has 2 and needs 7"):
        call({"mask": narrow})


def test_lists_that_outgrew_their_bits_are_empty():
    """Kernels number bits by the lists; the output is NaN whatever these say."""
    index = np.arange(64)[None, :, None] * np.ones((2, 1, 1), int)
    index[1] = (index[1] + [[0], [32]] * 32) % 64

    @jax.jit
    def counts(index):
        mask = patterns.device.neighbors(
            index, block_q=16, block_kv=16, capacity=4, num_bits=4
        )
        mask = _attention._within_bits(mask)
        return mask.kv_num_blocks, mask.q_num_blocks

    for found in counts(index):
        np.testing.assert_array_equal(found[:, 0], [[1] * 4, [0] * 4])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_scale(implementation):
    case = CASES["one_block"](np.random.default_rng(1))

    def attend(q, scale=None):
        return block_sparse_attention(
            q, case.k, case.v, case.mask, scale=scale, implementation=implementation
        )

    default = attend(case.q)
    np.testing.assert_allclose(attend(case.q, 0.25), default, rtol=1e-6)
    for known in (np.float16(0.25), jnp.bfloat16(0.25), jnp.array(0.25)):
        np.testing.assert_array_equal(attend(case.q, known), attend(case.q, 0.25))
    doubled = attend(2 * case.q, 0.125)
    np.testing.assert_allclose(doubled, default, rtol=1e-5)
    assert np.abs(attend(case.q, 1.0) - default).max() > 1e-2


def test_auto_takes_xla_and_lse_is_optional():
    case = CASES["one_block"](np.random.default_rng(2))
    args = (case.q, case.k, case.v, case.mask)
    out, lse = block_sparse_attention(*args, return_lse=True)
    assert lse.shape == (2, 37)
    alone = block_sparse_attention(*args)
    np.testing.assert_array_equal(out, alone)
    named = block_sparse_attention(*args, implementation="xla")
    np.testing.assert_array_equal(out, named)


def test_float32_is_not_computed_in_tf32():
    case = CASES["one_block"](np.random.default_rng(3))
    args = (case.q, case.k, case.v, case.mask)
    text = jax.jit(block_sparse_attention).lower(*args).as_text()
    assert "HIGHEST" in text
    with jax.default_matmul_precision("tensorfloat32"):
        fast = jax.jit(lambda *a: block_sparse_attention(*a)).lower(*args).as_text()
    assert "HIGHEST" not in fast


def test_rectangular_batches_of_rows_share_one_bias():
    # The layout of triangle attention: [B, rows, T, H, D] with a bias [B, 1, H, T, S].
    rng = np.random.default_rng(4)
    mask = patterns.from_dense(rng.random((24, 24)) < 0.7, block_q=8, block_kv=8)
    case = make_case(rng, mask, batch=(2, 3))
    bias = rng.standard_normal((2, 1, 2, 24, 24)).astype(np.float32)

    def loss(bias, implementation):
        out = block_sparse_attention(
            case.q, case.k, case.v, mask, bias=bias, implementation=implementation
        )
        return jnp.sum(out * case.dout)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    found, truth = gradient(bias, "xla"), gradient(bias, "reference")
    assert found.shape == bias.shape
    np.testing.assert_allclose(found, truth, rtol=2e-4, atol=2e-5)
