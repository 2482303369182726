"""The biological assembly: which operators there are, and their images of the atoms.

A file lists *generators*: a set of chains and the operators to apply to it. Here one
*copy* is everything that one operator makes, over all generators that name it, so a
copy is a unit of the assembly even where generators split it by chain. Called by the
reader alone; may assume finite coordinates.

NCS operators (``MTRIX`` records, ``_struct_ncs_oper``) are never applied: entries that
carry both would come out doubled.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import gemmi

COINCIDENT = 0.01
"""Atoms of two copies closer than this, in ångström, are one atom."""

# The largest assembly in the PDB has a few thousand; a file that asks for more than
# this is damaged, and listing its products could take for ever.
_MAX_OPERATORS = 100_000

_MAX_PAIRS_PER_ATOM = 40

_ABSURD = 1e6  # in ångström; the largest assemblies measure some thousands


@dataclasses.dataclass(frozen=True)
class Generator:
    """Some chains and the transforms to apply to them.

    Attributes:
        members: Names of chains (PDB) or of subchains, ``label_asym_id`` (mmCIF).
        rotations: ``[O, 3, 3]`` float64.
        shifts: ``[O, 3]`` float64, ångström.
    """

    members: frozenset[str]
    rotations: np.ndarray
    shifts: np.ndarray

    def __post_init__(self) -> None:
        """Refuses numbers that no operator of a structure has."""
        for numbers in (self.rotations, self.shifts):
            # The comparison is false for NaN too.
            if not (np.abs(numbers) < _ABSURD).all():
                raise ValueError(
                    "an operator has a missing, non-finite or absurd matrix entry"
                )


@dataclasses.dataclass(frozen=True)
class Copy:
    """What one operator makes: the image of ``atoms`` under rotation and shift.

    Attributes:
        number: Rank of the operator in the file's list, from 1. It names the chains.
        rotation: ``[3, 3]`` float64.
        shift: ``[3]`` float64, ångström.
        atoms: ``[A]`` int64, the atoms it applies to.
    """

    number: int
    rotation: np.ndarray
    shift: np.ndarray
    atoms: np.ndarray


def generators_of_pdb(structure: gemmi.Structure) -> list[Generator]:
    """Generators of the first assembly of a PDB file (``REMARK 350``)."""
    if not structure.assemblies:
        return []
    return [
        Generator(
            frozenset(generator.chains),
            np.array([op.transform.mat.tolist() for op in generator.operators]),
            np.array([op.transform.vec.tolist() for op in generator.operators]),
        )
        for generator in structure.assemblies[0].generators
        if len(generator.operators)
    ]


def generators_of_block(block: gemmi.cif.Block) -> list[Generator]:
    """Generators of the first assembly of an mmCIF block.

    Read from the tables and not from gemmi's ``Structure.assemblies``, where a
    product such as ``(1-60)(61-88)`` keeps its first factor only.

    Raises:
        ValueError: If an operator is malformed or missing.
    """
    from gemmi import cif

    tags = [f"matrix[{i}][{j}]" for i in (1, 2, 3) for j in (1, 2, 3)]
    tags += [f"vector[{i}]" for i in (1, 2, 3)]
    operators = {
        cif.as_string(row[0]): np.array([cif.as_number(row[k]) for k in range(1, 13)])
        for row in block.find("_pdbx_struct_oper_list.", ["id", *tags])
    }
    table = block.find(
        "_pdbx_struct_assembly_gen.", ["assembly_id", "oper_expression", "asym_id_list"]
    )
    rows = [[cif.as_string(value) for value in row] for row in table]
    generators = []
    for _, expression, members in (row for row in rows if row[0] == rows[0][0]):
        transforms = [
            _product([_look_up(name, operators) for name in names])
            for names in parse_expression(expression)
        ]
        generators.append(
            Generator(
                frozenset(name.strip() for name in members.split(",")),
                np.array([rotation for rotation, _ in transforms]),
                np.array([shift for _, shift in transforms]),
            )
        )
    return generators


def parse_expression(expression: str) -> list[tuple[str, ...]]:
    """Spells out ``_pdbx_struct_assembly_gen.oper_expression``.

    Args:
        expression: Such as ``"1"``, ``"1,3-5"``, ``"(X0)(1-60)"`` or
            ``"(1-60)(61-88)"``.

    Returns:
        For each operator the names of its factors; the rightmost is applied first.

    Raises:
        ValueError: If the expression cannot be read or is absurdly large.

    Example:
        >>> from jsparse.structure._assembly import parse_expression
        >>> parse_expression("(1-2)(7,P)")
        [('1', '7'), ('1', 'P'), ('2', '7'), ('2', 'P')]

    References:
        wwPDB, PDBx/mmCIF dictionary, ``_pdbx_struct_assembly_gen.oper_expression``.
    """
    text = "".join(expression.split())
    products: list[tuple[str, ...]] = []
    for term in re.split(r",(?![^()]*\))", text):
        if re.fullmatch(r"(\([^()]+\))+", term):
            factors = [_names(part) for part in re.findall(r"\(([^()]+)\)", term)]
        elif term and "(" not in term and ")" not in term:
            factors = [_names(term)]
        else:
            raise ValueError(f"operator expression {expression!r} cannot be read")
        count = len(products) + math.prod(len(names) for names in factors)
        if count > _MAX_OPERATORS:
            raise ValueError(
                f"operator expression {expression!r} asks for {count:,} operators, "
                f"more than {_MAX_OPERATORS:,}"
            )
        products += itertools.product(*factors)
    return products


def _names(part: str) -> list[str]:
    """Names in one factor: a comma-separated list of names and ranges."""
    names: list[str] = []
    for item in part.split(","):
        span = re.fullmatch(r"(\d{1,9})-(\d{1,9})", item)
        if span is None:
            names.append(item)
            continue
        low, high = int(span[1]), int(span[2])
        if not 0 <= high - low < _MAX_OPERATORS:
            raise ValueError(f"operator range {item!r} is reversed or too long")
        names += map(str, range(low, high + 1))
    return names


def _look_up(name: str, operators: dict[str, np.ndarray]) -> np.ndarray:
    """The 12 numbers of an operator: matrix by rows, then vector."""
    if name not in operators:
        raise ValueError(f"operator {name!r} is not in _pdbx_struct_oper_list")
    return operators[name]


def _product(factors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and shift of a product of operators, rightmost applied first."""
    rotation, shift = np.eye(3), np.zeros(3)
    for factor in reversed(factors):
        matrix = factor[:9].reshape(3, 3)
        rotation, shift = matrix @ rotation, matrix @ shift + factor[9:]
    return rotation, shift


