"""Scores of training samples for queries, by every method that is compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import ghostfunc as gf
from ghostfunc.store import Store

Batch = dict[str, Tensor]
Params = dict[str, Tensor]
ModelFn = Callable[[Params, Batch], Tensor]
Scores = dict[str, Float[Tensor, "n q"]]


@dataclass(frozen=True)
class Task:
    """A trained model, the samples it was trained on, and what it is asked about.

    Attributes:
        model_fn, params: as everywhere in ghostfunc, at the end of training.
        train: n samples to score.
        queries: q samples to score them for.
        batch_size: training samples per backward pass.
    """

    model_fn: ModelFn
    params: Params
    train: Batch
    queries: Batch
    batch_size: int

    def batches(self) -> list[Batch]:
        """The training samples, a few at a time."""
        pieces = [x.split(self.batch_size) for x in self.train.values()]
        return [dict(zip(self.train, some, strict=True)) for some in zip(*pieces, strict=True)]


def exact(task: Task) -> Scores:
    """Dot products and cosines of the gradients themselves, and their norms alone."""
    fn, params = task.model_fn, task.params
    dots = torch.cat(
        [
            gf.ghost_dot_prod(fn, params, some, task.queries, reduction="none")
            for some in task.batches()
        ]
    )
    norms = torch.cat([gf.ghost_norm(fn, params, some) for some in task.batches()])[:, None]
    return {
        "dot product": dots,
        "cosine": dots / (norms * gf.ghost_norm(fn, params, task.queries)),
        "gradient norm alone": norms.expand_as(dots),
    }


def projected(task: Task, projection: gf.Projection, *, damping: float | None) -> Scores:
    """The same from projected gradients in a store; with damping, preconditioned by their second
    moment."""
    rows = torch.cat(
        [gf.ghost_project(task.model_fn, task.params, some, projection) for some in task.batches()]
    )
    query = gf.ghost_project(task.model_fn, task.params, task.queries, projection)
    with tempfile.TemporaryDirectory() as directory:
        store = Store.create(
            Path(directory, "store"), projection=projection, n_samples=len(rows), dtype="float32"
        )
        store.add_checkpoint("final", task.params)
        store.write(range(len(rows)), rows, "final")
        metric = None if damping is None else store.preconditioner("final", damping=damping)
        return {
            name: store.scores(query, normalize=normalize, precondition=metric).mT
            for name, normalize in (("dot product", "none"), ("cosine", "cosine"))
        }


def named(prefix: str, scores: Scores) -> Scores:
    """Scores under longer names."""
    return {f"{prefix}, {name}": x for name, x in scores.items()}
