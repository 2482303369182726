"""Attention of a few rows, written out in NumPy: what results are checked with.

Nothing here shares code with a backend or with `BlockMask`: the elements come from the
pattern's definition (float64 distances, or the block lists of a benchmark), the formula
is the textbook's, and each row is summed over all the keys it may see at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Array = Any
Allowed = Sequence[np.ndarray]
"""Element masks ``[R, S]`` bool; of several, any may be the right one of a row."""

RowBias = Callable[[int], np.ndarray]
"""The bias ``[R, S]`` of the rows, for a head."""

_CHUNK = 1 << 24  # elements of one [rows, S] temporary
_SPARSE = 0.25  # share of allowed keys below which rows are taken one by one


@dataclass(frozen=True)
class RowCheck:
    """How far rows of a result are from the formula in float64.

    Attributes:
        rows: number of rows compared.
        max_error: largest absolute difference.
        norm_error: norm of the difference / norm of the expected rows.
        plain_error: ``max_error`` of the same formula computed as plain dense code
            would in the result's dtype.
        tolerance: what ``max_error`` may be: twice ``plain_error`` and a rounding
            floor.
        ok: whether every number is finite where expected, and within the tolerance.
        uncertain_rows: rows with an element whose distance equals the cut-off to
            within rounding; these may follow either reading.
    """

    rows: int
    max_error: float
    norm_error: float
    plain_error: float
    tolerance: float
    ok: bool
    uncertain_rows: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers."""
        return asdict(self)


def choose_rows(length: int, count: int = 256, seed: int = 0) -> np.ndarray:
    """``count`` different rows of ``length`` (all, if there are no more), ascending.

    Example:
        >>> choose_rows(3).tolist(), len(choose_rows(1000))
        ([0, 1, 2], 256)
    """
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(length, min(count, length), replace=False))


def within_cutoff(coords: np.ndarray, rows: np.ndarray, cutoff: float) -> Allowed:
    """Which atoms lie within the cut-off of each row's atom, from float64 distances.

    Args:
        coords: ``[N, 3]`` float32, ångström.
        rows: ``[R]`` integer.
        cutoff: ångström.

    Returns:
        ``[R, N]`` bool: the exact reading ``distance <= cutoff``; then, only if some
        pair lies so close to the cut-off that float32 may round it to either side, the
        reading without such pairs and the one with all of them.

    Example:
        >>> line = np.array([[0, 0, 0], [3, 0, 0], [9, 0, 0]], np.float32)
        >>> [m.astype(int).tolist() for m in within_cutoff(line, np.array([1]), 4.0)]
        [[[1, 1, 0]]]
    """
    points = coords.astype(np.float64)
    edge = 4 * np.finfo(np.float32).eps * cutoff**2
    shape = (len(rows), len(coords))
    exact, without, every = (np.empty(shape, bool) for _ in range(3))
    for n in _chunks(len(rows), len(coords)):
        squares = np.zeros((n.stop - n.start, len(coords)))
        for axis in range(3):
            squares += (points[rows[n], axis, None] - points[None, :, axis]) ** 2
        exact[n] = squares <= cutoff**2
        without[n] = squares <= cutoff**2 - edge
        every[n] = squares <= cutoff**2 + edge
    if (without == every).all():
        return (exact,)
    return exact, without, every


@dataclass(frozen=True)
class ExpectedRows:
    """What rows of a result should be; made once for all that compute the same.

    Attributes:
        exact: ``[R, H, Dv]`` float64, by the first reading of the pattern.
        plain: the same formula at the result's dtype, as float64.
        unsure: rows of which the readings differ.
        others: ``(exact, plain)`` of the unsure rows by each other reading.
        dtype: of the result.
    """

    exact: np.ndarray
    plain: np.ndarray
    unsure: np.ndarray
    others: tuple[tuple[np.ndarray, np.ndarray], ...]
    dtype: Any

    def check(self, got: np.ndarray) -> RowCheck:
        """Compares rows ``[R, H, Dv]`` of a result, each with the reading it suits."""
        got = np.asarray(got).astype(np.float64)
        exact, plain, at = self.exact.copy(), self.plain.copy(), self.unsure
        for again, plain_again in self.others:
            better = _distance(got[at], again) < _distance(got[at], exact[at])
            exact[at[better]] = again[better]
            plain[at[better]] = plain_again[better]
        size = float(np.abs(exact).max(initial=0))
        error = float(_distance(got, exact).max(initial=0))
        plain_error = float(_distance(plain, exact).max(initial=0))
        floor = (_epsilon(self.dtype) + 16 * _epsilon(np.float32)) * size
        tolerance = 2 * plain_error + floor
        norm = float(np.linalg.norm(exact))
        return RowCheck(
            rows=len(got),
            max_error=error,
            norm_error=float(np.linalg.norm(got - exact)) / (norm or 1.0),
            plain_error=plain_error,
            tolerance=tolerance,
            ok=bool(error <= tolerance),
            uncertain_rows=len(at),
        )


