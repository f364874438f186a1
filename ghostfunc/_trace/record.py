"""The first two of the three runs that tracing makes (`make.py`). The second has more samples than
the first, one more as a rule, and is compared with it call by call: what grew holds samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from ghostfunc._base.torch_private import SET_GRAD_ENABLED
from ghostfunc._base.trees import flatten, tensors_of
from ghostfunc._base.types import PyTree
from ghostfunc._factors.factor import misfit
from ghostfunc._rules.complex_numbers import for_complex
from ghostfunc._rules.registry import COPY, REASONS, ArgName, BroadcastRule, FactorRule, rule_of
from ghostfunc._trace.beside_fewer import Fixed, Orders, PairedCall, Reads, Statistics, shapes
from ghostfunc._trace.derivatives import has_derivative, has_second_derivative
from ghostfunc._trace.layout import Layout
from ghostfunc._trace.sample_axis import candidates
from ghostfunc._trace.trace import CallTrace, Kind, RecordedCall, Shape
from ghostfunc._trace.tracked import CallArgs, Tracked, differentiable
from ghostfunc._trace.watch import (
    CONSTANTS,
    TrackingMode,
    decomposed,
    reads_attribute,
    writes,
)


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


class Recorder(TrackingMode):
    """Runs the larger of two batches, call by call compared with the log of the smaller one.

    Args:
        n_small, n_large: samples in the two batches; the larger one begins with the smaller one.
        large: the larger batch.

    Attributes:
        orders, reads, statistics: what the comparison shows (`beside_fewer.py`).
        dtypes: of the floating-point tensors that samples lie in.
        recorded: the calls on tracked tensors, in order, without those that return no tensor.
    """

    def __init__(
        self, leaves: Sequence[Tracked], log: ShapeLog, n_small: int, n_large: int, large: PyTree
    ) -> None:
        super().__init__(leaves)
        self._log = log
        self._n_small, self._n_large = n_small, n_large
        self._entry, self._number = -1, -1
        self._fixed = Fixed()
        self.orders, self.reads = Orders(), Reads(large)
        self.statistics = Statistics(n_large, self._fixed)
        self.dtypes: set[torch.dtype] = set()
        self.recorded: list[RecordedCall] = []

    @property
    def reorders(self) -> bool:
        """Whether samples meet parameters after they may have been reordered."""
        if self.orders.changed_at is None:
            return False
        return any(s.trace.kind == "use" for s in self.recorded[self.orders.changed_at :])

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = decomposed(self, func, args, kwargs)
        if out is not NotImplemented:
            return out
        if func is SET_GRAD_ENABLED:
            return func(*args)
        call = self._beside_fewer(func, args, kwargs)
        self.orders.before(call)
        self.statistics.before(call)
        out = self.elementary(func, args, kwargs)
        call.out_more = shapes(out)
        for question in (self._fixed, self.orders, self.reads, self.statistics):
            question.after(call, out)
        if call.out_more != call.out_fewer:
            self.dtypes.update(x.dtype for x in tensors_of(out) if x.is_floating_point())
        return out

    def _beside_fewer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> PairedCall:
        """The next call, with what the log has of it."""
        self._entry += 1
        self._number += not reads_attribute(func)
        if self._entry >= len(self._log.calls) or self._log.calls[self._entry][0] != func:
            raise ControlFlowError(
                f"model_fn calls other ops for {self._n_large} samples than for {self._n_small} "
                f"(at {op_name(func)}): its control flow depends on its data, or on how many "
                "samples there are, so it cannot be traced. " + WAYS_OUT
            )
        _, fewer, out_fewer = self._log.calls[self._entry]
        return PairedCall(func, args, kwargs, fewer, out_fewer, self._number, len(self.recorded))

    def release(self) -> None:
        """Let go of the tensors of a run that is over: what is made of the batch is most of them,
        and another run follows."""
        self.reads.release()
        self.statistics.release()
        self._fixed.tensors.clear()

    def on_tracked(self, func: Callable[..., Any], call: CallArgs) -> Any:
        _, arg_shapes, out_shapes = self._log.calls[self._entry]
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
