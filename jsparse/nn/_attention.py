"""Block-sparse attention as a Flax layer, and as a part of Flax's own layer.

Projections, initialisers, dtypes and parameter names are those of
`flax.nnx.MultiHeadAttention`, so that weights and habits carry over; what lies between
the projections is `jsparse.block_sparse_attention`. Users build models from these.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn

from jsparse._ranks import promotes_ranks
from jsparse.bias import Bias
from jsparse.ops import block_sparse_attention
from jsparse.ops._attention import Implementation
from jsparse.ops._checks import check_implementation
from jsparse.patterns import BlockMask

Array = Any
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class BlockSparseAttention(nnx.Module):
    """Multi-head attention over the blocks and elements that a `BlockMask` allows.

    ``out(gate * attention(query(x_q), key(x_k), value(x_v)))`` with
    ``gate = sigmoid(gate(x_q))``, or 1 without ``use_gate``.

    The mask belongs to the call, not to the layer. Closed over by a jitted function,
    the pattern is static; passed into it, one compilation serves every mask of a bucket
    (see `BlockMask.pad_to`). To keep a mask in a module of your own, assign
    ``nnx.data(mask)``.

    Args:
        num_heads: number of query heads H.
        in_features: size of ``inputs_q``.
        qkv_features: size of all query heads together, a multiple of H; ``in_features``
            if not given.
        out_features: size of the result; ``in_features`` if not given.
        num_kv_heads: number of key and value heads K, a divisor of H: each serves
            ``H / K`` query heads (grouped-query attention). H if not given.
        in_kv_features: size of ``inputs_k`` and ``inputs_v``; ``in_features`` if not
            given.
        use_gate: multiply the heads' outputs by a sigmoid gate computed from
            ``inputs_q``. It starts at the same value everywhere: kernel 0, bias 1.
        normalize_qk: layer-normalise each head of query and key, with a learned scale.
        dtype: the dtype to compute in; by default that of inputs and parameters.
            Softmax and sums are float32 at least, and ``bias`` keeps its own dtype.
        param_dtype: the dtype of the parameters.
        precision: of the projections, see `jax.lax.Precision`. Attention computes
            float32 in float32 unless ``jax_default_matmul_precision`` is set.
        kernel_init: initialiser of the kernels of query, key and value.
        out_kernel_init: of the kernel of out; ``kernel_init`` if not given.
        bias_init: of the biases of query, key and value.
        out_bias_init: of the bias of out; ``bias_init`` if not given.
        use_bias: whether the projections add a bias.
        implementation: the backend, see `jsparse.block_sparse_attention`.
        rngs: makes the initial parameters (stream ``params``).

    Attributes:
        query: `nnx.LinearGeneral`, kernel ``[in_features, H, D]``.
        key: kernel ``[in_kv_features, K, D]``.
        value: kernel ``[in_kv_features, K, D]``.
        gate: kernel ``[in_features, H, D]``, or None.
        out: kernel ``[H, D, out_features]``.
        query_ln: `nnx.LayerNorm` over D, or None.
        key_ln: `nnx.LayerNorm` over D, or None.

    Raises:
        TypeError: for sizes that are not integers.
        ValueError: for sizes below 1, heads that do not divide, or an unknown
            implementation.

    Example:
        >>> import jax.numpy as jnp
        >>> import jsparse.patterns as patterns
        >>> from flax import nnx
        >>> from jsparse.nn import BlockSparseAttention
        >>> layer = BlockSparseAttention(4, 32, use_gate=True, rngs=nnx.Rngs(0))
        >>> mask = patterns.window(200, left=9, right=9, block_q=64, block_kv=64)
        >>> layer(jnp.ones((2, 200, 32)), mask=mask).shape
        (2, 200, 32)
        >>> layer.query.kernel.shape, layer.out.kernel.shape
        ((32, 4, 8), (4, 8, 32))

    References:
        flax.nnx.MultiHeadAttention for names and defaults. The gate and its start:
        Jumper et al., AlphaFold, 2021. Normalised queries and keys: Dehghani et al.,
        ViT-22B, 2023. Grouped queries: Ainslie et al., GQA, 2023.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        use_gate: bool = False,
        normalize_qk: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = _BIAS_INIT,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ):
        self.num_heads = _size("num_heads", num_heads)
        self.in_features = _size("in_features", in_features)
        self.qkv_features = _size("qkv_features", qkv_features, in_features)
        self.out_features = _size("out_features", out_features, in_features)
        self.num_kv_heads = _size("num_kv_heads", num_kv_heads, num_heads)
        self.in_kv_features = _size("in_kv_features", in_kv_features, in_features)
        _check_heads(self.num_heads, self.num_kv_heads, self.qkv_features)
        check_implementation(implementation)
        self.head_dim = self.qkv_features // self.num_heads
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation: Implementation = implementation

        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        linear = functools.partial(
            nnx.LinearGeneral,
            **dtypes,
            use_bias=use_bias,
            precision=precision,
            rngs=rngs,
        )
        project = functools.partial(
            linear, kernel_init=kernel_init, bias_init=bias_init
        )
        norm = functools.partial(
            nnx.LayerNorm, self.head_dim, **dtypes, use_bias=False, rngs=rngs
        )
        q_heads = (self.num_heads, self.head_dim)
        kv_heads = (self.num_kv_heads, self.head_dim)
        self.query = project(self.in_features, q_heads)
        self.key = project(self.in_kv_features, kv_heads)
        self.value = project(self.in_kv_features, kv_heads)
        self.query_ln = nnx.data(norm() if normalize_qk else None)
        self.key_ln = nnx.data(norm() if normalize_qk else None)
        self.out = linear(
            q_heads,
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
        )
        # Last, so that the other parameters start the same with and without a gate.
        gate_init = {
            "kernel_init": nnx.initializers.zeros_init(),
            "bias_init": nnx.initializers.ones_init(),
        }
        gate = linear(self.in_features, q_heads, **gate_init) if use_gate else None
        self.gate = nnx.data(gate)

    @promotes_ranks
    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: BlockMask,
        bias: Bias | None = None,
    ) -> Array:
        """Projects, attends, gates and projects back.

        Args:
            inputs_q: ``[*B, T, in_features]``.
            inputs_k: ``[*B, S, in_kv_features]``; ``inputs_q`` if not given.
            inputs_v: ``[*B, S, in_kv_features]``; ``inputs_k`` if not given.
            mask: which blocks and elements are computed, built for T and S. A query
                that sees nothing gives the bias of ``out``.
            bias: added to the scaled logits: ``[*B or 1, H or 1, T or 1, S]``, a
                `BlockBias` or a `DistanceBias`; or a `ScoreFunction` of them.

        Returns:
            ``[*B, T, out_features]``.

        Raises:
            TypeError: for a mask that is not a `BlockMask`.
            ValueError: for ``inputs_v`` without ``inputs_k``, or shapes that do not fit
                the layer, the mask or the bias.
        """
        if not isinstance(mask, BlockMask):
            raise TypeError(
                f"BlockSparseAttention: mask is a {type(mask).__name__}; expected a "
                "BlockMask. Build one with jsparse.patterns, e.g. patterns.radius("
                "coords, 10.0), or patterns.from_dense(mask) of a boolean [T, S] array."
            )
        if inputs_k is None and inputs_v is not None:
            raise ValueError(
                "BlockSparseAttention: inputs_v is given without inputs_k; expected "
                "both. Pass what serves as both as inputs_k alone."
            )
        keys: Array = inputs_q if inputs_k is None else inputs_k
        values: Array = keys if inputs_v is None else inputs_v
        _check_inputs("inputs_q", inputs_q, "T", "in_features", self.in_features)
        for name, x in (("inputs_k", keys), ("inputs_v", values)):
            _check_inputs(name, x, "S", "in_kv_features", self.in_kv_features)

        query, key, value = self.query(inputs_q), self.key(keys), self.value(values)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        query, key, value = promote_dtype((query, key, value), dtype=self.dtype)
        heads = block_sparse_attention(
            query, key, value, mask, bias=bias, implementation=self.implementation
        )
        if self.gate is not None:
            gate, heads = promote_dtype((self.gate(inputs_q), heads), dtype=self.dtype)
            heads = nnx.sigmoid(gate) * heads
        return self.out(heads)


