"""Score functions of every kind, which run on scalars and on whole arrays alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.cases import Case


def plain_cap(s, i, j, h):
    return 5 * jnp.tanh(s / 5)


def causal(s, i, j, h):
    return jnp.where(i >= j, s, -jnp.inf)


def soft_cap(s, i, j, h, cap):
    return cap * jnp.tanh(s / cap)


def alibi(s, i, j, h, slopes):
    return s - slopes[h] * jnp.abs(i - j).astype(s.dtype) / 16


def relative(s, i, j, h, table):
    return s + table[h, jnp.clip(i - j, -4, 4) + 4]


def fixed(s, i, j, h, table):
    """A table without a gradient."""
    return relative(s, i, j, h, jax.lax.stop_gradient(table))


def by_token(s, i, j, h, a, b, ids):
    """A factor by query and head, a bias by key, and one where labels are equal."""
    same = jnp.where(ids[j % ids.shape[0]] == ids[0], 1, 0).astype(s.dtype)
    return s * jnp.exp(a[h, i] / 4) + b[j] + same


def computed(s, i, j, h, w):
    """What depends on arrays alone is not element-wise."""
    rates = jax.nn.softmax(w @ w.T, axis=-1)
    return s * rates[h, i % 3] + jnp.take(w[:, 0], j % 3) + jax.nn.softplus(s) / 2


FUNCTIONS = {
    f.__name__: f
    for f in (plain_cap, causal, soft_cap, alibi, relative, fixed, by_token, computed)
}


def shapes_of(name: str, heads: int, q_len: int, kv_len: int) -> list:
    """Of a function's arrays; those of integers come last, and have no gradient."""
    floats = {
        "soft_cap": [()],
        "alibi": [(heads,)],
        "relative": [(heads, 9)],
        "fixed": [(heads, 9)],
        "by_token": [(heads, q_len), (kv_len,)],
        "computed": [(max(heads, 3), 6)],
    }.get(name, [])
    integers = [(kv_len,)] if name == "by_token" else []
    return [jax.ShapeDtypeStruct(x, "float32") for x in floats] + [
        jax.ShapeDtypeStruct(x, "int32") for x in integers
    ]


def arrays_of(name: str, case: Case) -> tuple[tuple, tuple]:
    """Random arrays of a function: those with a gradient, and the others."""
    rng, learned, others = np.random.default_rng(5), [], []
    lengths = case.mask.q_len, case.mask.kv_len
    for x in shapes_of(name, case.q.shape[-2], *lengths):
        if x.dtype == np.int32:
            others.append(rng.integers(0, 3, x.shape).astype(np.int32))
        else:
            learned.append(np.asarray(rng.standard_normal(x.shape), np.float32))
    if name == "soft_cap":
        learned[0] = np.abs(learned[0]) + np.float32(3)
    return tuple(learned), tuple(others)
