"""The online softmax of one warpgroup, in base 2: a step, a rescaling, an ending."""

from __future__ import annotations

from collections.abc import Callable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm

from . import _registers as r


def _rows() -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=r.ROW)


def softmax_step(tile_kv: int, scale_log2: float, lazy: float) -> Callable:
    """``f(s, m, l) -> (p, m, l, alpha)``: one online-softmax step in base 2.

    ``p`` stays in float32: see `operand`.

    ``m`` is the running maximum of the scaled logits, ``l`` this lane's part of the row
    sum. With ``lazy`` above 0, m is raised only when the maximum has grown by more than
    that many powers of two, so that most steps need no rescaling (FlashAttention-4);
    p is then at most ``2**lazy``. ``m`` may be -inf (nothing allowed so far): then p
    and alpha are 0.
    """

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, r.ROW, r.ROW),
        return_type=(
            plgpu.ShapeDtypeStruct((64, tile_kv), jnp.float32, layout=r.ACC),
            _rows(),
            _rows(),
            _rows(),
        ),
    )
    def f(_, s, m, l):
        regs = r.scalars(s)
        m_old, l_old = r.scalars(m), r.scalars(l)
        scale = r.number(scale_log2)
        l_new, alpha, halves = [], [], []
        m_new = [r.tree(r.maximum, r.row_half(regs, h), 4) for h in range(2)]
        for h in range(2):
            top = r.mul(r.across_row(r.maximum, m_new[h]), scale)
            if lazy:
                # Greater or unordered: a NaN must become the maximum.
                text = (
                    "{ .reg .pred p; .reg .f32 t; sub.rn.f32 t, $1, $2; "
                    f"setp.gtu.f32 p, t, {r.immediate(lazy)}; "
                    "selp.f32 $0, $1, $2, p; }"
                )
                m_new[h] = r.asm(r.f32(), [top, m_old[h]], text, "=f,f,f")
            else:
                m_new[h] = r.maximum(m_old[h], top)
        for h in range(2):
            text = (
                "{ .reg .pred p; setp.eq.f32 p, $1, 0fFF800000; "
                "neg.f32 $0, $1; selp.f32 $0, 0f00000000, $0, p; }"
            )
            minus_m = r.asm(r.f32(), [m_new[h]], text, "=&f,f")
            alpha.append(r.exp2(r.add(m_old[h], minus_m)))
            ps = [r.exp2(r.fma(v, scale, minus_m)) for v in r.row_half(regs, h)]
            halves.append(ps)
            l_new.append(r.fma(l_old[h], alpha[h], r.tree(r.add, ps, 4)))
        row = lambda x: r.from_scalars(x, (64,), m.layout)
        p = r.accumulator(r.interleave(halves), (64, tile_kv))
        return p, row(m_new), row(l_new), row(alpha)

    return f


def operand(columns: int, dtype) -> Callable:
    """``f(x) -> x`` as a 16-bit operand of wgmma."""

    @plgpu.inline_mgpu(
        arg_types=(r.ACC,),
        return_type=plgpu.ShapeDtypeStruct((64, columns), dtype, layout=r.OPERAND),
    )
    def f(_, x):
        return r.packed(r.scalars(x), (64, columns), dtype)

    return f


def end_step(tile_kv: int, value_dim: int, dtype, lazy: bool) -> Callable:
    """``f(acc, p, alpha) -> (acc, p)``: waits for all products, scales the rows.

    p becomes an operand only here: registers of a product may not be written while
    another is in flight, or ptxas makes all of them wait.
    """

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, r.ACC, r.ROW),
        return_type=(
            plgpu.ShapeDtypeStruct((64, value_dim), jnp.float32, layout=r.ACC),
            plgpu.ShapeDtypeStruct((64, tile_kv), dtype, layout=r.OPERAND),
        ),
    )
    def f(_, acc, p, alpha):
        regs, ps, a = r.scalars(acc), r.scalars(p), r.scalars(alpha)
        both = r.tied([*regs, *ps], "wgmma.wait_group.sync.aligned 0;")
        regs, ps = both[: len(regs)], both[len(regs) :]
        if lazy:
            regs = _rescale_if_needed(regs, a)
        else:
            regs = [r.mul(v, a[(i >> 1) & 1]) for i, v in enumerate(regs)]
        out = r.accumulator(regs, (64, value_dim))
        return out, r.packed(ps, (64, tile_kv), dtype)

    return f


def _rescale_if_needed(regs: list[ir.Value], alpha: list[ir.Value]) -> list[ir.Value]:
    """Scales the rows unless alpha is 1 in the whole warp: one uniform branch."""
    n = len(regs)
    lines = [
        "{ .reg .pred p, q; ",
        f"setp.neu.f32 p, ${2 * n}, 0f3F800000; ",
        f"setp.neu.or.f32 p, ${2 * n + 1}, 0f3F800000, p; ",
        "vote.sync.any.pred q, p, 0xffffffff; @!q bra DONE; ",
        *(f"mul.rn.f32 ${i}, ${i}, ${2 * n + ((i >> 1) & 1)}; " for i in range(n)),
        "DONE: }",
    ]
    spec = ["=f"] * n + [str(i) for i in range(n)] + ["f", "f"]
    struct = llvm.StructType.get_literal([r.f32()] * n)
    spec[:n] = ["=&f"] * n
    out = r.asm(struct, [*regs, *alpha], "".join(lines), ",".join(spec), effects=True)
    return [llvm.extractvalue(r.f32(), out, [i]) for i in range(n)]


def finish(value_dim: int, dtype) -> Callable:
    """``f(acc, m, l) -> (out, lse)``: waits, divides by the row sum; natural log.

    A row that saw nothing (l = 0) gives 0 and -inf.
    """

    @plgpu.inline_mgpu(
        arg_types=(r.ACC, r.ROW, r.ROW),
        return_type=(
            plgpu.ShapeDtypeStruct((64, value_dim), dtype, layout=r.OPERAND),
            _rows(),
        ),
    )
    def f(_, acc, m, l):
        regs = r.tied(r.scalars(acc), "wgmma.wait_group.sync.aligned 0;")
        inverse, lse = [], []
        for m_h, l_h in zip(r.scalars(m), r.scalars(l), strict=True):
            total = r.across_row(r.add, l_h)
            text = (
                "{ .reg .pred p; .reg .f32 t; setp.eq.f32 p, $1, 0f00000000; "
                "rcp.approx.ftz.f32 t, $1; selp.f32 $0, 0f00000000, t, p; }"
            )
            inverse.append(r.asm(r.f32(), [total], text, "=f,f"))
            text = (
                "{ .reg .f32 t; lg2.approx.f32 t, $2; add.f32 t, t, $1; "
                "mul.f32 $0, t, 0f3F317218; }"
            )
            lse.append(r.asm(r.f32(), [m_h, total], text, "=f,f,f"))
        out = [r.mul(v, inverse[(i >> 1) & 1]) for i, v in enumerate(regs)]
        lse = r.from_scalars(lse, (64,), m.layout)
        if jnp.dtype(dtype) == jnp.float32:
            return r.pairs(out, (64, value_dim)), lse
        return r.packed(out, (64, value_dim), dtype), lse

    return f
