"""The block lists and nearest points against brute force over all pairs."""

from __future__ import annotations

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse.patterns import _neighbors
from jsparse.patterns._neighbors import (
    active_blocks,
    check_block,
    check_coords,
    check_cutoff,
    nearest,
)


def squared_distances(x, y):
    gap = np.asarray(x, np.float32)[:, None] - np.asarray(y, np.float32)[None]
    gap *= gap
    return gap[..., 0] + gap[..., 1] + gap[..., 2]


def over_blocks(elements, block_q, block_kv, reduce):
    rows = range(0, elements.shape[0], block_q)
    cols = range(0, elements.shape[1], block_kv)
    return np.array(
        [
            [reduce(elements[i : i + block_q, j : j + block_kv]) for j in cols]
            for i in rows
        ]
    )


def check_against_brute_force(x, y, cutoff, block_q, block_kv):
    rows, cols, full = active_blocks(x, y, cutoff, block_q, block_kv)
    squared = squared_distances(x, y)
    reach = np.float32((cutoff * (1 + 2e-6) + 1e-5) ** 2)
    expected = over_blocks(squared <= reach, block_q, block_kv, np.any)
    assert np.array_equal(np.argwhere(expected), np.stack([rows, cols], axis=1))
    assert (rows.dtype, cols.dtype, full.dtype) == (np.int32, np.int32, bool)

    # What a kernel tests, with the cut-off squared in float32.
    passes = squared <= np.float32(cutoff) * np.float32(cutoff)
    listed = np.zeros(expected.shape, bool)
    listed[rows, cols] = True
    assert not (over_blocks(passes, block_q, block_kv, np.any) & ~listed).any()
    everywhere = over_blocks(passes, block_q, block_kv, np.all)
    assert everywhere[rows[full], cols[full]].all()
    assert ((rows[full] + 1) * block_q <= len(x)).all()
    assert ((cols[full] + 1) * block_kv <= len(y)).all()
    return rows, cols, full


def walk(rng, count, step=1.5):
    """A chain: neighbours in the list are neighbours in space."""
    return np.cumsum(rng.normal(scale=step, size=(count, 3)), axis=0)


@pytest.fixture(params=["as chosen", "by block", "by point"])
def path(request, monkeypatch):
    """Each way of finding the pairs, whatever would have been chosen."""
    if request.param != "as chosen":
        answer = request.param == "by point"
        monkeypatch.setattr(_neighbors, "_is_scattered", lambda *_: answer)
    return request.param


@pytest.mark.parametrize(
    "block_q, block_kv", [(16, 16), (128, 128), (64, 24), (17, 100)]
)
@pytest.mark.parametrize("cutoff", [0.8, 6.0, 25.0])
def test_active_blocks_match_brute_force(path, block_q, block_kv, cutoff):
    rng = np.random.default_rng(block_q + block_kv)
    chain = walk(rng, 1203)
    cloud = rng.uniform(-25, 25, (517, 3))
    clusters = rng.integers(-2, 3, (700, 3)) * 30 + rng.normal(size=(700, 3))
    check_against_brute_force(chain, chain, cutoff, block_q, block_kv)
    check_against_brute_force(cloud, chain, cutoff, block_q, block_kv)
    check_against_brute_force(clusters, cloud, cutoff, block_q, block_kv)


def test_active_blocks_keep_scattered_points_of_a_local_chain(path):
    rng = np.random.default_rng(3)
    chain = walk(rng, 1500)
    ions = rng.uniform(chain.min(), chain.max(), (90, 3))
    points = np.concatenate([chain[:700], ions, chain[700:]])
    check_against_brute_force(points, points, 5.0, 64, 64)


def test_active_blocks_of_one_point_and_of_copies_of_it(path):
    one = np.array([[3.0, -1.0, 2.0]])
    rows, cols, full = check_against_brute_force(one, one, 10.0, 128, 128)
    assert (rows.tolist(), cols.tolist(), full.tolist()) == ([0], [0], [False])
    copies = np.repeat(one, 300, axis=0)
    _, _, full = check_against_brute_force(copies, copies, 1e-3, 128, 128)
    assert full.tolist() == [True, True, False] * 2 + [False] * 3


