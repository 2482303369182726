"""Ways of computing block-sparse attention, in the order that ``"auto"`` tries them."""

from __future__ import annotations

import importlib
from types import ModuleType

IMPLEMENTATIONS = ("mosaic_gpu", "cutlass", "xla", "reference")
_MODULES = {"xla": "jsparse.backends.xla", "reference": "jsparse.backends.reference"}


def load(name: str) -> ModuleType | str:
    """The backend module called ``name``, or why this build has none."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    return f"this version of jsparse has no {name} kernels"
