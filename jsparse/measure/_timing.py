"""Compiling and timing one call.

`time_call` gives wall-clock seconds around one compiled call whose inputs are on the
device, until its outputs are ready. `kernel_times` gives what CUPTI saw a GPU spend in
kernels, without the gaps between them. XLA cannot be interrupted, so calls that may be
long run in a thread and the main thread waits where Ctrl-C reaches it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_UNEVEN = ("not divisible by the number of iterations", "names are not consistent")
"""What JAX's profiler says of a log that cannot be divided among equal calls."""


@dataclass(frozen=True)
class Compiled:
    """A compiled call and what it costs.

    Attributes:
        call: the executable; takes the arguments it was compiled for.
        seconds: time to trace and compile.
        temporary_bytes: what XLA allocates beside arguments and results.
        total_bytes: arguments, results and temporaries.
    """

    call: Callable[..., Any]
    seconds: float
    temporary_bytes: int
    total_bytes: int


def in_background(function: Callable[..., Any], *args: Any) -> Any:
    """Calls ``function`` in a thread and waits, so that Ctrl-C is seen at once.

    After a `KeyboardInterrupt` the thread goes on until its call ends.

    Returns:
        What the function returns; what it raises is raised here.

    Example:
        >>> in_background(sum, [1, 2, 3])
        6
    """
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = function(*args)
        except BaseException as err:  # noqa: BLE001 (raised again below)
            outcome["error"] = err

    thread = threading.Thread(target=work, name="jsparse-call", daemon=True)
    thread.start()
    # Not once: an interrupt between the last instruction and the wait does not end it.
    while thread.is_alive():
        thread.join(0.1)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def compile_call(function: Callable[..., Any], *args: Any) -> Compiled:
    """Compiles ``function`` for ``args``: arrays, or shapes that stand for them.

    Returns:
        The executable with its compile time and memory.
    """

    def work() -> tuple[Any, float]:
        start = time.perf_counter()
        call = jax.jit(function).lower(*args).compile()
        return call, time.perf_counter() - start

    call, seconds = in_background(work)
    memory = call.memory_analysis()
    temporary = int(memory.temp_size_in_bytes)
    fixed = int(memory.argument_size_in_bytes + memory.output_size_in_bytes)
    return Compiled(call, seconds, temporary, temporary + fixed)


def time_call(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds that one call takes, and its result."""

    def work() -> tuple[float, Any]:
        start = time.perf_counter()
        out = jax.block_until_ready(call(*args))
        return time.perf_counter() - start, out

    return in_background(work)


def kernel_times(call: Callable[..., Any], *args: Any, count: int = 10) -> list[float]:
    """Seconds that a GPU spends in the kernels of a call, for each of ``count`` calls.

    The call is made once more before, to warm up. Copies and memsets are not counted.
    Nothing else in this process may use CUPTI meanwhile, a profiler for instance.

    Args:
        call: compiled, see `compile_call`.
        args: what it was compiled for.
        count: how many calls.

    Returns:
        Sums of kernel times, in the order of the calls.

    Raises:
        RuntimeError: if CUPTI is not there, or saw no kernels, as on a CPU; or if the
            call fails.
    """
    from jax.experimental.mosaic.gpu import profiler

    # Detached from the process after each log, CUPTI may lose or crash CUDA graphs.
    measure = profiler.Cupti(finalize=False).measure
    found: Any
    try:
        _, found = measure(call, iterations=count)(*args)
    except RuntimeError as err:
        if not any(text in str(err) for text in _UNEVEN):
            raise
        # The log of all calls cannot be divided among them: one log for each.
        found = [measure(call, iterations=1)(*args)[1] for _ in range(count)]
        found = None if None in found else found
    if found is None:
        raise RuntimeError(
            "CUPTI saw no kernels; expected those of a compiled call on a GPU. Time "
            "calls on a CPU with time_call."
        )
    milliseconds = [found] if isinstance(found, float) else found
    return [1e-3 * float(value) for value in milliseconds]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The usual figures of repeated times, in seconds.

    Args:
        seconds: at least one time.

    Returns:
        ``count, min, p50, p95, p99, max``; percentiles between two times are
        interpolated.

    Example:
        >>> percentiles([3.0, 1.0, 2.0])["p50"]
        2.0
    """
    values = np.asarray(seconds, np.float64)
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {
        "count": len(values),
        "min": float(values.min()),
        "p50": float(p50),
        "p95": float(p95),
        "p99": float(p99),
        "max": float(values.max()),
    }


def useful_flops(
    blocks: int, block_q: int, block_kv: int, heads: int, head_dim: int
) -> int:
    """Floating-point operations of the forward pass on computed blocks only.

    ``4 * block_q * block_kv * D * H`` for each block: two products, two operations for
    each multiply-add. Forward and backward together count 3.5 times that.

    Example:
        >>> useful_flops(800, 128, 128, 1, 64)
        3355443200
    """
    return 4 * blocks * block_q * block_kv * heads * head_dim
