"""Finished rows, computed again: what no fingerprint can tell of loss, data and code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.types import PyTree
from ghostfunc.store._dtypes import ROUNDINGS
from ghostfunc.store._errors import IncompatibleStoreError
from ghostfunc.store._recipe import Recipe
from ghostfunc.store._rows import StoredRows
from ghostfunc.store._work import Work

EPS_OF = {
    "float32": torch.finfo(torch.float32).eps,
    "float16": torch.finfo(torch.float16).eps,
    "bfloat16": torch.finfo(torch.bfloat16).eps,
}
LEAST_TOLERANCE = 5e-3
"""Rounding of float32, and of its products in TF32, stays well below."""


@dataclass(frozen=True)
class Comparison:
    """A comparison of finished rows with what `work` makes of their samples now.

    Attributes:
        store, checkpoint: where the rows are.
        work: how they are made.
        shard: `(rank, world_size)`: every rank looks at another chunk.
        tolerance: by how much of its norm a row may differ; None for what rounding explains.
    """

    store: StoredRows
    checkpoint: str
    work: Work
    shard: tuple[int, int]
    tolerance: float | None

    def run(self, load: Callable[[list[int]], PyTree], known: Recipe | None) -> bool:
        """Compute one finished batch again; whether there was one.

        Args:
            load: makes the batch of sample ids.
            known: the recipe on record.

        Raises:
            IncompatibleStoreError: the rows are not those that are stored.
        """
        finished = self.store.finished(self.checkpoint).tolist()
        if not finished or self.work.randomness == "different":
            return False
        # One near the end, where samples that were put in or left out have moved the others.
        rank, world = self.shard
        number = finished[len(finished) - 1 - rank * len(finished) // world]
        ids = self.store.chunk(number)
        undone = sum(map(len, self.store.missing(self.checkpoint, [number])))
        ids = ids[: len(ids) - undone]
        # The batch as it was: on the same machine, its rows are the same to the last bit.
        at = self.work.batches_of(ids)[0]
        again = self.work.rows_of(load([ids[i] for i in at]))
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = tolerance_of(self.store.dtype, self.work.least_precise)
        check_again(
            again,
            self.store.read(ids, self.checkpoint),
            at,
            tolerance=tolerance,
            ids=ids,
            checkpoint=self.checkpoint,
            hints=known.hints(self.work.recipe()) if known else "",
        )
        return True


def tolerance_of(stored: str, computed: torch.dtype) -> float:
    """By how much of its norm a row may differ when it is computed again."""
    eps = max(EPS_OF[stored], torch.finfo(computed).eps)
    return max(LEAST_TOLERANCE, ROUNDINGS * eps)


def check_again(
    again: Float[Tensor, "m k"],
    chunk: Float[Tensor, "rows k"],
    at: list[int],
    *,
    tolerance: float,
    ids: range,
    checkpoint: str,
    hints: str,
) -> None:
    """Raise `IncompatibleStoreError` unless rows computed again are those that are stored.

    Args:
        again: rows as they come out now.
        chunk: the rows of a stored chunk.
        at: `[m]` places of `again` in the chunk.
        tolerance: relative, of the norm of a row; a row much smaller than its chunk's is measured
            by the chunk's typical norm, of which its own may be rounding alone.
        ids: sample ids of the chunk.
        checkpoint: its name.
        hints: what is known to have changed.
    """
    stored = chunk[at]
    typical = chunk.norm(dim=1).median()
    scale = stored.norm(dim=1).clamp(min=float(typical) * 0.1)
    off = (again - stored).norm(dim=1)
    wrong = (off > tolerance * scale).nonzero().flatten().tolist()
    if not wrong:
        return
    row = wrong[0]
    raise IncompatibleStoreError(
        f"sample {ids[at[row]]} of checkpoint {checkpoint!r}, computed again, gives another row "
        f"than the stored one: off by {float(off[row] / stored[row].norm()):.2g} of its norm, "
        f"{tolerance:.2g} is allowed. Parameters, frozen tensors, projection, transform and "
        f"randomness are those on record; {_guess(again[row], chunk, at[row], tolerance, ids)}. "
        f"{'Described otherwise now: ' + hints + '. ' if hints else ''}"
        "Rows of different recipes cannot be mixed: call project_dataset as before, or add a "
        "checkpoint of its own (store.add_checkpoint). If only rounding differs, on another "
        "machine say, pass tolerance=."
    )


def _guess(row: Tensor, chunk: Tensor, at: int, tolerance: float, ids: range) -> str:
    """The difference, as far as the numbers tell it."""
    near = (chunk - row).norm(dim=1) <= tolerance * row.norm()
    near[at] = False
    if bool(near.any()):
        other = ids[int(near.nonzero()[0])]
        return (
            f"the row is now the one stored for sample {other}, so the samples come in another "
            "order"
        )
    stored = chunk[at]
    factor = float(row @ stored / (stored @ stored).clamp(min=1e-30))
    if factor and float((row - factor * stored).norm()) <= tolerance * float(row.norm()):
        return (
            f"the row is now {factor:.4g} times the stored one, so the loss, or the transform, is "
            "scaled otherwise"
        )
    return "so the loss, the samples or their order, collate, or the transform differ"
