"""A score function on the registers of a tile: new logits, and their derivatives.

The adapter makes of the function a program of scalar instructions, which calls back a
machine for each (see `jsparse.backends._score`). Here a number is an array of registers
of the thread, of shape ``[columns / 8, 2, 2]`` as in `_registers`, with axes of size 1
where it is the same: what depends on the row alone is computed twice, not for every
element. Rows are queries in the forward and dq kernels, keys in the dk and dv kernel.

May assume: `why_not` has nothing against the program. Called by `_biased`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith

from .._common import LOG2E
from . import _registers as r
from ._elements import Place

Array = Any
Number = np.ndarray
"""Registers, each an object."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Score:
    """A score function and its arrays.

    Attributes:
        arrays: each ``[B or 1, ...]``, float32 or int32.
        program: inputs are score, index_q, index_kv and head.
        constant: whether no gradient of the arrays is asked for.
    """

    arrays: tuple[Array, ...]
    program: Any = dataclasses.field(metadata=dict(static=True))
    constant: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def shared(self, batch: int, heads: int) -> tuple[bool, bool]:
        """No tiles are loaded, so none are shared."""
        del batch, heads
        return False, False

    def summed(self, rows_are_queries: bool) -> list[int]:
        """Which derivatives by loaded elements a kernel sums up by row.

        They are numbers among the program's ``learned``. An array read by key is the
        dk and dv kernel's, every other one the dq kernel's.
        """
        if self.constant:
            return []
        loads = [self.program.loads[n] for n in self.program.learned]
        return [
            n
            for n, x in enumerate(loads)
            if ("index_kv" not in x.axes) == rows_are_queries
        ]

    def row_sums(self, rows_are_queries: bool) -> int:
        """How many sums of each row `products_gradient` adds to."""
        count = len(self.summed(rows_are_queries))
        return 2 * count + 1 if count and rows_are_queries else count


def why_not(program: Any) -> str | None:
    """Why registers cannot run a program, or None if they can."""
    for n in program.learned:
        if {"index_q", "index_kv"} <= program.loads[n].axes:
            return (
                "a score function with a learned array that is read by query and by "
                "key, whose gradient would need atomics; expected one of the two, or "
                "an array without a gradient (jax.lax.stop_gradient)"
            )
    for x in program.loads:
        if x.dtype.name not in _KINDS:
            return f"a score function with an array of {x.dtype.name}; {_EXPECTED}"
    kinds = [_KINDS.get(x.name) for x in program.inputs]
    machine = _Kinds()
    program.evaluate(kinds, machine)
    loaded = [_KINDS[x.dtype.name] for x in program.loads]
    program.slopes.evaluate([*kinds, *loaded], machine)
    return machine.refusal


# --------------------------------------------------------------------- on a whole tile


def _tile(columns: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=r.ACC)


def _types(score: Score) -> tuple:
    """Of the arrays, the head and the position."""
    return (*[plgpu.RefType()] * len(score.arrays), *[r.SCALAR] * 5)


def new_logits(
    score: Score, columns: int, scale: float, rows: int, rows_are_queries: bool
) -> Callable:
    """``f(x, head, position) -> x``: new logits over their scale, of products.

    See `_elements.apply` for ``rows``.
    """

    @plgpu.inline_mgpu(arg_types=(r.ACC, *_types(score)), return_type=_tile(columns))
    def f(_, x, *args):
        machine = _Registers(score, args, columns, rows, rows_are_queries)
        place = machine.place(x, scale)
        (out,) = score.program.evaluate(place, machine)
        logits = _each(r.mul, machine.number(out), _one(r.number(1 / scale)))
        return machine.tile(logits)

    return lambda x, head, position: f(x, *score.arrays, head, *position)


