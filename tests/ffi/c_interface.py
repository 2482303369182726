"""The C interface of the CUDA kernels, called as by another program, with ctypes."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import jax
import numpy as np
import pytest

from jsparse.backends import cutlass
from jsparse.backends._contract import HostPattern
from jsparse.ops._checks import canonical
from tests.support.cases import Case

_ONE_AT_A_TIME = threading.Lock()
"""What stands in for JAX's function does so for all threads."""
_INT, _POINTER = ctypes.c_int32, ctypes.c_void_p


class Rule(ctypes.Structure):
    """``jsparse_rule``."""

    _fields_ = [
        ("kind", _INT),
        *((name, _POINTER) for name in ("first", "second", "third")),
        *((f"{name}_batched", _INT) for name in ("first", "second", "third")),
    ]


class Schedule(ctypes.Structure):
    """``jsparse_schedule``."""

    _fields_ = [
        *((name, _POINTER) for name in ("partial", "full")),
        *((name, _INT) for name in ("num_workers", "items_per_worker")),
        *((name, _POINTER) for name in ("item_count", "items")),
        *((name, _INT) for name in ("num_split_rows", "most_parts")),
        *((name, _POINTER) for name in ("split_rows", "split_slots")),
    ]


class Elements(ctypes.Structure):
    """``jsparse_elements``."""

    _fields_ = [
        *((name, _POINTER) for name in ("lengths", "bits")),
        *((name, _INT) for name in ("num_bits", "bits_batched")),
        ("bad", _POINTER),
        ("num_rules", _INT),
        ("rules", Rule * 4),
    ]


class Bias(ctypes.Structure):
    """``jsparse_bias``."""

    _fields_ = [
        ("values", _POINTER),
        *((name, _INT) for name in ("dtype", "entries", "inner", "heads")),
        *((name, _INT) for name in ("num_blocks", "rows", "columns")),
        *((name, _POINTER) for name in ("partial_numbers", "full_numbers")),
    ]


class Args(ctypes.Structure):
    """``jsparse_forward_args``."""

    _fields_ = [
        *((name, _INT) for name in ("dtype", "batch", "q_len", "kv_len", "num_heads")),
        *((name, _INT) for name in ("num_kv_heads", "head_dim", "block_q", "block_kv")),
        *((name, _INT) for name in ("tile_q", "share")),
        ("scale", ctypes.c_float),
        *((name, _POINTER) for name in ("q", "k", "v", "out", "lse")),
        *((name, _POINTER) for name in ("part_out", "part_lse")),
        ("schedule", Schedule),
        ("elements", Elements),
        ("bias", Bias),
    ]


class Turns(ctypes.Structure):
    """``jsparse_turns``."""

    _fields_ = (
        ("turns", _POINTER),
        ("sums_of", _POINTER),
        ("num_sums", _INT),
        ("sums", _POINTER),
        ("taken", _POINTER),
        ("bad_keys", _POINTER),
    )


class BackwardArgs(ctypes.Structure):
    """``jsparse_backward_args``."""

    _fields_ = [
        *((name, _INT) for name in ("dtype", "batch", "q_len", "kv_len", "num_heads")),
        *((name, _INT) for name in ("num_kv_heads", "head_dim", "block_q", "block_kv")),
        ("scale", ctypes.c_float),
        *((name, _POINTER) for name in ("q", "k", "v", "dout", "lse2", "delta")),
        ("schedule", Schedule),
        ("elements", Elements),
        ("bias", Bias),
    ]


class Launch:
    """A launch of a case without rules or a block bias, into results of its own."""

    def __init__(self, case: Case):
        arrays, attributes, shapes = _given(case)
        self.results = [jax.device_put(np.zeros(x.shape, x.dtype)) for x in shapes]
        lists = ("partial", "full", "item_count", "items", "split_rows", "split_slots")
        of_bias = ("bias", "partial_numbers", "full_numbers")
        names = ("q", "k", "v", *lists, "bad", "lengths", "bits", *of_bias)
        self.arrays = dict(zip(names, jax.device_put(arrays), strict=True))
        results = zip(("out", "lse", "part_out", "part_lse"), self.results, strict=True)
        at = {
            name: x.unsafe_buffer_pointer() if x.size else None
            for name, x in (*self.arrays.items(), *results)
        }
        shape = {name: x.shape for name, x in self.arrays.items()}
        batch, q_len, num_heads, head_dim = shape["q"]
        schedule = Schedule(
            num_workers=shape["items"][0],
            items_per_worker=shape["items"][1],
            num_split_rows=shape["split_rows"][0],
            most_parts=shape["split_slots"][1],
            **{name: at.pop(name) for name in lists},
        )
        has_bits = at["bits"] is not None
        elements = Elements(
            num_bits=shape["bits"][1] if has_bits else 0,
            bits_batched=has_bits and shape["bits"][0] > 1,
            **{name: at.pop(name) for name in ("bad", "lengths", "bits")},
        )
        self.args = Args(
            dtype=["float16", "bfloat16"].index(str(self.arrays["q"].dtype)),
            batch=batch,
            q_len=q_len,
            kv_len=shape["k"][1],
            num_heads=num_heads,
            num_kv_heads=shape["k"][2],
            head_dim=head_dim,
            schedule=schedule,
            elements=elements,
            bias=_bias(self.arrays["bias"], attributes["bias_inner"]),
            **{name: attributes[name] for name in ("block_q", "block_kv", "tile_q")},
            **{name: attributes[name] for name in ("share", "scale")},
            **{name: x for name, x in at.items() if name not in of_bias},
        )
        jax.block_until_ready((self.results, list(self.arrays.values())))

    def run(self, library: ctypes.CDLL, stream: int | None = None) -> None:
        """Launches; raises what the library says."""
        message = ctypes.create_string_buffer(200)
        arguments = ctypes.byref(self.args), _POINTER(stream), message, len(message)
        if library.jsparse_forward(*arguments) != 0:
            raise RuntimeError(message.value.decode())


def _bias(values: Any, inner: int) -> Bias:
    """A dense bias, or none where there are no values."""
    if not values.size:
        return Bias()
    entries, heads, rows, columns = values.shape
    return Bias(
        values=values.unsafe_buffer_pointer(),
        dtype=["float16", "bfloat16", "float32"].index(str(values.dtype)),
        entries=entries,
        inner=int(inner),
        heads=heads,
        rows=rows,
        columns=columns,
    )


def _given(case: Case) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """Operands, attributes and results of the handler, as the backend makes them."""
    found: list[Any] = []

    def ffi_call(target: str, results: Any) -> Any:
        def run(*operands: Any, **attributes: Any) -> Any:
            found.extend((list(operands), attributes, list(results)))
            return [np.zeros(x.shape, x.dtype) for x in results]

        return run

    operands = canonical(case.q, case.k, case.v, case.mask, case.bias)
    with _ONE_AT_A_TIME, pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.ffi, "ffi_call", ffi_call)
        scale = case.q.shape[-1] ** -0.5
        cutlass.forward(operands, scale, HostPattern.of(case.mask))
    arrays, attributes, results = found
    assert not len(attributes["rules"])
    return arrays, attributes, results
