"""The first two of the three runs that tracing makes (`make.py`). The second has more samples than
the first, one more as a rule, and is compared with it call by call: what grew holds samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.errors import (
    WAYS_OUT,
    ControlFlowError,
    GhostError,
    RandomnessError,
    SampleAxisError,
    UnsupportedAlwaysError,
    UnsupportedOpError,
)
from ghostfunc._base.refusals import Refusals, op_name
from ghostfunc._base.side_effects import Draws
from ghostfunc._base.torch_private import SET_GRAD_ENABLED, address
from ghostfunc._base.trees import first_tensor, flatten, tensors_of
from ghostfunc._base.types import PyTree
from ghostfunc._factors.factor import misfit
from ghostfunc._rules.complex_numbers import for_complex
from ghostfunc._rules.registry import COPY, REASONS, ArgName, BroadcastRule, FactorRule, rule_of
from ghostfunc._rules.reordering import (
    MAY_REORDER,
    NORMS_OF_SLICES,
    SCANS,
    mixes_slices,
    reorders,
    sorted_dim,
)
from ghostfunc._trace.derivatives import has_derivative, has_second_derivative
from ghostfunc._trace.layout import Layout
from ghostfunc._trace.movement import moves_samples
from ghostfunc._trace.sample_axis import candidates
from ghostfunc._trace.trace import CallTrace, Kind, PlainCall, RecordedCall, Shape
from ghostfunc._trace.tracked import CallArgs, Tracked, differentiable
from ghostfunc._trace.watch import (
    ALIKE,
    CONSTANTS,
    TrackingMode,
    decomposed,
    op_key,
    plain_arguments,
    reads_attribute,
    writes,
)

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


class ShapeLog(Refusals):
    """Notes the shapes of every torch call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], list[Shape | None], list[Shape | None]]] = []

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        whole = decomposed(self, func, args, kwargs)
        if whole is not NotImplemented:
            return whole
        if func is SET_GRAD_ENABLED:
            return func(*args)
        entry = len(self.calls)
        inputs = shapes((args, kwargs))
        self.calls.append((func, inputs, []))
        out = super().call(func, args, kwargs)
        self.calls[entry] = (func, inputs, shapes(out))
        return out


def _memory(tensors: Sequence[Tensor]) -> set[int]:
    return set(map(address, tensors))


def shapes(tree: object) -> list[Shape | None]:
    return [tuple(x.shape) if isinstance(x, Tensor) else None for x in flatten(tree)[0]]


