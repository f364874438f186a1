"""Errors of stores."""

from __future__ import annotations

from collections.abc import Sequence

from ghostfunc._base.errors import GhostError


class StoreError(GhostError, RuntimeError):
    """A store cannot do what was asked of it."""


class IncompatibleStoreError(StoreError):
    """Rows of another projection, another model or another recipe than the store's."""


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
            f"{why} "
            "store.check() lists all damage; store.discard(damage) marks such rows as missing, and "
            "project_dataset then makes them again."
        )
        self.checkpoint = checkpoint
        self.rows = rows
        self.why = why


class Damaged(Exception):
    """A chunk is not what was written; never leaves the package."""


def text_of(runs: Sequence[range]) -> str:
    """Ranges as text: `0-4, 7, 9-12`, cut short where there are many."""
    shown = [f"{r.start}-{r.stop - 1}" if len(r) > 1 else str(r.start) for r in runs[:8]]
    return ", ".join(shown) + (", ..." if len(runs) > 8 else "")
