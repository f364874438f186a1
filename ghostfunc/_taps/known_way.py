"""The way of an earlier run at the same shapes, recognised step by step.

A run hashes its calls with their plain arguments: the hash tells ways through the program apart. A
run that repeats a way that is known at these shapes hashes nothing for most calls. It compares the
plain arguments of a call with the step that comes next. Where a call is another one, the hash goes
on from what it was before that step, so both find the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.dense_gradients import makes_sparse
from ghostfunc._base.refusals import REFUSED
from ghostfunc._rules.registry import DECOMPOSITIONS, FactorMakers, FactorRule
from ghostfunc._taps.recut import Recut
from ghostfunc._trace.trace import CallTrace, WayTaken, may_fold
from ghostfunc._trace.tracked import CallArgs, Tracked
from ghostfunc._trace.watch import SIZED_BY_VALUES, TELLING, nests

MAX_STEPS = 50_000
"""Steps of one trace that are remembered, over all its ways: some 20 MB. A way through a GPT-2 of 4
layers has 260, through a model of 32 layers some thousands."""

_NUMBERS = frozenset((int, str, bool, torch.dtype))
"""Types of plain arguments, which are compared."""

_OTHERS = frozenset((float, type(None), type(...), torch.device, torch.layout, torch.memory_format))
"""Types of arguments that move no sample: nobody compares them, apart from a few floats."""

_ZERO = frozenset((0.0,))
_LISTS = frozenset((tuple, list, torch.Size))
_INT = frozenset((int,))
_INDICES = frozenset((int, slice, type(None), type(...)))

Pick: TypeAlias = Callable[[Any], Any]


def _holds_indices(values: Any) -> bool:
    """Whether a list holds whole numbers, and what indexes without tensors, alone."""
    return _INDICES.issuperset(map(type, values)) and all(
        type(x) is int or x is None
        for s in values
        if type(s) is slice
        for x in (s.start, s.stop, s.step)
    )


def _pick_none(values: Any) -> None:
    """Pick from the arguments of a call that has none to compare."""


class Step:
    """One call, and what tells that it is made again.

    Attributes:
        func: the op; None after the last call.
        number: of the call; `way`: the hash of the way before it.
        plain: whether nothing but what follows has to be looked at: no parameter meets the call,
            and what it returns is not handed to Python.
        names: of the keyword arguments; `kinds`: the types of all arguments.
        pick: takes whole numbers, words, dtypes and a few floats out of the arguments; `picked`:
            what they were.
        lists: which arguments are lists of whole numbers or indices; `listed`: what was in them.
        shape: of the first argument, for ops that may fold axes.
        compared: whether `picked`, `listed` or `shape` has to be compared.
        use: what is known of the use, for calls that are one.
        next: the step after this one.
    """

    __slots__ = (
        "compared", "func", "kinds", "listed", "lists", "names", "next", "number", "pick", "picked",
        "plain", "shape", "use", "way",
    )  # fmt: skip

    def __init__(self, func: Callable[..., Any] | None, number: int, way: int) -> None:
        self.func, self.number, self.way = func, number, way
        self.plain = False
        self.names: tuple[str, ...] = ()
        self.kinds: tuple[type, ...] = ()
        self.pick: Pick = _pick_none
        self.picked: Any = None
        self.lists: tuple[int, ...] = ()
        self.listed: list[tuple[int, ...]] = []
        self.compared = False
        self.shape: torch.Size | None = None
        self.use: KnownUse | None = None
        self.next: Step | None = None

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have the step be plain, if the arguments of its call can be compared."""
        values = (*args, *kwargs.values())
        assert self.func is not None
        if self.func in REFUSED or self.func in DECOMPOSITIONS or nests(self.func):
            return
        kinds = tuple(map(type, values))
        lists = tuple(i for i, kind in enumerate(kinds) if issubclass(kind, (tuple, list)))
        picked = [i for i, kind in enumerate(kinds) if kind in _NUMBERS]
        telling = TELLING if picked else _ZERO  # a factor of one is no rate, as of dropout
        picked += [i for i, kind in enumerate(kinds) if kind is float and values[i] in telling]
        if makes_sparse(self.func) or self.func in SIZED_BY_VALUES:
            return
        rest = {k for k in kinds if k not in _NUMBERS and k not in _OTHERS and k not in _LISTS}
        if any(not issubclass(kind, Tensor) for kind in rest):
            return
        if any(kinds[i] not in _LISTS or not _holds_indices(values[i]) for i in lists):
            return
        if may_fold(self.func):
            if not isinstance(values[0], Tensor) or any(isinstance(x, Tensor) for x in values[1:]):
                return
            self.shape = values[0].shape
        self.names, self.kinds, self.lists = tuple(kwargs), kinds, lists
        if picked:
            self.pick = itemgetter(*picked)
            self.picked = self.pick(values)
        self.listed = [tuple(values[i]) for i in lists]  # a caller may write to a list of its own
        self.compared = bool(picked or lists) or self.shape is not None
        self.plain = True

    def again(self, values: tuple[Any, ...]) -> bool:
        """Whether arguments of the same types are those of this step."""
        return (
            self.pick(values) == self.picked
            and (self.shape is None or values[0].shape == self.shape)
            and (not self.lists or self._same_lists(values))
        )

    def _same_lists(self, values: tuple[Any, ...]) -> bool:
        """Whether lists hold the same whole numbers: `[1]` equals `[True]`."""
        for i, listed in zip(self.lists, self.listed, strict=True):
            given = values[i]
            if tuple(given) != listed or not (
                _INT.issuperset(map(type, given)) or _holds_indices(given)
            ):
                return False
        return True


