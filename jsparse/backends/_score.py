"""A score function as a list of scalar instructions, and its derivatives as another.

The function is traced once, on scalars, so that it is element-wise by construction.
What depends on its arrays alone is computed at once, outside of attention; what is left
is arithmetic on scalars, and loads of single elements of arrays. A backend runs the
list on what it calls numbers: jnp arrays that broadcast to a tile, or the registers of
a thread. `jsparse.ops` makes it, before anything is launched.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal

from jsparse.backends._contract import vary_like

Array = Any
PLACE = ("score", "index_q", "index_kv", "head")
CALLS = ("checkpoint", "closed_call", "core_call", "jit", "pjit")
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_NAMES = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz
convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1
floor ge gt integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul ne
neg not one_minus_square or population_count pow rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
tan tanh xor
"""
ELEMENTWISE = frozenset(_NAMES.split())


class Constant(NamedTuple):
    """A number known before tracing."""

    value: np.ndarray


Atom = int | Constant
"""An argument: the number of an input or of an earlier result, or a constant."""


class Apply(NamedTuple):
    """``primitive(*args)``, element by element."""

    args: tuple[Atom, ...]
    primitive: Any
    params: dict[str, Any]


class Load(NamedTuple):
    """One element of an array.

    Attributes:
        args: the indices; they lie within the array.
        array: its number.
        dtype: of the array.
        axes: which of `PLACE` the indices depend on; never on the score.
        learned: whether the array gets a gradient.
    """

    args: tuple[Atom, ...]
    array: int
    dtype: np.dtype
    axes: frozenset[str]
    learned: bool


class Custom(NamedTuple):
    """A function with a derivative of its author's, and what it computes."""

    args: tuple[Atom, ...]
    equation: Any
    inner: Program


class Machine(Protocol):
    """What runs instructions; its numbers are its own affair."""

    def apply(self, one: Apply, args: list) -> Any:
        """The result."""
        ...

    def load(self, one: Load, args: list) -> Any:
        """The element."""
        ...

    def custom(self, one: Custom, args: list) -> list:
        """The results."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Instructions that number their results onwards from those of the inputs.

    A score function's has the inputs `PLACE` and one output, the new score.
    """

    inputs: tuple[np.dtype, ...]
    instructions: tuple[Apply | Load | Custom, ...]
    outputs: tuple[Atom, ...]

    def evaluate(self, inputs: Sequence, machine: Machine) -> list:
        """The outputs, as ``machine`` computes them."""
        numbers = list(inputs)

        def value(x):
            return x.value if isinstance(x, Constant) else numbers[x]

        for one in self.instructions:
            args = [value(x) for x in one.args]
            if isinstance(one, Load):
                numbers.append(machine.load(one, args))
            elif isinstance(one, Apply):
                numbers.append(machine.apply(one, args))
            else:
                numbers += machine.custom(one, args)
        return [value(x) for x in self.outputs]

    @functools.cached_property
    def loads(self) -> tuple[Load, ...]:
        """In the order in which they are evaluated."""
        return tuple(x for x in self.instructions if isinstance(x, Load))

    @functools.cached_property
    def learned(self) -> tuple[int, ...]:
        """Which of `loads` are from arrays with a gradient."""
        return tuple(n for n, x in enumerate(self.loads) if x.learned)

    @functools.cached_property
    def learned_arrays(self) -> tuple[int, ...]:
        """The numbers of those arrays."""
        return tuple(sorted({self.loads[n].array for n in self.learned}))

    @functools.cached_property
    def slopes(self) -> Program:
        """Derivatives of the result by the score, and by each of `learned`.

        Its inputs are `PLACE`, then the values of all `loads`; it loads nothing.
        """
        count = len(PLACE)
        types = [*self.inputs, *(x.dtype for x in self.loads)]

        def differentiate(*inputs):
            place, loaded = inputs[:count], list(inputs[count:])

            def result(score, learned):
                for n, x in zip(self.learned, learned, strict=True):
                    loaded[n] = x
                machine = Numbers(loaded, with_rules=True)
                return self.evaluate((score, *place[1:]), machine)[0]

            out, pullback = jax.vjp(result, place[0], [loaded[n] for n in self.learned])
            score, learned = pullback(jnp.ones_like(out))
            return score, *learned

        closed = jax.make_jaxpr(differentiate)(*map(_scalar_type, types))
        # A sum over no axes is what JAX may undo a broadcast of scalars with.
        who = "block_sparse_attention: the derivative of the score function"
        tracer = _Tracer(who, ELEMENTWISE | {"reduce_sum"})
        return tracer.program(closed, types, ())


