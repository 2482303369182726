"""The peer that does not fuse: grouped GEMM, softmax, grouped GEMM.

What block-sparse attention costs where the logits go through memory. It is built with
our CUDA kernels, from CUTLASS; ``ffi/README.md`` says what its steps are.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.bench._contract import Array, NoSuchPass, Task
from jsparse.bench._jax_peers import JaxCall, JaxContender, JaxPeer, no_gpu
from jsparse.bench._torch_peers import lists_of, only_whole_blocks
from jsparse.patterns import BlockMask

TARGET = "jsparse_grouped_gemm"
_ADDRESSES = 6  # of the operands of a problem, and their leading dimensions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lists:
    """Listed blocks by row, int32.

    Attributes:
        row_start: ``[num_rows + 1]``, the first listed block of each row.
        rows: ``[n]``, the row of each listed block.
        columns: ``[n]``, its column.
        blocks: queries and keys of a block; static.
    """

    row_start: Array
    rows: Array
    columns: Array
    blocks: tuple[int, int] = field(metadata={"static": True})

    @classmethod
    def of(cls, mask: BlockMask) -> Lists:
        """The whole blocks of a mask, in NumPy."""
        lists = lists_of(mask)
        counts, indices = lists["kv"]
        used = np.arange(indices.shape[1]) < counts[:, None]
        start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        return cls(start, rows, indices[used], lists["blocks"])


class GroupedGemm(JaxPeer):
    """A grouped GEMM for the logits, a softmax, a grouped GEMM for the output."""

    name = "grouped_gemm"

    def available(self) -> str | None:
        """Needs a Hopper GPU and the CUDA kernels."""
        if reason := no_gpu():
            return reason
        from jsparse.backends import _hopper, cutlass

        if (capability := _hopper.compute_capability()) != "9.0":
            return f"it needs compute capability 9.0, and this GPU has {capability}"
        library = cutlass.library()
        if isinstance(library, str):
            return library
        return None

    def why_not(self, mask: BlockMask) -> str | None:
        """Takes whole blocks in one pattern for all heads."""
        return only_whole_blocks(mask)

    def enter(self, task: Task) -> JaxContender:
        """See `Peer.enter`."""
        return _Forward(self, task)

    def describe(self, mask: BlockMask) -> Lists:
        """See `JaxPeer.describe`."""
        return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, Lists.of(mask)))

    def prepare(self, mask: BlockMask) -> Lists:
        """See `JaxPeer.prepare`."""
        return jax.device_put(Lists.of(mask))

    def forward(self, *arrays: Any) -> Array:
        """See `JaxPeer.forward`."""
        q, k, v, lists = arrays
        return attend(q, k, v, lists)


@dataclass
class _Forward(JaxContender):
    """Takes part in forward passes."""

    def ready(self, direction: str) -> JaxCall:
        """See `Contender.ready`."""
        if direction != "forward":
            raise NoSuchPass("it computes no gradients")
        return super().ready(direction)


def attend(q: Array, k: Array, v: Array, lists: Lists) -> Array:
    """``softmax(q k^T / sqrt(D)) v`` over the listed blocks.

    Args:
        q: ``[T, H, D]`` float16 or bfloat16.
        k: ``[S, H, D]``.
        v: ``[S, H, D]``.
        lists: which blocks.

    Returns:
        ``[T, H, D]``; 0 where a query sees nothing.
    """
    from jsparse.backends import _hopper

    library = _registered()
    tokens, heads, dim = q.shape
    block_q, block_kv = lists.blocks
    blocks, rows = lists.rows.shape[0], tokens // block_q
    elements = blocks * block_q * block_kv
    workspace = library.jsparse_grouped_gemm_workspace(_hopper.num_multiprocessors())

    def problems(count: int) -> tuple[Any, Any]:
        shapes = jax.ShapeDtypeStruct((count, 3), jnp.int32)
        return shapes, jax.ShapeDtypeStruct((_ADDRESSES, count, 2), jnp.int32)

    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((heads, elements), jnp.float32),
        jax.ShapeDtypeStruct((heads, elements), q.dtype),
        jax.ShapeDtypeStruct((blocks * block_kv, heads, dim), q.dtype),
        *problems(heads * blocks),
        *problems(heads * rows),
        jax.ShapeDtypeStruct((workspace,), jnp.uint8),
    )
    return jax.ffi.ffi_call(TARGET, results)(
        *(q, k, v, lists.row_start, lists.rows, lists.columns),
        block_q=np.int32(block_q),
        block_kv=np.int32(block_kv),
        scale=np.float32(dim**-0.5),
    )[0]


@functools.cache
def _registered() -> ctypes.CDLL:
    """Our CUDA library, the handler registered with JAX."""
    from jsparse.backends import cutlass

    library = cutlass.library()
    if isinstance(library, str):
        raise NotImplementedError(library)
    handler = jax.ffi.pycapsule(library.jsparse_grouped_gemm_ffi)
    jax.ffi.register_ffi_target(TARGET, handler, platform="CUDA")
    return library
