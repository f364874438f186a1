"""Contractions of one factor: its gradient, the total over samples, dot products, projections.

Contractions run in float32 or wider; a `contract_dtype` rounds the operands of their matrix
products, see `matmul`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import cost
from ghostfunc._factors.factor import Dense, Factor, Grouped, OneHot, Outer, unknown_factor
from ghostfunc._factors.matmul import (
    add_product,
    dots,
    matmul,
    operand,
    positions_through,
)


def row_dots(x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """`<x_i, y_i>` for every row i."""
    return _flat(x * y).sum(1)


def _flat(x: Tensor) -> Tensor:
    """`[n, ...]` as `[n, elements]`; scalars have one."""
    return wide(x)[:, None].flatten(1)


def blocks(n: int, elements_per_sample: int) -> Iterator[slice]:
    """Cut n samples into blocks whose temporaries stay in cache."""
    step = cost.samples_per_block(n, elements_per_sample)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


@singledispatch
def materialize(factor: Factor) -> Float[Tensor, "n ..."]:
    """`g_i` for every sample, `[n, *shape]`, in float32 or wider.

    Args:
        factor: `gf.Outer`, `gf.OneHot`, `gf.Grouped` or `gf.Dense`.

    Raises:
        TypeError: another type.

    Example:
        >>> left, right = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
        >>> gf.materialize(gf.Outer(left, right)).shape
        torch.Size([2, 4, 5])
    """
    raise unknown_factor(factor)


@materialize.register
def _(factor: Outer) -> Tensor:
    return matmul(factor.left.mT, factor.right)


@materialize.register
def _(factor: OneHot) -> Tensor:
    b = wide(factor.b)
    n, _, d = b.shape
    rows = factor.ids + factor.rows * torch.arange(n, device=b.device)[:, None]
    return (
        b.new_zeros(n * factor.rows, d)
        .index_add(0, rows.flatten(), b.flatten(0, 1))
        .view(n, factor.rows, d)
    )


@materialize.register
def _(factor: Grouped) -> Tensor:
    return matmul(factor.left.mT, factor.right)


@materialize.register
def _(factor: Dense) -> Tensor:
    return wide(factor.g)


@singledispatch
def total(factor: Factor, contract_dtype: ContractDtype = None) -> Float[Tensor, "..."]:
    """`sum_i g_i`, shape `[*shape]`: the ordinary gradient of the summed losses."""
    raise unknown_factor(factor)


@total.register
def _(factor: Outer, contract_dtype: ContractDtype = None) -> Tensor:
    left, right = factor.left.flatten(0, 1), factor.right.flatten(0, 1)
    return matmul(left.mT, right, contract_dtype)


@total.register
def _(factor: OneHot, contract_dtype: ContractDtype = None) -> Tensor:
    b = wide(factor.b)
    return torch.ops.aten.embedding_dense_backward(b, factor.ids, factor.rows, -1, False)


@total.register
def _(factor: Grouped, contract_dtype: ContractDtype = None) -> Tensor:
    left, right = (x.transpose(0, 1).flatten(1, 2) for x in factor)
    return matmul(left.mT, right, contract_dtype)


@total.register
def _(factor: Dense, contract_dtype: ContractDtype = None) -> Tensor:
    return wide(factor.g).sum(0)


def add_total(
    factor: Factor, into: Float[Tensor, "..."], contract_dtype: ContractDtype = None
) -> None:
    """Add `sum_i g_i` to a tensor in place, without forming it where it can be avoided."""
    match factor:
        case Outer(left, right) if contract_dtype is None:
            add_product(into, left.flatten(0, 1).mT, right.flatten(0, 1))
        case OneHot(ids, b, _):
            into.index_add_(0, ids.flatten(), wide(b).flatten(0, 1))
        case _:
            into.add_(total(factor, contract_dtype))


@singledispatch
def dot(
    factor: Factor, u: Float[Tensor, "..."], contract_dtype: ContractDtype = None
) -> Float[Tensor, " n"]:
    """`<g_i, u>` for every sample; `u` has the factor's shape."""
    raise unknown_factor(factor)


@dot.register
def _(factor: Outer, u: Tensor, contract_dtype: ContractDtype = None) -> Tensor:
    t = factor.left.shape[1]
    return _dot_outer(factor, u, t * min(factor.shape), contract_dtype)