def products_gradient(
    score: Score, columns: int, scale: float, rows: int, rows_are_queries: bool
) -> Callable:
    """``f(sums, x, p, ds, head, position) -> (sums, ds)``: from new logits to products.

    The sums of each row are of ds times a derivative by a loaded element, for each of
    `Score.summed`; where rows are queries also of p times it, and, last, of ds. An
    element with p 0 adds nothing, whatever its derivatives.
    """
    summed = score.summed(rows_are_queries)
    count = score.row_sums(rows_are_queries)
    sums_type = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=r.ROW)

    @plgpu.inline_mgpu(
        arg_types=(*[r.ROW] * count, *[r.ACC] * 3, *_types(score)),
        return_type=(*[sums_type] * count, _tile(columns)),
    )
    def f(_, *args):
        totals = [r.scalars(x) for x in args[:count]]
        x, p, ds = args[count : count + 3]
        machine = _Registers(score, args[count + 3 :], columns, rows, rows_are_queries)
        place = machine.place(x, scale)
        score.program.evaluate(place, machine)
        by_score, *by_element = score.program.slopes.evaluate(
            [*place, *machine.loaded], machine
        )
        p, ds = (machine.registers(x) for x in (p, ds))
        slopes = [machine.number(by_element[n]) for n in summed]
        terms = [_each(r.mul, ds, x) for x in slopes]
        if rows_are_queries and summed:
            terms += [*(_each(r.mul, p, x) for x in slopes), ds]
        for total, term in zip(totals, terms, strict=True):
            term = _each(r.zero_with, term, p)
            for half in range(2):
                values = [*term[:, half].flat]
                total[half] = r.add(total[half], r.tree(r.add, values, 4))
        ds = _each(r.zero_with, _each(r.mul, ds, machine.number(by_score)), p)
        made = [r.from_scalars(x, (64,), r.ROW.to_mgpu()) for x in totals]
        return (*made, machine.tile(ds))

    def g(sums, x, p, ds, head, position):
        *sums, ds = f(*sums, x, p, ds, *score.arrays, head, *position)
        return sums, ds

    return g


# ---------------------------------------------------------------------------- machines


