"""Quantities quadratic in the per-sample gradient: norms and Gram matrices of bundles.

Two ways lead to the same numbers:

    by tokens   g_i is a sum of rank-one terms, one per position, and `<g_i, g_j>` the sum of
                their `t x s` inner products. Nothing of the parameter's size is formed.
    by rows     a block of rows of every `g_i` is formed, added up over the uses, contracted,
                and dropped.

`cost` says which is cheaper. Both work in blocks of at most `workspace` elements, so temporaries
are bounded whatever the sizes; how many blocks there are changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, reduce, singledispatch
from itertools import product
from math import isqrt, prod
from operator import add
from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.torch_private import any_symbolic, in_transform, known
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import cost
from ghostfunc._factors.bundles import (
    Bundle,
    aligned,
    counts,
    matrix_shape,
    pooled,
    positions,
    samples,
    side_by_side,
    take,
    values,
)
from ghostfunc._factors.contract import add_up, blocks, dot, materialize, row_dots, total
from ghostfunc._factors.factor import Dense, Factor, Grouped, OneHot, Outer, unknown_factor
from ghostfunc._factors.matmul import inner_products, matmul, product as matrix_product

LARGE = 1 << 18
"""Elements of gradients from which on memory costs more than the calls that save it."""

STRIP = 512
"""Positions of short parts that are put side by side: a product of more is as fast as it gets."""


def sqnorms(
    bundle: Bundle,
    *,
    workspace: int = cost.BLOCK_ELEMENTS,
    contract_dtype: ContractDtype = None,
) -> Tensor:
    """`||g_i||^2` for every sample, `[n]`."""
    n = samples(bundle)
    folded = [
        Outer(f.left.flatten(0, 1), f.right.flatten(0, 1)) for f in bundle if isinstance(f, Grouped)
    ]
    if len(folded) == len(bundle):
        # Groups are orthogonal: their norms are those of as many samples more.
        squares = sqnorms(folded, workspace=workspace, contract_dtype=contract_dtype)
        return squares.view(n, -1).sum(1)
    p, d = matrix_shape(bundle)
    bundle = aligned(bundle, p, d)
    if not p * d:
        return wide(values(bundle[0])).new_zeros(n)
    if cost.norms_by_tokens(positions(bundle), p, d):
        workspace = min(workspace, cost.CACHE_ELEMENTS)
        return _sqnorms_by_tokens(bundle, n, workspace, contract_dtype)
    blocks = []
    for block in slices(n, workspace // max(1, p * d)):
        parts = []
        for rows in slices(p, workspace // max(1, d)):
            g = _rows(bundle, block, rows, contract_dtype)
            parts.append(row_dots(g, g))
        blocks.append(add_up(parts))
    return torch.cat(blocks)


def gram(
    bundle: Bundle,
    other: Bundle | None = None,
    *,
    workspace: int = cost.BLOCK_ELEMENTS,
    contract_dtype: ContractDtype = None,
) -> Tensor:
    """`<g_i, g_j>` for every pair of samples: `[n, n]`, or `[n, m]` with another bundle of the
    same parameter."""
    others = None if other is None else [other]
    return gram_of_parts([bundle], others, workspace=workspace, contract_dtype=contract_dtype)


def gram_of_parts(
    parts: Sequence[Bundle],
    others: Sequence[Bundle] | None = None,
    *,
    workspace: int = cost.BLOCK_ELEMENTS,
    contract_dtype: ContractDtype = None,
) -> Tensor:
    """`gram` of samples in parts, one after the other, `[n, n]` or `[n, m]`."""
    groups = _groups(parts, others, workspace)
    if groups:
        own = partial(gram_of_parts, workspace=workspace, contract_dtype=contract_dtype)
        return add_up([own(*pair) for pair in groups])
    p, d = matrix_shape(flat([*parts, *(others or ())]))
    mine = [aligned(bundle, p, d) for bundle in parts]
    theirs = mine if others is None else [aligned(bundle, p, d) for bundle in others]
    same = others is None
    if not p * d:
        n, m = (sum(map(samples, side)) for side in (mine, theirs))
        return wide(values(mine[0][0])).new_zeros(n, m)
    by_tokens = partial(_gram_by_tokens, workspace=workspace, contract_dtype=contract_dtype)
    ours = counts(mine)
    formed = cost.gram_formed(ours, ours if same else counts(theirs), p, d, same=same)
    if not formed:
        out = by_tokens(mine, theirs)
    else:
        sides = [mine[:formed]] if same else [mine, theirs]
        out = _gram_by_rows(sides, p, d, workspace, contract_dtype)
    if same and 0 < formed < len(mine):
        rest = mine[formed:]
        across = by_tokens(rest, mine[:formed])
        below = torch.cat([across, by_tokens(rest, rest)], 1)
        out = torch.cat([torch.cat([out, across.mT], 1), below])
    # Rounding differs between a matrix product's two triangles.
    return (out + out.mT) / 2 if same else out


def flat(parts: Sequence[Bundle]) -> Bundle:
    """The factors of all parts in one bundle."""
    return parts[0] if len(parts) == 1 else [f for bundle in parts for f in bundle]


def joined(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of several parts, concatenated; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


def _groups(
    parts: Sequence[Bundle], others: Sequence[Bundle] | None, workspace: int
) -> list[tuple[list[Bundle], list[Bundle] | None]]:
    """The pairs of groups whose Gram matrices add up; none where groups are small or there are
    other factors: those are formed whole."""
    everything = flat([*parts, *(others or ())])
    grouped = [f for f in everything if isinstance(f, Grouped)]
    elements = sum(samples([f]) * prod(f.shape) for f in grouped)
    if len(grouped) < len(everything) or elements <= workspace:
        return []
    mine = _by_group(parts)
    if others is None:
        return [(group, None) for group in mine]
    return list(zip(mine, _by_group(others), strict=True))


def _by_group(parts: Sequence[Bundle]) -> list[list[Bundle]]:
    """Of every group all parts, where all factors are `Grouped`."""
    own = [
        zip(*(f.groups() for f in bundle if isinstance(f, Grouped)), strict=True)
        for bundle in parts
    ]
    return [list(group) for group in zip(*own, strict=True)]


# --- by rows ----------------------------------------------------------------------------------


def _gram_by_rows(
    sides: Sequence[Sequence[Bundle]],
    p: int,
    d: int,
    workspace: int,
    contract_dtype: ContractDtype,
) -> Tensor:
    """Of one batch with itself, or of two; each in parts."""
    numbers = [sum(map(samples, side)) for side in sides]
    step = max(1, workspace // max(1, sum(numbers) * d))
    formed = [
        (g.flatten(1) for _, g in row_blocks(side, n, p, d, step, contract_dtype))
        for side, n in zip(sides, numbers, strict=True)
    ]
    blocks = zip(*formed, strict=True)
    return reduce(add, (inner_products(x[0], x[-1], contract_dtype) for x in blocks))


def row_blocks(
    parts: Sequence[Bundle],
    n: int,
    p: int,
    d: int,
    step: int,
    contract_dtype: ContractDtype = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of `step` rows of all n gradients, `[n, r, d]`, of parts whose factors are `aligned`.
    Large blocks come each where the last one was, if nothing follows them: memory that
    is touched for the first time costs about as much as all that is read off it."""
    if contract_dtype is not None or not in_place(parts, n, p, d):
        for rows in slices(p, step):
            yield rows, form_rows(parts, rows, contract_dtype)
        return
    sizes = list(map(samples, parts))
    tables = [[_Table.of(f, p, step) for f in bundle if isinstance(f, OneHot)] for bundle in parts]
    memory = wide(values(parts[0][0])).new_empty(n * min(step, p) * d)
    for rows in slices(p, step):
        block = memory[: n * (rows.stop - rows.start) * d].view(n, -1, d)
        for bundle, looked_up, g in zip(parts, tables, block.split(sizes), strict=True):
            outer = next(f for f in bundle if isinstance(f, Outer))
            matrix_product(wide(outer.left)[:, :, rows].mT, wide(outer.right), out=g)
            for f in bundle:
                if f is not outer and not isinstance(f, OneHot):
                    g.add_(_form_rows(f, rows, None))
            for table in looked_up:
                table.add_to(g, rows)
        yield rows, block


