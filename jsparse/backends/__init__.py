"""Ways of computing block-sparse attention, in the order that ``"auto"`` tries them."""

from __future__ import annotations

import importlib
from types import ModuleType

IMPLEMENTATIONS = ("mosaic_gpu", "cutlass", "xla", "reference")


def load(name: str) -> ModuleType:
    """The backend module called ``name``."""
    return importlib.import_module(f"jsparse.backends.{name}")
