"""What the XLA handlers and the C interface refuse, and with which words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

BF16 = jax.numpy.bfloat16


@dataclasses.dataclass
class Call:
    """Operands of a small call in which one item is empty, so that nothing is read."""

    q: Any = (1, 100, 2, 64)
    k: Any = (1, 200, 1, 64)
    v: Any = (1, 200, 1, 64)
    partial: Any = (0,)
    full: Any = (0,)
    item_count: Any = (2,)
    items: Any = (2, 1, 12)
    split_rows: Any = (0, 3)
    split_slots: Any = (0, 0)
    bad: Any = (0,)
    lengths: Any = (0,)
    bits: Any = (0,)
    bias: Any = (0,)
    partial_numbers: Any = (0,)
    full_numbers: Any = (0,)
    rules: Any = ()
    out: Any = (1, 100, 2, 64)
    lse: Any = (1, 2, 100)
    part_out: Any = (1, 128, 64)
    part_lse: Any = (1, 128)
    kinds: tuple[int, ...] = ()
    block_q: int = 128
    block_kv: int = 128
    tile_q: int = 128
    num_arrays: int | None = None  # that are passed, if not all
    num_results: int | None = None
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self) -> Any:
        dtypes = dict.fromkeys(("q", "k", "v"), BF16) | {"bias": np.float32}
        names = [field.name for field in dataclasses.fields(self)[:15]]
        arrays = [
            _zeros(getattr(self, name), dtypes.get(name, np.int32)) for name in names
        ]
        arrays += [_zeros(x, np.int32) for x in self.rules]
        results = [
            _result(getattr(self, name), BF16 if name == "out" else "f4")
            for name in ("out", "lse", "part_out", "part_lse")
        ]
        attributes = {
            "block_q": np.int32(self.block_q),
            "block_kv": np.int32(self.block_kv),
            "tile_q": np.int32(self.tile_q),
            "share": False,
            "scale": np.float32(1),
            "bias_inner": np.int32(1),
            "rules": np.array(self.kinds, np.int32),
        } | self.attributes
        given = {name: x for name, x in attributes.items() if x is not None}
        results = results[: self.num_results]
        return jax.ffi.ffi_call("jsparse_forward", results)(
            *arrays[: self.num_arrays], **given
        )


def _zeros(x, dtype):
    return np.zeros(x, dtype) if isinstance(x, tuple) else x


def _result(x, dtype):
    return jax.ShapeDtypeStruct(x, dtype) if isinstance(x, tuple) else x


REFUSED = {
    "q has shape [100, 2, 64]; expected 4 axes": {"q": (100, 2, 64)},
    "q has shape [1, 0, 2, 64]; expected sizes from 1": {"q": (1, 0, 2, 64)},
    "q is float32; expected float16 or bfloat16": {
        "q": np.zeros((1, 100, 2, 64), np.float32)
    },
    "k is float16; expected bfloat16": {"k": np.zeros((1, 200, 1, 64), np.float16)},
    "v has shape [1, 200, 1, 32]; expected [1, 200, 1, 64]": {"v": (1, 200, 1, 32)},
    "items has shape [2, 1, 9]; expected [2, any, 12]": {"items": (2, 1, 9)},
    "items is float32; expected int32": {"items": np.zeros((2, 1, 12), np.float32)},
    "split_slots has shape [1, 2]; expected [0, any]": {"split_slots": (1, 2)},
    "bad has shape [1, 1, 200]; expected [1, 1, 256]": {"bad": (1, 1, 200)},
    "lengths has shape [2]; expected [1, 2]": {"lengths": (2,)},
    "bits has shape [1, 3, 128, 2]; expected [any, any, 128, 4]": {
        "bits": (1, 3, 128, 2)
    },
    "bits has shape [3, 3, 128, 4]; expected 1 or 1 first": {"bits": (3, 3, 128, 4)},
    "out has shape [1, 100, 2, 32]; expected [1, 100, 2, 64]": {"out": (1, 100, 2, 32)},
    "lse has shape [1, 100, 2]; expected [1, 2, 100]": {"lse": (1, 100, 2)},
    "part_lse has shape [2, 128]; expected [1, 128]": {"part_lse": (2, 128)},
    "blocks of 0 x 128; expected 64 or 128 each": {"block_q": 0},
    "tile_q=32; expected 64, block_q or 256": {"tile_q": 32},
    "part_out has shape [1, 128, 64]; expected [any, 64, 64]": {"tile_q": 64},
    "attribute rules has kind 7; expected 0 to 3": {"kinds": (7,)},
    "5 rules; expected at most 4": {"kinds": (0,) * 5},
    "array 0 of the rules is missing": {"kinds": (0,)},
    "array 1 of the rules has shape [1, 128]; expected [1, 256]": {
        "kinds": (0,),
        "rules": ((1, 128), (1, 128)),
    },
    "array 0 of the rules is int32; expected float32": {
        "kinds": (3,),
        "rules": ((1, 3, 128), (1, 3, 256), (1,)),
    },
    "2 arrays of rules; expected 0": {"rules": ((1, 128), (1, 256))},
    "3 arrays of rules; expected 2": {
        "kinds": (0,),
        "rules": ((1, 128), (1, 256), (1, 256)),
    },
    "array 0 of the rules has shape [2, 128]; expected [1, 128]": {
        "kinds": (0,),
        "rules": ((2, 128), (1, 256)),
    },
    "attribute rules has kind -1; expected 0 to 3": {"kinds": (-1,)},
    "k has shape [1, 200, 64]; expected 4 axes": {"k": (1, 200, 64)},
    "k has shape [2, 200, 1, 64]; expected [1, 200, 1, 64]": {"k": (2, 200, 1, 64)},
    "v is float32; expected bfloat16": {"v": np.zeros((1, 200, 1, 64), np.float32)},
    "partial has shape [2, 3]; expected [any]": {"partial": (2, 3)},
    "full is float32; expected int32": {"full": np.zeros(4, np.float32)},
    "item_count is float32; expected int32": {"item_count": np.zeros(2, np.float32)},
    "item_count has shape [2, 1]; expected [any]": {"item_count": (2, 1)},
    "items has shape [3, 1, 12]; expected [2, any, 12]": {"items": (3, 1, 12)},
    "split_rows has shape [2, 4]; expected [any, 3]": {"split_rows": (2, 4)},
    "lengths is float32; expected int32": {"lengths": np.zeros((1, 2), np.float32)},
    "bits is float32; expected int32": {"bits": np.zeros((1, 3, 128, 4), np.float32)},
    "part_out has shape [1, 128, 32]; expected [any, 128, 64]": {
        "part_out": (1, 128, 32)
    },
    "out is float32; expected bfloat16": {
        "out": jax.ShapeDtypeStruct((1, 100, 2, 64), "float32")
    },
    "lse is bfloat16; expected float32": {
        "lse": jax.ShapeDtypeStruct((1, 2, 100), BF16)
    },
    "blocks of 128 x -64; expected 64 or 128 each": {"block_kv": -64},
    "bias has shape [2, 100, 200]; expected 4 axes, or 5 of blocks": {
        "bias": (2, 100, 200)
    },
    "bias has shape [1, 3, 100, 200]; expected 1 or 2 at axis 1": {
        "bias": (1, 3, 100, 200)
    },
    "bias has shape [1, 2, 128, 200]; expected 1 or 100 at axis 2": {
        "bias": (1, 2, 128, 200)
    },
    "bias has shape [1, 2, 100, 202]; expected a multiple of 4 as the last axis, at "
    "least 200": {"bias": (1, 2, 100, 202)},
    "bias has shape [1, 2, 100, 204]; expected a multiple of 8 as the last axis, at "
    "least 200": {"bias": np.zeros((1, 2, 100, 204), BF16)},
    "bias has shape [1, 2, 1, 196]; expected a multiple of 4 as the last axis, at "
    "least 200": {"bias": (1, 2, 1, 196)},
    "bias is float16; expected bfloat16 or float32": {
        "bias": np.zeros((1, 2, 100, 200), np.float16)
    },
    "share=1; expected 0 beside a bias": {
        "bias": (1, 2, 100, 200),
        "attributes": {"share": True},
    },
    "bias has shape [1, 1, 3, 128, 64]; expected blocks of 128 x 128": {
        "bias": (1, 1, 3, 128, 64)
    },
    "partial_numbers has shape [2]; expected [0]": {
        "bias": (1, 1, 3, 128, 128),
        "partial_numbers": (2,),
    },
    "full_numbers is float32; expected int32": {
        "bias": (1, 1, 3, 128, 128),
        "full_numbers": np.zeros(0, np.float32),
    },
    "bias is int32; expected float16, bfloat16 or float32": {
        "bias": np.zeros((1, 2, 100, 200), np.int32)
    },
    "bias_inner=0; expected at least 1": {
        "bias": (1, 2, 100, 200),
        "attributes": {"bias_inner": np.int32(0)},
    },
}


def test_takes_what_it_describes(simulated):
    Call().run()
    Call(kinds=(0, 1), rules=((1, 128), (1, 256), (1, 128), (1, 128))).run()
    Call(bias=(3, 2, 1, 200)).run()
    blocks = np.zeros((1, 1, 3, 128, 128), BF16)
    Call(bias=blocks, partial=(4,), partial_numbers=(4,)).run()


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(simulated, reason):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        Call(**REFUSED[reason]).run()
    assert f"jsparse_forward: {reason}" in str(caught.value)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"num_arrays": 0}, "number of arguments"),
        ({"num_arrays": 14}, "number of arguments"),
        ({"num_results": 1}, "number of results"),
        ({"num_results": 3}, "number of results"),
        ({"attributes": {"more": np.int32(1)}}, "number of attributes"),
        ({"attributes": {"block_q": None}}, "number of attributes"),
        ({"attributes": {"block_q": np.int64(256)}}, "bad operands at: 20"),
        ({"attributes": {"block_kv": np.float32(96.5)}}, "bad operands at: 21"),
        ({"attributes": {"tile_q": "128"}}, "bad operands at: 22"),
        ({"attributes": {"share": np.int32(3)}}, "bad operands at: 23"),
        ({"attributes": {"scale": np.float64(0.3)}}, "bad operands at: 24"),
        ({"attributes": {"bias_inner": np.int64(3)}}, "bad operands at: 25"),
        ({"attributes": {"rules": np.zeros(0, np.int64)}}, "bad operands at: 26"),
        ({"attributes": {"rules": np.int32(0)}}, "bad operands at: 26"),
    ],
    ids=str,
)
def test_another_signature_is_refused(simulated, change, reason):
    # Values are such as no other call has: JAX takes 128 and 128.0 for the same call.
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        Call(**change).run()
    assert reason in str(caught.value)


@dataclasses.dataclass
class BackwardCall:
    """As `Call`; ``results`` are dq and its parts, or dk, dv and theirs."""

    target: str = "jsparse_backward_dq"
    q: Any = (1, 100, 2, 64)
    k: Any = (1, 200, 1, 64)
    v: Any = (1, 200, 1, 64)
    dout: Any = (1, 100, 2, 64)
    lse2: Any = (1, 2, 128)
    delta: Any = (1, 2, 128)
    partial: Any = (0,)
    full: Any = (0,)
    item_count: Any = (2,)
    items: Any = (2, 1, 12)
    split_rows: Any = (0, 3)
    split_slots: Any = (0, 0)
    bad: Any = (0,)
    lengths: Any = (0,)
    bits: Any = (0,)
    bias: Any = (0,)
    partial_numbers: Any = (0,)
    full_numbers: Any = (0,)
    rules: Any = ()
    kinds: tuple[int, ...] = ()
    results: tuple[tuple[int, ...], ...] = ((1, 100, 2, 64), (1, 128, 64), (0,))
    of_bias: str = "float32"
    blocks: tuple[int, int] = (128, 128)

    def run(self) -> Any:
        names = [field.name for field in dataclasses.fields(self)[1:19]]
        dtypes = [BF16] * 4 + [np.float32] * 2 + [np.int32] * 9
        dtypes += [np.float32] + [np.int32] * 2
        arrays = [
            _zeros(getattr(self, name), dtype)
            for name, dtype in zip(names, dtypes, strict=True)
        ]
        arrays += [_zeros(x, np.int32) for x in self.rules]
        count = 2 if self.target == "jsparse_backward_dkv" else 1
        dtypes = [BF16] * count + ["float32"] * count + [self.of_bias] * count
        results = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(self.results, dtypes, strict=True)
        ]
        return jax.ffi.ffi_call(self.target, results)(
            *arrays,
            block_q=np.int32(self.blocks[0]),
            block_kv=np.int32(self.blocks[1]),
            scale=np.float32(1),
            bias_inner=np.int32(1),
            rules=np.array(self.kinds, np.int32),
        )


def of_keys(
    dk: tuple[int, ...] = (1, 200, 1, 64),
    dv: tuple[int, ...] = (1, 200, 1, 64),
    parts: tuple[tuple[int, ...], ...] = 2 * ((1, 128, 64),),
    by_key: tuple[tuple[int, ...], ...] = 2 * ((0,),),
) -> dict[str, Any]:
    """What a call for dk and dv has instead."""
    return {"target": "jsparse_backward_dkv", "results": (dk, dv, *parts, *by_key)}


REFUSED_BACKWARD = {
    "q has shape [100, 2, 64]; expected 4 axes": {"q": (100, 2, 64)},
    "q is float32; expected float16 or bfloat16": {
        "q": np.zeros((1, 100, 2, 64), np.float32)
    },
    "v has shape [1, 200, 1, 32]; expected [1, 200, 1, 64]": {"v": (1, 200, 1, 32)},
    "dout has shape [1, 100, 2, 32]; expected [1, 100, 2, 64]": {
        "dout": (1, 100, 2, 32)
    },
    "dout is float16; expected bfloat16": {
        "dout": np.zeros((1, 100, 2, 64), np.float16)
    },
    "lse2 has shape [1, 2, 100]; expected [1, 2, 128]": {"lse2": (1, 2, 100)},
    "delta has shape [2, 128]; expected [1, 2, 128]": {"delta": (2, 128)},
    "delta is int32; expected float32": {"delta": np.zeros((1, 2, 128), np.int32)},
    "items has shape [2, 1, 9]; expected [2, any, 12]": {"items": (2, 1, 9)},
    "bad has shape [1, 2, 256]; expected [1, 1, 256]": {"bad": (1, 2, 256)},
    "bits has shape [1, 3, 64, 4]; expected [any, any, 128, 4]": {
        "bits": (1, 3, 64, 4)
    },
    "dq has shape [1, 128, 2, 64]; expected [1, 100, 2, 64]": {
        "results": ((1, 128, 2, 64), (1, 128, 64), (0,))
    },
    "part has shape [1, 64, 64]; expected [any, 128, 64]": {
        "results": ((1, 100, 2, 64), (1, 64, 64), (0,))
    },
    "dbias has shape [1, 1, 100, 200]; expected [1, 2, 100, 200]": {
        "bias": (1, 2, 100, 200),
        "results": ((1, 100, 2, 64), (1, 128, 64), (1, 1, 100, 200)),
    },
    "dbias is float32; expected float16": {
        "bias": np.zeros((1, 2, 100, 200), np.float16),
        "results": ((1, 100, 2, 64), (1, 128, 64), (1, 2, 100, 200)),
    },
    "full_numbers has shape [3]; expected [2]": {
        "bias": (1, 1, 4, 128, 128),
        "full": (2,),
        "full_numbers": (3,),
    },
    "blocks of 128 x 0; expected 64 or 128 each": {"blocks": (128, 0)},
    "array 0 of the rules has shape [1, 256]; expected [1, 128]": {
        "kinds": (1,),
        "rules": ((1, 256), (1, 256)),
    },
}
REFUSED_KEYS = {
    "bad has shape [1, 1, 256]; expected [1, 2, 128]": {"bad": (1, 1, 256)},
    "bits has shape [1, 3, 128, 2]; expected [any, any, 128, 4]": {
        "bits": (1, 3, 128, 2)
    },
    "dk has shape [1, 200, 2, 64]; expected [1, 200, 1, 64]": of_keys(
        dk=(1, 200, 2, 64)
    ),
    "dv has shape [1, 256, 1, 64]; expected [1, 200, 1, 64]": of_keys(
        dv=(1, 256, 1, 64)
    ),
    "part_dv has shape [1, 128, 32]; expected [any, 128, 64]": of_keys(
        parts=((1, 128, 64), (1, 128, 32))
    ),
    "array 0 of the rules has shape [1, 128]; expected [1, 256]": {
        "kinds": (1,),
        "rules": ((1, 128), (1, 128)),
    },
    "by_key has shape [1, 2, 200]; expected [1, 200, 2]": of_keys(
        by_key=((1, 2, 200), (1, 128))
    ),
    "part_by_key has shape [2, 128]; expected [1, 128]": of_keys(
        by_key=((1, 200, 2), (2, 128))
    ),
    "bias has shape [1, 2, 100, 128]; expected a multiple of 4 as the last axis, at "
    "least 200": {"bias": (1, 2, 100, 128)},
}


@dataclasses.dataclass
class CallOfAll(BackwardCall):
    """As `BackwardCall`, of all gradients; ``sums`` and ``taken`` are workspaces."""

    turns: Any = (3, 2)
    sums_of: Any = (1, 2, 1, 2)
    bad_keys: Any = (0,)
    dq: Any = (1, 100, 2, 64)
    dk: Any = (1, 200, 1, 64)
    dv: Any = (1, 200, 1, 64)
    parts: Any = (1, 128, 64)
    sums: Any = (2, 128, 64)
    taken: Any = (2,)
    dbias: Any = (0,)

    def run(self) -> Any:
        names = [field.name for field in dataclasses.fields(BackwardCall)[1:16]]
        names += ["bias", "partial_numbers", "full_numbers"]
        names += ["turns", "sums_of", "bad_keys"]
        dtypes = [BF16] * 4 + [np.float32] * 2 + [np.int32] * 9 + [BF16]
        dtypes += [np.int32] * 5
        arrays = [
            _zeros(getattr(self, name), dtype)
            for name, dtype in zip(names, dtypes, strict=True)
        ]
        shapes = (self.dq, self.dk, self.dv, self.parts, self.parts, self.sums)
        dtypes = [BF16] * 3 + ["float32"] * 3
        results = list(map(jax.ShapeDtypeStruct, shapes, dtypes))
        results.append(jax.ShapeDtypeStruct(self.taken, "int32"))
        results.append(jax.ShapeDtypeStruct(self.dbias, BF16))
        return jax.ffi.ffi_call("jsparse_backward", results)(
            *arrays,
            block_q=np.int32(self.blocks[0]),
            block_kv=np.int32(self.blocks[1]),
            scale=np.float32(1),
            bias_inner=np.int32(1),
            rules=np.array(self.kinds, np.int32),
        )


REFUSED_ALL = {
    "delta has shape [2, 128]; expected [1, 2, 128]": {"delta": (2, 128)},
    "bad has shape [1, 1, 256]; expected [1, 2, 128]": {"bad": (1, 1, 256)},
    "dq has shape [1, 200, 1, 64]; expected [1, 100, 2, 64]": {"dq": (1, 200, 1, 64)},
    "dk has shape [1, 100, 2, 64]; expected [1, 200, 1, 64]": {"dk": (1, 100, 2, 64)},
    "dv has shape [1, 200, 1, 32]; expected [1, 200, 1, 64]": {"dv": (1, 200, 1, 32)},
    "part_dk has shape [1, 64, 64]; expected [any, 128, 64]": {"parts": (1, 64, 64)},
    "turns has shape [3, 3]; expected [any, 2]": {"turns": (3, 3)},
    "turns is float32; expected int32": {"turns": np.zeros((3, 2), np.float32)},
    "sums_of has shape [1, 2, 2, 2]; expected [1, 2, 1, 2]": {"sums_of": (1, 2, 2, 2)},
    "bad_keys has shape [1, 2, 256]; expected [1, 1, 256]": {"bad_keys": (1, 2, 256)},
    "sums has shape [2, 64, 64]; expected [any, 128, 64]": {"sums": (2, 64, 64)},
    "taken has shape [3]; expected [2]": {"taken": (3,)},
    "bias has shape [1, 2, 100, 204]; expected a multiple of 8 as the last axis, at "
    "least 200": {"bias": (1, 2, 100, 204)},
    "dbias has shape [1, 1, 100, 200]; expected [1, 2, 100, 200]": {
        "bias": (1, 2, 100, 200),
        "dbias": (1, 1, 100, 200),
    },
    "head size 64 with blocks of 128 x 64; expected a multiple of 8 up to 128 with "
    "blocks of 128 x 128": {"blocks": (128, 64), "parts": (1, 64, 64)},
}


def test_all_gradients_take_what_they_describe(simulated):
    CallOfAll().run()
    CallOfAll(bad_keys=(1, 1, 256)).run()
    CallOfAll(bias=(1, 2, 100, 200), dbias=(1, 2, 100, 200)).run()
    of_queries = dict.fromkeys(("q", "dout", "dq"), (1, 100, 2, 48))
    of_keys = dict.fromkeys(("k", "v", "dk", "dv"), (1, 200, 1, 48))
    shapes: dict[str, Any] = {**of_queries, **of_keys, "parts": (1, 128, 48)}
    CallOfAll(**shapes).run()


@pytest.mark.parametrize("reason", REFUSED_ALL)
def test_all_gradients_refuse(simulated, reason):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        CallOfAll(**REFUSED_ALL[reason]).run()
    assert f"jsparse_backward: {reason}" in str(caught.value)


def test_backward_takes_what_it_describes(simulated):
    BackwardCall().run()
    BackwardCall(kinds=(1,), rules=((1, 128), (1, 128)), bad=(1, 1, 256)).run()
    BackwardCall(**of_keys()).run()
    keys = {"kinds": (1,), "rules": ((1, 256), (1, 256)), "bad": (1, 2, 128)}
    BackwardCall(**of_keys(), **keys).run()
    dense = (1, 2, 100, 200)
    results = (1, 100, 2, 64), (1, 128, 64), dense
    half = np.zeros(dense, np.float16)
    BackwardCall(bias=half, results=results, of_bias="float16").run()
    BackwardCall(**of_keys(by_key=((1, 200, 2), (1, 128))), bias=(1, 2, 1, 200)).run()


@pytest.mark.parametrize("reason", REFUSED_BACKWARD)
def test_dq_refuses(simulated, reason):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        BackwardCall(**REFUSED_BACKWARD[reason]).run()
    assert f"jsparse_backward_dq: {reason}" in str(caught.value)


@pytest.mark.parametrize("reason", REFUSED_KEYS)
def test_dkv_refuses(simulated, reason):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        BackwardCall(**of_keys() | REFUSED_KEYS[reason]).run()
    assert f"jsparse_backward_dkv: {reason}" in str(caught.value)
