"""Bias by distance in the kernels: a function of how far apart two points are.

Distances are computed from points in float32 where they are needed. Those of a step's
columns come to shared memory by TMA, with its first stream, and are read while its
products are in flight. A table lies in the registers of a warp, an entry a lane, and is
read by shuffles, which meet no bank conflicts; Gaussians are computed one after another
for a whole tile.

A table's and Gaussians' gradients need sums over all pairs. Every thread keeps its own
in shared memory, one below the other, so that they need no atomics; `store_lane_sums`
adds up those of a warpgroup in a fixed order, item by item.

May assume: at most `MOST` entries or Gaussians. Called by `_biased`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax.experimental.mosaic.gpu import utils

from .._common import LOG2E
from . import _registers as r
from ._elements import Place

Array = Any
FORMS = ("linear", "quadratic", "table", "gaussian")
MOST = {"table": 64, "gaussian": 32}
"""Entries, or Gaussians, of a head that registers and shared memory have room for."""
LANES = 32
_TABLE_COLUMNS = 8
"""Of an array with four registers a thread, which hold a table."""
_WHOLE = 2.0**23
"""Added to a smaller number, it leaves no fraction, and the integer in the low bits."""
_LEAST = 1e-30
"""Of a squared distance: nothing beside that of two points that float32 tells apart."""
_POINTS = (plgpu.RefType(), r.SCALAR, r.SCALAR, r.ACC)
"""What `_points` returns and `_differences` takes, as arguments."""


class Entry(NamedTuple):
    """Which weights, and which centers and width, in the arrays of a `DistanceBias`."""

    batch: Array | int
    head: Array | int
    points: Array | int


class Read(NamedTuple):
    """What a step knows of its bias.

    Attributes:
        batch: the tile's batch entry.
        row: its first row.
        columns: of `read_columns`.
        table: of `read_table`, or None.
    """

    batch: Array
    row: Array
    columns: Array
    table: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistanceBias:
    """A function of the distance d between two points.

    ``-weights * d``, ``-weights * d**2``, a table of ``weights`` at the multiples of a
    width, or ``sum_n weights[n] * exp(-(d - centers[n])**2 / (2 * width**2))``.

    Attributes:
        rows: ``[B or 1, 3, R]`` float32, of whole blocks; of the keys in the dk and dv
            kernel, else of the queries.
        columns: ``[B or 1, 3, C]``, of the others.
        weights: ``[B or 1, H or 1, n]`` float32; n is 1 without table or Gaussians.
        form: ``"linear"``, ``"quadratic"``, ``"table"`` or ``"gaussian"``.
        inverse: ``[B or 1]`` float32, 1 / width, of a table or Gaussians, else None.
        centers: ``[B or 1, n]`` float32, of Gaussians, else None.
        constant: whether no gradient is asked for.
    """

    rows: Array
    columns: Array
    weights: Array
    form: str = dataclasses.field(metadata=dict(static=True))
    inverse: Array = None
    centers: Array = None
    constant: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def entry(self, b, h) -> Entry:
        """Indices for a batch entry and a query head."""
        count, heads, _ = self.weights.shape
        own = self.inverse is not None and self.inverse.shape[0] > 1
        return Entry(b if count > 1 else 0, h if heads > 1 else 0, b if own else 0)

    def columns_at(self, b, columns) -> Array:
        """The points of some columns of a batch entry."""
        return self.columns.at[b if self.columns.shape[0] > 1 else 0, :, columns]

    def first(self, entry: Entry) -> Array | int:
        """Where an entry's weights begin in the flattened array."""
        _, heads, n = self.weights.shape
        return (entry.batch * heads + entry.head) * n

    def shared(self, batch: int, heads: int) -> tuple[bool, bool]:
        """No values are loaded, so none are shared."""
        del batch, heads
        return False, False

    @property
    def lane_sums(self) -> int:
        """Sums over pairs that its gradient needs.

        Of a table, ``ds`` times the weight of each entry, and one more, which stays 0.
        With u the distance to a center in widths and e its exponential, of Gaussians
        ``ds e`` of each, ``ds e u`` of each, and ``ds e u**2 weights`` of all.
        """
        n = self.weights.shape[-1]
        return {"table": n + 1, "gaussian": 2 * n + 1}.get(self.form, 0)

    def row_sums(self, rows_are_queries: bool) -> int:
        """How many sums of each row it needs; see `add_distance_sums`."""
        return 6 if rows_are_queries and not self.lane_sums else 3


