"""What a step with scores mostly reads, in as few calls of torch as there are.

At small shapes, and on a GPU, a backward pass costs what its calls cost. Where scores are wanted as
one number per sample, two kinds of uses take a way of their own. The second kind does where a
quantity is read beside the gradient, too (`gf.Spread`), parameters of one size in a table:

    a matrix, one run    <g_i, sum_j g_j> of the rows of both batches: two Gram matrices of
                         positions, and one product of them; the total is one more product
    small gradients      biases, scales and shifts of all layers wait for the end of the backward
                         pass, side by side in one table `[n, elements]`; it is read once

Everything else is read by the readers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._factors import cost
from ghostfunc._factors.beside_total import RunningTotal
from ghostfunc._factors.bundles import use_shape
from ghostfunc._factors.factor import Dense, Factor, Outer
from ghostfunc._factors.matmul import dots, inner_products, speed
from ghostfunc._quantities.readers import DotReader, OneRunReader, ValueReader
from ghostfunc._trace.trace import CallTrace
from ghostfunc._trace.tracked import ReaderKey, Tracked

SMALL = 1 << 16
"""Elements of the per-sample gradients of one parameter that may wait for the others."""

FEW = 1 << 12
"""Terms that one call may multiply and add up in their order. A longer sum is a call of its own,
which adds in pairs and loses fewer digits."""

PLANS = 64
"""Choices that are remembered of one use, by its shapes; they are cheap to make again."""

Add: TypeAlias = Callable[[ReaderKey, Tensor], None]
"""Takes what was read of a quantity of a parameter."""


@dataclass(frozen=True)
class _Waiting:
    """Small gradients of one parameter, `[n, elements]`, and what they are read by."""

    key: ReaderKey
    reader: DotReader | OneRunReader | ValueReader
    running: RunningTotal | None
    g: Tensor


@dataclass
class FewCalls:
    """The readings of one run that take these two ways.

    Attributes:
        summed: quantities that are added up over parameters.
    """

    summed: Collection[int]
    _waiting: list[_Waiting] = field(default_factory=list)

    def read(self, call: CallTrace, target: Tracked, factor: Factor, add: Add) -> bool:
        """Read one use of a parameter, now or later; False if that is left to its readers."""
        if target.leaf is None or target.grad_is_returned or len(target.readers) != 1:
            return False
        ((key, (reader, _)),) = target.readers.items()
        if isinstance(reader, ValueReader):
            if not reader.gives_total:
                return False
        elif key[0] not in self.summed or not isinstance(reader, (DotReader, OneRunReader)):
            return False
        if isinstance(factor, Outer):
            if not isinstance(reader, OneRunReader) or reader.contract_dtype is not None:
                return False
            dots = _paired(call, factor, reader.n, target.running)
            if dots is not None:
                add(key, dots)
            return dots is not None
        if not isinstance(factor, Dense) or factor.g.numel() > SMALL:
            return False
        g = wide(factor.g).reshape(len(factor.g), -1)
        self._waiting.append(_Waiting(key, reader, target.running, g))
        return True

    def finish(self, add: Add) -> None:
        """Read what has waited."""
        tables: dict[Any, list[_Waiting]] = {}
        for one in self._waiting:
            each = one.g.shape[1] if isinstance(one.reader, ValueReader) else None
            kind = one.key[0], type(one.reader), one.g.dtype, one.g.device, each
            tables.setdefault(kind, []).append(one)
        for table in tables.values():
            read = _read_each if isinstance(table[0].reader, ValueReader) else _read_table
            read(table, add)
        self._waiting.clear()


def _paired(call: CallTrace, factor: Outer, n: int, running: RunningTotal | None) -> Tensor | None:
    """`<g_i, sum_j g_j>`, i among the first n samples and j among the others, from inner products
    of positions; None where that is not the cheapest. The total of the first samples is added to
    `running`."""
    left, right = factor
    plan = n, left.shape, right.shape[-1], left.dtype, running is not None
    cheapest = call.plans.get(plan)
    if cheapest is None:
        if len(call.plans) >= PLANS:
            call.plans.clear()
        cheapest = call.plans[plan] = _pairs_are_cheapest(factor, n, grads=running is not None)
    if not cheapest:
        return None
    cut = n * left.shape[1]
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    ours, rights = left[:cut], right[:cut]
    tokens = inner_products(ours, left[cut:])
    others = inner_products(rights, right[cut:])
    if running is not None:
        running.put_product(ours.mT, rights)
    if tokens.numel() > n * FEW:
        return tokens.mul_(others).view(n, -1).sum(1)
    return torch.bmm(tokens.view(n, 1, -1), others.view(n, -1, 1)).view(n)


def _pairs_are_cheapest(factor: Outer, n: int, *, grads: bool) -> bool:
    """Whether pairs of positions are few enough for one block, and cheaper than a direction."""
    samples, t = factor.left.shape[:2]
    pairs = n * t * (samples - n) * t
    both = use_shape(factor)
    ours = cost.UseShape(both.kind, both.shape, n, t, direct=True)
    theirs = cost.UseShape(both.kind, both.shape, samples - n, t, direct=True)
    return pairs <= cost.CACHE_ELEMENTS and cost.keep_direction_factored(
        [ours], [theirs], grads=grads, speed=speed(factor.left)
    )


def _read_each(table: list[_Waiting], add: Add) -> None:
    """Read gradients of many parameters of one size, each by itself."""
    reader = table[0].reader
    assert isinstance(reader, ValueReader)
    values, totals = reader.read_side_by_side(torch.stack([one.g for one in table]))
    for one, value, total in zip(table, values.unbind(), totals.unbind(), strict=True):
        add(one.key, value)
        if one.running is not None:
            one.running.put(total)


def _read_table(table: list[_Waiting], add: Add) -> None:
    """Read gradients of many parameters, side by side."""
    whole = table[0].g if len(table) == 1 else torch.cat([one.g for one in table], dim=1)
    first = table[0].reader
    if isinstance(first, OneRunReader):
        whole, u = whole[: first.n], whole[first.n :].sum(0)
    else:
        u = torch.cat([wide(one.reader.u).flatten() for one in table])  # type: ignore[union-attr]
    add(table[0].key, dots(whole, u))
    if all(one.running is None for one in table):
        return
    totals = whole.sum(0).split([one.g.shape[1] for one in table])
    for one, total in zip(table, totals, strict=True):
        if one.running is not None:
            one.running.put(total)
