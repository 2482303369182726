"""One warpgroup's registers: wgmma and the softmax step, written per lane.

Pallas keeps a 64 x N accumulator as an array with a layout. The functions here open
that array and work on the registers of one thread, because two things cannot be said
above this level: a wgmma that starts from zero without clearing its registers, and row
sums that stay split over the four lanes of a row until the end.

In the accumulator layout the registers of a thread are ``[N / 8, 2, 2]``: column tile,
row half (rows r and r + 8), and two neighbouring columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils

ACC = plgpu.Layout._WGMMA_ACC_32BIT
OPERAND = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _f32() -> ir.Type:
    return ir.F32Type.get()


def _int(value: int, bits: int = 32) -> ir.Value:
    ty = ir.IntegerType.get_signless(bits)
    return llvm.ConstantOp(ty, ir.IntegerAttr.get(ty, value)).result


def _float(value: float) -> ir.Value:
    return llvm.ConstantOp(_f32(), ir.FloatAttr.get(_f32(), value)).result


def _asm(
    out: ir.Type, args: Sequence[ir.Value], text: str, spec: str, effects: bool = False
) -> ir.Value:
    return llvm.inline_asm(
        out, list(args), text, spec, asm_dialect=0, has_side_effects=effects
    )


# ------------------------------------------------------- arrays <-> scalar registers


def _scalars(array: fa.FragmentedArray) -> list[ir.Value]:
    """The registers of a float32 array, one scalar each."""
    out = []
    for reg in array.registers.flat:
        (size,) = ir.VectorType(reg.type).shape
        out += [llvm.extractelement(reg, _int(i)) for i in range(size)]
    return out


def _from_scalars(
    values: Sequence[ir.Value], shape: tuple[int, ...], layout: fa.FragmentedLayout
) -> fa.FragmentedArray:
    ty = ir.VectorType.get((1,), values[0].type)
    regs = np.empty(len(values), dtype=object)
    for i, v in enumerate(values):
        regs[i] = vector.broadcast(ty, v)
    return fa.FragmentedArray(
        _registers=regs.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=None,
    )


def _words(array: fa.FragmentedArray) -> list[ir.Value]:
    """The registers of a 16-bit array as 32-bit words, two columns each."""
    one = ir.VectorType.get((1,), _i32())
    return [
        llvm.extractelement(vector.bitcast(one, reg), _int(0))
        for reg in array.registers.flat
    ]


def _from_words(
    words: Sequence[ir.Value],
    shape: tuple[int, ...],
    layout: fa.FragmentedLayout,
    dtype: ir.Type,
) -> fa.FragmentedArray:
    one, pair = ir.VectorType.get((1,), _i32()), ir.VectorType.get((2,), dtype)
    regs = np.empty(len(words), dtype=object)
    for i, w in enumerate(words):
        regs[i] = vector.bitcast(pair, vector.broadcast(one, w))
    return fa.FragmentedArray(
        _registers=regs.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=None,
    )


def _tied(values: Sequence[ir.Value], text: str, kind: str = "f") -> list[ir.Value]:
    """Runs ``text`` as an instruction that every one of ``values`` passes through.

    LLVM may not move a use of a value above it, nor its computation below it.
    """
    n = len(values)
    struct = llvm.StructType.get_literal([v.type for v in values])
    spec = ",".join([f"={kind}"] * n + [str(i) for i in range(n)])
    out = _asm(struct, values, text, spec, effects=True)
    return [llvm.extractvalue(values[i].type, out, [i]) for i in range(n)]


# ---------------------------------------------------------------------------- wgmma


def _wgmma(
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
    tile = dict(swizzle=swizzle)
    (b_base, b_step), (_, b_group), b_fastest = mma_utils.create_descriptor(
        b,
        large_tile=(group, group),
        group_size=(group, n),
        logical_k_major=True,
        **tile,
    )
    in_regs = isinstance(a, list)
    if not in_regs:
        (a_base, a_step), (_, a_group), a_fastest = mma_utils.create_descriptor(
            a,
            large_tile=(64, group),
            group_size=(64, group),
            logical_k_major=False,
            **tile,
        )
    transposed = [] if in_regs else [int(a_fastest != mma_utils.Dim.K)]
    transposed.append(int(b_fastest != mma_utils.Dim.K))
    for i in range(k // 16):
        at, step = divmod(i * 16, group)

        def address(base, group_stride, instr_step, at=at, step=step):
            offset = (at * group_stride + (step // 16) * instr_step[1][0]) >> 4
            return llvm.add(
                base, _int(offset, 64), overflow_flags=llvm.IntegerOverflowFlags.none
            )

        a_args = a[4 * i : 4 * i + 4] if in_regs else [address(a_base, a_group, a_step)]
        b_arg = address(b_base, b_group, b_step)
        acc = _wgmma_k16(acc, a_args, b_arg, n, dtype, transposed)
    _asm(
        ir.Type.parse("!llvm.void"),
        [],
        "wgmma.commit_group.sync.aligned;",
        "",
        effects=True,
    )
    return acc


def _wgmma_k16(acc, a_args, b_arg, n, dtype, transposed) -> list[ir.Value]:
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
    struct = llvm.StructType.get_literal([_f32()] * count)
    out = _asm(struct, [*tied, *a_args, b_arg], text, ",".join(spec), effects=True)
    return [llvm.extractvalue(_f32(), out, [i]) for i in range(count)]


def _q_type(transforms: tuple, in_registers: bool):
    return OPERAND if in_registers else plgpu.RefType(transforms)


def _q_operand(q) -> ir.Value | list[ir.Value]:
    return _tied(_words(q), "", "r") if isinstance(q, fa.FragmentedArray) else q


def _swizzle(tile: ir.Value) -> int:
    return ir.MemRefType(tile.type).shape[-1] * 2


def issue_qk(tile_kv: int, transforms: tuple, q_in_registers: bool) -> Callable:
    """``f(q, k_tile) -> s``: starts ``s = q @ k.T``; read s only after a wait."""

    @plgpu.inline_mgpu(
        arg_types=(_q_type(transforms, q_in_registers), plgpu.RefType(transforms)),
        return_type=plgpu.ShapeDtypeStruct((64, tile_kv), jnp.float32, layout=ACC),
    )
    def f(_, q, k):
        q = _q_operand(q)
        _asm(
            ir.Type.parse("!llvm.void"),
            [],
            "wgmma.fence.sync.aligned;",
            "",
            effects=True,
        )
        k_t = utils.memref_transpose(k, (1, 0, 3, 2))
        s = _wgmma(None, q, k_t, _swizzle(k))
        return _from_scalars(s, (64, tile_kv), fa.WGMMA_LAYOUT_ACC_32BIT)

    return f


def issue_qk_pv(
    tile_kv: int,
    value_dim: int,
    k_transforms: tuple,
    v_transforms: tuple,
    q_in_registers: bool,
) -> Callable:
    """``f(q, k, acc, p, v) -> (s, acc)``: starts ``s = q @ k.T``, ``acc += p @ v``.

    One operation, because ptxas waits after every wgmma if anything touches the
    registers of the second product between the two.
    """

    @plgpu.inline_mgpu(
        arg_types=(
            _q_type(k_transforms, q_in_registers),
            plgpu.RefType(k_transforms),
            ACC,
            OPERAND,
            plgpu.RefType(v_transforms),
        ),
        return_type=(
            plgpu.ShapeDtypeStruct((64, tile_kv), jnp.float32, layout=ACC),
            plgpu.ShapeDtypeStruct((64, value_dim), jnp.float32, layout=ACC),
        ),
    )
    def f(_, q, k, acc, p, v):
        q = _q_operand(q)
        words = _tied(_words(p), "", "r")
        regs = _tied(_scalars(acc), "wgmma.fence.sync.aligned;")
        k_t = utils.memref_transpose(k, (1, 0, 3, 2))
        s = _wgmma(None, q, k_t, _swizzle(k))
        regs = _wgmma(regs, words, v, _swizzle(v))
        s = _from_scalars(s, (64, tile_kv), acc.layout)
        return s, _from_scalars(regs, (64, value_dim), acc.layout)

    return f


def issue_pv(value_dim: int, transforms: tuple) -> Callable:
    """``f(acc, p, v_tile) -> acc``: starts ``acc += p @ v``."""

    @plgpu.inline_mgpu(
        arg_types=(ACC, OPERAND, plgpu.RefType(transforms)),
        return_type=plgpu.ShapeDtypeStruct((64, value_dim), jnp.float32, layout=ACC),
    )
    def f(_, acc, p, v):
        words = _tied(_words(p), "", "r")
        regs = _tied(_scalars(acc), "wgmma.fence.sync.aligned;")
        regs = _wgmma(regs, words, v, _swizzle(v))
        return _from_scalars(regs, (64, value_dim), acc.layout)

    return f


def wait(shape: tuple[int, int], pending: int) -> Callable:
    """``f(x) -> x``: waits until at most ``pending`` newer products are in flight."""

    @plgpu.inline_mgpu(
        arg_types=(ACC,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ACC),
    )
    def f(_, x):
        text = f"wgmma.wait_group.sync.aligned {pending};"
        return _from_scalars(_tied(_scalars(x), text), shape, x.layout)

    return f


# -------------------------------------------------------------------------- softmax


def _binary(name: str) -> Callable:
    def f(x: ir.Value, y: ir.Value) -> ir.Value:
        return _asm(_f32(), [x, y], f"{name} $0, $1, $2;", "=f,f,f")

    return f


_max = _binary("max.NaN.f32")
_add = _binary("add.rn.f32")
_sub = _binary("sub.rn.f32")
_mul = _binary("mul.rn.f32")


def _fma(x, y, z):
    return _asm(_f32(), [x, y, z], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")


def _exp2(x):
    return _asm(_f32(), [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _shuffle(x: ir.Value, distance: int) -> ir.Value:
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
    return _asm(_f32(), [x], text, "=f,f", effects=True)


def _across_row(op: Callable, x: ir.Value) -> ir.Value:
    """Combines the four lanes that hold one row."""
    x = op(x, _shuffle(x, 1))
    return op(x, _shuffle(x, 2))


def _tree(op: Callable, values: Sequence[ir.Value], ways: int) -> ir.Value:
    parts = [functools.reduce(op, values[i::ways]) for i in range(ways)]
    return functools.reduce(op, parts)


def _hex(x: float) -> str:
    return "0f" + np.float32(x).tobytes()[::-1].hex().upper()


def _pack(lo: ir.Value, hi: ir.Value, name: str) -> ir.Value:
    return _asm(_i32(), [hi, lo], f"cvt.rn.{name}x2.f32 $0, $1, $2;", "=r,f,f")


def softmax_step(
    tile_kv: int,
    scale_log2: float,
    lazy: float,
) -> Callable:
    """``f(s, m, l) -> (p, m, l, alpha)``: one online-softmax step in base 2.

    ``p`` stays in float32: see `operand`.

    ``m`` is the running maximum of the scaled logits, ``l`` this lane's part of the row
    sum. With ``lazy`` above 0, m is raised only when the maximum has grown by more than
    that many powers of two, so that most steps need no rescaling (FlashAttention-4);
    p is then at most ``2**lazy``. ``m`` may be -inf (nothing allowed so far): then p
    and alpha are 0.
    """
    rows = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(
        arg_types=(ACC, ROW, ROW),
        return_type=(
            plgpu.ShapeDtypeStruct((64, tile_kv), jnp.float32, layout=ACC),
            rows,
            rows,
            rows,
        ),
    )
    def f(_, s, m, l):
        regs = _scalars(s)
        m_old, l_old = _scalars(m), _scalars(l)
        scale = _float(scale_log2)
        m_new, l_new, alpha, halves = [], [], [], []
        for h in range(2):
            mine = [v for i, v in enumerate(regs) if (i >> 1) & 1 == h]
            m_new.append(_tree(_max, mine, 4))
        for h in range(2):
            top = _mul(_across_row(_max, m_new[h]), scale)
            if lazy:
                # Greater or unordered: a NaN must become the maximum.
                text = (
                    "{ .reg .pred p; .reg .f32 t; sub.rn.f32 t, $1, $2; "
                    f"setp.gtu.f32 p, t, {_hex(lazy)}; selp.f32 $0, $1, $2, p; }}"
                )
                m_new[h] = _asm(_f32(), [top, m_old[h]], text, "=f,f,f")
            else:
                m_new[h] = _max(m_old[h], top)
        for h in range(2):
            text = (
                "{ .reg .pred p; setp.eq.f32 p, $1, 0fFF800000; "
                "neg.f32 $0, $1; selp.f32 $0, 0f00000000, $0, p; }"
            )
            minus_m = _asm(_f32(), [m_new[h]], text, "=&f,f")
            alpha.append(_exp2(_add(m_old[h], minus_m)))
            ps = []
            for v in (v for i, v in enumerate(regs) if (i >> 1) & 1 == h):
                x = _fma(v, scale, minus_m)
                ps.append(_exp2(x))
            halves.append(ps)
            l_new.append(_fma(l_old[h], alpha[h], _tree(_add, ps, 4)))
        p = [halves[(i >> 1) & 1][i >> 2 << 1 | i & 1] for i in range(len(regs))]
        p = _from_scalars(p, (64, tile_kv), s.layout)
        row = lambda x: _from_scalars(x, (64,), m.layout)
        return p, row(m_new), row(l_new), row(alpha)

    return f


def operand(tile_kv: int, dtype) -> Callable:
    """``f(p) -> p`` as a 16-bit operand of wgmma."""

    @plgpu.inline_mgpu(
        arg_types=(ACC,),
        return_type=plgpu.ShapeDtypeStruct((64, tile_kv), dtype, layout=OPERAND),
    )
    def f(_, p):
        return _packed(_scalars(p), (64, tile_kv), dtype)

    return f


def end_step(tile_kv: int, value_dim: int, dtype, lazy: bool) -> Callable:
    """``f(acc, p, alpha) -> (acc, p)``: waits for all products, scales the rows.

    p becomes an operand only here: registers of a product may not be written while
    another is in flight, or ptxas makes all of them wait.
    """

    @plgpu.inline_mgpu(
        arg_types=(ACC, ACC, ROW),
        return_type=(
            plgpu.ShapeDtypeStruct((64, value_dim), jnp.float32, layout=ACC),
            plgpu.ShapeDtypeStruct((64, tile_kv), dtype, layout=OPERAND),
        ),
    )
    def f(_, acc, p, alpha):
        regs, ps, a = _scalars(acc), _scalars(p), _scalars(alpha)
        both = _tied([*regs, *ps], "wgmma.wait_group.sync.aligned 0;")
        regs, ps = both[: len(regs)], both[len(regs) :]
        if lazy:
            regs = _rescale_if_needed(regs, a)
        else:
            regs = [_mul(v, a[(i >> 1) & 1]) for i, v in enumerate(regs)]
        out = _from_scalars(regs, (64, value_dim), acc.layout)
        return out, _packed(ps, (64, tile_kv), dtype)

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
    struct = llvm.StructType.get_literal([_f32()] * n)
    spec[:n] = ["=&f"] * n
    out = _asm(struct, [*regs, *alpha], "".join(lines), ",".join(spec), effects=True)
    return [llvm.extractvalue(_f32(), out, [i]) for i in range(n)]


def apply_mask(tile_kv: int, has_bits: bool) -> Callable:
    """``f(s, bits, n, t, part, q_left, kv_left) -> s``, -inf where forbidden.

    ``bits`` is ``[blocks, rows, words]`` in global memory, n the block, t the first row
    of this warpgroup and ``part`` the tile of keys in it; rows from q_left and keys
    from kv_left on do not exist.
    """
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
        arg_types=(ACC, plgpu.RefType(), *[scalar] * 5),
        return_type=plgpu.ShapeDtypeStruct((64, tile_kv), jnp.float32, layout=ACC),
    )
    def f(_, s, bits, *scalars):
        n, t, part, q_left, kv_left = (x.registers.item() for x in scalars)
        i32 = _i32()
        thread = _asm(i32, [], "mov.u32 $0, %tid.x;", "=r")
        text = (
            "{ .reg .b32 a, b; and.b32 a, $1, 127; shr.u32 b, a, 5; shl.b32 b, b, 4; "
            "and.b32 a, a, 31; shr.u32 a, a, 2; add.s32 $0, a, b; }"
        )
        row = _asm(i32, [thread], text, "=r,r")
        text = "{ .reg .b32 a; and.b32 a, $1, 3; shl.b32 $0, a, 1; }"
        col = _asm(i32, [thread], text, "=r,r")
        num_words = -(-tile_kv // 32)
        regs = _scalars(s)
        out = list(regs)
        for h in range(2):
            words = (
                _bit_words(bits, n, t, part, row, h, num_words) if has_bits else None
            )
            for j in range(tile_kv // 8):
                for e in range(2):
                    i = 4 * j + 2 * h + e
                    at = 8 * j + e
                    text = (
                        "{ .reg .pred p, q; .reg .b32 c, r; "
                        f"add.s32 c, $2, {at}; add.s32 r, $3, {8 * h}; "
                        "setp.lt.s32 p, c, $5; setp.lt.and.s32 p, r, $4, p; "
                    )
                    args, spec = [regs[i], col, row, q_left, kv_left], "=f,f,r,r,r,r"
                    if words is not None:
                        text += (
                            "shr.u32 r, $6, $2; "
                            f"and.b32 r, r, {1 << (at % 32)}; "
                            "setp.ne.and.s32 p, r, 0, p; "
                        )
                        args.append(words[at // 32])
                        spec += ",r"
                    text += "selp.f32 $0, $1, 0fFF800000, p; }"
                    out[i] = _asm(_f32(), args, text, spec)
        return _from_scalars(out, (64, tile_kv), s.layout)

    return f


def _bit_words(bits, n, t, part, row, half, num_words) -> list[ir.Value]:
    """The words of one row of a thread: bit ``s % 32`` of word ``s // 32``."""
    pointer = utils.memref_ptr(bits)
    _, rows, row_words = ir.MemRefType(bits.type).shape
    text = (
        "{ .reg .b64 a; .reg .b32 r; add.s32 r, $3, $4; "
        f"add.s32 r, r, {8 * half}; mad.wide.s32 a, $2, {rows * row_words * 4}, $1; "
        f"mad.wide.s32 a, r, {row_words * 4}, a; "
        f"mad.wide.s32 a, $5, {num_words * 4}, a; ld.global.nc.b32 $0, [a+OFFSET]; }}"
    )
    return [
        _asm(
            _i32(),
            [pointer, n, t, row, part],
            text.replace("OFFSET", str(4 * w)),
            "=r,l,r,r,r,r",
            effects=True,
        )
        for w in range(num_words)
    ]


