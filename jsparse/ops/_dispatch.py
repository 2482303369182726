"""Chooses the backend: asks each one ``why_not`` and gathers the refusals."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax

from jsparse import backends
from jsparse.backends import _measured
from jsparse.backends._contract import Backend, HostPattern, Operands, Problem
from jsparse.bias import Bias
from jsparse.ops._checks import check_implementation, describe

Array = Any


class Choice(NamedTuple):
    """Which implementations compute a problem, and why these.

    Attributes:
        forward: name of the one that computes the forward pass.
        backward: of the one that computes the backward pass.
        reason: why, in words.
    """

    forward: str
    backward: str
    reason: str

    @property
    def implementation(self) -> str:
        """What to ask for to get the same; ``"auto"`` if the passes differ."""
        return self.forward if self.forward == self.backward else "auto"


@dataclasses.dataclass(frozen=True)
class Auto:
    """Each pass by who is faster for what is computed at last: `Backend`.

    Asked when a pass is traced: `jax.vmap` adds batch entries to what was asked for, a
    mesh with explicit axes divides it. A backward pass needs of the forward pass only
    ``out`` and ``lse``, whoever computed them.

    Attributes:
        platform: where the call computes; what is traced does not tell it.
    """

    platform: str
    name = "auto"
    differentiable = False

    def why_not(self, problem: Problem) -> str | None:
        """See `Backend.why_not`. Somebody always can."""
        return None

    def forward(
        self, operands: Operands, scale: float, pattern: HostPattern | None
    ) -> tuple[Array, Array]:
        """See `Backend.forward`."""
        found = self._choice(operands, pattern)
        return _loaded(found.forward).forward(operands, scale, pattern)

    def backward(
        self,
        operands: Operands,
        scale: float,
        pattern: HostPattern | None,
        out: Array,
        lse: Array,
        dout: Array,
        dlse: Array,
        bias_gradient: bool,
    ) -> tuple[Array, Array, Array, Bias | None]:
        """See `Backend.backward`."""
        found = self._choice(operands, pattern)
        rows = out, lse, dout, dlse
        return _loaded(found.backward).backward(
            operands, scale, pattern, *rows, bias_gradient
        )

    def _choice(self, operands: Operands, pattern: HostPattern | None) -> Choice:
        problem = describe(operands, pattern)
        return choice("auto", dataclasses.replace(problem, platform=self.platform))


def refusals(problem: Problem) -> dict[str, str | None]:
    """Why each implementation cannot take the problem, or None where it can."""
    return {
        name: backends.load(name).why_not(problem) for name in backends.IMPLEMENTATIONS
    }


def choice(
    implementation: str,
    problem: Problem,
    table: Mapping[_measured.Key, _measured.Entry] | None = None,
) -> Choice:
    """Which implementations compute the problem.

    Args:
        implementation: the one asked for, or ``"auto"``.
        problem: what is to be computed.
        table: what was measured, in place of the shipped table.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: if the named backend refuses; says why and who would not.
    """
    check_implementation(implementation)
    answers = refusals(problem)
    able = [name for name, reason in answers.items() if reason is None]
    if implementation != "auto":
        if answers[implementation] is not None:
            raise NotImplementedError(
                f"block_sparse_attention: implementation={implementation!r} cannot run "
                f"this: {answers[implementation]}. These can: {', '.join(able)}."
            )
        reason = f"{implementation} was asked for"
        return Choice(implementation, implementation, reason)
    if not set(_measured.RIVALS) <= set(able):
        return Choice(able[0], able[0], f"{able[0]} comes first")
    return _faster(problem, _measured.shipped() if table is None else table)


def _faster(problem: Problem, table: Mapping[_measured.Key, _measured.Entry]) -> Choice:
    """The faster rival in each pass."""
    names, reasons = [], []
    for direction in _measured.PASSES:
        key = _measured.Key.of(problem, direction)
        entry = _measured.find(table, key)
        if entry is None:
            names.append(_measured.RIVALS[0])
            reasons.append(f"{direction} was not measured: {names[-1]} comes first")
        else:
            names.append(entry["fastest"])
            case = entry["measured"]["case"]
            there = "" if entry["device"] == key.device else f" ({entry['device']})"
            reasons.append(f"{direction}: {names[-1]} was faster on {case}{there}")
    return Choice(names[0], names[1], "; ".join(reasons))


_listeners: list[list[tuple[Problem, Choice]]] = []


@contextlib.contextmanager
def choices() -> Iterator[list[tuple[Problem, Choice]]]:
    """Lists what calls ask for and get, in all threads; for whoever measures models.

    Of a call under `jax.vmap` it is one entry. What was traced before is traced anew.
    """
    jax.clear_caches()
    made: list[tuple[Problem, Choice]] = []
    _listeners.append(made)
    try:
        yield made
    finally:
        _listeners[:] = [x for x in _listeners if x is not made]


def choose(implementation: str, problem: Problem) -> Backend:
    """The backend to use; see `choice`."""
    found = choice(implementation, problem)
    for made in _listeners:
        made.append((problem, found))
    if implementation == "auto" and found.forward in _measured.RIVALS:
        return Auto(problem.platform)
    return _loaded(found.forward)


def _loaded(name: str) -> Backend:
    # Modules have what the protocol says; no type checker sees it.
    return cast(Backend, backends.load(name))
