"""Bundles: the factors of all uses of one parameter, whose sum is the per-sample gradient."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.torch_private import address, known, symbolic
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import contract, cost
from ghostfunc._factors.contract import add_up, materialize, total
from ghostfunc._factors.factor import Dense, Factor, Grouped, OneHot, Outer

Bundle: TypeAlias = Sequence[Factor]


def samples(bundle: Bundle) -> int:
    """The number of samples."""
    return bundle[0][0].shape[0]


def use_shape(factor: Factor) -> cost.UseShape:
    """A factor at its parameter, as `cost` weighs it."""
    kind = type(factor).__name__
    positions = factor[0].shape[1] if isinstance(factor, (Outer, OneHot)) else 1
    return cost.UseShape(kind, factor.shape, samples([factor]), positions, direct=True)


def values(factor: Factor) -> Tensor:
    """A tensor of the factor's dtype and device."""
    return factor.b if isinstance(factor, OneHot) else factor[0]


def pooled(factor: Factor) -> Factor:
    """The factor of `sum_i g_i`, as that of a single sample."""
    match factor:
        case Outer(left, right):
            return Outer(left.flatten(0, 1)[None], right.flatten(0, 1)[None])
        case OneHot(ids, b, rows):
            return OneHot(ids.flatten()[None], b.flatten(0, 1)[None], rows)
        case Grouped(left, right):
            return Grouped(*(x.transpose(0, 1).flatten(1, 2)[None] for x in (left, right)))
        case Dense(g):
            return Dense(wide(g).sum(0, keepdim=True))


def take(factor: Factor, index: slice | Tensor) -> Factor:
    """The factor of some of the samples."""
    match factor:
        case Outer(left, right):
            return Outer(left[index], right[index])
        case OneHot(ids, b, rows):
            return OneHot(ids[index], b[index], rows)
        case Grouped(left, right):
            return Grouped(left[index], right[index])
        case Dense(g):
            return Dense(g[index])


def owned(factor: Factor, foreign: Collection[int]) -> Factor:
    """The factor, with copies of what lies in memory at these `foreign` addresses."""

    def own(x: Tensor) -> Tensor:
        if address(x) not in foreign:
            return x
        repeated = [
            i
            for i, (size, step) in enumerate(zip(x.shape, x.stride(), strict=True))
            if step == 0 and size > 1
        ]
        once = x
        for i in repeated:
            once = once.narrow(i, 0, 1)
        return once.clone().expand(x.shape)

    match factor:
        case Outer(left, right) | Grouped(left, right):
            return type(factor)(own(left), own(right))
        case OneHot(ids, b, rows):
            return OneHot(own(ids), own(b), rows)
        case Dense(g):
            return Dense(own(g))


def dot(factor: Factor, u: Tensor) -> Tensor:
    """`<g_i, u>`, `[n]`, for a `u` in the parameter's own shape and dtype."""
    return contract.dot(factor, u.reshape(factor.shape).to(wide(values(factor)).dtype))


def side_by_side(factors: Sequence[Outer] | Sequence[OneHot]) -> Outer | OneHot:
    """The positions of several factors of one kind, as those of a single sample."""
    x, y = (torch.cat(side, 1) for side in zip(*(pooled(f)[:2] for f in factors), strict=True))
    first = factors[0]
    return OneHot(x, y, first.rows) if isinstance(first, OneHot) else Outer(x, y)


def summed(bundle: Bundle, contract_dtype: ContractDtype = None) -> Tensor:
    """`sum_i g_i`, in the shape of the first factor."""
    first, *others = bundle
    out = total(first, contract_dtype)
    for factor in _few_products(others):
        contract.add_total(factor, out.view(factor.shape), contract_dtype)
    return out


