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

from ghostfunc._base.dtypes import wide
from ghostfunc._base.torch_private import in_transform, symbolic
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import cost
from ghostfunc._factors.contract import add_total, add_up, dot, total
from ghostfunc._factors.factor import Factor, Outer
from ghostfunc._factors.matmul import by_onednn, matmul, product, speed


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

    def added(self) -> None:
        """One more use is in the value."""
        self.to_come -= 1
        if self.whole is not None and self.to_come <= 0:
            assert self.value is not None
            self.whole(self.value)  # a second time, if there are more uses than were known

    def add(
        self, factor: Factor, us: Sequence[Tensor], contract_dtype: ContractDtype
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
        )
        assert whole is not None
        if before is None:
            self.value = whole.contiguous()
        elif not in_place:
            self.value = before + whole.view_as(before)
        self.added()
        return dots


def dots_and_total(
    factor: Factor,
    us: Sequence[Tensor],
    *,
    with_total: bool,
    into: Tensor | None = None,
    contract_dtype: ContractDtype = None,
) -> tuple[list[Tensor], Tensor | None]:
    """`<g_i, u>` for every `u`, and `sum_i g_i` where it is wanted, which is never rounded to a
    `contract_dtype`. The sum may be added to a tensor, in place, which is then what is returned."""
    if isinstance(factor, Outer) and us:
        (n, t, p), d = factor.left.shape, factor.right.shape[-1]
        faster = speed(factor.left, contract_dtype)
        if cost.share_dots(n, t, p, d, len(us), with_total=with_total, speed=faster):
            return _by_rows(factor, us, with_total, None if with_total else contract_dtype, into)
    dots = [dot(factor, u, contract_dtype) for u in us]
    if not with_total:
        return dots, None
    if into is None:
        return dots, total(factor)
    add_total(factor, into)
    return dots, into


def _by_rows(
    factor: Outer,
    us: Sequence[Tensor],
    with_total: bool,
    contract_dtype: ContractDtype,
    into: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    left, right = wide(factor.left), wide(factor.right)
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
        for i in range(len(left)):
            x, y = left[i, :, rows].mT, right[i]
            first = i == 0 and into is None
            if not in_place:
                g = matmul(x, y, contract_dtype)
            elif first and summed is not None:
                g = product(x, y, out=summed)
            else:
                g = product(x, y, out=None if block is None else block[: len(x)])
            dots.append(torch.stack([torch.dot(g.flatten(), u) for u in block_us]))
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
