"""Programs for H100s, compiled by XLA on a machine that has none.

`make compiled` puts XLA's CUDA plug-in, without CUDA, where these tests find it. They
see what XLA makes of a whole program: its memory, and what its devices send one
another. Kernels are lowered in it, not yet assembled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from jsparse.backends import mosaic_gpu
from jsparse.patterns import _device_lists
from tests.pallas_kernels.launches import H100

TARGET = """
    gpu_device_info {
      cuda_compute_capability { major: 9 }
      core_count: 132
      fpus_per_core: 128
      clock_rate_ghz: 1.98
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: 232448
      shared_memory_per_core: 233472
      l2_cache_size: 52428800
      memory_bandwidth: 3352320000000
      device_memory_size: 84929347584
    }
    platform_name: "CUDA"
    runtime_version { major: 13 }
    dnn_version_info { major: 9 minor: 12 }
    device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""Limits of the chip from CUDA's and NVIDIA's tables, rates from its data sheet."""


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    """Lets JAX lower for CUDA, and the kernels take every problem."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs `make compiled`")
    if jax.default_backend() != "cpu":
        pytest.skip("is for machines without a GPU")
    known = xla_bridge.canonicalize_platform
    monkeypatch.setattr(
        xla_bridge,
        "canonicalize_platform",
        lambda name: "cuda" if name in ("gpu", "cuda") else known(name),
    )
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: None)
    monkeypatch.setattr(_device_lists, "on_hopper", lambda: True)


def mesh_of(count: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    """So many H100s of one host, along the axis ``x``."""
    found = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=TARGET
    )
    return jax.sharding.Mesh(np.array(found.devices), ("x",), axis_types=(kind,))


def compiled(
    function: Callable[..., Any],
    *shapes: Any,
    mesh: jax.sharding.Mesh | None = None,
    spec: Any = None,
) -> Any:
    """``function`` for arguments of these shapes, sharded as ``spec``."""
    mesh = mesh_of(1) if mesh is None else mesh
    sharding = jax.NamedSharding(mesh, jax.P() if spec is None else spec)
    shapes = jax.tree_util.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    axes = mesh.axis_sizes, mesh.axis_names, mesh.axis_types
    with use_abstract_mesh(AbstractMesh(*axes, abstract_device=H100)):
        return jax.jit(function).lower(*shapes).compile()


def temporaries(program: Any) -> int:
    """Bytes beyond inputs and outputs."""
    return program.memory_analysis().temp_size_in_bytes
