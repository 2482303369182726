"""Attention of models, with its bias: the shapes, ours, and what models use today.

The shapes are those of AlphaFold 3 and its kin and of RFdiffusion3. Every contender
gets the same values, in its own layout, and its backward pass has all gradients: those
of q, k, v and of what the bias is made of. Third-party packages are imported when a
call is compiled, never before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import patterns
from jsparse.bench import _patterns
from jsparse.bench._contract import BLOCKS, MASKED, UNBIASED, Array, Peer
from jsparse.bench._jax_peers import JaxPeer, missing, no_gpu
from jsparse.bench._kinds import Case, Model, ModelCase, Pattern, of_blocks
from jsparse.bench._torch_peers import FLEX_DISTANCE
from jsparse.bias import DistanceBias
from jsparse.measure import Allowed, RowBias
from jsparse.nn import functional
from jsparse.nn._windows import KEYS, QUERIES, window_bias
from jsparse.ops import block_sparse_attention
from jsparse.patterns import BlockMask

_EXTENT = 30.0  # ångström, the standard deviation of random coordinates


class ModelPeer(JaxPeer):
    """A function of the inputs, and of data that has no gradient.

    Args:
        name: of the peer.
        attend: ``attend(*inputs, *data)``.
        data: arrays of the case.
        modules: that must be installed, beside JAX.
        install: what installs them.
        packages: distributions whose versions are recorded.
        on_gpu: whether it runs on a GPU only.
        computes: see `Peer.computes`.
        arrange: brings inputs and cotangent into the layout of ``attend``.
        rearrange: brings the output and dq back.
        refused: why it cannot take the case, or None if it can.
    """

    def __init__(
        self,
        name: str,
        attend: Callable[..., Array],
        data: tuple[Any, ...] = (),
        *,
        modules: tuple[str, ...] = (),
        install: str = "",
        packages: tuple[str, ...] = (),
        on_gpu: bool = False,
        computes: str = BLOCKS,
        arrange: Callable[..., tuple[Array, ...]] | None = None,
        rearrange: Callable[[Array], Array] | None = None,
        refused: str | None = None,
    ):
        self.name, self.packages, self.computes = name, packages, computes
        self._attend, self._data = attend, data
        self._modules, self._install, self._on_gpu = modules, install, on_gpu
        self._arrange, self._rearrange, self._refused = arrange, rearrange, refused

    def available(self) -> str | None:
        """Needs its modules, and maybe a GPU, for a case that it takes."""
        reason = self._refused or missing(self._modules, self._install)
        return reason or (no_gpu() if self._on_gpu else None)

    def describe(self, mask: BlockMask) -> Any:
        """Shapes of the data."""
        del mask
        return jax.tree_util.tree_map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._data
        )

    def prepare(self, mask: BlockMask) -> Any:
        """The data, on the device."""
        del mask
        return jax.device_put(self._data)

    def arrange(self, *inputs: Array) -> tuple[Array, ...]:
        """See `JaxPeer.arrange`."""
        return inputs if self._arrange is None else self._arrange(*inputs)

    def rearrange(self, x: Array) -> Array:
        """See `JaxPeer.rearrange`."""
        return x if self._rearrange is None else self._rearrange(x)

    def forward(self, *arrays: Any) -> Array:
        """See `JaxPeer.forward`."""
        *inputs, data = arrays
        return self._attend(*inputs, *data)


# ------------------------------------------------------------------------------- cases


def model_cases() -> list[Case]:
    """The shapes of models that are measured.

    Example:
        >>> [case.name for case in model_cases()][:2]
        ['triangle768_h4_d32', 'triangle128x4096_h4_d32']
    """
    wide: Any = {"bias_dtype": "float32"}
    return [
        triangle_case("triangle768_h4_d32", 768, 768, 4, 32),
        triangle_case("triangle128x4096_h4_d32", 128, 4096, 4, 32),
        padded_triangle_case("triangle768_h4_d32_padded", 768, 620, 4, 32),
        pair_case("pair2048_h16_d48", 2048, 16, 48),
        pair_case("pair4096_h16_d64", 4096, 16, 64),
        pair_case("pair768_h16_d24", 768, 16, 24),
        triangle_case("triangle768_h4_d32_bias32", 768, 768, 4, 32, **wide),
        pair_case("pair2048_h16_d48_bias32", 2048, 16, 48, **wide),
        pair_case("pair4096_h16_d64_bias32", 4096, 16, 64, **wide),
        windows_case("windows100k_h4_d32", 102_400, 4, 32),
        distance_case("graph32k_distance", 256, 16, 64),
        neighbors_case("neighbors27k_h4_d32", 27_626, 128, 4, 32),
        neighbors_case("neighbors27k_h4_d32_bias", 27_626, 128, 4, 32, bias=True),
    ]


def triangle_case(
    name: str,
    rows: int,
    length: int,
    heads: int,
    head_dim: int,
    dtype: str = "bfloat16",
    bias_dtype: str | None = None,
) -> ModelCase:
    """Triangle attention of some rows, which share a bias, of q's dtype by default."""

    def attend(q, k, v, bias, *, implementation):
        if rows == length:
            return functional.triangle_attention(
                q, k, v, bias, node="starting", implementation=implementation
            )
        return functional.pair_bias_attention(
            q, k, v, bias, implementation=implementation
        )

    def load() -> Model:
        shape = (rows, length, heads, head_dim)
        return Model(
            _every_pair(length, rows),
            _with_bias(dtype, shape, bias_dtype),
            attend,
            (*_dense_kernels(), _cuequivariance()),
        )

    kind = "bias" if bias_dtype is None else f"{bias_dtype} bias"
    about = f"triangle attention, {rows} rows of {length}, one {kind}"
    return ModelCase(name, about, heads, head_dim, dtype, load)