def attention_fn(
    mask: BlockMask | None = None,
    *,
    bias: Bias | None = None,
    implementation: Implementation = "auto",
) -> Callable[..., Array]:
    """Block-sparse attention as the ``attention_fn`` of `flax.nnx.MultiHeadAttention`.

    The function becomes a static part of the layer: the mask given here is a static
    pattern and the bias given here is a constant. Without a mask here, the layer takes
    a `BlockMask` where it would take a dense mask, ``layer(x, mask=block_mask)``; that
    one may be traced. For a learned bias use `BlockSparseAttention`.

    Args:
        mask: which blocks and elements are computed, at every call.
        bias: added to the scaled logits, see `jsparse.block_sparse_attention`.
        implementation: the backend, see `jsparse.block_sparse_attention`.

    Returns:
        A function with the arguments of `flax.nnx.dot_product_attention`. It raises
        ValueError for what block-sparse attention cannot do: dropout of weights, sown
        weights, ``is_causal``, a dense mask; ``precision`` concerns the layer's
        projections only.

    Raises:
        TypeError: for a mask that is not a `BlockMask`.
        ValueError: for an unknown implementation.

    Example:
        >>> import jax.numpy as jnp
        >>> import jsparse.patterns as patterns
        >>> from flax import nnx
        >>> from jsparse.nn import attention_fn
        >>> mask = patterns.window(200, left=9, right=9, block_q=64, block_kv=64)
        >>> layer = nnx.MultiHeadAttention(
        ...     4, 32, attention_fn=attention_fn(mask), decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((200, 32))).shape
        (200, 32)
    """
    if mask is not None and not isinstance(mask, BlockMask):
        raise TypeError(
            f"attention_fn: mask is a {type(mask).__name__}; expected a BlockMask, or "
            "none to pass one at each call. Build it with jsparse.patterns, e.g. "
            "patterns.from_dense(mask)."
        )
    check_implementation(implementation)
    given_mask, given_bias = mask, bias

    def attend(
        query: Array,
        key: Array,
        value: Array,
        bias: Bias | None = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Dtype | None = None,
        precision: PrecisionLike = None,
        module: nnx.Module | None = None,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        is_causal: bool = False,
    ) -> Array:
        del broadcast_dropout, dropout_rng, precision
        _refuse_extras(dropout_rate, deterministic, module, is_causal)
        if bias is not None and given_bias is not None:
            raise ValueError(
                "attention_fn: a bias is given to attention_fn and to the call; "
                "expected one. Add them first."
            )
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        return block_sparse_attention(
            query,
            key,
            value,
            _one_mask(given_mask, mask),
            bias=given_bias if bias is None else bias,
            implementation=implementation,
        )

    return attend


