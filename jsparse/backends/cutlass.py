"""Block-sparse attention through the CUDA kernels of ``ffi/``, on Hopper GPUs.

They are in a shared library that a plain wheel does not have; it is loaded, and its
handlers registered with JAX, on first use. What the kernels take is prepared as for the
Mosaic kernels.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.backends import _hopper, _shared_object, _turns, mosaic_gpu
from jsparse.backends._contract import HostPattern, Operands, Problem
from jsparse.bias import Bias
from jsparse.pallas_kernels.mosaic_gpu import _bias
from jsparse.pallas_kernels.mosaic_gpu._elements import (
    ColumnInterval,
    Elements,
    RowInterval,
    SameLabel,
    Within,
)
from jsparse.pallas_kernels.mosaic_gpu._manual_axes import per_device
from jsparse.pallas_kernels.mosaic_gpu._schedule import Blocks, Schedule

Array = Any

name = "cutlass"
differentiable = False

DTYPES = ("bfloat16", "float16")
HEAD_SIZES = (32, 64, 128)
"""Those of the kernels, whose arrays may have less: a multiple of the step."""
HEAD_SIZE_STEP = 8
BLOCKS = {"block_q": (64, 128), "block_kv": (64, 128)}
RULES = (SameLabel, RowInterval, ColumnInterval, Within)
"""In the order of ``jsparse_rule_kind``."""
MOST_RULES = 4
BIASES = ("dense", "block")
WIDEST_OF_ALL = {0: 128, 16: 64}
"""Head sizes of the kernels of all gradients, by the bits of a bias's values."""

LIBRARY = "libjsparse_cuda.so"
TARGETS = (
    *("jsparse_forward", "jsparse_backward_dq", "jsparse_backward_dkv"),
    "jsparse_backward",
)
FLAGGED_ROW = 1 << 29
"""As ``JSPARSE_FLAGGED_ROW``."""

_NOTHING: Any = jax.ShapeDtypeStruct((0,), jnp.float32)
"""A result that is not asked for."""

_NOT_BUILT = (
    "this jsparse was built without its CUDA kernels; build them with JSPARSE_CUDA=1, "
    "as ffi/README.md says"
)


def why_not(problem: Problem) -> str | None:
    """What the kernels were built and tested for."""
    if _library_file() is None:
        return _NOT_BUILT
    if reason := _hopper.wrong_device(problem):
        return reason
    library = _library()
    if isinstance(library, str):
        return library
    return _not_taken(problem)


def _not_taken(problem: Problem) -> str | None:
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype}; expected {' or '.join(DTYPES)}"
    size = max(problem.head_dim, problem.value_dim)
    if size > HEAD_SIZES[-1]:
        return f"head size {size}; expected at most {HEAD_SIZES[-1]}"
    for side, taken in BLOCKS.items():
        size = getattr(problem, side)
        if size not in taken:
            return f"{side}={size}; expected {' or '.join(map(str, taken))}"
    if len(problem.rules) > MOST_RULES:
        return f"{len(problem.rules)} element rules; expected at most {MOST_RULES}"
    if problem.bias not in (None, *BIASES):
        return f"a {problem.bias} bias; expected {' or '.join(BIASES)}, or none"
    return None


def bias_bits(problem: Problem) -> int:
    """Of a value of the problem's bias, as the kernels read it; 0 for none."""
    if problem.bias not in BIASES:
        return 0
    short = problem.bias_dtype == problem.dtype and not problem.bias_by_key
    return 16 if short else 32


