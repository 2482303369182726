"""Atoms of a structure file, ready for the pattern builders.

``read_structure`` takes mmCIF, PDB and BinaryCIF, plain or gzipped, and returns a
``Structure``: plain NumPy arrays, one row per atom. Reading order of the files:

* ``_structure.py``: what a structure is (no file format in it);
* ``_files.py``: bytes from the disk, and which format they are;
* ``_reader.py``: bytes to atoms: models, conformers, waters, hydrogens;
* ``_assembly.py``: operators of the biological assembly and its expansion.

gemmi and biotite are imported when a file is read, not before.
"""

from __future__ import annotations

from jsparse.structure._reader import read_structure as read_structure
from jsparse.structure._structure import Structure as Structure
from jsparse.structure._structure import StructureError as StructureError

__all__ = ["Structure", "StructureError", "read_structure"]