def padded_triangle_case(
    name: str,
    length: int,
    exist: int,
    heads: int,
    head_dim: int,
    dtype: str = "bfloat16",
) -> ModelCase:
    """Triangle attention of a padded crop: a traced mask says which tokens exist.

    Peers get it as a mask of keys, the same for all rows. What they compute for padding
    is not zero as ours is, but it is not looked at, and has no cotangent.
    """

    def attend(q, k, v, bias, exists, *, implementation):
        return functional.triangle_attention(
            *(q, k, v, bias),
            node="starting",
            mask=exists,
            implementation=implementation,
        )

    def load() -> Model:
        exists = np.arange(length) < exist
        masked: Any = {"data": (exists,), "computes": MASKED}
        shape = (length, length, heads, head_dim)
        return Model(
            _padded_pattern(exists),
            _shapes(dtype, shape, (heads, length, length)),
            attend,
            (*_dense_kernels(**masked), _cuequivariance(**masked)),
            data=(exists,),
        )

    about = f"triangle attention, {length} rows of {length}, {exist} exist by a mask"
    return ModelCase(name, about, heads, head_dim, dtype, load)


def pair_case(
    name: str,
    length: int,
    heads: int,
    head_dim: int,
    dtype: str = "bfloat16",
    bias_dtype: str | None = None,
) -> ModelCase:
    """Attention of tokens with a pair bias, of q's dtype by default."""

    def load() -> Model:
        return Model(
            _every_pair(length, 1),
            _with_bias(dtype, (1, length, heads, head_dim), bias_dtype),
            functional.pair_bias_attention,
            _dense_kernels(),
        )

    about = f"{length} tokens with a {bias_dtype or 'pair'} bias"
    return ModelCase(name, about, heads, head_dim, dtype, load)


