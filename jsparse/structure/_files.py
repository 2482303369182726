"""Bytes of a structure file, and which format they are.

The content decides; the name is only consulted to word an error. Called by the reader
alone. Nothing here interprets a coordinate.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from pathlib import Path
from typing import Literal

from jsparse.structure._structure import StructureError

Format = Literal["mmcif", "pdb", "bcif"]

EXPECTED = "Expected mmCIF, PDB or BinaryCIF, plain or gzipped."

# First bytes of things that people pass by mistake.
_FOREIGN = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"BZh": "compressed with bzip2; decompress it first",
    b"\xfd7zXZ": "compressed with xz; decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it first",
    b"\x93NUMPY": "a NumPy array",
    b"<?xml": "XML (PDBML?); fetch the entry as mmCIF",
    b"<!DOCTYPE": "a web page; was the download refused?",
    b"<html": "a web page; was the download refused?",
    b"{": "JSON (mmJSON?); fetch the entry as mmCIF",
}

_COMMENTS = re.compile(rb"\A(?:\s+|#[^\r\n]*)*")
_PDB_ATOM = re.compile(rb"^(?:ATOM|HETATM)[ \d]", re.MULTILINE | re.IGNORECASE)
_PDB_RECORD = re.compile(
    rb"\A\s*(?:HEADER|TITLE |COMPND|REMARK|CRYST1|EXPDTA|MODEL |OBSLTE|SPLIT |END)"
)


def load(path: str | os.PathLike[str]) -> tuple[bytes, Format]:
    """Reads a file whole, gunzips it if it is gzipped, and names its format.

    Args:
        path: The file.

    Returns:
        The decompressed content, and the format.

    Raises:
        OSError: If the file is missing, a folder, or not readable.
        StructureError: If it is empty, cut off, or no structure file.
    """
    file = Path(path)
    if file.exists() and not (file.is_file() or file.is_dir()):
        # A pipe or a device could be read for ever.
        raise StructureError(
            f"{file}: is not a regular file. {EXPECTED} Write the data to a file first."
        )
    data = file.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as err:
            raise StructureError(
                f"{file}: the gzip data is cut off or damaged ({err}). Fetch the file "
                "again."
            ) from err
    data = data.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark, which gemmi refuses
    if not data.strip():
        raise StructureError(f"{file}: the file is empty. {EXPECTED}")
    return data, sniff(data, file)


def sniff(data: bytes, file: Path) -> Format:
    """Names the format of ``data``, from its content.

    Raises:
        StructureError: If it is none of the three, saying what it looks like.
    """
    for magic, what in _FOREIGN.items():
        if data.startswith(magic):
            raise StructureError(f"{file}: is {what}. {EXPECTED}")
    # BinaryCIF is one MessagePack map, whose key "dataBlocks" is required.
    if (data[0] & 0xF0 == 0x80 or data[0] in (0xDE, 0xDF)) and (
        b"dataBlocks" in data or ".bcif" in file.name.lower()
    ):
        return "bcif"
    start = _start(data)
    if data[start : start + 5].lower() == b"data_":
        return "mmcif"
    if b"\0" not in data:
        if _PDB_ATOM.search(data):
            return "pdb"
        if _PDB_RECORD.match(data):
            raise StructureError(
                f"{file}: a PDB file without any ATOM or HETATM record. It may be cut "
                "off; fetch it again."
            )
    line = data[start : start + 40].splitlines()[:1]
    raise StructureError(
        f"{file}: is not a structure file; it begins with {b''.join(line)!r}. "
        f"{EXPECTED}"
    )


def _start(data: bytes) -> int:
    """Offset of the first byte that is neither blank nor in a comment."""
    match = _COMMENTS.match(data)
    return match.end() if match else 0
