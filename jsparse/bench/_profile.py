"""Hardware counters of our kernels, read by Nsight Compute (``ncu``).

``ncu`` runs a child process, ``_profiled.py``, which calls one pass a few times and has
the driver say when to look. Called by ``_runner.py``.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import Any

from jsparse.bench._contract import Direction
from jsparse.measure import BadInput

CALLS = 3

METRICS = {
    "seconds": "gpu__time_duration.sum",
    "tensor_instructions": "sm__inst_executed_pipe_tensor_op_gmma.sum",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
"""What a record calls each counter."""

_UNITS = {
    **{"s": 1.0, "second": 1.0, "ms": 1e-3, "msecond": 1e-3, "us": 1e-6},
    **{"usecond": 1e-6, "ns": 1e-9, "nsecond": 1e-9},
    **{"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
    **{"%": 1.0, "inst": 1.0, "": 1.0},
}
_CHILD = "import sys, jsparse.bench._profiled as p; p.run(sys.argv[1])"
_PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")


@dataclass(frozen=True)
class Pass:
    """What the child runs, as text on its command line.

    Attributes:
        case: a named case.
        direction: the pass.
        implementation: ours.
        traced: whether the mask is an argument.
        heads: number of heads; a model has its own.
        head_dim: channels of each; likewise.
        dtype: of queries, keys and values; likewise.
    """

    case: str
    direction: Direction
    implementation: str
    traced: bool
    heads: int
    head_dim: int
    dtype: str


def find_ncu() -> str:
    """Where ``ncu`` is.

    Raises:
        BadInput: if it is not there.
    """
    found = shutil.which("ncu") or next(filter(None, map(_newest, _PLACES)), None)
    if found is None:
        raise BadInput(
            f"--profile: ncu is neither on the PATH nor at {' or '.join(_PLACES)}. "
            "Install Nsight Compute, which comes with the CUDA toolkit."
        )
    return found


def _newest(place: str) -> str | None:
    """The file of that name; of a pattern, that with the highest version."""
    numbers = {file: [*map(int, re.findall(r"\d+", file))] for file in glob(place)}
    return max(numbers, key=numbers.__getitem__, default=None)


def profile_pass(what: Pass) -> list[dict[str, Any]]:
    """Counters of every kernel of a pass, means over its launches, longest first.

    Args:
        what: the pass.

    Returns:
        For each kernel ``kernel`` (its name), ``launches`` and the keys of `METRICS`;
        None where the GPU does not have the counter.

    Raises:
        BadInput: if ``ncu`` is not there, fails, or may not read counters.
    """
    ncu = find_ncu()
    with tempfile.TemporaryDirectory(prefix="jsparse-ncu-") as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            *(ncu, "--csv", "--print-units", "base", "--clock-control", "none"),
            *("--target-processes", "all", "--log-file", str(log)),
            *("--profile-from-start", "off"),
            *("--metrics", ",".join(METRICS.values())),
            *(sys.executable, "-c", _CHILD, json.dumps(asdict(what))),
        ]
        done = subprocess.run(
            command,
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
        text = log.read_text(encoding="utf-8") if log.exists() else ""
    launches = parse_counters(text.splitlines())
    if done.returncode or not launches:
        raise BadInput(_failure(done, text))
    return by_kernel(launches)


def _failure(done: subprocess.CompletedProcess[str], log: str) -> str:
    """One line: the tool's own words, or the last of the child."""
    lines = [line for line in log.splitlines() if line.startswith("==ERROR==")]
    lines = lines or (done.stderr or done.stdout).strip().splitlines() or ["no output"]
    hint = ""
    if "ERR_NVGPUCTRPERM" in log:
        hint = " Counters may be for administrators only: run it as root."
    return (
        f"--profile: ncu ended with {done.returncode} and no counters of a kernel "
        f"({lines[-1].strip()}).{hint}"
    )


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: its name.
        counters: by the keys of `METRICS`; without those that the GPU does not have.
    """

    kernel: str
    counters: dict[str, float]


def parse_counters(lines: Iterable[str]) -> list[Launch]:
    """Reads what ``ncu --csv`` prints: one line for each launch and metric.

    Args:
        lines: of its log; those of the tool itself start with ``==``.

    Returns:
        The launches, in their order.

    Example:
        >>> head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
        >>> line = '"0","attend","gpu__time_duration.sum","ns","900"'
        >>> (launch,) = parse_counters(["==PROF== ...", head, line])
        >>> launch.kernel, round(launch.counters["seconds"] * 1e9)
        ('attend', 900)
    """
    table = [line for line in lines if line.startswith('"')]
    names = {metric: name for name, metric in METRICS.items()}
    launches: dict[str, Launch] = {}
    for row in csv.DictReader(table):
        launch = launches.setdefault(row["ID"], Launch(row["Kernel Name"], {}))
        name = names.get(row["Metric Name"])
        value = _number(row["Metric Value"])
        if name is not None and value is not None:
            launch.counters[name] = value * _UNITS.get(row["Metric Unit"], 1.0)
    return list(launches.values())


def by_kernel(launches: list[Launch]) -> list[dict[str, Any]]:
    """Means of the counters over the launches of each kernel; see `profile_pass`.

    Example:
        >>> launches = [Launch("attend", {"seconds": x}) for x in (1.0, 2.0)]
        >>> (kernel,) = by_kernel(launches)
        >>> kernel["launches"], kernel["seconds"], kernel["sm_percent"]
        (2, 1.5, None)
    """
    counters: dict[str, list[dict[str, float]]] = {}
    for launch in launches:
        counters.setdefault(launch.kernel, []).append(launch.counters)
    found = [
        {
            "kernel": kernel,
            "launches": len(each),
            **{name: _mean([x[name] for x in each if name in x]) for name in METRICS},
        }
        for kernel, each in counters.items()
    ]
    return sorted(found, key=lambda kernel: -(kernel["seconds"] or 0.0))


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "n/a", where a GPU does not have the counter
        return None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
