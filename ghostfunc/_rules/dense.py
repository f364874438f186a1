"""Ops whose per-sample gradient is dense anyway: similarities of samples to prototypes, activations
with parameters, and others. Of most the factor is the pull-back of the op itself, by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._factors.factor import Dense
from ghostfunc._rules.registry import FactorMakers, register_rule


def pulled_back(b: Tensor, op: Callable[..., Tensor], tensors: dict[str, Tensor]) -> FactorMakers:
    """The factors of all tensors of `op(*tensors)`, as dense as they come."""

    def factor_of(position: int) -> Dense:
        def one(cotangent: Tensor, *args: Tensor) -> Tensor:
            def of_argument(x: Tensor) -> Tensor:
                return op(*args[:position], x, *args[position + 1 :])

            pulled: Tensor = torch.func.vjp(of_argument, args[position])[1](cotangent)[0]
            return pulled

        return Dense(torch.vmap(one)(b, *tensors.values()))

    return {name: partial(factor_of, i) for i, name in enumerate(tensors)}


@register_rule(F.cosine_similarity)
def cosine_similarity(
    b: Tensor, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8
) -> FactorMakers:
    return pulled_back(
        b, lambda x1, x2: F.cosine_similarity(x1, x2, dim, eps), {"x1": x1, "x2": x2}
    )


@register_rule(F.pairwise_distance)
def pairwise_distance(
    b: Tensor, x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> FactorMakers:
    return pulled_back(
        b, lambda x1, x2: F.pairwise_distance(x1, x2, p, eps, keepdim), {"x1": x1, "x2": x2}
    )


@register_rule(torch.cdist)
def cdist(
    b: Tensor,
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> FactorMakers:
    return pulled_back(b, lambda x1, x2: torch.cdist(x1, x2, p, compute_mode), {"x1": x1, "x2": x2})


@register_rule(torch.linalg.vecdot)
def vecdot(b: Tensor, x: Tensor, y: Tensor, *, dim: int = -1) -> FactorMakers:
    return pulled_back(b, lambda x, y: torch.linalg.vecdot(x, y, dim=dim), {"x": x, "y": y})


@register_rule(torch.linalg.cross)
def linalg_cross(b: Tensor, input: Tensor, other: Tensor, *, dim: int = -1) -> FactorMakers:
    return pulled_back(
        b, lambda x, y: torch.linalg.cross(x, y, dim=dim), {"input": input, "other": other}
    )


@register_rule(torch.kron, Tensor.kron)
def kron(b: Tensor, input: Tensor, other: Tensor) -> FactorMakers:
    return pulled_back(b, torch.kron, {"input": input, "other": other})


@register_rule(F.grid_sample)
def grid_sample(
    b: Tensor, input: Tensor, grid: Tensor, *options: Any, **named: Any
) -> FactorMakers:
    return pulled_back(
        b,
        lambda input, grid: F.grid_sample(input, grid, *options, **named),
        {"input": input, "grid": grid},
    )


@register_rule(torch.linalg.solve)
def solve(b: Tensor, A: Tensor, B: Tensor, *, left: bool = True) -> FactorMakers:
    return pulled_back(b, lambda A, B: torch.linalg.solve(A, B, left=left), {"A": A, "B": B})


@register_rule(F.prelu)
def prelu(b: Tensor, input: Tensor, weight: Tensor) -> FactorMakers:
    def of_weight() -> Dense:
        g = wide(b) * wide(input).clamp(max=0)
        if weight.shape[1:].numel() == 1:
            return Dense(g.reshape(len(g), -1).sum(1))
        return Dense(g.movedim(2, 1).flatten(2).sum(2))  # the channels are the call's second axis

    return {"weight": of_weight}
