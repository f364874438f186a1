"""Errors about data and interrupted runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ghostfunc._base.errors import GhostError

SHOWN = 10
"""Bad rows that a message lists."""


class ResumeError(GhostError, ValueError):
    """What a run left behind was made by another run, or is damaged."""


class Fault(NamedTuple):
    """One row that cannot be used.

    Attributes:
        where: the file and the line or row.
        row: its index among the rows; -1 if it is none.
        why: the reason, and what is expected.
    """

    where: str
    row: int
    why: str


class RowsError(GhostError, ValueError):
    """Rows of a file cannot be used; the message says which and why.

    Attributes:
        faults: all of them.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        lines = [f"{fault.where}: {fault.why}" for fault in faults[:SHOWN]]
        if len(faults) > SHOWN:
            lines.append(f"... and {len(faults) - SHOWN:,} more rows")
        super().__init__("\n".join(lines))
