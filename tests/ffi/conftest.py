"""The CUDA kernels' code on a CPU: `simulate.cc` says what of it runs there."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from jsparse.backends import _hopper, cutlass

HERE = Path(__file__).parent
FFI = HERE.parents[1] / "ffi"
PACKAGES = {
    "cutlass_library": "source/include",
    "jaxlib": "include",
    "nvidia.cu13": "include",
}


def headers() -> list[Path]:
    """Folders of the headers that the sources in ``ffi/`` include; or skips."""
    if not FFI.is_dir():
        pytest.skip("needs the sources in ffi/, which a wheel does not have")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    found = []
    for package, folder in PACKAGES.items():
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip(f"needs the headers of {package}: the extra dev brings them")
        found.append(Path(spec.submodule_search_locations[0]) / folder)
    return [*found, found[-1] / "cccl"]


def compiled(factory: pytest.TempPathFactory, name: str, *sources: str) -> ctypes.CDLL:
    """A library of sources in this folder, for the CPU; workers of one run share it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / f"{name}.so"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(path, *sources)
    return ctypes.CDLL(os.fspath(path))


def _compile(path: Path, *sources: str) -> None:
    places = ["-I" + str(x) for x in (HERE, HERE / "simulated", FFI, FFI / "include")]
    systems = [x for folder in headers() for x in ("-isystem", str(folder))]
    flags = "-std=c++20 -O2 -shared -fPIC -fvisibility=hidden -Wall -Wextra -Werror"
    # As nvcc compiles: accesses through other types, and its pragmas.
    flags += " -fno-strict-aliasing -Wno-unknown-pragmas"
    # Some systems' longjmp stops what jumps from stack to stack, as fibers do.
    flags += " -U_FORTIFY_SOURCE"
    files = [str(HERE / name) for name in sources]
    command = ["g++", *flags.split(), *places, *systems, *files, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> ctypes.CDLL:
    """The simulated library, its handlers registered for the CPU."""
    library = compiled(tmp_path_factory, "simulated", "simulate.cc", "layouts.cc")
    for target in cutlass.TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, f"{target}_on_host"))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return library


@pytest.fixture
def on_cpu(simulated, monkeypatch) -> ctypes.CDLL:
    """Lets ``implementation="cutlass"`` use the simulated library, with few CTAs."""
    jax.clear_caches()  # a call traced before has another schedule
    monkeypatch.setattr(cutlass, "_library", lambda: simulated)
    monkeypatch.setattr(cutlass, "why_not", cutlass._not_taken)
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 3)
    return simulated
