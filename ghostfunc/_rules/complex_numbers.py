"""Rules for complex tensors, made of those for real ones, where an op is linear in each operand.

    y = W A        g_i = sum_t b_it conj(a_it)^T

As real numbers a complex matrix has a third axis, its real and imaginary part, and each position is
two: `(p + iq)(r + is) = p (r + is) + q (-s + ir)`. The factor stays an outer product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.trees import map_leaves
from ghostfunc._factors.factor import Dense, Factor, Grouped, OneHot, Outer, unknown_factor
from ghostfunc._rules.registry import FactorMakers, FactorRule


@cache
def for_complex(rule: FactorRule) -> FactorRule:
    """The rule of the same op for complex operands."""

    def fn(b: Tensor, *args: Any, **kwargs: Any) -> FactorMakers:
        conjugated = rule.fn(b, *map_leaves(_conj, args), **map_leaves(_conj, kwargs))
        return {name: partial(_made_real, make) for name, make in conjugated.items()}

    return replace(rule, fn=fn)


def _conj(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.conj() if x.is_complex() else x
    return x.conjugate() if isinstance(x, complex) else x


def _made_real(make: Callable[[], Factor]) -> Factor:
    """A factor of complex numbers as one of real numbers, its last axis twice as long."""
    match make():
        case Outer(left, right):
            return Outer(*_twice_the_positions(left, right))
        case Grouped(left, right):
            return Grouped(*_twice_the_positions(left, right))
        case OneHot(ids, b, rows):
            return OneHot(ids, torch.view_as_real(b.resolve_conj()).flatten(-2), rows)
        case Dense(g):
            return Dense(torch.view_as_real(g.resolve_conj()))
        case factor:
            raise unknown_factor(factor)


def _twice_the_positions(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    by_real, by_imaginary = (torch.view_as_real(x.resolve_conj()) for x in (right, 1j * right))
    lefts = torch.cat([left.real, left.imag], dim=-2)
    return lefts, torch.cat([by_real, by_imaginary], dim=-3).flatten(-2)
