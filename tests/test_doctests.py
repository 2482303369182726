"""Runs the examples in the docstrings of every module of the installed package."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import jax
import pytest

import jsparse

EXAMPLES = Path(__file__).parents[1] / "examples"
MODULES = ["jsparse"] + [
    module.name for module in pkgutil.walk_packages(jsparse.__path__, "jsparse.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, tmp_path, monkeypatch):
    # An example may write a file, and it may read those of `examples/data`.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    # Users run with JAX's ordinary promotion, some of them without that of ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("raise"):
        failed, _ = doctest.testmod(
            importlib.import_module(name),
            optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
        )
    assert failed == 0, "the captured output above shows the failing examples"
