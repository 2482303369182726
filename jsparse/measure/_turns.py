"""Runs that prepare side by side and time alone, agreed on by a lock on a file.

Compiling and checking take most of a run and one or two processors; timing wants the
whole machine. Runs that name the same file share it while they prepare, and each has it
for itself while it times.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from jsparse.measure._errors import BadInput


class Turns:
    """Turns on the machine; use ``with``, and within it ``with turns.alone()``.

    Args:
        file: on which runs agree, made if it is not there; None: nobody else runs.

    Raises:
        BadInput: if the file cannot be written.

    Example:
        >>> with Turns(None) as turns, turns.alone():
        ...     pass
    """

    def __init__(self, file: Path | None):
        self._file, self._open = file, ExitStack()

    def __enter__(self) -> Turns:
        if self._file is not None:
            try:
                self._lock = self._open.enter_context(self._file.open("a"))
            except OSError as err:
                raise BadInput(
                    f"--lock {self._file}: {err.strerror}; expected a file in a folder "
                    "that exists, which may be written."
                ) from err
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def alone(self) -> AbstractContextManager[None]:
        """Waits until no other run prepares or times; they wait until it is left."""
        return nullcontext() if self._file is None else self._alone()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_SH)
