"""The registers of one thread: arrays opened into scalars, and instructions on them.

Pallas keeps a 64 x N accumulator as an array with a layout. Kernels here open that
array and work on the registers of one thread, because two things cannot be said above
this level: a wgmma that starts from zero without clearing its registers, and row sums
that stay split over the four lanes of a row until the end.

In the accumulator layout the registers of a thread are ``[N / 8, 2, 2]``: column tile,
row half (rows r and r + 8), and two neighbouring columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils

ACC = plgpu.Layout._WGMMA_ACC_32BIT
OPERAND = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
SCALAR = plgpu.Layout.WG_SPLAT(())


def store(place: Any, values: Any) -> None:
    """Writes an array to global memory, straight from registers.

    JAX 0.12 refuses pieces that do not fill sectors of 32 bytes unless it is asked.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(place, values, optimized=False)
    else:
        place[...] = values


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def f32() -> ir.Type:
    return ir.F32Type.get()


def integer(value: int, bits: int = 32) -> ir.Value:
    ty = ir.IntegerType.get_signless(bits)
    return llvm.ConstantOp(ty, ir.IntegerAttr.get(ty, value)).result


def number(value: float) -> ir.Value:
    return llvm.ConstantOp(f32(), ir.FloatAttr.get(f32(), value)).result


def asm(
    out: ir.Type, args: Sequence[ir.Value], text: str, spec: str, effects: bool = False
) -> ir.Value:
    """One inline instruction; with ``effects`` it keeps its place among its like."""
    return llvm.inline_asm(
        out, list(args), text, spec, asm_dialect=0, has_side_effects=effects
    )


def command(text: str, *args: ir.Value, spec: str = "") -> None:
    """An instruction without a result."""
    asm(ir.Type.parse("!llvm.void"), args, text, spec, effects=True)


# ------------------------------------------------------------------ arrays <-> scalars


def scalars(array: fa.FragmentedArray) -> list[ir.Value]:
    """The registers of a 32-bit array, one scalar each."""
    out = []
    for reg in array.registers.flat:
        (size,) = ir.VectorType(reg.type).shape
        out += [llvm.extractelement(reg, integer(i)) for i in range(size)]
    return out


def widened(array: fa.FragmentedArray) -> list[ir.Value]:
    """The registers of a 16-bit array, which hold two values each, as float32.

    A bfloat16 is the upper half of a float32: one instruction a value.
    """
    if not isinstance(array.mlir_dtype, ir.BF16Type):
        return [arith.extf(f32(), x) for x in scalars(array)]
    out = []
    for reg in array.registers.flat:
        word = llvm.bitcast(i32(), reg)
        low = arith.shli(word, integer(16))
        high = arith.andi(word, integer(-(1 << 16)))
        out += [arith.bitcast(f32(), x) for x in (low, high)]
    return out


def from_scalars(
    values: Sequence[ir.Value], shape: tuple[int, ...], layout: fa.FragmentedLayout
) -> fa.FragmentedArray:
    """Inverse of `scalars`, one value a register."""
    ty = ir.VectorType.get((1,), values[0].type)
    regs = np.empty(len(values), dtype=object)
    for i, v in enumerate(values):
        regs[i] = vector.broadcast(ty, v)
    return _array(regs, shape, layout)


def accumulator(values: Sequence[ir.Value], shape: tuple[int, ...]):
    """`from_scalars` in the accumulator layout."""
    return from_scalars(values, shape, fa.WGMMA_LAYOUT_ACC_32BIT)


