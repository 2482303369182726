"""Names and memory of the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jsparse.measure import (
    _machine,
    available_memory,
    git_commit,
    machine,
    peak_device_memory,
    versions,
)
from jsparse.measure._machine import _group_memory


def test_machine_and_versions_are_named():
    found = machine()
    assert found["device"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1 << 28
    assert versions()["numpy"] == np.__version__


# In a process of its own: what earlier tests of a worker held, or give back meanwhile,
# hides an array.
def test_peak_memory_sees_an_array():
    script = """
import numpy as np
from jsparse.measure import peak_memory, reset_peak_memory

big = np.ones(400_000_000, np.uint8)
del big
print(peak_memory(), reset_peak_memory(), peak_memory())
block = np.ones(100_000_000, np.uint8)
print(peak_memory())
"""
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    before, reset, after, end = run.stdout.split()
    assert int(end) >= int(after) + (50_000_000 if reset == "True" else 0)
    assert int(before) >= 400_000_000
    assert reset == "False" or int(after) <= int(before) - 200_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_available_memory_is_less_than_all_memory():
    free = available_memory()
    assert free is not None
    assert 0 < free <= machine()["memory_bytes"]


def test_memory_of_a_gpu(monkeypatch):
    stats: dict[str, int] | None = {
        "bytes_limit": 100,
        "bytes_in_use": 30,
        "peak_bytes_in_use": 70,
    }

    class Device:
        def memory_stats(self):
            return stats

    assert peak_device_memory() is None
    monkeypatch.setattr(_machine.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_machine.jax, "local_devices", lambda: [Device()])
    assert (available_memory(), peak_device_memory()) == (70, 70)
    stats = None  # an allocator that does not count
    assert available_memory() != 70
    assert peak_device_memory() is None


def test_control_group_limits_memory(tmp_path: Path):
    assert _group_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert _group_memory(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_memory(tmp_path) is None


def test_commit_of_files_that_were_copied(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("JSPARSE_COMMIT", "1234abcd")
    assert git_commit(tmp_path) == {"hash": "1234abcd", "dirty": False}
    monkeypatch.setenv("JSPARSE_COMMIT", "")
    assert git_commit(tmp_path) is None


def test_commit_of_a_checkout(tmp_path: Path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    folder = tmp_path / "package"
    folder.mkdir()
    assert git_commit(folder) is None
    git("init", "-q")
    (tmp_path / "other.py").write_text("1")
    git("add", "other.py")
    git("commit", "-q", "-m", "one")
    (folder / "code.py").write_text("1")
    assert git_commit(folder) is None, "the package is not part of that checkout"
    git("add", ".")
    git("commit", "-q", "-m", "two")
    assert git_commit(folder) == {"hash": git("rev-parse", "HEAD"), "dirty": False}
    (folder / "code.py").write_text("2")
    assert git_commit(folder) == {"hash": git("rev-parse", "HEAD"), "dirty": True}