def trace(
    function: Callable, dtype: Any, arrays: Sequence[Array], who: str
) -> tuple[Program, tuple[Array, ...]]:
    """The program of a score function, and the arrays that it loads from.

    Those may be computed from the function's, or be what it closes over.

    Args:
        function: ``function(score, index_q, index_kv, head, *arrays)``.
        dtype: of the score.
        arrays: the function's.
        who: begins each message.

    Raises:
        TypeError: for a function that is not element-wise, has side effects or returns
            something else than a score.
    """
    types = [np.dtype(x) for x in (dtype, np.int32, np.int32, np.int32)]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    try:
        closed = jax.make_jaxpr(function)(*map(_scalar_type, types), *shapes)
    except Exception as err:
        raise TypeError(
            f"{who} cannot be traced. It is called once, with a scalar score, index_q, "
            f"index_kv and head and {len(arrays)} arrays, and returns the new score. "
            f"{type(err).__name__}: {err}"
        ) from err
    if closed.effects:
        effects = ", ".join(map(str, closed.effects))
        raise TypeError(f"{who} has side effects: {effects}; expected none.")
    found: Any = closed.out_avals
    if len(found) != 1 or (found[0].shape, found[0].dtype) != ((), types[0]):
        what = ", ".join(f"{x.dtype}{list(x.shape)}" for x in found) or "nothing"
        raise TypeError(
            f"{who} returns {what}; expected one scalar {types[0]}, the new score."
        )
    tracer = _Tracer(who)
    program = tracer.program(closed, types, arrays)
    program.slopes  # noqa: B018  what cannot be differentiated is refused here
    return program, tuple(tracer.arrays)


class Numbers:
    """A machine of jnp arrays that broadcast to one another.

    Args:
        loaded: values of the loads, in order.
        with_rules: whether JAX is to differentiate a `Custom` by its own rule. Its
            arguments must be scalars then.
    """

    def __init__(self, loaded: Sequence[Array], with_rules: bool = False):
        self.loaded, self.with_rules = iter(loaded), with_rules

    def apply(self, one: Apply, args: list) -> Array:
        """See `Machine`."""
        args = vary_like(jnp.broadcast_arrays(*args), args)
        return one.primitive.bind(*args, **one.params)

    def load(self, one: Load, args: list) -> Array:
        """See `Machine`."""
        del one, args
        return next(self.loaded)

    def custom(self, one: Custom, args: list) -> list:
        """See `Machine`."""
        if not self.with_rules:
            return one.inner.evaluate(args, self)
        return _bind(one.equation, args)


class _Loader(Numbers):
    """Loads from arrays, and keeps what it has loaded."""

    def __init__(self, arrays: Sequence[Array]):
        super().__init__(())
        self.arrays, self.found = arrays, []

    def load(self, one, args):
        index = tuple(args)
        value = self.arrays[one.array].at[index].get(mode="promise_in_bounds")
        self.found.append((value, index))
        return value


def load(program: Program, arrays: Sequence[Array], place: Sequence) -> list:
    """The value and the indices of each load, all of which broadcast to a tile.

    ``place`` are its index_q, index_kv and head. What no load depends on, XLA drops.
    """
    loader = _Loader(arrays)
    program.evaluate((np.zeros((), program.inputs[0]), *place), loader)
    return loader.found


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def scores(
    program: Program, counts: Array, place: tuple[Array, ...], loaded: list[Array]
) -> Array:
    """The new scores of a tile.

    Elements that do not count get some number, which is not differentiated: a NaN among
    the derivatives there would reach every array.
    """
    (out,) = program.evaluate(place, Numbers(loaded))
    return jnp.broadcast_to(out, counts.shape)


@scores.defjvp
def _scores_jvp(program, primals, tangents):
    counts, place, loaded = primals
    _, (d_score, *_), d_loaded = tangents
    out: Any = scores(program, counts, place, loaded)
    slopes: Any = program.slopes.evaluate((*place, *loaded), Numbers(()))
    counts = counts & (out != -jnp.inf)
    terms = [
        jnp.where(counts, slope, 0).astype(out.dtype) * jnp.asarray(x, out.dtype)
        for slope, x in zip(
            slopes, [d_score, *(d_loaded[n] for n in program.learned)], strict=True
        )
    ]
    return out, functools.reduce(jnp.add, terms)


