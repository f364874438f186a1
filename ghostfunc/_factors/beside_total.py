"""Dot products with one or several directions, beside the total gradient.

Each by itself, `<g_i, u_k>` of an outer-product factor is a product of all positions with `u_k`.
Where the total gradient is wanted too, or several directions, it can be cheaper to form `g_i`, one
sample and one block of rows at a time: the block is dotted with all directions and added up, and
the sum over positions is paid for once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ghostfunc._base.documents import Packing, from_rows
from ghostfunc._base.dtypes import wide
from ghostfunc._base.torch_private import in_transform, symbolic
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import cost
from ghostfunc._factors.contract import add_total, add_up, dot, position_dots, total
from ghostfunc._factors.factor import Factor, Outer
from ghostfunc._factors.matmul import add_product, by_onednn, matmul, product, speed

STRETCH = 1 << 18
"""Elements of a dot product that float32 adds up in several lanes with an error of a few
roundings."""


class RunningTotal:
    """`sum_i g_i` over the uses of one parameter, added up as they come, in memory of its own.

    Attributes:
        value: the sum so far, float32 or wider; None before the first use.
        to_come: uses that have not been added yet, where `whole` waits for the last of them.
        whole: gets the value when the last use has been added.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.to_come = 0
        self.whole: Callable[[Tensor], None] | None = None

    def _added(self) -> None:
        """One more use is in the value."""
        self.to_come -= 1
        if self.whole is not None and self.to_come <= 0:
            assert self.value is not None
            self.whole(self.value)  # a second time, if there are more uses than were known

    def put(self, total: Tensor) -> None:
        """Add the sum of one use, in memory of its own."""
        before = self.value
        self.value = total if before is None else before + total.view_as(before)
        self._added()

    def put_product(self, left: Tensor, right: Tensor) -> None:
        """Add the sum of one use, `left @ right`."""
        if self.value is None:
            self.value = matmul(left, right)
        else:
            add_product(self.value.view(left.shape[0], right.shape[1]), left, right)
        self._added()

    def add(
        self,
        factor: Factor,
        us: Sequence[Tensor],
        contract_dtype: ContractDtype,
        packing: Packing | None = None,
    ) -> list[Tensor]:
        """Add one use, and return its `<g_i, u>` for every `u`."""
        before = self.value
        in_place = before is not None and not symbolic(before)
        dots, whole = dots_and_total(
            factor,
            us,
            with_total=True,
            into=before.view(factor.shape) if before is not None and in_place else None,
            contract_dtype=contract_dtype,
            packing=packing,
        )
        assert whole is not None
        if before is None:
            self.value = whole.contiguous()
        elif not in_place:
            self.value = before + whole.view_as(before)
        self._added()
        return dots


def dots_and_total(
    factor: Factor,
    us: Sequence[Tensor],
    *,
    with_total: bool,
    into: Tensor | None = None,
    contract_dtype: ContractDtype = None,
    packing: Packing | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """`<g_i, u>` for every `u`, and `sum_i g_i` where it is wanted, which is never rounded to a
    `contract_dtype`. The sum may be added to a tensor, in place, which is then what is returned.

    With a `packing`, the factor is one of packed rows, an `Outer` or a `OneHot`, and sample i is
    document i, its stretch of positions.
    """
    if isinstance(factor, Outer) and us:
        (n, t, p), d = factor.left.shape, factor.right.shape[-1]
        if packing is not None:
            n, t = len(packing.row), -(-n * t // len(packing.row))
        faster = speed(factor.left, contract_dtype)
        if cost.share_dots(n, t, p, d, len(us), with_total=with_total, speed=faster):
            return _by_rows(
                factor, us, with_total, None if with_total else contract_dtype, into, packing
            )
    if packing is None:
        dots = [dot(factor, u, contract_dtype) for u in us]
    else:
        dots = [_document_dots(factor, u, contract_dtype, packing) for u in us]
    if not with_total:
        return dots, None
    if into is None:
        return dots, total(factor)
    add_total(factor, into)
    return dots, into


def _document_dots(
    factor: Factor, u: Tensor, contract_dtype: ContractDtype, packing: Packing
) -> Tensor:
    """`<g_k, u>` of documents: what each position adds, summed over a document's own."""
    shares = position_dots(factor, u, contract_dtype)
    return from_rows(shares, packing).sum(1)


def _pieces(
    left: Tensor, right: Tensor, packing: Packing | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Both sides of a factor, sample by sample."""
    if packing is None:
        return left.unbind(0), right.unbind(0)
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    return [left[span] for span in packing.spans], [right[span] for span in packing.spans]


def _dot(g: Tensor, u: Tensor) -> Tensor:
    """`<g, u>` of long vectors. A batch of products, as in `matmul.dots`, takes twice as long for a
    single vector, whose dot product torch adds up in several lanes."""
    if len(g) <= STRETCH:
        return torch.dot(g, u)
    pieces = zip(g.split(STRETCH), u.split(STRETCH), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pieces]).sum()


def _by_rows(
    factor: Outer,
    us: Sequence[Tensor],
    with_total: bool,
    contract_dtype: ContractDtype,
    into: Tensor | None,
    packing: Packing | None,
) -> tuple[list[Tensor], Tensor | None]:
    left, right = wide(factor.left), wide(factor.right)
    lefts, rights = _pieces(left, right, packing)
    blocks = list(cost.row_blocks(*factor.shape))
    in_place = contract_dtype is None and not in_transform() and not symbolic(left)
    whole, block = into, None
    if in_place and with_total and into is None:
        whole = left.new_empty(factor.shape)
    if in_place and not by_onednn(left[:1].mT, right[:1]):
        # Memory that is touched for the first time costs more than the product.
        block = left.new_empty(blocks[0].stop, right.shape[-1])  # the others are no larger
    parts: list[Tensor] = []
    totals: list[Tensor] = []
    for rows in blocks:
        block_us = [wide(u)[rows].flatten() for u in us]
        dots: list[Tensor] = []
        summed = None if whole is None else whole[rows]
        for i, (piece, y) in enumerate(zip(lefts, rights, strict=True)):
            x = piece[:, rows].mT
            first = i == 0 and into is None
            if not in_place:
                g = matmul(x, y, contract_dtype)
            elif first and summed is not None:
                g = product(x, y, out=summed)
            else:
                g = product(x, y, out=None if block is None else block[: len(x)])
            dots.append(torch.stack([_dot(g.flatten(), u) for u in block_us]))
            if with_total:
                if first or summed is None:
                    summed = g
                elif whole is None:
                    summed = summed + g
                else:
                    summed.add_(g)
        parts.append(torch.stack(dots, dim=1))  # [k, n]
        if summed is not None and whole is None:
            totals.append(summed)
    if with_total and whole is None:
        whole = torch.cat(totals)
    return list(add_up(parts)), whole
