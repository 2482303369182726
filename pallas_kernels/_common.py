"""What every kernel shares: units, swizzles, and how a 16-bit tile lies in memory."""

from __future__ import annotations

import math

import jax.experimental.pallas.mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
NUM_FIELDS = 12
"""int32 fields of one work item; see `mosaic_gpu._schedule`. A multiple of 16 bytes."""
MAX_SMEM_BYTES = 227 * 1024


def swizzle_bytes(columns: int) -> int:
    """The widest TMA swizzle that a row of ``columns`` 16-bit values fills."""
    for size in (128, 64, 32):
        if columns * 2 % size == 0:
            return size
    raise ValueError(
        f"columns={columns}; expected a multiple of 16. Pad the head size with zeros."
    )


def tile_transforms(columns: int) -> tuple:
    """Tiling and swizzle of a 16-bit shared-memory tile that wgmma reads."""
    size = swizzle_bytes(columns)
    return (plgpu.TilingTransform((8, size // 2)), plgpu.SwizzleTransform(size))
