"""What the CUTLASS backend refuses, with which words, and what it lowers to."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

import jsparse
from jsparse import BlockMask, block_sparse_attention
from jsparse.backends import _hopper, cutlass
from jsparse.backends._contract import HostPattern, Operands
from tests.backends.test_mosaic_gpu import TAKEN
from tests.pallas_kernels.launches import H100
from tests.support.cases import (
    CASES,
    MOVES,
    biases,
    make_case,
    of_all_blocks,
    random_mask,
    with_bias,
)

REFUSED = {
    "it needs an H100 or H200, and JAX computes on cpu": {"platform": "cpu"},
    "dtype float32; expected bfloat16 or float16": {"dtype": "float32"},
    "head size 144; expected at most 128": {"value_dim": 144},
    "block_q=32; expected 64 or 128": {"block_q": 32},
    "block_kv=32; expected 64 or 128": {"block_kv": 32},
    "5 element rules; expected at most 4": {"rules": ("Window",) * 5},
    "a table bias; expected dense or block, or none": {"bias": "table"},
}


class Library:
    """Stands for a loaded library where nothing is launched."""

    @staticmethod
    def jsparse_forward_walkers(*sizes: int) -> int:
        return 2

    @staticmethod
    def jsparse_backward_walkers(*sizes: int) -> int:
        return 1

    @staticmethod
    def jsparse_backward_tile(head_dim: int, block_q: int, block_kv: int) -> int:
        return 128 if (block_q, block_kv) == (128, 128) else 0


def _install_at(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes the package be in ``folder``, as far as its library is looked for."""
    monkeypatch.setattr(jsparse.__spec__, "submodule_search_locations", [str(folder)])


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """As on an H100 with the library built."""
    monkeypatch.setattr(_hopper, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(cutlass, "_library_file", lambda: tmp_path / cutlass.LIBRARY)
    monkeypatch.setattr(cutlass, "_library", Library)


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A library file that is none, made by ``built(jaxlib)``."""
    monkeypatch.setattr(_hopper, "compute_capability", lambda: "9.0")
    _install_at(monkeypatch, tmp_path)
    cutlass._library.cache_clear()

    def make(jaxlib: str):
        folder = tmp_path / "_lib"
        folder.mkdir()
        (folder / cutlass.LIBRARY).write_bytes(b"no library")
        (folder / "build.json").write_text(json.dumps({"jaxlib": jaxlib}), "utf-8")
        return folder / cutlass.LIBRARY

    yield make
    cutlass._library.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_dim": 24, "value_dim": 128},
        {"block_q": 64, "block_kv": 128},
        {"bias": "block"},
    ],
    ids=str,
)
def test_takes_what_its_kernels_take(hopper, change):
    assert cutlass.why_not(dataclasses.replace(TAKEN, **change)) is None


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(hopper, reason):
    assert cutlass.why_not(dataclasses.replace(TAKEN, **REFUSED[reason])) == reason


def test_not_built(monkeypatch, tmp_path):
    _install_at(monkeypatch, tmp_path)
    assert cutlass.why_not(TAKEN) == (
        "this jsparse was built without its CUDA kernels; build them with "
        "JSPARSE_CUDA=1, as ffi/README.md says"
    )


def test_wrong_gpu(built, monkeypatch):
    built("0.0.1")
    monkeypatch.setattr(_hopper, "compute_capability", lambda: "10.0")
    assert cutlass.why_not(TAKEN) == (
        "it needs compute capability 9.0, and this GPU has 10.0"
    )


def will_not_load(path: Path) -> str:
    """Why, as the backend says it."""
    reason = cutlass.why_not(TAKEN) or ""
    assert reason == cutlass.library()
    start, end = f"{path} will not load: ", "; build it again"
    assert reason.startswith(start)
    assert reason.endswith(end)
    return reason[len(start) : -len(end)]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it has 0 bytes and is no library"),
        (b"no library", "it has 10 bytes and is no library"),
        (b"no library" * 10, "it is no library for a 64-bit system"),
    ],
)
def test_will_not_load(built, content, reason):
    path = built("0.0.1")
    path.write_bytes(content)
    assert will_not_load(path) == reason


@pytest.fixture
def compiled(built, tmp_path):
    """A library that loads, of another time: it has no handler."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    path = built("0.0.1")
    source = tmp_path / "empty.c"
    source.write_text("char some[1 << 20] = {1};\n", "utf-8")
    command = ["gcc", "-shared", "-fPIC", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_cut_short(compiled, kept):
    # Loaded, it would end this process.
    content = compiled.read_bytes()
    size = int(len(content) * kept)
    compiled.write_bytes(content[:size])
    reason = f"it is cut short, {size} bytes of {len(content)}"
    assert will_not_load(compiled) == reason


def test_of_another_time(compiled):
    assert "undefined symbol: jsparse_forward_ffi" in will_not_load(compiled)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cuda": "13.0"}'])
def test_build_that_is_not_known(built, text):
    path = built("0.0.1")
    path.with_name("build.json").write_text(text, "utf-8")
    assert will_not_load(path).startswith("build.json beside it names no jaxlib (")
    path.with_name("build.json").unlink()
    cutlass._library.cache_clear()
    assert will_not_load(path) == "build.json beside it does not exist"


def test_built_for_a_newer_jaxlib(built):
    path = built("99.10.2")
    assert (cutlass.why_not(TAKEN) or "").startswith(
        f"{path} was built for jaxlib 99.10.2 and will not load into jaxlib "
    )


def test_versions_are_numbers():
    assert cutlass._numbers("0.11.2") < cutlass._numbers("0.12.0.1")
    assert cutlass._numbers("0.9.0") < cutlass._numbers("0.11.2.dev20261101")


@pytest.mark.parametrize("name", ["plain", "batch_and_head_patterns", "distance"])
def test_lowers_with_its_gradients(hopper, monkeypatch, name):
    monkeypatch.setattr(cutlass, "why_not", cutlass._not_taken)
    case = CASES[name](np.random.default_rng(0), (300, 500, 128, 64)).cast("bfloat16")

    @jax.jit
    def gradients(q, k, v, mask):
        def loss(q, k, v):
            out = block_sparse_attention(q, k, v, mask, implementation="cutlass")
            return out.astype("float32").sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    traced = gradients.trace(case.q, case.k, case.v, case.mask)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert launches_of(text) == (1, 1, 1, 0)
    assert text.count("block_kv = 64 : i32, block_q = 128 : i32") == 3
    assert "mosaic_gpu" not in text


def launches_of(text: str) -> tuple[int, ...]:
    """How often a lowered program calls each of `cutlass.TARGETS`."""
    return tuple(text.count(f"@{target}(") for target in cutlass.TARGETS)


@pytest.mark.parametrize("known, blocks", [(True, 20), (True, 3), (False, 20)])
def test_lowers_to_one_launch_of_many_blocks_that_are_known(
    hopper, monkeypatch, known, blocks
):
    monkeypatch.setattr(cutlass, "why_not", cutlass._not_taken)
    rng = np.random.default_rng(0)
    rows, columns = (x.reshape(-1) for x in np.indices((3, blocks)))
    mask = BlockMask.from_blocks(rows, columns, q_len=300, kv_len=128 * blocks)
    case = make_case(rng, mask, heads=(2, 1), dims=(32, 32)).cast("bfloat16")

    def gradients(q, k, v, mask):
        def loss(q, k, v):
            out = block_sparse_attention(q, k, v, mask, implementation="cutlass")
            return out.astype("float32").sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    arrays = case.q, case.k, case.v
    if known:
        traced = jax.jit(lambda q, k, v: gradients(q, k, v, mask)).trace(*arrays)
    else:
        traced = jax.jit(gradients).trace(*arrays, mask)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    one = known and blocks > 16
    assert launches_of(text) == ((1, 0, 0, 1) if one else (1, 1, 1, 0))


@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("kind", ["dense", "dense_2d", "per_key", "block"])
def test_lowers_with_a_bias(hopper, monkeypatch, kind, differentiated):
    monkeypatch.setattr(cutlass, "why_not", cutlass._not_taken)
    rng = np.random.default_rng(0)
    mask = random_mask(rng, (300, 500, 128, 64), 12)
    bias = biases(rng, mask, 2, 1)[kind]
    mesh = AbstractMesh((), (), abstract_device=H100)
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), "bfloat16") for n in (300, 500))

    def loss(q, k, v, bias):
        out = block_sparse_attention(q, k, v, mask, bias=bias, implementation="cutlass")
        return out.astype("float32").sum()

    # Also where an application forbids it in its own code: see promotes_ranks.
    with use_abstract_mesh(mesh), jax.numpy_rank_promotion("raise"):
        gradients = jax.grad(loss, (0, 1, 2, 3)[: 4 if differentiated else 3])
        traced = jax.jit(gradients).trace(q, k, k, bias)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert launches_of(text) == (1, 1, 1, 0)
    # Only the gradient of a bias that heads share takes another kernel.
    assert ("mosaic_gpu" in text) == (differentiated and kind == "dense_2d")


