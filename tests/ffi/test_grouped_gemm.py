"""The baseline of two grouped GEMMs: what it computes, refuses and says as a peer.

On a CPU the products are plain loops over the problems that its own code has made.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import block_sparse_attention
from jsparse.backends import _hopper, cutlass
from jsparse.bench import PEERS, Options, _grouped_gemm, run_case
from jsparse.bench._cases import AttentionCase, of_blocks, of_coords
from jsparse.bench._contract import NoSuchPass, Task
from jsparse.bench._grouped_gemm import TARGET, Lists, attend
from jsparse.measure import Progress
from jsparse.patterns import BlockMask
from tests.ffi.conftest import compiled

PEER = PEERS["grouped_gemm"]
LIMITS = {"float16": 1e-3, "bfloat16": 4e-3}


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    """The baseline's own code for the CPU, its handler registered."""
    library = compiled(tmp_path_factory, "grouped_gemm", "grouped_gemm.cc")
    handler = jax.ffi.pycapsule(library.jsparse_grouped_gemm_on_host)
    jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")
    return library


@pytest.fixture
def registered(on_host, monkeypatch):
    """Lets the peer use it."""
    monkeypatch.setattr(_grouped_gemm, "_registered", lambda: on_host)


def mask_of(blocks: tuple[int, int]) -> BlockMask:
    """Rows of three, none, one and two blocks, columns not in order of rows."""
    rows, columns = [0, 0, 0, 2, 3, 3], [4, 0, 2, 1, 0, 3]
    block_q, block_kv = blocks
    return BlockMask.from_blocks(
        *(rows, columns),
        q_len=4 * block_q,
        kv_len=5 * block_kv,
        block_q=block_q,
        block_kv=block_kv,
    )


def inputs_of(mask: BlockMask, heads: int, dim: int, dtype: str) -> list[jax.Array]:
    rng = np.random.default_rng(dim)
    lengths = mask.q_len, mask.kv_len, mask.kv_len
    return [
        jnp.asarray(3 * rng.standard_normal((n, heads, dim)), dtype) for n in lengths
    ]


def check(mask: BlockMask, heads: int, dim: int, dtype: str) -> None:
    q, k, v = inputs_of(mask, heads, dim, dtype)
    lists = jax.tree.map(jnp.asarray, Lists.of(mask))
    found = np.asarray(jax.jit(attend)(q, k, v, lists), np.float64)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v))
        out = block_sparse_attention(q, k, v, mask, implementation="reference")
    truth = np.asarray(out)
    distance = np.linalg.norm(found - truth) / np.linalg.norm(truth)
    assert distance <= LIMITS[dtype]
    blind = ~mask.to_dense()[0, 0].any(1)
    assert blind.any()
    assert not found[blind].any()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("heads, dim", [(2, 32), (1, 64), (3, 8)])
def test_computes_attention(registered, heads, dim, blocks, dtype):
    check(mask_of(blocks), heads, dim, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("heads, dim", [(4, 32), (1, 64), (2, 96), (16, 128)])
def test_computes_attention_on_a_gpu(heads, dim, blocks, dtype):
    if cutlass._library_file() is None:
        pytest.skip("needs the built CUDA kernels: make cuda")
    check(mask_of(blocks), heads, dim, dtype)


@pytest.mark.gpu
def test_computes_attention_of_many_problems_on_a_gpu():
    if cutlass._library_file() is None:
        pytest.skip("needs the built CUDA kernels: make cuda")
    rng = np.random.default_rng(0)
    chosen = rng.random((60, 60)) < 0.2
    chosen[7] = False
    mask = BlockMask.from_blocks(*np.nonzero(chosen), q_len=60 * 128)
    check(mask, 4, 64, "bfloat16")


# -------------------------------------------------------------------------- refusals


@dataclasses.dataclass
class Call:
    """Operands of a small call, by shape or as they are."""

    q: Any = (128, 2, 64)
    k: Any = (192, 2, 64)
    v: Any = (192, 2, 64)
    row_start: Any = (3,)
    rows: Any = (4,)
    columns: Any = (4,)
    out: Any = (128, 2, 64)
    logits: Any = (2, 4 * 64 * 64)
    weights: Any = (2, 4 * 64 * 64)
    gathered: Any = (256, 2, 64)
    logits_shapes: Any = (8, 3)
    logits_addresses: Any = (6, 8, 2)
    out_shapes: Any = (4, 3)
    out_addresses: Any = (6, 4, 2)
    workspace: Any = (4096,)
    block_q: int = 64
    block_kv: int = 64

    def run(self) -> Any:
        made = {}
        for place in dataclasses.fields(self)[:15]:
            x = getattr(self, place.name)
            dtype = {"logits": "f4", "workspace": "u1"}.get(place.name, "i4")
            if place.name in ("q", "k", "v", "out", "weights", "gathered"):
                dtype = jnp.bfloat16
            made[place.name] = np.zeros(x, dtype) if isinstance(x, tuple) else x
        arrays = list(made.values())
        results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[6:]]
        return jax.ffi.ffi_call(TARGET, results)(
            *arrays[:6],
            block_q=np.int32(self.block_q),
            block_kv=np.int32(self.block_kv),
            scale=np.float32(1),
        )


