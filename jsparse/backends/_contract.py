"""What every backend is given and what it must answer.

`jsparse.ops` turns the user's arguments into `Operands` and a `Problem`, asks each
backend ``why_not(problem)``, and calls the first that answers None. Backends import
nothing above this file.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.core
import jax.numpy as jnp

from jsparse.bias import Bias
from jsparse.patterns import BlockMask

Array = Any


class Operands(NamedTuple):
    """The arrays of one call, in canonical form.

    With ``B = q.shape[:-3]``, every leaf starts with one axis for each axis of B, of
    that size or of size 1 where it is shared. ``vmap`` only adds such an axis, so a
    shared bias stays shared. After them follow ``q [T, H, D]``, ``k [S, K, D]``,
    ``v [S, K, Dv]``; the mask's and the bias's leaves without their ``[B or 1]`` axis;
    a dense bias ``[H or 1, T or 1, S]``; the arrays of a `ScoreFunction`, whose
    function is a `_score.Program`.
    """

    q: Array
    k: Array
    v: Array
    mask: BlockMask
    bias: Bias | None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The broadcast batch axes of all operands."""
        return batch_axes(self, self.q.ndim - 3)


class HostPattern:
    """A mask whose values are known before tracing, for backends that plan ahead.

    Two are equal if they hold the very same arrays.
    """

    def __init__(self, mask: BlockMask):
        self.mask = mask
        self._ids = tuple(map(id, jax.tree_util.tree_leaves(mask)))

    @classmethod
    def of(cls, mask: BlockMask) -> HostPattern | None:
        """The mask's pattern, or None if any of its arrays is traced."""
        leaves = jax.tree_util.tree_leaves(mask)
        traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
        return None if traced else cls(mask)

    def __hash__(self) -> int:
        return hash(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostPattern) and self._ids == other._ids


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static description of a call: all that the choice of a backend rests on.

    ``most_blocks`` is what the lists of a batch entry and head have room for.
    """

    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    block_q: int
    block_kv: int
    mask_heads: int
    most_blocks: int
    rules: tuple[str, ...]
    bits: bool
    bias: str | None
    platform: str
    bias_weights: int = 0
    """Of a head, of a bias by distance: entries of a table, or Gaussians. Of a list, of
    one by entry: entries. Of the largest array of a score function: elements."""
    bias_dtype: str | None = None
    """Of the values of a dense bias, or of one on blocks."""
    bias_by_key: bool = False
    """Whether a dense bias has one row for all queries."""
    mean_blocks: float | None = None
    """What the lists of a batch entry and head hold; None if that is traced."""
    score: Any = None
    """The `_score.Program` of a `ScoreFunction`."""

    @property
    def tested(self) -> bool:
        """Whether elements of blocks are tested, but for lengths."""
        return self.bits or bool(self.rules)


class Backend(Protocol):
    """One way of computing block-sparse attention."""

    name: str
    differentiable: bool
    """Whether JAX differentiates ``forward`` itself; otherwise ``backward`` is used."""

    def why_not(self, problem: Problem) -> str | None:
        """Why this backend cannot take the problem, or None if it can."""
        ...

    def forward(
        self, operands: Operands, scale: float, pattern: HostPattern | None
    ) -> tuple[Array, Array]:
        """``out [*B, T, H, Dv]`` and ``lse [*B, H, T]``, natural log.

        ``pattern`` is the mask's, without the axes of `Operands`, if it is known.
        """
        ...

    def backward(
        self,
        operands: Operands,
        scale: float,
        pattern: HostPattern | None,
        out: Array,
        lse: Array,
        dout: Array,
        dlse: Array,
        bias_gradient: bool,
    ) -> tuple[Array, Array, Array, Bias | None]:
        """Gradients of q, k, v and bias, summed over the axes each of them shares.

        That of the bias is None unless ``bias_gradient`` asks for it.
        """
        ...


def batch_axes(tree: Any, rank: int) -> tuple[int, ...]:
    """The broadcast of the first ``rank`` axes of all leaves."""
    leaves = jax.tree_util.tree_leaves(tree)
    return tuple(max(x.shape[axis] for x in leaves) for axis in range(rank))


def accumulator_dtype(x: Array) -> Any:
    """float32, or float64 where the inputs are."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def matmul_precision(x: Array) -> jax.lax.Precision | None:
    """Full precision for float32 inputs, unless the JAX configuration says otherwise.

    XLA would otherwise compute float32 products in tf32 on a GPU.
    """
    if jax.config.jax_default_matmul_precision is not None or x.dtype.itemsize < 4:
        return None
    return jax.lax.Precision.HIGHEST


def vary_like(tree: Any, source: Any) -> Any:
    """Marks arrays as varying over every mesh axis that ``source`` varies over.

    Inside `jax.shard_map` a loop's carry must start with the type it ends with, and a
    pullback takes the very type that its function returned.
    """
    axes = frozenset()
    for x in jax.tree_util.tree_leaves(source):
        axes |= jax.typeof(jnp.asarray(x)).mat.varying
    if not axes:
        return tree
    return jax.tree_util.tree_map(
        lambda x: jax.lax.pcast(
            x, tuple(axes - jax.typeof(x).mat.varying), to="varying"
        ),
        jax.tree_util.tree_map(jnp.asarray, tree),
    )
