"""Element rules: which elements of a partial block are allowed, computed from data.

A rule is a small pytree. Its arrays carry one value per query (``q_data``) or per key
(``kv_data``), each ``[B or 1, T or S, ...]``, so that a backend can slice them by block
exactly as it slices q and k. ``allowed`` uses operators only: it runs on NumPy arrays
on the host and on JAX arrays inside a kernel's loop, and gives the same answer in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, dataclass_transform

import jax
import numpy as np

from jsparse.patterns._export import exportable
from jsparse.patterns._parts import Sizes

Array = Any


@dataclass_transform(eq_default=False, frozen_default=True)
def _rule(cls):
    """Registers a rule as a pytree: ``side`` is static, everything else is data."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    jax.tree_util.register_dataclass(
        cls,
        data_fields=[n for n in names if n != "side"],
        meta_fields=[n for n in names if n == "side"],
    )
    return exportable(cls)


def _pad(x: Array, length: int) -> Array:
    """Extends ``[B, n, ...]`` to ``length``; the new entries are never looked at."""
    width = [(0, 0)] * np.ndim(x)
    width[1] = (0, length - x.shape[1])
    return np.pad(np.asarray(x), width)


@_rule
class Segments:
    """Query t sees key s only where ``q_ids[t] == kv_ids[s]``.

    Args:
        q_ids: ``[B or 1, T]`` integer.
        kv_ids: ``[B or 1, S]`` integer.
    """

    q_ids: Array
    kv_ids: Array

    def q_data(self) -> tuple[Array, ...]:
        return (self.q_ids,)

    def kv_data(self) -> tuple[Array, ...]:
        return (self.kv_ids,)

    def allowed(self, q, kv, q_index, kv_index) -> Array:
        return q[0][..., :, None] == kv[0][..., None, :]

    def transpose(self) -> Segments:
        return Segments(self.kv_ids, self.q_ids)

    def pad_to(self, q_len: int, kv_len: int) -> Segments:
        return Segments(_pad(self.q_ids, q_len), _pad(self.kv_ids, kv_len))


@_rule
class Window:
    """Query t sees keys ``start[t] <= s < stop[t]``.

    Args:
        start: ``[B or 1, T]`` int32.
        stop: ``[B or 1, T]`` int32.
        side: ``"q"`` when the interval belongs to each query, ``"kv"`` in the
            transposed mask, where key s is seen by queries ``start[s] <= t < stop[s]``.
    """

    start: Array
    stop: Array
    side: str = "q"

    def q_data(self) -> tuple[Array, ...]:
        return (self.start, self.stop) if self.side == "q" else ()

    def kv_data(self) -> tuple[Array, ...]:
        return (self.start, self.stop) if self.side == "kv" else ()

    def allowed(self, q, kv, q_index, kv_index) -> Array:
        if self.side == "q":
            s = kv_index[..., None, :]
            return (q[0][..., :, None] <= s) & (s < q[1][..., :, None])
        t = q_index[..., :, None]
        return (kv[0][..., None, :] <= t) & (t < kv[1][..., None, :])

    def transpose(self) -> Window:
        return Window(self.start, self.stop, "kv" if self.side == "q" else "q")

    def pad_to(self, q_len: int, kv_len: int) -> Window:
        length = q_len if self.side == "q" else kv_len
        return Window(_pad(self.start, length), _pad(self.stop, length), self.side)


@_rule
class Distance:
    """Query t sees key s only where ``|q_coords[t] - kv_coords[s]| <= cutoff``.

    The test is ``dx*dx + dy*dy + dz*dz <= cutoff*cutoff`` in float32, on coordinate
    differences (never on expanded squares), so it stays sharp for coordinates of
    thousands of ångström. A pair whose distance equals the cut-off to within float32
    rounding may fall on either side.

    Args:
        q_coords: ``[B or 1, T, 3]`` float32, ångström.
        kv_coords: ``[B or 1, S, 3]`` float32, ångström.
        cutoff: ``[B or 1, 1]`` float32, ångström.
    """

    q_coords: Array
    kv_coords: Array
    cutoff: Array

    def q_data(self) -> tuple[Array, ...]:
        return (self.q_coords,)

    def kv_data(self) -> tuple[Array, ...]:
        return (self.kv_coords,)

    def allowed(self, q, kv, q_index, kv_index) -> Array:
        cutoff = self.cutoff[..., None]
        return squared_distance(q[0], kv[0]) <= cutoff * cutoff

    def transpose(self) -> Distance:
        return Distance(self.kv_coords, self.q_coords, self.cutoff)

    def pad_to(self, q_len: int, kv_len: int) -> Distance:
        return Distance(
            _pad(self.q_coords, q_len), _pad(self.kv_coords, kv_len), self.cutoff
        )


ElementRule = Segments | Window | Distance