def add_at(store: Array, index: tuple[Array, ...], values: Array) -> Array:
    """``store[index] += values``, in the same order on every run."""
    if not index:
        return store + values.astype(store.dtype)
    if jax.default_backend() == "cpu":
        return store.at[index].add(values.astype(store.dtype))
    return add_sorted(store, index, values)


def add_sorted(store: Array, index: tuple[Array, ...], values: Array) -> Array:
    """`add_at` where additions run side by side: the values of a place in one scan."""
    where = jnp.zeros(values.shape, jnp.int32)
    for at, size in zip(index, store.shape, strict=True):
        where = where * size + at
    where, values = lax.sort(
        (where.reshape(-1), values.astype(store.dtype).reshape(-1)), num_keys=1
    )

    def join(a, b):
        return b[0], jnp.where(a[0] == b[0], a[1], 0) + b[1]

    _, totals = lax.associative_scan(join, (where, values))
    last = jnp.append(where[1:] != where[:-1], True)
    where = jnp.where(last, where, store.size)  # the others are dropped
    flat = store.reshape(-1).at[where].add(totals, mode="drop")
    return flat.reshape(store.shape)


# ---------------------------------------------------------------------------- tracing


def _scalar_type(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype)


def _varies(x: Any) -> bool:
    """Whether it is an array of atoms, one for each element."""
    return isinstance(x, np.ndarray) and x.dtype == object


def _known(x: Any) -> bool:
    return isinstance(x, np.ndarray | np.generic) and not _varies(x)


def _number(x: Any) -> Any:
    """A constant of one element as NumPy's, so that it need not be loaded."""
    return x if isinstance(x, jax.core.Tracer) or np.size(x) > 1 else np.asarray(x)


def _atoms(values: Sequence[Atom], shape: tuple[int, ...] = ()) -> np.ndarray:
    out = np.empty(len(values), object)
    for n, x in enumerate(values):
        out[n] = x
    return out.reshape(shape)


def _integer(value: int) -> Constant:
    return Constant(np.asarray(value, np.int32))


