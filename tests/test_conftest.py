"""Which tests `--cases` leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import spread_cases


def items(*names: str) -> list[Any]:
    return [SimpleNamespace(nodeid=name) for name in names]


@pytest.mark.parametrize(
    "most, left",
    [
        (1, ["x::a[0]", "x::b", "y::a[[]"]),
        (2, ["x::a[0]", "x::a[4]", "x::b", "y::a[[]", "y::a[1]"]),
        (3, ["x::a[0]", "x::a[2]", "x::a[4]", "x::b", "y::a[[]", "y::a[1]"]),
    ],
)
def test_cases_of_each_test_from_the_first_to_the_last(most, left):
    names = [f"x::a[{n}]" for n in range(5)]
    found = spread_cases(items(*names, "x::b", "y::a[[]", "y::a[1]"), most)
    assert [item.nodeid for item in found] == left