class _Table(NamedTuple):
    """Looked-up vectors, in the order of the rows of the table.

    Attributes:
        sample, row, b: of every position, `[n * t]` and `[n * t, d]`.
        bounds: where each block of `step` rows begins, and last the number of positions.
    """

    sample: Tensor
    row: Tensor
    b: Tensor
    bounds: list[int]
    step: int

    @classmethod
    def of(cls, factor: OneHot, p: int, step: int) -> _Table:
        """The table of a factor of p rows, which come `step` at a time."""
        row, order = factor.ids.flatten().sort(stable=True)
        starts = torch.arange(0, p + step, step, device=row.device)
        bounds: list[int] = torch.searchsorted(row, starts.to(row.dtype)).tolist()
        sample = order // factor.ids.shape[1]
        return cls(sample, row, wide(factor.b).flatten(0, 1)[order], bounds, step)

    def add_to(self, g: Tensor, rows: slice) -> None:
        """Add these rows of all gradients to `g`, `[n, r, d]`."""
        first = rows.start // self.step
        own = slice(*self.bounds[first : first + 2])
        places = self.sample[own] * g.shape[1] + (self.row[own] - rows.start)
        g.view(-1, g.shape[2]).index_add_(0, places, self.b[own])


def in_place(parts: Sequence[Bundle], n: int, p: int, d: int) -> bool:
    """Whether n gradients are large, are made of products, and no transform, no compiler and no
    derivative follows them."""
    elements: int | SymInt = n * p * d
    if isinstance(elements, SymInt) or elements < LARGE:
        return False
    tensors = [x for f in flat(parts) for x in f if isinstance(x, Tensor)]
    if in_transform() or any_symbolic(tensors):
        return False
    followed = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    formed = all(any(isinstance(f, Outer) for f in bundle) for bundle in parts)
    return formed and not followed


