"""The mode that places taps at every use: wherever an op meets a parameter and samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.refusals import op_name
from ghostfunc._base.torch_private import SET_GRAD_ENABLED, in_transform, known
from ghostfunc._base.trees import tensors_of
from ghostfunc._rules.registry import COPY, ArgName, BroadcastRule
from ghostfunc._taps.known_way import KnownUse, Step, known_use, last, remember
from ghostfunc._taps.recut import Recut
from ghostfunc._taps.tap import ANCHOR, ReturningUse, Sinks, SinkUse, TwinOutput
from ghostfunc._taps.use import StaleOutputs, Use, UseOutput, output_of, split_tensors
from ghostfunc._trace.layout import Layout, StaleLayout
from ghostfunc._trace.trace import CallTrace, Trace, WayTaken, pattern
from ghostfunc._trace.tracked import CallArgs, ReaderKey, Tracked
from ghostfunc._trace.watch import (
    SIZED_BY_VALUES,
    TrackingMode,
    op_key,
    plain_arguments,
    reads_attribute,
    writes,
)


class TapMode(TrackingMode):
    """Runs a traced model with taps at every use.

    `taps` are the taps of the readers; `collect` maps the number of a use to its collecting tap.
    `note_outputs` fills `outputs`, for shapes and costs. With `sinks`, what uses read goes there.
    With `recut`, the run shows packed rows and the samples are documents. Where the `shapes` of the
    run are known, the way that it goes is remembered step by step.
    """

    def __init__(
        self,
        trace: Trace,
        leaves: Sequence[Tracked],
        n: int,
        taps: dict[ReaderKey, Tensor],
        collect: dict[int, Tensor],
        *,
        note_outputs: bool = False,
        sinks: Sinks | None = None,
        recut: Recut | None = None,
        shapes: Hashable = None,
    ) -> None:
        super().__init__(leaves)
        self._recut = recut
        self.sinks = sinks
        self._note_outputs = note_outputs
        self._trace = trace
        self._entry = 0  # the next call, while no step is followed
        self._same_ops = True  # all ops so far are the trace's, in its order
        self._as_traced = True  # and axes are folded as there
        self._all_seen = True  # all calls are the trace's, or keep rows in place
        self._n_calls = 0  # the next traced call
        self._way = 0
        self._shapes = shapes
        self._step: Step | None = None
        self._made: list[Step] | None = None
        if self._shapes is not None:
            self._step = trace.ways.get(self._shapes)
            self._made = None if self._step else []
        self._given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._n_samples = n
        # The size of sample axes in the program: in packed rows, documents share a row.
        self._n_rows = n if recut is None else recut.packing.rows
        self.taps = taps
        self.collect = collect
        self._tapping = True
        self.uses: list[Use] = []
        self.outputs: list[UseOutput] = []

    @property
    def _expected(self) -> CallTrace | None:
        """The next traced call."""
        calls = self._trace.calls
        return calls[self._n_calls] if self._n_calls < len(calls) else None

    def fork(
        self,
        primals: Mapping[int, Tensor] = MappingProxyType({}),
        taps: Mapping[ReaderKey, Tensor] = MappingProxyType({}),
        collect: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> TapMode:
        """Another mode in the state of this one, to watch the same part of the program again.

        Args:
            primals: by identity of tracked tensors, other primals for them.
            taps, collect: taps to use instead.
        """
        other = copy.copy(self)
        other._tracked = {
            key: (x, replace(t, primal=primals[key], running=None) if key in primals else t)
            for key, (x, t) in self._tracked.items()
        }
        other.taps, other.collect = {**self.taps, **taps}, {**self.collect, **collect}
        other.uses, other.outputs = list(self.uses), list(self.outputs)
        other._stale = dict(self._stale)
        other._made = None
        return other

    def forget(self, before: TapMode, kept: Iterable[object]) -> None:
        """Let go of what was made whole since `before`, apart from what is `kept`: the region that
        it was made in makes it anew."""
        held = {id(x) for x in kept}
        self._tracked = {
            key: (x, t)
            for key, (x, t) in self._tracked.items()
            if key in before._tracked or key in held or not t.made_whole
        }
        for use in self.uses[len(before.uses) :]:
            if not use.collected and any(target.made_whole for _, target in use.targets):
                use.targets = []

    @contextmanager
    def without_taps(self) -> Iterator[None]:
        """Only watch: what is computed stays constant."""
        self._tapping = False
        try:
            yield
        finally:
            self._tapping = True

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        step = self._step
        if step is not None and step.plain and func == step.func:
            values = (*args, *kwargs.values()) if kwargs else args
            if (
                tuple(map(type, values)) == step.kinds
                and self._tracked.keys().isdisjoint(map(id, values))
                and tuple(kwargs) == step.names
                and (not step.compared or step.again(values))
            ):
                try:
                    out = func(*args, **kwargs)
                except Exception as error:
                    self._raised(step, error)
                    raise
                self._step = step.next
                return out
        elif step is not None and step.use is not None and func == step.func:
            y = self._use_again(step, step.use, args, kwargs)
            if y is not None:
                return y
        if func.__name__ == "__get__" and reads_attribute(func) and not self.tracks(args[0]):
            return func(*args)
        return self.call(func, args, kwargs)

    def _use_again(
        self, step: Step, use: KnownUse, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The output of a use that is the one that comes next; None if it is another.

        A way is remembered only if its run was as traced from beginning to end. This run went the
        same way up to here, and `KnownUse.met` compares the arguments: plain ones, shapes, and
        which are tracked. So the checks of `on_tracked` and `_run_with_rule`, which depend on
        nothing else, would find what they found then. The hash of the next step has the shape
        that `meets` would add.
        """
        if tuple(kwargs) != use.names or self._stale or in_transform():
            return None
        if torch.is_grad_enabled() != use.call.grad_enabled:
            return None
        values = (*args, *kwargs.values()) if kwargs else args
        met = use.met(values, self._tracked)
        if met is None:
            return None
        try:
            y, tensors = use.run(values, met, self._operands(met))
        except Exception as error:
            self._raised(step, error)
            raise
        if y.shape != use.out:
            raise StaleLayout(f"{op_name(use.call.func)} returned another shape than before")
        number, self._n_calls, self._step = self._n_calls, self._n_calls + 1, step.next
        targets = list(zip(use.call.names, met, strict=True))
        how = {"known": use, "recut": self._recut, "call_number": number}
        return self._tapped(y, use.call, targets, tensors, use.call.out.axis, **how)

    def _raised(self, step: Step, error: Exception) -> None:
        """A known call has raised an error, which the program may catch."""
        self._entry, self._step = step.number + 1, None
        self._way = hash((step.way, step.number, type(error).__name__))

    def elementary(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is SET_GRAD_ENABLED:
            return func(*args)
        if reads_attribute(func):
            return super().elementary(func, args, kwargs)
        step, self._step = self._step, None
        if step is None:
            return self._run_and_note(func, args, kwargs)
        self._entry, self._way = step.number, step.way
        out = self._run_and_note(func, args, kwargs)
        after = step.next
        if self._as_traced and after is not None and after.way == self._way:
            self._step = after
        return out

    def _run_and_note(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make one call, and note what it adds to the way."""
        entry, funcs = self._entry, self._trace.funcs
        self._entry += 1
        self._same_ops = self._same_ops and entry < len(funcs) and funcs[entry] == op_key(func)
        self._as_traced = self._as_traced and self._same_ops
        expected = self._trace.patterns[entry] if self._as_traced and self._n_rows > 1 else None
        if self._made is not None:
            self._made.append(Step(func, entry, self._way))
            self._given = args, kwargs
            if entry not in self._trace.reads_at and not self._touched(args, kwargs):
                self._made[-1].learn(args, kwargs)
        try:
            out = super().elementary(func, args, kwargs)
        except Exception as error:
            self._made = None
            self._way = hash((self._way, entry, type(error).__name__))
            raise
        read = not self._as_traced or entry in self._trace.reads_at
        call = op_key(func), plain_arguments(args, kwargs)
        if not self._same_ops:
            self._all_seen = self._all_seen and call in self._trace.order_keeping
        elif entry in self._trace.by_values:
            self._all_seen = self._all_seen and call[1] == self._trace.by_values[entry]
        self._way = hash((self._way, entry, call))
        if read and not isinstance(out, Tensor):
            self._way = hash((self._way, seen_by_python(out)))
        if func in SIZED_BY_VALUES:
            sizes = [tuple(map(known, x.shape)) for x in tensors_of(out)]
            self._way = hash((self._way, *sizes))
        if expected is not None:
            inputs = [x.shape for x in tensors_of((args, kwargs))]
            self._as_traced = pattern(func, inputs, [out.shape]) == expected
        return out

    @property
    def way(self) -> WayTaken:
        """What tells this way through the program from others: its calls, their plain arguments,
        the values that Python read, and the shapes where parameters met samples."""
        if self._step is not None:
            return WayTaken(True, self._step.number, self._step.way)
        return WayTaken(self._all_seen, self._entry, self._way)

    def _check_layout(self, layout: Layout, x: Tensor) -> None:
        """The samples must lie where they lay in the trace. Where the shape would allow other
        places, the way to this call must have been that of the trace, op by op."""
        layout.check(x, self._n_rows)
        if not self._as_traced and layout.ambiguous(x, self._n_rows):
            raise StaleLayout(f"a tensor of shape {tuple(x.shape)} was come by in another way")

    def on_tracked(self, func: Callable[..., Any], call: CallArgs) -> Any:
        expected = self._expected
        if expected is None or op_key(func) != op_key(expected.func):
            return self._read_attribute(func, call)
        if (tuple(call.hits), call.numbers()) != (expected.hits, expected.numbers):
            raise StaleLayout(f"{op_name(func)} got other parameters")
        if torch.is_grad_enabled() != expected.grad_enabled:
            raise StaleLayout(f"{op_name(func)} was called with gradients switched on or off")
        self._n_calls += 1
        if expected.kind == "derived":
            return self.derive(func, call, pushes=expected.pushes)
        if expected.kind == "opaque":  # a gradient that gets here has nowhere to go, and raises
            return call.run(func, [t.shown for t in call.tracked])
        if expected.kind == "constant":
            return call.run(func, call.consts())
        if isinstance(expected.rule, BroadcastRule):
            return self._run_broadcast(func, call, expected)
        return self._run_with_rule(func, call, expected)

    def finish(self) -> None:
        """Raise `StaleLayout` unless every traced call was made."""
        if self._expected is not None:
            raise StaleLayout(f"{op_name(self._expected.func)} was not called")
        if self._made is not None and self._as_traced and self._all_seen:
            remember(self._trace.ways, self._shapes, [*self._made, last(self.way)])

    def _read_attribute(self, func: Callable[..., Any], call: CallArgs) -> Any:
        """Calls that return no tensor, such as reads of shapes, are not traced."""
        out = call.run(func, call.consts())
        if tensors_of(out) or writes(func, call.kwargs()):
            wanted = self._expected and op_name(self._expected.func)
            raise StaleLayout(f"{op_name(func)} was called where {wanted} was expected")
        return out

    def meets(self, shape: Sequence[int]) -> None:
        """Tell the way of a shape where parameters meet samples."""
        self._way = hash((self._way, tuple(map(known, shape))))

    def _site(
        self,
        y: Tensor,
        axis: int,
        call: CallTrace,
        targets: list[tuple[ArgName, Tracked]],
        args: list[Any],
        treedef: optree.PyTreeSpec,
    ) -> Tensor:
        self.meets(y.shape)
        tensors, rest = split_tensors(args)
        return self._tapped(
            y, call, targets, tensors, axis, rest=rest, treedef=treedef, recut=self._recut,
            call_number=self._n_calls - 1,
        )  # fmt: skip

    def _tapped(
        self,
        y: Tensor,
        call: CallTrace,
        targets: list[tuple[ArgName, Tracked]],
        tensors: list[Tensor],
        axis: int,
        **how: Any,
    ) -> Tensor:
        """The tapped tensor of a use, with its taps beside it; `how` tells what the use knows of
        its arguments."""
        number = len(self.uses)
        facts = call, self._n_samples, targets, tensors, axis, number
        use: SinkUse | ReturningUse
        if self.sinks is not None:
            use = SinkUse(*facts, **how, sinks=self.sinks)
            if self.sinks.collects(targets):
                use.collected = True
                use.blank = partial(torch.zeros, y.shape, dtype=y.dtype, device=y.device)
        else:
            tap = self.collect.get(number)
            if tap is not None and tap.shape != y.shape:
                raise StaleOutputs
            use = ReturningUse(*facts, **how, collect_tap=tap)
        self.uses.append(use)
        if self._note_outputs:
            self.outputs.append(output_of(use, y, use.axis, self._n_rows))
        if self._tapping:
            y = use.tapped(y, self.taps)
        if not use.collected:
            use.release()
        return y

    def tap_keys(self, uses: Iterable[Use]) -> list[ReaderKey]:
        """Which of the taps some uses have."""
        if self.sinks is not None:
            return [ANCHOR]
        targets = (target for use in uses for _, target in use.targets)
        return list(dict.fromkeys(key for target in targets for key in target.readers))

    def _run_with_rule(
        self, func: Callable[..., Any], call: CallArgs, expected: CallTrace
    ) -> Tensor:
        y = call.run(func, self._operands(call.tracked))
        if in_transform() and 0 in y.stride():
            y = y.contiguous()  # forward mode writes tangents into its like
        _check_axes(func, expected, y.ndim)
        self._check_layout(expected.out, y)
        for i, layout in expected.layouts:
            self._check_layout(layout, call.leaves[i])
        args = list(call.leaves)
        for i, tracked in zip(call.hits, call.tracked, strict=True):
            args[i] = tracked.const
        targets = list(zip(expected.names, call.tracked, strict=True))
        if self._made:
            use = self._made[-1].use = known_use(expected, call, *self._given)
            if use is not None:
                use.out = y.shape
        return self._site(y, expected.out.axis, expected, targets, args, call.treedef)

    def _run_broadcast(
        self, func: Callable[..., Any], call: CallArgs, expected: CallTrace
    ) -> Tensor:
        layout = expected.out
        _check_axes(func, expected, max(x.ndim for x in call.leaves if isinstance(x, Tensor)))
        if mixes_last_axes(func) and layout.axis >= expected.ndim - 2:
            return self._apart(func, call, expected)
        args = unfold_all(call, expected, self._n_rows)
        twice = self._runs_twice(func, call, args)
        operands = call.consts() if twice else self._operands(call.tracked)
        for i, tracked, operand in zip(call.hits, call.tracked, operands, strict=True):
            padded = layout.pad(operand, expected.ndim)
            shape = list(padded.shape)
            shape[layout.sample_axis] = self._n_rows
            if self._recut is not None:
                shape = self._recut.copies(self._n_calls - 1, layout, shape)
            copy = padded.expand(shape)
            if in_transform():
                copy = copy.contiguous()  # forward mode writes tangents into its like
            args[i] = self._site(
                copy, layout.sample_axis, expected, [(COPY, tracked)], [], call.treedef
            )
        call_args, kwargs = call.rebuild(args)
        out = layout.merge(func(*call_args, **kwargs))
        # A scalar does not take part in the promotion of dtypes, and its copies do.
        out = out if out.dtype == expected.dtype else out.to(expected.dtype)
        return _of_own_call(func, call, out) if twice else out

    def _runs_twice(self, func: Callable[..., Any], call: CallArgs, args: list[Any]) -> bool:
        """Whether the op runs on copies of parameters and once more on the primals, whose gradients
        autograd forms. In the first of the two calls the other arguments are constants."""
        own = self._tapping and any(t.formed_by_autograd for t in call.tracked)
        if not own or writes(func, call.kwargs()):
            return False
        for i, x in enumerate(args):
            args[i] = x.detach() if isinstance(x, Tensor) else x
        return True

    def _operands(self, tracked: Sequence[Tracked]) -> list[Tensor]:
        """What an op runs on: primals where autograd forms the training gradient, or constants."""
        return [t.primal if self._tapping and t.formed_by_autograd else t.const for t in tracked]

    def _apart(self, func: Callable[..., Any], call: CallArgs, expected: CallTrace) -> Tensor:
        """The op on every sample by itself, samples first."""
        if self._recut is not None:
            raise StaleLayout(f"{op_name(func)} mixes the positions of documents")
        layouts = dict(expected.layouts)
        for i in layouts:
            self._check_layout(layouts[i], call.leaves[i])
        args = call.stacked(layouts, self._n_rows)
        for i, x in enumerate(args):
            if i not in layouts and isinstance(x, Tensor):  # a mask may have fewer axes
                args[i] = x.reshape(self._n_rows, *[1] * (expected.ndim + 1 - x.ndim), *x.shape[1:])
        twice = self._runs_twice(func, call, args)
        for i, tracked in zip(call.hits, call.tracked, strict=True):
            copy = args[i].contiguous() if in_transform() else args[i]
            args[i] = self._site(copy, 0, expected, [(COPY, tracked)], [], call.treedef)
        call_args, kwargs = call.rebuild(args)
        out: Tensor = expected.out.unstack(func(*call_args, **kwargs))
        return _of_own_call(func, call, out) if twice else out


def _of_own_call(func: Callable[..., Any], call: CallArgs, twin: Tensor) -> Tensor:
    """What the program's own call returns. Its `twin`, which a call on tapped copies returned, gets
    the same cotangent."""
    out: Tensor = TwinOutput.apply(call.run(func, [t.primal for t in call.tracked]), twin)
    return out


def seen_by_python(x: Any) -> Hashable:
    """Values that left torch."""
    if isinstance(x, (list, tuple)):
        return tuple(map(seen_by_python, x))
    if isinstance(x, np.ndarray):
        return x.shape, x.tobytes()
    return x if isinstance(x, (bool, int, float, complex, str)) else None


def _check_axes(func: Callable[..., Any], expected: CallTrace, ndim: int) -> None:
    """Raise `StaleLayout` if the output of a call has another number of axes than in the trace."""
    if ndim != expected.ndim:
        raise StaleLayout(f"{op_name(func)} has {ndim} axes")


def mixes_last_axes(func: Callable[..., Any]) -> bool:
    """Whether an op broadcasts all axes but the last two, and mixes those."""
    return func is F.scaled_dot_product_attention


def unfold_all(call: CallArgs, expected: CallTrace, n: int) -> list[Any]:
    """The arguments, the folded sample axis as two axes in all of them."""
    args = list(call.leaves)
    layouts = dict(expected.layouts)
    from_right = expected.ndim - expected.out.axis
    for i, x in enumerate(args):
        if i in layouts:
            layouts[i].check(x, n)
            args[i] = layouts[i].split(x, n)
        elif expected.out.extra_axes and isinstance(x, Tensor) and x.ndim >= from_right:
            args[i] = x.unflatten(x.ndim - from_right, (*[1] * expected.out.extra_axes, -1))
    return args
