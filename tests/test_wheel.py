"""What an installed jsparse consists of, and what importing it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata, resources

import pytest

import jsparse

# Loaded on first use: importing jsparse pays for none of them.
LAZY = ["biotite", "flax", "gemmi", "matplotlib", "optax", "rich", "torch", "typer"]


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | env,
    )


def installed_files() -> list[str]:
    """Paths that the wheel put into site-packages, without its metadata and scripts."""
    distribution = metadata.distribution("jsparse")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("jsparse is installed editable; .ci/run tests the wheel's files")
    paths = [file.parts for file in distribution.files or []]
    return [
        "/".join(parts)
        for parts in paths
        if parts[0] != ".." and not parts[0].endswith(".dist-info")
    ]


def test_wheel_holds_one_top_level_package():
    assert {path.split("/")[0] for path in installed_files()} == {"jsparse"}


def test_wheel_holds_no_tests_or_build_leftovers():
    strays = [
        path
        for path in installed_files()
        if "/tests/" in path or path.endswith((".orig", ".rej", ".swp", "~"))
    ]
    assert strays == []


def test_package_is_marked_as_typed():
    assert resources.files(jsparse).joinpath("py.typed").is_file()


def test_package_has_the_table_of_configs():
    table = "pallas_kernels/mosaic_gpu/tables.json"
    assert resources.files(jsparse).joinpath(table).is_file()


def test_version_is_the_distributions():
    assert jsparse.__version__ == metadata.version("jsparse")


def test_importing_loads_no_optional_library():
    code = (
        "from jsparse import *; import sys; "
        f"print([m for m in {LAZY} if m in sys.modules])"
    )
    done = run_python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_public_names_are_loaded_when_they_are_used():
    done = run_python(
        "import jsparse, sys; assert 'jax' not in sys.modules; "
        "names = [n for n in dir(jsparse) if n in jsparse.__all__]; "
        "assert sorted(names) == sorted(jsparse.__all__); "
        "from jsparse import *; assert 'jax' in sys.modules; "
        "from jsparse.ops import block_sparse_attention as op; "
        "assert block_sparse_attention is jsparse.block_sparse_attention is op; "
        "assert patterns.BlockMask is BlockMask"
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="'jsparse' has no attribute 'nonesuch'"):
        jsparse.nonesuch  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_starts_no_jax_backend():
    # With a platform that does not exist, whatever starts a backend fails.
    done = run_python("from jsparse import *", JAX_PLATFORMS="nonesuch")
    assert done.returncode == 0, done.stderr
    control = run_python("import jax; jax.devices()", JAX_PLATFORMS="nonesuch")
    assert control.returncode != 0
    assert "nonesuch" in control.stderr


def test_command_is_installed():
    (command,) = metadata.entry_points(group="console_scripts", name="jsparse")
    assert callable(command.load())
