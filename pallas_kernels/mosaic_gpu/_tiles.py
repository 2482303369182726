"""Tiles in shared memory, as TMA writes and wgmma reads them.

A tile lies as parts as wide as a swizzle, ``[parts, rows, width]``, each copied by
itself. Eight rows of a part are what wgmma calls a core matrix, so that parts need no
tiling; the copy of a tiled one could end with an array of whole eights of rows only.
Called by the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils

from .._common import swizzle_bytes
from . import _registers as r

Array = Any


def parts(columns: int, dtype: Any) -> tuple[int, int]:
    """How many parts a tile of so many columns has, and their width."""
    size = jnp.dtype(dtype).itemsize
    width = swizzle_bytes(columns * size) // size
    return columns // width, width


def scratch(lead: Sequence[int], rows: int, columns: int, dtype: Any) -> plgpu.SMEM:
    """Shared memory of tiles; ``lead`` are axes before them."""
    count, width = parts(columns, dtype)
    shape = (*lead, count, rows, width)
    return plgpu.SMEM(shape, dtype, transforms=_transforms(columns, dtype))


def ref_type(columns: int, dtype: Any) -> plgpu.RefType:
    """What functions on registers take a tile as."""
    return plgpu.RefType(_transforms(columns, dtype))


def _transforms(columns: int, dtype: Any) -> tuple:
    _, width = parts(columns, dtype)
    return (plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize),)


# ------------------------------------------------------------------------------ copies


def fetch(array: Array, index: tuple, tile: Array, full: Array, first: Any = 0) -> None:
    """Copies ``array[*index]``, from column ``first`` on, to a tile.

    Each part arrives at ``full``.
    """
    for part, columns in _columns_of(tile, first):
        plgpu.copy_gmem_to_smem(array.at[*index, columns], tile.at[part], full)


def write(tile: Array, array: Array, index: tuple, first: Any = 0) -> None:
    """Copies a tile to ``array[*index]``, from column ``first`` on, in one group."""
    last = tile.shape[0] - 1
    for part, columns in _columns_of(tile, first):
        to = array.at[*index, columns]
        plgpu.copy_smem_to_gmem(tile.at[part], to, commit_group=part == last)


def _columns_of(tile: Array, first: Any) -> Iterator[tuple[int, Any]]:
    count, _, width = tile.shape
    for part in range(count):
        yield part, pl.ds(first + part * width, width)


# --------------------------------------------------------------------------- registers


def load(rows: int, columns: int, dtype: Any, transposed: bool = False) -> Callable:
    """``f(tile) -> values``: 64 rows by ``columns``, or 64 columns by ``rows``.

    16-bit values stay packed, float32 ones have the accumulator layout.
    """
    wide = jnp.dtype(dtype).itemsize == 4
    shape = (columns, rows) if transposed else (rows, columns)
    layout = r.ACC if wide else r.OPERAND

    @plgpu.inline_mgpu(
        arg_types=(ref_type(columns, dtype),),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
    )
    def f(_, ref):
        whole, swizzle = utils.memref_unsqueeze(ref, 0), _swizzle(ref)
        if transposed:
            # Neighbouring columns of registers are rows of memory: one by one.
            whole = utils.memref_transpose(whole, (1, 0, 3, 2))
            how = layout.to_mgpu()
            return fa.FragmentedArray.load_tiled(whole, swizzle, layout=how)
        values = fa.FragmentedArray.load_tiled(whole, swizzle, layout=fa.WGMMA_LAYOUT)
        return r.accumulator(r.scalars(values), shape) if wide else values

    return f


def store(columns: int, dtype: Any) -> Callable:
    """``f(tile, x)``: 64 rows, in the ordinary wgmma layout."""

    @plgpu.inline_mgpu(arg_types=(ref_type(columns, dtype), r.OPERAND), return_type=())
    def f(_, ref, x):
        x.store_tiled(utils.memref_unsqueeze(ref, 0), _swizzle(ref))

    return f


def core_matrices(ref: ir.Value) -> ir.Value:
    """A tile as wgmma's descriptors see it, ``[rows / 8, parts, 8, width]``."""
    return utils.memref_transpose(utils.memref_unfold(ref, 1, (None, 8)), (1, 0, 2, 3))


def _swizzle(ref: ir.Value) -> int:
    """Bytes of a row of a part."""
    ty = ir.MemRefType(ref.type)
    return ty.shape[-1] * utils.bitwidth(ty.element_type) // 8
