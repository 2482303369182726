"""Skips tests of the CUDA kernels where they are not built; picks their launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import pytest

from jsparse.backends import _turns, cutlass


@pytest.fixture(autouse=True)
def cutlass_under_test(request):
    """For a test whose parameter ``implementation`` is ``"cutlass"``.

    A test that names the backend itself takes ``cutlass_on_gpu``.
    """
    call = getattr(request.node, "callspec", None)
    if call is not None and call.params.get("implementation") == "cutlass":
        request.getfixturevalue("cutlass_on_gpu")


@pytest.fixture
def cutlass_on_gpu():
    """Skips a test of ``implementation="cutlass"`` where it is not built."""
    if cutlass._library_file() is None:
        pytest.skip("needs the built CUDA kernels: make cuda")


@pytest.fixture
def one_launch(monkeypatch) -> Iterator[None]:
    """Lets few blocks have the CUDA kernel of all gradients, if their mask is known."""
    monkeypatch.setattr(_turns, "FEWEST", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(params=["halves", "share"])
def half_rows(request, monkeypatch) -> Iterator[None]:
    """Makes items of the CUDA kernels be 64 rows, whatever the sizes of the call."""

    def of(call: Any) -> cutlass._Items:
        return cutlass._Items(64, request.param == "share" and call.bias is None)

    monkeypatch.setattr(cutlass._Items, "of", of)
    jax.clear_caches()
    yield
    jax.clear_caches()
