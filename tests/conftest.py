"""What every test runs under: strict dtypes, repeatable examples, a GPU or a skip.

`pytest --cases N` runs at most N cases of each parametrized test.
"""

from __future__ import annotations

import itertools
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

# Tests compile thousands of small programs, each to run once. On a CPU that takes a
# third of the time with plain loops in place of XLA's fused ones, in one LLVM module in
# place of 32, and without LLVM's optimisations (`quick_compilation`). XLA_FLAGS, even
# empty, keeps what users have.
QUICK = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
QUICK += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", QUICK)

# Threads of JAX's pool: interpreted kernels wait for one another, each in a thread.
os.environ.setdefault("NPROC", "64")

# Two devices on a CPU, so that sharding is tested anywhere.
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(scope="session", autouse=True)
def quick_compilation() -> None:
    """Has XLA compile for a CPU as fast as it can, unless XLA_FLAGS says otherwise."""
    if os.environ["XLA_FLAGS"] == QUICK and jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """Makes JAX refuse to mix dtypes silently.

    Where a test calls a library that relies on promotion, as optax does, it wraps that
    call in `with jax.numpy_dtype_promotion("standard")`.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """For a look at all tests: what breaks one case of a test breaks most."""
    parser.addoption(
        "--cases", type=int, help="of each parametrized test, run at most this many"
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Skips, with a reason, what needs a GPU without one; deselects for ``--cases``."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if jax.default_backend() == "gpu":
        on_gpu = []
    reason = f"needs a GPU; JAX runs on {jax.default_backend()} here"
    for item in on_gpu:
        item.add_marker(pytest.mark.skip(reason=reason))
    if (most := config.getoption("--cases")) is not None:
        skipped = set(on_gpu)
        kept = spread_cases([item for item in items if item not in skipped], most)
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
        items[:] = kept


def spread_cases(items: list[pytest.Item], most: int) -> list[pytest.Item]:
    """At most ``most`` cases of each test, from the first to the last."""
    kept = []
    for _, group in itertools.groupby(items, lambda x: x.nodeid.partition("[")[0]):
        cases = list(group)
        count = min(most, len(cases))
        kept += [cases[i * (len(cases) - 1) // max(count - 1, 1)] for i in range(count)]
    return kept
