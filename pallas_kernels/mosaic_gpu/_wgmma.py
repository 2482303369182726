"""Matrix products of one warpgroup: started together, waited for one by one.

A `Product` says what is multiplied; `start` issues several as one operation, because
ptxas waits after every wgmma if anything touches the registers of one product between
two others. Each is a group of its own, in order, so ``wait(shape, pending)`` can wait
for the first of them while the rest run on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils

from . import _registers as r
from . import _tiles


@dataclasses.dataclass(frozen=True)
class Product:
    """``x = a @ b.T`` or, accumulating, ``x = x + a @ b`` or ``x + a @ b.T``.

    x is 64 x columns.

    Attributes:
        columns: of the result.
        b: columns of the tile b (see `_tiles`) in shared memory.
        a: the same for a, or None if a comes in registers (`_registers.OPERAND`).
        accumulate: whether the operand ``acc`` comes first.
        transposed: whether b is transposed although it accumulates.
    """

    columns: int
    b: int
    a: int | None = None
    accumulate: bool = False
    transposed: bool = False

    @property
    def b_transposed(self) -> bool:
        """Whether b's rows are the columns of x."""
        return self.transposed or not self.accumulate

    @property
    def arg_types(self) -> tuple:
        """Of ``[acc,] a, b``."""
        tile = lambda columns: _tiles.ref_type(columns, jnp.bfloat16)
        a = r.OPERAND if self.a is None else tile(self.a)
        acc = (r.ACC,) if self.accumulate else ()
        return (*acc, a, tile(self.b))

    @property
    def result(self) -> plgpu.ShapeDtypeStruct:
        """Type of x."""
        return plgpu.ShapeDtypeStruct((64, self.columns), jnp.float32, layout=r.ACC)


def start(*products: Product) -> Callable:
    """``f([acc,] a, b, [acc,] a, b, ...) -> x, ...``: issues the products in order.

    The results may be read only after a `wait`, and registers given as a may be
    overwritten only then.
    """
    results = tuple(p.result for p in products)

    @plgpu.inline_mgpu(
        arg_types=tuple(t for p in products for t in p.arg_types),
        return_type=results if len(results) > 1 else results[0],
    )
    def f(_, *args):
        rest, operands, held = list(args), [], []
        for p in products:
            acc = r.scalars(rest.pop(0)) if p.accumulate else None
            a, b = rest.pop(0), rest.pop(0)
            if isinstance(a, fa.FragmentedArray):
                a = r.tied(r.words(a), "", "r")
            else:
                a = _tiles.core_matrices(a)
            held += acc or ()
            operands.append((acc, a, _tiles.core_matrices(b)))
        # The fence orders earlier writes of registers, all accumulators at once.
        if held:
            held = r.tied(held, "wgmma.fence.sync.aligned;")
        else:
            r.command("wgmma.fence.sync.aligned;")
        out = []
        for p, (acc, a, b) in zip(products, operands, strict=True):
            if acc is not None:
                acc, held = held[: len(acc)], held[len(acc) :]
            swizzle = ir.MemRefType(b.type).shape[-1] * 2
            if p.b_transposed:
                b = utils.memref_transpose(b, (1, 0, 3, 2))
            x = _multiply(acc, a, b, swizzle)
            out.append(r.accumulator(x, (64, p.columns)))
        return tuple(out) if len(out) > 1 else out[0]

    return f


def _multiply(
    acc: list[ir.Value] | None,
    a: ir.Value | list[ir.Value],
    b: ir.Value,
    swizzle: int,
) -> list[ir.Value]:
    """Issues ``acc + a @ b`` and commits it; returns registers still being written.

    ``acc`` None starts from zero. ``a`` is a shared-memory tile or packed registers.
    """
    (k, n), dtype = mma_utils.tiled_memref_shape(b)
    group = swizzle // 2
    (b_base, b_step), (_, b_group), b_fastest = mma_utils.create_descriptor(
        b,
        large_tile=(group, group),
        group_size=(group, n),
        logical_k_major=True,
        swizzle=swizzle,
        split_const=True,
    )
    in_regs = isinstance(a, list)
    if not in_regs:
        a_swizzle = ir.MemRefType(a.type).shape[-1] * 2
        a_groups = a_swizzle // 2
        (a_base, a_step), (_, a_group), a_fastest = mma_utils.create_descriptor(
            a,
            large_tile=(64, a_groups),
            group_size=(64, a_groups),
            logical_k_major=False,
            swizzle=a_swizzle,
            split_const=True,
        )
    transposed = [] if in_regs else [int(a_fastest != mma_utils.Dim.K)]
    transposed.append(int(b_fastest != mma_utils.Dim.K))

    def address(i, base, group, group_stride, instr_step):
        # Where the operand is stands in 14 bits of the low word: one addition there.
        (first, fixed), (at, step) = base, divmod(i * 16, group)
        offset = (at * group_stride + (step // 16) * instr_step[1][0]) >> 4
        low = arith.addi(first, r.integer(offset + fixed % 2**32))
        high = fixed >> 32 << 32
        return llvm.or_(
            arith.extui(ir.IntegerType.get_signless(64), low),
            r.integer(high - (high >> 63 << 64), 64),
        )

    for i in range(k // 16):
        if in_regs:
            a_args = a[4 * i : 4 * i + 4]
        else:
            a_args = [address(i, a_base, a_groups, a_group, a_step)]
        b_arg = address(i, b_base, group, b_group, b_step)
        acc = _multiply_k16(acc, a_args, b_arg, n, dtype, transposed)
    r.command("wgmma.commit_group.sync.aligned;")
    return acc


def _multiply_k16(acc, a_args, b_arg, n, dtype, transposed) -> list[ir.Value]:
    count = n // 2
    fresh = acc is None
    tied = [] if fresh else acc
    names = iter(f"${i}" for i in range(2 * count + 16))
    d = "{" + ",".join(next(names) for _ in range(count)) + "}"
    for _ in tied:
        next(names)
    a_names = [next(names) for _ in a_args]
    a = a_names[0] if len(a_names) == 1 else "{" + ",".join(a_names) + "}"
    b = next(names)
    imms = ", ".join(["1", "1", *map(str, transposed)])
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, {0 if fresh else 1}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} "
        f"{d}, {a}, {b}, p, {imms}; }}"
    )
    spec = ["=f"] * count + [str(i) for i in range(len(tied))]
    spec += ["l"] if len(a_args) == 1 else ["r"] * 4
    spec += ["l"]
    struct = llvm.StructType.get_literal([r.f32()] * count)
    out = r.asm(struct, [*tied, *a_args, b_arg], text, ",".join(spec), effects=True)
    return [llvm.extractvalue(r.f32(), out, [i]) for i in range(count)]


def wait(shape: tuple[int, int], pending: int) -> Callable:
    """``f(x) -> x``: waits until at most ``pending`` newer products are in flight."""

    @plgpu.inline_mgpu(
        arg_types=(r.ACC,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=r.ACC),
    )
    def f(_, x):
        text = f"wgmma.wait_group.sync.aligned {pending};"
        return r.accumulator(r.tied(r.scalars(x), text), shape)

    return f
