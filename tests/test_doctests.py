"""Runs the examples in the docstrings of every module of the installed package."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import jsparse

MODULES = ["jsparse"] + [
    module.name for module in pkgutil.walk_packages(jsparse.__path__, "jsparse.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write a file
    failed, _ = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert failed == 0, "the captured output above shows the failing examples"
