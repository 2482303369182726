"""Pair bias in the kernels: its kinds, where their values are, how they are added.

A bias is added to the products, divided by the scale of the logits: one multiply-add an
element, and what follows scales both. Tiles of a dense or block bias are streamed to
shared memory by TMA. Axes of size 1 are shared: index 0 serves every batch entry or
head.

May assume: the last axis of a streamed bias fills 16 bytes. Called by the kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir.dialects import arith
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils

from . import _distance, _entries, _tiles
from . import _registers as r
from ._distance import DistanceBias
from ._score import Score

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shared:
    """Values that batch entries and heads may share.

    Attributes:
        values: ``[b, H or 1, ...]``.
        inner: batch entry n reads index ``n // inner % b``.
        constant: whether no gradient is asked for.
    """

    values: Array
    inner: int = dataclasses.field(default=1, metadata=dict(static=True))
    constant: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def entry(self, b, h) -> tuple[Array | int, Array | int]:
        """Indices into the first two axes for a batch entry and a query head."""
        count, heads = self.values.shape[:2]
        at = lax.rem(lax.div(b, jnp.int32(self.inner)), jnp.int32(count))
        return (at if count > 1 else 0), (h if heads > 1 else 0)

    def shared(self, batch: int, heads: int) -> tuple[bool, bool]:
        """Whether batch entries, and whether heads, share values."""
        return self.values.shape[0] < batch, self.values.shape[1] < heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseBias(_Shared):
    """``values [b, H or 1, T, S]``, float32 or 16-bit."""

    def index(self, place: TilePlace, rows: int) -> tuple[tuple, Array]:
        """Where a tile stands in ``values``, and its first column there."""
        return (place.batch, place.head, pl.ds(place.q, rows)), place.kv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockBias(_Shared):
    """``values [b, H or 1, n, block_q, block_kv]``, on the mask's blocks only.

    Attributes:
        numbers: of the blocks in the lists of a launch, partial and full, flattened;
            the n-th is ``values[:, :, n]``. None where tiles are named by number.
    """

    numbers: tuple[Array, Array] | None = None

    def index(self, place: TilePlace, rows: int) -> tuple[tuple, Array]:
        """Where a tile stands in ``values``, and its first column there."""
        block_q, block_kv = self.values.shape[-2:]
        first = lax.rem(place.q, jnp.int32(block_q))
        index = place.batch, place.head, place.block, pl.ds(first, rows)
        return index, lax.rem(place.kv, jnp.int32(block_kv))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyBias(_Shared):
    """``values [b, H or 1, S]`` float32, of whole blocks: the same for all queries."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntryBias(_Shared):
    """``values [b, H or 1, T, count]``, one for each entry of neighbour lists.

    There are no full blocks, and one pattern for all heads.

    Attributes:
        lists: ``[B or 1, nq, room]`` int32, and
        starts: ``[B or 1, nq, nk]`` int32: see `neighbors_sm90.list_entries`.
        counted: ``[B or 1, T, count]`` bool, which count; not for kernels.
        blocks: queries and keys of a block.
    """

    lists: Any = None
    starts: Any = None
    counted: Any = None
    blocks: tuple[int, int] = dataclasses.field(
        default=(64, 64), metadata=dict(static=True)
    )

    @property
    def count(self) -> int:
        """Entries of a list."""
        return self.values.shape[-1]


STREAMED = {"16 bits": jnp.bfloat16, "32 bits": jnp.float32}
"""Kinds of a streamed bias, and a dtype of each."""
COMPUTED = (*_distance.FORMS, "score")
"""Kinds of a bias that takes registers; beside these there is ``"entry"``."""
Streamed = DenseBias | BlockBias
Bias = Streamed | KeyBias | EntryBias | DistanceBias | Score


class TilePlace(NamedTuple):
    """Where a tile is.

    Attributes:
        batch: index into the first axis of the bias.
        head: into the second.
        q: first query.
        kv: first key.
        block: the number of its block, of a `BlockBias`.
    """

    batch: Array | int
    head: Array | int
    q: Array
    kv: Array
    block: Array | int = 0


class Tile(NamedTuple):
    """What a step knows of a streamed bias: its values, and where its gradient goes."""

    values: Array
    place: TilePlace | None


def fetch(bias: Streamed, place: TilePlace, tile: Array, full: Array) -> None:
    """Copies a tile to shared memory."""
    index, first = bias.index(place, tile.shape[1])
    _tiles.fetch(bias.values, index, tile, full, first)


def write(bias: Streamed, out: Array, place: TilePlace, tile: Array) -> None:
    """Copies a tile of the gradient of a bias from shared memory."""
    index, first = bias.index(place, tile.shape[1])
    _tiles.write(tile, out, index, first)


def streamed(bias: Bias | None) -> bool:
    """Whether tiles of the bias come through shared memory."""
    return isinstance(bias, DenseBias | BlockBias)


def row_sums(bias: Bias | None, rows_are_queries: bool) -> int:
    """How many sums of each row the gradient of a bias needs of a dq or dkv kernel."""
    if bias is None or bias.constant:
        return 0
    if isinstance(bias, DistanceBias | Score):
        return bias.row_sums(rows_are_queries)
    return int(isinstance(bias, KeyBias) and not rows_are_queries)


