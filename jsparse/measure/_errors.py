"""The one exception that the command line turns into a line and exit code 2."""

from __future__ import annotations


class BadInput(ValueError):
    """The user asked for something that cannot be done; the message says what and why.

    Raised where user input is first looked at. Anything else that escapes a command is
    a fault of the program.
    """
