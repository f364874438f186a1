"""The way of an earlier run at the same shapes, step by step.

A run hashes what its calls are told, so that other ways through the program are known by it. A run
that goes a way that was gone before at these shapes need not: of most calls it is enough to see
that they are the step that comes next, by comparing what it was told. Where a call is another one,
the hash goes on from what it was before that step, so both find the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.dense_gradients import makes_sparse
from ghostfunc._base.refusals import REFUSED
from ghostfunc._rules.registry import DECOMPOSITIONS
from ghostfunc._trace.trace import WayTaken, folds
from ghostfunc._trace.watch import nests

MAX_WAYS = 64
"""Ways of one trace, at as many shapes, that are remembered step by step."""

_NUMBERS = frozenset((int, str, bool))
_LISTS = frozenset((tuple, list, torch.Size))
_INT = frozenset((int,))

Pick: TypeAlias = Callable[[Any], Any]


def _nothing(values: Any) -> None:
    """What a call that is told nothing is told."""


class Step:
    """One call, and what tells that it is made again.

    Attributes:
        func: the op; None after the last call.
        number: of the call; `way`: the hash of the way before it.
        plain: whether nothing but what follows has to be looked at: no parameter meets the call,
            and what it returns is not handed to Python.
        names: of the keyword arguments; `kinds`: the types of all arguments.
        pick: takes the whole numbers, words and lists of numbers out of the arguments; `told`: what
            they were. `lists`: which arguments are lists of whole numbers.
        shape: of the first argument, for ops that may fold axes.
        compared: whether any of these three is to be.
        next: the step after this one.
    """

    __slots__ = (
        "compared", "func", "kinds", "lists", "names", "next", "number", "pick", "plain", "shape",
        "told", "way",
    )  # fmt: skip

    def __init__(self, func: Callable[..., Any] | None, number: int, way: int) -> None:
        self.func, self.number, self.way = func, number, way
        self.plain = False
        self.names: tuple[str, ...] = ()
        self.kinds: tuple[type, ...] = ()
        self.pick: Pick = _nothing
        self.told: Any = None
        self.lists: tuple[int, ...] = ()
        self.compared = False
        self.shape: torch.Size | None = None
        self.next: Step | None = None

    @property
    def is_last(self) -> bool:
        """Whether no call follows."""
        return self.func is None

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have the step be plain, if what its call is told can be compared."""
        values = (*args, *kwargs.values())
        assert self.func is not None
        if self.func in REFUSED or self.func in DECOMPOSITIONS or nests(self.func):
            return
        kinds = tuple(map(type, values))
        lists = tuple(i for i, kind in enumerate(kinds) if issubclass(kind, (tuple, list)))
        told = [i for i, kind in enumerate(kinds) if kind in _NUMBERS]
        if makes_sparse(self.func) or slice in kinds:
            return
        if any(kinds[i] not in _LISTS or not _INT.issuperset(map(type, values[i])) for i in lists):
            return
        if folds(self.func):
            if not isinstance(values[0], Tensor) or any(isinstance(x, Tensor) for x in values[1:]):
                return
            self.shape = values[0].shape
        self.names, self.kinds, self.lists = tuple(kwargs), kinds, lists
        if picked := (*told, *lists):
            self.pick = itemgetter(*picked)
            self.told = self.pick(values)
        self.compared = bool(picked) or self.shape is not None
        self.plain = True

    def again(self, values: tuple[Any, ...]) -> bool:
        """Whether arguments of the same types tell the call the same."""
        return (
            self.pick(values) == self.told
            and (self.shape is None or values[0].shape == self.shape)
            and (not self.lists or self._whole(values))
        )

    def _whole(self, values: tuple[Any, ...]) -> bool:
        """Whether lists of numbers hold whole ones: `[1]` equals `[True]`."""
        return all(_INT.issuperset(map(type, values[i])) for i in self.lists)


def last(way: WayTaken) -> Step:
    """What stands after the last call."""
    return Step(None, way.calls, way.told)


def remember(ways: dict[Hashable, Step], shapes: Hashable, steps: list[Step]) -> None:
    """Keep a way among those of a trace, by its first step; of too many the oldest is forgotten.
    Other threads may do so at the same time."""
    for step, after in itertools.pairwise(steps):
        step.next = after
    for old in list(ways)[: max(0, len(ways) + 1 - MAX_WAYS)]:
        ways.pop(old, None)
    ways[shapes] = steps[0]
