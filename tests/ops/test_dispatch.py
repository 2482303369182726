"""How ``auto`` chooses where two backends can, by a table of measurements."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jsparse import ScoreFunction, block_sparse_attention
from jsparse.backends import _hopper, _measured, cutlass, mosaic_gpu, xla
from jsparse.backends._contract import HostPattern
from jsparse.bench import write_entries
from jsparse.ops import _dispatch
from jsparse.ops._checks import canonical, describe
from jsparse.ops._dispatch import Auto, Choice, choice, choices, choose
from jsparse.pallas_kernels import _common
from jsparse.patterns import window
from tests.backends.test_mosaic_gpu import TAKEN
from tests.support.cases import of_all_blocks

MEASURED = {"case": "some_case", "ratio": 0.9}
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """As on an H100 on which both implementations can."""
    monkeypatch.setattr(_hopper, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(_measured, "device_kind", lambda: H100)
    monkeypatch.setattr(cutlass, "why_not", lambda problem: None)


@pytest.fixture
def table(tmp_path: Path):
    """``table(forward=..., backward=...)`` writes a table and reads it again."""

    def make(**fastest: str):
        file = tmp_path / "measured.json"
        entries = [
            _measured.entry_of(_measured.Key.of(TAKEN, direction), name, MEASURED)
            for direction, name in fastest.items()
        ]
        write_entries(file, entries, "choices")
        return {_measured.key_of(x): x for x in _measured.parse(file.read_text())}

    return make


def test_the_largest_array_of_a_score_function_counts():
    """Kernels that index with 32 bits refuse those beyond."""
    mask, found = window(128, left=9, right=9), []

    def score(s, i, j, h, table, slopes):
        return s + table[i, j] * slopes[h]

    def attend(x, *arrays):
        operands = canonical(x, x, x, mask, ScoreFunction(score, arrays))
        found.append(describe(operands, None).bias_weights)

    shapes = (128, 1, 16), (2**16, 2**15), (1,)
    jax.eval_shape(attend, *(jax.ShapeDtypeStruct(x, "float32") for x in shapes))
    assert found == [2**31]


def test_it_depends_on_where_arrays_are_and_on_what_jax_was_told(monkeypatch):
    """Not on where it would compute otherwise."""
    cpu = jax.devices("cpu")[0]
    x = jax.device_put(np.ones((128, 1, 16), np.float16), cpu)
    mask = window(128, left=9, right=9)

    def where(x):
        return describe(canonical(x, x, x, mask, None), None).platform

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = []
    traced = jax.jit(lambda x: found.append(where(x)))
    jax.eval_shape(traced, x)
    with jax.default_device(cpu):
        jax.eval_shape(traced, x)
        assert not _common.on_hopper()
    assert (where(x), *found) == ("cpu", "gpu", "cpu")


def test_without_an_entry_the_first_is_taken(table):
    assert choice("auto", TAKEN, table()) == (
        "mosaic_gpu",
        "mosaic_gpu",
        "forward was not measured: mosaic_gpu comes first; "
        "backward was not measured: mosaic_gpu comes first",
    )
    assert choice("auto", TAKEN) == choice("auto", TAKEN, table())
    assert choose("auto", TAKEN) == Auto("gpu")


def test_the_faster_is_taken_in_each_pass(table):
    found = choice("auto", TAKEN, table(forward="cutlass"))
    assert found == (
        "cutlass",
        "mosaic_gpu",
        "forward: cutlass was faster on some_case; "
        "backward was not measured: mosaic_gpu comes first",
    )
    assert found.implementation == "auto"
    found = choice("auto", TAKEN, table(forward="cutlass", backward="cutlass"))
    assert found[:2] == ("cutlass", "cutlass")
    assert found.implementation == "cutlass"
    found = choice("auto", TAKEN, table(forward="mosaic_gpu"))
    assert found[:2] == ("mosaic_gpu", "cutlass")
    assert "forward: mosaic_gpu was faster on some_case" in found.reason


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 80},
        {"value_dim": 128},
        {"block_q": 64},
        {"block_kv": 128},
        {"batch": 1000, "most_blocks": 100},
        {"bias": "dense", "bias_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_other_problems_have_no_entry(table, change):
    other = dataclasses.replace(TAKEN, **change)
    assert choice("auto", other, table(forward="cutlass")).forward == "mosaic_gpu"


BIASED = dataclasses.replace(TAKEN, bias="dense", bias_dtype=TAKEN.dtype, bits=False)


@pytest.mark.parametrize(
    "change",
    [
        *({"bias_dtype": "float32"}, {"bias_dtype": "float16"}),
        *({"bias_by_key": True}, {"bias": "block"}, {"bias": None}),
        *({"bits": True}, {"rules": ("SameLabel",)}),
    ],
    ids=str,
)
def test_another_bias_has_no_entry(table, change):
    key = _measured.Key.of(BIASED, "forward")
    assert (key.bias, key.bias_bits) == ("dense", 16)
    biased = {key: _measured.entry_of(key, "cutlass", MEASURED)}
    assert choice("auto", BIASED, biased).forward == "cutlass"
    other = dataclasses.replace(BIASED, **change)
    assert choice("auto", other, biased).forward == "mosaic_gpu"


ROWS_OF_MANY = dataclasses.replace(TAKEN, block_kv=128, most_blocks=64, mean_blocks=32)


@pytest.mark.parametrize(
    "change",
    [
        *({"mean_blocks": 31.0}, {"mean_blocks": None}, {"block_q": 64}),
        *({"head_dim": 160}, {"batch": 1 << 17}),
        *(
            {"bias": "dense", "bias_dtype": x, "bias_by_key": key}
            for x, key in (("float32", False), ("bfloat16", True))
        ),
        {"bias": "dense", "bias_dtype": "bfloat16", "head_dim": 128},
    ],
    ids=str,
)
def test_one_launch_for_all_gradients_is_another_kernel(change):
    assert _measured.Key.of(ROWS_OF_MANY, "backward").gradient_launches == 1
    assert _measured.Key.of(ROWS_OF_MANY, "forward").gradient_launches == 0
    other = dataclasses.replace(ROWS_OF_MANY, **change)
    assert _measured.Key.of(other, "backward").gradient_launches == 2


@pytest.mark.parametrize(
    "dim, bias, joins",
    [
        *((64, None, True), (128, None, True), (72, None, True)),
        *((64, "bfloat16", True), (48, "bfloat16", True), (72, "bfloat16", False)),
        *((64, "float32", False), (64, "float16", False), (64, "by_key", False)),
    ],
)
def test_a_problem_tells_how_many_launches_there_are(monkeypatch, dim, bias, joins):
    """What the choice rests on is what the backend does."""
    monkeypatch.setattr(
        cutlass,
        "_loaded",
        lambda: SimpleNamespace(
            jsparse_backward_tile=lambda dim, *blocks: 128 if dim <= 64 else 64
        ),
    )
    for length in (15 * 128, 16 * 128):
        mask = of_all_blocks(length - 7, length - 7)  # partial at the ends
        shapes = [jax.ShapeDtypeStruct((length - 7, 2, dim), "bfloat16")] * 3
        if bias is not None:
            rows = 1 if bias == "by_key" else length - 7
            dtype = "bfloat16" if bias == "by_key" else bias
            shapes.append(jax.ShapeDtypeStruct((2, rows, length - 7), dtype))
        found = []

        def ask(q, k, v, bias=None, mask=mask, found=found):
            operands = canonical(q, k, v, mask, bias)
            for pattern in (HostPattern.of(mask), None):
                call = _hopper.Call.of(operands, 1.0, pattern, 8)
                launches = cutlass.gradient_launches(describe(operands, pattern))
                found.append((launches == 1, bool(cutlass._one_launch(call, dim))))

        jax.eval_shape(ask, *shapes)
        assert found == [(joins and length == 16 * 128,) * 2, (False, False)]


def test_choices_are_listed():
    mask = window(128, left=9, right=9)
    x = jax.ShapeDtypeStruct((128, 1, 16), "float32")
    attend = functools.partial(block_sparse_attention, implementation="xla")
    compiled = jax.jit(lambda x: attend(x, x, x, mask))
    for _ in range(2):
        with choices() as made:
            jax.eval_shape(compiled, x)
        assert [found.implementation for _, found in made] == ["xla"]
    assert not _dispatch._listeners


def test_another_gpu_counts_where_this_one_was_not_measured(table, monkeypatch):
    of_h100 = table(forward="cutlass", backward="cutlass")
    monkeypatch.setattr(_measured, "device_kind", lambda: "NVIDIA H200")
    of_h200 = table(forward="mosaic_gpu")
    assert choice("auto", TAKEN, of_h100 | of_h200) == (
        "mosaic_gpu",
        "cutlass",
        "forward: mosaic_gpu was faster on some_case; "
        f"backward: cutlass was faster on some_case ({H100})",
    )


@pytest.mark.parametrize("change", [{"head_dim": 50}, {"dtype": "float16"}], ids=str)
def test_problems_of_one_kernel_share_an_entry(table, change):
    other = dataclasses.replace(TAKEN, **change)
    assert choice("auto", other, table(forward="cutlass")).forward == "cutlass"


def test_who_refuses_is_not_taken(table, monkeypatch):
    both = table(forward="cutlass", backward="cutlass")
    monkeypatch.setattr(cutlass, "why_not", lambda problem: "not built")
    assert choice("auto", TAKEN, both) == (
        *("mosaic_gpu", "mosaic_gpu", "mosaic_gpu comes first"),
    )
    both = table(forward="mosaic_gpu", backward="mosaic_gpu")
    monkeypatch.setattr(cutlass, "why_not", lambda problem: None)
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: "no")
    assert choice("auto", TAKEN, both).implementation == "cutlass"


def test_who_is_asked_for_is_taken(table):
    both = table(forward="cutlass", backward="cutlass")
    assert choice("mosaic_gpu", TAKEN, both) == (
        *("mosaic_gpu", "mosaic_gpu", "mosaic_gpu was asked for"),
    )


def test_the_shipped_table_is_asked(table, monkeypatch, tmp_path):
    table(forward="cutlass")
    monkeypatch.setattr(_measured, "FILE", tmp_path / "measured.json")
    monkeypatch.setattr(_measured, "shipped", _measured.shipped.__wrapped__)
    assert choice("auto", TAKEN).forward == "cutlass"
    assert choice("auto", TAKEN).backward == "mosaic_gpu"
    found = choose("auto", TAKEN)
    assert found == choose("auto", TAKEN) == Auto("gpu")
    assert hash(found) == hash(choose("auto", TAKEN))
    assert choose("cutlass", TAKEN) == cutlass


def test_the_shipped_table_can_be_read():
    assert all(
        entry["fastest"] in _measured.RIVALS
        for entry in _measured.parse(_measured.FILE.read_text("utf-8"))
    )


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        json.dumps({"format": 1, "entries": []}),
        json.dumps({"format": 2, "entries": [{}]}),
        json.dumps(
            {
                "format": 2,
                "entries": [
                    _measured.entry_of(
                        _measured.Key(H100, "forward", 64, 64, 128, 128, "many"),
                        "xla",
                        MEASURED,
                    )
                ],
            }
        ),
    ],
)
def test_other_files_are_refused(text):
    with pytest.raises((ValueError, KeyError)):
        _measured.parse(text)


class Named:
    """`xla` under another name, with a backward pass of its own."""

    differentiable = False

    def __init__(self, name, called):
        self.name, self.called = name, called

    def why_not(self, problem):
        return None

    def forward(self, operands, scale, pattern):
        self.called.append((self.name, "forward", len(operands.batch_shape)))
        return xla.forward(operands, scale, pattern)

    def backward(self, operands, scale, pattern, out, lse, dout, dlse, bias_gradient):
        self.called.append((self.name, "backward", len(operands.batch_shape)))
        rows = out, lse, dout, dlse
        return xla.backward(operands, scale, pattern, *rows, bias_gradient)


@pytest.fixture
def chosen(monkeypatch):
    """Lets a function choose between two backends; gives what is called, in order."""
    called = []

    def by(of_problem):
        def choice(implementation, problem):
            forward, backward = of_problem(problem)
            return Choice(forward, backward, "")

        monkeypatch.setattr(_dispatch, "choice", choice)
        monkeypatch.setattr(_dispatch, "_loaded", lambda name: Named(name, called))
        return called

    return by


def gradients(q, k, v, dout, mask, implementation):
    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask, implementation=implementation)

    return jax.vjp(attend, q, k, v)[1](dout)


def test_each_pass_is_computed_by_its_own(chosen):
    rng = np.random.default_rng(0)
    mask = window(256, left=64, right=64, block_q=64, block_kv=64)
    q, k, v, dout = rng.standard_normal((4, 256, 2, 16)).astype(np.float32)
    expected = gradients(q, k, v, dout, mask, "xla")
    called = chosen(lambda _: ("mosaic_gpu", "cutlass"))
    found = gradients(q, k, v, dout, mask, "auto")
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    assert called == [("mosaic_gpu", "forward", 0), ("cutlass", "backward", 0)]


def test_vmap_is_asked_with_all_its_entries(chosen):
    rng = np.random.default_rng(0)
    mask = window(256, left=64, right=64, block_q=64, block_kv=64)
    arrays = rng.standard_normal((4, 6, 256, 2, 16)).astype(np.float32)

    def run(implementation):
        def of_entry(q, k, v, dout):
            return gradients(q, k, v, dout, mask, implementation)

        return jax.vmap(of_entry)(*arrays)

    expected = run("xla")

    def of_problem(problem):
        assert problem.platform == "cpu" and problem.mean_blocks is not None
        return ("cutlass" if problem.batch == 6 else "mosaic_gpu",) * 2

    called = chosen(of_problem)
    found = run("auto")
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    # JAX traces a function before it asks how to map it.
    of_mapped = [name for name, _, axes in called if axes == 1]
    assert of_mapped == ["cutlass", "cutlass"]
    assert {name for name, _, axes in called if axes == 0} <= {"mosaic_gpu"}
