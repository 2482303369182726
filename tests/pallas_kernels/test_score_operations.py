"""What instructions of score functions compute, by an interpreter of their few PTX.

The registers are NumPy scalars here. Approximate instructions are taken to be exact:
what is tested is how they are put together, and that each says what it should.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.backends import _score as programs
from jsparse.pallas_kernels.mosaic_gpu import _registers, _score

F32, I32 = np.float32, np.int32
PTX = {
    "abs.f32": np.abs,
    "abs.s32": np.abs,
    "add.rn.f32": np.add,
    "cvt.rzi.s32.f32": lambda x: I32(np.trunc(x)),
    "div.full.f32": np.divide,
    "div.s32": lambda x, y: I32(np.trunc(x / y)),
    "ex2.approx.ftz.f32": np.exp2,
    "fma.rn.f32": lambda x, y, z: F32(np.float64(x) * y + z),
    "lg2.approx.f32": np.log2,
    "max.NaN.f32": np.maximum,
    "min.NaN.f32": np.minimum,
    "mul.rn.f32": np.multiply,
    "neg.f32": np.negative,
    "neg.s32": np.negative,
    "rcp.approx.ftz.f32": lambda x: F32(1) / x,
    "rem.s32": np.fmod,
    "rsqrt.approx.ftz.f32": lambda x: F32(1) / np.sqrt(x),
    "sqrt.approx.ftz.f32": np.sqrt,
    "sub.rn.f32": np.subtract,
}
ARITH = {
    "addi": np.add,
    "andi": np.bitwise_and,
    "extui": lambda ty, x: ty(x),
    "maxsi": np.maximum,
    "minsi": np.minimum,
    "muli": np.multiply,
    "ori": np.bitwise_or,
    "select": lambda which, x, y: x if which else y,
    "sitofp": lambda ty, x: ty(x),
    "subi": np.subtract,
    "uitofp": lambda ty, x: ty(x),
    "xori": np.bitwise_xor,
}
COMPARED = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}


def compare(how: Any, x, y):
    """Ordered or signed; of floats that are not equal, also unordered."""
    return COMPARED[how.name.upper()[-2:]](x, y)


def run_ptx(out, args, text, spec, effects=False):
    """One instruction; of those in braces, the sign."""
    del spec, effects
    if text.startswith("{"):
        assert text.split()[1:3] == [".reg", ".pred"]
        assert "copysign.f32 t, $1, 0f3F800000; setp.equ.f32 p, $1" in text
        return np.sign(*args)
    name, *places = text.rstrip(";").replace(",", "").split()
    assert places == [f"${n}" for n in range(len(args) + 1)]
    with np.errstate(all="ignore"):
        return out(PTX[name](*args))


@pytest.fixture(autouse=True)
def registers(monkeypatch):
    monkeypatch.setattr(_registers, "asm", run_ptx)
    monkeypatch.setattr(_registers, "f32", lambda: F32)
    monkeypatch.setattr(_registers, "i32", lambda: I32)
    monkeypatch.setattr(_registers, "number", F32)
    monkeypatch.setattr(
        _registers, "integer", lambda x, bits=32: I32(x) if bits > 1 else np.bool_(x)
    )
    real = _score.arith
    stand_in = types.SimpleNamespace(
        CmpFPredicate=real.CmpFPredicate,
        CmpIPredicate=real.CmpIPredicate,
        cmpf=compare,
        cmpi=compare,
        **ARITH,
    )
    monkeypatch.setattr(_score, "arith", stand_in)


class Machine:
    """Runs instructions as the kernels do, on one element."""

    def apply(self, one, args):
        args = [x[()] if isinstance(x, np.ndarray) else x for x in args]
        names = {"float32": "float", "int32": "integer", "bool": "bool"}
        kinds = [names[x.dtype.name] for x in args]
        operation = _score._operation(one, kinds)
        assert operation is not None
        kind, f = operation
        found = f(*args)
        assert names[np.asarray(found).dtype.name] == kind
        return found

    def load(self, one, args):
        raise AssertionError((one, args))

    def custom(self, one, args):
        return one.inner.evaluate(args, self)


FLOATS = (-80.0, -3.5, -1.0, -0.25, -1e-4, 0.0, 1e-5, 0.3, 1.0, 2.5, 90.0)
FUNCTIONS = {
    "abs": jnp.abs,
    "sign": jnp.sign,
    "square": jnp.square,
    "exp": lambda s: jnp.exp(-jnp.abs(s)),
    "exp2": lambda s: jnp.exp2(-jnp.abs(s)),
    "log": lambda s: jnp.log(jnp.abs(s) + 0.1),
    "log2": lambda s: jnp.log2(jnp.abs(s) + 0.1),
    "log1p": lambda s: jnp.log1p(jnp.abs(s)),
    "tanh": jnp.tanh,
    "soft_cap": lambda s: 30 * jnp.tanh(s / 30),
    "logistic": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "sqrt": lambda s: jnp.sqrt(s * s + 1),
    "rsqrt": lambda s: jax.lax.rsqrt(s * s + 1),
    "powers": lambda s: (s / 9) ** 5 - (s / 9) ** 6 + 1 / (s * s + 1) ** 3,
    "clip": lambda s: jnp.clip(s, -2, 2) + jnp.maximum(s, 0.5) - jnp.minimum(s, 0.1),
    "where": lambda s: jnp.where((s > -1) & (s <= 2) | (s == 90), -s, 2 * s),
    "finite": lambda s: jnp.where(jnp.isfinite(s), s, 0) + jnp.where(s != 1, 1.0, s),
}


def evaluate(function, scores, place):
    """Results and derivatives by the score, for each of ``scores``, on registers."""
    program, _ = programs.trace(function, "float32", (), "the test's function")
    assert _score.why_not(program) is None
    places = [[F32(x), *map(I32, place)] for x in scores]
    return [
        [F32(one.evaluate(x, Machine())[0]) for x in places]
        for one in (program, program.slopes)
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_score(name):
    f = FUNCTIONS[name]
    found = evaluate(lambda s, i, j, h: f(s), FLOATS, (3, 5, 1))
    with jax.enable_x64(True):
        truth = jax.jit(jax.vmap(jax.value_and_grad(f)))(np.asarray(FLOATS))
    # A tanh is exact to the rounding of 1, and a cap multiplies that.
    for x, y in zip(found, truth, strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-6, atol=3e-6)


def of_place(i, j, h):
    """Every operation on integers and bools."""
    far = abs(i - j)
    bucket = jnp.where(far < 8, far, 8 + jnp.minimum(far // 4, 7)) * jnp.sign(i - j)
    odd = ((i ^ j) & 1 == 1) | ~(h >= 1) ^ (j < i)
    signs = (-i % 5) - (j // -3) + (~h | 2) * jnp.square(i) + jnp.clip(i, 2, 6)
    return bucket + 10 * odd.astype(jnp.int32) + signs + jnp.where(i != j, i, -j)


@pytest.mark.parametrize("place", [(0, 0, 0), (3, 9, 1), (40, 7, 2), (12, 13, 3)])
def test_functions_of_the_place(place):
    (found,), (slope,) = evaluate(
        lambda s, i, j, h: s + of_place(i, j, h).astype(s.dtype), [0.5], place
    )
    assert found == 0.5 + float(of_place(*(jnp.int32(x) for x in place)))
    assert slope == 1


def test_what_becomes_of_numbers_that_are_not_finite():
    for x, f, out in (
        (np.inf, jnp.tanh, 1.0),
        (-np.inf, jnp.tanh, -1.0),
        (-np.inf, jax.nn.sigmoid, 0.0),
        (np.inf, jax.nn.softplus, np.inf),
        (np.nan, jnp.sign, np.nan),
        (np.nan, jnp.tanh, np.nan),
    ):
        place = F32(x), I32(0), I32(0), I32(0)
        program, _ = programs.trace(lambda s, i, j, h, f=f: f(s), "float32", (), "f")
        np.testing.assert_equal(F32(program.evaluate(place, Machine())[0]), F32(out))
