"""Small structure files for the tests of this folder (no test in here)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

DATA = Path(__file__).parents[2] / "examples" / "data"

ATOM_TAGS = (
    *("group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id"),
    *("label_comp_id", "label_asym_id", "label_entity_id", "label_seq_id"),
    *("pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z", "occupancy"),
    *("B_iso_or_equiv", "auth_seq_id", "auth_asym_id", "pdbx_PDB_model_num"),
)


def atom(
    name: str,
    xyz: tuple[object, object, object],
    *,
    alt: str = ".",
    residue: str = "ALA",
    number: int = 1,
    chain: str = "A",
    subchain: str | None = None,
    element: str | None = None,
    model: int = 1,
) -> dict[str, object]:
    """One atom; ``mmcif`` and ``pdb`` write it."""
    return {
        "name": name,
        "xyz": xyz,
        "alt": alt,
        "residue": residue,
        "number": number,
        "chain": chain,
        "subchain": subchain or chain,
        "element": element or name[0],
        "model": model,
    }


def mmcif(atoms: Iterable[dict], extra: str = "", name: str = "TEST") -> str:
    """Writes an mmCIF file; ``extra`` goes before the atoms."""
    lines = [f"data_{name}", f"_entry.id {name}", extra.strip(), "loop_"]
    lines += [f"_atom_site.{tag}" for tag in ATOM_TAGS]
    for serial, a in enumerate(atoms, start=1):
        x, y, z = a["xyz"]
        lines.append(
            f"ATOM {serial} {a['element']} {a['name']} {a['alt']} {a['residue']} "
            f"{a['subchain']} 1 {a['number']} ? {x} {y} {z} 1.0 10.0 {a['number']} "
            f"{a['chain']} {a['model']}"
        )
    return "\n".join(lines) + "\n"


def pdb(atoms: Iterable[dict], remarks: str = "") -> str:
    """Writes a PDB file; a coordinate that is a string is written as it is."""
    lines = remarks.strip().splitlines()
    model = None
    atoms = list(atoms)
    several = len({a["model"] for a in atoms}) > 1
    for serial, a in enumerate(atoms, start=1):
        if several and a["model"] != model:
            lines += ["ENDMDL"] * (model is not None) + [f"MODEL     {a['model']:4d}"]
            model = a["model"]
        xyz = "".join(
            f"{v:>8s}" if isinstance(v, str) else f"{v:8.3f}" for v in a["xyz"]
        )
        alt = " " if a["alt"] == "." else a["alt"]
        lines.append(
            f"ATOM  {serial:5d}  {a['name']:<3s}{alt}{a['residue']:>3s}"
            f"{a['chain']:>2s}{a['number']:4d}    {xyz}  1.00 10.00          "
            f"{a['element']:>2s}"
        )
    return "\n".join([*lines, *(["ENDMDL"] * several), "END"]) + "\n"


def operators(transforms: Mapping[str, tuple]) -> str:
    """Writes ``_pdbx_struct_oper_list``: for each name a matrix and a vector."""
    tags = [f"matrix[{i}][{j}]" for i in (1, 2, 3) for j in (1, 2, 3)]
    tags += [f"vector[{i}]" for i in (1, 2, 3)]
    lines = ["loop_", "_pdbx_struct_oper_list.id"]
    lines += [f"_pdbx_struct_oper_list.{tag}" for tag in tags]
    for name, (matrix, vector) in transforms.items():
        numbers = [v for row in matrix for v in row] + list(vector)
        lines.append(" ".join([name, *(f"{v:.9f}" for v in numbers)]))
    return "\n".join(lines) + "\n"


def generators(rows: Iterable[tuple[str, str, str]]) -> str:
    """Writes ``_pdbx_struct_assembly_gen``: assembly, expression, chains."""
    lines = ["loop_"]
    lines += [
        f"_pdbx_struct_assembly_gen.{tag}"
        for tag in ("assembly_id", "oper_expression", "asym_id_list")
    ]
    lines += [f"{a} '{expression}' {chains}" for a, expression, chains in rows]
    return "\n".join(lines) + "\n"
