"""Reading: formats, counts, conformers, models, filters; and every refusal."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from typing import Any

import gemmi
import numpy as np
import pytest
from biotite.structure.io import pdbx

from jsparse.structure import Structure, StructureError, read_structure
from tests.structure.files import DATA, atom, mmcif, pdb

ARRAYS = (
    "coords",
    "elements",
    "residue_names",
    "atom_names",
    "residue_index",
    "chain_index",
)


def write(folder, content: str | bytes, name: str = "made.cif"):
    """Writes a file and returns its path."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def assert_same(a: Structure, b: Structure) -> None:
    """Every array, to the bit."""
    for field in ARRAYS:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert a.chain_names == b.chain_names


def with_gemmi(path, model: int = 0) -> list[tuple]:
    """The same atoms, one by one, through gemmi's own iterators."""
    parsed = gemmi.read_structure(str(path))
    return [
        (a.name, r.name, str(r.seqid), c.name, a.element.atomic_number, *a.pos.tolist())
        for c in parsed[model]
        for r in c.first_conformer()
        if not r.is_water()
        for a in r.first_conformer()
        if not a.element.is_hydrogen
    ]


@pytest.mark.parametrize(
    "file, atoms, residues, chains",
    [
        ("1UBI.pdb.gz", 602, 76, 1),
        ("1GBT.cif.gz", 1644, 227, 1),
        ("1GBT.bcif.gz", 1644, 227, 1),
        ("3KPR.cif.gz", 13318, 1652, 10),
        ("7CTH.cif.gz", 16647, 2161, 10),
    ],
)
def test_shipped_structures(file, atoms, residues, chains):
    structure = read_structure(DATA / file)
    assert structure.name == file[:4]
    assert len(structure) == atoms
    assert structure.num_chains == len(structure.chain_names) == chains
    np.testing.assert_array_equal(
        np.unique(structure.residue_index), np.arange(residues)
    )
    assert (np.diff(structure.residue_index) >= 0).all()
    assert (np.diff(structure.chain_index) >= 0).all()
    assert "HOH" not in structure.residue_names
    assert (structure.elements > 1).all()


@pytest.mark.parametrize("file", ["1UBI.pdb.gz", "1GBT.cif.gz", "7CTH.cif.gz"])
def test_agrees_with_gemmi_atom_by_atom(file):
    structure = read_structure(DATA / file)
    want = with_gemmi(DATA / file)
    assert structure.atom_names.tolist() == [row[0] for row in want]
    assert structure.residue_names.tolist() == [row[1] for row in want]
    assert structure.elements.tolist() == [row[4] for row in want]
    chains = [structure.chain_names[k] for k in structure.chain_index]
    assert chains == [row[3] for row in want]
    np.testing.assert_array_equal(
        structure.coords, np.array([row[5:] for row in want], dtype=np.float32)
    )
    keys = [row[1:4] for row in want]
    changes = [a != b for a, b in zip(keys[1:], keys[:-1], strict=True)]
    np.testing.assert_array_equal(np.diff(structure.residue_index), changes)


@pytest.mark.parametrize("options", [{}, {"waters": True, "hydrogens": True}])
def test_binary_cif_equals_mmcif(options):
    assert_same(
        read_structure(DATA / "1GBT.bcif.gz", **options),
        read_structure(DATA / "1GBT.cif.gz", **options),
    )


def test_binary_cif_expands_like_mmcif():
    assert_same(
        read_structure(DATA / "1GBT.bcif.gz", copies=None),
        read_structure(DATA / "1GBT.cif.gz", copies=None),
    )


@pytest.mark.parametrize("stem", ["1UBI.pdb", "1GBT.cif", "1GBT.bcif"])
@pytest.mark.parametrize("name", ["a.cif", "a.pdb", "a.ent.gz", "a.bcif", "a"])
@pytest.mark.parametrize("zipped", [False, True])
def test_content_decides_the_format(tmp_path, stem, name, zipped):
    content = (DATA / f"{stem}.gz").read_bytes()
    path = write(tmp_path, content if zipped else gzip.decompress(content), name)
    assert_same(read_structure(path), read_structure(DATA / f"{stem}.gz"))


def test_leading_comments_and_capitals(tmp_path):
    text = mmcif([atom("CA", (1, 2, 3))]).replace("data_", "DATA_")
    path = write(tmp_path, "# made by hand\n\n  # twice\n" + text)
    assert read_structure(path).coords.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("file", ["1UBI.pdb", "1GBT.cif"])
