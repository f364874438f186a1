"""From rows to documents: the samples of a factor are cut anew before it is made.

A packed run shows an op rows, `[R, ..., T, ...]`. The gradient of document k at a use is made of
the positions of document k alone, for its loss has a cotangent nowhere else. So the op's rule gets
every position as a sample of its own, `[R * T, ..., 1, ...]`, and the factors of a document's
positions are put together to its own: from there on nobody knows that documents shared rows.

    Outer, OneHot:  the positions side by side, [n, t, ...]
    Dense:          their sum

This takes ops that treat every position alike. Of others the numbers are not those of plain
autograd, which the proof of the run tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ghostfunc._base.documents import Packing
from ghostfunc._base.dtypes import wide
from ghostfunc._factors.factor import (
    Dense,
    Factor,
    Grouped,
    OneHot,
    Outer,
    flat_positions,
    unknown_factor,
)
from ghostfunc._trace.layout import Layout
from ghostfunc._trace.trace import CallTrace


@dataclass(frozen=True)
class Positions:
    """Which axis holds the positions at one call, the samples in front.

    Attributes:
        out: of its output.
        args: of its arguments that carry samples, by number; None for those of a row as a whole.
    """

    out: int
    args: Mapping[int, int | None]


@dataclass(frozen=True)
class Recut:
    """How one run's rows become documents.

    Attributes:
        positions: by number of the call; None where parameters meet no samples.
    """

    packing: Packing
    positions: Sequence[Positions | None]

    def cotangent(self, number: int, call: CallTrace, b: Tensor) -> Tensor:
        """The cotangent of a call's output, stacked over positions: `[R * T, ...]`."""
        return self._single(call.out.stack(b, self.packing.rows), self._of(number).out)

    def argument(self, number: int, call: CallTrace, i: int, x: Tensor) -> Tensor:
        """A tensor among a call's flattened arguments, stacked over positions."""
        rows, layout = self.packing.rows, call.layout_of.get(i)
        if layout is None:
            return x.expand(rows * self.packing.width, *x.shape)
        layout.check(x, rows)
        return self._single(layout.stack(x, rows), self._of(number).args[i])

    def broadcast(self, number: int, call: CallTrace, b: Tensor, const: Tensor) -> Tensor:
        """The gradients of a parameter that was broadcast, `[n, ...]`, given the cotangent of its
        copies, samples in front."""
        axis, packing = self._of(number).out, self.packing
        padded = call.out.pad(const, call.ndim)
        if padded.movedim(call.out.sample_axis, 0).shape[axis] == 1:
            return sums(b.movedim(axis, 1).flatten(0, 1), packing)
        # A parameter per position of the row: each document has those it lies at.
        own = packing.own_in_row
        shape = [1] * b.ndim
        shape[0], shape[axis] = own.shape
        return b.index_select(0, packing.row).masked_fill(~own.reshape(shape), 0)

    def copies(self, number: int, layout: Layout, shape: list[int]) -> list[int]:
        """The shape of a broadcast parameter's copies, samples where they lie: a copy for every
        position where it has none of its own."""
        axis = self._of(number).out
        axis -= axis <= layout.sample_axis
        if shape[axis] == 1:
            shape[axis] = self.packing.width
        return shape

    def _of(self, number: int) -> Positions:
        axes = self.positions[number]
        assert axes is not None
        return axes

    def _single(self, x: Tensor, axis: int | None) -> Tensor:
        """`[R, ..., T, ...]` as `[R * T, ..., 1, ...]`."""
        width = self.packing.width
        if axis is None:
            return x[:, None].expand(len(x), width, *x.shape[1:]).flatten(0, 1)
        return x.movedim(axis, 1).flatten(0, 1).unsqueeze(axis)


def sums(x: Tensor, packing: Packing) -> Tensor:
    """Sums over the positions of each document: `[R * T, ...]` -> `[n, ...]`."""
    n = len(packing.row)
    x = wide(x)
    out = x.new_zeros((n + 1, *x.shape[1:]))  # the last one is for positions between documents
    return out.index_add(0, packing.document, x)[:n]


def regrouped(factor: Factor, packing: Packing) -> Factor:
    """The factor of documents, given that of their positions one by one. Positions behind the end
    of a document have no cotangent."""
    match factor:
        case Outer(left, right):
            return Outer(
                _gathered(flat_positions(left), packing, 0),
                _gathered(flat_positions(right), packing),
            )
        case OneHot(ids, b, n_rows):
            ids = ids[:, None].flatten(1)
            return OneHot(_gathered(ids, packing), _gathered(flat_positions(b), packing, 0), n_rows)
        case Grouped(left, right):
            left, right = left.transpose(1, 2), right.transpose(1, 2)
            left, right = _gathered(left, packing, 0), _gathered(right, packing)
            return Grouped(left.transpose(1, 2), right.transpose(1, 2))
        case Dense(g):
            return Dense(sums(g, packing))
        case _:
            raise unknown_factor(factor)


def _gathered(x: Tensor, packing: Packing, behind: float | None = None) -> Tensor:
    """`[R * T, k, ...]` as `[n, t * k, ...]`; `behind` the end of documents, the value given."""
    if not packing.seamless:
        x = x.index_select(0, packing.index.flatten())
    out = x.unflatten(0, tuple(packing.index.shape))
    if behind is not None and not packing.whole:
        out = out.masked_fill(~packing.own.reshape(*packing.own.shape, *[1] * (x.ndim - 1)), behind)
    return out.flatten(1, 2)


def in_rows(factor: Factor, packing: Packing) -> Factor | None:
    """The factor of the rows, `[R, T, ...]`, given that of their positions; None unless it has one
    vector per position."""
    shape = packing.rows, packing.width
    match factor:
        case Outer(left, right):
            left, right = flat_positions(left), flat_positions(right)
            if left.shape[1] == 1:
                return Outer(left[:, 0].unflatten(0, shape), right[:, 0].unflatten(0, shape))
        case OneHot(ids, b, n_rows):
            ids, b = ids[:, None].flatten(1), flat_positions(b)
            if ids.shape[1] == 1:
                return OneHot(ids[:, 0].unflatten(0, shape), b[:, 0].unflatten(0, shape), n_rows)
    return None