def squared_distance(x: Array, y: Array) -> Array:
    """Squared distances ``[..., n, m]`` of ``x [..., n, 3]`` and ``y [..., m, 3]``."""
    # One axis at a time: a [..., n, m, 3] difference would triple the memory.
    d = [x[..., :, None, i] - y[..., None, :, i] for i in range(3)]
    return d[0] * d[0] + d[1] * d[1] + d[2] * d[2]


def check_rules(
    who: str, rules: Sequence[ElementRule], sizes: Sizes
) -> tuple[ElementRule, ...]:
    """The rules of a new mask; refuses what is none, or made for other lengths.

    Messages call the builder ``who``.
    """
    if not isinstance(rules, tuple | list):
        raise TypeError(
            f"{who}: rules is a {type(rules).__name__}; expected a tuple of element "
            "rules. Put a single rule into a tuple."
        )
    for n, rule in enumerate(rules):
        if not isinstance(rule, ElementRule):
            raise TypeError(
                f"{who}: rules[{n}] is a {type(rule).__name__}; expected a Segments, a "
                "Window or a Distance of jsparse.patterns."
            )
        kind = type(rule).__name__
        for leaf in jax.tree_util.tree_leaves(rule):
            if not isinstance(leaf, np.ndarray | jax.Array):
                raise TypeError(
                    f"{who}: a {kind} rule holds {leaf!r}; expected arrays only. "
                    "Convert its values with np.asarray."
                )
        _check_lengths(who, kind, rule.q_data(), sizes.q_len)
        _check_lengths(who, kind, rule.kv_data(), sizes.kv_len)
        if isinstance(rule, Distance) and rule.cutoff.shape[1:] != (1,):
            raise ValueError(
                f"{who}: a {kind} rule has a cutoff of shape {rule.cutoff.shape}; "
                "expected [B or 1, 1]."
            )
    return tuple(rules)


def _check_lengths(who: str, kind: str, data: tuple[Array, ...], length: int) -> None:
    for x in data:
        if x.ndim < 2 or x.shape[1] != length:
            raise ValueError(
                f"{who}: a {kind} rule holds an array of shape {x.shape}; expected "
                f"[B or 1, {length}, ...]. Make the rule for the lengths of the mask."
            )


def same_rules(rules: Sequence[tuple[ElementRule, ...]]) -> bool:
    """Whether all masks have the very same rules, values included."""
    first = rules[0]
    return all(_same_kinds(first, other) for other in rules) and all(
        np.array_equal(x, y)
        for other in rules[1:]
        for x, y in zip(_leaves(first), _leaves(other), strict=True)
    )


def stack_rules(
    rules: Sequence[tuple[ElementRule, ...]],
) -> tuple[ElementRule, ...] | None:
    """Rules of several masks as one batch; None if their kinds differ."""
    if not all(_same_kinds(rules[0], other) for other in rules):
        return None
    return jax.tree_util.tree_map(lambda *xs: np.concatenate(xs), *rules)


def join_rules(
    rules: Sequence[tuple[ElementRule, ...]],
    sizes: Sequence[Sizes],
) -> tuple[ElementRule, ...] | None:
    """Rules of several groups laid one after another, each padded to whole blocks.

    Returns None where one rule cannot speak for all groups (other kinds, or another
    cut-off); the caller writes them out as bits.
    """
    if not all(_same_kinds(rules[0], other) for other in rules):
        return None
    lengths = [(s.grid[0] * s.block_q, s.grid[1] * s.block_kv) for s in sizes]
    first = np.cumsum([(0, 0), *lengths], axis=0)
    joined = []
    for same in zip(*rules, strict=True):
        padded = [r.pad_to(*n) for r, n in zip(same, lengths, strict=True)]
        one = padded[0]
        if isinstance(one, Distance):
            if len({float(r.cutoff[0, 0]) for r in padded}) > 1:
                return None
            fields = {
                name: np.concatenate([getattr(r, name) for r in padded], axis=1)
                for name in ("q_coords", "kv_coords")
            }
        elif isinstance(one, Window):
            # Interval ends count elements of the other side, which moved.
            moved = first[:, 1 if one.side == "q" else 0]
            fields = {
                name: np.concatenate(
                    [
                        getattr(r, name) + n
                        for r, n in zip(padded, moved[:-1], strict=True)
                    ],
                    axis=1,
                ).astype(np.int32)
                for name in ("start", "stop")
            }
        else:
            fields = {
                name: np.concatenate([getattr(r, name) for r in padded], axis=1)
                for name in ("q_ids", "kv_ids")
            }
        joined.append(dataclasses.replace(one, **fields))
    return tuple(joined)


def _same_kinds(a: tuple[ElementRule, ...], b: tuple[ElementRule, ...]) -> bool:
    return jax.tree_util.tree_structure(a) == jax.tree_util.tree_structure(b)


def _leaves(rules: tuple[ElementRule, ...]) -> list[Array]:
    return jax.tree_util.tree_leaves(rules)
