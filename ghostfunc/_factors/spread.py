"""Squared norms of a batch's gradients, and their dot products with the sum: `||g_i||^2` and
`<g_i, sum_j g_j>`.

Three ways lead to the same numbers, and to the sum itself; `cost` says which is cheapest, the
first or the last for samples of every length:

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
    side_by_side,
    summed,
    values,
)
from ghostfunc._factors.contract import add_up, dot, position_dots
from ghostfunc._factors.factor import Dense, Grouped, OneHot, Outer
from ghostfunc._factors.matmul import dots, inner_products, squares

FEW_SAMPLES = 8
"""The number of samples up to which a Gram matrix takes fewer calls than norms and dot products do,
and no more time where gradients are small."""

FEW_OF_LARGE = 4
"""The same number for large gradients: the Gram matrix of eight takes twice as long as reading them
twice."""

STRETCH = 1 << 15
"""Elements of every gradient that are read at one time: few enough to be still at hand when they
are read a second time and for sums that keep their digits, and so many that a call costs little
beside them."""


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
        table, total = spread_of_formed(wide(first.g).reshape(n, prod(first.shape)))
        return SpreadAndTotal(table, total.view(first.shape))
    shape = first.shape
    p, d = matrix_shape(everything)
    if not p * d:
        like = wide(values(everything[0]))
        return SpreadAndTotal(like.new_zeros(n, 2), like.new_zeros(shape))
    if any(isinstance(f, Grouped) for f in everything):
        return _by_parts(parts, [False] * len(parts), contract_dtype)
    whole = [aligned(bundle, p, d) for bundle in parts]
    ways = cost.spread_ways(counts(whole), p, d)
    if ways[0] == "tokens":
        gram = pairs.gram_of_parts(whole, contract_dtype=contract_dtype)
        table = torch.stack([gram.diagonal(), gram.sum(1)], dim=1)
        return SpreadAndTotal(table, summed(everything))
    formed = [way == "rows" and contract_dtype is None for way in ways]
    table, total = _by_parts(whole, formed, contract_dtype)
    return SpreadAndTotal(table, total.reshape(shape))


def spread_of_formed(g: Tensor) -> SpreadAndTotal:
    """`spread` of gradients at hand, `[..., n, elements]`: of one parameter, or several."""
    total = g.sum(-2)
    return SpreadAndTotal(_table(g, total, whole=True), total)


def _by_parts(
    parts: Sequence[Bundle], formed: Sequence[bool], contract_dtype: ContractDtype
) -> SpreadAndTotal:
    """The gradients of some parts are formed. Those of the others come first into the sum, and are
    read last, one quantity after the other."""
    by_rows = [bundle for bundle, here in zip(parts, formed, strict=True) if here]
    apart = [bundle for bundle, here in zip(parts, formed, strict=True) if not here]
    together = _side_by_side(apart)
    total = summed(together or pairs.flat(apart)) if apart else None
    tables: Sequence[Tensor] = []
    if by_rows:
        table, total = _by_rows(by_rows, total)
        tables = table.split(list(map(samples, by_rows)))
    assert total is not None
    squares = [pairs.sqnorms(bundle, contract_dtype=contract_dtype) for bundle in apart]
    others = zip(squares, _dots(apart, together, total, contract_dtype), strict=True)
    read = iter(tables), (torch.stack(both, dim=1) for both in others)
    return SpreadAndTotal(pairs.joined([next(read[not here]) for here in formed]), total)


def _side_by_side(parts: Sequence[Bundle]) -> Bundle | None:
    """For every use the positions of all parts, as those of one sample: their products are large.
    None of a single part, and of factors without positions."""
    if len(parts) < 2 or not all(isinstance(f, (Outer, OneHot)) for f in pairs.flat(parts)):
        return None
    return [side_by_side(use) for use in zip(*parts, strict=True)]


def _dots(
    parts: Sequence[Bundle], together: Bundle | None, u: Tensor, contract_dtype: ContractDtype
) -> list[Tensor]:
    """`<g_i, u>` of the samples of every part."""
    if together is None:
        return [
            add_up([dot(f, u.reshape(f.shape), contract_dtype) for f in bundle]) for bundle in parts
        ]
    found = []
    for whole, use in zip(together, zip(*parts, strict=True), strict=True):
        sizes = [samples([f]) * f[0].shape[1] for f in use]
        shares = position_dots(whole, u, contract_dtype)[0].split(sizes)
        found.append([x.view(samples([f]), -1).sum(1) for x, f in zip(shares, use, strict=True)])
    return [add_up(x) for x in zip(*found, strict=True)]


def _by_rows(parts: Sequence[Bundle], before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both columns of the table, and the sum of the gradients and of `before`."""
    n, (p, d) = sum(map(samples, parts)), parts[0][0].shape
    step = cost.spread_rows(known(n), known(p), known(d))
    if pairs.in_place(parts, n, p, d):
        return _in_place(parts, before, n, step)
    tables, totals = [], []
    for rows in pairs.slices(p, step):
        g = pairs.form_rows(parts, rows)
        total = g.sum(0) if before is None else g.sum(0) + before[rows]
        totals.append(total)
        tables.append(_table(g.flatten(1), total.flatten(), whole=before is None))
    return add_up(tables), totals[0] if len(totals) == 1 else torch.cat(totals)


def _in_place(
    parts: Sequence[Bundle], before: Tensor | None, n: int, step: int
) -> tuple[Tensor, Tensor]:
    """`_by_rows`, every block where the last one was, read in stretches, and the total where it
    stays."""
    like, (p, d) = wide(values(parts[0][0])), parts[0][0].shape
    total, ones = like.new_empty(p, d) if before is None else before, like.new_ones(n)
    alone, few = before is None, n <= FEW_OF_LARGE
    gram, sizes, along = like.new_zeros(n, n), like.new_zeros(n), like.new_zeros(n)
    for rows, block in pairs.row_blocks(parts, n, p, d, step):
        pieces = total[rows].view(-1).split(STRETCH), block.flatten(1).split(STRETCH, 1)
        for own, x in zip(*pieces, strict=True):
            own.addmv_(x.mT, ones, beta=0 if alone else 1)  # faster than a sum
            if few:
                gram.addmm_(x, x.mT)
            else:
                sizes.add_(squares(x))
            if not (few and alone):
                along.addmv_(x, own)
    if few:
        sizes, along = gram.diagonal(), gram.sum(1) if alone else along
    return torch.stack([sizes, along], dim=1), total


def _table(g: Tensor, total: Tensor, *, whole: bool) -> Tensor:
    """`||g_i||^2` and `<g_i, total>`, `[..., n, 2]`, of gradients `[..., n, elements]`; whether
    `total` is the `whole` sum of them, and no more."""
    few = known(g.shape[-2]) <= FEW_SAMPLES
    if not (few and whole):
        along = dots(g, total)
    if not few:
        return torch.stack([squares(g), along], dim=-1)
    gram = inner_products(g, g)
    along = gram.sum(-1) if whole else along
    return torch.stack([gram.diagonal(dim1=-2, dim2=-1), along], dim=-1)
