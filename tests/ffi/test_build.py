"""What can be tested of the build and of the built library without a GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import tomllib

import pytest

from jsparse.backends import cutlass
from jsparse.pallas_kernels._common import NUM_FIELDS
from jsparse.pallas_kernels.mosaic_gpu._persistent import FLAGGED
from tests.ffi.c_interface import Args, BackwardArgs, Bias, Schedule, Turns
from tests.ffi.conftest import FFI

PYPROJECT = FFI.parent / "pyproject.toml"


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
@pytest.mark.parametrize("header", ["forward", "backward"])
def test_a_header_stands_alone(tmp_path, header, compiler):
    if not FFI.is_dir() or shutil.which(compiler) is None:
        pytest.skip(f"needs the sources in ffi/ and {compiler}")
    source = tmp_path / ("use.c" if compiler == "gcc" else "use.cc")
    call = {
        "forward": "jsparse_forward(args, 0, message, 80)",
        "backward": "jsparse_backward_dq(args, 0, 0, 0, 0, message, 80)",
    }[header]
    source.write_text(
        f'#include "jsparse/{header}.h"\n'
        f"int use(const jsparse_{header}_args *args) {{\n"
        f"  char message[80];\n  return {call};\n}}\n"
    )
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"]
    subprocess.run([compiler, *flags, f"-I{FFI / 'include'}", str(source)], check=True)


def test_the_kernels_are_built_for_the_oldest_jaxlib():
    if not PYPROJECT.is_file() or not FFI.is_dir():
        pytest.skip("needs the checkout")
    settings = tomllib.loads(PYPROJECT.read_text("utf-8"))
    (oldest,) = (x for x in settings["project"]["dependencies"] if x.startswith("jax>"))
    (override,) = (
        x for x in settings["tool"]["scikit-build"]["overrides"] if "env" in x["if"]
    )
    assert oldest.replace("jax>=", "jaxlib==") in override["build"]["requires"]


def test_items_are_those_of_the_schedules():
    if not FFI.is_dir():
        pytest.skip("needs the sources in ffi/")
    header = (FFI / "include/jsparse/types.h").read_text("utf-8")
    assert f"#define JSPARSE_ITEM_FIELDS {NUM_FIELDS}\n" in header
    assert f"#define JSPARSE_MAX_RULES {cutlass.MOST_RULES}\n" in header
    assert "#define JSPARSE_FLAGGED (1 << 30)\n" in header and FLAGGED == 1 << 30


def test_every_kernel_has_a_file():
    if not FFI.is_dir():
        pytest.skip("needs the sources in ffi/")
    passes = "forward", "forward_bias", "backward", "backward_bias", "gradients"
    expected = itertools.product(passes, cutlass.HEAD_SIZES)
    files = {x.stem: x.read_text("utf-8") for x in (FFI / "instantiate").glob("*.cu")}
    assert files.keys() == {f"{p}_d{d}" for p, d in expected}
    for text in files.values():
        kernels = re.findall(r"launch_\w+<JSPARSE_(\w+), (.*)>", text)
        assert {dtype for dtype, _ in kernels} == {"BFLOAT16", "FLOAT16"}
        assert len(set(kernels)) == len(kernels) == 2 * len({x for _, x in kernels})


@pytest.fixture
def library() -> ctypes.CDLL:
    if cutlass._library_file() is None:
        pytest.skip("needs the built library: make cuda")
    found = cutlass._library()
    assert isinstance(found, ctypes.CDLL), found
    return found


def test_the_library_loads_without_a_gpu(library):
    for sizes in itertools.product((32, 64, 128), (64, 128), (64, 128)):
        for bias_size in (0, 2, 4):
            walkers = library.jsparse_forward_walkers(*sizes, False, bias_size)
            assert walkers in (1, 2, 3, 4)
    for dim, tile in ((32, 128), (64, 128), (128, 64)):
        assert library.jsparse_forward_walkers(dim, 64, 128, True, 0) == 1
        assert library.jsparse_forward_walkers(dim, 64, 128, True, 2) == 0
        assert library.jsparse_backward_tile(dim, 128, 128) == tile
        assert library.jsparse_backward_tile(dim, 128, 64) == 0
    assert library.jsparse_forward_walkers(32, 256, 128, False, 2) == 1
    assert library.jsparse_forward_walkers(32, 256, 128, False, 0) == 0
    assert library.jsparse_forward_walkers(64, 128, 128, False, 3) == 0
    for sizes in [(44, 64, 64, False), (64, 32, 64, False), (64, 128, 64, True)]:
        assert library.jsparse_forward_walkers(*sizes, 0) == 0
    for sizes in itertools.product((0, 1), (32, 64, 128), (64, 128), (64, 128)):
        assert library.jsparse_backward_walkers(*sizes) in (1, 2)
    assert library.jsparse_backward_walkers(0, 136, 64, 64) == 0


@pytest.mark.parametrize("dim, kernel", [(8, 32), (40, 64), (48, 64), (72, 128)])
def test_head_sizes_in_between_have_the_next_kernel(library, dim, kernel):
    forward = library.jsparse_forward_walkers
    backward = library.jsparse_backward_walkers
    for rest in itertools.product((64, 128), (64, 128), (False,), (0, 2)):
        assert forward(dim, *rest) == forward(kernel, *rest)
    for keys, *rest in itertools.product((0, 1), (64, 128), (64, 128)):
        assert backward(keys, dim, *rest) == backward(keys, kernel, *rest)
    tile = library.jsparse_backward_tile
    assert tile(dim, 128, 128) == tile(kernel, 128, 128) > 0


def test_the_c_interface_says_what_is_wrong(library):
    zeros = (ctypes.c_byte * 1024)()
    message = ctypes.create_string_buffer(80)
    assert library.jsparse_forward(zeros, None, message, len(message)) != 0
    assert message.value == b"batch=0; expected at least 1"
    found = library.jsparse_backward_dq(
        *(zeros, zeros, None, None, None, message, len(message))
    )
    assert found != 0
    assert message.value == b"batch=0; expected at least 1"
    found = library.jsparse_backward_dkv(
        *(zeros, None, zeros, *[None] * 5, message, len(message))
    )
    assert found != 0
    assert message.value == b"batch=0; expected at least 1"
    short = ctypes.create_string_buffer(8)
    assert library.jsparse_forward(zeros, None, short, len(short)) != 0
    assert short.value == b"batch=0"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": 7}, "dtype=7; expected JSPARSE_FLOAT16 or JSPARSE_BFLOAT16"),
        ({"q_len": 0}, "q_len=0; expected at least 1"),
        ({"num_kv_heads": 3}, "num_heads=2; expected a multiple of num_kv_heads"),
        ({"head_dim": 44}, "head_dim=44; expected a multiple of 8 up to 128"),
        ({"head_dim": 136}, "head_dim=136; expected a multiple of 8 up to 128"),
        ({"head_dim": 0}, "head_dim=0; expected a multiple of 8 up to 128"),
        ({"block_q": 32}, "block_q=32; expected 64 or 128"),
        ({"block_kv": 32}, "block_kv=32; expected 64 or 128"),
        ({"scale": -1.0}, "scale=-1.000000; expected a positive number"),
        ({"scale": float("nan")}, "scale=nan; expected a positive number"),
        ({"scale": float("inf")}, "scale=inf; expected a positive number"),
        ({"share": 1}, "share=1; expected 0 unless tile_q is 64"),
        ({"share": 1, "tile_q": 64}, "share=1; expected 0 beside a bias"),
        ({"tile_q": 256}, "tile_q=256; expected 64, block_q, or 256 beside a bias"),
        (
            {"tile_q": 256, "head_dim": 32, "values": None},
            "tile_q=256; expected 64, block_q, or 256 beside a bias",
        ),
        (
            {"tile_q": 256, "head_dim": 32, "num_rules": 1},
            "tile_q=256; expected 64, block_q, or 256 beside a bias",
        ),
        ({"num_workers": 0}, "num_workers=0; expected a multiple of"),
        ({"num_split_rows": -1}, "num_split_rows=-1; expected at least 0"),
        ({"num_rules": 5}, "num_rules=5; expected at most JSPARSE_MAX_RULES"),
        ({"q": None}, "q is NULL; expected an array"),
        ({"item_count": None}, "item_count is NULL; expected an array"),
        ({"lse": None}, "lse is NULL; expected an array"),
        ({"num_split_rows": 1}, "most_parts=0; expected at least 1"),
        ({"num_split_rows": 1, "most_parts": 2}, "split_rows is NULL"),
        (
            {"num_split_rows": 1, "most_parts": 2, "split_rows": 1 << 20}
            | {"split_slots": 1 << 20},
            "part_out is NULL; expected an array",
        ),
        ({"num_rules": 1}, "rules[].first is NULL; expected an array"),
        (
            {"num_blocks": 4, "rows": 128, "columns": 128},
            "bias.partial_numbers and bias.full_numbers are NULL",
        ),
        ({"out": 1 << 20 | 8}, "out is not aligned; expected a multiple of 16 bytes"),
        ({"entries": 0}, "bias.entries=0; expected at least 1"),
        ({"inner": 0}, "bias.inner=0; expected at least 1"),
        ({"heads": 3}, "bias.heads=3; expected 1 or num_heads"),
        ({"num_blocks": -1}, "bias.num_blocks=-1; expected at least 0"),
        ({"num_blocks": 4}, "bias.rows=100; expected block_q"),
        ({"rows": 128}, "bias.rows=128; expected q_len, or 1 of a bias in float32"),
        (
            {"columns": 201},
            "bias.columns=201; expected whole 16 bytes, at least kv_len",
        ),
        (
            {"columns": 198},
            "bias.columns=198; expected whole 16 bytes, at least kv_len",
        ),
        ({"values": 1 << 20 | 8}, "bias.values is not aligned; expected"),
    ],
    ids=str,
)
def test_the_c_interface_refuses(library, change, reason):
    args = Args(
        *(0, 1, 100, 200, 2, 1, 64, 128, 128, 128, 0),
        **dict.fromkeys(("q", "k", "v", "out", "lse"), 1 << 20),
        scale=1.0,
        schedule=_one_item(library.jsparse_forward_walkers(64, 128, 128, 0, 0)),
        bias=Bias(1 << 20, 2, 1, 1, 2, 0, 100, 200),
    )
    for name, value in change.items():
        parts = (args.schedule, args.elements, args, args.bias)
        setattr(next(x for x in parts if hasattr(x, name)), name, value)
    message = ctypes.create_string_buffer(200)
    assert library.jsparse_forward(ctypes.byref(args), None, message, len(message)) != 0
    assert message.value.decode().startswith(reason)


@pytest.mark.parametrize(
    "dtype, head_dim, rows, reason",
    [
        (1, 64, 100, "bias.dtype=1; expected dtype for all gradients in one launch"),
        (2, 64, 100, "bias.dtype=2; expected dtype for all gradients in one launch"),
        (
            0,
            128,
            100,
            "head_dim=128; expected at most 64 for all gradients beside a bias",
        ),
        (2, 64, 1, "bias.dtype=2; expected dtype for all gradients in one launch"),
    ],
)
def test_all_gradients_refuse_another_bias(library, dtype, head_dim, rows, reason):
    args = BackwardArgs(
        *(0, 1, 100, 200, 2, 2, head_dim, 128, 128),
        **dict.fromkeys(("q", "k", "v", "dout", "lse2", "delta"), 1 << 20),
        scale=1.0,
        schedule=_one_item(1),
        bias=Bias(1 << 20, dtype, 1, 1, 2, 0, rows, 200),
    )
    message = ctypes.create_string_buffer(200)
    turns = Turns(1 << 20, 1 << 20, 1, 1 << 20, 1 << 20, None)
    results = (*[ctypes.c_void_p(1 << 20)] * 3, *[None] * 3)
    call = ctypes.byref(args), ctypes.byref(turns), *results, None
    assert library.jsparse_backward(*call, message, len(message)) != 0
    assert message.value.decode() == reason


def test_the_forward_pass_refuses_a_bias_of_another_dtype(library):
    args = Args(
        *(0, 1, 100, 200, 2, 1, 64, 128, 128, 128, 0),
        **dict.fromkeys(("q", "k", "v", "out", "lse"), 1 << 20),
        scale=1.0,
        schedule=_one_item(2),
        bias=Bias(1 << 20, 1, 1, 1, 2, 0, 100, 200),
    )
    message = ctypes.create_string_buffer(200)
    assert library.jsparse_forward(ctypes.byref(args), None, message, len(message)) != 0
    assert message.value.decode() == "bias.dtype=1; expected dtype or JSPARSE_FLOAT32"


def _one_item(workers: int) -> Schedule:
    return Schedule(
        num_workers=workers, items_per_worker=1, item_count=1 << 20, items=1 << 20
    )


@pytest.mark.parametrize(
    "keys, rows, heads, reason",
    [
        (False, 100, 1, "dbias is given; expected a bias that nobody shares"),
        (False, 1, 2, "dbias is given; expected a bias that nobody shares"),
        (True, 100, 2, "by_key is given; expected a bias by key"),
    ],
)
def test_the_c_interface_refuses_gradients_of_another_bias(
    library, keys, rows, heads, reason
):
    args = BackwardArgs(
        *(0, 1, 100, 200, 2, 1, 64, 128, 128),
        **dict.fromkeys(("q", "k", "v", "dout", "lse2", "delta"), 1 << 20),
        scale=1.0,
        schedule=_one_item(library.jsparse_backward_walkers(keys, 64, 128, 128)),
        bias=Bias(1 << 20, 2, 1, 1, heads, 0, rows, 200),
    )
    message = ctypes.create_string_buffer(200)
    array = ctypes.c_void_p(1 << 20)
    results = (array, array, None, None, array, None) if keys else (array, None, array)
    launch = library.jsparse_backward_dkv if keys else library.jsparse_backward_dq
    assert launch(ctypes.byref(args), *results, None, message, len(message)) != 0
    assert message.value.decode() == reason


def test_the_baseline_says_what_it_needs(library):
    most, some = map(library.jsparse_grouped_gemm_workspace, (132, 1))
    # Descriptors for each multiprocessor: of both operands, and of the result twice.
    assert (some, most) == (4 * 128, 132 * 4 * 128)