def test_byte_order_mark_and_windows_lines(tmp_path, file):
    plain = gzip.decompress((DATA / f"{file}.gz").read_bytes())
    path = write(tmp_path, b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"), file)
    assert_same(read_structure(path), read_structure(DATA / f"{file}.gz"))
    assert read_structure(path).name == file[:4]


@pytest.mark.parametrize("tag", ["Cartn_y", "type_symbol"])
def test_atom_table_without_a_needed_column(tmp_path, tag):
    text = mmcif([atom("CA", (1, 2, 3))]).replace(f"_atom_site.{tag}", "_atom_site.x")
    refuse(write(tmp_path, text), "no atoms that can be read")


def test_name_falls_back_to_the_stem(tmp_path):
    path = write(tmp_path, pdb([atom("CA", (1, 2, 3))]), "my.model.pdb")
    assert read_structure(path).name == "my.model"
    zipped = write(tmp_path, gzip.compress(path.read_bytes()), "other.ent.gz")
    assert read_structure(str(zipped)).name == "other"


ALTLOCS = [
    atom("N", (0, 0, 0)),
    atom("CA", (1, 0, 0), alt="B"),
    atom("CA", (1, 1, 0), alt="A"),
    atom("C", (2, 0, 0), alt="A"),
    atom("C", (2, 1, 0), alt="B"),
    atom("O", (3, 1, 0), alt="B"),
    atom("N", (4, 0, 0), alt="A", residue="SER", number=2),
    atom("CA", (5, 0, 0), alt="A", residue="SER", number=2),
    atom("N", (4, 1, 0), alt="B", residue="THR", number=2),
    atom("CA", (5, 1, 0), alt="B", residue="THR", number=2),
    atom("N", (6, 0, 0), residue="GLY", number=3),
    atom("O", (7, 0, 0), alt="A", residue="HOH", number=4),
    atom("ZN", (8, 0, 0), residue="ZN", number=5, element="ZN"),
]


@pytest.mark.parametrize("writer, name", [(mmcif, "a.cif"), (pdb, "a.pdb")])
def test_first_conformer_is_gemmis(tmp_path, writer, name):
    path = write(tmp_path, writer(ALTLOCS), name)
    structure = read_structure(path)
    assert structure.coords[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
    assert structure.coords[:, 1].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert structure.residue_index.tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
    want = with_gemmi(path)
    assert structure.coords.tolist() == [list(row[5:]) for row in want]
    assert structure.residue_names.tolist() == [row[1] for row in want]


def test_conformers_listed_one_after_another(tmp_path):
    labels = [("N", "A"), ("CA", "A"), ("N", "B"), ("CA", "B")]
    atoms = [atom(n, (k, 0, 0), alt=alt) for k, (n, alt) in enumerate(labels)]
    path = write(tmp_path, mmcif(atoms))
    parsed = gemmi.read_structure(str(path))
    parsed.remove_alternative_conformations()
    want = [a.name for a in parsed[0][0][0]]
    assert read_structure(path).atom_names.tolist() == want == ["N", "CA"]


def test_same_name_without_altloc_is_not_an_alternative(tmp_path):
    atoms = [atom("C", (k, 0, 0), residue="UNK") for k in range(3)]
    atoms += [atom("O", (3, 0, 0), alt="A"), atom("O", (4, 0, 0), alt="B")]
    atoms += [atom("C", (5, 0, 0), alt="B", residue="UNK")]
    structure = read_structure(write(tmp_path, mmcif(atoms)))
    assert structure.coords[:, 0].tolist() == [0, 1, 2, 3]


def test_neighbours_of_one_number_are_not_microheterogeneity(tmp_path):
    """Two ligands may share a sequence number; only labelled ones exclude."""
    atoms = [
        atom("CA", (0, 0, 0), alt="A", number=7),
        atom("MG", (5, 0, 0), residue="MG", number=7, element="MG"),
    ]
    structure = read_structure(write(tmp_path, pdb(atoms), "a.pdb"))
    assert structure.residue_names.tolist() == ["ALA", "MG"]
    assert structure.residue_index.tolist() == [0, 1]


@pytest.mark.parametrize(
    "writer, name, other",
    [
        (pdb, "a.pdb", {"chain": "B"}),
        (mmcif, "a.cif", {"subchain": "C"}),
        (mmcif, "a.cif", {"chain": "B"}),
    ],
)
def test_one_number_in_two_chains_is_not_microheterogeneity(
    tmp_path, writer, name, other
):
    atoms = [
        atom("CA", (0, 0, 0), alt="A", number=7),
        atom("CA", (9, 0, 0), alt="A", number=7, residue="GLY", **other),
    ]
    structure = read_structure(write(tmp_path, writer(atoms), name))
    assert structure.residue_names.tolist() == ["ALA", "GLY"]


def test_a_number_used_again_later_is_not_microheterogeneity(tmp_path):
    atoms = [
        atom("CA", (0, 0, 0), alt="A", number=7),
        atom("CA", (4, 0, 0), number=8),
        atom("CA", (9, 0, 0), alt="A", number=7, residue="GLY"),
    ]
    structure = read_structure(write(tmp_path, mmcif(atoms)))
    assert structure.residue_names.tolist() == ["ALA", "ALA", "GLY"]


def test_hydrogens_and_waters_are_kept_on_request(tmp_path):
    atoms = [
        atom("CA", (0, 0, 0)),
        atom("HA", (1, 0, 0), element="H"),
        atom("D", (2, 0, 0), element="D"),
        atom("O", (3, 0, 0), residue="HOH", number=2),
        atom("O", (4, 0, 0), residue="DOD", number=3),
        atom("D1", (5, 0, 0), residue="DOD", number=3, element="D"),
    ]
    path = write(tmp_path, mmcif(atoms))

    def elements(**options):
        return read_structure(path, **options).elements.tolist()

    assert elements() == [6]
    assert elements(hydrogens=True) == [6, 1, 1]
    assert elements(waters=True) == [6, 8, 8]
    assert elements(hydrogens=True, waters=True) == [6, 1, 1, 8, 8, 1]


@pytest.mark.parametrize("writer, name", [(mmcif, "a.cif"), (pdb, "a.pdb")])
def test_models(tmp_path, writer, name):
    sizes = [2, 3, 1]
    atoms = [
        atom("CA", (m, k, 0), number=k + 1, model=m)
        for m, size in enumerate(sizes, start=1)
        for k in range(size)
    ]
    path = write(tmp_path, writer(atoms), name)
    assert len(read_structure(path)) == 2
    for m, size in enumerate(sizes):
        want = [[m + 1, k, 0] for k in range(size)]
        assert read_structure(path, model=m).coords.tolist() == want
    with pytest.raises(StructureError, match=r"model=3, but the file has 3 model"):
        read_structure(path, model=3)


def test_chain_parts_are_merged_and_ligands_follow(tmp_path):
    atoms = [
        atom("CA", (0, 0, 0), chain="A", subchain="A"),
        atom("CA", (1, 0, 0), chain="B", subchain="B"),
        atom("ZN", (2, 0, 0), residue="ZN", number=9, subchain="C", element="ZN"),
    ]
    structure = read_structure(write(tmp_path, mmcif(atoms)))
    assert structure.coords[:, 0].tolist() == [0, 2, 1]
    assert structure.chain_names == ("A", "B")
    assert structure.chain_index.tolist() == [0, 0, 1]


def test_a_chain_of_waters_is_not_a_chain(tmp_path):
    atoms = [
        atom("CA", (0, 0, 0), chain="A"),
        atom("O", (1, 0, 0), residue="HOH", chain="W"),
        atom("CA", (2, 0, 0), chain="B"),
    ]
    structure = read_structure(write(tmp_path, mmcif(atoms)))
    assert structure.chain_names == ("A", "B")
    assert structure.residue_index.tolist() == [0, 1]


def test_hybrid_36_serials_and_two_letter_chains(tmp_path):
    text = pdb([atom("CA", (k, 0, 0), chain="AZ", number=k) for k in range(2)])
    text = text.replace("ATOM      2", "ATOM  A0000")
    structure = read_structure(write(tmp_path, text, "a.pdb"))
    assert structure.chain_names == ("AZ",)
    assert len(structure) == 2


def test_long_chain_names_stay_apart(tmp_path):
    names = ("a_very_long_chain_1", "a_very_long_chain_2")
    atoms = [atom("CA", (k, 0, 0), chain=name) for k, name in enumerate(names)]
    assert read_structure(write(tmp_path, mmcif(atoms))).chain_names == names


def test_names_that_need_quotes_survive_binary_cif(tmp_path):
    """Quotes, blanks and the null marks of mmCIF as ordinary values."""
    names = ["O5'", "'H", "A B", ";C", '"N']
    columns = {
        "id": np.arange(1, 6),
        "type_symbol": np.array(["C"] * 5),
        "label_atom_id": np.array(names),
        "label_alt_id": pdbx.BinaryCIFColumn(
            pdbx.BinaryCIFData(np.array([""] * 5)),
            pdbx.BinaryCIFData(np.ones(5, dtype=np.uint8)),
        ),
        "label_comp_id": np.array(["LIG"] * 5),
        "label_asym_id": np.array(["A"] * 5),
        "label_seq_id": np.ones(5, dtype=np.int32),
        "Cartn_x": np.arange(5) / 3,
        "Cartn_y": np.zeros(5),
        "Cartn_z": np.zeros(5),
        "auth_seq_id": np.ones(5, dtype=np.int32),
        "auth_asym_id": np.array(["A"] * 5),
        "pdbx_PDB_model_num": np.ones(5, dtype=np.int32),
    }
    block = pdbx.BinaryCIFBlock({"atom_site": pdbx.BinaryCIFCategory(columns)})
    path = tmp_path / "made.bcif"
    pdbx.BinaryCIFFile({"made": block}).write(str(path))
    structure = read_structure(path)
    assert structure.atom_names.tolist() == names
    np.testing.assert_array_equal(
        structure.coords[:, 0], (np.arange(5) / 3).astype(np.float32)
    )


def test_importing_is_light():
    code = (
        "import sys, jsparse.structure; "
        "print([m for m in ('gemmi', 'biotite') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


# --------------------------------------------------------------- what is refused


def refuse(path, match: str, **options) -> None:
    """Expects a StructureError that names the file and matches."""
    with pytest.raises(StructureError, match=match) as caught:
        read_structure(path, **options)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_structure(tmp_path / "none.cif")
    with pytest.raises(IsADirectoryError):
        read_structure(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "pipe.cif"
    os.mkfifo(path)
    refuse(path, "not a regular file")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (b"hello, this is no structure\n", "begins with b'hello"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "PNG"),
        (b"BZh91AY&SY", "bzip2"),
        (b'{"data_1ABC": {}}', "JSON"),
        (b"<html><body>404</body></html>", "web page"),
        (bytes(range(256)) * 8, "not a structure file"),
        ("ATOM  ".encode("utf-16"), "not a structure file"),
        (b"ATOM      1  CA  ALA A   1 " + bytes(60), "not a structure file"),
        (b"# only a comment\n", "not a structure file"),
        (b"data_empty\n", "_atom_site.Cartn_x"),
        (b"data_r\n_refln.id 1\n", "_atom_site.Cartn_x"),
        (b"REMARK   2 nothing else\n", "without any ATOM"),
        (b"HEADER    HYDROLASE\nEND\n", "without any ATOM"),
        (b"\x83\xa7encoder\xa1x\xaadataBlocks\x91", "cut off or damaged"),
        (b"\x81\xaadataBlocks\x90", "_atom_site.Cartn_x"),
        (b"\x81\xaadataBlocks\x05", "cut off or damaged"),
    ],
)
@pytest.mark.parametrize("name", ["a.cif", "a.pdb", "a.bcif"])
def test_other_content(tmp_path, content, match, name):
    refuse(write(tmp_path, content, name), match)


@pytest.mark.parametrize("file", ["1UBI.pdb.gz", "1GBT.cif.gz", "1GBT.bcif.gz"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.5, 0.8, 0.99])
def test_cut_off_files(tmp_path, file, part):
    zipped = (DATA / file).read_bytes()
    refuse(write(tmp_path, zipped[: int(part * len(zipped))], file), "gzip data is cut")
    plain = gzip.decompress(zipped)
    if file.endswith("bcif.gz"):
        cut = int(part * len(plain))
    else:
        # Inside the atom table, and exactly behind a line: the hardest place.
        first = plain.index(b"\nATOM")
        last = plain.rindex(b"\nHETATM")
        cut = plain.index(b"\n", first + int(part * (last - first) * 0.99)) + 1
    refuse(write(tmp_path, plain[:cut], file[:-3]), "cut off")


def test_damaged_gzip(tmp_path):
    zipped = bytearray((DATA / "1UBI.pdb.gz").read_bytes())
    zipped[len(zipped) // 2] ^= 0xFF
    refuse(write(tmp_path, bytes(zipped), "a.pdb.gz"), "damaged")


@pytest.mark.parametrize("file", ["1UBI.pdb.gz", "1GBT.cif.gz", "1GBT.bcif.gz"])
def test_damaged_bytes_never_surface_as_anything_else(tmp_path, file):
    plain = gzip.decompress((DATA / file).read_bytes())
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(15):
        data = np.frombuffer(plain, dtype=np.uint8).copy()
        data[rng.integers(len(data), size=40)] = rng.integers(256, size=40)
        path = write(tmp_path, data.tobytes(), file[:-3])
        try:
            assert np.isfinite(read_structure(path).coords).all()
        except StructureError as err:
            refusals.append(str(path) in str(err))
    assert refusals
    assert all(refusals)


@pytest.mark.parametrize("bad", ["?", ".", "nan", "inf", "-inf", "1e60", "abc"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mmcif_coordinate_that_is_no_number(tmp_path, bad, axis):
    x, y, z = (bad if k == axis else 1.5 for k in range(3))
    atoms = [atom("N", (0, 0, 0)), atom("CA", (x, y, z), residue="SER", number=5)]
    refuse(
        write(tmp_path, mmcif(atoms)),
        r"atom 2 \(chain A, residue SER 5, CA\) has coordinates .*ångström",
    )


def test_a_bad_coordinate_of_a_dropped_atom_does_not_matter(tmp_path):
    atoms = [
        atom("CA", (0, 0, 0)),
        atom("O", ("?", "?", "?"), residue="HOH", number=2),
    ]
    path = write(tmp_path, mmcif(atoms))
    assert len(read_structure(path)) == 1
    refuse(path, "atom 2", waters=True)


@pytest.mark.parametrize(
    "bad, match",
    [
        ("", "y of atom record 'ATOM      2  CA  SER A   5' is '        '"),
        ("********", r"columns 39 to 46"),
        ("1.2x", "expected a number"),
        ("nan", r"atom 2 \(chain A, residue SER 5, CA\)"),
        ("inf", "missing or not finite in float32"),
        ("1e39", "missing or not finite in float32"),
    ],
)
def test_pdb_coordinate_that_is_no_number(tmp_path, bad, match):
    atoms = [atom("N", (0, 0, 0)), atom("CA", (1, bad, 3), residue="SER", number=5)]
    refuse(write(tmp_path, pdb(atoms), "a.pdb"), match)


def test_pdb_line_cut_in_its_coordinates(tmp_path):
    text = pdb([atom("N", (0, 0, 0)), atom("CA", (1, 2, 3))])
    cut = text.rindex("ATOM") + 50
    refuse(write(tmp_path, text[:cut], "a.pdb"), "before column 54")


def test_non_ascii_names_are_refused(tmp_path):
    text = pdb([atom("CA", (1, 2, 3))]).encode().replace(b"ALA", b"\xe9LA")
    refuse(write(tmp_path, text, "a.pdb"), "UnicodeDecodeError")


def test_nothing_left(tmp_path):
    path = write(tmp_path, mmcif([atom("O", (0, 0, 0), residue="HOH")]))
    # The commands show this too, and have no such options.
    refuse(path, r"none of the 1 atoms of model 0 is left: waters [^=]* other atom")
    assert len(read_structure(path, waters=True)) == 1


@pytest.mark.parametrize(
    "options, match",
    [
        ({"model": -1}, "model=-1"),
        ({"model": 1}, r"1 model\(s\)"),
        ({"copies": 0}, "copies=0; expected an integer of at least 1"),
        ({"copies": -3}, "copies=-3"),
        ({"max_atoms": 0}, "max_atoms=0"),
        ({"max_atoms": 601}, "602 atoms, more than max_atoms=601"),
    ],
)
def test_arguments_out_of_range(options, match):
    refuse(DATA / "1UBI.pdb.gz", match, **options)


@pytest.mark.parametrize("name", ["model", "copies", "max_atoms"])
def test_arguments_of_another_type(name):
    options: dict[str, Any] = {name: 1.5}
    with pytest.raises(TypeError, match=f"{name}: got 1.5"):
        read_structure(DATA / "1UBI.pdb.gz", **options)


def test_the_limit_itself_is_allowed():
    assert len(read_structure(DATA / "1UBI.pdb.gz", max_atoms=602)) == 602