class KnownUse:
    """A use that was met before at these shapes: what tells that it is met again, and what is then
    known of it.

    Attributes:
        call: what the trace knows of it.
        names, kinds: as those of a `Step`.
        hits: which arguments are tracked, in the trace's order; `numbers`: which tensors they are.
        tensors: which arguments are tensors, in the order in which a use keeps them; `leaves`:
            their numbers among the flattened arguments; `shapes`: theirs. `layouts`: where samples
            lie in them, None for those that carry none.
        pick: takes out the other arguments; `others`: what they were. `lists`: as in a `Step`.
        template: all arguments, without the tensors.
        out: shape of the output.
    """

    __slots__ = (
        "call", "hits", "kinds", "layouts", "leaves", "lists", "names", "numbers", "others", "out",
        "pick", "shapes", "template", "tensors",
    )  # fmt: skip

    def __init__(
        self, call: CallTrace, made: CallArgs, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        given = (*args, *kwargs.values())
        # A caller may write to a list of its own, also between the two passes.
        values: tuple[Any, ...] = tuple(list(x) if type(x) is list else x for x in given)
        self.call, self.numbers = call, call.numbers
        self.names, self.kinds = tuple(kwargs), tuple(map(type, values))
        index_of = {id(x): i for i, x in enumerate(values)}
        tensors = [i for i, x in enumerate(made.leaves) if isinstance(x, Tensor)]
        self.hits = tuple(index_of[id(made.leaves[i])] for i in call.hits)
        self.tensors = tuple(index_of[id(made.leaves[i])] for i in tensors)
        self.leaves = tuple(tensors)
        self.layouts = tuple(call.layout_of.get(i) for i in tensors)
        self.shapes = [values[i].shape for i in self.tensors]
        others = [i for i in range(len(values)) if i not in self.tensors]
        self.lists = tuple(i for i in others if isinstance(values[i], (tuple, list)))
        self.pick = itemgetter(*others) if others else _pick_none
        self.others = self.pick(values)
        self.template = [None if i in self.tensors else x for i, x in enumerate(values)]
        self.out = torch.Size(())

    def met(
        self, values: tuple[Any, ...], tracked: Mapping[int, tuple[Any, Tracked]]
    ) -> list[Tracked] | None:
        """The tracked tensors that are met, if this is the same use again."""
        if (
            tuple(map(type, values)) != self.kinds
            or sum(map(tracked.__contains__, map(id, values))) != len(self.hits)
            or [values[i].shape for i in self.tensors] != self.shapes
            or self.pick(values) != self.others
            or not all(_INT.issuperset(map(type, values[i])) for i in self.lists)
        ):
            return None
        found = [tracked[id(values[i])][1] for i in self.hits if id(values[i]) in tracked]
        return found if tuple([t.number for t in found]) == self.numbers else None

    def run(
        self, values: tuple[Any, ...], met: Sequence[Tracked], operands: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The op's output, and the tensors among its arguments, parameters as constants."""
        given = list(values)
        for i, operand in zip(self.hits, operands, strict=True):
            given[i] = operand
        y = self._apply(self.call.func, given)
        for i, tracked in zip(self.hits, met, strict=True):
            given[i] = tracked.const
        return y, [given[i] for i in self.tensors]

    def makers(
        self, b: Tensor, tensors: Sequence[Tensor], n: int, recut: Recut | None, call_number: int
    ) -> FactorMakers:
        """What makes the factors of all targets, given the output's cotangent: those of samples,
        or of the single positions that a `recut` makes of packed rows."""
        given = list(self.template)
        if recut is None:
            b = self.call.out.stack(b, n)
            for i, x, layout in zip(self.tensors, tensors, self.layouts, strict=True):
                given[i] = x.expand(n, *x.shape) if layout is None else layout.stack(x, n)
        else:
            b = recut.cotangent(call_number, self.call, b)
            for i, leaf, x in zip(self.tensors, self.leaves, tensors, strict=True):
                given[i] = recut.argument(call_number, self.call, leaf, x)
        fn: Any = self.call.rule.fn  # type: ignore[union-attr]
        return self._apply(partial(fn, b), given)

    def _apply(self, func: Callable[..., Any], given: list[Any]) -> Any:
        if not self.names:
            return func(*given)
        count = len(given) - len(self.names)
        return func(*given[:count], **dict(zip(self.names, given[count:], strict=True)))


_COMPARED = frozenset((int, str, bool, float, type(None), torch.dtype))


def known_use(
    call: CallTrace, made: CallArgs, args: Sequence[Any], kwargs: dict[str, Any]
) -> KnownUse | None:
    """What will be known of a use, if a use that comes again can be told from others."""
    if call.func in REFUSED or makes_sparse(call.func) or not isinstance(call.rule, FactorRule):
        return None
    values = (*args, *kwargs.values())
    tensors = [x for x in values if isinstance(x, Tensor)]
    lists = [x for x in values if isinstance(x, (tuple, list))]
    others = [type(x) for x in values if not isinstance(x, (Tensor, tuple, list))]
    if (
        len(set(map(id, tensors))) != len(tensors)  # one tensor may be two arguments
        or len(tensors) != sum(isinstance(x, Tensor) for x in made.leaves)
        or not _COMPARED.issuperset(others)
        or not all(type(x) in _LISTS and _INT.issuperset(map(type, x)) for x in lists)
    ):
        return None
    return KnownUse(call, made, args, kwargs)


def last(way: WayTaken) -> Step:
    """What stands after the last call."""
    return Step(None, way.calls, way.hashed)


def remember(ways: dict[Hashable, Step], shapes: Hashable, steps: list[Step]) -> None:
    """Keep a way among those of a trace, by its first step; of too many the oldest is forgotten.
    Other threads may do so at the same time."""
    for step, after in itertools.pairwise(steps):
        step.next = after
    most = max(1, MAX_STEPS // len(steps))  # the ways of a trace are about equally long
    for old in list(ways)[: max(0, len(ways) + 1 - most)]:
        ways.pop(old, None)
    ways[shapes] = steps[0]
