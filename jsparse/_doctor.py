"""What is installed, and which implementation runs here: ``jsparse doctor``.

Each implementation is asked whether it takes a typical problem, and if so it is run on
a small one and its rows are checked. Called by the command line.
"""

from __future__ import annotations

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import measure, patterns
from jsparse.measure._machine import installed_version
from jsparse.ops import block_sparse_attention, choice, support
from jsparse.patterns import BlockMask

# What each extra brings: if this distribution is there, the extra is.
EXTRAS = {
    "cuda12": "jax-cuda12-plugin",
    "cuda13": "jax-cuda13-plugin",
    "flax": "flax",
    "serving": "starlette",
    "bench": "psutil",
}

# Tried in this order: the more exact one, then what kernels for GPUs take.
DTYPES = ("float32", "bfloat16")


def examine() -> dict[str, Any]:
    """Looks at the installation and tries every implementation.

    Returns:
        ``ok`` (whether at least one implementation gives right results), ``versions``,
        ``machine``, ``implementations`` (name to ``runs``, ``reason``, ``max_error``
        and the ``dtype`` that was tried),
        ``auto`` (of the same problem in bfloat16: ``forward``, ``backward``,
        ``reason``),
        ``extras`` (name to ``version`` and the command that installs it), ``advice``.

    Example:
        >>> found = examine()
        >>> found["ok"], found["implementations"]["xla"]["runs"]
        (True, True)
    """
    result: dict[str, Any] = {"versions": measure.versions()}
    try:
        result["machine"] = measure.machine()
    except measure.BadInput as err:  # JAX found a platform that does not start
        result["machine"] = None
        result["implementations"] = {}
        result["auto"] = None
        result["advice"] = [str(err)]
    else:
        coords, inputs, mask = _problem()
        result["implementations"] = _try_all(coords, inputs, mask)
        q, k, v = (x.astype(jnp.bfloat16) for x in inputs)
        result["auto"] = choice(q, k, v, mask)._asdict()
        result["advice"] = _advice()
    result["extras"] = {
        extra: {
            "version": installed_version(package),
            "install": f"pip install 'jsparse[{extra}]'",
        }
        for extra, package in EXTRAS.items()
    }
    result["ok"] = any(found["runs"] for found in result["implementations"].values())
    return result


def _problem() -> tuple[np.ndarray, list[jax.Array], BlockMask]:
    """Coordinates of 300 atoms, q, k, v with 4 heads of 32, and their mask."""
    rng = np.random.default_rng(0)
    coords = rng.uniform(0, 25, (300, 3)).astype(np.float32)
    mask = patterns.radius(coords, 10.0, block_q=64, block_kv=64)
    inputs = [
        jnp.asarray(rng.standard_normal((300, 4, 32), np.float32)) for _ in range(3)
    ]
    return coords, inputs, mask


def _try_all(
    coords: np.ndarray, inputs: list[jax.Array], mask: BlockMask
) -> dict[str, dict[str, Any]]:
    """Runs each implementation, in the first of `DTYPES` that it takes."""
    rows = measure.choose_rows(300)
    near = measure.within_cutoff(coords, rows, 10.0)

    def attempt(name: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> dict[str, Any]:
        try:
            out = block_sparse_attention(q, k, v, mask, implementation=name)
            check = measure.check_rows(out, rows, q, k, v, near)
        except Exception as err:  # noqa: BLE001 (a backend may fail in any way)
            return _outcome(f"{type(err).__name__}: {err}", dtype=str(q.dtype))
        wrong = None if check.ok else "its results are wrong on this machine"
        return _outcome(wrong, check.max_error, str(q.dtype))

    found: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        q, k, v = (x.astype(dtype) for x in inputs)
        for name, reason in support(q, k, v, mask).items():
            if reason is None and not found.get(name, {}).get("dtype"):
                found[name] = attempt(name, q, k, v)
            elif name not in found:
                found[name] = _outcome(reason)
    return found


def _outcome(
    reason: str | None, max_error: float | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Of an implementation, which runs where there is no reason why not."""
    return {
        "runs": reason is None,
        "reason": reason,
        "max_error": max_error,
        "dtype": dtype,
    }


def _advice() -> list[str]:
    """What would make more of this machine."""
    if jax.default_backend() != "gpu" and shutil.which("nvidia-smi"):
        return [
            "There is an NVIDIA driver, but JAX computes on "
            f"{jax.default_backend()}: install jsparse[cuda13] (or cuda12), or unset "
            "JAX_PLATFORMS."
        ]
    return []
