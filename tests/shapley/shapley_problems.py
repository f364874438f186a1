"""Small problems in float64, and what a step really does to the validation loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from problems import CASES
from torch import Tensor, nn

import ghostfunc as gf


class Setting:
    """A model, a training batch and two validation sets."""

    def __init__(self, case: str, n: int = 5) -> None:
        problem = CASES[case]()
        self.model_fn, self.params = problem.model_fn, problem.params
        self.train = problem.batch(n)
        self.val_sets = {"a": problem.batch(3, 5, seed=1), "b": problem.batch(2, 3, seed=2)}

    def weighted_grad(self, samples: list[int], weight: float) -> dict[str, Tensor]:
        """`weight * sum_i g_i` over some samples, by plain autograd."""
        leaves = {k: x.clone().requires_grad_() for k, x in self.params.items()}
        total = (weight * self.model_fn(leaves, self.train)[samples]).sum()
        grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, grads, strict=True))

    def val_loss(self, name: str, changes: dict[str, Tensor]) -> float:
        moved = {k: x + changes[k] for k, x in self.params.items()}
        with torch.no_grad():
            return float(self.model_fn(moved, self.val_sets[name]).mean())


def network() -> tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Callable[[int, int], Any]]:
    """A classifier, its loss, and batches of it."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    def draw(n: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (n,), generator=generator)

    return net, loss, draw


def zeros_like(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.zeros_like(x) for k, x in params.items()}


def dense_values(setting: Setting, directions: dict[str, Any], weight: float) -> Tensor:
    """`weight <g_i, direction>`, `[n, sets]`, from materialized gradients."""
    rows = gf.per_sample_grads(setting.model_fn, setting.params, setting.train, vectorize=False)
    return torch.stack(
        [
            weight * sum((rows[k].flatten(1) @ u[k].flatten()) for k in rows)
            for u in directions.values()
        ],
        dim=1,
    )
