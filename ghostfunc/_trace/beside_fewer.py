"""What a run with more samples shows beside one with fewer, call by call.

Four questions, each asked by a class. All of them hear of every call before it is made and after.
None of them knows what a parameter is.

    Fixed       what is made of numbers alone, and is the same in every run?
    Reads       do values of the batch come into Python?
    Orders      where may rows change their places?
    Statistics  may a number be made of several samples?
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.torch_private import address
from ghostfunc._base.trees import first_tensor, flatten, tensors_of
from ghostfunc._base.types import PyTree
from ghostfunc._rules.reordering import (
    MAY_REORDER,
    NORMS_OF_SLICES,
    SCANS,
    mixes_slices,
    reorders,
    sorted_dim,
)
from ghostfunc._trace.movement import moves_samples
from ghostfunc._trace.trace import PlainCall, Shape
from ghostfunc._trace.tracked import differentiable
from ghostfunc._trace.watch import ALIKE, op_key, plain_arguments, reads_attribute, writes

_NUMBERS: set[Callable[..., Any]] = {
    Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.tolist,
}  # fmt: skip
_READS: set[Callable[..., Any]] = _NUMBERS | {
    Tensor.__bool__, Tensor.__array__, Tensor.numpy, Tensor.is_nonzero, torch.is_nonzero,
    Tensor.equal, torch.equal, Tensor.allclose, torch.allclose, Tensor.__contains__,
    Tensor.__repr__, Tensor.__format__,
}  # fmt: skip
"""Ops by which values of tensors come into Python."""


_ROWS_CHOSEN: set[Callable[..., Any]] = {
    Tensor.__getitem__, Tensor.narrow, torch.narrow, Tensor.split, torch.split, Tensor.chunk,
    torch.chunk, torch.select, Tensor.select, Tensor.index_select, torch.index_select,
}  # fmt: skip
"""Ops that take rows of a tensor. They may cut a table without samples to the number of samples."""


def shapes(tree: object) -> list[Shape | None]:
    return [tuple(x.shape) if isinstance(x, Tensor) else None for x in flatten(tree)[0]]


@dataclass
class PairedCall:
    """One call of the run with more samples, beside the same call of the run with fewer.

    Attributes:
        fewer, more: shapes of its arguments, with fewer samples and with more; None for those that
            are no tensors. `out_fewer`, `out_more`: of its results; `out_more` once it is made.
        number: of the call, reads of attributes not counted.
        recorded: how many calls on parameters came before.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fewer: list[Shape | None]
    out_fewer: list[Shape | None]
    number: int
    recorded: int
    more: list[Shape | None] = field(init=False)
    out_more: list[Shape | None] = field(init=False)

    def __post_init__(self) -> None:
        self.more = shapes((self.args, self.kwargs))

    @functools.cached_property
    def given(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return tensors_of((self.args, self.kwargs))

    @property
    def rows_of_first(self) -> tuple[list[int], int]:
        """The axes of the first tensor among the arguments that grew, and how many it has."""
        before = next((s for s in self.fewer if s is not None), ())
        given = first_tensor(self.args, self.kwargs)
        now = () if given is None else tuple(given.shape)
        return [i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b], len(now)


class Fixed:
    """What the program makes of nothing but numbers is the same in every run.

    Attributes:
        tensors: these, by `id`. `last`: whether the last call was given nothing else.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.last = False

    def after(self, call: PairedCall, out: Any) -> None:
        given = call.given
        self.last = all(id(x) in self.tensors for x in given)
        if self.last:
            self.tensors.update((id(x), x) for x in tensors_of(out))
        elif writes(call.func, call.kwargs) and given:
            self.tensors.pop(id(given[0]), None)


class Reads:
    """Whether values of the batch come into Python.

    Attributes:
        seen: whether they do; `numbers`: of the calls that read them.
    """

    def __init__(self, batch: PyTree) -> None:
        self.seen = False
        self.numbers: set[int] = set()
        self._of_batch = {id(x): x for x in tensors_of(batch)}  # and tensors made of its values
        self._written: set[int] = set()

    def after(self, call: PairedCall, out: Any) -> None:
        func, args, kwargs = call.func, call.args, call.kwargs
        values = tensors_of((args[1:] if func in ALIKE else args, kwargs))
        if any(id(x) in self._of_batch for x in values) or (
            self._written and not self._written.isdisjoint(_memory(values))
        ):
            if func in _READS:
                self.seen = True
                self.numbers.add(call.number)
            self._of_batch.update((id(x), x) for x in tensors_of(out))
            if writes(func, kwargs) or kwargs.get("out") is not None:
                # Other tensors with this memory hold values of the batch from now on.
                self._written |= _memory(tensors_of((args[:1], kwargs.get("out"), out)))

    def release(self) -> None:
        self._of_batch.clear()


def _memory(tensors: Sequence[Tensor]) -> set[int]:
    return set(map(address, tensors))


class Orders:
    """Where rows may change their places.

    Attributes:
        changed_at: how many calls on parameters came before the first that may have reordered
            samples by their values; None if none may have.
        keeping: calls that keep rows in place: the ops, with their plain arguments.
        by_values: the plain arguments of the others, by number of the call: values decide there
            where rows go, as an index into a tensor of samples does.
    """

    def __init__(self) -> None:
        self.changed_at: int | None = None
        self.keeping: set[PlainCall] = set()
        self.by_values: dict[int, Hashable] = {}

    def before(self, call: PairedCall) -> None:
        if self.changed_at is None and self._reorders(call):
            self.changed_at = call.recorded

    def _reorders(self, call: PairedCall) -> bool:
        if call.func is torch.randperm:
            return True
        if call.func not in MAY_REORDER or call.func in SCANS or call.func in NORMS_OF_SLICES:
            return False
        axes, ndim = call.rows_of_first
        return any(reorders(call.func, call.args, call.kwargs, axis, ndim) for axis in axes)

    def after(self, call: PairedCall, out: Any) -> None:
        if reads_attribute(call.func):
            return
        func, args, kwargs = call.func, call.args, call.kwargs
        plain, known = plain_arguments(args, kwargs), iter(s for s in call.fewer if s is not None)
        indices = [x for x in call.given if x.ndim and not differentiable(x)]
        # A list may be longer than it was.
        grown = [x for x in call.given if x.shape != next(known, None)]
        moves = func in MAY_REORDER and any(
            reorders(func, args, kwargs, axis, x.ndim) for x in grown for axis in range(x.ndim)
        )
        if moves or any(i is not x for i in indices for x in grown):
            self.by_values[call.number] = plain
        else:
            self.keeping.add((op_key(func), plain))


class Statistics:
    """Whether some number in the program may be made of several samples.

    Attributes:
        seen: whether one may. `chosen`: whether rows are chosen by the size of the batch.
    """

    def __init__(self, n: int, fixed: Fixed) -> None:
        self.seen = self.chosen = False
        self._n, self._fixed = n, fixed
        self._batch_wide: dict[int, Tensor] = {}  # made of all samples: for control flow, mostly
        self._uses_batch_wide = False

    def before(self, call: PairedCall) -> None:
        if call.func in SCANS:
            axes, ndim = call.rows_of_first
            self.seen |= bool(axes) and sorted_dim(call.func, call.args, call.kwargs) % ndim in axes
        elif call.func in NORMS_OF_SLICES:
            self.seen |= mixes_slices(call.args, call.kwargs, call.rows_of_first[0])
        self._uses_batch_wide = bool(self._batch_wide) and any(
            id(x) in self._batch_wide for x in call.given
        )
        # `_moves` calls the op on other rows. It comes first: an op may write to its arguments.
        self.seen = self.seen or _moves(call, self._n, self._fixed.tensors)

    def after(self, call: PairedCall, out: Any) -> None:
        """Comes after `Fixed.after`."""
        func, grew = call.func, call.out_more != call.out_fewer
        if func in _ROWS_CHOSEN and call.more == call.fewer and grew:
            self.chosen = True  # `table[:len(x)]`, of a table made for so many samples
            if not self._fixed.last:  # an index or a mask may be another one in the next call
                self.seen |= not all(map(differentiable, tensors_of(out)))
        if self._uses_batch_wide or (call.more != call.fewer and not grew):
            for x in tensors_of(out):
                if differentiable(x):
                    self.seen = True
                else:
                    self._batch_wide[id(x)] = x
            self.seen |= self._uses_batch_wide and func in _NUMBERS
        self.seen |= any(
            sum(a != b for a, b in zip(now or (), then or (), strict=False)) > 1
            for now, then in zip(call.out_more, call.out_fewer, strict=False)
        )

    def release(self) -> None:
        self._batch_wide.clear()


def _moves(call: PairedCall, n: int, fixed: Container[int]) -> bool:
    """Whether a call that is about to be made moves rows from sample to sample."""
    func = call.func
    if reads_attribute(func) or "out" in call.kwargs:
        return False
    if call.more == call.fewer or not any(call.out_fewer):
        return False
    if isinstance(func, FunctionType) and func.__module__.startswith("ghostfunc."):
        return False  # an op of this package knows which sample owns a row
    return moves_samples(func, (call.args, call.kwargs), call.fewer, call.out_fewer, n, fixed)
