"""What a trace says of one way through a model: the calls on tracked tensors, in order, and where
the samples lie there. `make` makes traces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ghostfunc._rules.registry import ArgName, Rule
from ghostfunc._trace.layout import Layout
from ghostfunc._trace.tracked import Tracked

Kind = Literal["use", "derived", "constant", "opaque"]
Shape = tuple[int, ...]
PlainCall: TypeAlias = tuple[Callable[..., Any], Hashable]
"""An op, and the plain arguments of a call of it: see `watch.plain_arguments`."""


@dataclass(frozen=True, eq=False)
class CallTrace:
    """One torch call on tracked tensors.

    Attributes:
        func: the op.
        hits: which of its flattened arguments are tracked.
        numbers: which tracked tensors they are.
        grad_enabled: whether gradients were taken.
        kind: "use" where samples are met, "derived" where not yet, "constant" where autograd sees
            no way from the parameter. "opaque" is a call with a way but no derivative: its result
            may be used as a constant only.
        pushes: for what derives, whether directions can be pushed through it, which takes second
            derivatives; else factors are pulled back, which takes first ones.
        rule: for uses, that of the op.
        names: for uses, the rule's names for the tracked arguments.
        layouts: where samples lie in the flattened arguments that carry them.
        out: where samples lie in the output.
        ndim, dtype: those of the output.
        plans: choices made for uses of certain shapes.
    """

    func: Callable[..., Any]
    hits: tuple[int, ...]
    numbers: tuple[int, ...]
    grad_enabled: bool
    kind: Kind
    pushes: bool = True
    rule: Rule | None = None
    names: tuple[ArgName, ...] = ()
    layouts: tuple[tuple[int, Layout], ...] = ()
    out: Layout = field(default=Layout(0))
    ndim: int = 0
    dtype: torch.dtype = torch.float32
    plans: dict[Hashable, bool] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def layout_of(self) -> dict[int, Layout]:
        """`layouts` by argument."""
        return dict(self.layouts)


@dataclass
class RecordedCall:
    """A call on tracked tensors, with what is needed to classify it.

    Attributes:
        trace: what is known of it so far; `tracked`: the tensors that it met.
        y: its output, of uses.
        candidates: where samples may lie in the output, going by its shapes: the first is tried,
            the others are for `sample_axis` to choose from.
    """

    trace: CallTrace
    tracked: list[Tracked]
    y: Tensor | None
    candidates: tuple[Layout, ...]


class WayTaken(NamedTuple):
    """The way that a run took through the program.

    Attributes:
        seen: whether all its calls are calls of its trace, or keep samples in place. Of others
            nobody has seen whether they reorder samples by their values.
        calls: how many calls it made.
        hashed: a hash of the ops and of their plain arguments: ways differ by it.
    """

    seen: bool
    calls: int
    hashed: int


@dataclass(frozen=True, eq=False)
class Trace:
    """What is known of one way through the model.

    Attributes:
        funcs: every torch call but reads of attributes, in order: a run that makes others is on
            another way.
        calls: the calls on tracked tensors, in order.
        uses: how often samples meet each parameter.
        patterns: for ops that may fold samples and positions, which axes have more than one row:
            where all axes before the samples' have one, they look as if they were not there.
        reorders: whether an op before one of the uses may reorder samples by their values, so that
            whose row is whose has to be checked in every run.
        statistics: whether a number is made of several samples, so that their independence has to
            be checked in every run, too.
        reads_at: the calls, by number, that hand values of the batch to Python.
        reads: whether the program reads values of the batch out of tensors: what it then does may
            be the same for all samples.
        dtypes: of floating-point tensors that carry samples; the coarsest decides what rounding is.
        order_keeping: calls that move no sample by values, with their plain arguments: a
            recurrence over more steps makes more of them.
        by_values: the plain arguments of the other calls: with another axis, they may move samples.
        guessed: whether nothing told how samples are folded at some use: all values were equal.
        ways: the first steps of ways that were gone with this trace, by shapes.
    """

    funcs: tuple[Callable[..., Any], ...]
    calls: tuple[CallTrace, ...]
    uses: tuple[int, ...]
    patterns: tuple[Pattern | None, ...]
    reorders: bool
    statistics: bool
    reads: bool
    reads_at: frozenset[int]
    dtypes: frozenset[torch.dtype]
    order_keeping: frozenset[PlainCall]
    by_values: Mapping[int, Hashable]
    guessed: bool = False
    ways: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def derived_from(self) -> frozenset[int]:
        """Tracked tensors that others derive from, by number: parameters have the first ones."""
        derived = (call for call in self.calls if call.kind != "use")
        return frozenset(number for call in derived for number in call.numbers)


Pattern: TypeAlias = tuple[Any, ...]

_FOLDS: set[Callable[..., Any]] = {
    torch.reshape, Tensor.reshape, Tensor.view, torch.flatten, Tensor.flatten, torch.unflatten,
    Tensor.unflatten, Tensor.repeat, torch.tile, Tensor.tile, torch.cat, torch.concat,
    torch.concatenate, torch.stack, torch.vstack, torch.hstack,
}  # fmt: skip


def may_fold(func: Callable[..., Any]) -> bool:
    """Whether an op may fold samples and positions."""
    return func in _FOLDS


def pattern(
    func: Callable[..., Any], inputs: Sequence[Shape | None], outs: Sequence[Shape | None]
) -> Pattern | None:
    """Which axes of an op's first two tensors have more than one row, and whether the op leaves the
    shape of the first as it is. Folds that differ in nothing but lengths have one pattern."""
    if func not in _FOLDS:
        return None
    shapes = [x for x in inputs if x is not None][:2]
    return (
        *(tuple(2 if size > 1 else int(size) for size in x) for x in shapes),
        shapes[:1] == list(outs[:1]),  # a call that raised has none
    )
