"""A bias of neighbour lists by entry, as Mosaic kernels take it; here `reference`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.nn import _neighbors
from tests.nn.test_functional import check, lists, neighbors, normal


@pytest.mark.parametrize("capacity", [10, 2], ids=["at_once", "in_parts"])
@pytest.mark.parametrize("shared", ["nothing", "lists", "bias", "heads"])
def test_bias_by_entry(shared, capacity, monkeypatch):
    monkeypatch.setattr(_neighbors, "READS_ENTRIES", "reference")
    monkeypatch.setattr(_neighbors._Entries, "spread", None)
    tables = _neighbors.Tables(capacity, 16, 16, None, "reference")
    index, (k, v) = lists(75, 150), normal(32, 2, 2, 150, 2, 8)
    q, bias = normal(31, 2, 75, 2, 8), normal(33, 2, 2, 75, 9)
    if shared == "lists":
        index = index[:1]
    elif shared == "bias":
        bias = bias[:1]
    elif shared == "heads":
        bias = bias[:, :1]

    def ours(q, k, v, bias):
        inputs = _neighbors._Inputs(q, k, v, bias)
        return _neighbors._attend(tables, inputs, jnp.asarray(index))

    def formula(q, k, v, bias):
        bias = jnp.broadcast_to(bias, (2, 2, *bias.shape[2:]))
        every = np.broadcast_to(index, (2, *index.shape[1:]))
        return neighbors(q, k, v, bias, index=every)

    check(ours, formula, q, k, v, bias)