def expect_rows(
    rows: np.ndarray,
    q: Array,
    k: Array,
    v: Array,
    allowed: Allowed,
    dtype: Any,
    *,
    dout: Array | None = None,
    bias: RowBias | None = None,
) -> ExpectedRows:
    """Rows of an attention output, or of dq, by the formula of `check_rows`.

    Args:
        rows: ``[R]`` integer, the rows to compute.
        q: ``[T, H, D]``.
        k: ``[S, H, D]``.
        v: ``[S, H, Dv]``.
        allowed: element masks of the rows, each ``[R, S]`` bool.
        dtype: of the result that will be compared.
        dout: ``[T, H, Dv]`` cotangent of the output, for dq.
        bias: added to the scaled logits of the rows, for each head.

    Returns:
        The expected rows. No ``[T, S]`` array is made.

    Example:
        >>> v = np.arange(6, dtype=np.float32).reshape(3, 1, 2)
        >>> every = (np.ones((1, 3), bool),)
        >>> expect_rows(np.array([1]), v * 0, v, v, every, np.float32).exact
        array([[[2., 3.]]])
    """
    queries, keys, values = np.asarray(q)[rows], np.asarray(k), np.asarray(v)
    cotangent = None if dout is None else np.asarray(dout)[rows]

    def both(at: Any, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        added = bias and (lambda head, bias=bias: bias(head)[at])
        some = None if cotangent is None else cotangent[at]
        exact, plain = (
            _formula(queries[at], keys, values, some, mask[at], added, kind)
            for kind in (np.float64, dtype)
        )
        return exact, plain.astype(np.float64)

    unsure = np.zeros(len(rows), bool)
    for other in allowed[1:]:
        unsure |= (other != allowed[0]).any(1)
    at = np.flatnonzero(unsure)
    exact, plain = both(slice(None), allowed[0])
    others = tuple(both(at, other) for other in allowed[1:])
    return ExpectedRows(exact, plain, at, others, dtype)


def check_rows(
    result: Array,
    rows: np.ndarray,
    q: Array,
    k: Array,
    v: Array,
    allowed: Allowed,
    *,
    dout: Array | None = None,
) -> RowCheck:
    """Compares rows of an attention output, or of dq, with the formula in float64.

    ``out[t] = sum_s p[t, s] v[s]`` with ``p[t] = softmax_s(q[t] . k[s] / sqrt(D))``
    over the allowed keys, and ``dq[t] = sum_s p[t, s] (dout[t] . v[s] - dout[t] .
    out[t]) k[s] / sqrt(D)``.

    Args:
        result: ``[T, H, Dv]`` attention output; with ``dout``, dq ``[T, H, D]``.
        rows: ``[R]`` integer, the rows to compare.
        q: ``[T, H, D]``.
        k: ``[S, H, D]``.
        v: ``[S, H, Dv]``.
        allowed: element masks of the rows, each ``[R, S]`` bool.
        dout: ``[T, H, Dv]`` cotangent of the output, to compare dq.

    Returns:
        The errors and the verdict.

    Example:
        >>> v = np.arange(6, dtype=np.float32).reshape(3, 1, 2)
        >>> mean = v.mean(0, keepdims=True).repeat(3, 0)  # equal logits
        >>> every = (np.ones((3, 3), bool),)
        >>> check_rows(mean, np.arange(3), v * 0, v, v, every).ok
        True
    """
    got = np.asarray(result)
    return expect_rows(rows, q, k, v, allowed, got.dtype, dout=dout).check(got[rows])


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest difference in each row; NaN anywhere is infinitely far."""
    difference = np.abs(a - b)
    return np.where(np.isnan(difference), np.inf, difference).max(axis=(1, 2))


def _epsilon(dtype: Any) -> float:
    """Spacing of numbers at 1; also of bfloat16, which NumPy's finfo refuses."""
    import jax.numpy as jnp

    return float(jnp.finfo(dtype).eps)


def _formula(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray | None,
    allowed: np.ndarray,
    bias: RowBias | None,
    dtype: Any,
) -> np.ndarray:
    """Rows of the output (or of dq), summed in float64 for float64, else in float32.

    For 16-bit dtypes the weights are rounded to the dtype before they meet v, as plain
    code at that dtype does. Where few keys are allowed, rows are taken one by one, over
    their own keys: at 100,000 keys that is what makes the check affordable.
    """
    wide = np.float64 if dtype == np.float64 else np.float32
    scale = wide(q.shape[-1] ** -0.5)
    width = v.shape[-1] if dout is None else q.shape[-1]
    out = np.zeros((len(q), q.shape[1], width), dtype)
    sparse = allowed.mean() < _SPARSE if allowed.size else False
    used = np.flatnonzero(allowed.any(0))
    allowed = allowed[:, used]
    chunks = _chunks(len(q), _CHUNK if sparse else max(1, len(used)))
    seen = [np.flatnonzero(allowed[n].any(0)) for n in chunks]
    for h in range(q.shape[1]):
        all_keys, all_values = k[used, h].astype(wide), v[used, h].astype(wide)
        added = None if bias is None else bias(h)[:, used]
        for n, some in zip(chunks, seen, strict=True):
            keys, values, see = all_keys[some], all_values[some], allowed[n][:, some]
            logits = (q[n, h].astype(wide) @ keys.T) * scale
            if added is not None:
                logits += added[n][:, some].astype(wide)
            logits = np.where(see, logits, -np.inf)
            top = logits.max(axis=1, keepdims=True, initial=-np.inf)
            weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
            total = weights.sum(axis=1, keepdims=True)
            weights = weights / np.where(total == 0, 1, total)
            weights = weights.astype(dtype).astype(wide)
            if dout is None:
                out[n, h] = (weights @ values).astype(dtype)
                continue
            cotangent = dout[n, h].astype(wide)
            inner = cotangent @ values.T
            inner -= (weights * inner).sum(axis=1, keepdims=True)
            slope = (weights * inner * scale).astype(dtype).astype(wide)
            out[n, h] = (slope @ keys).astype(dtype)
    return out


def _chunks(rows: int, keys: int) -> list[slice]:
    step = max(1, _CHUNK // keys)
    return [slice(n, min(n + step, rows)) for n in range(0, rows, step)]