def form_rows(parts: Sequence[Bundle], rows: slice, contract_dtype: ContractDtype = None) -> Tensor:
    """The chosen rows of all gradients, `[n, r, d]`, of parts whose factors are `aligned`."""
    return joined([_rows(bundle, slice(None), rows, contract_dtype) for bundle in parts])


def _rows(bundle: Bundle, block: slice, rows: slice, contract_dtype: ContractDtype) -> Tensor:
    """The chosen rows of the gradients of the chosen samples, `[n, r, d]`."""
    return add_up([_form_rows(take(f, block), rows, contract_dtype) for f in bundle])


@singledispatch
def _form_rows(factor: Factor, rows: slice, contract_dtype: ContractDtype) -> Tensor:
    raise TypeError(f"{type(factor).__name__} is not formed row by row.")


@_form_rows.register
def _(factor: Outer, rows: slice, contract_dtype: ContractDtype) -> Tensor:
    return matmul(factor.left[:, :, rows].mT, factor.right, contract_dtype)


@_form_rows.register
def _(factor: OneHot, rows: slice, contract_dtype: ContractDtype) -> Tensor:
    start, stop, _ = rows.indices(factor.rows)
    local = factor.ids - start
    here = (local >= 0) & (local < stop - start)
    # Positions of other rows land on a row of their own, which is cut off again.
    local = torch.where(here, local, stop - start)
    return materialize(OneHot(local, factor.b, stop - start + 1))[:, :-1]


@_form_rows.register
def _(factor: Dense, rows: slice, contract_dtype: ContractDtype) -> Tensor:
    return wide(factor.g[:, rows])


# --- by tokens --------------------------------------------------------------------------------


