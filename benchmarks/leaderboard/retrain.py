"""The truth: models trained on parts of the data, all of them together."""

from __future__ import annotations

from typing import Any

import torch
from tasks import Task
from torch import Tensor

TOGETHER = 16
"""Models that are trained at the same time, by vmap."""

Params = dict[str, Tensor]


def retrained(task: Task, weights: Tensor) -> Params:
    """One model per row of sample weights `[models, n]`: parameters with a leading axis."""
    parts = [_train(task, w) for w in weights.split(TOGETHER)]
    return {k: torch.cat([p[k] for p in parts]) for k in task.params}


def _train(task: Task, weights: Tensor) -> Params:
    names = list(task.params)
    optimizer = task.optimizer

    def step(params: list[Tensor], slots: list[Tensor], w: Tensor, micro: Any, t: int) -> Any:
        def objective(p: list[Tensor]) -> Tensor:
            losses = task.model_fn(dict(zip(names, p, strict=True)), micro.batch)
            return (losses * w[micro.ids]).sum() / len(micro.ids)

        grads = torch.func.grad(objective)(params)
        return optimizer.update(grads, slots, params, t)

    def repeated(leaves: list[Tensor]) -> list[Tensor]:
        return [x.expand(len(weights), *x.shape).clone() for x in leaves]

    start = list(task.params.values())
    params, slots = repeated(start), repeated(optimizer.init(start))
    for t, micro in enumerate(task.steps):
        mapped = torch.func.vmap(lambda p, s, w, m=micro, t=t: step(p, s, w, m, t))
        params, slots = mapped(params, slots, weights)
    return dict(zip(names, params, strict=True))


def query_losses(task: Task, params: Params) -> Tensor:
    """`[models, m]`."""
    return torch.func.vmap(lambda p: task.model_fn(p, task.queries))(params).detach()


def subsets(task: Task, left_out: float, seed: int) -> Tensor:
    """Which samples each model is trained on, `[models, n]`."""
    g = torch.Generator().manual_seed(seed + 1000)
    ranks = torch.rand(task.subsets, task.n, generator=g).argsort(1).argsort(1)
    return ranks >= round(left_out * task.n)


def datamodeling_scores(scores: Tensor, kept: Tensor, losses: Tensor) -> list[float]:
    """The linear datamodeling score of every query: rank correlation, over models, of the sum of
    the scores of their samples with minus their loss; 0 where all models have the same sum, which
    says nothing."""
    from scipy.stats import spearmanr

    predicted = kept.double() @ scores.double()
    return [
        float(spearmanr(p.numpy(), -y.numpy()).statistic) if bool((p != p[0]).any()) else 0.0
        for p, y in zip(predicted.mT, losses.mT, strict=True)
    ]
