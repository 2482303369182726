"""Where the ``jsparse`` command starts: Ctrl-C ends it in one line from here on.

`jsparse.cli` loads JAX and Matplotlib, which takes a second or two, so it is imported
inside and nothing else is. Called by the installed script and ``python -m jsparse``.
"""

from __future__ import annotations

import os
import signal
from typing import Any


def main() -> None:
    """Entry point of the ``jsparse`` command."""
    # A KeyboardInterrupt may be raised in a callback that Python runs, which prints it
    # and goes on. Where SIGINT is ignored, as in the background, it stays ignored.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, _leave)
    from jsparse.cli import main as command

    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


def _leave(*_: Any) -> None:
    """Ends the process; an ordinary exit would run what half-loaded libraries left."""
    os.write(2, b"jsparse: interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
