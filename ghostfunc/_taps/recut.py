"""From rows to documents: the samples of a factor are cut anew before it is made.

A packed run shows an op rows, `[R, ..., T, ...]`. The gradient of document k at a use is made of
the positions of document k alone, for its loss has a cotangent nowhere else. So the cotangent and
the arguments of the use are laid out as documents, `[n, ..., t, ...]`, before the op's rule sees
them: from there on nobody knows that documents shared rows.

This takes ops that treat every position alike. Of others the numbers are not those of plain
autograd, which the proof of the run tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ghostfunc._base.documents import Packing
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
        """The cotangent of a call's output, stacked over documents."""
        places = self.positions[number]
        assert places is not None
        return self._documents(call.out.stack(b, self.packing.rows), places.out, masked=True)

    def arguments(self, number: int, call: CallTrace, leaves: Sequence[Any]) -> list[Any]:
        """A call's arguments, stacked over documents."""
        places = self.positions[number]
        assert places is not None
        rows, n = self.packing.rows, len(self.packing.row)
        out = list(leaves)
        for i, x in enumerate(leaves):
            if i in call.places:
                call.places[i].check(x, rows)
                stacked = call.places[i].stack(x, rows)
                out[i] = self._documents(stacked, places.args[i], masked=False)
            elif isinstance(x, Tensor):
                out[i] = x.expand(n, *x.shape)
        return out

    def broadcast(self, number: int, call: CallTrace, b: Tensor, const: Tensor) -> Tensor:
        """The gradients of a parameter that was broadcast, `[n, ...]`, given the cotangent of its
        copies, samples in front."""
        places = self.positions[number]
        assert places is not None
        padded = call.out.pad(const, call.ndim)
        if padded.movedim(call.out.sample_axis, 0).shape[places.out] == 1:
            return self._documents(b, places.out, masked=True).sum(places.out, keepdim=True)
        # A parameter per position of the row: each document has those it lies at.
        own = self.packing.own_in_row
        shape = [1] * b.ndim
        shape[0], shape[places.out] = own.shape
        return b.index_select(0, self.packing.row).masked_fill(~own.reshape(shape), 0)

    def copies(self, number: int, layout: Layout, shape: list[int]) -> list[int]:
        """The shape of a broadcast parameter's copies, samples where they lie: a copy for every
        position where it has none of its own."""
        places = self.positions[number]
        assert places is not None
        axis = places.out - (places.out <= layout.sample_axis)
        if shape[axis] == 1:
            shape[axis] = self.packing.width
        return shape

    def _documents(self, x: Tensor, axis: int | None, *, masked: bool) -> Tensor:
        """`[R, ..., T, ...]` as `[n, ..., t, ...]`; `masked`, zero behind the end of documents."""
        packing = self.packing
        if axis is None:
            return x.index_select(0, packing.row)
        x = x.movedim(axis, 1).flatten(0, 1).index_select(0, packing.index.flatten())
        x = x.unflatten(0, tuple(packing.index.shape))
        if masked and not packing.whole:
            own = packing.own.reshape(*packing.own.shape, *[1] * (x.ndim - 2))
            x = x.masked_fill(~own, 0)
        return x.movedim(1, axis)