def windows_case(
    name: str, length: int, heads: int, head_dim: int, dtype: str = "bfloat16"
) -> ModelCase:
    """AlphaFold 3's atom windows; our bias is on blocks, as a model can make it."""

    def arrange(q, k, v, bias, dout):
        blocks = patterns.device.atom_windows(length)
        return q, k, v, window_bias(bias[None], blocks), dout

    def load() -> Model:
        start = _window_starts(length)
        windows = (len(start), heads, QUERIES, KEYS)
        keys = start[:, None] + np.arange(KEYS)
        return Model(
            _window_pattern(length, start),
            _shapes(dtype, (length, heads, head_dim), windows),
            functional.atom_window_attention,
            (ModelPeer("einsum", functools.partial(_windows_einsum, keys)),),
            arrange=arrange,
        )

    about = f"{length:,} atoms in windows of 32 x 128, a bias for each window"
    return ModelCase(name, about, heads, head_dim, dtype, load)


def distance_case(
    name: str, rows: int, heads: int, head_dim: int, dtype: str = "bfloat16"
) -> ModelCase:
    """A graph's blocks with ``-slope[h] * distance``, computed from coordinates."""

    def load() -> Model:
        graph = of_blocks(_patterns.band_and_random(rows, 8, 16))
        mask = graph.mask

        def attend(q, k, v, slope, coords, *, implementation):
            bias = DistanceBias.linear(slope, coords)
            return block_sparse_attention(
                q, k, v, mask, bias=bias, implementation=implementation
            )

        def no_bias(q, k, v, slope, coords):
            del slope, coords
            return block_sparse_attention(q, k, v, mask)

        def draw(key):
            slope, coords = jax.random.split(key)
            return (
                jax.random.uniform(slope, (heads,)),
                _EXTENT * jax.random.normal(coords, (mask.q_len, 3)),
            )

        shape = (mask.q_len, heads, head_dim)
        others = [
            jax.ShapeDtypeStruct(n, jnp.float32) for n in ((heads,), (mask.q_len, 3))
        ]
        return Model(
            Pattern(mask, graph.allowed, bias=_distance_rows),
            (*_shapes(dtype, shape), *others),
            attend,
            (ModelPeer("no_bias", no_bias, computes=UNBIASED), FLEX_DISTANCE),
            draw=draw,
        )

    about = "band and far blocks, a bias by distance"
    return ModelCase(name, about, heads, head_dim, dtype, load, alone=True)


def neighbors_case(
    name: str,
    length: int,
    count: int,
    heads: int,
    head_dim: int,
    dtype: str = "bfloat16",
    *,
    bias: bool = False,
    capacity: int = 32,
) -> ModelCase:
    """Attention of atoms to their nearest, through traced lists."""

    def load() -> Model:
        coords = _patterns.ball(length)
        order = patterns.order(coords, 10.0, block_q=64, block_kv=64)
        index = _patterns.nearest(order.apply(coords), count)

        def attend(*arrays, implementation):
            q, k, v, *given, index = arrays
            return functional.neighbor_attention(
                *(q, k, v, index, *given),
                capacity=capacity,
                implementation=implementation,
            )

        added = ((heads, length, count),) if bias else ()
        return Model(
            _neighbor_pattern(index, bias),
            _shapes(dtype, (length, heads, head_dim), *added),
            attend,
            (ModelPeer("gather", _gather, (index,)),),
            data=(index,),
        )

    with_bias = ", a bias for each" if bias else ""
    about = f"{length:,} points, {count} nearest, lists traced{with_bias}"
    return ModelCase(name, about, heads, head_dim, dtype, load)


