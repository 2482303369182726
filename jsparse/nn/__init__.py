"""Flax layers around `jsparse.block_sparse_attention`: parameters and projections.

Needs flax (``pip install "jsparse[flax]"``), which `import jsparse` does not load.
Nothing here builds or changes a mask.
"""

from __future__ import annotations

try:
    import flax.nnx  # noqa: F401
except ImportError as err:
    raise ImportError(
        f"jsparse.nn needs flax, which cannot be imported here ({err}). Install it: "
        'pip install "jsparse[flax]"',
        name="flax",
    ) from err

from jsparse.nn._attention import BlockSparseAttention as BlockSparseAttention
from jsparse.nn._attention import attention_fn as attention_fn
