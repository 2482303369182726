"""Biological assemblies: operators, products, chains, neighbours, coincidences."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
from scipy.spatial import KDTree

from jsparse.structure import StructureError, read_structure
from jsparse.structure._assembly import parse_expression
from tests.structure.files import DATA, atom, generators, mmcif, operators, pdb

EYE = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
HALF_TURN_Z = [[-1, 0, 0], [0, -1, 0], [0, 0, 1]]


def shift(x: float, y: float = 0.0, z: float = 0.0):
    """A translation."""
    return EYE, [x, y, z]


def turn(angle: float, z: float = 0.0):
    """A rotation about z by ``angle`` (radian), then a shift along it."""
    c, s = np.cos(angle), np.sin(angle)
    return [[c, -s, 0], [s, c, 0], [0, 0, 1]], [0, 0, z]


def write(folder, text: str, name: str = "made.cif"):
    """Writes a file and returns its path."""
    path = folder / name
    path.write_text(text)
    return path


TWO_CHAINS = [
    atom("CA", (1, 0, 0), chain="A"),
    atom("CB", (2, 0, 0), chain="A"),
    atom("CA", (0, 5, 0), chain="B"),
]


def test_whole_particle_agrees_with_gemmi():
    """All 60 copies of the dengue virus, every atom."""
    path = DATA / "7CTH.cif.gz"
    ours = read_structure(path, copies=None)
    assert len(ours) == 998_820
    assert ours.num_chains == len(set(ours.chain_names)) == 600
    assert ours.num_residues == 60 * 2161
    np.testing.assert_allclose(np.ptp(ours.coords, axis=0), 516, atol=0.1)

    parsed = gemmi.read_structure(str(path))
    parsed.remove_waters()
    parsed.remove_hydrogens()
    parsed.remove_alternative_conformations()
    naming = gemmi.HowToNameCopiedChain.Dup
    made = gemmi.make_assembly(parsed.assemblies[0], parsed[0], naming)
    whole = gemmi.Structure()
    whole.add_model(made)
    theirs = np.array(gemmi.FlatStructure(whole).pos)
    assert len(theirs) == len(ours)
    sample = ours.coords[::97]
    away, nearest = KDTree(theirs).query(sample)
    assert np.max(away) < 1e-3
    assert np.unique(nearest).size == len(sample)


def test_neighbouring_copies_are_a_prefix_of_all():
    path = DATA / "7CTH.cif.gz"
    one, six = read_structure(path), read_structure(path, copies=6)
    assert len(six) == 99_882
    np.testing.assert_array_equal(six.coords[: len(one)], one.coords)
    assert six.chain_names[:10] == one.chain_names
    # The patch hangs together: every copy touches an earlier one.
    parts = np.split(six.coords, 6)
    for k in range(1, 6):
        assert KDTree(np.vstack(parts[:k])).query(parts[k])[0].min() < 10
    np.testing.assert_array_equal(
        read_structure(path, copies=2).coords, six.coords[: 2 * len(one)]
    )


def test_one_copy_is_the_deposited_unit():
    """3KPR holds two complexes; its first assembly is one of them."""
    path = DATA / "3KPR.cif.gz"
    assert len(read_structure(path)) == 13_318
    assembly = read_structure(path, copies=None)
    assert (len(assembly), assembly.num_chains) == (6_659, 5)
    assert assembly.chain_names == ("A", "B", "C", "D", "E")


def test_chains_of_copies_are_named_by_operator(tmp_path):
    transforms = {"1": shift(0), "2": shift(100), "3": shift(20)}
    extra = operators(transforms) + generators([("1", "1-3", "A,B")])
    path = write(tmp_path, mmcif(TWO_CHAINS, extra))
    whole = read_structure(path, copies=None)
    assert whole.chain_names == ("A", "B", "A-3", "B-3", "A-2", "B-2")
    assert whole.coords[:, 0].tolist() == [1, 2, 0, 21, 22, 20, 101, 102, 100]
    assert whole.residue_index.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert whole.chain_index.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert whole.elements.tolist() == [6] * 9
    assert read_structure(path, copies=2).chain_names == ("A", "B", "A-3", "B-3")


def test_each_generator_moves_its_own_chains(tmp_path):
    extra = operators({"1": shift(0), "2": shift(0, 0, 30)})
    extra += generators([("1", "1", "A"), ("1", "1,2", "B"), ("2", "1,2", "A")])
    path = write(tmp_path, mmcif(TWO_CHAINS, extra))
    whole = read_structure(path, copies=None)
    assert whole.chain_names == ("A", "B", "B-2")
    assert whole.coords.tolist() == [[1, 0, 0], [2, 0, 0], [0, 5, 0], [0, 5, 30]]
    with pytest.raises(StructureError, match="copies=3, but .* has 2"):
        read_structure(path, copies=3)


def test_generators_name_subchains_not_chains(tmp_path):
    """A ligand of chain A is a subchain of its own and may stay behind."""
    atoms = [
        atom("CA", (0, 0, 0), subchain="A"),
        atom("ZN", (9, 0, 0), subchain="C", residue="ZN", number=9, element="ZN"),
    ]
    extra = operators({"1": shift(0), "2": shift(0, 40)})
    extra += generators([("1", "1,2", "A"), ("1", "1", "C")])
    whole = read_structure(write(tmp_path, mmcif(atoms, extra)), copies=None)
    assert whole.coords[:, 1].tolist() == [0, 0, 40]
    assert whole.chain_names == ("A", "A-2")


def capsid() -> dict:
    """60 rotations named 1 to 60 and 28 shifts named 61 to 88."""
    rotations = {str(k + 1): turn(2 * np.pi * k / 60) for k in range(60)}
    return rotations | {str(k + 61): shift(50 + k, 0, 90 * k) for k in range(28)}


def test_product_of_operators(tmp_path):
    """gemmi keeps the first factor of a product; all 1,680 have to come."""
    atoms = [atom("CA", (3, 0, 0)), atom("CB", (3, 1, 0))]
    extra = operators(capsid()) + generators([("1", "(1-60)(61-88)", "A")])
    path = write(tmp_path, mmcif(atoms, extra))
    whole = read_structure(path, copies=None)
    assert len(whole) == 2 * 1680
    assert len(set(whole.chain_names)) == 1680
    # The right factor is applied first: shift, then turn.
    places = KDTree(whole.coords)
    for k, j in [(0, 0), (7, 3), (59, 27)]:
        matrix, _ = turn(2 * np.pi * k / 60)
        want = np.array(matrix) @ np.array([53 + j, 0, 90 * j])
        assert places.query(want)[0] < 1e-3
    with pytest.raises(StructureError, match="copies=1681, but .* has 1,680"):
        read_structure(path, copies=1681)


@pytest.mark.parametrize(
    "expression, want",
    [
        ("1", [("1",)]),
        ("1,3-5", [("1",), ("3",), ("4",), ("5",)]),
        ("(1-2,P)", [("1",), ("2",), ("P",)]),
        ("(X0)(1, 2)", [("X0", "1"), ("X0", "2")]),
        ("1,(X0)(2-3)", [("1",), ("X0", "2"), ("X0", "3")]),
        ("(1)(2)(3,4)", [("1", "2", "3"), ("1", "2", "4")]),
        ("\n1-2\n", [("1",), ("2",)]),
    ],
)
def test_expressions(expression, want):
    assert parse_expression(expression) == want


@pytest.mark.parametrize(
    "expression",
    ["", "(1", "1)", "(1)2", "()", "1,,2", "5-1", "1-999999999", "(1-999)(1-999)"],
)
def test_expressions_refused(expression):
    with pytest.raises(ValueError, match="operator"):
        parse_expression(expression)


def test_coinciding_atoms_go_once(tmp_path):
    """An ion on the two-fold axis is its own image."""
    atoms = [
        atom("CA", (5, 0, 0)),
        atom("ZN", (0, 0, 1), residue="ZN", number=2, element="ZN"),
        atom("MG", (0.004, 0, 9), residue="MG", number=3, element="MG"),
        atom("CL", (0.006, 0, 20), residue="CL", number=4, element="CL"),
    ]
    extra = operators({"1": shift(0), "2": (HALF_TURN_Z, [0, 0, 0])})
    extra += generators([("1", "1,2", "A")])
    path = write(tmp_path, mmcif(atoms, extra))
    whole = read_structure(path, copies=2)
    assert whole.residue_names.tolist() == ["ALA", "ZN", "MG", "CL", "ALA", "CL"]
    assert whole.residue_index.tolist() == [0, 1, 2, 3, 4, 5]
    assert whole.chain_names == ("A", "A-2")


def test_coinciding_atoms_of_the_file_are_left_alone(tmp_path):
    atoms = [atom("CA", (1, 0, 0)), atom("CB", (1, 0, 0)), atom("N", (4, 0, 0))]
    extra = operators({"1": shift(0), "2": shift(9)})
    extra += generators([("1", "1,2", "A")])
    path = write(tmp_path, mmcif(atoms, extra))
    assert len(read_structure(path)) == 3
    assert len(read_structure(path, copies=2)) == 6


def test_a_chain_that_coincides_entirely_is_not_counted(tmp_path):
    atoms = [*TWO_CHAINS, atom("ZN", (0, 0, 3), chain="Z", element="ZN")]
    extra = operators({"1": shift(0), "2": (HALF_TURN_Z, [0, 0, 0])})
    extra += generators([("1", "1,2", "A,Z")])
    whole = read_structure(write(tmp_path, mmcif(atoms, extra)), copies=None)
    assert whole.chain_names == ("A", "Z", "A-2")
    assert whole.num_chains == 3


def test_one_operator_under_two_names_is_one_copy(tmp_path):
    extra = operators({"1": shift(0), "P": shift(0), "2": shift(30)})
    extra += generators([("1", "1,2", "A"), ("1", "P,2", "B")])
    whole = read_structure(write(tmp_path, mmcif(TWO_CHAINS, extra)), copies=2)
    assert whole.chain_names == ("A", "B", "A-2", "B-2")


REMARK_350 = """\
REMARK 350 BIOMOLECULE: 1
REMARK 350 APPLY THE FOLLOWING TO CHAINS: A
REMARK 350   BIOMT1   1  1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   1  0.000000  1.000000  0.000000        0.00000
REMARK 350   BIOMT3   1  0.000000  0.000000  1.000000        0.00000
REMARK 350   BIOMT1   2 -1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   2  0.000000 -1.000000  0.000000        0.00000
REMARK 350   BIOMT3   2  0.000000  0.000000  1.000000       40.00000
"""


def test_pdb_assembly(tmp_path):
    path = write(tmp_path, pdb(TWO_CHAINS, REMARK_350), "made.pdb")
    whole = read_structure(path, copies=None)
    assert whole.chain_names == ("A", "A-2")
    np.testing.assert_allclose(
        whole.coords, [[1, 0, 0], [2, 0, 0], [-1, 0, 40], [-2, 0, 40]]
    )


def test_the_first_of_several_pdb_assemblies_is_taken(tmp_path):
    second = REMARK_350.replace("MOLECULE: 1", "MOLECULE: 2").replace(": A", ": B")
    path = write(tmp_path, pdb(TWO_CHAINS, REMARK_350 + second), "made.pdb")
    assert read_structure(path, copies=None).chain_names == ("A", "A-2")


@pytest.mark.parametrize("copies", [2, None])
@pytest.mark.parametrize("writer, name", [(mmcif, "a.cif"), (pdb, "a.pdb")])
def test_no_assembly(tmp_path, writer, name, copies):
    path = write(tmp_path, writer(TWO_CHAINS), name)
    with pytest.raises(StructureError, match="no biological assembly"):
        read_structure(path, copies=copies)


def test_more_copies_than_there_are():
    with pytest.raises(StructureError, match="copies=61, but .* has 60"):
        read_structure(DATA / "7CTH.cif.gz", copies=61)


@pytest.mark.parametrize(
    "copies, atoms, limit", [(None, "998,820", 998_819), (6, "99,882", 20_000)]
)
def test_limit_counts_the_copies_first(monkeypatch, copies, atoms, limit):
    def never(*_):
        raise AssertionError("expanded before the limit was checked")

    monkeypatch.setattr("jsparse.structure._assembly.expand", never)
    with pytest.raises(StructureError, match=f"{atoms} atoms in .* max_atoms"):
        read_structure(DATA / "7CTH.cif.gz", copies=copies, max_atoms=limit)


@pytest.mark.parametrize(
    "extra, match",
    [
        (operators({"1": shift(0)}) + generators([("1", "1,7", "A")]), "'7' is not in"),
        (operators({"1": shift(0)}) + generators([("1", "(1", "A")]), "cannot be read"),
        (
            operators({"1": shift(0)}).replace("0.000000000", "?", 1)
            + generators([("1", "1", "A")]),
            "missing, non-finite",
        ),
        (
            operators({"1": shift(1e30)}) + generators([("1", "1", "A")]),
            "absurd",
        ),
        (operators({"1": shift(0)}) + generators([("1", "1", "X")]), "no biological"),
    ],
)
def test_malformed_assemblies(tmp_path, extra, match):
    path = write(tmp_path, mmcif(TWO_CHAINS, extra))
    with pytest.raises(StructureError, match=match) as caught:
        read_structure(path, copies=None)
    assert str(path) in str(caught.value)
    assert len(read_structure(path)) == 3


def test_atoms_in_one_place_are_not_expanded(tmp_path):
    """A quadratic number of coincidences must not be listed."""
    atoms = [atom("CA", (0, 0, 0), number=k) for k in range(200)]
    extra = operators({"1": shift(0), "2": shift(9)})
    extra += generators([("1", "1,2", "A")])
    path = write(tmp_path, mmcif(atoms, extra))
    assert len(read_structure(path)) == 200
    with pytest.raises(StructureError, match="closer than 0.01 Å"):
        read_structure(path, copies=None)
