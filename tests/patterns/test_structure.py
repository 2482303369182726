"""Structure builders against their dense definitions over all pairs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse import patterns
from jsparse.patterns import _bits
from tests.patterns.oracle import SIZES, check_exact, check_lists, states_of, untyped

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(params=[1, 1 << 24], ids=["strips of one row", "one strip"])
def strip_elements(request, monkeypatch):
    """Elements of a strip: the bits of a long pattern are made in many strips."""
    monkeypatch.setattr(_bits, "_CHUNK", request.param)


def blocks_of(sizes):
    q_len, kv_len, block_q, block_kv = sizes
    return q_len, kv_len, {"block_q": block_q, "block_kv": block_kv}


def squared_distances(x, y):
    gap = x[:, None].astype(np.float64) - y[None].astype(np.float64)
    return (gap**2).sum(-1)


def walk(rng, count):
    """Atoms along a chain, so that blocks are compact."""
    steps = rng.standard_normal((count, 3))
    return np.cumsum(steps, 0).astype(np.float32)


# ---------------------------------------------------------------------- radius


@given(SIZES, SEEDS, st.sampled_from([0.5, 2.0, 5.0, 50.0]))
def test_radius(sizes, seed, cutoff):
    q_len, kv_len, blocks = blocks_of(sizes)
    rng = np.random.default_rng(seed)
    x, y = walk(rng, q_len), walk(rng, kv_len)
    mask = patterns.radius(x, cutoff, kv_coords=y, **blocks)
    dense = squared_distances(x, y) <= cutoff**2
    np.testing.assert_array_equal(mask.to_dense()[0, 0], dense)
    # Full blocks are found from bounding boxes: all true, but perhaps not all.
    exact = states_of(dense, *blocks.values())
    states = mask.block_states()[0, 0]
    np.testing.assert_array_equal(states > 0, exact > 0)
    assert (states <= exact).all()
    check_lists(mask)
    assert mask.bits is None


def test_radius_of_one_structure_sees_itself():
    x = walk(np.random.default_rng(0), 100)
    mask = patterns.radius(x, 4.0, block_q=16, block_kv=8)
    dense = squared_distances(x, x) <= 16
    np.testing.assert_array_equal(mask.to_dense()[0, 0], dense)
    assert dense.diagonal().all()


def test_radius_includes_the_cutoff_itself():
    x = np.array([[0, 0, 0], [3, 4, 0], [3, 4, 1]])
    mask = patterns.radius(x + 1000, 5.0, block_q=1, block_kv=1)
    expected = [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    assert mask.to_dense()[0, 0].astype(int).tolist() == expected


def test_radius_of_atoms_in_one_place():
    mask = patterns.radius(np.full((10, 3), 7.25), 1.0, block_q=4, block_kv=4)
    check_exact(mask, np.ones((10, 10), bool))


def test_radius_of_one_atom():
    check_exact(patterns.radius([[1, 2, 3]], 1.0), np.ones((1, 1), bool))


# ------------------------------------------------------------------------- knn


@given(SIZES, SEEDS, st.integers(1, 12))
def test_knn(sizes, seed, k):
    q_len, kv_len, blocks = blocks_of(sizes)
    k = min(k, kv_len)
    rng = np.random.default_rng(seed)
    x, y = walk(rng, q_len), walk(rng, kv_len)
    dense = np.zeros((q_len, kv_len), bool)
    order = np.argsort(squared_distances(x, y), axis=1, kind="stable")
    np.put_along_axis(dense, order[:, :k], True, axis=1)
    check_exact(patterns.knn(x, k, kv_coords=y, **blocks), dense)


def test_knn_of_equal_distances_takes_lower_indices():
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), -1).reshape(-1, 3)
    dense = np.zeros((27, 27), bool)
    order = np.argsort(squared_distances(grid, grid), axis=1, kind="stable")
    np.put_along_axis(dense, order[:, :5], True, axis=1)
    check_exact(patterns.knn(grid, 5, block_q=8, block_kv=8), dense)


def test_knn_of_all_keys_needs_no_bits():
    mask = patterns.knn(np.eye(3), 3, block_q=2, block_kv=2)
    check_exact(mask, np.ones((3, 3), bool))
    assert mask.bits is None


def test_knn_of_atoms_in_one_place():
    dense = np.zeros((6, 6), bool)
    dense[:, :2] = True
    check_exact(patterns.knn(np.zeros((6, 3)), 2, block_q=4, block_kv=4), dense)


# ------------------------------------------------------------------- neighbors


@given(SIZES, SEEDS, st.integers(1, 30))
def test_neighbors(sizes, seed, k):
    q_len, kv_len, blocks = blocks_of(sizes)
    rng = np.random.default_rng(seed)
    index = rng.integers(-3, kv_len, (q_len, k))  # repeats, and -1 to -3 as padding
    mask = patterns.neighbors(index, kv_len=kv_len, **blocks)
    dense = np.zeros((q_len, kv_len), bool)
    for t, row in enumerate(index):
        dense[t, row[row >= 0]] = True
    check_exact(mask, dense)


@pytest.mark.usefixtures("strip_elements")
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_neighbors_in_strips(dtype):
    index = np.random.default_rng(0).integers(-1, 90, (70, 5)).astype(dtype)
    dense = (index[:, :, None] == np.arange(90)).any(1)
    check_exact(patterns.neighbors(index, kv_len=90, block_q=8, block_kv=16), dense)


def test_neighbors_of_samples():
    index = np.random.default_rng(0).integers(0, 20, (3, 20, 4))
    dense = (index[:, :, :, None] == np.arange(20)).any(2)[:, None]
    check_exact(patterns.neighbors(index, block_q=8, block_kv=8), dense)


def test_neighbors_that_are_all_padding():
    mask = patterns.neighbors(np.full((5, 2), -1), block_q=2, block_kv=2)
    check_exact(mask, np.zeros((5, 5), bool))


# -------------------------------------------------------------------- contacts


@given(SIZES, SEEDS, st.sampled_from([0, 1, 10, 500]))
def test_contacts_of_pairs(sizes, seed, count):
    q_len, kv_len, blocks = blocks_of(sizes)
    rng = np.random.default_rng(seed)
    pairs = np.stack([rng.integers(0, n, count) for n in (q_len, kv_len)], 1)
    dense = np.zeros((q_len, kv_len), bool)
    dense[tuple(pairs.T)] = True
    args: dict[str, Any] = {"q_len": q_len, "kv_len": kv_len, **blocks}
    check_exact(patterns.contacts(pairs, symmetric=False, **args), dense)
    if q_len == kv_len:
        check_exact(patterns.contacts(pairs, **args), dense | dense.T)


@pytest.mark.usefixtures("strip_elements")
def test_symmetric_contacts_in_strips():
    pairs = np.random.default_rng(0).integers(0, 60, (200, 2))
    dense = np.zeros((60, 60), bool)
    dense[tuple(pairs.T)] = True
    mask = patterns.contacts(pairs, q_len=60, block_q=8, block_kv=4)
    check_exact(mask, dense | dense.T)


def test_contact_map():
    dense = np.random.default_rng(0).random((30, 30)) < 0.05
    args: dict[str, Any] = {"block_q": 8, "block_kv": 4}
    check_exact(patterns.contacts(dense, **args), dense | dense.T)
    check_exact(patterns.contacts(dense, symmetric=False, **args), dense)
    tall = dense[:, :20]
    check_exact(patterns.contacts(tall, symmetric=False, kv_len=20, **args), tall)


def test_two_columns_of_bool_are_a_contact_map():
    dense = np.array([[True, False], [False, False]])
    check_exact(patterns.contacts(dense), dense)


def test_no_contacts():
    for nothing in ([], np.zeros((0, 2), int), np.zeros((0, 2))):
        mask = patterns.contacts(nothing, q_len=5, block_q=2, block_kv=2)
        check_exact(mask, np.zeros((5, 5), bool))


# ---------------------------------------------------------------- atom windows


def windows_by_subset(num_atoms, queries, keys, length):
    """Key runs around the centre of each subset, moved inside as a whole."""
    dense = np.zeros((length, length), bool)
    for first in range(0, num_atoms, queries):
        run = np.arange(keys) + first + queries // 2 - keys // 2
        if run[0] < 0:
            run -= run[0]
        elif run[-1] > num_atoms - 1:
            run -= run[-1] - (num_atoms - 1)
        if num_atoms < keys:
            run = np.arange(num_atoms)
        dense[first : min(first + queries, num_atoms), run] = True
    return dense


@given(
    st.integers(1, 200),
    st.integers(0, 100),
    st.sampled_from([(4, 16), (8, 8), (2, 20), (6, 2), (5, 9)]),
    st.sampled_from([(4, 4), (8, 16), (7, 5)]),
)
def test_atom_windows(num_atoms, padding, windows, blocks):
    queries, keys = windows
    length = num_atoms + padding
    mask = patterns.atom_windows(
        num_atoms,
        queries=queries,
        keys=keys,
        padded_to=length if padding else None,
        block_q=blocks[0],
        block_kv=blocks[1],
    )
    check_exact(mask, windows_by_subset(num_atoms, queries, keys, length))
    assert mask.q_lengths == mask.kv_lengths == num_atoms
    assert mask.bits is None


@pytest.mark.parametrize("num_atoms", [1, 31, 127, 128, 129, 500, 1000])
def test_atom_windows_of_alphafold3(num_atoms):
    dense = windows_by_subset(num_atoms, 32, 128, num_atoms)
    mask = patterns.atom_windows(num_atoms, block_q=32, block_kv=64)
    check_exact(mask, dense)
    assert (dense.sum(1) == min(num_atoms, 128)).all()


def test_padding_of_atom_windows_costs_nothing():
    mask = patterns.atom_windows(300, padded_to=24 * 100)
    assert mask.q_len == 2400
    assert mask.num_blocks == patterns.atom_windows(300).num_blocks


# ---------------------------------------------------------------------- expand


def residues_of(rng, count, residues, shuffled):
    index = np.sort(rng.integers(0, residues, count))
    return rng.permutation(index) if shuffled else index


@given(SIZES, SEEDS, st.floats(0, 1), st.integers(1, 15), st.booleans())
def test_expand(sizes, seed, share, residues, shuffled):
    q_len, kv_len, blocks = blocks_of(sizes)
    rng = np.random.default_rng(seed)
    sees = rng.random((residues, residues + 2)) < share
    q = residues_of(rng, q_len, residues, shuffled)
    kv = residues_of(rng, kv_len, residues + 2, shuffled)
    dense = sees[np.ix_(q, kv)]
    check_exact(patterns.expand(sees, q, kv, **blocks), dense)
    pairs = np.argwhere(sees)
    pairs = pairs[rng.integers(0, len(pairs), 2 * len(pairs))] if len(pairs) else pairs
    pairs = np.concatenate([pairs, np.argwhere(sees)])
    check_exact(patterns.expand(pairs, q, kv, **blocks), dense)


def test_expand_to_the_same_atoms():
    sees = np.tri(4, dtype=bool)
    residue = np.array([0, 0, 1, 2, 2, 2, 3])
    mask = patterns.expand(sees, residue, block_q=2, block_kv=2)
    check_exact(mask, sees[np.ix_(residue, residue)])


def test_expand_of_everything_needs_no_bits():
    mask = patterns.expand(np.ones((2, 2), bool), [0, 0, 1], block_q=2, block_kv=2)
    check_exact(mask, np.ones((3, 3), bool))
    assert mask.bits is None


def test_expand_of_a_residue_mask():
    residues = patterns.window(6, left=1, right=1, block_q=2, block_kv=2)
    residue = np.repeat(np.arange(6), 3)
    sees = residues.to_dense()[0, 0]
    mask = patterns.expand(sees, residue, block_q=4, block_kv=4)
    check_exact(mask, np.kron(sees, np.ones((3, 3), bool)))


def test_expand_ignores_residues_without_atoms():
    far = 10**12
    mask = patterns.expand([[far, far], [5, far], [5, 6]], [5, far, 5], block_q=2)
    dense = np.zeros((3, 3), bool)
    dense[:, 1] = True
    check_exact(mask, dense)


def test_expand_of_no_pairs():
    mask = patterns.expand([], [0, 1, 1], block_q=2, block_kv=2)
    check_exact(mask, np.zeros((3, 3), bool))


# ---------------------------------------------------------------------- errors

NAN = np.array([[0.0, 0, 0], [1, np.nan, 0]])
INF = np.array([[0.0, 0, np.inf]])
OK = np.eye(3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: patterns.radius(NAN, 5.0), r"radius: coords is not finite.*atom 1"),
        (lambda: patterns.radius(OK, 5.0, kv_coords=INF), r"radius: kv_coords is not"),
        (lambda: patterns.radius(OK[:, :2], 5.0), r"radius: coords has shape \(3, 2\)"),
        (lambda: patterns.radius(np.zeros((0, 3)), 5.0), r"radius: .*no atom"),
        (lambda: patterns.radius(OK, -1.0), r"radius: cutoff is -1.0; expected"),
        (lambda: patterns.radius(OK, 0), r"radius: cutoff is 0"),
        (lambda: patterns.radius(OK, np.nan), r"radius: cutoff is nan"),
        (lambda: patterns.radius(OK, 1e9), r"radius: cutoff is 1000000000"),
        (lambda: patterns.radius(OK, 5.0, block_q=0), r"radius: block_q=0"),
        (lambda: patterns.knn(NAN, 1), r"knn: coords is not finite"),
        (lambda: patterns.knn(np.zeros((0, 3)), 1), r"knn: .*no atom"),
        (lambda: patterns.knn(OK, 4), r"knn: k=4, but there are 3 keys"),
        (lambda: patterns.knn(OK, 0), r"knn: k is 0; expected"),
        (lambda: patterns.knn(OK, untyped(1.5)), r"knn: k is 1.5"),
        (lambda: patterns.knn(OK, True), r"knn: k is True"),
        (lambda: patterns.contacts([[0, 1]], q_len=untyped("4")), r"q_len='4'"),
        (lambda: patterns.neighbors([0, 1]), r"neighbors: index has shape \(2,\)"),
        (lambda: patterns.neighbors([[0.0]]), r"dtype float64"),
        (lambda: patterns.neighbors(np.zeros((0, 4), int)), r"shape \(0, 4\)"),
        (lambda: patterns.neighbors([[0, 2], [1, 0]]), r"names key 2; expected 0 to 1"),
        (lambda: patterns.neighbors([[0]], kv_len=0), r"neighbors: kv_len=0"),
        (lambda: patterns.contacts([[0, 1]]), r"contacts: q_len is missing"),
        (
            lambda: patterns.contacts([[0, 4]], q_len=4),
            r"key .* 4 to 4; expected 0 to 3",
        ),
        (lambda: patterns.contacts([[-1, 0]], q_len=4), r"query .* span -1 to -1"),
        (
            lambda: patterns.contacts([[0, 1]], q_len=4, kv_len=5),
            r"4 queries and 5 keys",
        ),
        (lambda: patterns.contacts([[0, 1, 2]], q_len=4), r"shape \(1, 3\)"),
        (lambda: patterns.contacts([[0.0, 1.0]], q_len=4), r"dtype float64"),
        (lambda: patterns.contacts(OK), r"shape \(3, 3\) and dtype float64"),
        (lambda: patterns.contacts(OK > 0, q_len=4), r"q_len=4, but .*\(3, 3\)"),
        (lambda: patterns.atom_windows(0), r"atom_windows: num_atoms is 0"),
        (lambda: patterns.atom_windows(9, keys=127), r"queries=32 and keys=127"),
        (lambda: patterns.atom_windows(9, padded_to=8), r"padded_to=8 is less than"),
        (lambda: patterns.atom_windows(9, queries=0), r"atom_windows: queries is 0"),
        (lambda: patterns.expand([[0, 0]], []), r"expand: q_residue has shape \(0,\)"),
        (lambda: patterns.expand([[0, 0]], [0.0]), r"q_residue has .* float64"),
        (lambda: patterns.expand([[0, 0]], [-1]), r"q_residue spans -1 to -1"),
        (lambda: patterns.expand(OK > 0, [0, 3]), r"q_residue spans 0 to 3; .* 0 to 2"),
        (lambda: patterns.expand(OK > 0, [0], [3]), r"kv_residue spans 3 to 3"),
        (lambda: patterns.expand([[0, -1]], [0]), r"expand: the key indices"),
        (lambda: patterns.expand(OK, [0]), r"expand: pairs has shape \(3, 3\)"),
    ],
)
def test_builders_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("cutoff", ["10", True])
@pytest.mark.parametrize("build", [patterns.radius, patterns.order])
def test_cutoffs_must_be_numbers(build, cutoff):
    with pytest.raises(TypeError, match=f"{build.__name__}: cutoff is {cutoff!r}; exp"):
        build(OK, cutoff)


@pytest.mark.parametrize("build", [patterns.radius, patterns.knn])
def test_coordinates_must_be_numbers(build):
    with pytest.raises(TypeError, match=rf"{build.__name__}: coords has dtype <U1"):
        build([["a", "b", "c"]], 1)


@pytest.mark.parametrize(
    "build, value, name, there",
    [
        (lambda x: patterns.radius(x, 5.0), OK, "radius: coords", "radius"),
        (lambda x: patterns.radius([x, x], 5.0), OK[0], "radius: coords", "radius"),
        (
            lambda x: patterns.radius(OK, 5.0, kv_coords=x),
            *(OK, "radius: kv_coords", "radius"),
        ),
        (lambda x: patterns.radius(OK, x), 5.0, "radius: cutoff", "radius"),
        (
            patterns.neighbors,
            *(np.zeros((4, 2), int), "neighbors: index", "neighbors"),
        ),
        (patterns.atom_windows, 9, "atom_windows: num_atoms", "atom_windows"),
        (lambda x: patterns.atom_windows(9, keys=x), 8, "atom_windows: keys", None),
        (lambda x: patterns.knn(x, 2), OK, "knn: coords", None),
        (lambda k: patterns.knn(OK, k), 2, "knn: k", None),
        (
            lambda x: patterns.contacts(x, q_len=4),
            *(np.zeros((1, 2), int), "contacts: pairs", None),
        ),
        (
            lambda x: patterns.expand([[0, 0]], x),
            *(np.zeros(2, int), "expand: q_residue", None),
        ),
        (lambda x: patterns.order(x).inverse, OK, "order: coords", None),
        (lambda n: patterns.order(OK, block_q=n).inverse, 8, "order: block_q", None),
    ],
)
def test_builders_refuse_traced_values(build, value, name, there):
    advice = f"Use patterns.device.{there} with .* or do this" if there else "Do this"
    message = f"{name} is traced; expected known values.* {advice} outside jit"
    with pytest.raises(TypeError, match=message):
        jax.jit(build)(value)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            patterns.neighbors,
            r"neighbors: index is not a rect.* Pad short rows",
        ),
        (lambda x: patterns.contacts(x, q_len=4), r"contacts: pairs is not a rectang"),
        (lambda x: patterns.expand(OK > 0, x), r"expand: q_residue is not a rectang"),
        (lambda x: patterns.knn(x, 1), r"knn: coords is not a rect.* three numbers"),
    ],
)
def test_builders_refuse_ragged_lists(call, message):
    with pytest.raises(ValueError, match=message):
        call([[0, 1], [1]])
