"""Matrix products with a parameter: `F.linear`, `addmm`, `matmul`.

`y = a W^T` has `g_i = sum_t b_it a_it^T`; `y = a W` has its transpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._factors import Dense, Outer, wide
from ghostfunc._rules._registry import RuleFn, register_rule, rows


@register_rule(F.linear)
def linear(b, input, weight, bias=None):  # type: ignore[no-untyped-def]
    return {
        "weight": lambda: Outer(rows(b), rows(input)),
        "bias": lambda: Dense(wide(rows(b)).sum(1)),
    }


@register_rule(torch.addmm, torch.Tensor.addmm)
def addmm(b, input, mat1, mat2, *, beta=1, alpha=1):  # type: ignore[no-untyped-def]
    # Samples are on the rows: mat1 carries them, mat2 is the weight, input the bias.
    return {
        "input": lambda: Dense(beta * sum_to(rows(b), input.shape)),
        "mat2": lambda: Outer(rows(mat1), scaled(rows(b), alpha)),
    }


def _matmul(b: Tensor, left: Tensor, right: Tensor) -> tuple[object, object]:
    """Factors of `left` and of `right` in `y = left @ right`, as functions."""

    def of_right() -> Outer | Dense:
        if right.ndim == 2:
            return Outer(rows(left), rows(b))
        if right.ndim == 1:
            return Dense((wide(rows(left)) * wide(b.reshape(len(b), -1, 1))).sum(1))
        return Dense(sum_to(wide(left).mT @ wide(b), right.shape))

    def of_left() -> Outer | Dense:
        if left.ndim == 2 and right.ndim > 2:
            return Outer(rows(b.mT), rows(right.mT))
        if left.ndim == 2:  # right is [n, d], one vector a sample
            return Outer(b[:, None], right[:, None])
        if left.ndim == 1:
            return Dense(sum_to(wide(right) @ wide(b)[..., None], (*left.shape, 1))[..., 0])
        return Dense(sum_to(wide(b) @ wide(right).mT, left.shape))

    return of_left, of_right


@register_rule(
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm
)
def matmul(b, input, other):  # type: ignore[no-untyped-def]
    of_left, of_right = _matmul(b, input, other)
    return {"input": of_left, "other": of_right}


@register_rule(torch.Tensor.__rmatmul__)
def rmatmul(b, input, other):  # type: ignore[no-untyped-def]
    of_left, of_right = _matmul(b, other, input)
    return {"input": of_right, "other": of_left}


def sum_to(g: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Sum `[n, ...]` over the axes that broadcasting `shape` added, keeping the samples."""
    extra = g.ndim - 1 - len(shape)
    g = wide(g).sum(tuple(range(1, 1 + extra))) if extra else wide(g)
    grown = tuple(i + 1 for i, s in enumerate(shape) if s == 1 and g.shape[i + 1] != 1)
    return g.sum(grown, keepdim=True) if grown else g


def scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


__all__ = ["RuleFn", "addmm", "linear", "matmul", "rmatmul", "sum_to"]
