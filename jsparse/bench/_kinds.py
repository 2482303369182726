"""Kinds of cases, and what they load. The cases themselves are in ``_cases.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jsparse.bench._contract import Peer
from jsparse.bench._patterns import BLOCK, Columns
from jsparse.measure import Allowed, RowBias
from jsparse.patterns import BlockMask


@dataclass(frozen=True)
class Pattern:
    """A loaded pattern.

    Attributes:
        mask: what the implementations take.
        allowed: elements of some rows, from the pattern's definition and not the mask.
        order: order of the atoms, or None where there are none.
        batch: problems in one call that have this pattern and share a bias; those after
            them are padding.
        bias: ``bias(inputs, rows)`` gives, for each head, the bias ``[R, S]`` of some
            rows, from its definition; None without a bias.
        exists: ``[*B, T]`` bool, the rows that are no padding; None for all. Others
            have no cotangent, and what they give is not looked at.
    """

    mask: BlockMask
    allowed: Callable[[np.ndarray], Allowed]
    order: str | None = None
    batch: int = 1
    bias: Callable[[Sequence[Any], np.ndarray], RowBias] | None = None
    exists: np.ndarray | None = None


@dataclass(frozen=True)
class AttentionCase:
    """Attention forward and backward.

    Attributes:
        name: of the case.
        about: one line for people.
        heads: number of heads.
        head_dim: channels of each.
        dtype: of queries, keys and values.
        load: makes the pattern.
    """

    name: str
    about: str
    heads: int
    head_dim: int
    dtype: str
    load: Callable[[], Pattern]


@dataclass(frozen=True)
class Model:
    """A loaded shape of a model.

    Attributes:
        pattern: what is computed, and how to check it.
        shapes: of the inputs: q, k, v, and what the bias is made of.
        attend: ours, ``attend(*inputs, *data, implementation=...)``.
        peers: all that compute the same, or the same without the bias.
        data: arrays that every call gets and that have no gradient.
        arrange: brings the inputs into the form that ours takes, before it is timed.
        draw: in place of normal numbers, the inputs beyond q, k and v of a key.
    """

    pattern: Pattern
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    attend: Callable[..., Any]
    peers: tuple[Peer, ...]
    data: tuple[Any, ...] = ()
    arrange: Callable[..., tuple[Any, ...]] | None = None
    draw: Callable[[Any], tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class ModelCase:
    """Attention of a model with a bias, forward and backward with all gradients.

    Attributes:
        name: of the case.
        about: one line for people.
        heads: number of heads.
        head_dim: channels of each.
        dtype: of queries, keys, values and bias.
        load: makes the shape.
        alone: whether the backward pass is timed alone on a GPU, as of other cases;
            else with the forward pass.
    """

    name: str
    about: str
    heads: int
    head_dim: int
    dtype: str
    load: Callable[[], Model]
    alone: bool = False


@dataclass(frozen=True)
class HostMaskCase:
    """Ordering atoms and building their radius mask with NumPy and SciPy."""

    name: str
    about: str
    coords: Callable[[], np.ndarray]
    order: str


@dataclass(frozen=True)
class DeviceMaskCase:
    """Building a radius mask with JAX under ``jit``."""

    name: str
    about: str
    coords: Callable[[], np.ndarray]
    order: str


Case = AttentionCase | ModelCase | HostMaskCase | DeviceMaskCase


def of_blocks(columns: Columns) -> Pattern:
    """A pattern of whole blocks.

    Example:
        >>> pattern = of_blocks([np.array([0]), np.array([0, 1])])
        >>> pattern.mask.num_blocks, pattern.allowed(np.array([0]))[0].sum()
        (3, np.int64(128))
    """
    counts = [len(row) for row in columns]
    rows = np.repeat(np.arange(len(columns)), counts)
    length = len(columns) * BLOCK
    mask = BlockMask.from_blocks(rows, np.concatenate(columns), q_len=length)

    def allowed(which: np.ndarray) -> Allowed:
        out = np.zeros((len(which), length), bool)
        for n, row in enumerate(which // BLOCK):
            for column in columns[row]:
                out[n, column * BLOCK : (column + 1) * BLOCK] = True
        return (out,)

    return Pattern(mask, allowed)