def _bind(equation: Any, args: Sequence) -> list:
    params = equation.primitive.get_bind_params(equation.params)
    out = equation.primitive.bind(*args, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def _inner(equation: Any) -> tuple[Any, Sequence]:
    """The jaxpr that a call runs, and its constants."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    (found,) = (equation.params[name] for name in names if name in equation.params)
    if hasattr(found, "consts"):
        return found.jaxpr, found.consts
    return found, ()


class _Tracer:
    """Turns a jaxpr into a program.

    A value is known before tracing (NumPy), an array that no scalar input enters into
    (JAX), or varies: then it is a NumPy array of atoms.
    """

    def __init__(self, who: str, elementwise: frozenset[str] = ELEMENTWISE):
        self.who, self.elementwise = who, elementwise
        self.arrays: list[Array] = []
        self.constant: set[int] = set()  # ids of arrays without a gradient
        self.kept: list[Array] = []  # so that no id is used again
        self.made: dict[int, Array] = {}  # by ids of NumPy's
        self.instructions: list = []
        self.axes: list[frozenset[str]] = []  # of `PLACE`, what each number depends on

    def program(self, closed: Any, inputs: Sequence, arrays: Sequence) -> Program:
        """The program of a jaxpr whose first arguments are scalar inputs."""
        self.axes = [frozenset(PLACE[n : n + 1]) for n in range(len(inputs))]
        for x in (*closed.consts, *arrays):
            self.keep(x, not isinstance(x, jax.core.Tracer))
        scalars = [_atoms([n]) for n in range(len(inputs))]
        out = self.run(closed.jaxpr, closed.consts, [*scalars, *arrays])
        outputs = tuple(self.scalars(x, "the result").item() for x in out)
        types = tuple(map(np.dtype, inputs))
        return Program(types, tuple(self.instructions), outputs)

    def keep(self, array: Array, constant: bool) -> None:
        self.kept.append(array)
        if constant or not jnp.issubdtype(array.dtype, jnp.floating):
            self.constant.add(id(array))

    def run(self, jaxpr: Any, consts: Sequence, inputs: Sequence) -> list:
        """The values of its results."""
        values = dict(zip(jaxpr.constvars, map(_number, consts), strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)

        def read(x):
            if isinstance(x, Literal):
                aval: Any = x.aval
                return np.asarray(x.val, aval.dtype)
            return values[x]

        for equation in jaxpr.eqns:
            out = self.step(equation, [read(x) for x in equation.invars])
            values |= zip(equation.outvars, out, strict=True)
        return [read(x) for x in jaxpr.outvars]

    def step(self, equation: Any, args: list) -> list:
        """The values of an equation's results."""
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            return self.run(*_inner(equation), args)
        if not any(map(_varies, args)):
            return self.beforehand(equation, args)
        shape = equation.outvars[0].aval.shape
        if name in CUSTOM:
            return self.custom(equation, args)
        if name == "reduce_sum" and name in self.elementwise:
            return args
        if name in self.elementwise:
            scalars = np.broadcast_arrays(*(self.scalars(x, name) for x in args))
            made = [
                self.apply(equation.primitive, params, *atoms)
                for atoms in zip(*(x.flat for x in scalars), strict=True)
            ]
            return [_atoms(made, scalars[0].shape)]
        if name in ("dynamic_slice", "gather"):
            index = self.slice_index if name == "dynamic_slice" else self.gather_index
            return [_atoms([self.load(args[0], *index(args, params))], shape)]
        if name in ("reshape", "squeeze"):
            return [self.scalars(args[0], name).reshape(shape)]
        if name == "broadcast_in_dim":
            wide = [1] * len(shape)
            for axis, n in zip(
                params["broadcast_dimensions"], args[0].shape, strict=True
            ):
                wide[axis] = n
            return [np.broadcast_to(args[0].reshape(wide), shape)]
        if name == "concatenate":
            parts = [self.scalars(x, name) for x in args]
            return [np.concatenate(parts, params["dimension"])]
        raise TypeError(
            f"{self.who} uses {name}, which is not element-wise; expected arithmetic "
            "on score, index_q, index_kv and head and elements of arrays. Of arrays "
            "alone anything may be computed, and jnp.where chooses."
        )

    def beforehand(self, equation: Any, args: list) -> list:
        """Computes what no scalar input enters into."""
        arrays = [x for x in args if not _known(x)]
        if not arrays:
            with jax.ensure_compile_time_eval():
                return [np.asarray(x) for x in _bind(equation, args)]
        out = _bind(equation, vary_like(args, arrays))
        stopped = equation.primitive.name == "stop_gradient"
        for x in out:
            self.keep(x, stopped or all(id(a) in self.constant for a in arrays))
        return out

    def apply(self, primitive: Any, params: dict, *args: Atom) -> Atom:
        """An instruction's result; of constants a constant."""
        known = [x.value for x in args if isinstance(x, Constant)]
        if len(known) == len(args):
            with jax.ensure_compile_time_eval():
                return Constant(np.asarray(primitive.bind(*known, **params)))
        self.instructions.append(Apply(args, primitive, params))
        return self.result(args)

    def result(self, args: Sequence[Atom]) -> int:
        """The number of an instruction's result, or of the next of its results."""
        self.axes.append(self.axes_of(args))
        return len(self.axes) - 1

    def axes_of(self, args: Sequence[Atom]) -> frozenset[str]:
        return frozenset().union(*(self.axes[x] for x in args if isinstance(x, int)))

    def custom(self, equation: Any, args: list) -> list:
        """A function with a derivative of its own; of scalars, as it stands."""
        name = equation.primitive.name
        atoms = tuple(self.scalars(x, name).item() for x in args)
        inner = _Tracer(self.who)
        jaxpr, consts = _inner(equation)
        closed = ClosedJaxpr(jaxpr, list(consts))
        types = [x.aval.dtype for x in equation.invars]
        program = inner.program(closed, types, ())
        if inner.arrays:
            raise TypeError(
                f"{self.who} calls a function with a derivative of its own that loads "
                "from an array; expected one of scalars. Load first, and pass it on."
            )
        self.instructions.append(Custom(atoms, equation, program))
        return [_atoms([self.result(atoms)]) for _ in program.outputs]

    def scalars(self, x: Any, what: str) -> np.ndarray:
        """A value as atoms."""
        if _varies(x):
            return x
        if _known(x):
            return _atoms([Constant(np.asarray(y)) for y in x.flat], x.shape)
        if math.prod(x.shape) != 1:
            raise TypeError(
                f"{self.who} uses an array of shape {x.shape} whole in {what}; "
                "expected one element of it. Index it by integers made of index_q, "
                "index_kv and head."
            )
        return _atoms([self.load(x, [_integer(0)] * x.ndim)], x.shape)

    def load(self, array: Any, index: list[Atom], fill: Any = None) -> Atom:
        """An element of an array; beyond its ends the nearest, or ``fill``."""
        if _varies(array):
            raise TypeError(
                f"{self.who} indexes what depends on score, index_q, index_kv or head; "
                "expected an array, with all of its indices at once: table[i, j], not "
                "table[i][j]."
            )
        if _known(array):
            array = self.known_array(array)
        numbers = [n for n, x in enumerate(self.arrays) if x is array]
        if not numbers:
            numbers = [len(self.arrays)]
            self.arrays.append(array)
        nearest, exists = [], Constant(np.asarray(True))
        for at, size in zip(index, array.shape, strict=True):
            inside = at
            for limit, end in ((lax.max_p, 0), (lax.min_p, size - 1)):
                inside = self.apply(limit, {}, inside, _integer(end))
            nearest.append(inside)
            same = self.apply(lax.eq_p, {}, at, inside)
            exists = self.apply(lax.and_p, {}, exists, same)
        axes, dtype = self.axes_of(nearest), np.dtype(array.dtype)
        if "score" in axes:
            raise TypeError(
                f"{self.who} makes an index out of the score; expected indices made of "
                "index_q, index_kv and head."
            )
        learned = id(array) not in self.constant
        one = Load(tuple(nearest), numbers[0], dtype, axes, learned)
        self.instructions.append(one)
        found = self.result(nearest)
        if fill is None:
            return found
        fill = Constant(np.asarray(fill, dtype))
        return self.apply(lax.select_n_p, {}, exists, fill, found)

    def known_array(self, values: np.ndarray) -> Array:
        """An array known before tracing as JAX's, the same at every load."""
        if id(values) not in self.made:
            array = jnp.asarray(values)
            self.kept.append(values)
            self.keep(array, True)
            self.made[id(values)] = array
        return self.made[id(values)]

    def slice_index(self, args: list, params: dict) -> tuple[list[Atom]]:
        """The index of a ``dynamic_slice``."""
        self.check_one(params["slice_sizes"])
        return ([x.item() for x in map(self.index, args[1:])],)

    def index(self, x: Any) -> np.ndarray:
        """Indices as int32."""
        params: dict[str, Any] = {"new_dtype": np.dtype(np.int32), "weak_type": False}
        params["sharding"] = None
        atoms = self.scalars(x, "an index")
        made = [self.apply(lax.convert_element_type_p, params, at) for at in atoms.flat]
        return _atoms(made, atoms.shape)

    def gather_index(self, args: list, params: dict) -> tuple[list[Atom], Any]:
        """The index of a ``gather``, and what it gives outside of the array."""
        self.check_one(params["slice_sizes"])
        numbers, index = params["dimension_numbers"], self.index(args[1])
        self.check_one(index.shape[:-1])
        if numbers.operand_batching_dims:
            raise TypeError(f"{self.who} gathers in batches; expected single elements.")
        found: list[Atom] = [_integer(0)] * len(params["slice_sizes"])
        for axis, at in zip(numbers.start_index_map, index.flat, strict=True):
            found[axis] = at
        fill, dtype = None, args[0].dtype
        fills = lax.GatherScatterMode.FILL_OR_DROP
        if lax.GatherScatterMode.from_any(params["mode"]) == fills:
            fill = params["fill_value"]
            if fill is None:
                inexact = jnp.issubdtype(dtype, jnp.inexact)
                fill = np.nan if inexact else np.iinfo(dtype).min
        return found, fill

    def check_one(self, shape: Sequence[int]) -> None:
        if math.prod(shape) != 1:
            raise TypeError(
                f"{self.who} takes a slice of shape {tuple(shape)} out of an array; "
                "expected one element, with all indices at once: table[i, j], not "
                "table[i][j]."
            )
