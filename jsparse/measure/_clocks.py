"""At which clock a GPU runs while something is timed, and what holds it back.

Asked of NVML through nvidia-ml-py (the extra ``bench``). A GPU that reaches its power
limit lowers its clock: by how much differs between kernels, so also between those that
are compared.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jsparse.measure._machine import installed_version

INTERVAL = 0.005
"""Seconds between two looks: a turn of a contender takes some tens of milliseconds."""


class Sample(NamedTuple):
    """What NVML says at a moment: MHz, watts, and the bits of what limits the clock."""

    sm_mhz: int
    watts: float
    limits: int


class ClockWatch:
    """Looks at the GPU's clock while it is somebody's turn; use ``with``.

    Where there is no GPU, no NVML or no nvidia-ml-py, nothing is found.

    Example:
        >>> with ClockWatch() as watch:
        ...     with watch.turn("ours"):
        ...         pass
        >>> watch.found("ours") is None or "sm_mhz" in watch.found("ours")
        True
    """

    def __init__(self) -> None:
        self._samples: dict[str, list[Sample]] = {}
        self._turn: str | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ClockWatch:
        gpu = _Gpu.of_jax()
        if gpu is not None:
            self._thread = threading.Thread(target=self._look, args=(gpu,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    @contextlib.contextmanager
    def turn(self, who: str) -> Iterator[None]:
        """What is seen meanwhile is ``who``'s."""
        self._turn = who
        try:
            yield
        finally:
            self._turn = None

    def found(self, who: str) -> dict[str, Any] | None:
        """Of all turns of somebody; None if nothing was seen.

        Returns:
            ``sm_mhz`` and ``watts`` (each ``min, median, max``), ``samples`` (their
            number), and ``power_limited`` and ``heat_limited``: of which share of them
            the clock was held back by that.
        """
        samples = self._samples.get(who)
        if not samples:
            return None
        sm_mhz, watts, limits = (np.asarray(x) for x in zip(*samples, strict=True))
        nvml = _Gpu.nvml()
        power = nvml.nvmlClocksThrottleReasonSwPowerCap
        power |= nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        heat = nvml.nvmlClocksThrottleReasonSwThermalSlowdown
        heat |= nvml.nvmlClocksThrottleReasonHwThermalSlowdown
        return {
            "samples": len(samples),
            "sm_mhz": _spread(sm_mhz),
            "watts": _spread(watts),
            "power_limited": float(np.mean(limits & power != 0)),
            "heat_limited": float(np.mean(limits & heat != 0)),
        }

    def _look(self, gpu: _Gpu) -> None:
        while not self._over.wait(INTERVAL):
            who = self._turn
            if who is None:
                continue
            sample = gpu.sample()
            # Not what was seen when the turn was over.
            if sample is not None and self._turn == who:
                self._samples.setdefault(who, []).append(sample)


class _Gpu:
    """The first GPU that JAX uses, as NVML knows it."""

    def __init__(self, handle: Any):
        self._handle = handle

    @staticmethod
    def nvml() -> Any:
        import pynvml

        return pynvml

    @classmethod
    def of_jax(cls) -> _Gpu | None:
        """None where there is none, or none that can be asked."""
        if jax.default_backend() != "gpu" or installed_version("nvidia-ml-py") is None:
            return None
        nvml = cls.nvml()
        try:
            nvml.nvmlInit()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
            if first.startswith(("GPU-", "MIG-")):
                return cls(nvml.nvmlDeviceGetHandleByUUID(first))
            index = int(first) if first.isdigit() else 0
            return cls(nvml.nvmlDeviceGetHandleByIndex(index))
        except nvml.NVMLError:
            return None

    def sample(self) -> Sample | None:
        """What it does now; None where NVML does not say."""
        nvml = self.nvml()
        try:
            return Sample(
                nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM),
                nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
                nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle),
            )
        except nvml.NVMLError:
            return None


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }
