"""Hardware counters of our kernels, read by Nsight Compute (``ncu``).

``ncu`` runs a child process, `run_child`, that calls one pass a few times and nothing
else: its inputs are drawn on the host, so every kernel it launches is of that pass.
Called by ``_runner.py``.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.bench._cases import AttentionCase, all_cases
from jsparse.bench._contract import Direction, Task
from jsparse.bench._jax_peers import Ours
from jsparse.measure import BadInput

CALLS = 3

METRICS = {
    "seconds": "gpu__time_duration.sum",
    "tensor_instructions": "sm__inst_executed_pipe_tensor_op_gmma.sum",
    "tensor_percent": (
        "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active"
    ),
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
_CHILD = "import sys, jsparse.bench._profile as p; p.run_child(sys.argv[1])"
_PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/ncu")


@dataclass(frozen=True)
class Pass:
    """What the child runs, as text on its command line.

    Attributes:
        case: a named case.
        direction: the pass.
        implementation: ours.
        traced: whether the mask is an argument.
        heads: number of heads.
        head_dim: channels of each.
        dtype: of queries, keys and values.
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
    found = shutil.which("ncu") or next((p for p in _PLACES if Path(p).exists()), None)
    if found is None:
        raise BadInput(
            f"--profile: ncu is neither on the PATH nor at {' or '.join(_PLACES)}. "
            "Install Nsight Compute, which comes with the CUDA toolkit."
        )
    return found


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
    kernels = parse_counters(text.splitlines())
    if done.returncode or not kernels:
        raise BadInput(_failure(done, text))
    return kernels


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


def parse_counters(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Reads what ``ncu --csv`` prints: one line for each launch and metric.

    Args:
        lines: of its log; those of the tool itself start with ``==``.

    Returns:
        See `profile_pass`.

    Example:
        >>> head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
        >>> line = '"{}","attend","gpu__time_duration.sum","ns","{}"'
        >>> lines = ["==PROF== ...", head, line.format(0, 900), line.format(1, 1100)]
        >>> (kernel,) = parse_counters(lines)
        >>> kernel["kernel"], kernel["launches"], round(kernel["seconds"] * 1e9)
        ('attend', 2, 1000)
    """
    table = [line for line in lines if line.startswith('"')]
    names = {metric: name for name, metric in METRICS.items()}
    launches: dict[str, dict[str, dict[str, float]]] = {}
    for row in csv.DictReader(table):
        launch = launches.setdefault(row["Kernel Name"], {}).setdefault(row["ID"], {})
        name = names.get(row["Metric Name"])
        value = _number(row["Metric Value"])
        if name is not None and value is not None:
            launch[name] = value * _UNITS.get(row["Metric Unit"], 1.0)
    found = [
        {
            "kernel": kernel,
            "launches": len(each),
            **{
                name: _mean([x[name] for x in each.values() if name in x])
                for name in METRICS
            },
        }
        for kernel, each in launches.items()
    ]
    return sorted(found, key=lambda kernel: -(kernel["seconds"] or 0.0))


def of_the_pass(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what is launched less often than the pass: the residuals' forward pass.

    Example:
        >>> of_the_pass([{"launches": 1}, {"launches": CALLS}])
        [{'launches': 3}]
    """
    return [kernel for kernel in kernels if kernel["launches"] >= CALLS]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "n/a", where a GPU does not have the counter
        return None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ------------------------------------------------------------------------ the child


def run_child(text: str) -> None:
    """Runs one pass `CALLS` times; no kernel but its own is launched.

    Args:
        text: a `Pass` as JSON.
    """
    what = Pass(**json.loads(text))
    case = all_cases()[what.case]
    assert isinstance(case, AttentionCase)  # the parent has seen to it
    mask = case.load().mask
    rng = np.random.default_rng(0)
    shape = (mask.q_len, what.heads, what.head_dim)
    q, k, v, dout = (
        jax.device_put(
            rng.standard_normal(shape, np.float32).astype(jnp.dtype(what.dtype))
        )
        for _ in range(4)
    )
    ours = Ours(what.implementation, what.traced)
    call = ours.enter(Task(mask, [(q, k, v, dout)])).ready(what.direction)
    for _ in range(CALLS):
        jax.block_until_ready(call.compiled.call(*call.sets[0]))
