"""What the XLA handler and the C interface refuse, and with which words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from jsparse.backends import cutlass

BF16 = jax.numpy.bfloat16


@dataclasses.dataclass
class Call:
    """Operands of a small call in which one item is empty, so that nothing is read."""

    q: Any = (1, 100, 2, 64)
    k: Any = (1, 200, 1, 64)
    v: Any = (1, 200, 1, 64)
    kv_indices: Any = (0,)
    full_kv_indices: Any = (0,)
    item_count: Any = (2,)
    items: Any = (2, 1, 12)
    split_rows: Any = (0, 3)
    split_slots: Any = (0, 0)
    bad_keys: Any = (0,)
    lengths: Any = (0,)
    bits: Any = (0,)
    rules: Any = ()
    out: Any = (1, 100, 2, 64)
    lse: Any = (1, 2, 100)
    part_out: Any = (1, 128, 64)
    part_lse: Any = (1, 128)
    kinds: tuple[int, ...] = ()
    block_q: int = 128
    block_kv: int = 128
    tile_q: int = 128

    def run(self) -> Any:
        floats = ("q", "k", "v")
        names = [field.name for field in dataclasses.fields(self)[:12]]
        arrays = [
            _zeros(getattr(self, name), BF16 if name in floats else np.int32)
            for name in names
        ]
        arrays += [_zeros(x, np.int32) for x in self.rules]
        results = [
            jax.ShapeDtypeStruct(getattr(self, name), BF16 if name == "out" else "f4")
            for name in ("out", "lse", "part_out", "part_lse")
        ]
        return jax.ffi.ffi_call("jsparse_forward", results)(
            *arrays,
            block_q=np.int32(self.block_q),
            block_kv=np.int32(self.block_kv),
            tile_q=np.int32(self.tile_q),
            share=False,
            scale=np.float32(1),
            rules=np.array(self.kinds, np.int32),
        )


def _zeros(x, dtype):
    return np.zeros(x, dtype) if isinstance(x, tuple) else x


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
    "bad_keys has shape [1, 1, 200]; expected [1, 1, 256]": {"bad_keys": (1, 1, 200)},
    "lengths has shape [2]; expected [1, 2]": {"lengths": (2,)},
    "bits has shape [1, 3, 128, 2]; expected [any, any, 128, 4]": {
        "bits": (1, 3, 128, 2)
    },
    "bits has shape [3, 3, 128, 4]; expected 1 or 1 first": {"bits": (3, 3, 128, 4)},
    "out has shape [1, 100, 2, 32]; expected that of q": {"out": (1, 100, 2, 32)},
    "lse has shape [1, 100, 2]; expected [1, 2, 100]": {"lse": (1, 100, 2)},
    "part_lse has shape [2, 128]; expected [1, 128]": {"part_lse": (2, 128)},
    "blocks of 0 x 128; expected 64 or 128 each": {"block_q": 0},
    "tile_q=32; expected 64 or block_q": {"tile_q": 32},
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
}


def test_takes_what_it_describes(simulated):
    Call().run()
    Call(kinds=(0, 1), rules=((1, 128), (1, 256), (1, 128), (1, 128))).run()


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(simulated, reason):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        Call(**REFUSED[reason]).run()
    assert f"jsparse_forward: {reason}" in str(caught.value)
