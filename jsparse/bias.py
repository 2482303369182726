"""Biases added to the scaled logits before softmax, beside a plain dense array.

`BlockBias` stores values on the mask's blocks only, `EntryBias` only where their bits
are set; `DistanceBias` stores none and is computed from coordinates where it is needed;
`ScoreFunction` is a function of the logit and of where it stands. All are pytrees, so
``jax.grad`` gives a gradient of the same type. `jsparse.ops` accepts them;
`jsparse.backends` evaluates them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jsparse.patterns import BlockMask
from jsparse.patterns._arguments import as_reals, number
from jsparse.patterns._export import exportable
from jsparse.patterns._rules import squared_distance

Array = Any
_STATIC = {"static": True}


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockBias:
    """A bias whose values exist only on the mask's blocks.

    Block ``n`` of ``values`` counts the partial blocks in list order (heads outermost),
    then the full blocks in list order.

    Args:
        values: ``[B or 1, H or 1, n, block_q, block_kv]``; ``H`` must be 1 for a mask
            with head patterns, whose blocks belong to heads already.

    Example:
        >>> import jsparse.patterns as patterns
        >>> mask = patterns.window(512, left=32, right=32, block_q=64, block_kv=64)
        >>> bias = BlockBias.from_function(mask, lambda t, s: -0.1 * abs(t - s))
        >>> bias.values.shape
        (1, 1, 22, 64, 64)
    """

    values: Array

    @classmethod
    def from_function(
        cls,
        mask: BlockMask,
        function: Callable[..., Array],
        *arrays: Array,
        num_blocks: int | None = None,
    ) -> BlockBias:
        """Evaluates ``function`` on each block, never on ``[T, S]``.

        Args:
            mask: the mask the bias belongs to; its ``[B or 1, H or 1]`` patterns must
                be one pattern (``[1, 1]``).
            function: ``function(t, s, *arrays)`` with query indices ``t [block_q, 1]``
                and key indices ``s [1, block_kv]`` int32, returns ``[block_q,
                block_kv]`` or ``[H, block_q, block_kv]``. Indices of a tail block may
                reach beyond T or S; those elements are never used.
            *arrays: passed on, so that the values are differentiable with respect to
                them.
            num_blocks: static number of blocks to make; needed only under ``jit`` with
                a traced mask.

        Returns:
            The bias, differentiable with respect to ``arrays``.

        Raises:
            ValueError: for a mask with batch or head patterns.
        """
        if (mask.batch_size, mask.num_heads) != (1, 1):
            raise ValueError(
                f"BlockBias.from_function: the mask has {mask.batch_size} batch and "
                f"{mask.num_heads} head patterns; expected one of each."
            )
        count = mask.num_blocks if num_blocks is None else num_blocks
        rows, cols = _block_coordinates(mask, count)

        def one(pair):
            t = pair[0] * mask.block_q + jnp.arange(mask.block_q, dtype=jnp.int32)
            s = pair[1] * mask.block_kv + jnp.arange(mask.block_kv, dtype=jnp.int32)
            value = jnp.asarray(function(t[:, None], s[None, :], *arrays))
            shape = (mask.block_q, mask.block_kv)
            return jnp.broadcast_to(value, (*value.shape[:-2], *shape))

        values = jax.lax.map(one, (rows, cols))
        values = values[:, None] if values.ndim == 3 else values
        return cls(jnp.moveaxis(values, 0, 1)[None])

    @classmethod
    def from_dense(cls, mask: BlockMask, dense: Array) -> BlockBias:
        """Takes the mask's blocks out of a dense ``[H or 1, T, S]`` or ``[T, S]`` bias.

        Raises:
            ValueError: if the shape does not fit the mask.
        """
        dense = jnp.asarray(dense)
        if dense.ndim not in (2, 3) or dense.shape[-2:] != (mask.q_len, mask.kv_len):
            raise ValueError(
                f"BlockBias.from_dense: dense has shape {dense.shape}; expected "
                f"[{mask.q_len}, {mask.kv_len}] or [H, {mask.q_len}, {mask.kv_len}]."
            )
        return cls.from_function(
            mask,
            lambda t, s, x: x.at[..., t, s].get(mode="fill", fill_value=0),
            dense,
        )


def _block_coordinates(mask: BlockMask, count: int) -> tuple[Array, Array]:
    """Row and column ``[count]`` of each block in `BlockBias` order."""
    lists = (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    n = jnp.arange(count, dtype=jnp.int32)
    ends = jnp.concatenate([jnp.cumsum(jnp.asarray(c)[0, 0]) for c, _ in lists])
    num_rows = lists[0][0].shape[-1]
    split = ends[num_rows - 1]
    found = []
    for offset, (counts, indices) in zip((0, split), lists, strict=True):
        counts, indices = jnp.asarray(counts)[0, 0], jnp.asarray(indices)[0, 0]
        total = jnp.cumsum(counts)
        local = n - offset
        row = jnp.searchsorted(total, local, side="right").astype(jnp.int32)
        row = jnp.clip(row, 0, num_rows - 1)
        slot = local - (total - counts)[row]
        width = indices.shape[-1]
        if width == 0:
            found.append((row, jnp.zeros_like(row)))
        else:
            found.append((row, indices[row, jnp.clip(slot, 0, width - 1)]))
    (row_p, col_p), (row_f, col_f) = found
    partial = n < split
    return jnp.where(partial, row_p, row_f), jnp.where(partial, col_p, col_f)


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EntryBias:
    """A bias with a value for each entry of the neighbour lists that make the mask.

    What lists need: the blocks that they touch hold ten times as many pairs as they
    name. For ``"mosaic_gpu"`` and ``"reference"``; `jsparse.nn.functional`'s
    `neighbor_attention` makes one, or else a `BlockBias`.

    Args:
        values: ``[B or 1, H or 1, T, n]``.
        index: ``[B or 1, T, n]`` integers, the lists that `patterns.device.neighbors`
            was given: one pattern for all heads, no full blocks. Entries outside
            0..S - 1 are padding; of a key that a list names twice, the first counts.

    Example:
        >>> import jax.numpy as jnp, jsparse
        >>> index = jnp.array([[1, 2], [0, -1], [3, 2]])
        >>> mask = jsparse.patterns.device.neighbors(
        ...     index, kv_len=4, block_q=64, block_kv=64, capacity=1
        ... )
        >>> values = jnp.array([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]])
        >>> bias = EntryBias(values[None, None], index[None])
        >>> q, k, v = (jnp.zeros((n, 1, 8)) for n in (3, 4, 4))
        >>> _, lse = jsparse.block_sparse_attention(
        ...     *(q, k, v, mask), bias=bias, implementation="reference", return_lse=True
        ... )
        >>> [round(float(x), 2) for x in lse[0]]
        [2.31, 3.0, 5.31]
    """

    values: Array
    index: Array


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DistanceBias:
    """A bias computed from distances: ``sum_n weights[h, n] * basis_n(|x_t - y_s|)``.

    Make one with `linear`, `quadratic`, `table` or `gaussian`. Distances are computed
    from coordinate differences in float32, so they are exact for coordinates of
    thousands of ångström; the gradient of a distance of zero is taken as zero.

    Attributes:
        weights: ``[H or 1, n]`` float32.
        q_coords: ``[T, 3]`` or ``[B or 1, T, 3]`` float32, ångström.
        kv_coords: ``[S, 3]`` or ``[B or 1, S, 3]`` float32, ångström.
        knots: ``[n + 1]`` float32, ångström: the positions of the basis functions, then
            their width. Trainable for `gaussian`; a table's have no gradient.
        form: which basis.

    References:
        The linear form is ALiBi's over distance (Press et al. 2022); the Gaussian basis
        is SchNet's (Schütt et al. 2017).
    """

    weights: Array
    q_coords: Array
    kv_coords: Array
    knots: Array
    form: str = dataclasses.field(metadata=_STATIC)

    @classmethod
    def linear(
        cls, slope: Array, coords: Array, kv_coords: Array | None = None
    ) -> DistanceBias:
        """``-slope[h] * d``.

        Args:
            slope: ``[H or 1]``, per ångström.
            coords: ``[T, 3]`` or ``[B or 1, T, 3]``, ångström.
            kv_coords: the keys' coordinates; ``coords`` if not given.

        Raises:
            TypeError: for what is no real number.
            ValueError: for other shapes, or numbers that are not finite and known
                before tracing. Both hold for every form.

        Example:
            >>> import numpy as np
            >>> x = np.array([[0.0, 0, 0], [3, 4, 0]], np.float32)
            >>> bias = DistanceBias.linear(np.array([0.5], np.float32), x)
            >>> bias.dense()[0, 0, 1].item()
            -2.5
        """
        return cls._make(
            "linear", _column("linear", slope), np.zeros(2), coords, kv_coords
        )

    @classmethod
    def quadratic(
        cls, slope: Array, coords: Array, kv_coords: Array | None = None
    ) -> DistanceBias:
        """``-slope[h] * d**2``; arguments as in `linear`, slope per square ångström."""
        return cls._make(
            "quadratic", _column("quadratic", slope), np.zeros(2), coords, kv_coords
        )

    @classmethod
    def table(
        cls,
        values: Array,
        max_distance: float,
        coords: Array,
        kv_coords: Array | None = None,
    ) -> DistanceBias:
        """A table over ``n`` evenly spaced distances with linear interpolation.

        Args:
            values: ``[H or 1, n]``, the bias at ``0, ..., max_distance``; n >= 2.
            max_distance: ångström; larger distances take the last entry.
            coords: ``[T, 3]`` or ``[B or 1, T, 3]``, ångström.
            kv_coords: the keys' coordinates; ``coords`` if not given.

        Raises:
            TypeError: for values that are not real numbers, or a distance that is not
                one number, known before tracing.
            ValueError: for fewer than two entries, a distance that is not positive, or
                numbers that are not finite and known before tracing.

        Example:
            >>> import numpy as np
            >>> x = np.array([[0.0, 0, 0], [0, 0, 3]], np.float32)
            >>> bias = DistanceBias.table(np.array([[0.0, 2.0, 8.0]]), 4.0, x)
            >>> bias.dense()[0].tolist()
            [[0.0, 5.0], [5.0, 0.0]]
        """
        values = _finite("table: values", values)
        shape = values.shape
        if len(shape) != 2 or shape[1] < 2:
            raise ValueError(
                f"DistanceBias.table: values has shape {shape}; expected [H, n] with "
                "at least two entries, the first at distance 0."
            )
        step = _positive("table: max_distance", max_distance) / (shape[1] - 1)
        knots = np.append(np.arange(shape[1]) * step, step)
        return cls._make("table", values, knots, coords, kv_coords)

    @classmethod
    def gaussian(
        cls,
        weights: Array,
        centers: Array,
        width: float,
        coords: Array,
        kv_coords: Array | None = None,
    ) -> DistanceBias:
        """``sum_n weights[h, n] * exp(-(d - centers[n])**2 / (2 * width**2))``.

        Args:
            weights: ``[H or 1, n]``.
            centers: ``[n]``, ångström.
            width: ångström.
            coords: ``[T, 3]`` or ``[B or 1, T, 3]``, ångström.
            kv_coords: the keys' coordinates; ``coords`` if not given.

        Raises:
            TypeError: for weights or centers that are not real numbers, or a width that
                is not one number, known before tracing.
            ValueError: if weights and centers disagree, the width is not positive, or
                numbers are not finite and known before tracing.

        Example:
            >>> import numpy as np
            >>> x = np.array([[0.0, 0, 0], [0, 0, 2]], np.float32)
            >>> bias = DistanceBias.gaussian(np.ones((1, 1)), np.array([2.0]), 1.0, x)
            >>> [round(float(v), 3) for v in bias.dense()[0].ravel()]
            [0.135, 1.0, 1.0, 0.135]
        """
        weights = _finite("gaussian: weights", weights)
        centers = _finite("gaussian: centers", centers)
        if weights.ndim != 2 or weights.shape[1:] != centers.shape:
            raise ValueError(
                f"DistanceBias.gaussian: weights has shape {weights.shape} and "
                f"centers {centers.shape}; expected [H, n] and [n]."
            )
        width = _positive("gaussian: width", width)
        knots = jnp.append(jnp.asarray(centers, jnp.float32), jnp.float32(width))
        return cls._make("gaussian", weights, knots, coords, kv_coords)

    @classmethod
    def _make(cls, form, weights, knots, coords, kv_coords) -> DistanceBias:
        coords = _points(f"{form}: coords", coords)
        kv_coords = (
            coords if kv_coords is None else _points(f"{form}: kv_coords", kv_coords)
        )
        as_float = [
            jnp.asarray(x, jnp.float32) for x in (weights, coords, kv_coords, knots)
        ]
        return cls(*as_float, form=form)

    def dense(self) -> Array:
        """The whole bias, ``[*B, H or 1, T, S]`` float32; for small problems."""
        return self.values(self.weights, self.knots, self.q_coords, self.kv_coords)

    def values(self, weights: Array, knots: Array, x: Array, y: Array) -> Array:
        """The bias ``[..., H, n, m]`` of ``x [..., n, 3]`` and ``y [..., m, 3]``."""
        d2 = squared_distance(x, y)
        slope = weights[..., :1, None]
        if self.form == "quadratic":
            return -slope * d2[..., None, :, :]
        # sqrt has no derivative at 0: step aside there, and put the 0 back. NaN is
        # apart from everything, and stays.
        apart = d2 != 0
        d = jnp.where(apart, jnp.sqrt(jnp.where(apart, d2, 1)), 0)
        if self.form == "linear":
            return -slope * d[..., None, :, :]
        knots = knots[..., None, None, :]
        centers, width = knots[..., :-1], knots[..., -1:]
        if self.form == "table":
            # The knots of a table are its layout, not parameters.
            centers, width = (jax.lax.stop_gradient(x) for x in (centers, width))
            d = jnp.minimum(d, centers[..., -1])
            basis = jnp.maximum(0, 1 - jnp.abs(d[..., None] - centers) / width)
        else:
            basis = jnp.exp(-0.5 * jnp.square((d[..., None] - centers) / width))
        # A product with the basis, not a table look-up: its gradient is a product too,
        # and so deterministic, where a look-up would scatter with atomics.
        return jnp.einsum("...hn,...tsn->...hts", weights, basis, precision="highest")


def _column(form: str, slope: Array) -> Array:
    slope = _finite(f"{form}: slope", slope)
    if slope.ndim != 1:
        raise ValueError(
            f"DistanceBias.{form}: slope has shape {slope.shape}; expected [H] or [1]."
        )
    return jnp.asarray(slope)[:, None]


def _points(name: str, coords: Array) -> Array:
    coords = _finite(name, coords)
    if coords.ndim not in (2, 3) or coords.shape[-1] != 3:
        raise ValueError(
            f"DistanceBias.{name} has shape {coords.shape}; expected [N, 3] or "
            "[B, N, 3] in ångström."
        )
    return coords


def _finite(name: str, x: Array) -> Array:
    """Real numbers, finite where the values are known before tracing."""
    x = as_reals(f"DistanceBias.{name}", x)
    if isinstance(x, jax.core.Tracer):
        return x
    found = np.asarray(x).astype(np.float64)
    bad = np.argwhere(~np.isfinite(found))
    if len(bad):
        first = tuple(bad[0].tolist())
        raise ValueError(
            f"DistanceBias.{name} is {found[first]} at {first}, one of {len(bad)} "
            "numbers that are not finite; expected finite ones. Give what has no value "
            "any finite one, and leave it out of the mask."
        )
    return x


def _positive(name: str, value: float) -> float:
    try:
        found = number(value)
    except (TypeError, ValueError) as err:
        shape = getattr(value, "shape", ())
        what = f" has shape {shape}" if shape else f"={value!r}"
        raise TypeError(
            f"DistanceBias.{name}{what}; expected one number of ångström, known before "
            "tracing, for all heads and batch entries."
        ) from err
    if not math.isfinite(found) or found <= 0:
        raise ValueError(
            f"DistanceBias.{name}={value!r}; expected a positive number of ångström."
        )
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ScoreFunction:
    """A function of each logit: ``function(score, index_q, index_kv, head, *arrays)``.

    Its result takes the place of the scaled logit, before the mask is applied; -inf
    masks the element. The function is traced once, on scalars, and may do any
    element-wise arithmetic on them and on elements of the arrays. From the arrays alone
    it may compute anything. Indices beyond the ends of an array mean what they mean in
    JAX. Arrays it closes over are like those it is given. JAX differentiates it: with
    respect to the score, so that q and k get their gradients, and to the arrays.

    There is no index of the batch: the arrays serve all batch entries. ``jax.vmap``
    over them, or over what holds them, gives each entry its own.

    Args:
        function: ``score`` is ``scale * q . k``, a scalar in float32 (float64 for
            float64 inputs), as must be the result; ``index_q``, ``index_kv`` and
            ``head``, the query head, are int32 scalars.
        arrays: float or integer, of any shapes.

    Example:
        ALiBi, whose slopes are trained, under a soft cap:

        >>> import jax, jax.numpy as jnp, jsparse
        >>> def alibi(score, index_q, index_kv, head, slopes):
        ...     distance = jnp.abs(index_q - index_kv)
        ...     return 30 * jnp.tanh(score / 30) - slopes[head] * distance
        >>> mask = jsparse.patterns.window(256, left=16, right=16)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 256, 4, 32))
        >>> def loss(slopes):
        ...     bias = jsparse.ScoreFunction(alibi, (slopes,))
        ...     return jsparse.block_sparse_attention(q, k, v, mask, bias=bias).sum()
        >>> jax.grad(loss)(jnp.full(4, 0.5)).shape
        (4,)

    References:
        ``score_mod`` of FlexAttention (PyTorch).
    """

    function: Any = dataclasses.field(metadata=_STATIC)
    arrays: tuple[Array, ...] = ()


Bias = Array | BlockBias | EntryBias | DistanceBias | ScoreFunction
