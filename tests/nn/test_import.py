"""What `import jsparse.nn` does where flax is missing."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_without_flax_the_error_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[:2] == ["jsparse", "nn"]]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n.split(".")[0] == "flax"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as caught:
        importlib.import_module("jsparse.nn")
    assert 'pip install "jsparse[flax]"' in str(caught.value)
    assert caught.value.name == "flax"
    assert isinstance(caught.value.__cause__, ImportError)
