"""Ways of computing block-sparse attention, in the order that ``"auto"`` tries them."""

from __future__ import annotations

import importlib
from types import ModuleType

IMPLEMENTATIONS = ("mosaic_gpu", "cutlass", "xla", "reference")
_BUILT = ("mosaic_gpu", "xla", "reference")


def load(name: str) -> ModuleType | str:
    """The backend module called ``name``, or why this build has none."""
    if name in _BUILT:
        return importlib.import_module(f"jsparse.backends.{name}")
    return f"this version of jsparse has no {name} kernels"
