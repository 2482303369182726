"""Counters: what ncu is asked for, and what is read from its output.

There is no ncu here: a script of that name runs the child, on the CPU, and leaves the
log that ncu would.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from jsparse.bench import (
    Options,
    _profile,
    _profiled,
    _runner,
    all_cases,
    facts,
    markdown,
)
from jsparse.bench import run_case as run
from jsparse.bench._models import pair_case
from jsparse.bench._profile import (
    CALLS,
    METRICS,
    Pass,
    by_kernel,
    parse_counters,
    profile_pass,
)
from jsparse.measure import BadInput, Progress

HEAD = (
    *("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context"),
    *("Stream", "Block Size", "Grid Size", "Device", "CC", "Section Name"),
    *("Metric Name", "Metric Unit", "Metric Value"),
)
VALUES = {
    "seconds": ("nsecond", "17,800"),
    "tensor_instructions": ("inst", "819,200"),
    "tensor_percent": ("%", "61.25"),
    "issue_percent": ("%", "48.5"),
    "sm_percent": ("%", "64.5"),
    "dram_percent": ("%", "12"),
    "dram_read_bytes": ("byte", "3,145,728"),
    "dram_write_bytes": ("Mbyte", "1.5"),
    "occupancy_percent": ("n/a", "n/a"),
}
WHAT = Pass("seed800", "forward", "xla", False, 1, 16, "float16")


def log(*kernels: tuple[str, int]) -> str:
    lines = ["==PROF== Connected to process 12", ",".join(f'"{x}"' for x in HEAD)]
    number = 0
    for kernel, launches in kernels:
        for _ in range(launches):
            for name, (unit, value) in VALUES.items():
                cells = dict.fromkeys(HEAD, "1") | {
                    "ID": str(number),
                    "Kernel Name": kernel,
                    "Metric Name": METRICS[name],
                    "Metric Unit": unit,
                    "Metric Value": value,
                }
                lines.append(",".join(f'"{cells[x]}"' for x in HEAD))
            number += 1
    return "\n".join([*lines, "==PROF== Disconnected"])


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch):
    """Puts an ``ncu`` on the PATH; returns a function that says what it does."""

    def install(text: str, code: int = 0, runs: bool = True) -> Path:
        (tmp_path / "log").write_text(text)
        script = tmp_path / "ncu"
        script.write_text(
            f"#!{sys.executable}\n"
            "import json, pathlib, subprocess, sys\n"
            "at = sys.argv.index('--log-file')\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            "pathlib.Path(sys.argv[at + 1]).write_text((here / 'log').read_text())\n"
            "(here / 'arguments').write_text(json.dumps(sys.argv[1:]))\n"
            "child = sys.argv[sys.argv.index('--metrics') + 2:]\n"
            f"done = subprocess.run(child).returncode if {runs} else 0\n"
            f"sys.exit(done or {code})\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "arguments"

    return install


def test_counters_are_read_with_their_units():
    launches = parse_counters(log(("a<x>(int)", 2), ("b", 1)).splitlines())
    assert [launch.kernel for launch in launches] == ["a<x>(int)", "a<x>(int)", "b"]
    first, second = by_kernel(launches)
    assert (first["kernel"], first["launches"]) == ("a<x>(int)", 2)
    assert (second["kernel"], second["launches"]) == ("b", 1)
    assert first["seconds"] == pytest.approx(17.8e-6)
    assert first["tensor_instructions"] == 819_200
    assert first["tensor_percent"] == 61.25
    assert first["dram_read_bytes"] == 3_145_728
    assert first["dram_write_bytes"] == 1_500_000
    assert first["occupancy_percent"] is None


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_child_runs_the_pass(ncu, direction):
    arguments = ncu(log(*[("a", 1), ("b", 2)] * 3))
    what = Pass("seed800", direction, "xla", False, 1, 16, "float16")
    found = profile_pass(what)
    assert [(one["kernel"], one["launches"]) for one in found] == [("a", 3), ("b", 6)]
    given = json.loads(arguments.read_text())
    assert given[given.index("--clock-control") + 1] == "none"
    assert given[given.index("--profile-from-start") + 1] == "off"
    assert given[given.index("--metrics") + 1] == ",".join(METRICS.values())
    assert json.loads(given[-1])["direction"] == direction


def test_profiler_sees_the_calls_of_a_models_pass_alone(monkeypatch):
    case = pair_case("pair", 150, 2, 8, "float32")
    monkeypatch.setattr(_profiled, "all_cases", lambda: {"pair": case})
    seen = []
    monkeypatch.setattr(_profiled, "_start_profiler", lambda: seen.append("started"))
    block = _profiled.jax.block_until_ready
    monkeypatch.setattr(
        _profiled.jax, "block_until_ready", lambda x: seen.append("call") or block(x)
    )
    what = Pass("pair", "forward_backward", "xla", False, 2, 8, "float32")
    _profiled.run(json.dumps(dataclasses.asdict(what)))
    assert seen[seen.index("started") :] == ["started", *["call"] * CALLS]
    assert "call" in seen[: seen.index("started")]


def test_record_of_a_models_counters(ncu, monkeypatch):
    ncu(log(("attend(int)", 3)), runs=False)
    monkeypatch.setattr(_runner, "no_gpu", lambda: None)
    case = pair_case("pair2048_h16_d48", 150, 2, 8, "float32")
    record = run(case, Options(kind="profile"), Progress())
    assert [kernel["kernel"] for kernel in record["forward"]] == ["attend(int)"]
    assert record["forward_backward"]
    assert "| pair2048_h16_d48 | forward + backward |" in markdown([record])


def test_record_of_counters(ncu, monkeypatch):
    ncu(log(("attend(int)", 3)), runs=False)
    monkeypatch.setattr(_runner, "no_gpu", lambda: None)
    record = run(all_cases()["seed800"], Options(kind="profile"), Progress())
    assert record["kind"] == "profile"
    assert record["missed"] == []
    for direction in ("forward", "backward"):
        assert [kernel["kernel"] for kernel in record[direction]] == ["attend(int)"]
    table = facts(record)[1]
    percents = "61.2 %", "48.5 %", "64.5 %", "12.0 %"
    row = ("attend", "17.8 µs", *percents, "", "3.1 MB", "1.5 MB")
    assert table.rows == [row]
    assert len(table.columns) == len(row)
    assert f"| seed800 | backward | {' | '.join(row)} |" in markdown([record])


@pytest.mark.parametrize(
    "text, code, message",
    [
        ("==ERROR== ERR_NVGPUCTRPERM - no permission", 1, "run it as root"),
        ("==PROF== nothing", 0, "ended with 0 and no counters"),
        (log(("attend", 3)), 9, "ended with 9"),
    ],
)
def test_failures_of_ncu(ncu, text, code, message):
    ncu(text, code, runs=False)
    with pytest.raises(BadInput, match=message):
        profile_pass(WHAT)


def test_ncu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(_profile.shutil, "which", lambda _: None)
    monkeypatch.setattr(_profile, "_PLACES", ("/nowhere/ncu",))
    with pytest.raises(BadInput, match="ncu is neither on the PATH nor at /nowhere"):
        profile_pass(WHAT)


def test_newest_ncu_is_found(monkeypatch, tmp_path: Path):
    for version in ("2025.3.1", "2025.10.0", "2024.1.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch()
    monkeypatch.setattr(_profile.shutil, "which", lambda _: None)
    monkeypatch.setattr(_profile, "_PLACES", ("/nowhere/ncu", f"{tmp_path}/*/ncu"))
    assert _profile.find_ncu() == str(tmp_path / "2025.10.0" / "ncu")


def test_counters_of_a_structure_are_refused(monkeypatch):
    monkeypatch.setattr(_runner, "no_gpu", lambda: None)
    file = Path(__file__).parents[2] / "examples" / "data" / "1UBI.pdb.gz"
    case = all_cases(file)["1ubi_h4_d32"]
    with pytest.raises(BadInput, match="expected a named case for --profile"):
        run(case, Options(kind="profile"), Progress())
