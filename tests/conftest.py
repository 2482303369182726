"""What every test runs under: strict dtypes, repeatable examples, a GPU or a skip."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# No deadline, as a compilation may fall into any example; the same examples on every
# run. `--hypothesis-profile=default` searches at random instead.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile("repeatable")

# Threads of JAX's pool: interpreted kernels wait for one another, each in a thread.
os.environ.setdefault("NPROC", "64")

# Two devices on a CPU, so that sharding is tested anywhere.
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """Makes JAX refuse to mix dtypes silently.

    Where a test calls a library that relies on promotion, as optax does, it wraps that
    call in `with jax.numpy_dtype_promotion("standard")`.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu`, with a printed reason, where JAX finds no GPU."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu or jax.default_backend() == "gpu":
        return
    reason = f"needs a GPU; JAX runs on {jax.default_backend()} here"
    for item in on_gpu:
        item.add_marker(pytest.mark.skip(reason=reason))
