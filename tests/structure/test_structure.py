"""The Structure value: casting, freezing, picking atoms, refusing nonsense."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jsparse.structure import Structure

FIELDS = (
    "coords",
    "elements",
    "residue_names",
    "atom_names",
    "residue_index",
    "chain_index",
)


def make(**changes) -> Structure:
    """Five atoms in three residues and two chains."""
    values = {
        "name": "made",
        "coords": np.arange(15.0).reshape(5, 3),
        "elements": [7, 6, 8, 6, 12],
        "residue_names": ["ALA", "ALA", "ALA", "GLY", "MG"],
        "atom_names": ["N", "CA", "O", "CA", "MG"],
        "residue_index": [0, 0, 0, 1, 2],
        "chain_index": [0, 0, 0, 0, 1],
        "chain_names": ["A", "B"],
    }
    return Structure(**(values | changes))


def test_casts_to_the_documented_types():
    structure = make()
    assert [getattr(structure, field).dtype.str for field in FIELDS] == [
        "<f4",
        "|u1",
        "<U5",
        "<U4",
        "<i4",
        "<i4",
    ]
    assert structure.chain_names == ("A", "B")
    assert (len(structure), structure.num_residues, structure.num_chains) == (5, 3, 2)


def test_long_names_widen_the_array():
    assert make(atom_names=["N", "CA", "O", "CA", "LONGNAME"]).atom_names[4] == (
        "LONGNAME"
    )


@pytest.mark.parametrize("field", FIELDS)
def test_arrays_are_read_only_copies(field):
    given = getattr(make(), field).copy()
    structure = make(**{field: given})
    with pytest.raises(ValueError, match="read-only"):
        getattr(structure, field)[0] = given[1]
    given[0] = given[4]
    assert not np.array_equal(getattr(structure, field), given)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_repr_is_short():
    assert repr(make()) == "Structure('made': 5 atoms, 3 residues, 2 chains)"


@pytest.mark.parametrize(
    "index, want",
    [
        ([4, 0, 0], [4, 0, 0]),
        ([-1], [4]),
        ([], []),
        (np.array([False, True, False, True, False]), [1, 3]),
        (np.arange(5, dtype=np.uint8)[::-1], [4, 3, 2, 1, 0]),
    ],
)
def test_subset_picks_in_order_and_renumbers_nothing(index, want):
    whole = make()
    part = whole.subset(index)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(part, field), getattr(whole, field)[want])
    assert part.chain_names == whole.chain_names
    assert part.name == whole.name
    assert part.coords.flags.writeable is False


def test_subset_counts_what_is_left():
    part = make().subset([4, 3])
    assert (len(part), part.num_residues, part.num_chains) == (2, 2, 2)
    assert make().subset([4]).num_chains == 1


@pytest.mark.parametrize(
    "index, error, message",
    [
        ([0.0, 1.0], TypeError, "float64"),
        (["A"], TypeError, "expected integers"),
        ([True, False], ValueError, r"shape \(2,\)"),
        ([[0, 1]], ValueError, r"shape \(1, 2\)"),
        ([0, 5], IndexError, "has 5 atoms"),
        ([-6], IndexError, "-6"),
    ],
)
def test_subset_refuses(index, error, message):
    with pytest.raises(error, match=message):
        make().subset(index)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"coords": np.zeros((5, 2))}, ValueError, r"coords has shape \(5, 2\)"),
        ({"elements": [6] * 4}, ValueError, r"elements has shape \(4,\)"),
        ({"elements": [300] * 5}, ValueError, "300"),
        ({"elements": [6.5] * 5}, TypeError, "float64"),
        ({"residue_index": [-1, 0, 0, 0, 0]}, ValueError, "residue_index holds -1"),
        ({"chain_index": [0, 0, 0, 0, 2]}, ValueError, "0 to 2"),
        ({"chain_index": [-1, 0, 0, 0, 1]}, ValueError, "-1 to 1"),
    ],
)
def test_construction_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)
