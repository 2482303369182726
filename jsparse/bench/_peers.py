"""What a case is measured against, and ourselves in the same clothes.

A peer is what a user would take instead of jsparse for the same result. It gets the
same arrays and its own form of the pattern. To add one, write the class and list it in
``PEERS``; the runner, the records and the tables find it there.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.ops import block_sparse_attention
from jsparse.patterns import BlockMask

Array = Any


class Peer(Protocol):
    """Another way to the same output; arrays are ``[T, H, D]``."""

    @property
    def name(self) -> str:
        """How ``--against`` calls it."""
        ...

    def available(self) -> str | None:
        """Why it cannot run on this machine, or None if it can."""
        ...

    def describe(self, mask: BlockMask) -> Any:
        """Shapes of what `prepare` returns, to ask for memory before it is taken."""
        ...

    def prepare(self, mask: BlockMask) -> Any:
        """The pattern in the peer's own form, a pytree of arrays; not timed."""
        ...

    def forward(self, q: Array, k: Array, v: Array, pattern: Any) -> Array:
        """The output; traced under ``jit``."""
        ...

    def backward(
        self, q: Array, k: Array, v: Array, pattern: Any, dout: Array
    ) -> tuple[Array, Array, Array, Array]:
        """The output and the gradients of q, k and v; traced under ``jit``."""
        ...


class Ours:
    """`block_sparse_attention` with one implementation."""

    def __init__(self, implementation: str):
        self.name = implementation

    def available(self) -> str | None:
        """Asked of the operation itself, for each problem."""
        return None

    def describe(self, mask: BlockMask) -> BlockMask:
        """Shapes of the mask's own arrays."""
        return jax.tree_util.tree_map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), mask
        )

    def prepare(self, mask: BlockMask) -> BlockMask:
        """The mask, on the device."""
        return jax.device_put(mask)

    def forward(self, q: Array, k: Array, v: Array, pattern: BlockMask) -> Array:
        """See `Peer.forward`."""
        implementation: Any = self.name
        return block_sparse_attention(q, k, v, pattern, implementation=implementation)

    def backward(self, q: Array, k: Array, v: Array, pattern: BlockMask, dout: Array):
        """See `Peer.backward`."""
        return _with_gradients(self, q, k, v, pattern, dout)


class Dense:
    """Plain dense attention in jnp with the same mask as a boolean ``[T, S]`` array."""

    name = "dense"

    def available(self) -> str | None:
        """Runs wherever JAX does."""
        return None

    def describe(self, mask: BlockMask) -> jax.ShapeDtypeStruct:
        """One boolean for each element."""
        return jax.ShapeDtypeStruct((mask.q_len, mask.kv_len), np.bool_)

    def prepare(self, mask: BlockMask) -> Array:
        """The mask's elements."""
        return jnp.asarray(mask.to_dense()[0, 0])

    def forward(self, q: Array, k: Array, v: Array, pattern: Array) -> Array:
        """``softmax(q k^T / sqrt(D)) v`` over the elements, softmax in float32."""
        logits = jnp.einsum("thd,shd->hts", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(pattern, logits * (q.shape[-1] ** -0.5), -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("hts,shd->thd", weights, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    def backward(self, q: Array, k: Array, v: Array, pattern: Array, dout: Array):
        """See `Peer.backward`; the gradients are JAX's own."""
        return _with_gradients(self, q, k, v, pattern, dout)


def _with_gradients(peer: Any, q: Array, k: Array, v: Array, pattern: Any, dout: Array):
    out, pull = jax.vjp(lambda *qkv: peer.forward(*qkv, pattern), q, k, v)
    return out, *pull(dout)


PEERS: dict[str, Peer] = {"dense": Dense()}