def test_active_blocks_may_be_none(path):
    x = np.zeros((40, 3))
    rows, cols, full = active_blocks(x, x + 100, 10.0, 16, 16)
    assert len(rows) == len(cols) == len(full) == 0
    assert (rows.dtype, cols.dtype, full.dtype) == (np.int32, np.int32, bool)


def test_active_blocks_at_exactly_the_cutoff_are_active_but_not_full(path):
    x = np.array([[0.0, 0, 0]] * 8)
    _, _, full = active_blocks(x, x + np.array([6, 0, 8]), 10.0, 8, 8)
    assert full.tolist() == [False]
    _, _, full = active_blocks(x, x + np.array([6, 0, 7.999]), 10.0, 8, 8)
    assert full.tolist() == [True]
    assert len(active_blocks(x, x + np.array([6, 0, 8.001]), 10.0, 8, 8)[0]) == 0


@pytest.mark.parametrize("offset", [0.0, 5e3, 1e6])
def test_active_blocks_agree_with_the_element_test_far_from_the_origin(path, offset):
    x = walk(np.random.default_rng(5), 900).astype(np.float32) + np.float32(offset)
    check_against_brute_force(x, x, 7.0, 32, 32)


def test_active_blocks_of_huge_coordinates_are_not_active(path):
    x = np.array([[3e38, 0, 0], [-3e38, 0, 0], [1e20, 0, 0]])
    rows, cols, _ = active_blocks(x, x, 10.0, 1, 1)
    assert np.stack([rows, cols], axis=1).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_active_blocks_with_a_cutoff_whose_square_underflows():
    x = np.array([[0.0, 0, 0], [1e-30, 0, 0], [1, 0, 0]])
    rows, cols, full = check_against_brute_force(x, x, 1e-30, 1, 1)
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 2)
    ]  # fmt: skip
    assert not full.any()


coordinates = st.lists(
    st.tuples(*[st.integers(-6, 6)] * 3), min_size=1, max_size=70
).map(lambda points: np.array(points, np.float64))


@settings(max_examples=80, deadline=None)
@given(
    x=coordinates,
    y=coordinates,
    cutoff=st.sampled_from([0.5, 1.0, 3.0, 5.0, 9.0, 40.0]),
    block_q=st.integers(1, 20),
    block_kv=st.integers(1, 20),
    scattered=st.booleans(),
)
def test_active_blocks_of_lattice_points(x, y, cutoff, block_q, block_kv, scattered):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_neighbors, "_is_scattered", lambda *_: scattered)
        check_against_brute_force(x, y, cutoff, block_q, block_kv)


def chosen_path(monkeypatch, x, cutoff=5.0):
    taken = []
    for name in ("_pairs_by_block", "_pairs_by_point"):
        original = getattr(_neighbors, name)

        def spy(*args, name=name, original=original):
            taken.append(name)
            return original(*args)

        monkeypatch.setattr(_neighbors, name, spy)
    rows, cols, _ = active_blocks(x, x, cutoff, 128, 128)
    monkeypatch.undo()
    return taken, set(zip(rows.tolist(), cols.tolist(), strict=True))


def test_points_in_no_order_are_found_by_point(monkeypatch):
    # As dense as a protein: 0.045 heavy atoms per cubic ångström.
    cloud = np.random.default_rng(1).uniform(0, 97, (40_960, 3))
    taken, found = chosen_path(monkeypatch, cloud)
    assert taken == ["_pairs_by_point"]
    monkeypatch.setattr(_neighbors, "_is_scattered", lambda *_: False)
    some = np.concatenate([cloud[:512], cloud[-512:]])
    rows, cols, _ = active_blocks(some, cloud, 5.0, 128, 128)
    number = np.array([0, 1, 2, 3, 316, 317, 318, 319])[rows]
    expected = set(zip(number.tolist(), cols.tolist(), strict=True))
    assert {pair for pair in found if not 4 <= pair[0] < 316} == expected


