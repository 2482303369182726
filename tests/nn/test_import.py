"""What `import jsparse.nn` does where flax is missing."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest


@pytest.fixture
def without_flax(monkeypatch):
    """`jsparse.nn`, loaded as if flax were not installed."""
    for name in [n for n in sys.modules if n.split(".")[:2] == ["jsparse", "nn"]]:
        monkeypatch.delitem(sys.modules, name)
    loaded = [n for n in sys.modules if n.split(".")[0] == "flax"]
    for name in {*loaded, "flax", "flax.nnx"}:
        monkeypatch.setitem(sys.modules, name, None)
    return importlib.import_module("jsparse.nn")


@pytest.mark.parametrize("name", ["BlockSparseAttention", "attention_fn"])
def test_without_flax_the_error_says_what_to_install(without_flax, name):
    with pytest.raises(ImportError) as caught:
        getattr(without_flax, name)
    assert f"jsparse.nn.{name} needs flax" in str(caught.value)
    assert 'pip install "jsparse[flax]"' in str(caught.value)
    assert caught.value.name == "flax"
    assert isinstance(caught.value.__cause__, ImportError)


def test_functions_need_no_flax(without_flax):
    x = np.ones((40, 2, 8), np.float32)
    out = without_flax.functional.atom_window_attention(x, x, x)
    np.testing.assert_allclose(out, x, atol=1e-6)


def test_names_that_do_not_exist_are_said_to_be_missing():
    module = importlib.import_module("jsparse.nn")
    assert {"BlockSparseAttention", "attention_fn", "functional"} <= {*dir(module)}
    with pytest.raises(AttributeError, match="has no attribute 'Attention'"):
        module.Attention  # noqa: B018
