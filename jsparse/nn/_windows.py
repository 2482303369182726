"""The bias of AlphaFold 3's atom windows, moved to the blocks of their mask.

Called by `functional.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.bias import BlockBias
from jsparse.patterns import BlockMask, device

Array = Any

QUERIES, KEYS = 32, 128  # of one window


@functools.lru_cache(maxsize=8)
def known_mask(length: int) -> BlockMask:
    """The windows of a known number of atoms, as NumPy arrays: kernels plan with them.

    Kept, since whoever plans knows a pattern by its arrays.
    """
    with jax.ensure_compile_time_eval():
        mask = device.atom_windows(length, padded_to=length)
    return jax.tree_util.tree_map(np.asarray, mask)


def window_bias(bias: Array, mask: BlockMask) -> BlockBias:
    """``[B or 1, W, H or 1, 32, 128]`` on the blocks of ``mask``.

    Each query block lists neighbouring key blocks, so a window is a run of 128 columns
    somewhere in the strip of its row. What the strip holds beside it is masked.

    Args:
        bias: one value for each query and key of each window.
        mask: made by `jsparse.patterns.device.atom_windows`.
    """
    batch, _, heads = bias.shape[:3]
    rows, width = mask.num_q_blocks, mask.capacity.kv
    strip, windows = width * mask.block_kv, mask.block_q // QUERIES
    pad = rows * windows - bias.shape[1]
    bias = jnp.pad(bias, ((0, 0), (0, pad), (0, 0), (0, 0), (0, 0)))

    start = jnp.asarray(mask.rules[0].q_data()[0])[0, ::QUERIES]
    start = jnp.pad(start, (0, rows * windows - len(start)))
    first = jnp.asarray(mask.kv_indices)[0, 0, :, 0] * mask.block_kv
    # With fewer than 128 atoms a window starts at 0, and only its first columns count.
    # Windows without atoms start anywhere; nobody reads where they land.
    room = max(0, strip - KEYS)
    offset = jnp.clip(start - jnp.repeat(first, windows), 0, room)

    def place(window: Array, offset: Array) -> Array:
        wide = jnp.pad(window, [(0, 0)] * 3 + [(room, room)])
        return jax.lax.dynamic_slice_in_dim(wide, room - offset, strip, axis=-1)

    strips = jax.vmap(place, in_axes=(1, 0))(bias, offset)
    # [row, window, B, H, query, slot, key] to [B, H, row, slot, window, query, key].
    strips = strips.reshape(
        rows, windows, batch, heads, QUERIES, width, mask.block_kv
    ).transpose(2, 3, 0, 5, 1, 4, 6)
    values = strips.reshape(batch, heads, rows * width, mask.block_q, mask.block_kv)
    return BlockBias(values)
