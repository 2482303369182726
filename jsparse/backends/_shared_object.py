"""What is wrong with a shared library, found out before it is loaded.

A file that is cut short, by a full disk or a copy that was interrupted, does not fail
to load: the process dies of SIGBUS when it reads a page that is not there. Called by
`cutlass`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

_HEADER = struct.Struct("<4sBB34xQ10xHH2x")  # of a 64-bit ELF file
_LITTLE_ENDIAN_64 = (b"\x7fELF", 2, 1)


def unknown_build(path: Path) -> str | None:
    """Why it cannot be known what a library was built for, or None.

    Example:
        >>> unknown_build(Path("nonesuch/library.so"))
        'build.json beside it does not exist'
    """
    built = path.with_name("build.json")
    if not built.is_file():
        return "build.json beside it does not exist"
    try:
        json.loads(built.read_text("utf-8"))["jaxlib"]
    except (ValueError, KeyError, TypeError) as err:
        return f"build.json beside it names no jaxlib ({type(err).__name__}: {err})"
    return None


def no_library(path: Path) -> str | None:
    """Why a file is no whole library, or None.

    The table of sections comes last in an ELF file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return f"it has {size} bytes and is no library"
    *kind, table, entry, count = _HEADER.unpack(header)
    if tuple(kind) != _LITTLE_ENDIAN_64:
        return "it is no library for a 64-bit system"
    needed = table + entry * count
    if size < needed:
        return f"it is cut short, {size} bytes of {needed}"
    return None