REFUSED = {
    "a block of 32; expected 64 or 128": {"block_kv": 32},
    "q has shape [128, 128]; expected whole blocks": {"q": (128, 128)},
    "q has shape [100, 2, 64]; expected whole blocks": {"q": (100, 2, 64)},
    "q has shape [128, 2, 60]; expected whole blocks": {"q": (128, 2, 60)},
    "q is float32; expected bfloat16": {"q": np.zeros((128, 2, 64), np.float32)},
    "k is float16; expected bfloat16": {"k": np.zeros((192, 2, 64), np.float16)},
    "k has shape [192, 1, 64]; expected [any, 2, 64]": {"k": (192, 1, 64)},
    "k has shape [200, 2, 64]; expected whole blocks": {"k": (200, 2, 64)},
    "v has shape [128, 2, 64]; expected [192, 2, 64]": {"v": (128, 2, 64)},
    "row_start has shape [2]; expected [3]": {"row_start": (2,)},
    "rows has shape [0]; expected one of each block": {"rows": (0,)},
    "columns has shape [5]; expected [4]": {"columns": (5,)},
    "columns is float32; expected int32": {"columns": np.zeros(4, np.float32)},
    "out has shape [128, 2, 32]; expected [128, 2, 64]": {"out": (128, 2, 32)},
    "logits has shape [2, 100]; expected [2, 16384]": {"logits": (2, 100)},
    "weights has shape [1, 16384]; expected [2, 16384]": {"weights": (1, 16384)},
    "gathered has shape [192, 2, 64]; expected [256, 2, 64]": {
        "gathered": (192, 2, 64)
    },
    "shapes of logits has shape [4, 3]; expected [8, 3]": {"logits_shapes": (4, 3)},
    "addresses of out has shape [5, 4, 2]; expected [6, 4, 2]": {
        "out_addresses": (5, 4, 2)
    },
}


def test_takes_what_it_describes(on_host):
    Call().run()


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(on_host, reason):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        Call(**REFUSED[reason]).run()
    assert f"jsparse_grouped_gemm: {reason}" in str(caught.value)


# -------------------------------------------------------------------------- the peer


def test_takes_part_in_the_forward_pass(registered, monkeypatch):
    monkeypatch.setattr(_grouped_gemm.GroupedGemm, "available", lambda self: None)
    columns = [np.array([0, 2]), np.array([1]), np.array([0])]
    case = AttentionCase(
        *("tiny", "an example", 2, 16, "bfloat16"), load=lambda: of_blocks(columns)
    )
    options = Options(against=("grouped_gemm",), repeats=1)
    record = run_case(case, options, Progress())
    found = record["forward"]["grouped_gemm"]
    assert found["errors"]["out"]["ok"]
    assert found["computes"] == "blocks"
    # At least the logits and the weights go through memory.
    assert found["temporary_bytes"] >= 2 * 4 * 128 * 128 * (4 + 2)
    assert record["missed"] == []
    assert record["left_out"] == {
        "grouped_gemm": "forward_backward: it computes no gradients"
    }


def test_has_no_other_pass():
    mask = mask_of((64, 64))
    inputs = inputs_of(mask, 2, 16, "bfloat16")
    contender = PEER.enter(Task(mask, [(*inputs, inputs[0])]))
    for direction in ("backward", "forward_backward"):
        with pytest.raises(NoSuchPass, match="no gradients"):
            contender.ready(direction)


def test_says_what_it_needs(monkeypatch):
    assert PEER.available() == "it needs an NVIDIA GPU, and JAX computes on cpu"
    monkeypatch.setattr(_grouped_gemm, "no_gpu", lambda: None)
    monkeypatch.setattr(_hopper, "compute_capability", lambda: "10.0")
    assert PEER.available() == (
        "it needs compute capability 9.0, and this GPU has 10.0"
    )
    monkeypatch.setattr(_hopper, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(cutlass, "_library_file", lambda: None)
    assert (PEER.available() or "").startswith("this jsparse was built without")
    monkeypatch.setattr(cutlass, "library", lambda: ctypes.CDLL(None))
    assert PEER.available() is None


def test_takes_whole_blocks_only():
    assert PEER.why_not(mask_of((64, 64))) is None
    rng = np.random.default_rng(0)
    partial = of_coords(rng.uniform(0, 40, (500, 3)).astype(np.float32)).mask
    assert "whole blocks only" in (PEER.why_not(partial) or "")


def test_lists_are_by_row():
    lists = Lists.of(mask_of((64, 128)))
    assert lists.row_start.tolist() == [0, 3, 3, 4, 6]
    assert lists.rows.tolist() == [0, 0, 0, 2, 3, 3]
    assert lists.columns.tolist() == [0, 2, 4, 1, 0, 3]
    assert lists.blocks == (64, 128)