def gradient_launches(problem: Problem) -> int:
    """Launches of the backward pass: one, or dq and then dk and dv."""
    mean, blocks = problem.mean_blocks, (problem.block_q, problem.block_kv)
    dim = max(problem.head_dim, problem.value_dim)
    widest = WIDEST_OF_ALL.get(bias_bits(problem), 0)
    if mean is None or blocks != (128, 128) or dim > widest:
        return 2
    split, lists = 1 if dim <= 64 else 2, problem.batch * problem.num_heads
    tiles = lists * -(-problem.q_len // problem.block_q) * split
    return 1 if _turns.worth(round(mean * lists) * split, tiles) else 2


# ----------------------------------------------------------------------- entry points


def forward(
    operands: Operands, scale: float, pattern: HostPattern | None
) -> tuple[Array, Array]:
    """See `Backend.forward`."""
    call = _hopper.Call.of(operands, scale, pattern, HEAD_SIZE_STEP)
    q, k, v = _pad_heads(call.q, call.k, call.v)
    lists, bad = call.rows, call.bad_keys(v)
    items, bias = _Items.of(call), _BiasOperands.of(call, "kv")
    if bias.values.size and bias.values.dtype != q.dtype:
        bias = bias._replace(values=bias.values.astype(jnp.float32))
    walkers = _walkers(q.shape[-1], items, call.blocks[1], bias)
    if items.tile_q > call.mask.block_q:
        lists = _paired(lists, call.mask.num_kv_blocks)
    schedule = call.schedule(
        lists,
        _hopper.num_multiprocessors() * walkers,
        tiles=max(call.mask.block_q // items.tile_q, 1),
    )
    batch, q_len, heads, dim = q.shape
    parts = _parts(schedule, items.tile_q, dim)
    out, lse, *_ = _launch(
        "jsparse_forward",
        (q, k, v),
        (*call.entries(lists, bad, call.blocks[1]), call.elements(bad), schedule),
        bias[:3],
        [
            q,
            jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32),
            *(parts, jax.ShapeDtypeStruct(parts.shape[:2], jnp.float32)),
        ],
        **_attributes(call),
        tile_q=np.int32(items.tile_q),
        share=items.share,
        bias_inner=np.int32(bias.inner),
    )
    out = out[..., : operands.v.shape[-1]]
    return out.reshape(*call.batch, *out.shape[1:]), lse.reshape(
        *call.batch, *lse.shape[1:]
    )


def backward(
    operands: Operands,
    scale: float,
    pattern: HostPattern | None,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
    bias_gradient: bool,
) -> tuple[Array, Array, Array, Bias | None]:
    """See `Backend.backward`. From ``out`` and ``lse``, whoever computed them."""
    call = _hopper.Call.of(operands, scale, pattern, HEAD_SIZE_STEP)
    of_queries = call.statistics(out, lse, dout, dlse)
    dout = call.flat(dout)
    arrays = (*_pad_heads(call.q, call.k, call.v, dout), *of_queries[:2])
    dim = arrays[0].shape[-1]
    bias: Any = call.bias if bias_gradient else None
    if split := _one_launch(call, dim):
        dq, dk, dv, own = _all_gradients(call, arrays, of_queries.bad, bias, split)
        by_key = None
    else:
        dq, dk, dv, by_key, own = _two_launches(call, arrays, of_queries.bad, bias)
    if call.sign != 1:
        dq = dq * jnp.asarray(call.sign, dq.dtype)
    dq, dk, dv = (
        call.sum_shared(g, x) for g, x in zip((dq, dk, dv), operands[:3], strict=True)
    )
    if bias is None:
        return dq, dk, dv, None
    # The gradient of a bias that is shared has one kernel, which is Mosaic's.
    padded = map(_hopper.pad_dim, (call.q, call.k, call.v, dout))
    arrays = (*padded, *of_queries[:2])
    gradient = mosaic_gpu.streamed_bias_gradient
    return dq, dk, dv, gradient(call, arrays, by_key, own, operands.bias)


# ----------------------------------------------------------------- backward launches


def _one_launch(call: _hopper.Call, dim: int) -> int:
    """Tiles of a block of queries for the kernel of all gradients; 0: two launches.

    The order in which its steps add to dq is made on the host, and has its limits.
    """
    block_q, block_kv = call.blocks
    tile = _loaded().jsparse_backward_tile(dim, block_q, block_kv)
    known = call.columns.known
    bias: Any = call.bias
    bits = 0 if bias is None else 16 if bias.values.dtype == call.q.dtype else 32
    if known is None or tile == 0 or dim > WIDEST_OF_ALL.get(bits, 0):
        return 0
    split = block_q // tile
    batch, _, heads, _ = call.q.shape
    steps = _turns.num_steps(*known, batch, heads, split)
    tiles = batch * heads * call.mask.num_q_blocks * split
    return split if _turns.worth(steps, tiles) else 0


def _all_gradients(
    call: _hopper.Call, arrays: tuple[Array, ...], bad: Array, bias: Any, split: int
) -> tuple[Array, Array, Array, Array | None]:
    """dq, dk and dv; and the gradient of ``bias``, if nobody shares it."""
    q, k, v = arrays[:3]
    own = _bias.own_gradient(bias, *q.shape[:3:2])
    operands = _BiasOperands.of(call, "q")
    (block_q, block_kv), dim, lists = call.blocks, q.shape[-1], call.columns
    assert lists.known is not None
    batch, _, heads, _ = q.shape
    schedule, turns = _turns.with_turns(
        call.schedule(lists, _hopper.num_multiprocessors(), heads // k.shape[2]),
        *lists.known,
        (batch, heads, call.mask.num_q_blocks * split),
        split,
        None if call.bias is None else _turns.SUMS_BESIDE_A_BIAS,
    )
    partial, full = call.entries(lists, bad, block_q)
    bad_keys = np.zeros(0, np.int32)
    if schedule.any_partial:
        bad_keys = call.bad_keys(k)
        rows = bad_keys.reshape(-1, call.mask.num_kv_blocks, block_kv).any((0, 2))
        partial = partial + FLAGGED_ROW * rows.astype(jnp.int32)[:, None]
    parts = _parts(schedule, block_kv, dim)
    most = max(turns.num_sums, 1)
    columns = next(size for size in HEAD_SIZES if size >= dim)
    sums = jax.ShapeDtypeStruct((most, block_q // split, columns), jnp.float32)
    taken = jax.ShapeDtypeStruct((most,), jnp.int32)
    dq, dk, dv, *_, dbias = _launch(
        "jsparse_backward",
        arrays,
        (partial, full, call.transposed_elements(bad), schedule),
        (*operands[:3], turns.turns, turns.sums_of, bad_keys),
        [q, k, v, parts, parts, sums, taken, _NOTHING if own is None else own],
        **_attributes(call),
        bias_inner=np.int32(operands.inner),
    )
    return dq, dk, dv, None if own is None else dbias


def _two_launches(
    call: _hopper.Call, arrays: tuple[Array, ...], bad_queries: Array, bias: Any
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """dq; dk and dv; what they find of the gradient of ``bias``.

    That is by key, ``[B, S, 1, H]``, or of a bias that nobody shares.
    """
    q, k, v = arrays[:3]
    (block_q, block_kv), dim = call.blocks, q.shape[-1]
    own = _bias.own_gradient(bias, *q.shape[:3:2])

    bad = call.bad_keys(k)
    workers = _backward_workers(dim, block_q, block_kv, keys=False)
    lists, operands = call.rows, _BiasOperands.of(call, "kv")
    schedule = call.schedule(lists, workers)
    dq, _, dbias = _launch(
        "jsparse_backward_dq",
        arrays,
        (*call.entries(lists, bad, block_kv), call.elements(bad), schedule),
        operands[:3],
        [q, _parts(schedule, block_q, dim), _NOTHING if own is None else own],
        **_attributes(call),
        bias_inner=np.int32(operands.inner),
    )

    bad, lists = bad_queries, call.columns
    workers = _backward_workers(dim, block_kv, block_q, keys=True)
    schedule = call.schedule(lists, workers, q.shape[2] // k.shape[2])
    parts, of_key = _parts(schedule, block_kv, dim), [_NOTHING, _NOTHING]
    operands = _BiasOperands.of(call, "q")
    if isinstance(bias, _bias.KeyBias):
        shapes = (*k.shape[:2], q.shape[2]), parts.shape[:2]
        of_key = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    dk, dv, _, _, by_key, _ = _launch(
        "jsparse_backward_dkv",
        arrays,
        (*call.entries(lists, bad, block_q), call.transposed_elements(bad), schedule),
        operands[:3],
        [k, v, parts, parts, *of_key],
        **_attributes(call),
        bias_inner=np.int32(operands.inner),
    )
    by_key = jnp.moveaxis(by_key[:, None], -1, 1) if by_key.size else None
    return dq, dk, dv, by_key, None if own is None else dbias


# ----------------------------------------------------------------------- the launches


class _Items(NamedTuple):
    """What the items of a launch are: query rows each, and who computes one."""

    tile_q: int
    share: bool

    @classmethod
    def of(cls, call: _hopper.Call) -> _Items:
        """Whole rows of blocks, each by its own team.

        Unless, halved to 64 rows, they are no more than the multiprocessors: then all
        warpgroups of one compute each together, if there is no bias.
        """
        tiles = call.mask.num_q_blocks * call.mask.block_q // 64
        few = math.prod(call.q.shape[::2]) * tiles <= _hopper.num_multiprocessors()
        if few and call.bias is None:
            return cls(64, share=True)
        if (
            _all_blocks(call)
            and isinstance(call.bias, _bias.DenseBias)
            and max(call.dims) <= 32
        ):
            return cls(256, share=False)
        return cls(call.mask.block_q, share=False)


def _all_blocks(call: _hopper.Call) -> bool:
    """Whether every row is known to list all blocks, tested for lengths at most."""
    mask, known = call.mask, call.rows.known
    if known is None or mask.bits is not None or mask.rules or mask.block_q != 128:
        return False
    partial, full = (np.asarray(blocks.count) for blocks in known)
    return mask.num_q_blocks > 1 and bool(np.all(partial + full == mask.num_kv_blocks))


def _paired(lists: _hopper.Lists, num_columns: int) -> _hopper.Lists:
    """Lists of every two rows together, which list all blocks each.

    A block is partial where it is in either.
    """
    assert lists.known is not None
    count, column = map(np.asarray, lists.known[0])
    valid = np.arange(column.shape[-1]) < count[..., None]
    listed = np.zeros((*count.shape, num_columns + 1), bool)
    np.put_along_axis(listed, np.where(valid, column, num_columns), True, -1)
    firsts = np.arange(0, count.shape[-1], 2)
    partial = np.logical_or.reduceat(listed[..., :-1], firsts, axis=-2)

    def blocks(listed: np.ndarray) -> Blocks:
        count = listed.sum(-1, dtype=np.int32)
        order = np.argsort(~listed, axis=-1, kind="stable")[..., : count.max()]
        return Blocks(count, order.astype(np.int32))

    both = blocks(partial), blocks(~partial)
    return _hopper.Lists(*both, both)


class _BiasOperands(NamedTuple):
    """A bias for a launch; arrays without elements stand for none.

    Attributes:
        values: ``[b, H or 1, T or 1, S or more]``, or on blocks ``[b, H or 1, n,
            block_q, block_kv]``.
        partial: which block of ``values`` each entry of the partial lists is.
        full: the same of the full lists.
        inner: batch entry n reads index ``n // inner % b``.
    """

    values: Array
    partial: Array
    full: Array
    inner: int

    @classmethod
    def of(cls, call: _hopper.Call, side: str) -> _BiasOperands:
        """For a launch over the lists ``"kv"``, by query block, or ``"q"``."""
        bias: Any = call.launched(side)
        none = np.zeros(0, np.int32)
        if bias is None:
            return cls(none, none, none, 1)
        if isinstance(bias, _bias.KeyBias):
            return cls(bias.values[:, :, None], none, none, bias.inner)
        partial = full = none
        if isinstance(bias, _bias.BlockBias) and bias.numbers is not None:
            partial, full = (x.reshape(-1) for x in bias.numbers)
        return cls(bias.values, partial, full, bias.inner)


def _pad_heads(*arrays: Array) -> list[Array]:
    """Zeros up to the head size of the widest, which is rounded already."""
    size = max(x.shape[-1] for x in arrays)
    return [
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]) for x in arrays
    ]


def _attributes(call: _hopper.Call) -> dict[str, Any]:
    """Those that all handlers have."""
    block_q, block_kv = map(np.int32, call.blocks)
    scale = np.float32(call.scale)
    return {"block_q": block_q, "block_kv": block_kv, "scale": scale}


def _parts(schedule: Schedule, rows: int, dim: int) -> jax.ShapeDtypeStruct:
    """The workspace of split rows."""
    shape = (max(schedule.num_slots, 1), rows, dim)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _launch(
    target: str,
    arrays: tuple[Array, ...],
    pattern: tuple[Array, Array, Elements, Schedule],
    beside: Sequence[Array],
    results: Sequence[Any],
    **attributes: Any,
) -> Sequence[Array]:
    """Results of the shapes and dtypes of ``results``, from a handler in ``ffi/``.

    ``pattern`` is lists of partial and of full blocks, the test of elements and the
    schedule; ``beside``, a bias or turns; the headers in ``ffi/include`` have the
    shapes.
    """
    partial, full, elements, schedule = pattern
    none = np.zeros(0, np.int32)
    lengths, bad, bits, rules = elements if schedule.any_partial else (None, *[()] * 3)
    operands = (
        *(*arrays, partial.reshape(-1), full.reshape(-1)),
        *(schedule.count, schedule.items, schedule.split_rows, schedule.split_slots),
        bad if len(bad) else none,
        none if lengths is None else lengths.reshape(-1, 2),
        none if bits is None or not len(bits) else bits,
        *beside,
        *(x for rule in rules for x in rule),
    )
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
    kinds = np.array([RULES.index(type(rule)) for rule in rules], np.int32)

    def kernel(*operands: Array) -> Sequence[Array]:
        run = jax.ffi.ffi_call(target, shapes)
        return run(*operands, **attributes, rules=kinds)

    return per_device(kernel)(*map(_on_device, operands))


def _on_device(x: Array) -> Array:
    """An array of JAX; one without elements stands for none.

    That one is made where it is used: XLA's partitioner crashes on a constant without
    elements that `jax.shard_map` closes over.
    """
    return jnp.asarray(x) if x.size else jnp.zeros(x.shape, jnp.int32)


# ------------------------------------------------------------------------ the library


def library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    return _NOT_BUILT if _library_file() is None else _library()


def _library_file() -> Path | None:
    """Where the shared library is, if this installation has one."""
    spec = importlib.util.find_spec("jsparse")
    folders = spec.submodule_search_locations if spec is not None else None
    places = (Path(folder) / "_lib" / LIBRARY for folder in folders or ())
    return next((place for place in places if place.exists()), None)


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, its handlers registered with JAX, or why it will not load.

    A library that was built for a newer jaxlib must not be registered: JAX may then
    not start at all.
    """
    path = _library_file()
    assert path is not None
    if wrong := _shared_object.unknown_build(path):
        return f"{path} will not load: {wrong}; build it again"
    built = json.loads(path.with_name("build.json").read_text("utf-8"))["jaxlib"]
    found = metadata.version("jaxlib")
    if _numbers(found) < _numbers(built):
        return (
            f"{path} was built for jaxlib {built} and will not load into jaxlib "
            f"{found}; install jaxlib {built} or newer, or build it again"
        )
    if wrong := _shared_object.no_library(path):
        return f"{path} will not load: {wrong}; build it again"
    try:
        library = ctypes.CDLL(str(path))
        handlers = {x: jax.ffi.pycapsule(library[f"{x}_ffi"]) for x in TARGETS}
    except (OSError, AttributeError) as err:  # the latter of a library of another time
        return f"{path} will not load: {err}; build it again"
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, handler, platform="CUDA")
    return library


def _numbers(version: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", version)[:3]]


def _walkers(head_dim: int, items: _Items, block_kv: int, bias: _BiasOperands) -> int:
    """Walkers of a forward schedule on one multiprocessor."""
    size = bias.values.dtype.itemsize if bias.values.size else 0
    sizes = (head_dim, items.tile_q, block_kv, items.share, size)
    return _loaded().jsparse_forward_walkers(*sizes)


def _backward_workers(head_dim: int, rows: int, columns: int, *, keys: bool) -> int:
    """Walkers of a schedule of dq, or of dk and dv, on all multiprocessors."""
    walkers = _loaded().jsparse_backward_walkers(keys, head_dim, rows, columns)
    return _hopper.num_multiprocessors() * walkers


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise NotImplementedError(library)
    return library