def _refuse_extras(
    dropout_rate: float, deterministic: bool, module: Any, is_causal: bool
) -> None:
    """Refuses what Flax's attention can do and this one cannot."""
    if dropout_rate > 0.0 and not deterministic:
        raise ValueError(
            f"attention_fn: dropout_rate={dropout_rate}; expected 0, as the weights "
            "are never stored. Pass deterministic=True, or apply nnx.Dropout to the "
            "output."
        )
    if module is not None:
        raise ValueError(
            "attention_fn: sow_weights=True; expected False, as the weights are never "
            "stored."
        )
    if is_causal:
        raise ValueError(
            "attention_fn: is_causal=True; expected False. Put it in the BlockMask: "
            "mask & patterns.window(length, left=length, right=0)."
        )


def _one_mask(given: BlockMask | None, called: Any) -> BlockMask:
    """The mask of `attention_fn` or of the call, of which there must be one."""
    if called is not None and not isinstance(called, BlockMask):
        raise ValueError(
            f"attention_fn: the call's mask is a {type(called).__name__}; expected a "
            "BlockMask, or none where attention_fn has one. Put a dense mask in the "
            "BlockMask: mask & patterns.from_dense(dense)."
        )
    if given is not None and called is not None:
        raise ValueError(
            "attention_fn: a BlockMask is given to attention_fn and to the call; "
            "expected one. Combine them beforehand: first & second."
        )
    mask = given if called is None else called
    if mask is None:
        raise ValueError(
            "attention_fn: no BlockMask; expected one, in attention_fn(mask) or in the "
            "call, layer(x, mask=mask)."
        )
    return mask


def _size(name: str, value: int | None, default: int | None = None) -> int:
    """A size as an integer of at least 1."""
    value = default if value is None else value
    try:
        size = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError as err:
        raise TypeError(
            f"BlockSparseAttention: {name}={value!r}; expected an integer."
        ) from err
    if size < 1:
        raise ValueError(
            f"BlockSparseAttention: {name}={value!r}; expected an integer of at least "
            "1."
        )
    return size


def _check_heads(num_heads: int, num_kv_heads: int, qkv_features: int) -> None:
    """Refuses heads that do not divide."""
    if qkv_features % num_heads:
        raise ValueError(
            f"BlockSparseAttention: qkv_features={qkv_features} does not divide into "
            f"num_heads={num_heads} heads; expected a multiple. Pass qkv_features="
            f"{-(-qkv_features // num_heads) * num_heads}, or other heads."
        )
    if num_heads % num_kv_heads:
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"BlockSparseAttention: num_kv_heads={num_kv_heads} does not divide "
            f"num_heads={num_heads}; expected one of {divisors}, so that each key head "
            "serves equally many query heads."
        )


def _check_inputs(name: str, x: Array, axis: str, features: str, size: int) -> None:
    """Refuses inputs whose last axis is not what the layer was made for."""
    shape = jnp.shape(x)
    if len(shape) < 2 or shape[-1] != size:
        raise ValueError(
            f"BlockSparseAttention: {name} has shape {shape}; expected [*B, {axis}, "
            f"{size}]. The layer was made with {features}={size}."
        )
