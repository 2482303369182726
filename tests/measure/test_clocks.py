"""The GPU's clock while something is timed: whose turn it was, what NVML cannot say."""

from __future__ import annotations

import time
from typing import Any

import jax
import pynvml
import pytest

from jsparse.measure import ClockWatch, _clocks


class Nvml:
    """A GPU that slows down at its power limit when ``busy``."""

    def __init__(self, monkeypatch, *, fails: str | None = None):
        self.busy, self.asked = False, []
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        names = ("nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID")
        for name in names:
            monkeypatch.setattr(pynvml, name, self._noted(name, fails))
        for name, value in {
            "nvmlDeviceGetClockInfo": lambda: 1500 if self.busy else 1980,
            "nvmlDeviceGetPowerUsage": lambda: 700_000 if self.busy else 120_000,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda: 4 if self.busy else 0,
        }.items():
            monkeypatch.setattr(pynvml, name, self._value(name, value, fails))

    def _noted(self, name, fails):
        def asked(*arguments):
            if name == fails:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
            self.asked.append((name, *arguments))
            return "a GPU"

        return asked

    def _value(self, name, value, fails):
        def asked(handle, *_):
            assert handle == "a GPU"
            if name == fails:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return value()

        return asked


def found(watch: ClockWatch, who: str) -> dict[str, Any]:
    result = watch.found(who)
    assert result is not None
    return result


def seen(watch: ClockWatch, who: str) -> None:
    end = time.monotonic() + 20
    while len(watch._samples.get(who, ())) < 3:
        assert time.monotonic() < end, "nothing was seen"
        time.sleep(_clocks.INTERVAL)


def test_each_has_what_was_seen_in_its_own_turns(monkeypatch):
    nvml = Nvml(monkeypatch)
    with ClockWatch() as watch:
        with watch.turn("ours"):
            seen(watch, "ours")
        nvml.busy = True
        time.sleep(5 * _clocks.INTERVAL)  # nobody's turn
        with watch.turn("peer"):
            seen(watch, "peer")
    ours, peer = found(watch, "ours"), found(watch, "peer")
    assert ours["sm_mhz"] == {"min": 1980, "median": 1980, "max": 1980}
    assert ours["watts"]["max"] == 120 and ours["power_limited"] == 0
    assert peer["sm_mhz"]["max"] == 1500 and peer["watts"]["min"] == 700
    assert (peer["power_limited"], peer["heat_limited"]) == (1, 0)
    assert watch.found("somebody else") is None
    count = peer["samples"]
    time.sleep(5 * _clocks.INTERVAL)
    assert found(watch, "peer")["samples"] == count  # it looks no more


@pytest.mark.parametrize(
    "visible, asked",
    [
        ("", ("nvmlDeviceGetHandleByIndex", 0)),
        ("3,1", ("nvmlDeviceGetHandleByIndex", 3)),
        ("GPU-1-2,GPU-3", ("nvmlDeviceGetHandleByUUID", "GPU-1-2")),
    ],
)
def test_it_is_the_gpu_that_jax_uses(monkeypatch, visible, asked):
    nvml = Nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with ClockWatch():
        pass
    assert nvml.asked == [("nvmlInit",), asked]


@pytest.mark.parametrize("fails", ["nvmlInit", "nvmlDeviceGetPowerUsage"])
def test_nothing_is_found_where_nvml_does_not_say(monkeypatch, fails):
    Nvml(monkeypatch, fails=fails)
    with ClockWatch() as watch, watch.turn("ours"):
        time.sleep(5 * _clocks.INTERVAL)
    assert watch.found("ours") is None


def test_nothing_is_found_without_a_gpu_or_the_package(monkeypatch):
    with ClockWatch() as watch, watch.turn("ours"):
        time.sleep(5 * _clocks.INTERVAL)
    assert watch.found("ours") is None
    Nvml(monkeypatch)
    monkeypatch.setattr(_clocks, "installed_version", lambda _: None)
    with ClockWatch() as watch, watch.turn("ours"):
        time.sleep(5 * _clocks.INTERVAL)
    assert watch.found("ours") is None
