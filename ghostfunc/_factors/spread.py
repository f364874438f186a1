"""How the gradients of a batch lie to their sum: `||g_i||^2` and `<g_i, sum_j g_j>`.

Three ways lead to the same numbers, and to the sum itself; `cost` says which is cheapest:

    by rows     a block of rows of every `g_i` is formed, added up, contracted with itself and with
                the sum, and dropped: the products are those of a training gradient, and no more
    by tokens   the Gram matrix of the samples from inner products of positions: squares are its
                diagonal, the others sums of its rows
    apart       the sum, the squares and the dot products one after the other
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.torch_private import in_transform, known, symbolic
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import cost, pairs
from ghostfunc._factors.bundles import (
    Bundle,
    aligned,
    matrix_shape,
    positions,
    samples,
    summed,
    values,
)
from ghostfunc._factors.contract import add_up, dot
from ghostfunc._factors.factor import Grouped, OneHot, Outer
from ghostfunc._factors.matmul import product

FEW_SAMPLES = 8
"""Samples whose Gram matrix takes no more time than reading their gradients twice."""

LARGE = 1 << 18
"""Elements of gradients from which on memory costs more than the calls that save it."""


class SpreadAndTotal(NamedTuple):
    """What is made of the factors of one parameter.

    Attributes:
        table: `||g_i||^2` and `<g_i, sum_j g_j>` side by side, `[n, 2]`, float32 or wider.
        total: `sum_j g_j`, in the shape of the first factor.
    """

    table: Tensor
    total: Tensor


def spread(bundle: Bundle, contract_dtype: ContractDtype = None) -> SpreadAndTotal:
    """Both columns and the sum, the cheapest way. The sum is never rounded to a
    `contract_dtype`."""
    n, shape = samples(bundle), bundle[0].shape
    p, d = matrix_shape(bundle)
    if not p * d:
        like = wide(values(bundle[0]))
        return SpreadAndTotal(like.new_zeros(n, 2), like.new_zeros(shape))
    if any(isinstance(f, Grouped) for f in bundle):
        return _apart(bundle, contract_dtype)
    whole = aligned(bundle, p, d)
    way = cost.spread_choice(n, positions(whole), p, d).way
    if way == "rows" and contract_dtype is None:
        table, total = _by_rows(whole, n, p, d)
        return SpreadAndTotal(table, total.reshape(shape))
    if way == "tokens":
        gram = pairs.gram(whole, contract_dtype=contract_dtype)
        table = torch.stack([gram.diagonal(), gram.sum(1)], dim=1)
        return SpreadAndTotal(table, summed(bundle))
    return _apart(bundle, contract_dtype)


def _apart(bundle: Bundle, contract_dtype: ContractDtype) -> SpreadAndTotal:
    total = summed(bundle)
    squares = pairs.sqnorms(bundle, contract_dtype=contract_dtype)
    dots = add_up([dot(f, total.reshape(f.shape), contract_dtype) for f in bundle])
    return SpreadAndTotal(torch.stack([squares, dots], dim=1), total)


def _by_rows(bundle: Bundle, n: int, p: int, d: int) -> tuple[Tensor, Tensor]:
    """Blocks of rows; what is looked up takes part in the sum, and meets the others by tokens."""
    looked_up = [f for f in bundle if isinstance(f, OneHot)]
    formed = [f for f in bundle if not isinstance(f, OneHot)]
    beside = summed(looked_up) if looked_up else None
    step = cost.spread_rows(known(n), known(p), known(d))
    alone = _alone(formed) if known(n) * known(p) * known(d) >= LARGE else None
    if alone is None:
        tables, total = _formed(formed, beside, p, step)
    else:
        tables, total = _in_place(alone, beside, p, step)
    table = add_up(tables)
    if looked_up:
        squares = pairs.squares_beside(formed, looked_up)
        dots = add_up([dot(f, total) for f in looked_up])
        table = table + torch.stack([squares, dots], dim=1)
    return table, total


def _formed(
    bundle: Bundle, beside: Tensor | None, p: int, step: int
) -> tuple[list[Tensor], Tensor]:
    """What is read of blocks of rows of all gradients, and the total, with what is `beside` it."""
    tables, totals = [], []
    for rows in pairs.slices(p, step):
        g = pairs.form_rows(bundle, rows)
        total = g.sum(0) if beside is None else g.sum(0) + beside[rows]
        totals.append(total)
        tables.append(_table(g.flatten(1), total.flatten(), whole=beside is None))
    return tables, totals[0] if len(totals) == 1 else torch.cat(totals)


def _alone(bundle: Bundle) -> Outer | None:
    """A single outer product that no transform, no compiler and no derivative follows: its blocks
    may be formed in one piece of memory."""
    factor = bundle[0]
    if len(bundle) != 1 or not isinstance(factor, Outer) or in_transform():
        return None
    left, right = factor
    followed = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    return None if followed or symbolic(left) else factor


def _in_place(
    factor: Outer, beside: Tensor | None, p: int, step: int
) -> tuple[list[Tensor], Tensor]:
    """`_formed`, every block where the last one was, and the total where it stays: memory that is
    touched for the first time costs about as much as all that is read off it."""
    left, right = wide(factor.left), wide(factor.right)
    n, d = len(left), right.shape[-1]
    memory, total, ones = left.new_empty(n * step * d), left.new_empty(p, d), left.new_ones(n)
    tables = []
    for rows in pairs.slices(p, step):
        own = total[rows].view(-1)
        block = memory[: n * len(own)].view(n, -1)
        product(left[:, :, rows].mT, right, out=block.view(n, -1, d))
        torch.mv(block.mT, ones, out=own)  # faster than a sum
        if beside is not None:
            own.add_(beside[rows].flatten())
        tables.append(_table(block, own, whole=beside is None))
    return tables, total


def _table(g: Tensor, total: Tensor, *, whole: bool) -> Tensor:
    """`||g_i||^2` and `<g_i, total>`, `[n, 2]`, of gradients `[n, elements]`; whether `total` is
    the `whole` sum of them, and no more."""
    if known(len(g)) > FEW_SAMPLES:
        squares = torch.linalg.vector_norm(g, dim=1).square()  # adds up in lanes
        return torch.stack([squares, g @ total], dim=1)
    gram = g @ g.mT
    dots = gram.sum(1) if whole else g @ total
    return torch.stack([gram.diagonal(), dots], dim=1)
