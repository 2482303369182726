"""What takes part in a benchmark: three steps that the runner knows, and no more.

A `Peer` enters a contest as a `Contender`, a contender makes a pass ready as a `Call`,
and a call can be timed and looked at. In what library, or in what process, is the
peer's own affair: ``_jax_peers.py`` and ``_torch_peers.py`` implement these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from jsparse.measure import BadInput
from jsparse.patterns import BlockMask

Array = Any

Direction = Literal["forward", "backward", "forward_backward"]
Inputs = tuple[Array, ...]
"""q, k, v, what a bias is made of, and last a cotangent of the output, on the device.

q, k, v and the cotangent are ``[T, H, D]``; of a model that computes many problems at
once, ``[batch, T, H, D]``.
"""

BLOCKS = "blocks"
UNBIASED = "blocks, no bias"
MASKED = "all, masked"
EVERY = "all"

CALLS = 10  # a turn on a GPU; their mean counts
LONGEST_TURN = 2.0  # seconds; a turn is one call where so many would take longer


class DoesNotFit(BadInput):
    """A contender needs more memory than there is."""


class NoSuchPass(Exception):
    """A contender does not compute this pass; it is left out, whoever asked for it."""


@dataclass(frozen=True)
class Task:
    """What every contender of a case is given.

    Attributes:
        mask: which blocks are computed, on the host.
        sets: inputs, used in turns.
    """

    mask: BlockMask
    sets: Sequence[Inputs]


class Call(Protocol):
    """One pass of one contender, compiled, its inputs in place."""

    @property
    def compile_seconds(self) -> float:
        """Until the first call could be made."""
        ...

    @property
    def temporary_bytes(self) -> int | None:
        """Beside arguments and results; None where it cannot be known."""
        ...

    def rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows ``[R, H, D]`` of the results for the first inputs; also warms up.

        Rows are counted through the batch, if there is one.

        ``out`` of a pass that computes it, ``dq`` of one with gradients.
        """
        ...

    def times(self, n: int, count: int, kernels: bool) -> list[float]:
        """Seconds of ``count`` calls with the n-th inputs.

        With ``kernels``, of each call the sum of its kernels' times on a GPU; else the
        wall clock's, until the results are ready.
        """
        ...


class Contender(Protocol):
    """A peer with the task in its own form."""

    def ready(self, direction: Direction) -> Call:
        """Compiles a pass. Raises `DoesNotFit` before memory is taken, `NoSuchPass`."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


class Peer(Protocol):
    """Another way to the same output, or to the dense one."""

    @property
    def name(self) -> str:
        """How ``--against`` calls it."""
        ...

    @property
    def computes(self) -> str:
        """`BLOCKS` of the mask; or `MASKED`: all pairs; or another result.

        `EVERY` pair counts then, or the bias does not: `UNBIASED`.
        """
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions a record names."""
        ...

    def available(self) -> str | None:
        """Why it cannot run on this machine, or None if it can."""
        ...

    def why_not(self, mask: BlockMask) -> str | None:
        """Why it cannot take this mask, or None if it can."""
        ...

    def enter(self, task: Task) -> Contender:
        """Takes part in a contest."""
        ...
