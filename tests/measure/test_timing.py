"""Compiling and timing: what is reported, and that errors and Ctrl-C come through."""

from __future__ import annotations

import signal
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.measure import (
    compile_call,
    in_background,
    kernel_times,
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
    started, release, ended = (threading.Event() for _ in range(3))
    main = threading.get_ident()

    def work():
        started.set()
        release.wait(60)
        ended.set()

    def interrupt():
        started.wait(60)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    # Where tests run in the background, interrupts may be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_background(work)
        assert not ended.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
        release.set()


@pytest.mark.parametrize("found, expected", [(2.0, [2e-3]), ([1.0, 3.0], [1e-3, 3e-3])])
def test_kernel_times_are_those_of_cupti(monkeypatch, found, expected):
    from jax.experimental.mosaic.gpu import profiler

    asked = []

    def measure(cupti, call, *, iterations):
        asked.append((call, iterations, cupti.finalize))
        return lambda *args: (call(*args), found)

    monkeypatch.setattr(profiler.Cupti, "measure", measure)
    compiled = compile_call(jnp.tanh, jnp.ones(3))
    assert kernel_times(compiled.call, jnp.ones(3), count=2) == pytest.approx(expected)
    assert asked == [(compiled.call, 2, False)]


@pytest.fixture
def launches(monkeypatch):
    """The profiler's own code on logs that the test gives, one for each measurement."""
    from jax.experimental.mosaic.gpu import profiler

    logs: list[list[tuple[str, float]]] = []

    class Log:
        def _cupti_init(self):
            pass

        def _cupti_get_timings(self, finalize):
            return logs.pop(0)

    library = SimpleNamespace(_mosaic_gpu_ext=Log())
    monkeypatch.setattr(profiler, "mosaic_gpu_lib", library)
    return logs


@pytest.mark.parametrize(
    "log",
    [[("a", 1.0), ("b", 1.0), ("b", 1.0)], [("a", 1.0), ("b", 1.0)]],
    ids=["not divisible", "not consistent"],
)
def test_calls_whose_kernels_differ_are_timed_one_by_one(launches, log):
    launches += [log, [("a", 1.0)], [("a", 1.0), ("b", 3.0)]]
    found = kernel_times(jnp.tanh, jnp.ones(3), count=2)
    assert found == pytest.approx([1e-3, 4e-3])
    assert launches == []


def test_a_call_that_fails_is_not_made_again(monkeypatch):
    from jax.experimental.mosaic.gpu import profiler

    asked = []

    def measure(cupti, call, *, iterations):
        asked.append(iterations)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(profiler.Cupti, "measure", measure)
    with pytest.raises(RuntimeError, match="Out of memory"):
        kernel_times(jnp.tanh, jnp.ones(3), count=3)
    assert asked == [3]


def test_a_cpu_has_no_kernel_times(monkeypatch):
    from jax.experimental.mosaic.gpu import profiler

    def nothing(cupti, call, iterations):
        return lambda *args: (None, None)

    monkeypatch.setattr(profiler.Cupti, "measure", nothing)
    with pytest.raises(RuntimeError, match="CUPTI saw no kernels"):
        kernel_times(jnp.tanh, jnp.ones(3))


@pytest.mark.gpu
def test_kernel_times_on_a_gpu():
    x = jnp.ones((2048, 2048), jnp.bfloat16)
    compiled = compile_call(lambda x: x @ x, x)
    seconds = kernel_times(compiled.call, x, count=5)
    assert len(seconds) == 5
    assert 1e-6 < min(seconds) < max(seconds) < 1e-2


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