def _few_products(bundle: Bundle) -> Bundle:
    """The factors, with small outer products put into one. An outer product that is smaller than
    the sum would read and write the whole sum for itself."""
    if len(bundle) < 2:
        return bundle
    small: dict[tuple[int, ...], list[Outer]] = {}
    rest: list[Factor] = []
    for f in bundle:
        if isinstance(f, Outer) and known(f.left.numel() + f.right.numel()) < prod(f.shape):
            small.setdefault(f.shape, []).append(f)
        else:
            rest.append(f)
    return [*rest, *(fs[0] if len(fs) == 1 else side_by_side(fs) for fs in small.values())]


def weighted_total(bundle: Bundle, weights: Tensor, *, finite: bool = False) -> Tensor:
    """`sum_i w_i g_i`, in the shape of the first factor."""
    return summed(weighted(bundle, weights, finite=finite))


def weighted(bundle: Bundle, weights: Tensor, *, finite: bool = False) -> Bundle:
    """The factors of `w_i g_i`.

    Samples of weight zero are left out: whatever their gradients hold, they cost and spoil nothing.
    Of gradients that are taken to be `finite`, nobody asks which: that would wait for the device.
    """
    if finite:
        pass
    elif symbolic(weights):
        bundle = [_blanked(f, weights == 0) for f in bundle]
    elif bool((weights == 0).any()):
        kept = weights.nonzero().flatten()
        bundle, weights = [take(f, kept) for f in bundle], weights[kept]
    return [_weighted(f, weights) for f in bundle]


def _blanked(factor: Factor, blank: Tensor) -> Factor:
    """The factor with zeros for some of the samples."""

    def fill(x: Tensor) -> Tensor:
        return x.masked_fill(blank.view(-1, *[1] * (x.ndim - 1)), 0)

    match factor:
        case OneHot(ids, b, rows):
            return OneHot(ids, fill(b), rows)
        case Outer(left, right) | Grouped(left, right):
            return type(factor)(fill(left), fill(right))
        case Dense(g):
            return Dense(fill(g))


def _weighted(factor: Factor, weights: Tensor) -> Factor:
    match factor:
        case Outer(left, right) if left.shape[-1] <= right.shape[-1]:
            return Outer(_times(left, weights), right)
        case Outer(left, right):
            return Outer(left, _times(right, weights))
        case OneHot(ids, b, rows):
            return OneHot(ids, _times(b, weights), rows)
        case Grouped(left, right):
            return Grouped(_times(left, weights), right)
        case Dense(g):
            return Dense(_times(g, weights))


def _times(x: Tensor, weights: Tensor) -> Tensor:
    x = wide(x)
    return x * weights.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


# --- one shape for all uses -------------------------------------------------------------------


def matrix_shape(bundle: Bundle) -> tuple[int, int]:
    """Rows and columns of the parameter, as the uses that are factored see it."""
    shape = next((f.shape for f in bundle if not isinstance(f, Dense)), bundle[0].shape)
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def aligned(bundle: Bundle, p: int, d: int) -> list[Factor]:
    """The bundle as factors of shape `[p, d]`, at most one of them dense.

    Uses may see a parameter in several shapes: as a matrix, or as it is.
    """
    dense: list[Tensor] = []
    out: list[Factor] = []
    for f in bundle:
        if isinstance(f, Dense) or f.shape != (p, d):
            dense.append(materialize(f).reshape(samples([f]), p, d))
        else:
            out.append(f)
    return [*out, Dense(add_up(dense))] if dense else out


def counts(parts: Sequence[Bundle]) -> cost.Parts:
    """How many samples of how many positions there are, part by part."""
    return [(samples(bundle), positions(bundle)) for bundle in parts]


def positions(bundle: Bundle) -> cost.Positions:
    """How many positions of each kind the bundle has."""
    count = {Outer: 0, OneHot: 0, Dense: 0}
    for f in bundle:
        count[type(f)] += 1 if isinstance(f, Dense) else known(f[0].shape[1])
    return cost.Positions(count[Outer], count[OneHot], count[Dense])
