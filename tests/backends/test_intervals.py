"""Intervals as the Hopper kernels get them: of tokens that exist, over such tokens."""

from __future__ import annotations

import numpy as np

from jsparse.backends import _hopper
from jsparse.pallas_kernels.mosaic_gpu._elements import ColumnInterval, RowInterval
from jsparse.patterns._rules import Window


def test_intervals_end_with_the_tokens_that_exist():
    start = np.array([[-5, 0, 3, 1]], np.int32)
    stop = np.array([[2, 99, 6, 4]], np.int32)
    rows = _hopper._Tokens(np.array([4, 3]), 6)
    columns = _hopper._Tokens(np.array([5, 9]), 12)
    of_rows = _hopper._kernel_rule(Window(start, stop, "q"), rows, columns)
    of_columns = _hopper._kernel_rule(Window(start, stop, "kv"), columns, rows)
    for rule in (of_rows, of_columns):
        assert isinstance(rule, RowInterval | ColumnInterval)
        np.testing.assert_array_equal(rule.start, [[0, 0, 3, 1, 0, 0]])
        expected = [[2, 5, 5, 4, 0, 0], [2, 9, 6, 0, 0, 0]]
        np.testing.assert_array_equal(rule.stop, expected)