def pairs(values: Sequence[ir.Value], shape: tuple[int, ...]) -> fa.FragmentedArray:
    """A float32 array in the ordinary wgmma layout, two columns a register."""
    ty = ir.VectorType.get((2,), f32())
    regs = np.empty(len(values) // 2, dtype=object)
    for i in range(len(regs)):
        regs[i] = vector.from_elements(ty, [values[2 * i], values[2 * i + 1]])
    return _array(regs, shape, fa.WGMMA_LAYOUT)


def words(array: fa.FragmentedArray) -> list[ir.Value]:
    """The registers of a 16-bit array as 32-bit words, two columns each."""
    one = ir.VectorType.get((1,), i32())
    return [
        llvm.extractelement(vector.bitcast(one, reg), integer(0))
        for reg in array.registers.flat
    ]


def packed(values: Sequence[ir.Value], shape: tuple[int, ...], dtype):
    """A 16-bit array in the ordinary wgmma layout, rounded to nearest."""
    name = "bf16" if jnp.dtype(dtype) == jnp.bfloat16 else "f16"
    element = ir.BF16Type.get() if name == "bf16" else ir.F16Type.get()
    one, pair = ir.VectorType.get((1,), i32()), ir.VectorType.get((2,), element)
    regs = np.empty(len(values) // 2, dtype=object)
    for i in range(len(regs)):
        lo, hi = values[2 * i : 2 * i + 2]
        word = asm(i32(), [hi, lo], f"cvt.rn.{name}x2.f32 $0, $1, $2;", "=r,f,f")
        regs[i] = vector.bitcast(pair, vector.broadcast(one, word))
    return _array(regs, shape, fa.WGMMA_LAYOUT)


def _array(regs, shape, layout) -> fa.FragmentedArray:
    return fa.FragmentedArray(
        _registers=regs.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=None,
    )


def tied(values: Sequence[ir.Value], text: str, kind: str = "f") -> list[ir.Value]:
    """Runs ``text`` as an instruction that every one of ``values`` passes through.

    LLVM may not move a use of a value above it, nor its computation below it.
    """
    n = len(values)
    struct = llvm.StructType.get_literal([v.type for v in values])
    spec = ",".join([f"={kind}"] * n + [str(i) for i in range(n)])
    out = asm(struct, values, text, spec, effects=True)
    return [llvm.extractvalue(values[i].type, out, [i]) for i in range(n)]


def row_half(values: Sequence[ir.Value], half: int) -> list[ir.Value]:
    """An accumulator's registers of row r (half 0) or r + 8 (half 1), by column."""
    return [v for i, v in enumerate(values) if (i >> 1) & 1 == half]


def interleave(halves: Sequence[Sequence[ir.Value]]) -> list[ir.Value]:
    """Inverse of taking both `row_half`."""
    n = 2 * len(halves[0])
    return [halves[(i >> 1) & 1][i >> 2 << 1 | i & 1] for i in range(n)]


# ------------------------------------------------------------------------- arithmetic


def _binary(name: str) -> Callable:
    def f(x: ir.Value, y: ir.Value) -> ir.Value:
        return asm(f32(), [x, y], f"{name} $0, $1, $2;", "=f,f,f")

    return f


maximum = _binary("max.NaN.f32")
minimum = _binary("min.NaN.f32")
minimum_number = _binary("min.f32")
"""The other one where one is NaN."""
add = _binary("add.rn.f32")
add_down = _binary("add.rm.f32")
"""Rounded down."""
sub = _binary("sub.rn.f32")
mul = _binary("mul.rn.f32")


def fma(x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return asm(f32(), [x, y, z], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")


def fma_neg(x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """``x * y - z``."""
    text = "{ .reg .f32 t; neg.f32 t, $3; fma.rn.f32 $0, $1, $2, t; }"
    return asm(f32(), [x, y, z], text, "=f,f,f,f")


def fma_of_minus(x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """``z - x * y``."""
    text = "{ .reg .f32 t; neg.f32 t, $1; fma.rn.f32 $0, t, $2, $3; }"
    return asm(f32(), [x, y, z], text, "=f,f,f,f")


def multiples_added(
    xs: Sequence[ir.Value], ys: Sequence[ir.Value], factor: float
) -> list[ir.Value]:
    """``x + factor * y``, one by one."""
    times = number(factor)
    return [fma(y, times, x) for x, y in zip(xs, ys, strict=True)]


def exp2(x: ir.Value) -> ir.Value:
    return asm(f32(), [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def sqrt(x: ir.Value) -> ir.Value:
    return asm(f32(), [x], "sqrt.approx.ftz.f32 $0, $1;", "=f,f")


def inverse_sqrt(x: ir.Value) -> ir.Value:
    return asm(f32(), [x], "rsqrt.approx.ftz.f32 $0, $1;", "=f,f")


def zero_with(x: ir.Value, y: ir.Value) -> ir.Value:
    """x, 0 where y is 0."""
    text = (
        "{ .reg .pred p; setp.eq.f32 p, $2, 0f00000000; "
        "selp.f32 $0, 0f00000000, $1, p; }"
    )
    return asm(f32(), [x, y], text, "=f,f,f")


def low_bits(count: ir.Value) -> ir.Value:
    """A word with its ``count`` lowest bits set; all from 32 on, none below 1."""
    text = "{ .reg .b32 t; max.s32 t, $1, 0; bmsk.clamp.b32 $0, 0, t; }"
    return asm(i32(), [count], text, "=r,r")


def of_lane(x: ir.Value, lane: ir.Value) -> ir.Value:
    """Another lane's x; the low five bits of ``lane`` count."""
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return asm(f32(), [x, lane], text, "=f,f,r", effects=True)


def across_row(op: Callable, x: ir.Value) -> ir.Value:
    """Combines the four lanes that hold one row."""
    for distance in (1, 2):
        text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
        x = op(x, asm(f32(), [x], text, "=f,f", effects=True))
    return x


def tree(op: Callable, values: Sequence[ir.Value], ways: int) -> ir.Value:
    """Reduces in ``ways`` independent chains."""
    parts = [functools.reduce(op, values[i::ways]) for i in range(ways)]
    return functools.reduce(op, parts)


def immediate(x: float) -> str:
    """A float32 as PTX spells it."""
    return "0f" + np.float32(x).tobytes()[::-1].hex().upper()


# ------------------------------------------------------- which elements a thread holds


def first_row() -> ir.Value:
    """Row of a 64-row tile that this thread's first registers hold; the rest: + 8."""
    text = (
        "{ .reg .b32 a, b; mov.u32 a, %tid.x; and.b32 a, a, 127; shr.u32 b, a, 5; "
        "shl.b32 b, b, 4; and.b32 a, a, 31; shr.u32 a, a, 2; add.s32 $0, a, b; }"
    )
    return asm(i32(), [], text, "=r")


def lane() -> ir.Value:
    """Number of the thread in its warp."""
    text = "{ .reg .b32 a; mov.u32 a, %tid.x; and.b32 $0, a, 31; }"
    return asm(i32(), [], text, "=r")


def first_column() -> ir.Value:
    """Column of the thread's first register; the others: + 1, and + 8 j."""
    text = "{ .reg .b32 a; mov.u32 a, %tid.x; and.b32 a, a, 3; shl.b32 $0, a, 1; }"
    return asm(i32(), [], text, "=r")


# ------------------------------------------------------------------- memory, unswizzled


def global_word(
    ref: ir.Value, index: ir.Value, offset: int, ty: ir.Type, here: bool = False
) -> ir.Value:
    """``ref[index + offset]`` of 32-bit values in global memory that nobody writes.

    ``here`` keeps the load before what follows, however late its result is used.
    """
    kind = "f" if ty == f32() else "r"
    text = (
        f"{{ .reg .b64 a; mad.wide.s32 a, $2, 4, $1; "
        f"ld.global.nc.b32 $0, [a+{4 * offset}]; }}"
    )
    return asm(ty, [utils.memref_ptr(ref), index], text, f"={kind},l,r", effects=here)


def global_pair(
    ref: ir.Value, index: ir.Value, offset: int, ty: ir.Type
) -> list[ir.Value]:
    """``ref[index + offset]`` and the next, as `global_word`; ``index`` is even."""
    kind = "f" if ty == f32() else "r"
    struct = llvm.StructType.get_literal([ty, ty])
    text = (
        "{ .reg .b64 a; mad.wide.s32 a, $3, 4, $2; "
        f"ld.global.nc.v2.b32 {{$0, $1}}, [a+{4 * offset}]; }}"
    )
    both = asm(struct, [utils.memref_ptr(ref), index], text, f"={kind},={kind},l,r")
    return [llvm.extractvalue(ty, both, [e]) for e in range(2)]


def shared_pairs(ref: ir.Value, count: int) -> list[ir.Value]:
    """The thread's columns of a float32 row ``[8 * count]`` in shared memory."""
    struct = llvm.StructType.get_literal([f32(), f32()])
    base, column = utils.memref_ptr(ref), first_column()
    out = []
    for j in range(count):
        text = (
            "{ .reg .b32 a; shl.b32 a, $3, 2; add.u32 a, a, $2; "
            f"ld.shared.v2.f32 {{$0, $1}}, [a+{32 * j}]; }}"
        )
        both = asm(struct, [base, column], text, "=f,=f,r,r", effects=True)
        out += [llvm.extractvalue(f32(), both, [e]) for e in range(2)]
    return out


def _own_words(j: int, base: str) -> str:
    """Instructions up to the address ``a`` of the thread's j-th four words.

    ``base`` names the operand that is the array's; four words of all threads of a
    warpgroup stand together.
    """
    return (
        "{ .reg .b32 a; mov.u32 a, %tid.x; and.b32 a, a, 127; "
        f"mad.lo.u32 a, a, 16, {base}; add.u32 a, a, {2048 * j}; "
    )


def store_own(ref: ir.Value, values: Sequence[ir.Value]) -> None:
    """Writes the thread's float32 values to its own part of an array in shared memory.

    They are a multiple of four; no other thread's `load_own` reads them.
    """
    base = utils.memref_ptr(ref)
    for j in range(0, len(values), 4):
        text = _own_words(j // 4, "$0") + "st.shared.v4.f32 [a], {$1, $2, $3, $4}; }"
        command(text, base, *values[j : j + 4], spec="r,f,f,f,f")


def load_own(ref: ir.Value, first: int, count: int) -> list[ir.Value]:
    """``count`` of the values that `store_own` wrote, from ``first`` on."""
    struct, base = llvm.StructType.get_literal([f32()] * 4), utils.memref_ptr(ref)
    out = []
    for j in range(first, first + count, 4):
        text = _own_words(j // 4, "$4") + "ld.shared.v4.f32 {$0, $1, $2, $3}, [a]; }"
        four = asm(struct, [base], text, "=f,=f,=f,=f,r", effects=True)
        out += [llvm.extractvalue(f32(), four, [e]) for e in range(4)]
    return out


def await_warpgroup() -> Callable:
    """``f()``: until all of the warpgroup's threads are here."""

    @plgpu.inline_mgpu(arg_types=(), return_type=())
    def f(_):
        utils.warpgroup_barrier()

    return f


def fence_reads() -> Callable:
    """``f()``: TMA may overwrite what this thread has read of shared memory.

    For queries kept in registers, whose tile is given back as soon as it is read, while
    stores of the item before are under way: without it some rows were the next item's.
    """

    @plgpu.inline_mgpu(arg_types=(), return_type=())
    def f(_):
        command("fence.proxy.async.shared::cta;")

    return f


# --------------------------------------------------------------------- named barriers


def named_barrier(text: str) -> Callable:
    """``f(index)`` runs ``bar.<text> index, 256`` for two warpgroups."""

    @plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=())
    def f(_, index):
        command(f"bar.{text} $0, 256;", index.registers.item(), spec="r")

    return f
