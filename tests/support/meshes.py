"""Meshes of the devices that tests run on."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType, Mesh


def mesh_of_two(kind: AxisType) -> Mesh:
    """Two devices along the axis ``x``; skips the test where there is one only."""
    devices = jax.devices()[:2]
    if len(devices) < 2:
        pytest.skip("needs two devices")
    return jax.make_mesh((2,), ("x",), (kind,), devices=devices)