def _packed(values: Sequence[ir.Value], shape: tuple[int, ...], dtype):
    name = "bf16" if jnp.dtype(dtype) == jnp.bfloat16 else "f16"
    element = ir.BF16Type.get() if name == "bf16" else ir.F16Type.get()
    words = [_pack(values[i], values[i + 1], name) for i in range(0, len(values), 2)]
    return _from_words(words, shape, fa.WGMMA_LAYOUT, element)


def finish(value_dim: int, dtype) -> Callable:
    """``f(acc, m, l) -> (out, lse)``: waits, divides by the row sum; natural log.

    A row that saw nothing (l = 0) gives 0 and -inf.
    """

    @plgpu.inline_mgpu(
        arg_types=(ACC, ROW, ROW),
        return_type=(
            plgpu.ShapeDtypeStruct((64, value_dim), dtype, layout=OPERAND),
            plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ROW),
        ),
    )
    def f(_, acc, m, l):
        regs = _tied(_scalars(acc), "wgmma.wait_group.sync.aligned 0;")
        inverse, lse = [], []
        for m_h, l_h in zip(_scalars(m), _scalars(l), strict=True):
            total = _across_row(_add, l_h)
            text = (
                "{ .reg .pred p; .reg .f32 t; setp.eq.f32 p, $1, 0f00000000; "
                "rcp.approx.ftz.f32 t, $1; selp.f32 $0, 0f00000000, t, p; }"
            )
            inverse.append(_asm(_f32(), [total], text, "=f,f"))
            text = (
                "{ .reg .f32 t; lg2.approx.f32 t, $2; add.f32 t, t, $1; "
                "mul.f32 $0, t, 0f3F317218; }"
            )
            lse.append(_asm(_f32(), [m_h, total], text, "=f,f,f"))
        out = [_mul(v, inverse[(i >> 1) & 1]) for i, v in enumerate(regs)]
        lse = _from_scalars(lse, (64,), m.layout)
        if jnp.dtype(dtype) == jnp.float32:
            pairs = _pairs(out, (64, value_dim))
            return pairs, lse
        return _packed(out, (64, value_dim), dtype), lse

    return f


def _pairs(values: Sequence[ir.Value], shape: tuple[int, ...]) -> fa.FragmentedArray:
    """A float32 array in the ordinary wgmma layout, two columns a register."""
    ty = ir.VectorType.get((2,), _f32())
    regs = np.empty(len(values) // 2, dtype=object)
    for i in range(len(regs)):
        regs[i] = vector.from_elements(ty, [values[2 * i], values[2 * i + 1]])
    return fa.FragmentedArray(
        _registers=regs.reshape(fa.WGMMA_LAYOUT.registers_shape(shape)),
        _layout=fa.WGMMA_LAYOUT,
        _is_signed=None,
    )


# ------------------------------------------------------------------- named barriers


def named_barrier(text: str) -> Callable:
    """``f(index)`` runs ``bar.<text> FIRST + index, 256`` for two warpgroups."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(()),), return_type=())
    def f(_, index):
        number = index.registers.item()
        _asm(
            ir.Type.parse("!llvm.void"),
            [number],
            f"bar.{text} $0, 256;",
            "r",
            effects=True,
        )

    return f
