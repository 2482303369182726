"""The version, written once: the build reads it from here, users from `jsparse`."""

from __future__ import annotations

__version__ = "0.1.0"