class Recorder(TrackingMode):
    """Runs the larger of two batches, call by call compared with the log of the smaller one.

    Args:
        n_small, n_large: samples in the two batches; the larger one begins with the smaller one.
        large: the larger batch.

    Attributes:
        dtypes: of the floating-point tensors that samples lie in.
        statistics: whether some number in the program may be made of several samples.
        reads: whether values of the batch come into Python, or rows are chosen by its size;
            `reads_at`: the numbers of the calls that read values.
        order_keeping: calls that keep rows in place: the ops, with their plain arguments.
        by_values: the plain arguments of the other calls, by number of the call.
        recorded: the calls on tracked tensors, in order, without those that return no tensor.
    """

    def __init__(
        self, leaves: Sequence[Tracked], log: ShapeLog, n_small: int, n_large: int, large: PyTree
    ) -> None:
        super().__init__(leaves)
        self._log = log
        self._n_small, self._n_large = n_small, n_large
        self._of_batch = {id(x): x for x in tensors_of(large)}  # what is made of its values
        self._written: set[int] = set()
        self._here: dict[int, Tensor] = {}  # what the program makes of numbers alone
        self._made_here = False  # whether the last call was given nothing else
        self._entry = 0
        self._reordered_at: int | None = None
        self.dtypes: set[torch.dtype] = set()
        self.statistics = False
        self.reads = False
        self.reads_at: set[int] = set()
        self.order_keeping: set[PlainCall] = set()
        self.by_values: dict[int, Hashable] = {}
        self._number = -1  # of the call, reads of attributes not counted
        self._batch_wide_results: dict[int, Tensor] = {}  # on all samples: for control flow, mostly
        self.recorded: list[RecordedCall] = []

    @property
    def reorders(self) -> bool:
        """Whether samples meet parameters after they may have been reordered."""
        if self._reordered_at is None:
            return False
        return any(s.trace.kind == "use" for s in self.recorded[self._reordered_at :])

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = decomposed(self, func, args, kwargs)
        if out is not NotImplemented:
            return out
        if func is SET_GRAD_ENABLED:
            return func(*args)
        self._entry += 1
        self._number += not reads_attribute(func)
        if self._entry > len(self._log.calls) or self._log.calls[self._entry - 1][0] != func:
            raise ControlFlowError(
                f"model_fn calls other ops for {self._n_large} samples than for {self._n_small} "
                f"(at {op_name(func)}): its control flow depends on its data, or on how many "
                "samples there are, so it cannot be traced. " + WAYS_OUT
            )
        if func is torch.randperm and self._reordered_at is None:
            self._reordered_at = len(self.recorded)
        if func in MAY_REORDER or func in SCANS or func in NORMS_OF_SLICES:
            before = next((s for s in self._log.calls[self._entry - 1][1] if s is not None), ())
            given = first_tensor(args, kwargs)
            now = () if given is None else given.shape
            axes = [i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b]
            if func in SCANS:
                self.statistics |= bool(axes) and sorted_dim(func, args, kwargs) % len(now) in axes
            elif func in NORMS_OF_SLICES:
                self.statistics |= mixes_slices(args, kwargs, axes)
            elif self._reordered_at is None and any(
                reorders(func, args, kwargs, axis, len(now)) for axis in axes
            ):
                self._reordered_at = len(self.recorded)
        inputs, uses_batch_wide = shapes((args, kwargs)), self._uses_batch_wide(args, kwargs)
        _, inputs_before, outs_before = self._log.calls[self._entry - 1]
        self.statistics = self.statistics or self._moves_samples(func, args, kwargs, inputs)
        out = self.elementary(func, args, kwargs)
        outs = shapes(out)
        self._follow_here(func, args, kwargs, out)
        if not reads_attribute(func):
            self._note_moves(func, args, kwargs, inputs_before)
        self._follow_batch(func, args, kwargs, out)
        if outs != outs_before:
            self.dtypes.update(x.dtype for x in tensors_of(out) if x.is_floating_point())
        if func in _ROWS_CHOSEN and inputs == inputs_before and outs != outs_before:
            self.reads = True  # `table[:len(x)]`, of a table made for so many samples
            if not self._made_here:  # an index or a mask may be another one in the next call
                self.statistics |= not all(map(differentiable, tensors_of(out)))
        if uses_batch_wide or (inputs != inputs_before and outs == outs_before):
            for x in tensors_of(out):
                if differentiable(x):
                    self.statistics = True
                else:
                    self._batch_wide_results[id(x)] = x
            self.statistics |= uses_batch_wide and func in _NUMBERS
        self.statistics |= any(
            sum(a != b for a, b in zip(now or (), then or (), strict=False)) > 1
            for now, then in zip(outs, outs_before, strict=False)
        )
        return out

    def _moves_samples(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: Sequence[Shape | None],
    ) -> bool:
        """Whether a call that is about to be made moves rows from sample to sample."""
        _, given, expected = self._log.calls[self._entry - 1]
        if reads_attribute(func) or "out" in kwargs or inputs == given or not any(expected):
            return False
        if isinstance(func, FunctionType) and func.__module__.startswith("ghostfunc."):
            return False  # ops of this package know whose rows are whose
        return moves_samples(func, (args, kwargs), given, expected, self._n_large, self._here)

    def release(self) -> None:
        """Let go of the tensors of a run that is over: what is made of the batch is most of them,
        and another run follows."""
        self._of_batch.clear()
        self._here.clear()
        self._batch_wide_results.clear()

    def _note_moves(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: Sequence[Shape | None],
    ) -> None:
        """Note the numbers and words among a call's arguments, in `by_values` where values decide
        where rows go, as an index into a tensor of samples does."""
        key = op_key(func), plain_arguments(args, kwargs)
        tensors, known = tensors_of((args, kwargs)), iter(s for s in before if s is not None)
        indices = [x for x in tensors if x.ndim and not differentiable(x)]
        grown = [x for x in tensors if x.shape != next(known, None)]  # a list may be longer
        moves = func in MAY_REORDER and any(
            reorders(func, args, kwargs, axis, x.ndim) for x in grown for axis in range(x.ndim)
        )
        if moves or any(i is not x for i in indices for x in grown):
            self.by_values[self._number] = key[1]
        else:
            self.order_keeping.add(key)

    def _follow_batch(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        values = tensors_of((args[1:] if func in ALIKE else args, kwargs))
        if any(id(x) in self._of_batch for x in values) or (
            self._written and not self._written.isdisjoint(_memory(values))
        ):
            if func in _READS:
                self.reads = True
                self.reads_at.add(self._number)
            self._of_batch.update((id(x), x) for x in tensors_of(out))
            if writes(func, kwargs) or kwargs.get("out") is not None:
                # Other tensors with this memory hold values of the batch from now on.
                self._written |= _memory(tensors_of((args[:1], kwargs.get("out"), out)))

    def _follow_here(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Note what is made of nothing but numbers: it is the same in every run."""
        values = tensors_of((args, kwargs))
        self._made_here = all(id(x) in self._here for x in values)
        if self._made_here:
            self._here.update((id(x), x) for x in tensors_of(out))
        elif writes(func, kwargs) and values:
            self._here.pop(id(values[0]), None)

    def _uses_batch_wide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an argument was made of all samples, as a verdict on the whole batch is."""
        return bool(self._batch_wide_results) and any(
            id(x) in self._batch_wide_results for x in tensors_of((args, kwargs))
        )

    def on_tracked(self, func: Callable[..., Any], call: CallArgs) -> Any:
        _, arg_shapes, out_shapes = self._log.calls[self._entry - 1]
        plain = self._called(func, call, "constant")
        if func in CONSTANTS or not torch.is_grad_enabled():
            out = call.run(func, call.consts())
            if any(s is not None for s in out_shapes):
                self.recorded.append(RecordedCall(plain, [], None, ()))
            return out
        if writes(func, call.kwargs()) and call.leaves[0].shape == arg_shapes[0]:
            self.recorded.append(RecordedCall(replace(plain, kind="derived"), [], None, ()))
            return self.derive(func, call)
        out = call.run(func, call.consts())
        outs = flatten(out)[0]
        if out is None and writes(func, call.kwargs()):
            outs, out_shapes = call.leaves[:1], arg_shapes[:1]
        if not any(s is not None for s in out_shapes):
            return out
        grew = [tuple(x.shape) != s for x, s in zip(outs, out_shapes, strict=True)]
        if not any(map(differentiable, outs)):
            self.recorded.append(RecordedCall(plain, [], None, ()))
            return out
        if not any(grew):
            if not has_derivative(func, call):
                self.recorded.append(RecordedCall(replace(plain, kind="opaque"), [], None, ()))
                return out
            derivation = replace(plain, kind="derived", pushes=has_second_derivative(func, call))
            self.recorded.append(RecordedCall(derivation, [], None, ()))
            return self.derive(func, call)
        self.recorded.append(self._use(func, call, out, arg_shapes, out_shapes))
        return out

    def _called(self, func: Callable[..., Any], call: CallArgs, kind: Kind) -> CallTrace:
        return CallTrace(func, tuple(call.hits), call.numbers(), torch.is_grad_enabled(), kind)

    def derive(self, func: Callable[..., Any], call: CallArgs, *, pushes: bool = True) -> Any:
        with Draws() as draws:
            out = super().derive(func, call, pushes=pushes)
        if draws.seen:
            raise RandomnessError(
                f"{op_name(func)} draws random numbers for parameter {call.tracked[0].name!r}: one "
                "draw for all samples, so the losses are not one function of the parameter for "
                "each of them. Draw outside model_fn and close over the numbers."
            )
        return out

    def _use(
        self,
        func: Callable[..., Any],
        call: CallArgs,
        out: Any,
        arg_shapes: list[Shape | None],
        out_shapes: list[Shape | None],
    ) -> RecordedCall:
        rule = rule_of(func)
        what = f"{op_name(func)} on parameter {', '.join(repr(t.name) for t in call.tracked)}"
        if rule is None or not isinstance(out, Tensor) or out_shapes[0] is None:
            reason = REASONS.get(func, "no ghost rule for this op")
            raise UnsupportedOpError(f"{what}: {reason}. {WAYS_OUT}")
        if isinstance(rule, FactorRule) and any(x.is_complex() for x in call.consts()):
            if not rule.multilinear:
                why = "no ghost rule for complex parameters"
                raise UnsupportedOpError(f"{what}: {why}. {WAYS_OUT}")
            rule = for_complex(rule)
        if isinstance(rule, FactorRule) and rule.check is not None:
            args, kwargs = call.rebuild(call.leaves)
            rule.check(*args, **kwargs)
        sizes = self._n_small, self._n_large
        # The first candidate is provisional: rules are tried with it for the shapes of factors,
        # which are the same in every fold. `settled` puts the right fold in.
        found = candidates(out_shapes[0], tuple(out.shape), *sizes, what)
        layouts = []
        for i, x in enumerate(call.leaves):
            shape = arg_shapes[i]
            if isinstance(x, Tensor) and shape is not None and tuple(x.shape) != shape:
                of_argument = candidates(shape, tuple(x.shape), *sizes, what)
                if found[0].fold == "none" and of_argument[0].fold != "none":
                    raise SampleAxisError(
                        f"{what}: argument {i} has shape {tuple(x.shape)} with several rows per "
                        f"sample, the output {tuple(out.shape)} with one. {WAYS_OUT}"
                    )
                layouts.append((i, of_argument[0]))
        names: tuple[ArgName, ...] = tuple(COPY for _ in call.tracked)
        if not isinstance(rule, BroadcastRule):
            names = self._try(rule, call, out, found[0], dict(layouts), what)
        trace = replace(
            self._called(func, call, "use"),
            rule=rule,
            names=names,
            layouts=tuple(layouts),
            out=found[0],
            ndim=out.ndim,
            dtype=out.dtype,
        )
        return RecordedCall(trace, call.tracked, out.detach(), found)

    def _try(
        self,
        rule: FactorRule,
        call: CallArgs,
        out: Tensor,
        layout: Layout,
        layouts: dict[int, Layout],
        what: str,
    ) -> tuple[ArgName, ...]:
        """The rule's names for the tracked arguments; raises unless it has factors for them."""
        slots = [object() for _ in call.leaves]  # one tensor may be two arguments
        try:
            named = rule.names(*call.rebuild(slots))
            names = tuple(named[id(slots[i])] for i in call.hits)
            args, kwargs = call.rebuild(call.stacked(layouts, self._n_large))
            b = layout.stack(out, self._n_large)  # the output stands in for its cotangent
            factors = rule.fn(b, *args, **kwargs)
            for name, tracked in zip(names, call.tracked, strict=True):
                if name not in factors:
                    raise UnsupportedOpError(f"{what}: its rule has no factor for {name!r}")
                factor = factors[name]()
                if wrong := misfit(factor, self._n_large):
                    raise UnsupportedOpError(f"{what}: {wrong}")
                shape, wanted = factor.shape, tracked.real_shape
                if math.prod(shape) != math.prod(wanted):
                    raise UnsupportedOpError(
                        f"{what}: its rule makes a factor of shape {shape} for shape {wanted}"
                    )
        except UnsupportedOpError as error:
            said = str(error)
            raise UnsupportedOpError(said if WAYS_OUT in said else f"{said}. {WAYS_OUT}") from None
        except GhostError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise UnsupportedAlwaysError(
                f"{what}: its rule cannot take this call ({type(error).__name__}: {error}). "
                + WAYS_OUT
            ) from error
        return names