@pytest.mark.parametrize("part", [jax.P("x"), jax.P(None, None, "x")], ids=str)
def test_lowers_inside_shard_map_and_moves_nothing(hopper, monkeypatch, part):
    monkeypatch.setattr(cutlass, "why_not", cutlass._not_taken)
    mask = random_mask(np.random.default_rng(0), (300, 500, 128, 64), 12)
    mesh = AbstractMesh((2,), ("x",), (AxisType.Auto,), abstract_device=H100)
    q, k = (jax.ShapeDtypeStruct((2, n, 2, 64), "bfloat16") for n in (300, 500))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(part,) * 3, out_specs=part)
    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask, implementation="cutlass")

    with use_abstract_mesh(mesh):
        traced = jax.jit(attend).trace(q, k, k)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jsparse_forward(") == 1
    # A device's own part: half of the batch entries, or of the heads.
    half = "1x300x2x64" if part == jax.P("x") else "2x300x1x64"
    (call,) = (line for line in text.splitlines() if "@jsparse_forward(" in line)
    assert f"tensor<{half}xbf16>" in call
    assert not [word for word in MOVES if word.replace("-", "_") in text]


@pytest.mark.parametrize("batch, items", [(1, (64, True)), (9, (128, False))])
def test_few_rows_are_computed_together(batch, items):
    rng = np.random.default_rng(0)
    mask = random_mask(rng, (1000, 1000, 128, 128), 30)
    case = make_case(rng, mask, batch=(batch,), heads=(1, 1))
    operands = Operands(case.q, case.k, case.v, mask, None)
    call = _hopper.Call.of(operands, 1.0, None)
    assert cutlass._Items.of(call) == items


@pytest.mark.parametrize(
    "sizes, dim, bias, tile_q",
    [
        ((1000, 700), 32, "dense", 256),
        ((1000, 700), 24, "dense", 256),
        ((1000, 700), 64, "dense", 128),
        ((1000, 700), 32, "block", 128),
        ((100, 700), 32, "dense", 128),
    ],
)
def test_rows_of_all_blocks_are_computed_two_by_two(sizes, dim, bias, tile_q):
    mask = of_all_blocks(*sizes)
    case = make_case(np.random.default_rng(0), mask, batch=(4,), dims=(dim, dim))
    case = with_bias(case, bias, "bfloat16")
    operands = Operands(case.q, case.k, case.v, mask, case.bias)
    known = _hopper.Call.of(operands, 1.0, HostPattern.of(mask))
    assert cutlass._Items.of(known) == (tile_q, False)
    traced = _hopper.Call.of(operands, 1.0, None)
    assert cutlass._Items.of(traced) == (128, False)


@pytest.mark.parametrize("q_len", [512, 600, 640])
def test_lists_of_two_rows(q_len):
    mask = of_all_blocks(q_len, 700)
    case = make_case(np.random.default_rng(0), mask)
    operands = Operands(case.q, case.k, case.v, mask, None)
    lists = _hopper.Call.of(operands, 1.0, HostPattern.of(mask)).rows
    partial, full = cutlass._paired(lists, mask.num_kv_blocks)[:2]
    ends = -(-q_len // 256) - 1, mask.num_kv_blocks - 1
    for row in range(ends[0] + 1):
        n, m = partial.count[0, 0, row], full.count[0, 0, row]
        found = *partial.column[0, 0, row, :n], *full.column[0, 0, row, :m]
        assert sorted(found) == list(range(ends[1] + 1))
        is_last = row == ends[0] and q_len % 128 != 0
        expected = range(ends[1] + 1) if is_last else [ends[1]]
        assert list(partial.column[0, 0, row, :n]) == list(expected)


def test_not_loading_is_not_silent(monkeypatch):
    monkeypatch.setattr(cutlass, "_library", lambda: "it will not load")
    none = cutlass._BiasOperands(*[np.zeros(0)] * 3, inner=1)
    with pytest.raises(NotImplementedError, match="it will not load"):
        cutlass._walkers(64, cutlass._Items(128, share=False), 128, none)


def test_library_is_a_ctypes_library_where_it_is_built():
    if cutlass._library_file() is None:
        pytest.skip("needs the built library: make cuda")
    assert isinstance(cutlass._library(), ctypes.CDLL)
