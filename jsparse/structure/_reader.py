"""From bytes to atoms: parse, pick a model, one conformer, drop waters and hydrogens.

gemmi parses mmCIF and PDB; BinaryCIF is decoded by biotite and handed to gemmi as the
tables it stands for, so that one set of rules decides what an atom is. Whatever goes
wrong below leaves as a ``StructureError`` that names the file. Called by users, the
command line and the benchmark cases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jsparse.structure import _assembly, _files
from jsparse.structure._structure import Structure, StructureError

if TYPE_CHECKING:
    import gemmi

_DEUTERIUM = 119  # gemmi's own number for D, past the last element

_PDB_CLOSED = re.compile(rb"^(?:END|MASTER|CONECT)", re.MULTILINE)

# Tables and columns of a BinaryCIF file that decide atoms and assemblies.
_TABLES: dict[str, tuple[str, ...] | None] = {
    "entry": None,
    "atom_site": (
        *("group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id"),
        *("label_comp_id", "label_asym_id", "label_entity_id", "label_seq_id"),
        *("pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z", "auth_seq_id"),
        *("auth_comp_id", "auth_asym_id", "auth_atom_id", "pdbx_PDB_model_num"),
    ),
    "pdbx_struct_assembly_gen": None,
    "pdbx_struct_oper_list": None,
}


@dataclasses.dataclass(frozen=True)
class _Atoms:
    """Atoms of one model as the file has them; residues and chains are indices.

    ``coords [N, 3]`` float64; ``elements``, ``names``, ``altlocs``, ``serials`` and
    ``residue`` have one entry per atom; ``residue_*`` one per residue.
    """

    coords: np.ndarray
    elements: np.ndarray
    names: np.ndarray
    altlocs: np.ndarray
    serials: np.ndarray
    residue: np.ndarray
    residue_names: np.ndarray
    residue_ids: list[str]
    residue_subchains: np.ndarray
    residue_chain: np.ndarray
    chain_names: list[str]

    def pick(self, index: np.ndarray) -> _Atoms:
        """Keeps the atoms of a mask; residues and chains keep their numbers."""
        per_atom = ("coords", "elements", "names", "altlocs", "serials", "residue")
        return dataclasses.replace(
            self, **{f: getattr(self, f)[index] for f in per_atom}
        )

    def describe(self, k: int) -> str:
        """Names atom ``k`` as a reader of the file would look for it."""
        r = int(self.residue[k])
        chain = self.chain_names[int(self.residue_chain[r])]
        return (
            f"atom {int(self.serials[k])} (chain {chain}, residue "
            f"{self.residue_names[r]} {self.residue_ids[r]}, {self.names[k]})"
        )


def read_structure(
    path: str | os.PathLike[str],
    *,
    model: int = 0,
    hydrogens: bool = False,
    waters: bool = False,
    copies: int | None = 1,
    max_atoms: int | None = None,
) -> Structure:
    """Reads the atoms of an mmCIF, PDB or BinaryCIF file, plain or gzipped.

    The content decides the format, so a misnamed file is read all the same. Of
    alternative locations the first of each atom is kept, and the first of residues
    that share one position in the chain. Ligands, ions, and modified residues stay.
    Chains are the author's, ligands with the chain they are named after.

    A plain mmCIF or PDB file that was cut exactly between two lines can be a valid,
    smaller file; it is only noticed where the file's own punctuation gives it away.

    Args:
        path: ``.cif``, ``.mmcif``, ``.pdb``, ``.ent`` or ``.bcif``, perhaps ``.gz``.
        model: Which model, from 0.
        hydrogens: Whether to keep hydrogen and deuterium.
        waters: Whether to keep water.
        copies: 1 for the deposited unit as it is; ``n`` for that many neighbouring
            copies of the first biological assembly, those whose centroids are nearest
            to the first one's; ``None`` for the whole assembly. With ``n`` or
            ``None``, atoms of one copy within 0.01 Å of another's are dropped.
        max_atoms: Refuse to return more atoms than this. An expansion is refused
            before its memory is taken.

    Returns:
        The atoms, chain by chain; of an assembly, copy by copy, nearest first.

    Raises:
        OSError: If the file is missing (``FileNotFoundError``), a folder, unreadable.
        StructureError: If it is damaged, no structure file, has no atom left, a
            missing or non-finite coordinate, no such model or copies, or too many
            atoms.

    Example:
        >>> from jsparse.structure import read_structure
        >>> read_structure("examples/data/1UBI.pdb.gz")
        Structure('1UBI': 602 atoms, 76 residues, 1 chains)
        >>> read_structure("examples/data/7CTH.cif.gz", copies=6)
        Structure('7CTH': 99,882 atoms, 12,966 residues, 60 chains)

    References:
        gemmi (https://gemmi.readthedocs.io) for the model hierarchy and conformers;
        wwPDB, PDBx/mmCIF dictionary, for assemblies.
    """
    file = Path(path)
    model = _integer("model", model, 0, file)
    copies = None if copies is None else _integer("copies", copies, 1, file)
    limit = None if max_atoms is None else _integer("max_atoms", max_atoms, 1, file)

    parsed, block = _parse(file)
    if not any(part.count_atom_sites() for part in parsed):
        raise StructureError(
            f"{file}: has no atoms that can be read. Expected ATOM records (PDB) or an "
            "_atom_site table with type_symbol, label_atom_id, label_comp_id, "
            "label_asym_id and Cartn_x, Cartn_y, Cartn_z."
        )
    with _refusing(file):
        atoms = _atoms(parsed, model, file)
        has_name = "_entry.id" in parsed.info  # gemmi's mapping has no get()
        name = parsed.info["_entry.id"] if has_name else ""
    keep = _first_conformer(atoms)
    if not hydrogens:
        keep &= (atoms.elements != 1) & (atoms.elements != _DEUTERIUM)
    if not waters:
        keep &= ~_water(atoms)
    total, atoms = len(keep), atoms.pick(keep)
    if not len(atoms.coords):
        raise StructureError(
            f"{file}: none of the {total:,} atoms of model {model} is left: waters and "
            "hydrogens are dropped. Expected at least one other atom; take another "
            "file (from Python, read_structure can keep them)."
        )
    _check_finite(atoms, file)

    stem = re.sub(r"(\.gz|\.(cif|mmcif|pdb|ent|bcif))+$", "", file.name, flags=re.I)
    owner = np.zeros(len(atoms.coords), dtype=np.int64)
    source = np.arange(len(atoms.coords))
    coords, numbers = atoms.coords, [1]
    if copies == 1:
        _check_size(len(coords), limit, "", file)
    else:
        chosen = _choose_copies(atoms, parsed, block, copies, file)
        size = sum(len(copy.atoms) for copy in chosen)
        _check_size(size, limit, f" in {len(chosen):,} copies", file)
        coords, source, owner = _expand(chosen, coords, file)
        numbers = [copy.number for copy in chosen]
    return _build(atoms, name.strip() or stem, coords, source, owner, numbers)


def _integer(name: str, value: Any, least: int, file: Path) -> int:
    """Checks a count or an index given by the caller."""
    try:
        number = operator.index(value)
    except TypeError as err:
        raise TypeError(f"{name}: got {value!r}; expected an integer.") from err
    if number < least:
        hint = " None stands for the whole assembly." if name == "copies" else ""
        raise StructureError(
            f"{file}: {name}={number}; expected an integer of at least {least}.{hint}"
        )
    return number


def _check_size(atoms: int, limit: int | None, where: str, file: Path) -> None:
    """Refuses more atoms than the caller allows."""
    if limit is not None and atoms > limit:
        raise StructureError(
            f"{file}: {atoms:,} atoms{where}, more than max_atoms={limit:,}. Raise "
            "max_atoms or ask for fewer copies."
        )


@contextlib.contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Turns whatever a parser trips over into a ``StructureError``.

    A bad byte surfaces as ValueError, KeyError, a MessagePack error, ... and, where
    biotite's compiled half panics, as an exception outside ``Exception``.
    """
    try:
        yield
    except (StructureError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as err:
        raise StructureError(
            f"{file}: the data is cut off or damaged ({type(err).__name__}: {err}). "
            "Fetch the file again."
        ) from err


def _parse(file: Path) -> tuple[gemmi.Structure, gemmi.cif.Block | None]:
    """Parses a file into gemmi's hierarchy; the block is None for a PDB file."""
    import gemmi

    data, kind = _files.load(file)
    block = None
    with _refusing(file):
        if kind == "pdb":
            _check_pdb(data, file)
            parsed = gemmi.read_pdb_string(data)
        else:
            read = _decode_bcif if kind == "bcif" else gemmi.cif.read_string
            block = _atom_block(read(data), file)
            if kind == "mmcif":
                _check_closed(block, data, file)
            parsed = gemmi.make_structure_from_block(block)
        parsed.merge_chain_parts()
    return parsed, block


def _decode_bcif(data: bytes) -> gemmi.cif.Document:
    """Decodes BinaryCIF into the mmCIF tables that this module needs."""
    from biotite.structure.io import pdbx
    from gemmi import cif

    binary = pdbx.BinaryCIFFile.read(io.BytesIO(data))
    document = cif.Document()
    for block_name, source in binary.items():
        block = document.add_new_block(block_name)
        for table, wanted in _TABLES.items():
            if table not in source:
                continue
            category = source[table]
            columns = {
                tag: [_quoted(text) for text in column.as_array(str).tolist()]
                for tag, column in category.items()
                if wanted is None or tag in wanted
            }
            block.set_mmcif_category(f"_{table}.", columns, raw=True)
    return document


def _quoted(text: str) -> str:
    """Quotes what mmCIF would read as something else: blanks, quotes, text fields."""
    from gemmi import cif

    return cif.quote(text) if not text or text[0] in "'\";" or " " in text else text


def _atom_block(document: gemmi.cif.Document, file: Path) -> gemmi.cif.Block:
    """Finds the first block that has Cartesian atoms."""
    for block in document:
        if block.find_values("_atom_site.Cartn_x"):
            return block
    raise StructureError(
        f"{file}: has no _atom_site.Cartn_x, so no atoms. Expected the mmCIF or "
        "BinaryCIF of a macromolecule, not of its reflections, restraints or a small "
        "molecule; or the file is cut off."
    )


def _check_closed(block: gemmi.cif.Block, data: bytes, file: Path) -> None:
    """Refuses an mmCIF file that stops in its atom table.

    A table is complete at any row, so gemmi notices a cut only inside one. But most
    writers put a line ``#`` behind every table: if the file does so elsewhere and
    ends without one on the atoms, rows are missing.
    """
    if data.rstrip()[-1:] == b"#":
        return
    last = list(block)[-1]
    in_atoms = last.loop is not None and last.loop.tags[0].startswith("_atom_site.")
    if in_atoms and len(re.findall(rb"^#[ \t]*\r?$", data, re.MULTILINE)) >= 2:
        raise StructureError(
            f"{file}: seems cut off inside the atom table: other tables end with a "
            "line '#', this last one does not. Fetch the file again; if it is "
            "complete, add that line."
        )


def _check_pdb(data: bytes, file: Path) -> None:
    """Checks that the file ends and that its atom records hold three numbers.

    gemmi reads a blank or unreadable coordinate of a PDB file as 0.0, and a file cut
    between two records as a smaller one. An entry that opens with HEADER closes with
    END; files without a header are often written without either.
    """
    if data.startswith(b"HEADER") and not _PDB_CLOSED.search(data):
        raise StructureError(
            f"{file}: seems cut off: it opens with a HEADER record, as PDB entries do, "
            "but has no END. Fetch the file again; if it is complete, add a line END."
        )
    end = re.search(rb"^END[ \t]*\r?$", data, re.MULTILINE | re.IGNORECASE)
    lines = data[: end.start() if end else None].splitlines()
    records = [line for line in lines if line[:4].upper() in (b"ATOM", b"HETA")]
    short = next((line for line in records if len(line) < 54), None)
    if short is not None:
        raise StructureError(
            f"{file}: the atom record {short.decode('latin-1')!r} stops before column "
            "54, inside its coordinates. The file is cut off or no PDB file; fetch it "
            "again."
        )
    fields = np.array([line[30:54] for line in records], dtype="S24").view("S8")
    try:
        fields.astype(np.float64)
    except ValueError:
        for line in records:
            _check_pdb_record(line, file)


def _check_pdb_record(line: bytes, file: Path) -> None:
    """Raises if a coordinate of this record is not a number."""
    for axis, start in zip("xyz", (30, 38, 46), strict=True):
        text = line[start : start + 8]
        try:
            float(text)
        except ValueError as err:
            label = line[:27].decode("latin-1").strip()
            raise StructureError(
                f"{file}: {axis} of atom record {label!r} is {text.decode('latin-1')!r}"
                "; expected a number in columns "
                f"{start + 1} to {start + 8}. Repair or remove the record."
            ) from err


def _atoms(parsed: gemmi.Structure, model: int, file: Path) -> _Atoms:
    """Flattens one model: a loop over residues; atoms come as arrays from gemmi.

    Uses ``parsed`` up: other models and the names of residues are gone afterwards.
    """
    import gemmi

    if model >= len(parsed):
        raise StructureError(
            f"{file}: model={model}, but the file has {len(parsed)} model(s), "
            f"numbered from 0. Pass a model below {len(parsed)}."
        )
    for k in reversed(range(len(parsed))):
        if k != model:
            del parsed[k]
    chains = [chain for chain in parsed[0] if len(chain)]
    residues = [residue for chain in chains for residue in chain]
    table = {
        "residue_names": np.array([r.name for r in residues], dtype=np.str_),
        "residue_ids": [str(r.seqid) for r in residues],
        "residue_subchains": np.array([r.subchain for r in residues], dtype=np.str_),
        "residue_chain": np.repeat(np.arange(len(chains)), [len(c) for c in chains]),
        "chain_names": [chain.name for chain in chains],
    }
    for part in (*chains, *residues):
        # gemmi's flat arrays refuse long names; these are in the table by now.
        part.name = ""
    for residue in residues:
        residue.subchain = residue.entity_id = ""
    flat = gemmi.FlatStructure(parsed)
    names = np.ascontiguousarray(flat.atom_names).view("S8")[:, 0]
    return _Atoms(
        coords=np.array(flat.pos, dtype=np.float64),
        elements=np.array(flat.elements, dtype=np.uint8),
        names=np.char.decode(names, "latin-1"),
        altlocs=np.array(flat.altlocs),
        serials=np.array(flat.serials),
        residue=np.repeat(np.arange(len(residues)), [len(r) for r in residues]),
        **table,
    )


def _first_conformer(atoms: _Atoms) -> np.ndarray:
    """Marks one location of each atom, and one residue of each position.

    As gemmi's ``first_conformer``, with two differences that only show in odd files:
    conformers may be listed one whole after another, and atoms that share a name but
    carry no altloc label are all kept, since nothing says that they exclude each other.
    """
    keep = np.ones(len(atoms.residue), dtype=bool)
    labelled = atoms.altlocs != 0
    if not labelled.any():
        return keep
    involved = np.flatnonzero(np.bincount(atoms.residue[labelled]))
    at = np.flatnonzero(np.isin(atoms.residue, involved))
    names, code = np.unique(atoms.names[at], return_inverse=True)
    key = atoms.residue[at] * len(names) + code
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    leader = at[first[group]]
    keep[at] = (at == leader) | ~(labelled[at] | labelled[leader])

    # Two residue types at one position (microheterogeneity): both fully labelled.
    whole = np.bincount(atoms.residue[~labelled], minlength=len(atoms.residue_ids)) == 0
    dropped = np.zeros(len(whole), dtype=bool)
    head = -1
    for r in np.flatnonzero(whole).tolist():
        if head >= 0 and not whole[head:r].all():
            head = -1
        if head >= 0 and _same_position(atoms, head, r):
            dropped[r] = True
        else:
            head = r
    return keep & ~dropped[atoms.residue]


def _same_position(atoms: _Atoms, a: int, b: int) -> bool:
    """Whether two residues have one sequence number in one (sub)chain."""
    return bool(
        atoms.residue_ids[a] == atoms.residue_ids[b]
        and atoms.residue_chain[a] == atoms.residue_chain[b]
        and atoms.residue_subchains[a] == atoms.residue_subchains[b]
    )


def _water(atoms: _Atoms) -> np.ndarray:
    """Marks the atoms of water molecules."""
    import gemmi

    names, code = np.unique(atoms.residue_names, return_inverse=True)
    water = [gemmi.find_tabulated_residue(name).is_water() for name in names.tolist()]
    return np.array(water, dtype=bool)[code][atoms.residue]


def _check_finite(atoms: _Atoms, file: Path) -> None:
    """Refuses atoms without a position that float32 holds, naming the first."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(atoms.coords.astype(np.float32))
    bad = np.flatnonzero(~finite.all(axis=1))
    if len(bad):
        raise StructureError(
            f"{file}: {atoms.describe(int(bad[0]))} has coordinates "
            f"{atoms.coords[bad[0]].tolist()}, one of {len(bad):,} atom(s) with a "
            "coordinate that is missing or not finite in float32. Expected numbers in "
            "ångström; repair or remove them."
        )


def _choose_copies(
    atoms: _Atoms,
    parsed: gemmi.Structure,
    block: gemmi.cif.Block | None,
    copies: int | None,
    file: Path,
) -> list[_assembly.Copy]:
    """The copies that the caller asked for, nearest first."""
    try:
        if block is None:
            generators = _assembly.generators_of_pdb(parsed)
            member = np.array(atoms.chain_names, dtype=np.str_)[atoms.residue_chain]
        else:
            generators = _assembly.generators_of_block(block)
            member = atoms.residue_subchains
    except ValueError as err:
        raise StructureError(
            f"{file}: the biological assembly is malformed: {err}. Read the deposited "
            "unit with copies=1."
        ) from err
    found = _assembly.list_copies(generators, atoms.coords, member[atoms.residue])
    if not found:
        raise StructureError(
            f"{file}: copies={copies}, but the file describes no biological assembly "
            "of its atoms (_pdbx_struct_assembly_gen in mmCIF, REMARK 350 in PDB). "
            "Read the deposited unit with copies=1."
        )
    if copies is not None and copies > len(found):
        raise StructureError(
            f"{file}: copies={copies}, but the first biological assembly has "
            f"{len(found):,}. Ask for at most that many, or for all."
        )
    return found[:copies]


def _expand(
    chosen: list[_assembly.Copy], coords: np.ndarray, file: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expands the copies; a file whose atoms lie on each other cannot be."""
    try:
        return _assembly.expand(chosen, coords)
    except ValueError as err:
        raise StructureError(
            f"{file}: {err}. Expected distinct atoms; read the deposited unit with "
            "copies=1 to look at them."
        ) from err


def _build(
    atoms: _Atoms,
    name: str,
    coords: np.ndarray,
    source: np.ndarray,
    owner: np.ndarray,
    numbers: list[int],
) -> Structure:
    """Assembles the result; residues and chains without an atom left are not counted.

    ``source`` and ``owner`` are, for each atom, the deposited atom and the copy.
    """
    residue = atoms.residue[source]
    chain_of = atoms.residue_chain[residue]
    residue_index, _ = _renumber(owner * len(atoms.residue_ids) + residue)
    chain_index, chains = _renumber(owner * len(atoms.chain_names) + chain_of)
    copy, chain = np.divmod(chains, len(atoms.chain_names))
    return Structure(
        name=name,
        coords=coords.astype(np.float32),
        elements=np.where(atoms.elements == _DEUTERIUM, 1, atoms.elements)[source],
        residue_names=atoms.residue_names[residue],
        atom_names=atoms.names[source],
        residue_index=residue_index,
        chain_index=chain_index,
        chain_names=tuple(
            atoms.chain_names[k] + (f"-{numbers[c]}" if numbers[c] > 1 else "")
            for c, k in zip(copy.tolist(), chain.tolist(), strict=True)
        ),
    )


def _renumber(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps the labels in use to 0, 1, 2, ... in their order; returns them as well."""
    used = np.zeros(int(labels.max()) + 1, dtype=bool)
    used[labels] = True
    return (np.cumsum(used) - 1)[labels], np.flatnonzero(used)
