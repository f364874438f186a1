"""A small classifier of digits that is trained again hundreds of times, all models at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ghostfunc as gf
from examples.evaluation.attribution import Batch, ModelFn, Params, Task

STEPS, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 150, 0.2, 0.9, 1e-3
TOGETHER = 64
"""Models that are trained at the same time."""


def model(seed: int) -> tuple[ModelFn, Params]:
    """`(model_fn, params)` of a fresh network."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(module(batch["image"]), batch["label"], reduction="none")

    return gf.from_module(net, loss)


def data(n: int, n_queries: int, *, wrong: float, seed: int) -> tuple[Batch, Batch]:
    """Training digits, a share of them with a wrong label, and clean queries."""
    digits = load_digits()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=g)
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    off = torch.rand(n, generator=g) < wrong
    shift = torch.randint(1, 10, (n,), generator=g)
    train = {"image": images[:n], "label": torch.where(off, (labels[:n] + shift) % 10, labels[:n])}
    rest = slice(n, n + n_queries)
    return train, {"image": images[rest], "label": labels[rest]}


def retrain(
    model_fn: ModelFn, start: Params, train: Batch, weights: Float[Tensor, "models n"]
) -> Params:
    """Train one model for each row of sample weights, from `start`, by gradient descent on all.

    There is no randomness in it: two models differ by their weights alone.

    Returns:
        Parameters with a leading axis of models.
    """

    def objective(params: Params, w: Tensor) -> Tensor:
        decay = sum(x.square().sum() for x in params.values())
        return (model_fn(params, train) * w).sum() / w.sum() + WEIGHT_DECAY / 2 * decay

    gradient = torch.func.vmap(torch.func.grad(objective))
    parts = []
    for w in weights.split(TOGETHER):
        params = {name: x.detach().expand(len(w), *x.shape).clone() for name, x in start.items()}
        velocity = {name: torch.zeros_like(x) for name, x in params.items()}
        for _ in range(STEPS):
            for name, g in gradient(params, w).items():
                velocity[name].mul_(MOMENTUM).add_(g)
                params[name].sub_(velocity[name], alpha=LEARNING_RATE)
        parts.append(params)
    return {name: torch.cat([part[name] for part in parts]) for name in start}


def losses(model_fn: ModelFn, params: Params, queries: Batch) -> Float[Tensor, "models q"]:
    """Of every model, on every query."""
    return torch.func.vmap(lambda p: model_fn(p, queries))(params).detach()


def task(model_fn: ModelFn, start: Params, train: Batch, queries: Batch) -> Task:
    """The model that is trained on everything, and what it is asked."""
    everything = torch.ones(1, len(train["label"]))
    trained = retrain(model_fn, start, train, everything)
    params = {name: x[0] for name, x in trained.items()}
    return Task(model_fn, params, train, queries, batch_size=256)
