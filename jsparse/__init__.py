"""Grouped block-sparse attention for protein-structure models in JAX.

The public names are loaded when they are first used. Loading them loads JAX, which
takes a second; the ``jsparse`` command must be able to answer Ctrl-C before that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jsparse._version import __version__ as __version__

if TYPE_CHECKING:
    from jsparse import patterns as patterns
    from jsparse.bias import BlockBias as BlockBias
    from jsparse.bias import DistanceBias as DistanceBias
    from jsparse.bias import EntryBias as EntryBias
    from jsparse.bias import ScoreFunction as ScoreFunction
    from jsparse.ops import block_sparse_attention as block_sparse_attention
    from jsparse.patterns import BlockMask as BlockMask
    from jsparse.patterns import CapacityError as CapacityError

_HOMES = {
    "BlockBias": "jsparse.bias",
    "BlockMask": "jsparse.patterns",
    "CapacityError": "jsparse.patterns",
    "DistanceBias": "jsparse.bias",
    "EntryBias": "jsparse.bias",
    "ScoreFunction": "jsparse.bias",
    "block_sparse_attention": "jsparse.ops",
}
_MODULES = ("bias", "ops", "patterns")

__all__ = [
    "BlockBias",
    "BlockMask",
    "CapacityError",
    "DistanceBias",
    "EntryBias",
    "ScoreFunction",
    "__version__",
    "block_sparse_attention",
    "patterns",
]


if not TYPE_CHECKING:  # a type checker would take every name for one of these

    def __getattr__(name: str) -> Any:
        """Loads a public name, once."""
        if name in _MODULES:
            return importlib.import_module(f"jsparse.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'jsparse' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """What is loaded, and the public names that are not yet."""
    return sorted({*globals(), *__all__})
