"""Squared norms of a batch's gradients, and their dot products with the sum: `||g_i||^2` and
`<g_i, sum_j g_j>`.

Three ways lead to the same numbers, and to the sum itself; `cost` says which is cheapest:

    by rows     a block of rows of every `g_i` is formed, added up, contracted with itself and with
                the sum, and dropped: the products are those of a training gradient, and no more
    by tokens   the Gram matrix of the samples from inner products of positions: squares are its
                diagonal, the others sums of its rows
    apart       the sum, the squares and the dot products one after the other
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.torch_private import known
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import cost, pairs
from ghostfunc._factors.bundles import (
    Bundle,
    aligned,
    counts,
    matrix_shape,
    samples,
    summed,
    values,
)
from ghostfunc._factors.contract import add_up, dot
from ghostfunc._factors.factor import Dense, Grouped, OneHot

FEW_SAMPLES = 8
"""Samples whose Gram matrix takes no more time than reading their gradients twice."""


STRETCH = 1 << 18
"""Elements of gradients that are still in a core's own cache when they are read a second time."""


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
    return spread_of_parts([bundle], contract_dtype)


def spread_of_parts(
    parts: Sequence[Bundle], contract_dtype: ContractDtype = None
) -> SpreadAndTotal:
    """`spread` of samples in parts, one after the other."""
    n, everything = sum(map(samples, parts)), pairs.flat(parts)
    first, *others = everything
    if isinstance(first, Dense) and not others:
        g = wide(first.g).reshape(n, prod(first.shape))
        total = g.sum(0)
        return SpreadAndTotal(_table(g, total, whole=True), total.view(first.shape))
    shape = first.shape
    p, d = matrix_shape(everything)
    if not p * d:
        like = wide(values(everything[0]))
        return SpreadAndTotal(like.new_zeros(n, 2), like.new_zeros(shape))
    if any(isinstance(f, Grouped) for f in everything):
        return _apart(parts, contract_dtype)
    whole = [aligned(bundle, p, d) for bundle in parts]
    way = cost.spread_choice(counts(whole), p, d).way
    if way == "rows" and contract_dtype is None:
        table, total = _by_rows(whole, n, p, d)
        return SpreadAndTotal(table, total.reshape(shape))
    if way == "tokens":
        gram = pairs.gram_of_parts(whole, contract_dtype=contract_dtype)
        table = torch.stack([gram.diagonal(), gram.sum(1)], dim=1)
        return SpreadAndTotal(table, summed(everything))
    return _apart(parts, contract_dtype)


def _apart(parts: Sequence[Bundle], contract_dtype: ContractDtype) -> SpreadAndTotal:
    total = summed(pairs.flat(parts))
    squares = [pairs.sqnorms(bundle, contract_dtype=contract_dtype) for bundle in parts]
    dots = [
        add_up([dot(f, total.reshape(f.shape), contract_dtype) for f in bundle]) for bundle in parts
    ]
    return SpreadAndTotal(torch.stack([pairs.joined(squares), pairs.joined(dots)], dim=1), total)


def _by_rows(parts: Sequence[Bundle], n: int, p: int, d: int) -> tuple[Tensor, Tensor]:
    """Form blocks of rows. A `OneHot` factor takes part in the sum; its inner products with the
    others are made position by position."""
    looked_up = [[f for f in bundle if isinstance(f, OneHot)] for bundle in parts]
    formed = [[f for f in bundle if not isinstance(f, OneHot)] for bundle in parts]
    beside = summed(pairs.flat(looked_up)) if looked_up[0] else None
    step = cost.spread_rows(known(n), known(p), known(d))
    if pairs.in_place(formed, n, p, d):
        table, total = _in_place(formed, beside, p, d, step)
    else:
        table, total = _formed(formed, beside, p, step)
    if beside is not None:
        squares = list(map(pairs.squares_beside, formed, looked_up))
        dots = [add_up([dot(f, total) for f in bundle]) for bundle in looked_up]
        table = table + torch.stack([pairs.joined(squares), pairs.joined(dots)], dim=1)
    return table, total


def _formed(
    parts: Sequence[Bundle], beside: Tensor | None, p: int, step: int
) -> tuple[Tensor, Tensor]:
    """What is read of blocks of rows of all gradients, and the total, with what is `beside` it."""
    tables, totals = [], []
    for rows in pairs.slices(p, step):
        g = pairs.form_rows(parts, rows)
        total = g.sum(0) if beside is None else g.sum(0) + beside[rows]
        totals.append(total)
        tables.append(_table(g.flatten(1), total.flatten(), whole=beside is None))
    return add_up(tables), totals[0] if len(totals) == 1 else torch.cat(totals)


def _in_place(
    parts: Sequence[Bundle], beside: Tensor | None, p: int, d: int, step: int
) -> tuple[Tensor, Tensor]:
    """`_formed`, every block where the last one was, read in stretches, and the total where it
    stays."""
    like, n = wide(values(parts[0][0])), sum(map(samples, parts))
    total, ones = like.new_empty(p, d), like.new_ones(n)
    few = n <= FEW_SAMPLES
    gram, squares, dots = like.new_zeros(n, n), like.new_zeros(n), like.new_zeros(n)
    for rows, block in pairs.row_blocks(parts, n, p, d, step):
        whole, g = total[rows].view(-1), block.flatten(1)
        for stretch in pairs.slices(len(whole), STRETCH // n):
            own, x = whole[stretch], g[:, stretch]
            torch.mv(x.mT, ones, out=own)  # faster than a sum
            if beside is not None:
                own.add_(beside[rows].flatten()[stretch])
            if few:
                gram.addmm_(x, x.mT)
            else:
                squares.add_(_squares(x))
            if beside is not None or not few:
                dots.addmv_(x, own)
    if few:
        squares, dots = gram.diagonal(), gram.sum(1) if beside is None else dots
    return torch.stack([squares, dots], dim=1), total


def _squares(g: Tensor) -> Tensor:
    # A norm adds up in several lanes, and loses fewer digits than a sum of squares.
    squares: Tensor = torch.linalg.vector_norm(g, dim=1).square()
    return squares


def _table(g: Tensor, total: Tensor, *, whole: bool) -> Tensor:
    """`||g_i||^2` and `<g_i, total>`, `[n, 2]`, of gradients `[n, elements]`; whether `total` is
    the `whole` sum of them, and no more."""
    if known(len(g)) > FEW_SAMPLES:
        return torch.stack([_squares(g), g @ total], dim=1)
    gram = g @ g.mT
    dots = gram.sum(1) if whole else g @ total
    return torch.stack([gram.diagonal(), dots], dim=1)
