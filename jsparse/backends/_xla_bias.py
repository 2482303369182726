"""How the xla backend evaluates a bias on one tile, and where its gradient goes.

Every bias becomes a `Term`. What a tile needs of it is gathered into `Reads`,
``Term.values`` turns that into logits (and is what JAX differentiates), and the
gradient of what was read is written back once per block (``pairs``), per row (``q``),
per column (``kv``) or summed over everything (``shared``). A score function is a term
that needs the logits themselves: `ScoreTerm`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from jsparse.backends import _score
from jsparse.bias import BlockBias, DistanceBias, ScoreFunction

Array = Any


class Reads(NamedTuple):
    """What one tile of a bias depends on, or its gradient; unused fields are ()."""

    shared: tuple[Array, ...] = ()
    q: tuple[Array, ...] = ()  # each [R, m, ...]
    kv: tuple[Array, ...] = ()  # each [R, n, ...]
    pairs: Array | tuple[()] = ()  # [H or 1, R, W, block_q, block_kv]


@dataclasses.dataclass(frozen=True)
class Term:
    """A bias as seen by the tile loop; this base class is the absent bias.

    Attributes:
        bias: the user's bias without batch axes; dense ones are padded to whole blocks.
        block_q, block_kv: block sizes.
    """

    bias: Any
    block_q: int
    block_kv: int

    def shared(self) -> tuple[Array, ...]:
        """Arrays that every tile reads whole."""
        return ()

    def q_data(self) -> tuple[Array, ...]:
        """Arrays ``[T, ...]`` read by query."""
        return ()

    def kv_data(self) -> tuple[Array, ...]:
        """Arrays ``[S, ...]`` read by key."""
        return ()

    def read_shared(self, place: Any) -> tuple[Array, ...]:
        """What a tile reads of them; ``place`` is as for `ScoreTerm`."""
        return self.shared()

    def read_pairs(self, i: Array, j: Array, ids: Array | None) -> Array | tuple[()]:
        """Values of blocks ``(i, j)`` (numbers ``ids``), each ``[R, W]``."""
        return ()

    def empty_pairs(self) -> Array | tuple[()]:
        """Zeros that `write_pairs` fills."""
        return ()

    def write_pairs(self, store: Any, i: Array, j: Array, ids: Any, value: Any) -> Any:
        """Stores block gradients; out-of-range ``i`` or ``ids`` are dropped."""
        return store

    def values(self, reads: Reads, by_column: bool) -> Array | None:
        """Logits ``[H or 1, R, m, n]`` of one tile."""
        return None

    def add_shared(
        self, total: tuple[Array, ...], grads: tuple[Array, ...], place: Any
    ) -> tuple[Array, ...]:
        """Adds one tile's gradient of ``shared``."""
        return tuple(a + b.astype(a.dtype) for a, b in zip(total, grads, strict=True))

    def gradient(self, total: Reads) -> Any:
        """The user's bias type from gradients of shared, q_data, kv_data and pairs."""
        return None


class DenseTerm(Term):
    """``[H or 1, T, S]``, padded to whole blocks."""

    def _tiles(self, x: Array) -> Array:
        nq = x.shape[1] // self.block_q
        return x.reshape(len(x), nq, self.block_q, -1, self.block_kv)

    def read_pairs(self, i, j, ids):
        tiles = self._tiles(self.bias).at[:, i, :, j, :].get(mode="clip")
        return jnp.moveaxis(tiles, 2, 0)

    def empty_pairs(self):
        return jnp.zeros(self.bias.shape, self.bias.dtype)

    def write_pairs(self, store, i, j, ids, value):
        value = jnp.moveaxis(value, 0, 2).astype(store.dtype)
        tiles = self._tiles(store).at[:, i, :, j, :].set(value, mode="drop")
        return tiles.reshape(store.shape)

    def values(self, reads, by_column):
        return arrange_pairs(reads.pairs, by_column)

    def gradient(self, total):
        return total.pairs