class _Registers:
    """Runs instructions on a thread's registers."""

    def __init__(self, score, args, columns, rows, rows_are_queries):
        *refs, head = args[:-4]
        self.refs, self.columns = refs, columns
        self.at = Place([x.registers.item() for x in args[-4:]], columns, rows)
        self.head = _one(head.registers.item())
        self.queries, self.loaded = rows_are_queries, []
        self.sizes = [x.shape for x in score.arrays]

    def registers(self, x: Any) -> Number:
        return _array(r.scalars(x), (self.columns // 8, 2, 2))

    def place(self, x: Any, scale: float) -> list[Number]:
        """Score, index_q, index_kv and head."""
        row = _array([self.at.row(half) for half in range(2)], (1, 2, 1))
        count = self.columns // 4
        column = _array([self.at.column(n) for n in range(count)], (count // 2, 1, 2))
        score = _each(r.mul, self.registers(x), _one(r.number(scale)))
        q_kv = (row, column) if self.queries else (column, row)
        return [score, *q_kv, self.head]

    def number(self, x: Any) -> Number:
        """A number or constant."""
        if x.dtype == object:
            return x
        kind = _KINDS[x.dtype.name]
        if kind == "float":
            return _one(r.number(x.item()))
        return _one(r.integer(int(x.item()), 32 if kind == "integer" else 1))

    def tile(self, x: Number) -> Any:
        values = np.broadcast_to(x, (self.columns // 8, 2, 2))
        return r.accumulator([*values.flat], (64, self.columns))

    def apply(self, one: Any, args: list) -> Number:
        numbers = [self.number(x) for x in args]
        return _each(_operation(one, [_kind(x) for x in numbers])[1], *numbers)

    def custom(self, one: Any, args: list) -> list:
        return one.inner.evaluate(args, self)

    def load(self, one: Any, args: list) -> Number:
        """From global memory, or its cache."""
        entries, *shape = self.sizes[one.array]
        ref, at = self.refs[one.array], _one(r.integer(0))
        if entries > 1:
            at = _one(self.at.batch)
        for x, size in zip(args, shape, strict=True):
            at = _each(arith.muli, at, _one(r.integer(size)))
            at = _each(arith.addi, at, self.number(x))
        ty = r.f32() if one.dtype.name == "float32" else r.i32()
        self.loaded.append(_each(lambda i: r.global_word(ref, i, 0, ty), at))
        return self.loaded[-1]


class _Kinds:
    """Runs instructions on the kinds of numbers, and keeps the first refusal."""

    refusal = None

    def apply(self, one, args):
        kinds = [self.kind(x) for x in args]
        if None in kinds:
            return None
        found = _operation(one, kinds)
        if found is not None:
            return found[0]
        if self.refusal is None:
            what = ", ".join(kinds)
            self.refusal = (
                f"a score function with {one.primitive.name} of {what}; {_EXPECTED}"
            )
        return None

    def custom(self, one, args):
        return one.inner.evaluate(args, self)

    def load(self, one, args):
        del args
        return _KINDS[one.dtype.name]

    def kind(self, x):
        if not isinstance(x, np.ndarray):
            return x
        found = _KINDS.get(x.dtype.name)
        if found is None and self.refusal is None:
            self.refusal = f"a score function with {x.dtype.name}; {_EXPECTED}"
        return found


def _one(x: ir.Value) -> Number:
    return _array([x], (1, 1, 1))


def _array(values: Sequence, shape: tuple[int, ...]) -> Number:
    out = np.empty(len(values), object)
    for n, x in enumerate(values):
        out[n] = x
    return out.reshape(shape)


def _each(f: Callable, *args: Number) -> Number:
    """``f`` of every register, of arrays that broadcast."""
    args = np.broadcast_arrays(*args)
    values = [f(*x) for x in zip(*(x.flat for x in args), strict=True)]
    return _array(values, args[0].shape)


def _kind(x: Number) -> str:
    ty = x.flat[0].type
    if ty == r.f32():
        return "float"
    return "integer" if ty == r.i32() else "bool"


# -------------------------------------------------------------------------- operations

_KINDS = {"float32": "float", "int32": "integer", "bool": "bool"}
_EXPECTED = (
    "expected float32, int32 and bool, sums, products, quotients, comparisons, "
    "choices, abs, max, min, sign, powers by integers, exp, exp2, log, log1p, tanh, "
    "logistic, sqrt and rsqrt"
)


def _float(text: str) -> Callable:
    """An instruction on float32."""
    return lambda *x: r.asm(r.f32(), x, *_spec(text, len(x), "f"))


def _integer(text: str) -> Callable:
    """An instruction on int32."""
    return lambda *x: r.asm(r.i32(), x, *_spec(text, len(x), "r"))


def _spec(text: str, count: int, kind: str) -> tuple[str, str]:
    places = ", ".join(f"${n}" for n in range(count + 1))
    return f"{text} {places};", ",".join([f"={kind}", *[kind] * count])


_divide = _float("div.full.f32")
_inverse = _float("rcp.approx.ftz.f32")
_log2 = _float("lg2.approx.f32")
_minimum = _float("min.NaN.f32")


def _exp(x):
    return r.exp2(r.mul(x, r.number(LOG2E)))


def _log(x):
    return r.mul(_log2(x), r.number(1 / LOG2E))


def _log1p(x):
    """``log(u) * x / (u - 1)`` of ``u = 1 + x``: what u lost cancels (Kahan)."""
    one = r.number(1.0)
    u = r.add(x, one)
    rest = r.sub(u, one)
    exact = arith.cmpf(arith.CmpFPredicate.OEQ, rest, r.number(0.0))
    infinite = arith.cmpf(arith.CmpFPredicate.OEQ, u, r.number(float("inf")))
    value = r.mul(_log(u), _divide(x, rest))
    return arith.select(exact, x, arith.select(infinite, u, value))


def _tanh(x):
    """``1 - 2 / (exp(2 x) + 1)``; the instruction is not exact enough for a logit."""
    one = r.number(1.0)
    u = r.add(r.exp2(r.mul(x, r.number(2 * LOG2E))), one)
    return r.fma(r.number(-2.0), _inverse(u), one)


def _logistic(x):
    u = r.exp2(r.mul(x, r.number(-LOG2E)))
    return _inverse(r.add(u, r.number(1.0)))


def _float_sign(x):
    text = (
        "{ .reg .pred p; .reg .f32 t; copysign.f32 t, $1, 0f3F800000; "
        "setp.equ.f32 p, $1, 0f00000000; selp.f32 $0, $1, t, p; }"
    )
    return r.asm(r.f32(), [x], text, "=f,f")


def _integer_sign(x):
    above = arith.maxsi(x, r.integer(-1))
    return arith.minsi(above, r.integer(1))


def _power(exponent: int, x: ir.Value) -> ir.Value:
    if exponent < 0:
        return _divide(r.number(1.0), _power(-exponent, x))
    if exponent < 2:
        return x if exponent else r.number(1.0)
    half = _power(exponent // 2, x)
    square = r.mul(half, half)
    return r.mul(square, x) if exponent % 2 else square


def _same(x):
    return x


def _arith(name: str) -> Callable:
    """An operation on integers or bools."""
    return lambda *x: getattr(arith, name)(*x)


_OF_FLOATS = {
    "abs": _float("abs.f32"),
    "add": r.add,
    "add_any": r.add,
    "copy": _same,
    "copy_p": _same,
    "div": _divide,
    "exp": _exp,
    "exp2": r.exp2,
    "log": _log,
    "log1p": _log1p,
    "log2": _log2,
    "logistic": _logistic,
    "max": r.maximum,
    "min": _minimum,
    "mul": r.mul,
    "neg": _float("neg.f32"),
    "one_minus_square": lambda x: r.sub(r.number(1.0), r.mul(x, x)),
    "rsqrt": _float("rsqrt.approx.ftz.f32"),
    "sign": _float_sign,
    "sqrt": r.sqrt,
    "square": lambda x: r.mul(x, x),
    "stop_gradient": _same,
    "sub": r.sub,
    "tanh": _tanh,
}
_OF_INTEGERS = {
    "abs": _integer("abs.s32"),
    "add": _arith("addi"),
    "and": _arith("andi"),
    "copy": _same,
    "copy_p": _same,
    "div": _integer("div.s32"),
    "max": _arith("maxsi"),
    "min": _arith("minsi"),
    "mul": _arith("muli"),
    "neg": _integer("neg.s32"),
    "not": lambda x: arith.xori(x, r.integer(-1)),
    "or": _arith("ori"),
    "rem": _integer("rem.s32"),
    "sign": _integer_sign,
    "square": lambda x: arith.muli(x, x),
    "stop_gradient": _same,
    "sub": _arith("subi"),
    "xor": _arith("xori"),
}
_OF_BOOLS = {
    "and": _arith("andi"),
    "not": lambda x: arith.xori(x, r.integer(1, 1)),
    "or": _arith("ori"),
    "xor": _arith("xori"),
}
_OPERATIONS = {"float": _OF_FLOATS, "integer": _OF_INTEGERS, "bool": _OF_BOOLS}
_COMPARISONS = {
    "eq": ("OEQ", "eq"),
    "ne": ("UNE", "ne"),
    "lt": ("OLT", "slt"),
    "le": ("OLE", "sle"),
    "gt": ("OGT", "sgt"),
    "ge": ("OGE", "sge"),
}
_CONVERSIONS = {
    ("integer", "float"): lambda x: arith.sitofp(r.f32(), x),
    ("bool", "float"): lambda x: arith.uitofp(r.f32(), x),
    ("bool", "integer"): lambda x: arith.extui(r.i32(), x),
    ("integer", "bool"): lambda x: arith.cmpi(arith.CmpIPredicate.ne, x, r.integer(0)),
    ("float", "integer"): lambda x: r.asm(
        r.i32(), [x], "cvt.rzi.s32.f32 $0, $1;", "=r,f"
    ),
}


def _operation(one: Any, kinds: list[str]) -> tuple[str, Callable] | None:
    """The kind of an instruction's result and what computes it, if anything does."""
    name = one.primitive.name
    if name == "convert_element_type":
        wanted = _KINDS.get(np.dtype(one.params["new_dtype"]).name)
        if wanted == kinds[0]:
            return wanted, _same
        found = _CONVERSIONS.get((kinds[0], wanted))
        return None if found is None else (wanted, found)
    if name == "select_n":
        choose = lambda which, x, y: arith.select(which, y, x)
        fits = kinds[0] == "bool" and len(kinds) == 3
        return (kinds[1], choose) if fits else None
    kind = kinds[0]
    if name in _COMPARISONS:
        if kind == "bool" and name not in ("eq", "ne"):
            return None
        ordered, signed = _COMPARISONS[name]
        if kind == "float":
            how = getattr(arith.CmpFPredicate, ordered)
            return "bool", functools.partial(arith.cmpf, how)
        how = getattr(arith.CmpIPredicate, signed)
        return "bool", functools.partial(arith.cmpi, how)
    if name == "integer_pow" and kind == "float":
        return kind, functools.partial(_power, one.params["y"])
    if name == "clamp" and kind != "bool":
        ops = _OPERATIONS[kind]
        return kind, lambda low, x, high: ops["min"](ops["max"](x, low), high)
    if name == "is_finite" and kind == "float":
        less = functools.partial(arith.cmpf, arith.CmpFPredicate.OLT)
        return "bool", lambda x: less(_OF_FLOATS["abs"](x), r.number(float("inf")))
    found = _OPERATIONS[kind].get(name)
    return None if found is None else (kind, found)
