"""Progress on stderr: a bar on a terminal, plain lines elsewhere.

stdout stays free for results, so that ``--json`` can be piped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars


class Progress:
    """Names the stage at work and how far it is.

    Args:
        console: where to write; a terminal gets bars, anything else one line for each
            stage. None writes nothing.
    """

    def __init__(self, console: Console | None = None):
        self._console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(
        self, name: str, total: int | None = None
    ) -> Iterator[Callable[[], None]]:
        """Runs one stage; yields a function to call after each of ``total`` steps."""
        start = time.perf_counter()
        if self._console is None:
            yield _nothing
        elif self._console.is_terminal:
            with _bars(self._console, total) as bars:
                task = bars.add_task(name, total=total)
                yield lambda: bars.advance(task)
        else:
            self._console.print(f"{name} ...", markup=False, emoji=False)
            yield _nothing
        self.seconds[name] = time.perf_counter() - start


def _nothing() -> None:
    """A step that nobody watches."""


def _bars(console: Console, total: int | None) -> Bars:
    counted = [MofNCompleteColumn()] if total is not None else []
    return Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counted,
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