@dot.register
def _(factor: OneHot, u: Tensor, contract_dtype: ContractDtype = None) -> Tensor:
    return row_dots(F.embedding(factor.ids, wide(u)), wide(factor.b))


@dot.register
def _(factor: Grouped, u: Tensor, contract_dtype: ContractDtype = None) -> Tensor:
    groups, t = factor.left.shape[1:3]
    return _dot_outer(factor, u, groups * t * min(factor.shape[1:]), contract_dtype)


def _dot_outer(
    factor: Outer | Grouped, u: Tensor, elements: int, contract_dtype: ContractDtype
) -> Tensor:
    left, right, u = wide(factor.left), wide(factor.right), operand(u, contract_dtype)
    # The product with u is formed on the side where it is smaller.
    if left.shape[-1] < right.shape[-1]:
        left, right, u = right, left, u.mT
    return torch.cat(
        [
            row_dots(positions_through(left[s], u, contract_dtype), right[s])
            for s in blocks(len(left), elements)
        ]
    )


@dot.register
def _(factor: Dense, u: Tensor, contract_dtype: ContractDtype = None) -> Tensor:
    return dots(_flat(factor.g), wide(u).flatten())


def position_dots(
    factor: Factor, u: Float[Tensor, "p d"], contract_dtype: ContractDtype = None
) -> Float[Tensor, "n t"]:
    """What each position adds to `<g_i, u>`; their sum over positions is `dot`."""
    match factor:
        case OneHot(ids, b, _):
            return (F.embedding(ids, wide(u)) * wide(b)).sum(-1)
        case Outer(left, right):
            left, right, u = wide(left), wide(right), operand(u, contract_dtype)
            if left.shape[-1] < right.shape[-1]:
                left, right, u = right, left, u.mT
            step = left.shape[1] * right.shape[-1]
            parts = [
                (positions_through(left[s], u, contract_dtype) * right[s]).sum(-1)
                for s in blocks(len(left), step)
            ]
            return torch.cat(parts)
        case _:
            raise unknown_factor(factor)


def add_up(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    if len(tensors) > 2 and all(x.ndim == 1 for x in tensors):
        return torch.stack(list(tensors)).sum(0)  # two calls, however many there are
    out = tensors[0]
    for x in tensors[1:]:
        out = out + x
    return out


@singledispatch
def project(
    factor: Factor,
    left: Float[Tensor, "p k"] | None,
    right: Float[Tensor, "d l"] | None,
    contract_dtype: ContractDtype = None,
) -> Float[Tensor, "n k l"]:
    """`left^T g_i right` for every sample; None is the identity."""
    raise unknown_factor(factor)


@project.register
def _(
    factor: Outer,
    left: Tensor | None,
    right: Tensor | None,
    contract_dtype: ContractDtype = None,
) -> Tensor:
    return matmul(
        _times(wide(factor.left), left, contract_dtype).mT,
        _times(wide(factor.right), right, contract_dtype),
        contract_dtype,
    )


@project.register
def _(
    factor: OneHot,
    left: Tensor | None,
    right: Tensor | None,
    contract_dtype: ContractDtype = None,
) -> Tensor:
    b = _times(wide(factor.b), right, contract_dtype)
    if left is None:
        return materialize(OneHot(factor.ids, b, factor.rows))
    return matmul(F.embedding(factor.ids, left).to(b.dtype).mT, b, contract_dtype)


@project.register
def _(
    factor: Grouped,
    left: Tensor | None,
    right: Tensor | None,
    contract_dtype: ContractDtype = None,
) -> Tensor:
    return project(Dense(materialize(factor)), left, right, contract_dtype)


@project.register
def _(
    factor: Dense,
    left: Tensor | None,
    right: Tensor | None,
    contract_dtype: ContractDtype = None,
) -> Tensor:
    half = _times(wide(factor.g), right, contract_dtype)
    return _times(half.mT, left, contract_dtype).mT


def _times(x: Tensor, matrix: Tensor | None, contract_dtype: ContractDtype) -> Tensor:
    return x if matrix is None else positions_through(x, matrix.to(x.dtype), contract_dtype)


def transpose(factor: Factor) -> Factor:
    """The factor of `W.t()`, given that of `W`."""
    match factor:
        case Outer(left, right):
            return Outer(right, left)
        case OneHot():
            return Dense(materialize(factor).mT)
        case Dense(g):
            return Dense(g.mT)
        case _:
            raise unknown_factor(factor)
