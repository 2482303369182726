"""Compiling and timing: what is reported, and that errors and Ctrl-C come through."""

from __future__ import annotations

import _thread
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.measure import (
    compile_call,
    in_background,
    percentiles,
    time_call,
    useful_flops,
)


def test_compiles_from_shapes_and_reports_memory():
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    compiled = compile_call(lambda a, b: jnp.tanh(a @ b) @ b, shape, shape)
    assert compiled.total_bytes >= 3 * 256 * 256 * 4 + compiled.temporary_bytes
    assert compiled.seconds > 0
    x = jnp.eye(256)
    seconds, out = time_call(compiled.call, x, x)
    assert seconds > 0
    np.testing.assert_allclose(out, np.tanh(np.eye(256)), rtol=1e-6)


def test_errors_are_raised_in_the_caller():
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0)


def test_interrupt_does_not_wait_for_the_call():
    started, release = threading.Event(), threading.Event()

    def work():
        started.set()
        release.wait(60)

    def interrupt():
        started.wait(60)
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            in_background(work)
        assert not release.is_set()
    finally:
        release.set()


def test_percentiles_of_known_times():
    found = percentiles([float(n) for n in range(101)])
    assert found == {
        "count": 101,
        "min": 0.0,
        "p50": 50.0,
        "p95": 95.0,
        "p99": 99.0,
        "max": 100.0,
    }


def test_useful_flops_counts_both_products():
    # 2 blocks of 8 x 16, 3 heads of 5: q k^T and p v, multiply and add.
    assert useful_flops(2, 8, 16, 3, 5) == 2 * (2 * 8 * 16 * 5) * 2 * 3