def own_gradient(
    bias: Bias | None, batch: int, heads: int
) -> jax.ShapeDtypeStruct | None:
    """What the dq kernel writes of the gradient of a bias, if it does.

    Of a streamed one that nobody shares, all of it; of a bias by entry that of each
    batch entry and head.
    """
    if bias is None or bias.constant:
        return None
    shared = any(bias.shared(batch, heads))
    if isinstance(bias, EntryBias):
        dtype = jnp.float32 if shared else bias.values.dtype
        return jax.ShapeDtypeStruct((batch, heads, *bias.values.shape[2:]), dtype)
    if not streamed(bias) or shared:
        return None
    return jax.ShapeDtypeStruct(bias.values.shape, bias.values.dtype)


def lane_sums(bias: Bias | None) -> int:
    """How many sums over all pairs it needs of the dq kernel."""
    own = isinstance(bias, DistanceBias) and not bias.constant
    return bias.lane_sums if own else 0


class InSmem(NamedTuple):
    """What of a bias is in shared memory: what each ``scratch_spec`` takes last.

    Attributes:
        dtype: of streamed tiles, or None.
        points: whether there are points of a step's columns.
        entries: whether there are tiles that values of a bias by entry are spread over.
        values: length and dtype of lists of such values, if theirs are there too.
    """

    dtype: Any = None
    points: bool = False
    entries: bool = False
    values: tuple[int, Any] | None = None


def in_smem(bias: Bias | None, rows_are_queries: bool) -> InSmem:
    """Of a launch; values if they fit beside the rest."""
    dtype = bias.values.dtype if bias is not None and streamed(bias) else None
    values = None
    if isinstance(bias, EntryBias) and rows_are_queries:
        of_list = bias.count, bias.values.dtype
        values = of_list if _entries.values_fit(*of_list) else None
    kinds = isinstance(bias, DistanceBias), isinstance(bias, EntryBias)
    return InSmem(dtype, *kinds, values)


def kind_in_smem(kind: str | None) -> InSmem:
    """Of a kind of bias, by which a config is chosen: lists as most are."""
    values = (128, jnp.bfloat16) if kind == "entry" else None
    return InSmem(STREAMED.get(kind), kind in _distance.FORMS, kind == "entry", values)


def kind(bias: Bias | None) -> str | None:
    """What a config depends on: one of `STREAMED` or `COMPUTED`, or None.

    A bias by key takes next to nothing of what configs divide: none for them.
    """
    if isinstance(bias, DistanceBias):
        return bias.form
    if isinstance(bias, Score):
        return "score"
    if isinstance(bias, EntryBias):
        return "entry"
    if bias is None or not streamed(bias):
        return None
    return f"{8 * jnp.dtype(bias.values.dtype).itemsize} bits"


# ------------------------------------------------------------------ added to products


def _products(columns: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=r.ACC)


def add_tile(columns: int, scale: float, dtype: Any) -> Callable:
    """``f(s, values) -> s`` with the values of `_tiles.load` over the scale."""
    layout = r.ACC if jnp.dtype(dtype).itemsize == 4 else r.OPERAND

    @plgpu.inline_mgpu(arg_types=(r.ACC, layout), return_type=_products(columns))
    def f(_, s, values):
        bias = (r.widened if layout is r.OPERAND else r.scalars)(values)
        return _sum(s, bias, scale, columns)

    return f


def keep(tile: int, chunk: int, scale: float, dtype: Any) -> Callable:
    """``f(room, values, ...)``: each thread's values over the scale, for `kept`.

    ``values`` are chunks of `_tiles.load`, of which ``room`` may hold the tile: it has
    64 x ``tile`` float32.
    """
    layout = r.ACC if jnp.dtype(dtype).itemsize == 4 else r.OPERAND
    arg_types = _tiles.ref_type(chunk, dtype), *(layout,) * (tile // chunk)

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=())
    def f(_, room, *chunks):
        open_ = r.widened if layout is r.OPERAND else r.scalars
        factor = r.number(1 / scale)
        values = [r.mul(x, factor) for values in chunks for x in open_(values)]
        values = r.tied(values, "")
        utils.warpgroup_barrier()  # all have read the tile
        r.store_own(room, values)

    return f


def kept(chunk: int, n: int, dtype: Any) -> Callable:
    """``f(room) -> values``: the n-th chunk of what `keep` kept, to be added to."""

    @plgpu.inline_mgpu(
        arg_types=(_tiles.ref_type(chunk, dtype),), return_type=_products(chunk)
    )
    def f(_, room):
        count = chunk // 2
        return r.accumulator(r.load_own(room, n * count, count), (64, chunk))

    return f


def add_columns(columns: int, scale: float) -> Callable:
    """``f(s, values, first) -> s``: one value a column, from global memory."""

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, plgpu.RefType(), r.SCALAR), return_type=_products(columns)
    )
    def f(_, s, values, first):
        first = arith.addi(first.registers.item(), r.first_column())
        pairs = [
            r.global_pair(values, first, 8 * pair, r.f32())
            for pair in range(columns // 8)
        ]
        bias = [pairs[i >> 2][i & 1] for i in range(len(pairs) * 4)]
        return _sum(s, bias, scale, columns)

    return f


def add_rows(columns: int, scale: float) -> Callable:
    """``f(s, values) -> s`` with one value a row."""

    @plgpu.inline_mgpu(arg_types=(r.ACC, r.ROW), return_type=_products(columns))
    def f(_, s, values):
        rows = r.scalars(values)
        bias = [rows[(i >> 1) & 1] for i in range(columns // 2)]
        return _sum(s, bias, scale, columns)

    return f


def _sum(s: fa.FragmentedArray, bias: list, scale: float, columns: int):
    values = r.multiples_added(r.scalars(s), bias, 1 / scale)
    return r.accumulator(values, (64, columns))
