"""Routed experts: `routed(x, W, ids)` takes every row of `x` to the matrix of its expert.

    g_i[e] = sum over rows r of sample i with ids_r = e   b_r x_r^T

a factor with a group per expert. The rows of each lie one after the other, as many as the busiest
expert of any sample has; those of the others are filled up with zeros.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ghostfunc._base.experts import routed, static
from ghostfunc._factors.factor import Grouped, flat_positions
from ghostfunc._rules.registry import FactorMakers, TwoForms, register_rule


@register_rule(routed)
def experts(
    b: Tensor, x: Tensor, weight: Tensor, ids: Tensor, transposed: bool = False
) -> FactorMakers:
    def of_weight(apart: bool) -> Grouped:
        number, own = weight.shape[1], ids.flatten(1)
        places, size = (_apart if apart else _together)(own, number)
        left, right = (_grouped(flat_positions(v), places, size, number) for v in (b, x))
        return Grouped(right, left) if transposed else Grouped(left, right)

    return {"weight": TwoForms(partial(of_weight, False), partial(of_weight, True))}


def _apart(ids: Tensor, experts: int) -> tuple[Tensor, int]:
    """Where each row goes, `[n, S]`, and how many fit an expert: as many as there are, every one at
    its own place."""
    s = ids.shape[1]
    return ids * s + torch.arange(s, device=ids.device), s


def _together(ids: Tensor, experts: int) -> tuple[Tensor, int]:
    """The same: as many as the busiest expert has, one after the other."""
    n, s = ids.shape
    counts = ids.new_zeros(n, experts).scatter_add(1, ids, torch.ones_like(ids))
    size = s if static() else int(counts.max())
    firsts = (counts.cumsum(1) - counts).gather(1, ids)
    ranks = ids.argsort(dim=1, stable=True).argsort(1)
    return ids * size + ranks - firsts, size


def _grouped(x: Tensor, places: Tensor, size: int, experts: int) -> Tensor:
    """`[n, S, d]` -> `[n, experts, size, d]`."""
    out = x.new_zeros(len(x), experts * size, x.shape[-1])
    return out.scatter(1, places[..., None].expand_as(x), x).unflatten(1, (experts, size))