def _shapes(
    dtype: str, qkv: tuple[int, ...], *others: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of q, k, v, and of other inputs of the same dtype."""
    return tuple(
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in (qkv,) * 3 + others
    )


def _with_bias(
    dtype: str, qkv: tuple[int, ...], bias_dtype: str | None
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of q, k, v and a dense bias that a batch shares."""
    _, length, heads, _ = qkv
    bias = jax.ShapeDtypeStruct((heads, length, length), jnp.dtype(bias_dtype or dtype))
    return *_shapes(dtype, qkv), bias


# --------------------------------------------------- patterns, and the bias by its rows


def _every_pair(length: int, batch: int) -> Pattern:
    blocks = -(-length // _patterns.BLOCK)
    rows, columns = np.divmod(np.arange(blocks * blocks), blocks)
    mask = BlockMask.from_blocks(rows, columns, q_len=length)

    def allowed(rows: np.ndarray) -> Allowed:
        return (np.ones((len(rows), length), bool),)

    return Pattern(mask, allowed, batch=batch, bias=_dense_rows)


def _padded_pattern(exists: np.ndarray) -> Pattern:
    # Labels of its own, so that padding sees nothing and is seen by nobody.
    mask = patterns.segments(*(np.where(exists, 0, n) for n in (-1, -2)))

    def allowed(rows: np.ndarray) -> Allowed:
        return (exists[rows, None] & exists,)

    return Pattern(
        *(mask, allowed),
        batch=int(exists.sum()),
        bias=_dense_rows,
        exists=exists[:, None] & exists,
    )


def _dense_rows(inputs: Any, rows: np.ndarray) -> RowBias:
    return lambda head: np.asarray(inputs[3][head][rows])


def _window_starts(length: int) -> np.ndarray:
    """The first key of each window, moved so that all its keys exist."""
    first = np.arange(0, length, QUERIES) - (KEYS - QUERIES) // 2
    return np.clip(first, 0, length - KEYS)


def _window_pattern(length: int, start: np.ndarray) -> Pattern:
    mask = patterns.atom_windows(length, block_q=64, block_kv=64)

    def where(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys = start[rows // QUERIES, None] + np.arange(KEYS)
        return np.arange(len(rows))[:, None], keys

    def allowed(rows: np.ndarray) -> Allowed:
        out = np.zeros((len(rows), length), bool)
        out[where(rows)] = True
        return (out,)

    def bias(inputs: Any, rows: np.ndarray) -> RowBias:
        def of_head(head: int) -> np.ndarray:
            out = np.zeros((len(rows), length), np.float32)
            out[where(rows)] = inputs[3][rows // QUERIES, head, rows % QUERIES]
            return out

        return of_head

    return Pattern(mask, allowed, bias=bias)


def _distance_rows(inputs: Any, rows: np.ndarray) -> RowBias:
    slope, coords = (np.asarray(x, np.float64) for x in inputs[3:5])
    squared = sum((coords[rows, n, None] - coords[None, :, n]) ** 2 for n in range(3))
    distance = np.sqrt(squared)
    return lambda head: -slope[head] * distance


def _neighbor_pattern(index: np.ndarray, with_bias: bool) -> Pattern:
    length = len(index)
    mask = patterns.neighbors(index, block_q=64, block_kv=64)

    def allowed(rows: np.ndarray) -> Allowed:
        out = np.zeros((len(rows), length), bool)
        np.put_along_axis(out, index[rows], True, axis=1)
        return (out,)

    def bias(inputs: Any, rows: np.ndarray) -> RowBias:
        def of_head(head: int) -> np.ndarray:
            out = np.zeros((len(rows), length), np.float32)
            values = np.asarray(inputs[3][head][rows], np.float32)
            np.put_along_axis(out, index[rows], values, axis=1)
            return out

        return of_head

    return Pattern(mask, allowed, bias=bias if with_bias else None)


# ------------------------------------------------------------------------------- peers


def _dense_kernels(**options: Any) -> tuple[Peer, ...]:
    """Kernels and plain XLA for a dense bias ``[H, T, S]`` that a batch shares.

    ``options`` are those of `ModelPeer`; data is a mask of the keys ``[S]``.
    """
    tokamax: Any = {
        "modules": ("tokamax",),
        "install": "pip install tokamax",
        "packages": ("tokamax",),
        "on_gpu": True,
        **options,
    }
    return (
        ModelPeer("tokamax", functools.partial(_tokamax, "mosaic"), **tokamax),
        ModelPeer("tokamax_triton", functools.partial(_tokamax, "triton"), **tokamax),
        ModelPeer(
            *("cudnn", functools.partial(_jax_attention, "cudnn")),
            packages=("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
            on_gpu=True,
            **options,
        ),
        ModelPeer("einsum", functools.partial(_jax_attention, "xla"), **options),
    )


def _tokamax(implementation: str, *arrays: Array) -> Array:
    library: Any = importlib.import_module("tokamax")
    return _attended(library.dot_product_attention, implementation, *arrays)


def _jax_attention(implementation: str, *arrays: Array) -> Array:
    return _attended(jax.nn.dot_product_attention, implementation, *arrays)


def _attended(
    attention: Callable[..., Array],
    implementation: str,
    q: Array,
    k: Array,
    v: Array,
    bias: Array,
    exists: Array | None = None,
) -> Array:
    # They leave it to promotion that a bias is wider than q.
    with jax.numpy_dtype_promotion("standard"):
        return attention(
            *(q, k, v),
            bias=bias[None],
            mask=None if exists is None else exists[None, None, None],
            implementation=implementation,
        )


def _cuequivariance(**options: Any) -> Peer:
    """NVIDIA's triangle attention; rows before heads, heads before tokens.

    ``options`` are those of `ModelPeer`; data is a mask of the keys ``[S]``.
    """

    def attend(
        q: Array, k: Array, v: Array, bias: Array, exists: Array | bool = True
    ) -> Array:
        library: Any = importlib.import_module("cuequivariance_jax")
        mask = jnp.broadcast_to(exists, (1, q.shape[1], 1, 1, k.shape[3]))
        return library.triangle_attention(
            q, k, v, bias, mask, float(q.shape[-1]) ** -0.5
        )[0]

    def turn(x: Array) -> Array:
        return x.swapaxes(1, 2)[None]

    def arrange(q, k, v, bias, dout):
        # Its bias is float32, whatever q, k and v are.
        wide = bias[None, None].astype(jnp.float32)
        return turn(q), turn(k), turn(v), wide, turn(dout)

    return ModelPeer(
        *("cuequivariance", attend),
        modules=("cuequivariance_jax", "cuequivariance_ops_jax"),
        install="pip install cuequivariance-jax cuequivariance-ops-jax-cu13",
        packages=("cuequivariance-jax", "cuequivariance-ops-jax-cu13"),
        on_gpu=True,
        arrange=arrange,
        rearrange=lambda x: x[0].swapaxes(1, 2),
        **options,
    )


def _windows_einsum(
    keys: np.ndarray, q: Array, k: Array, v: Array, bias: Array
) -> Array:
    """Gathers the keys of every window, as AlphaFold 3 does."""
    shape = (len(keys), QUERIES, *q.shape[1:])
    queries = jnp.pad(q, ((0, shape[0] * QUERIES - len(q)), (0, 0), (0, 0)))
    logits = jnp.einsum(
        "wqhd,wkhd->whqk",
        *(queries.reshape(shape), k[keys]),
        preferred_element_type=jnp.float32,
    )
    logits = logits * q.shape[-1] ** -0.5 + bias.astype(jnp.float32)
    weights = jax.nn.softmax(logits, -1).astype(v.dtype)
    out = jnp.einsum("whqk,wkhd->wqhd", weights, v[keys])
    return out.reshape(-1, *q.shape[1:])[: len(q)]


def _gather(*arrays: Array) -> Array:
    """Gathers the keys of every query, as RFdiffusion3 does where memory is short."""
    q, k, v, *bias, index = arrays
    logits = jnp.einsum(
        "thd,tnhd->htn", q, k[index], preferred_element_type=jnp.float32
    )
    logits = logits * q.shape[-1] ** -0.5
    for one in bias:
        logits = logits + one.astype(jnp.float32)
    weights = jax.nn.softmax(logits, -1).astype(v.dtype)
    return jnp.einsum("htn,tnhd->thd", weights, v[index])


MODEL_PEERS = (
    *("tokamax", "tokamax_triton", "cudnn", "cuequivariance", "einsum"),
    *("gather", "no_bias", "flex"),
)
"""Names of all peers of model cases."""