class KeyTerm(Term):
    """``[H or 1, 1, S]``: one value per key, the same for every query."""

    def kv_data(self):
        return (self.bias[:, 0].T,)

    def values(self, reads, by_column):
        return jnp.moveaxis(reads.kv[0], -1, 0)[:, :, None, :]

    def gradient(self, total):
        return total.kv[0].T[:, None].astype(self.bias.dtype)


class BlockTerm(Term):
    """`BlockBias`: read by block number."""

    def read_pairs(self, i, j, ids):
        return self.bias.values.at[:, ids].get(mode="clip")

    def empty_pairs(self):
        return jnp.zeros_like(self.bias.values)

    def write_pairs(self, store, i, j, ids, value):
        return store.at[:, ids].set(value.astype(store.dtype), mode="drop")

    def values(self, reads, by_column):
        return arrange_pairs(reads.pairs, by_column)

    def gradient(self, total):
        return BlockBias(total.pairs)


class DistanceTerm(Term):
    """`DistanceBias`: computed from the coordinates of the tile."""

    def shared(self):
        return (self.bias.weights, self.bias.knots)

    def q_data(self):
        return (self.bias.q_coords,)

    def kv_data(self):
        return (self.bias.kv_coords,)

    def values(self, reads, by_column):
        value = self.bias.values(*reads.shared, reads.q[0], reads.kv[0])
        return jnp.moveaxis(value, -3, 0)

    def gradient(self, total):
        weights, knots = total.shared
        return DistanceBias(
            weights, total.q[0], total.kv[0], knots, form=self.bias.form
        )


class ScoreTerm(Term):
    """`ScoreFunction`: its arrays, and last the numbers of the heads ``[H]``.

    ``shared`` of a tile's `Reads` are the elements that it loads; of the whole, the
    gradients of the arrays.

    ``place`` has a tile's index_q, index_kv and head, which broadcast to the logits.
    """

    @property
    def program(self) -> _score.Program:
        return self.bias.function

    def shared(self):
        return tuple(self.bias.arrays[n] for n in self.program.learned_arrays)

    def read_shared(self, place):
        return tuple(value for value, _ in self._load(place))

    def _load(self, place: tuple[Array, ...]) -> list:
        """Values and indices of the loads of a tile."""
        return _score.load(self.program, self.bias.arrays, place)

    def scores(self, s, reads, counts, place):
        """The new scores, in the shape of s and ``counts``."""
        return _score.scores(self.program, counts, (s, *place), list(reads.shared))

    def add_shared(self, total, grads, place):
        total = dict(zip(self.program.learned_arrays, total, strict=True))
        index = [index for _, index in self._load(place)]
        for n in self.program.learned:
            array = self.program.loads[n].array
            total[array] = _score.add_at(total[array], index[n], grads[n])
        return tuple(total.values())

    def gradient(self, total):
        grads = [jnp.zeros_like(x) for x in self.bias.arrays]
        for n, x in zip(self.program.learned_arrays, total.shared, strict=True):
            grads[n] = x
        return ScoreFunction(self.program, tuple(grads))


def make_term(bias: Any, block_q: int, block_kv: int) -> Term:
    """The term for a bias without batch axes."""
    if bias is None:
        kind = Term
    elif isinstance(bias, BlockBias):
        kind = BlockTerm
    elif isinstance(bias, DistanceBias):
        kind = DistanceTerm
    elif isinstance(bias, ScoreFunction):
        kind = ScoreTerm
    else:
        kind = KeyTerm if bias.shape[-2] == 1 else DenseTerm
    return kind(bias, block_q, block_kv)


def arrange_pairs(x: Array, by_column: bool) -> Array:
    """Blocks ``[..., R, W, bq, bk]`` side by side, along keys or ``by_column``."""
    *lead, rows, width, block_q, block_kv = x.shape
    if by_column:
        return x.reshape(*lead, rows, width * block_q, block_kv)
    return jnp.swapaxes(x, -3, -2).reshape(*lead, rows, block_q, width * block_kv)
