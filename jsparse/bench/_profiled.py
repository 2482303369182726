"""What ``ncu`` runs: one pass of ours, a few times, in a process of its own.

Started by ``_profile.py``.
"""

from __future__ import annotations

import ctypes
import json

import jax

from jsparse.bench._cases import AttentionCase, ModelCase, all_cases
from jsparse.bench._contract import Task
from jsparse.bench._jax_peers import Ours
from jsparse.bench._profile import CALLS, Pass
from jsparse.bench._runner import draw_inputs, draw_model_inputs, implemented
from jsparse.measure import BadInput


def run(text: str) -> None:
    """Runs one pass `CALLS` times where the profiler sees it, and once before.

    What is launched while it compiles, and for the residuals of a backward pass, is
    not seen.

    Args:
        text: a `Pass` as JSON.
    """
    what = Pass(**json.loads(text))
    call = _entered(what).ready(what.direction)
    for n in range(1 + CALLS):
        if n == 1:
            _start_profiler()
        jax.block_until_ready(call.compiled.call(*call.sets[0]))


def _entered(what: Pass):
    """Ours with the inputs of the case."""
    case = all_cases()[what.case]
    if isinstance(case, ModelCase):
        model = case.load()
        ours = implemented(model, what.implementation)
        return ours.enter(Task(model.pattern.mask, [draw_model_inputs(0, model)]))
    assert isinstance(case, AttentionCase)  # the parent has seen to it
    mask = case.load().mask
    inputs = draw_inputs(0, mask, what.heads, what.head_dim, what.dtype)
    return Ours(what.implementation, what.traced).enter(Task(mask, [inputs]))


def _start_profiler() -> None:
    """Has ``ncu`` look at what follows."""
    if jax.default_backend() != "gpu":
        return
    driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    for result in (
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
        driver.cuCtxSetCurrent(context),
        driver.cuProfilerStart(),
    ):
        if result:
            raise BadInput(f"--profile: the driver's profiler failed: error {result}.")