def _sqnorms_by_tokens(
    bundle: Bundle, n: int, workspace: int, contract_dtype: ContractDtype
) -> Tensor:
    def dots(f: Factor, g: Factor, block: slice) -> Tensor:
        return _token_dots(take(f, block), take(g, block), contract_dtype).sum((1, 2))

    met = _with_positions(bundle)
    if not met:
        return wide(values(bundle[0])).new_zeros(n)
    chunks = [c for f in met for c in _chunks(f, min(cost.TOKENS, isqrt(workspace)))]
    t = max(known(c[0].shape[1]) for c in chunks)
    out = []
    for block in slices(n, workspace // t**2):
        parts = []
        for i, f in enumerate(chunks):
            parts.append(dots(f, f, block))
            for g in chunks[:i]:
                parts.append(2 * dots(f, g, block))
        out.append(add_up(parts))
    return torch.cat(out)


def _gram_by_tokens(
    mine: Sequence[Bundle],
    theirs: Sequence[Bundle],
    workspace: int,
    contract_dtype: ContractDtype,
) -> Tensor:
    """Inner products of two batches in parts. Short parts go side by side, since a product of few
    positions takes as long as one of many."""
    if len(mine) == len(theirs) == 1:
        return _strip_gram(mine, theirs, workspace, contract_dtype)
    sides = [_strips(side, min(STRIP, isqrt(workspace))) for side in (mine, theirs)]
    own = partial(_strip_gram, workspace=workspace, contract_dtype=contract_dtype)
    return joined([joined([own(f, g) for g in sides[1]], 1) for f in sides[0]])


def _strips(parts: Sequence[Bundle], most: int) -> list[list[Bundle]]:
    """Parts that follow each other, together as long as they have at most so many positions."""
    strips: list[list[Bundle]] = []
    room = 0
    for bundle in parts:
        tokens = max(known(f[0].shape[0] * f[0].shape[1]) for f in bundle)
        if not strips or tokens > room:
            strips.append([])
            room = most
        strips[-1].append(bundle)
        room -= tokens
    return strips


def _strip_gram(
    mine: Sequence[Bundle],
    theirs: Sequence[Bundle],
    workspace: int,
    contract_dtype: ContractDtype,
) -> Tensor:
    """Inner products of two strips, added up over all pairs of uses."""
    met = list(product(_uses(mine), _uses(theirs)))
    if not met:
        n, m = (sum(map(samples, side)) for side in (mine, theirs))
        return wide(values(mine[0][0])).new_zeros(n, m)
    return reduce(add, (_uses_gram(f, g, workspace, contract_dtype) for f, g in met))


def _uses(parts: Sequence[Bundle]) -> list[Sequence[Factor]]:
    """The factors of every use, part by part; without uses of no length, which are zero."""
    if len(parts) == 1:
        return [(f,) for f in parts[0] if known(f[0].shape[1])]
    return [use for use in zip(*parts, strict=True) if any(known(f[0].shape[1]) for f in use)]


def _uses_gram(
    mine: Sequence[Factor],
    theirs: Sequence[Factor],
    workspace: int,
    contract_dtype: ContractDtype,
) -> Tensor:
    """Inner products of two uses, each of them in parts."""
    gram = _use_gram(_singles(mine), _singles(theirs), workspace, contract_dtype)
    if len(mine) > 1:
        gram = _sums(gram, mine)
    return _sums(gram.mT, theirs).mT if len(theirs) > 1 else gram


def _singles(use: Sequence[Factor]) -> Factor:
    """The factor of a use; that of several parts has every position as a sample of its own."""
    if len(use) == 1:
        return use[0]
    # A use has factors of one kind, Outer or OneHot: others do not meet by tokens.
    match side_by_side(use):  # type: ignore[arg-type]
        case Outer(left, right):
            return Outer(left[0][:, None], right[0][:, None])
        case OneHot(ids, b, rows):
            return OneHot(ids[0][:, None], b[0][:, None], rows)


def _sums(gram: Tensor, use: Sequence[Factor]) -> Tensor:
    """Sums of the rows that belong to one sample, where every position has one."""
    shapes = [f[0].shape[:2] for f in use]
    rows = gram.split([n * t for n, t in shapes])
    return torch.cat([x.view(*s, -1).sum(1) for x, s in zip(rows, shapes, strict=True)])


def _use_gram(f: Factor, g: Factor, workspace: int, contract_dtype: ContractDtype) -> Tensor:
    """Blocks of at most `workspace` pairs of tokens, summed over the positions."""
    n, m = samples([f]), samples([g])
    s = min(known(g[0].shape[1]), isqrt(workspace))
    columns = min(m, max(1, isqrt(workspace) // s))
    t = min(known(f[0].shape[1]), max(1, workspace // (s * columns)))
    rows = min(n, max(1, workspace // (s * columns * t)))
    blocks = product(_chunks(f, t), _chunks(g, s))
    return reduce(add, (_token_gram(a, b, n, m, rows, columns, contract_dtype) for a, b in blocks))


def _with_positions(bundle: Bundle) -> list[Factor]:
    """The factors without those of sequences of no length, which are zero."""
    return [f for f in bundle if known(f[0].shape[1])]


def _token_gram(
    f: Factor, g: Factor, n: int, m: int, rows: int, columns: int, contract_dtype: ContractDtype
) -> Tensor:
    strips = []
    for i in slices(n, rows):
        strip = []
        for j in slices(m, columns):
            a, b = take(f, i), take(g, j)
            sizes = (samples([a]), -1, samples([b]), g[0].shape[1])
            dots = _token_dots(pooled(a), pooled(b), contract_dtype)
            strip.append(dots.view(sizes).sum((1, 3)))
        strips.append(torch.cat(strip, 1))
    return torch.cat(strips)


def _token_dots(f: Factor, g: Factor, contract_dtype: ContractDtype) -> Tensor:
    """Inner products of the rank-one terms of the same sample's gradients, `[n, t, s]`."""

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return inner_products(x, y, contract_dtype)

    match f, g:
        case (Outer(), Outer()):
            return inner(f.left, g.left) * inner(f.right, g.right)
        case (Outer(), OneHot()):
            t = f.left.shape[1]
            left = f.left.gather(2, g.ids.long()[:, None, :].expand(-1, t, -1))
            return wide(left) * inner(f.right, g.b)
        case (OneHot(), Outer()):
            return _token_dots(g, f, contract_dtype).mT
        case (OneHot(), OneHot()):
            same = f.ids[:, :, None] == g.ids[:, None, :]
            return torch.where(same, inner(f.b, g.b), 0)
        case _:
            raise TypeError(f"{type(f).__name__} and {type(g).__name__} do not meet by tokens.")


# --- sums over the samples of the other -------------------------------------------------------


def pair_dots(f: Factor, g: Factor, contract_dtype: ContractDtype = None) -> Tensor:
    """`sum_j <f_i, g_j>`, `[n]`. Nothing is materialised unless one of the two is `Dense`, or the
    two see the parameter in several shapes."""
    if f.shape != g.shape:
        f, g = _alike(f, g)
    match f, g:
        case (_, Dense()):
            return dot(f, wide(g.g).sum(0), contract_dtype)
        case (Dense(), _):
            return dot(f, total(g))
        case (Grouped(), Grouped()):
            pairs = zip(f.groups(), g.groups(), strict=True)
            return add_up([pair_dots(x, y, contract_dtype) for x, y in pairs])
    n, t = f[0].shape[:2]
    m, s = g[0].shape[:2]
    out = []
    for block in blocks(n, t * m * s):
        grams = _token_grams(take(f, block), g, contract_dtype)
        pairs_of_all = grams[0] * grams[1]
        out.append(pairs_of_all.view(block.stop - block.start, t, m, s).sum((1, 2, 3)))
    return torch.cat(out)


def _alike(f: Factor, g: Factor) -> tuple[Factor, Factor]:
    """Two factors that see one parameter in several shapes, in one shape."""
    if isinstance(g, Dense):
        return f, Dense(g.g.reshape(len(g.g), *f.shape))
    if isinstance(f, Dense):
        return Dense(f.g.reshape(len(f.g), *g.shape)), g
    return Dense(materialize(f).flatten(1)), Dense(materialize(g).flatten(1))


def _token_grams(f: Factor, g: Factor, contract_dtype: ContractDtype) -> tuple[Tensor, Tensor]:
    """Inner products of the two factors' left and right vectors, each `[n*t, m*s]`."""

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return inner_products(x.flatten(0, 1), y.flatten(0, 1), contract_dtype)

    match f, g:
        case (Outer(), Outer()):
            return inner(f.left, g.left), inner(f.right, g.right)
        case (Outer(), OneHot()):
            return _all_positions(f.left)[:, g.ids.flatten()], inner(f.right, g.b)
        case (OneHot(), Outer()):
            return _all_positions(g.left)[:, f.ids.flatten()].mT, inner(f.b, g.right)
        case (OneHot(), OneHot()):
            b = inner(f.b, g.b)
            same = f.ids.flatten()[:, None] == g.ids.flatten()[None, :]
            return same.to(b.dtype), b
        case _:
            raise unknown_factor(f)


def _all_positions(x: Tensor) -> Tensor:
    return wide(x).flatten(0, 1)


# --- cutting ----------------------------------------------------------------------------------


def slices(size: int, step: int) -> Iterator[slice]:
    """Slices of at most `step`; one of all where the size is a symbol of a compiled program."""
    if isinstance(size, SymInt):
        yield slice(None)
        return
    step = max(1, step)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _chunks(factor: Factor, positions: int) -> Iterator[Factor]:
    """Cut a factor along its positions: the chunks add up to it."""
    for s in slices(factor[0].shape[1], positions):
        match factor:
            case Outer(left, right):
                yield Outer(left[:, s], right[:, s])
            case OneHot(ids, b, rows):
                yield OneHot(ids[:, s], b[:, s], rows)
            case _:
                raise TypeError(f"{type(factor).__name__} is not cut along positions.")
