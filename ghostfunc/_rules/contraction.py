"""A helper of rule files, which registers no op: the factor of one operand of an einsum.

    y[out] = sum  W[...] A[...]        g_i[W] = sum  b_i[out] A_i[...]

An index of `W` that both `A` and the output have is a group, which has an outer product to itself.
One that only the output has is on the outer product's left, one that only `A` has on its right. An
index that `A` and the output have, but not `W`, is a position.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._factors.factor import Dense, Factor, Grouped, Outer
from ghostfunc._rules.registry import FactorMakers, unsupported

Indices: TypeAlias = Sequence[str]

BATCH_LETTERS = "zyxwvutsrqponmlkjihgfedc"
"""Indices for batch axes, beside those called a, P and D."""


def einsum_factors(b: Tensor, equation: str, operands: Mapping[Any, Tensor]) -> FactorMakers:
    """The factors of all operands of an einsum, by their names.

    Args:
        b: cotangent of the output, stacked over samples like the operands.
        equation: letters only, such as "zPa,aD->zPD"; see `explicit`.
        operands: in the order of the equation.
    """
    inputs, out = equation.split("->")
    indices = dict(zip(operands, inputs.split(","), strict=True))

    def factor_of(name: Any) -> Factor:
        others = [(x, indices[other]) for other, x in operands.items() if other != name]
        return contraction(b, out, operands[name], indices[name], others)

    return {name: partial(factor_of, name) for name in operands}


def explicit(equation: str, *operands: Tensor) -> str:
    """The equation with its output, and with letters for its ellipses.

    The operands are stacked over samples: each has one axis more than the equation says.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    letters = [x.replace("...", "") for x in inputs]
    if not arrow:
        together = "".join(letters)
        out = "..." + "".join(sorted(x for x in set(together) if together.count(x) == 1))
    free = [x for x in string.ascii_letters if x not in equation]
    widths = [x.ndim - 1 - len(own) for x, own in zip(operands, letters, strict=True)]
    widest = "".join(free[: max(widths)])
    filled = [
        x.replace("...", widest[len(widest) - width :])
        for x, width in zip(inputs, widths, strict=True)
    ]
    return ",".join(filled) + "->" + out.replace("...", widest)


def contraction(
    b: Tensor, out: Indices, w: Tensor, of_w: Indices, others: Sequence[tuple[Tensor, Indices]]
) -> Factor:
    """The factor of operand `w`, with indices `of_w`, of an einsum with the given others.

    All tensors are stacked over samples, `[n, *sizes of the indices]`. An index of size 1 in one
    operand and more in another broadcasts.
    """
    for indices in (of_w, *(i for _, i in others)):
        if len(set(indices)) < len(indices):
            raise unsupported(f"A product along a diagonal ({''.join(indices)})")
    sizes: dict[str, int] = {}
    for x, indices in ((b, out), (w, of_w), *others):
        for i, size in zip(indices, x.shape[1:], strict=True):
            sizes[i] = size if size != 1 else sizes.get(i, 1)
    b, out = _squeeze(b, out, sizes)
    a, of_a = _product([_squeeze(x, i, sizes) for x, i in others], {*of_w, *out})
    kept = [i for i, s in zip(of_w, w.shape[1:], strict=True) if s != 1]
    factor = _compact(wide(b), out, kept, wide(a), of_a, sizes)
    if isinstance(factor, Dense):
        return Dense(factor.g.reshape(len(b), *w.shape[1:]))
    return factor


def _squeeze(x: Tensor, indices: Indices, sizes: dict[str, int]) -> tuple[Tensor, Indices]:
    """Without the axes of size 1, which broadcast if they mean anything."""
    kept = [i for i, s in zip(indices, x.shape[1:], strict=True) if s != 1]
    return x.reshape(len(x), *(sizes[i] for i in kept)), kept


def _product(
    operands: Sequence[tuple[Tensor, Indices]], wanted: set[str]
) -> tuple[Tensor, Indices]:
    """All operands in one, summed over the indices that nobody else has."""
    indices = list(dict.fromkeys(i for _, own in operands for i in own))
    kept = [i for i in indices if i in wanted]
    if len(operands) == 1 and len(kept) == len(indices):
        return operands[0]
    letters = letters_for(indices)
    equation = ",".join("." * 3 + "".join(letters[i] for i in own) for _, own in operands)
    equation += "->" + "." * 3 + "".join(letters[i] for i in kept)
    return torch.einsum(equation, *(wide(x) for x, _ in operands)), kept


def letters_for(indices: Iterable[str]) -> dict[str, str]:
    """A letter for each index."""
    distinct = list(dict.fromkeys(indices))
    if len(distinct) > len(string.ascii_letters):
        raise unsupported(f"A product with {len(distinct)} different indices")
    return dict(zip(distinct, string.ascii_letters, strict=False))


def _compact(
    b: Tensor, of_b: Indices, of_w: Indices, a: Tensor, of_a: Indices, sizes: dict[str, int]
) -> Factor:
    """The factor of `W`: one outer product, one per group, or the gradient itself."""
    loose = [i for i in of_w if i not in of_a and i not in of_b]
    if loose:  # summed over in W alone: the gradient is the same along it
        a = a[(...,) + (None,) * len(loose)].expand(*a.shape, *(sizes[i] for i in loose))
        of_a = [*of_a, *loose]
    group = [i for i in of_w if i in of_a and i in of_b]
    left = [i for i in of_w if i not in of_a]
    right = [i for i in of_w if i not in of_b]
    positions = [i for i in of_b if i in of_a and i not in of_w]
    b = _ordered(b, of_b, group, positions, left, sizes)
    a = _ordered(a, of_a, group, positions, right, sizes)
    p, d = b.shape[-1], a.shape[-1]
    t = b.shape[-2]
    if min(p, d) == 1:  # the gradient is no larger than its factor
        g = (b * a).sum(2)  # [n, group, p or d]
    elif group == of_w[: len(group)] and (not group or p * d > t * (p + d)):
        # An `Outer` factor may be larger than the gradient: its contractions weigh the two, and
        # form the gradient in blocks where that is cheaper. Those of `Grouped` factors do not.
        if of_w == [*group, *left, *right]:
            return Grouped(b, a) if group else Outer(b[:, 0], a[:, 0])
        if of_w == [*group, *right, *left]:
            return Grouped(a, b) if group else Outer(a[:, 0], b[:, 0])
        g = b.mT @ a  # the axes of `W` are in neither order
    else:  # groups do not come first, or the gradient is the smaller one
        g = b.mT @ a
    order = [*group, *left, *right]
    g = g.reshape(len(g), *(sizes[i] for i in order))
    return Dense(g.permute(0, *(1 + order.index(i) for i in of_w)))


def _ordered(
    x: Tensor,
    indices: Indices,
    group: Indices,
    positions: Indices,
    last: Indices,
    sizes: dict[str, int],
) -> Tensor:
    """`[n, group, positions, last]`, one axis each."""
    order = [*group, *positions, *last]
    x = x.permute(0, *(1 + indices.index(i) for i in order))
    return x.reshape(
        len(x), *(math.prod(sizes[i] for i in axes) for axes in (group, positions, last))
    )