def list_copies(
    generators: Iterable[Generator], coords: np.ndarray, member: np.ndarray
) -> list[Copy]:
    """Lists the copies of an assembly, nearest first.

    Ordered by the distance of each copy's centroid from that of the first operator's
    (ties in file order), so that the first ``n`` are neighbours: a connected patch.

    Args:
        generators: Generators of one assembly.
        coords: ``[N, 3]`` float64, ångström.
        member: ``[N]`` str, the chain or subchain of each atom, in the generators'
            own terms.

    Returns:
        Copies that hold at least one atom.
    """
    # Two operators are one if they move the atoms' box alike; comparing images and
    # not matrices makes the tolerance a distance.
    low, high = coords.min(axis=0), coords.max(axis=0) + 1.0
    probes = np.vstack([low, low + np.diag(high - low)])
    merged: dict[bytes, tuple[np.ndarray, np.ndarray, set[str]]] = {}
    for generator in generators:
        for rotation, shift in zip(generator.rotations, generator.shifts, strict=True):
            image = np.rint((probes @ rotation.T + shift) / COINCIDENT).astype(np.int64)
            entry = merged.setdefault(image.tobytes(), (rotation, shift, set()))
            entry[2].update(generator.members)

    names, code = np.unique(member, return_inverse=True)
    picked: dict[frozenset[str], np.ndarray] = {}
    copies = []
    for number, (rotation, shift, members) in enumerate(merged.values(), start=1):
        chosen = frozenset(members)
        if chosen not in picked:
            wanted = np.array([name in chosen for name in names.tolist()])
            picked[chosen] = np.flatnonzero(wanted[code])
        if len(picked[chosen]):
            copies.append(Copy(number, rotation, shift, picked[chosen]))
    if not copies:
        return []
    means = {id(atoms): coords[atoms].mean(axis=0) for atoms in picked.values()}
    centres = np.array([c.rotation @ means[id(c.atoms)] + c.shift for c in copies])
    # Rounded so that symmetry-equivalent copies tie, and keep the file's order.
    away = np.round(((centres - centres[0]) ** 2).sum(axis=1), 6)
    return [copies[k] for k in np.argsort(away, kind="stable")]


def expand(
    copies: Sequence[Copy], coords: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Applies every copy's operator, and drops atoms that coincide with an earlier one.

    An atom on a symmetry axis is its own image, so every copy brings it again; only
    the first stays. Atoms that coincide within one copy do so in the file itself and
    are left alone.

    Args:
        copies: What to make, in order.
        coords: ``[N, 3]`` float64, ångström.

    Returns:
        ``[M, 3]`` coordinates, ``[M]`` the atom each is the image of, and ``[M]`` the
        index of its copy.

    Raises:
        ValueError: If so many atoms lie on each other that this is no structure.
    """
    from scipy.spatial import KDTree

    moved = np.concatenate([coords[c.atoms] @ c.rotation.T + c.shift for c in copies])
    atom = np.concatenate([c.atoms for c in copies])
    owner = np.repeat(np.arange(len(copies)), [len(c.atoms) for c in copies])
    tree = KDTree(moved, balanced_tree=False)
    # Counting is cheap where listing the pairs would take memory without bound.
    close = int(tree.count_neighbors(tree, COINCIDENT)) - len(moved)
    if close > _MAX_PAIRS_PER_ATOM * len(moved):
        raise ValueError(
            f"{close // 2:,} pairs of its {len(moved):,} expanded atoms are closer "
            f"than {COINCIDENT} Å"
        )
    pairs = tree.query_pairs(COINCIDENT, output_type="ndarray")
    pairs = pairs[owner[pairs[:, 0]] != owner[pairs[:, 1]]]
    keep = np.ones(len(moved), dtype=bool)
    keep[pairs.max(axis=1)] = False
    return moved[keep], atom[keep], owner[keep]
