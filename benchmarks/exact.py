"""What is right: per-sample gradients in float64, by plain autograd, one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

MAX_NORM = 1.0
WRONG = 1e-3
"""Above this relative error a float32 result is marked as wrong."""


@dataclass(frozen=True)
class Exact:
    """Scores `<g_i, u>`, norms `||g_i||` and the clipped sum, by parameter."""

    scores: Tensor
    norms: Tensor
    clipped: dict[str, Tensor]


Samples = TypeVar("Samples", bound=Sequence[Tensor] | Tensor)


def exact(
    module: nn.Module, loss: Callable[[nn.Module, Samples], Tensor], train: Samples, val: Samples
) -> Exact:
    """The numbers of all n samples of `train`, `u` the gradient of the mean loss of `val`."""
    wide = copy.deepcopy(module).double()
    named = dict(wide.named_parameters())  # tied parameters once
    params = list(named.values())

    def gradient(ids: Samples) -> Sequence[Tensor]:
        return torch.autograd.grad(loss(wide, ids).mean(), params)

    u = gradient(val)
    clipped = [torch.zeros_like(x) for x in params]
    scores, norms = [], []
    for i in range(len(train)):
        g = gradient(train[i : i + 1])
        scores.append(sum(float((x * y).sum()) for x, y in zip(g, u, strict=True)))
        norms.append(float(torch.stack([x.norm() for x in g]).norm()))
        for total, x in zip(clipped, g, strict=True):
            total.add_(x, alpha=min(1.0, MAX_NORM / norms[-1]))
    return Exact(torch.tensor(scores), torch.tensor(norms), dict(zip(named, clipped, strict=True)))


def error(found: Tensor | dict[str, Tensor], expected: Tensor | dict[str, Tensor]) -> float:
    """`||found - expected|| / ||expected||`."""
    if isinstance(found, Tensor) or isinstance(expected, Tensor):
        found, expected = {"": found}, {"": expected}
    if missing := expected.keys() - found.keys():
        raise KeyError(f"No result for {sorted(missing)}.")
    far = torch.stack([(found[k].double() - x.double()).norm() for k, x in expected.items()])
    return float(far.norm() / torch.stack([x.double().norm() for x in expected.values()]).norm())
