"""The machine a measurement was made on, and its memory.

psutil (the extra ``bench``) is only needed where there is no ``/proc``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from jsparse.measure._errors import BadInput

PACKAGES = ("jsparse", "jax", "jaxlib", "numpy", "scipy", "flax")


def versions() -> dict[str, str | None]:
    """Versions of Python and of what jsparse computes with; None if not installed.

    Example:
        >>> sorted(versions())
        ['flax', 'jax', 'jaxlib', 'jsparse', 'numpy', 'python', 'scipy']
    """
    return {
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
    }


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Names the device that JAX computes on, and the processor beside it.

    Returns:
        ``platform`` (``"cpu"``, ``"gpu"``), ``device``, ``devices`` (their number),
        ``processor``, ``cores`` (that this process may use), ``memory_bytes``,
        ``system``; of a GPU also ``runtime``: the versions that XLA was loaded with.

    Raises:
        BadInput: if JAX finds no device it may use.

    Example:
        >>> machine()["cores"] >= 1
        True
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as err:  # the latter if no plug-in is there
        asked = jax.config.jax_platforms
        raise BadInput(
            f"JAX does not start on {asked or 'any platform'} "
            f"({str(err) or 'no such device'}). Install what it needs, e.g. "
            "jsparse[cuda13], or unset JAX_PLATFORMS."
        ) from err
    processor = _processor()
    on_cpu = devices[0].platform == "cpu"
    kind = processor if on_cpu else devices[0].device_kind
    found = {
        "platform": devices[0].platform,
        "device": kind,
        "devices": len(devices),
        "processor": processor,
        "cores": _cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if not on_cpu:
        found["runtime"] = " ".join(devices[0].client.platform_version.split())
    return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """The most memory that this process has held, in bytes.

    Since the start, or since `reset_peak_memory` where that is possible.
    """
    high = _proc_bytes(Path("/proc/self/status"), "VmHWM")
    if high is not None:
        return high
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> bool:
    """Starts `peak_memory` anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_memory() -> int | None:
    """Bytes that a new array may take without swapping; None if that is unknown.

    Of the GPU, where JAX computes on one. Else the smaller of what the system has free
    and what the process's control group (a container's limit) still allows.
    """
    stats = _device_memory()
    if stats is not None:
        return max(0, stats["bytes_limit"] - stats["bytes_in_use"])
    free = _proc_bytes(Path("/proc/meminfo"), "MemAvailable")
    if free is None:
        if installed_version("psutil") is None:
            return None
        import psutil

        return int(psutil.virtual_memory().available)
    group = _group_memory(Path("/sys/fs/cgroup"))
    return free if group is None else min(free, group)


def peak_device_memory() -> int | None:
    """The most memory JAX has held on its GPU since the start; None without a GPU."""
    stats = _device_memory()
    return None if stats is None else stats["peak_bytes_in_use"]


def _device_memory() -> dict[str, int] | None:
    """What XLA's allocator says of the GPU; None on a CPU, or if it does not count."""
    if jax.default_backend() != "gpu":
        return None
    stats = jax.local_devices()[0].memory_stats()
    return stats if stats and "bytes_limit" in stats else None


def _group_memory(folder: Path) -> int | None:
    """What a version 2 control group leaves, or None without a limit."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used)


def _proc_bytes(file: Path, key: str) -> int | None:
    """One ``Key:  123 kB`` line of a file under ``/proc``, in bytes."""
    if not file.exists():
        return None
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def git_commit(folder: Path) -> dict[str, Any] | None:
    """The commit of the checkout that holds ``folder``, or None if there is none.

    Args:
        folder: a folder of the package.

    Returns:
        ``hash`` and ``dirty``: whether a tracked file differs from the commit. For
        files that were copied out of a checkout, the variable ``JSPARSE_COMMIT`` of the
        environment names the commit, and its word is taken.
    """
    named = os.environ.get("JSPARSE_COMMIT")
    if named:
        return {"hash": named, "dirty": False}
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package inside somebody else's checkout is not of that commit.
    if not git("ls-files", "--", "."):
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    # Records that were just written do not change what was measured.
    changes = git(
        *("status", "--porcelain", "--untracked-files=no"),
        *("--", ":/", ":(top,exclude)jsparse/bench/records"),
    )
    return {"hash": commit, "dirty": bool(changes)}
