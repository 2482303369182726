"""Chooses the backend: asks each one ``why_not`` and gathers the refusals."""

from __future__ import annotations

from types import ModuleType

from jsparse import backends
from jsparse.backends._contract import Problem


def refusals(problem: Problem) -> dict[str, str | None]:
    """Why each implementation cannot take the problem, or None where it can."""
    return {
        name: backends.load(name).why_not(problem) for name in backends.IMPLEMENTATIONS
    }


def choose(implementation: str, problem: Problem) -> ModuleType:
    """The backend to use.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: if the named backend refuses; says why and who would not.
    """
    if implementation not in ("auto", *backends.IMPLEMENTATIONS):
        names = ", ".join(repr(n) for n in ("auto", *backends.IMPLEMENTATIONS))
        raise ValueError(
            f"block_sparse_attention: implementation={implementation!r}; expected one "
            f"of {names}."
        )
    answers = refusals(problem)
    able = [name for name, reason in answers.items() if reason is None]
    name = able[0] if implementation == "auto" else implementation
    if answers[name] is not None:
        raise NotImplementedError(
            f"block_sparse_attention: implementation={name!r} cannot run this: "
            f"{answers[name]}. These can: {', '.join(able)}."
        )
    return backends.load(name)
