"""Attention as models use it: Flax layers, and functions for the shapes of models.

`functional` needs JAX only. The layers need flax (``pip install "jsparse[flax]"``) and
load when one is used. No layer builds or changes a mask.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jsparse.nn import functional as functional

if TYPE_CHECKING:
    from jsparse.nn._attention import BlockSparseAttention as BlockSparseAttention
    from jsparse.nn._attention import attention_fn as attention_fn

__all__ = ["BlockSparseAttention", "attention_fn", "functional"]


if not TYPE_CHECKING:  # a type checker would take every name for one of these

    def __getattr__(name: str) -> Any:
        """Loads a layer, once."""
        if name not in __all__:
            raise AttributeError(f"module 'jsparse.nn' has no attribute {name!r}")
        try:
            import flax.nnx  # noqa: F401
        except ImportError as err:
            raise ImportError(
                f"jsparse.nn.{name} needs flax, which cannot be imported here ({err}). "
                'Install it: pip install "jsparse[flax]"',
                name="flax",
            ) from err
        value = getattr(importlib.import_module("jsparse.nn._attention"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """What is loaded, and the layers that are not yet."""
    return sorted({*globals(), *__all__})
