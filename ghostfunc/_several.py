"""Dot products with several directions at once.

Each by itself, `<g_i, u_k>` of an outer-product factor is a product of all positions with `u_k`.
For several directions it can be cheaper to form `g_i`, one sample and one block of rows at a time,
and to dot the block with all of them: the sum over positions is then paid for once. The same blocks
add up to the total gradient, where that is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostfunc import _cost
from ghostfunc._factors import Factor, Outer, add_up, dot, dot_and_total, matmul, speed, wide
from ghostfunc._types import ContractDtype


def dots_and_total(
    factor: Factor,
    us: Sequence[Tensor],
    *,
    with_total: bool,
    contract_dtype: ContractDtype = None,
) -> tuple[list[Tensor], Tensor | None]:
    """`<g_i, u>` for every `u`, one at least, and `sum_i g_i` where it is wanted, which is never
    rounded to a `contract_dtype`."""
    if isinstance(factor, Outer):
        (n, t, p), d = factor.left.shape, factor.right.shape[-1]
        faster = speed(contract_dtype)
        if _cost.share_dots(n, t, p, d, len(us), with_total=with_total, speed=faster):
            return _by_rows(factor, us, with_total, None if with_total else contract_dtype)
    if not with_total:
        return [dot(factor, u, contract_dtype) for u in us], None
    first, whole = dot_and_total(factor, us[0], contract_dtype)
    return [first, *(dot(factor, u, contract_dtype) for u in us[1:])], whole


def _by_rows(
    factor: Outer, us: Sequence[Tensor], with_total: bool, contract_dtype: ContractDtype
) -> tuple[list[Tensor], Tensor | None]:
    left, right = wide(factor.left), wide(factor.right)
    parts: list[Tensor] = []
    totals: list[Tensor] = []
    for rows in _cost.row_blocks(*factor.shape):
        block_us = [wide(u)[rows].flatten() for u in us]
        dots: list[Tensor] = []
        whole: Tensor | None = None
        for i in range(len(left)):
            g = matmul(left[i, :, rows].mT, right[i], contract_dtype)
            dots.append(torch.stack([torch.dot(g.flatten(), u) for u in block_us]))
            if with_total:
                whole = g if whole is None else whole + g if i == 1 else whole.add_(g)
        parts.append(torch.stack(dots, dim=1))  # [k, n]
        if whole is not None:
            totals.append(whole)
    return list(add_up(parts)), torch.cat(totals) if totals else None