# ------------------------------------------------------------------ added to products


def with_bias(columns: int, scale: float, rows: int, slopes: bool) -> Callable:
    """``f(s, bias, entry, read) -> s`` with the bias over the scale of the logits.

    See `_elements.apply` for rows. ``slopes`` tells whether `with_sums` follows.
    """

    def f(s, bias, entry, read):
        if bias.form != "gaussian":
            count = bias.weights.shape[-1]
            add = add_distance(columns, scale, bias.form, rows, count, slopes)
            return add(s, bias, entry, read)
        d = distances(columns, rows)(bias, read)
        add, inverse = add_gaussian(columns, scale), bias.inverse[entry.points]

        def one(n, x):
            return add(x, d, *_gaussian(bias, entry, n), inverse)

        return lax.fori_loop(0, bias.weights.shape[-1], one, s)

    return f


def read_columns(columns: int) -> Callable:
    """``f(points) -> points`` of the thread's columns, from shared memory.

    Three registers a column, axis by axis, in an array that has room for them.
    """
    shape = 64, columns * 3 // 2

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_tile(shape[1]))
    def f(_, points):
        values = [
            r.shared_pairs(utils.memref_slice(points, axis), columns // 8)
            for axis in range(3)
        ]
        return r.accumulator(list(itertools.chain(*values)), shape)

    return f


def read_table(count: int) -> Callable:
    """``f(bias, entry) -> table``: of each entry its value and the step to the next.

    Lane n has entries n and n + 32. The last entry's step is 0.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), r.SCALAR), return_type=_tile(_TABLE_COLUMNS)
    )
    def f(_, weights, first):
        first, last = first.registers.item(), r.integer(count - 1)

        def load(place):
            at = arith.addi(first, arith.minsi(place, last))
            return r.global_word(weights, at, 0, r.f32(), here=True)

        registers = [r.number(0.0)] * 4
        for group in range(-(-count // LANES)):
            place = arith.addi(r.lane(), r.integer(LANES * group))
            value, after = load(place), load(arith.addi(place, r.integer(1)))
            registers[2 * group : 2 * group + 2] = value, r.sub(after, value)
        return r.accumulator(registers, (64, _TABLE_COLUMNS))

    return lambda bias, entry: f(bias.weights, bias.first(entry))


def add_distance(
    columns: int, scale: float, form: str, rows: int, count: int, slopes: bool
) -> Callable:
    """``f(s, bias, entry, read) -> s``, as `with_bias`, for all forms but Gaussians."""
    is_table = form == "table"
    # What a derivative needs is computed once for both.
    root = _root_of_inverse if slopes else r.sqrt

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, plgpu.RefType(), r.SCALAR, *_POINTS, *[r.ACC] * is_table),
        return_type=_tile(columns),
    )
    def f(_, s, numbers, index, *args):
        *points, table = args if is_table else (*args, None)
        number = r.global_word(numbers, index.registers.item(), 0, r.f32())
        factor, slope = r.number(1 / scale), r.mul(number, r.number(-1 / scale))
        out = []
        for x, (_, square) in zip(
            r.scalars(s), _differences(points, rows), strict=True
        ):
            if is_table:
                cell = _Cell(root(square), number, count, r.minimum)
                value, step = (cell.look_up(x) for x in _lanes(table, count))
                out.append(r.fma(r.fma(cell.fraction, step, value), factor, x))
            else:
                distance = square if form == "quadratic" else root(square)
                out.append(r.fma(slope, distance, x))
        return r.accumulator(out, (64, columns))

    def add(s, bias, entry, read):
        points = _points(bias, read)
        if is_table:
            return f(s, bias.inverse, entry.points, *points, read.table)
        return f(s, bias.weights, bias.first(entry), *points)

    return add


def distances(columns: int, rows: int) -> Callable:
    """``f(bias, read) -> d`` of each element."""

    @plgpu.inline_mgpu(arg_types=_POINTS, return_type=_tile(columns))
    def f(_, *points):
        found = _differences(points, rows)
        return r.accumulator([r.sqrt(square) for _, square in found], (64, columns))

    return lambda bias, read: f(*_points(bias, read))


def add_gaussian(columns: int, scale: float) -> Callable:
    """``f(x, d, weight, center, inverse) -> x`` with a Gaussian over the scale."""

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, r.ACC, *[r.SCALAR] * 3), return_type=_tile(columns)
    )
    def f(_, x, d, *scalars):
        weight, center, inverse = (x.registers.item() for x in scalars)
        weight = r.mul(weight, r.number(1 / scale))
        values = [
            r.fma(weight, _exponential(r.mul(r.sub(distance, center), inverse)), value)
            for value, distance in zip(r.scalars(x), r.scalars(d), strict=True)
        ]
        return r.accumulator(values, (64, columns))

    return f


# -------------------------------------------------------------------------- gradients


def with_sums(columns: int, rows: int, every: bool, partial: bool) -> Callable:
    """``f(sums, p, ds, bias, entry, read, lanes) -> sums`` of each row.

    ``partial`` tells whether the block is. With ``every`` all that a gradient needs
    beside those of `add_distance_sums`: `DistanceBias.lane_sums` in the shared memory
    ``lanes``.
    """

    def f(sums, p, ds, bias, entry, read, lanes):
        count, slopes = bias.weights.shape[-1], None
        if bias.form == "gaussian":
            d, seen = seen_distances(columns, rows)(p, ds, bias, read)
            add = add_gaussian_slope(columns, count, every)
            inverse = bias.inverse[entry.points]

            def one(n, slopes):
                scalars = (*_gaussian(bias, entry, n), inverse)
                return add(slopes, d, seen, scalars, lanes, n)

            zero = plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), r.ACC)
            slopes = lax.fori_loop(0, count, one, zero)
        add = add_distance_sums(columns, bias.form, rows, every, count, partial)
        return list(add(sums, p, ds, bias, entry, read, slopes, lanes))

    return f


def add_distance_sums(
    columns: int, form: str, rows: int, every: bool, count: int, partial: bool
) -> Callable:
    """``f(sums, p, ds, bias, entry, read, slopes, lanes) -> sums`` of each row.

    With x the row's point, y the column's and d their distance: of ``ds`` times the
    derivative of the bias by x, axis by axis, but for a factor: minus the slope of a
    linear or quadratic one, 1 / width of the others. With ``every``, of linear and
    quadratic ones also of ``ds * d`` (or its square), ``ds`` and ``p * d``; of a table
    the sums in ``lanes``. ``slopes`` is from `add_gaussian_slope`. In a partial
    block an element with p 0 adds nothing, whatever its points.
    """
    one_weight = form in ("linear", "quadratic")
    num_sums = 6 if every and one_weight else 3
    sums_type = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=r.ROW)
    more = {
        "table": (plgpu.RefType(), r.SCALAR, r.ACC, *[plgpu.RefType()] * every),
        "gaussian": (r.ACC,),
    }.get(form, ())

    @plgpu.inline_mgpu(
        arg_types=(
            *[r.ROW] * num_sums,
            *[r.ACC] * 2,
            *_POINTS,
            *more,
        ),
        return_type=(sums_type,) * num_sums,
    )
    def f(_, *args):
        totals = [r.scalars(x) for x in args[:num_sums]]
        p, ds, *args = args[num_sums:]
        points, more = args[: len(_POINTS)], args[len(_POINTS) :]
        derivative = _derivatives(form, every, count, more)
        found = _differences(points, rows, again=form == "gaussian")
        values = zip(r.scalars(p), r.scalars(ds), found, strict=True)
        for i, (weight, x, (difference, square)) in enumerate(values):
            factor, distance = derivative(i, square, weight, x)
            by_axis, one = r.mul(x, factor), r.number(1.0)
            terms = [(by_axis, y) for y in difference]
            if num_sums > 3:
                terms += [(x, distance), (x, one), (weight, distance)]
            half = (i >> 1) & 1
            for total, (a, b) in zip(totals, terms, strict=True):
                if partial:
                    term = r.zero_with(r.mul(a, b), weight)
                    total[half] = r.add(total[half], term)
                else:
                    total[half] = r.fma(a, b, total[half])
        return tuple(r.from_scalars(x, (64,), r.ROW.to_mgpu()) for x in totals)

    def add(sums, p, ds, bias, entry, read, slopes, lanes):
        more = ()
        if form == "table":
            more = (bias.inverse, entry.points, read.table, *[lanes] * every)
        elif form == "gaussian":
            more = (slopes,)
        return f(*sums, p, ds, *_points(bias, read), *more)

    return add


def _derivatives(form: str, every: bool, count: int, more: tuple) -> Callable:
    """``f(i, square, p, ds) -> factor, distance`` of the i-th register.

    The factor times the difference of the points is the derivative by the row's, as
    `add_distance_sums` has it.
    """
    if form == "quadratic":
        return lambda i, square, p, ds: (r.number(2.0), square)
    if form == "gaussian":
        slopes = r.scalars(more[0])
        return lambda i, square, p, ds: (
            r.mul(slopes[i], r.inverse_sqrt(square)),
            None,
        )
    if form == "linear":

        def linear(i, square, p, ds):
            factor = r.inverse_sqrt(square)
            return factor, r.mul(square, factor)

        return linear
    inverse, index, table, *lanes = more
    inverse = r.global_word(inverse, index.registers.item(), 0, r.f32())
    _, steps = _lanes(table, count)
    base = _own_sums(lanes[0]) if every else None

    def of_table(i, square, p, ds):
        # NaN counts as far away: where p is not 0, ds is NaN too.
        cell = _Cell(r.sqrt(square), inverse, count, r.minimum_number)
        if base is not None:
            seen = r.zero_with(ds, p)
            second = r.mul(seen, cell.fraction)
            _add_to_own(base, cell.index, r.sub(seen, second), second)
        return r.mul(cell.look_up(steps), r.inverse_sqrt(square)), None

    return of_table


def seen_distances(columns: int, rows: int) -> Callable:
    """``f(p, ds, bias, read) -> d, ds``, both 0 where p is."""

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, r.ACC, *_POINTS), return_type=(_tile(columns),) * 2
    )
    def f(_, p, ds, *points):
        found = _differences(points, rows, again=True)
        weights, shape = r.scalars(p), (64, columns)
        d = [
            r.zero_with(r.sqrt(square), weight)
            for weight, (_, square) in zip(weights, found, strict=True)
        ]
        seen = [r.zero_with(*x) for x in zip(r.scalars(ds), weights, strict=True)]
        return r.accumulator(d, shape), r.accumulator(seen, shape)

    return lambda p, ds, bias, read: f(p, ds, *_points(bias, read))


def add_gaussian_slope(columns: int, count: int, every: bool) -> Callable:
    """``f(slopes, d, ds, scalars, lanes, n) -> slopes`` with the n-th Gaussian.

    Slopes are derivatives by ``d / width``; ``scalars`` are the weight, the center and
    1 / width. With ``every``, its sums in ``lanes`` too; see `DistanceBias`.
    """

    @plgpu.inline_mgpu(
        arg_types=(
            *[r.ACC] * 3,
            *[r.SCALAR] * 3,
            *[plgpu.RefType(), r.SCALAR] * every,
        ),
        return_type=_tile(columns),
    )
    def f(_, slopes, d, ds, *args):
        weight, center, inverse = (x.registers.item() for x in args[:3])
        u = [r.mul(r.sub(x, center), inverse) for x in r.scalars(d)]
        e = [_exponential(x) for x in u]
        out = [
            r.fma_of_minus(r.mul(weight, x), y, slope)
            for x, y, slope in zip(u, e, r.scalars(slopes), strict=True)
        ]
        if every:
            lanes, n = args[3], args[4].registers.item()
            base = _own_sums(lanes)
            values = [r.mul(x, y) for x, y in zip(r.scalars(ds), e, strict=True)]
            _add_to_own(base, n, r.tree(r.add, values, 4))
            values = [r.mul(x, y) for x, y in zip(values, u, strict=True)]
            _add_to_own(base, arith.addi(n, r.integer(count)), r.tree(r.add, values, 4))
            values = [r.mul(x, y) for x, y in zip(values, u, strict=True)]
            by_width = r.mul(weight, r.tree(r.add, values, 4))
            _add_to_own(base, r.integer(2 * count), by_width)
        return r.accumulator(out, (64, columns))

    def add(slopes, d, ds, scalars, lanes, n):
        return f(slopes, d, ds, *scalars, *((lanes, n) if every else ()))

    return add


def store_lane_sums(count: int) -> Callable:
    """``f(lanes, out, first)``: writes ``out[first : first + count]``.

    ``lanes [count, 128]`` in shared memory are the sums of each thread of a warpgroup,
    out is in global memory. A thread adds up one row, beginning at another column than
    its neighbours, whose bank it would share.
    """
    totals = "".join(f"add.f32 s{i}, s{i}, x{i}; " for i in range(4))
    text = (
        "{ .reg .pred p; .reg .b32 t, row, n, a; .reg .b64 g; .reg .f32 x<4>, s<4>; "
        "mov.u32 t, %tid.x; and.b32 t, t, 127; "
        f"min.u32 row, t, {count - 1}; shl.b32 row, row, 9; add.u32 row, row, $0; "
        + "".join(f"mov.f32 s{i}, 0f00000000; " for i in range(4))
        + "mov.u32 n, 0; NEXT: add.u32 a, t, n; and.b32 a, a, 31; shl.b32 a, a, 4; "
        f"add.u32 a, a, row; ld.shared.v4.f32 {{x0, x1, x2, x3}}, [a]; {totals}"
        "add.u32 n, n, 1; setp.lt.u32 p, n, 32; @p bra NEXT; "
        "add.f32 s0, s0, s1; add.f32 s2, s2, s3; add.f32 s0, s0, s2; "
        f"setp.lt.u32 p, t, {count}; add.u32 t, t, $2; mad.wide.s32 g, t, 4, $1; "
        "@p st.global.f32 [g], s0; }"
    )

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), r.SCALAR), return_type=()
    )
    def f(_, lanes, out, first):
        refs = utils.memref_ptr(lanes), utils.memref_ptr(out)
        r.command(text, *refs, first.registers.item(), spec="r,l,r")

    return f


# --------------------------------------------------------------- registers and shared


class _Cell:
    """Where a distance lies in a table: a ``fraction`` of a width beyond an entry.

    ``index`` is the entry's number in its low bits; all others vanish when it is
    shifted by the 9 bits of a row of 128 sums, or cut down to a lane.
    """

    def __init__(self, d, inverse, count: int, least: Callable):
        u = least(r.mul(d, inverse), r.number(count - 1.0))
        self.place = r.add_down(u, r.number(_WHOLE))
        self.fraction = r.sub(u, r.sub(self.place, r.number(_WHOLE)))
        self.index = arith.bitcast(r.i32(), self.place)

    def look_up(self, lanes: list) -> ir.Value:
        """The entry's value, of which every lane holds one or two."""
        found = [r.of_lane(x, self.index) for x in lanes]
        if len(found) == 1:
            return found[0]
        second = r.number(_WHOLE + LANES)
        beyond = arith.cmpf(arith.CmpFPredicate.OGE, self.place, second)
        return arith.select(beyond, found[1], found[0])


def _lanes(table: Any, count: int) -> tuple[list, list]:
    """Values and steps of a table, a register for each 32 entries."""
    registers, groups = r.scalars(table), -(-count // LANES)
    return registers[::2][:groups], registers[1::2][:groups]


def _gaussian(bias: DistanceBias, entry: Entry, n) -> tuple[Array, Array]:
    """Weight and center of the n-th."""
    weight = bias.weights[entry.batch, entry.head, n]
    return weight, bias.centers[entry.points, n]


def _exponential(u: ir.Value) -> ir.Value:
    """``exp(-u**2 / 2)``."""
    return r.exp2(r.mul(r.mul(u, u), r.number(-0.5 * LOG2E)))


def _own_sums(lanes: ir.Value) -> ir.Value:
    """Address of the thread's first sum in shared memory ``[n, 128]``."""
    text = (
        "{ .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 127; shl.b32 t, t, 2; "
        "add.u32 $0, t, $1; }"
    )
    return r.asm(r.i32(), [utils.memref_ptr(lanes)], text, "=r,r")


def _add_to_own(base: ir.Value, index: ir.Value, *values: ir.Value) -> None:
    """Adds to the thread's sums from ``index`` on, of which the low 23 bits count."""
    places = [f"[a+{512 * i}]" for i in range(len(values))]
    text = (
        f"{{ .reg .b32 a; .reg .f32 x<{len(values)}>; "
        "shl.b32 a, $1, 9; add.u32 a, a, $0; "
        + "".join(f"ld.shared.f32 x{i}, {at}; " for i, at in enumerate(places))
        + "".join(f"add.f32 x{i}, x{i}, ${i + 2}; " for i in range(len(values)))
        + "".join(f"st.shared.f32 {at}, x{i}; " for i, at in enumerate(places))
        + "}"
    )
    r.command(text, base, index, *values, spec="r,r" + ",f" * len(values))


def _tile(columns: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=r.ACC)


def _points(bias: DistanceBias, read: Read) -> tuple:
    """What the points of a tile are read from."""
    return bias.rows, read.batch, read.row, read.columns


def _differences(points: Sequence, rows: int, again: bool = False) -> Iterator:
    """For each register, the difference of its two points and its square.

    With ``again``, compilers do not know them from those of before: they are computed
    again, rather than kept since, which would take three registers an element. What is
    added to the square changes none but 0, and leaves that an inverse square root.
    """
    ref, batch, row, columns = points
    zero, values = r.integer(0), r.scalars(columns)
    scalars = [batch.registers.item(), row.registers.item(), zero, zero]
    at, count = Place(scalars, 0, rows), len(values) // 3
    mine = [at.rows(ref, axis) for axis in range(3)]
    theirs = r.tied(values, "") if again else values
    for pair, half, second in itertools.product(range(count // 2), range(2), range(2)):
        x, y, z = (
            r.sub(mine[axis][half], theirs[axis * count + 2 * pair + second])
            for axis in range(3)
        )
        square = r.fma(x, x, r.number(_LEAST))
        yield (x, y, z), r.fma(z, z, r.fma(y, y, square))


def _root_of_inverse(square: ir.Value) -> ir.Value:
    return r.mul(square, r.inverse_sqrt(square))
