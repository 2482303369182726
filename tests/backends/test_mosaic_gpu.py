"""What the Mosaic backend refuses, and with which words."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jsparse.backends import _hopper, _score, mosaic_gpu
from jsparse.backends._contract import Problem

TAKEN = Problem(
    batch=1,
    q_len=256,
    kv_len=256,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    value_dim=64,
    dtype="bfloat16",
    block_q=128,
    block_kv=64,
    mask_heads=1,
    most_blocks=8,
    rules=(),
    bits=True,
    bias=None,
    platform="gpu",
)
REFUSED = {
    "it needs an H100 or H200, and JAX computes on cpu": {"platform": "cpu"},
    "dtype float32; expected bfloat16 or float16": {"dtype": "float32"},
    "head size 272; expected at most 256": {"value_dim": 272},
    "block_q=32; expected 64 or 128": {"block_q": 32},
    "block_kv=16; expected 32, 64 or 128": {"block_kv": 16},
    "head size 144 with a bias; expected at most 128": {
        "head_dim": 144,
        "bias": "dense",
    },
    "a score function with an array of 2147483648 elements; "
    "expected at most 2147483647": {"bias": "score_fn", "bias_weights": 2**31},
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(_hopper, "compute_capability", lambda: "9.0")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_dim": 128, "value_dim": 128},
        {"head_dim": 24, "value_dim": 96},
        {"head_dim": 256, "value_dim": 256},
        {"block_q": 64, "block_kv": 32},
        {"bias": "dense"},
        {"bias": "block"},
        {"bias": "linear", "bias_weights": 1},
        {"bias": "quadratic", "bias_weights": 1, "head_dim": 128},
        {"bias": "score_fn", "bias_weights": 2**31 - 1},
    ],
    ids=str,
)
def test_takes_what_its_kernels_take(change):
    assert mosaic_gpu.why_not(dataclasses.replace(TAKEN, **change)) is None


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses(reason):
    assert mosaic_gpu.why_not(dataclasses.replace(TAKEN, **REFUSED[reason])) == reason


@pytest.mark.parametrize("form, most", [("table", 64), ("gaussian", 32)])
def test_refuses_more_weights_than_the_kernels_hold(form, most):
    fits = dataclasses.replace(TAKEN, bias=form, bias_weights=most)
    assert mosaic_gpu.why_not(fits) is None
    more = dataclasses.replace(fits, bias_weights=most + 1)
    reason = f"a {form} bias with {most + 1} weights a head; expected at most {most}"
    assert mosaic_gpu.why_not(more) == reason


def judged(function, *shapes, dtype="float32"):
    """What the backend says to a score function."""
    found = []

    def trace(*arrays):
        found.append(_score.trace(function, "float32", arrays, "")[0])

    jax.eval_shape(trace, *(jax.ShapeDtypeStruct(x, dtype) for x in shapes))
    problem = dataclasses.replace(TAKEN, bias="score_fn", score=found[0])
    return str(mosaic_gpu.why_not(problem))


def relative(s, i, j, h, table):
    return s + table[h, jnp.abs(i - j)]


def constant(s, i, j, h, table):
    return relative(s, i, j, h, jax.lax.stop_gradient(table))


def test_score_functions():
    taken = [
        (lambda s, i, j, h: jnp.where(i >= j, jax.nn.softplus(s), -jnp.inf),),
        (lambda s, i, j, h, a, b: s * a[h] * b[h, i] + a[j % 4], (4,), (4, 256)),
        (lambda s, i, j, h, cap: cap * jnp.tanh(s / cap), ()),
        (constant, (2, 256)),
    ]
    assert [judged(*x) for x in taken] == ["None"] * len(taken)
    assert "learned array that is read by query and by key" in judged(
        relative, (2, 256)
    )
    assert judged(lambda s, i, j, h: jnp.sin(s)).startswith(
        "a score function with sin of float; expected float32, int32 and bool"
    )
    half = judged(lambda s, i, j, h, a: s + a[h].astype("float32"), (4,), dtype="half")
    assert half.startswith("a score function with an array of float16")


def test_refuses_other_gpus(monkeypatch):
    monkeypatch.setattr(_hopper, "compute_capability", lambda: "8.0")
    assert mosaic_gpu.why_not(TAKEN) == (
        "it needs compute capability 9.0, and this GPU has 8.0"
    )
