"""Orders of atoms: permutations, their costs, and the choice between them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.patterns import _ordering
from jsparse.patterns._neighbors import active_blocks
from jsparse.patterns._ordering import Ordering, OrderingReport, order

METHODS = ("file", "hilbert", "bisection")


@pytest.fixture(scope="module")
def cloud():
    return np.random.default_rng(0).uniform(0, 40, (1500, 3)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_a_permutation_and_its_inverse(cloud, method):
    ordering = order(cloud, 8.0, block_q=64, block_kv=32, method=method)
    assert ordering.method == method
    assert len(ordering) == len(cloud)
    assert ordering.permutation.dtype == ordering.inverse.dtype == np.int32
    assert np.array_equal(np.sort(ordering.permutation), np.arange(len(cloud)))
    assert np.array_equal(ordering.permutation[ordering.inverse], np.arange(len(cloud)))
    assert [c.name for c in ordering.candidates] == [method]


def test_file_order_is_the_order_given(cloud):
    ordering = order(cloud, method="file")
    assert np.array_equal(ordering.permutation, np.arange(len(cloud)))


@pytest.mark.parametrize("method", METHODS)
def test_reports_say_what_the_permuted_pattern_costs(cloud, method):
    ordering = order(cloud, 8.0, block_q=64, block_kv=32, method=method)
    placed = cloud[ordering.permutation]
    rows, _, _ = active_blocks(placed, placed, 8.0, 64, 32)
    per_row = np.bincount(rows, minlength=24)
    report = ordering.report
    assert report.blocks == len(rows)
    assert report.elements == len(rows) * 64 * 32
    assert report.density == len(rows) / (24 * 47)
    assert report.mean_per_row == per_row.mean()
    assert report.max_per_row == per_row.max()
    assert report.unevenness == pytest.approx(per_row.max() / per_row.mean())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_hilbert_curve_visits_every_cell_in_unit_steps(bits):
    side = 2**bits
    grid = np.indices((side, side, side), np.uint64).reshape(3, -1)
    keys = _ordering._hilbert_keys(grid, bits)
    assert np.array_equal(np.sort(keys), np.arange(side**3))
    cells = grid[:, np.argsort(keys)].astype(np.int64)
    assert (np.abs(np.diff(cells)).sum(axis=0) == 1).all()


def test_hilbert_grid_has_one_scale_for_all_axes():
    # Along x a step is 1 Å, along y a thousandth: y must not decide anything.
    rng = np.random.default_rng(0)
    points = np.zeros((64, 3))
    points[:, 0] = rng.permutation(64)
    flat = order(points, method="hilbert")
    points[:, 1] = rng.permutation(64) / 1000
    assert np.array_equal(order(points, method="hilbert").permutation, flat.permutation)


@pytest.mark.parametrize("block_q, block_kv", [(64, 64), (128, 32), (32, 128)])
def test_bisection_blocks_do_not_overlap_in_space(cloud, block_q, block_kv):
    ordering = order(cloud, block_q=block_q, block_kv=block_kv, method="bisection")
    placed = cloud[ordering.permutation]
    for block in {block_q, block_kv}:
        parts = [placed[i : i + block] for i in range(0, len(placed), block)]
        low = np.array([part.min(axis=0) for part in parts])
        high = np.array([part.max(axis=0) for part in parts])
        apart = ((low[:, None] > high) | (low > high[:, None])).any(axis=-1)
        assert (apart | np.eye(len(parts), dtype=bool)).all()


def test_bisection_cuts_at_the_larger_block_when_the_smaller_does_not_divide(cloud):
    by_both = order(cloud, block_q=96, block_kv=64, method="bisection")
    by_large = order(cloud, block_q=96, block_kv=96, method="bisection")
    assert np.array_equal(by_both.permutation, by_large.permutation)


def test_bisection_cuts_the_longest_side_and_keeps_order_inside():
    points = np.array([[5, 9, 0], [0, 0, 0], [5, 1, 0], [0, 8, 0]], float)
    ordering = order(points, block_q=2, block_kv=2, method="bisection")
    assert ordering.permutation.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 3, 300])
def test_atoms_in_one_place_keep_their_order(method, count):
    points = np.full((count, 3), 7.5)
    ordering = order(points, block_q=16, block_kv=16, method=method)
    assert np.array_equal(ordering.permutation, np.arange(count))


def test_atoms_at_one_position_keep_their_order_among_others(cloud):
    twice = np.concatenate([cloud, cloud])
    for method in METHODS[1:]:
        inverse = order(twice, 5.0, block_q=32, block_kv=32, method=method).inverse
        assert (inverse[: len(cloud)] < inverse[len(cloud) :]).all(), method


def test_auto_takes_the_fewest_elements(cloud):
    ordering = order(cloud, 8.0, block_q=32, block_kv=32)
    assert tuple(c.name for c in ordering.candidates) == METHODS
    assert ordering.report.elements == min(c.elements for c in ordering.candidates)
    assert ordering.method == "bisection"
    by_name = order(cloud, 8.0, block_q=32, block_kv=32, method="bisection")
    assert np.array_equal(ordering.permutation, by_name.permutation)


def test_auto_keeps_file_order_where_it_is_best():
    # A straight chain in file order: no other order has fewer blocks.
    chain = np.stack([np.arange(512.0), np.zeros(512), np.zeros(512)], axis=1)
    ordering = order(chain, 5.0, block_q=32, block_kv=32)
    assert ordering.method == "file"
    assert len({c.elements for c in ordering.candidates}) == 1


def fake_report(name, elements, most):
    return OrderingReport(name, elements, elements, 0.5, 1.0, most, most / 1.0)


@pytest.mark.parametrize(
    "costs, best",
    [
        ([(5, 3), (4, 9), (6, 1)], "hilbert"),
        ([(5, 3), (5, 2), (5, 3)], "hilbert"),
        ([(5, 3), (6, 1), (5, 3)], "file"),
        ([(5, 3), (5, 2), (5, 2)], "hilbert"),
    ],
)
def test_auto_prefers_fewest_then_most_even_then_first(monkeypatch, costs, best):
    reports = {n: fake_report(n, *c) for n, c in zip(METHODS, costs, strict=True)}
    monkeypatch.setattr(_ordering, "_report", lambda name, *_: reports[name])
    assert order(np.zeros((4, 3))).method == best


@pytest.mark.parametrize("library", [np, jnp])
def test_apply_and_undo_along_any_axis(cloud, library):
    ordering = order(cloud, method="hilbert")
    x = np.random.default_rng(2).normal(size=(2, len(cloud), 3)).astype(np.float32)
    given = library.asarray(x)
    for axis in (1, -2):
        moved = ordering.apply(given, axis=axis)
        assert isinstance(moved, type(given))
        assert np.array_equal(moved, x[:, ordering.permutation])
        assert np.array_equal(ordering.undo(moved, axis=axis), x)
    assert np.array_equal(ordering.apply(cloud), cloud[ordering.permutation])
    assert np.array_equal(ordering.undo([*range(len(cloud))]), ordering.inverse)


@pytest.mark.parametrize("axis", [0, 2, 3, -4])
@pytest.mark.parametrize("call", ["apply", "undo"])
def test_apply_and_undo_refuse_an_axis_without_the_atoms(cloud, axis, call):
    ordering = order(cloud, method="file")
    x = np.zeros((2, len(cloud), 3))
    words = rf"Ordering.{call}: x has shape \(2, 1500, 3\); expected 1500 atoms along"
    with pytest.raises(ValueError, match=words):
        getattr(ordering, call)(x, axis=axis)


def test_table_has_a_row_for_each_candidate_and_marks_the_chosen(cloud):
    ordering = order(cloud, 8.0, block_q=32, block_kv=32)
    table = ordering.table()
    assert [row["order"] for row in table] == list(METHODS)
    assert [row["chosen"] for row in table] == [False, False, True]
    for row, report in zip(table, ordering.candidates, strict=True):
        numbers = {key: row[key] for key in row if key not in ("order", "chosen")}
        expected = dataclasses.asdict(report)
        expected.pop("name")
        assert numbers == expected


def test_ordering_cannot_be_changed(cloud):
    ordering = order(cloud, method="file")
    assert isinstance(ordering, Ordering)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ordering.method = "hilbert"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            {"method": "morton"},
            ValueError,
            "order: method is 'morton'; expected 'auto'",
        ),
        ({"cutoff": 0}, ValueError, "order: cutoff is 0.0"),
        ({"block_q": 0}, ValueError, "order: block_q is 0"),
        ({"block_kv": 2.5}, TypeError, "order: block_kv is 2.5"),
        ({"coords": np.zeros((4, 2))}, ValueError, r"order: coords has shape \(4, 2\)"),
        ({"coords": [[np.nan] * 3]}, ValueError, "order: coords is not finite"),
    ],
)
def test_bad_arguments_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        order(**{"coords": np.zeros((4, 3)), **change})
