"""Errors of stores."""

from __future__ import annotations

from collections.abc import Sequence

from ghostfunc._base.errors import GhostError


class StoreError(GhostError, RuntimeError):
    """A store cannot do what was asked of it."""


class IncompatibleStoreError(StoreError):
    """Rows of another projection or another model than the store's."""


class IncompleteStoreError(StoreError):
    """Rows are asked for that have not been written yet."""


class DamagedRowsError(StoreError):
    """Stored bytes are not those that were written.

    Attributes:
        checkpoint, rows: which rows are hit.
    """

    def __init__(self, checkpoint: str, rows: range, why: str) -> None:
        super().__init__(
            f"rows {rows.start} to {rows.stop - 1} of checkpoint {checkpoint!r} are damaged: "
            f"{why}. "
            "store.check() lists all damage; store.discard(damage) marks such rows as missing, and "
            "project_dataset then makes them again."
        )
        self.checkpoint = checkpoint
        self.rows = rows


def ranges(ids: Sequence[int]) -> str:
    """Sorted ids as text: `0-4, 7, 9-12`, cut short where there are many."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    shown = [f"{a}-{b}" if b > a else str(a) for a, b in runs[:8]]
    return ", ".join(shown) + (", ..." if len(runs) > 8 else "")
