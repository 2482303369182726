"""Dense attention and its gradients in NumPy float64, written from the formulas.

Independent of the library: it uses a dense element mask and a dense bias, and shares no
code with `jsparse.backends.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jsparse import BlockBias, BlockMask, DistanceBias
from jsparse.bias import EntryBias


class Result(NamedTuple):
    """``out, lse`` and the gradients; ``dbias`` is with respect to the dense bias."""

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray


def attention(q, k, v, elements, bias, scale, dout, dlse) -> Result:
    """One batch entry: ``q [T, H, D]``, ``elements`` and ``bias`` ``[H, T, S]``."""
    q, k, v, dout = (np.asarray(x, np.float64).swapaxes(0, 1) for x in (q, k, v, dout))
    group = len(q) // len(k)
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    logits = scale * q @ k.swapaxes(1, 2) + np.asarray(bias, np.float64)
    logits = np.where(elements, logits, -np.inf)
    top = np.max(logits, -1, keepdims=True)
    weights = np.exp(logits - np.where(np.isinf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    out = p @ v
    dp = dout @ v.swapaxes(1, 2)
    seen = np.isfinite(lse)
    dlse = np.where(seen, np.asarray(dlse, np.float64), 0)
    ds = p * (dp - (dout * out).sum(-1, keepdims=True) + dlse[..., None])

    def fold(x):
        return x.reshape(-1, group, *x.shape[1:]).sum(1).swapaxes(0, 1)

    return Result(
        out.swapaxes(0, 1),
        lse,
        scale * (ds @ k).swapaxes(0, 1),
        fold(scale * ds.swapaxes(1, 2) @ q),
        fold(p.swapaxes(1, 2) @ dout),
        ds,
    )


def dense_bias(bias, mask: BlockMask, num_heads: int) -> np.ndarray:
    """``[B or 1, H, T, S]`` float64 of any kind of bias, for at most one batch axis."""
    if bias is None:
        return np.zeros((1, num_heads, mask.q_len, mask.kv_len))
    if isinstance(bias, BlockBias):
        return _place_blocks(np.asarray(bias.values, np.float64), mask, num_heads)
    if isinstance(bias, EntryBias):
        values = _dense_entries(bias, mask.kv_len)
    elif isinstance(bias, DistanceBias):
        values = _distance_values(bias)
    else:
        values = np.asarray(bias, np.float64)
        values = values.reshape((1,) * (4 - values.ndim) + values.shape)
    shape = (len(values), num_heads, mask.q_len, mask.kv_len)
    return np.broadcast_to(values, shape)


def _distance_values(bias: DistanceBias) -> np.ndarray:
    weights = np.asarray(bias.weights, np.float64)
    x, y = (np.asarray(c, np.float64) for c in (bias.q_coords, bias.kv_coords))
    d = np.linalg.norm(x[..., :, None, :] - y[..., None, :, :], axis=-1)
    d = d if d.ndim == 3 else d[None]
    knots = np.asarray(bias.knots, np.float64)
    if bias.form == "linear":
        return -weights[:, 0][:, None, None] * d[:, None]
    if bias.form == "quadratic":
        return -weights[:, 0][:, None, None] * d[:, None] ** 2
    if bias.form == "table":
        rows = [np.interp(d, knots[:-1], w) for w in weights]
    else:
        basis = np.exp(-((d[..., None] - knots[:-1]) ** 2) / (2 * knots[-1] ** 2))
        rows = [basis @ w for w in weights]
    return np.stack(rows, 1)


def _dense_entries(bias: EntryBias, kv_len: int) -> np.ndarray:
    """``[B, H or 1, T, S]``: of each list the first entry of a key, else 0."""
    values, index = np.asarray(bias.values, np.float64), np.asarray(bias.index, int)
    batch = max(len(values), len(index))
    dense = np.zeros((batch, *values.shape[1:3], kv_len))
    for b, t, n in np.ndindex(batch, *index.shape[1:]):
        own = index[min(b, len(index) - 1), t]
        if 0 <= own[n] < kv_len and own[n] not in own[:n]:
            dense[b, :, t, own[n]] = values[min(b, len(values) - 1), :, t, n]
    return dense


def _place_blocks(values: np.ndarray, mask: BlockMask, num_heads: int) -> np.ndarray:
    bq, bk = mask.block_q, mask.block_kv
    batch = max(len(values), mask.batch_size)
    shape = (batch, num_heads, mask.num_q_blocks * bq, mask.num_kv_blocks * bk)
    out = np.zeros(shape)
    for b in range(batch):
        at = 0
        for prefix in ("kv", "full_kv"):
            counts = np.asarray(getattr(mask, f"{prefix}_num_blocks"))
            indices = np.asarray(getattr(mask, f"{prefix}_indices"))
            mb = min(b, len(counts) - 1)
            for h in range(mask.num_heads):
                heads = slice(None) if mask.num_heads == 1 else slice(h, h + 1)
                for i in range(mask.num_q_blocks):
                    for j in indices[mb, h, i, : counts[mb, h, i]]:
                        block = values[min(b, len(values) - 1), :, at]
                        rows, cols = (
                            slice(i * bq, (i + 1) * bq),
                            slice(j * bk, (j + 1) * bk),
                        )
                        out[b, heads, rows, cols] = block
                        at += 1
    return out[..., : mask.q_len, : mask.kv_len]
