"""Which projections keep the order of the best samples: their ten best against the exact ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from examples.evaluation.attribution import Params, Task
from examples.evaluation.measures import overlap


@dataclass(frozen=True)
class Setting:
    """Arguments of `gf.kronecker_projection`."""

    kind: str
    rank_total: int
    compress: int | None

    def make(self, params: Params, seed: int) -> gf.Projection:
        return gf.kronecker_projection(
            params,
            rank_total=self.rank_total,
            rank_min=4,
            kind=self.kind,
            seed=seed,
            compress=self.compress,
        )

    def __str__(self) -> str:
        return f'kind="{self.kind}", rank_total={self.rank_total}, compress={self.compress}'


RECOMMENDED = Setting("orthonormal", 16384, 8192)
"""What the documentation recommends for retrieval by cosine."""

BY_PARAMETER = Setting("orthonormal", 256, None)
"""Columns that still belong to a parameter each, as preconditioning by blocks wants them."""

SETTINGS = (
    Setting("rademacher", 256, None),
    BY_PARAMETER,
    Setting("orthonormal", 1024, None),
    Setting("orthonormal", 4096, 4096),
    Setting("orthonormal", 4096, 16384),
    Setting("orthonormal", 16384, 4096),
    RECOMMENDED,
    Setting("rademacher", 16384, 8192),
    Setting("orthonormal", 16384, 16384),
    Setting("orthonormal", 16384, None),
)


def overlaps(
    task: Task, settings: Sequence[Setting], *, k: int, seed: int
) -> dict[Setting, tuple[int, float]]:
    """For every setting: columns, and the overlap of its k best cosines with the exact ones.

    The gradients are formed once, and every projection is applied to them.
    """
    full = gf.projection.full_projection(task.params)
    fn, params = task.model_fn, task.params
    rows = torch.cat([gf.ghost_project(fn, params, some, full) for some in task.batches()])
    queries = gf.ghost_project(fn, params, task.queries, full)
    exact = cosines(rows, queries)
    ours, theirs = as_grads(rows, full), as_grads(queries, full)
    found = {}
    for setting in settings:
        projection = setting.make(params, seed)
        got = cosines(projection.apply(ours), projection.apply(theirs))
        found[setting] = (projection.k, overlap(got, exact, k))
    return found


def cosines(rows: Tensor, queries: Tensor) -> Tensor:
    """`[n, q]`."""
    return F.normalize(rows) @ F.normalize(queries).mT


def as_grads(rows: Tensor, full: gf.Projection) -> Params:
    """Unreduced rows as per-sample gradients again."""
    return {b.path: rows[:, b.columns].reshape(-1, *b.shape) for b in full.blocks}