def test_points_in_some_order_are_found_by_block(monkeypatch):
    cloud = np.random.default_rng(1).uniform(0, 97, (40_960, 3))
    ordered = cloud[np.lexsort((cloud // 10).T)]
    taken, found = chosen_path(monkeypatch, ordered)
    assert taken == ["_pairs_by_block"]
    assert len(found) < 320**2 / 3


def test_points_with_many_neighbours_are_found_by_block(monkeypatch):
    # In no order, but any two blocks hold a close pair that is soon found.
    cloud = np.random.default_rng(1).uniform(0, 97, (40_960, 3))
    taken, found = chosen_path(monkeypatch, cloud, cutoff=15.0)
    assert taken == ["_pairs_by_block"]
    assert len(found) == 320**2


def test_pairs_do_not_depend_on_how_many_are_tested_at_once(monkeypatch, path):
    monkeypatch.setattr(_neighbors, "_CHUNK", 1024)
    x = walk(np.random.default_rng(6), 1000)
    check_against_brute_force(x, x, 6.0, 128, 128)


def test_points_in_no_order_match_in_several_bands_of_rows(monkeypatch):
    monkeypatch.setattr(_neighbors, "_MARKS", 100)
    monkeypatch.setattr(_neighbors, "_is_scattered", lambda *_: True)
    x = np.random.default_rng(2).uniform(0, 30, (2000, 3))
    check_against_brute_force(x, x, 4.0, 32, 64)


@pytest.mark.parametrize("spread, cutoff", [(0.0, 10.0), (12.0, 10.0), (60.0, 1e4)])
def test_dense_cases_stay_small(spread, cutoff):
    x = np.random.default_rng(0).uniform(0, 1, (20_000, 3)) * spread
    tracemalloc.start()
    rows, cols, full = active_blocks(x, x, cutoff, 128, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(rows * 157 + cols, np.arange(157**2))
    assert int(full.sum()) == (0 if spread == 12.0 else 156**2)
    assert peak < 64e6  # all pairs of points, as bytes, would be 400 MB


def test_too_many_pairs_are_refused(monkeypatch, path):
    monkeypatch.setattr(_neighbors, "MAX_PAIRS", 99)
    x = np.zeros((100, 3))
    with pytest.raises(ValueError, match="more than 99 active block pairs of 10 x 10"):
        active_blocks(x, x, 1.0, 10, 10)
    monkeypatch.setattr(_neighbors, "MAX_PAIRS", 100)
    assert len(active_blocks(x, x, 1.0, 10, 10)[0]) == 100


def nearest_by_brute_force(x, y, k):
    gap = np.asarray(x, np.float32).astype(float)[:, None] - np.asarray(y, np.float32)
    return np.argsort(np.square(gap).sum(axis=-1), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("k", [1, 7, 300])
def test_nearest_matches_brute_force(k):
    rng = np.random.default_rng(k)
    x, y = rng.normal(size=(120, 3)), rng.normal(size=(300, 3))
    found = nearest(x, y, k)
    assert found.dtype == np.int32
    assert np.array_equal(found, nearest_by_brute_force(x, y, k))


def test_nearest_breaks_ties_by_index():
    lattice = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), axis=-1).reshape(-1, 3)
    lattice = np.random.default_rng(0).permutation(lattice)
    for k in (1, 4, 5, 11, 30):
        expected = nearest_by_brute_force(lattice, lattice, k)
        assert np.array_equal(nearest(lattice, lattice, k), expected)


def test_nearest_among_copies_of_one_point_takes_the_first():
    x = np.tile([[1.0, 2.0, 3.0]], (20_000, 1))
    assert (nearest(x, x, 3) == [0, 1, 2]).all()


def test_nearest_in_several_chunks_is_the_same(monkeypatch):
    x = np.random.default_rng(4).normal(size=(50, 3))
    whole = nearest(x, x, 5)
    monkeypatch.setattr(_neighbors, "_QUERIES", 20)
    assert np.array_equal(nearest(x, x, 5), whole)


@pytest.mark.parametrize(
    "k, error, words",
    [
        (5, ValueError, "k is 5, but there are only 4 key points"),
        (0, ValueError, "k is 0; expected at least 1"),
        (1.5, TypeError, "k is 1.5; expected a whole number"),
        (True, TypeError, "k is True; expected a whole number"),
    ],
)
def test_nearest_refuses_a_bad_k(k, error, words):
    with pytest.raises(error, match=words):
        nearest(np.zeros((9, 3)), np.zeros((4, 3)), k)


@pytest.mark.parametrize(
    "coords, error, words",
    [
        (np.zeros((5, 2)), ValueError, r"shape \(5, 2\); expected \[N, 3\]"),
        (np.zeros(3), ValueError, r"shape \(3,\); expected \[N, 3\]"),
        (np.zeros((0, 3)), ValueError, "no atom; expected at least one"),
        ([[1, 2, 3], [1, 2]], ValueError, "not a rectangular array"),
        ([["a", "b", "c"]], TypeError, "has dtype <U1"),
        ([["1", "2", "3"]], TypeError, "has dtype <U1"),
        (np.zeros((2, 3), bool), TypeError, "has dtype bool"),
        (np.zeros((2, 3), complex), TypeError, "has dtype complex128"),
        ([[0, 0, 0], [1, np.nan, 2]], ValueError, r"at atom 1: \[1.0, nan, 2.0\]"),
        ([[0, 0, -np.inf]], ValueError, r"at atom 0: \[0.0, 0.0, -inf\]"),
        ([[0, 0, 0], [0, 1e39, 0]], ValueError, r"at atom 1: \[0.0, 1e\+39, 0.0\]"),
    ],
)
def test_bad_coordinates_are_refused(coords, error, words):
    with pytest.raises(error, match=f"^radius: coords.*{words}"):
        check_coords("radius: coords", coords)


def test_good_coordinates_become_contiguous_float32():
    given_ = np.arange(12).reshape(3, 4).T[:, ::-1]
    out = check_coords("radius: coords", given_)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    assert np.array_equal(out, given_)
    assert check_coords("radius: coords", out) is out


@pytest.mark.parametrize("cutoff", [0, -3, np.nan, np.inf, 10_001])
def test_bad_cutoffs_are_refused(cutoff):
    with pytest.raises(
        ValueError, match=f"radius: cutoff is {float(cutoff)}; expected"
    ):
        check_cutoff("radius: cutoff", cutoff)


@pytest.mark.parametrize(
    "cutoff",
    [
        *("far", "10", b"10", np.array("10"), None, True, np.True_, 1j),
        *(np.zeros(2), np.array([10.0]), [10.0], [[1], [2, 3]]),
    ],
)
def test_cutoffs_that_are_no_number_are_refused(cutoff):
    with pytest.raises(TypeError, match=r"radius: cutoff is .* expected one distance"):
        check_cutoff("radius: cutoff", cutoff)


@pytest.mark.parametrize(
    "cutoff", [10, 10.0, np.int8(10), np.float16(10), np.array(10.0), jnp.float32(10)]
)
def test_numbers_of_any_type_are_cutoffs(cutoff):
    assert check_cutoff("radius: cutoff", cutoff) == 10.0


def test_traced_cutoffs_are_refused():
    with pytest.raises(TypeError, match="radius: cutoff is traced; .*device.radius"):
        jax.jit(lambda x: check_cutoff("radius: cutoff", x))(10.0)


def test_bad_block_sizes_are_refused():
    with pytest.raises(ValueError, match="block_q is 0; expected at least 1"):
        check_block("block_q", 0)
    with pytest.raises(TypeError, match=r"block_q is 12.0; expected a whole number"):
        check_block("block_q", 12.0)


def test_active_blocks_names_the_argument_that_is_wrong():
    x = np.zeros((4, 3))
    with pytest.raises(ValueError, match=r"^q_coords has shape"):
        active_blocks(x[:, :2], x, 1.0, 2, 2)
    with pytest.raises(ValueError, match=r"^kv_coords has shape"):
        active_blocks(x, x[:0], 1.0, 2, 2)
    with pytest.raises(ValueError, match=r"^cutoff is -1.0"):
        active_blocks(x, x, -1, 2, 2)
    with pytest.raises(ValueError, match=r"^block_kv is -2"):
        active_blocks(x, x, 1.0, 2, -2)
