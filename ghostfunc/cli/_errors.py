"""What ends a command: a message and an exit code."""

from __future__ import annotations

FAILED, USAGE, UNVERIFIED, STOPPED = 1, 2, 3, 130
"""Exit codes: it could not be computed; the command line or the data are not right; ghost and
materialized numbers differ; Ctrl-C."""


class CommandError(Exception):
    """A command cannot do what it was asked: one message, no traceback."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code
