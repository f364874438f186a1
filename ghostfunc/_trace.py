"""Tracing: where parameters meet samples, and where the sample axis lies there.

Guessing the sample axis from one shape is how silent errors are made, so the model is run three
times on a few samples, without keeping anything (`_purity` has shown before that their losses do
not depend on each other):

1. on samples 0 and 1: the shapes of every torch call;
2. on samples 0, 1 and 0 again: an axis that grew holds samples, and a tensor computed from
   parameters whose shape did not change is derived;
3. the same, with a zero tap at every use, pulled back from one loss at a time: rows with a
   cotangent are that sample's, which tells sample-major from position-major folding and shows
   once more that samples do not talk. A cotangent that reaches a parameter past the taps is a use
   that was not seen.

What is learnt is kept by structure, not by length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils.checkpoint import CheckpointError

from ghostfunc._errors import (
    WAYS_OUT,
    ControlFlowError,
    CoupledSamplesError,
    GhostError,
    InPlaceError,
    RandomnessError,
    SampleAxisError,
    TransformError,
    UnsupportedOpError,
    UntrackedUseError,
)
from ghostfunc._factors import misfit
from ghostfunc._functorch import in_transform
from ghostfunc._layout import Fold, Layout
from ghostfunc._purity import (
    Refusals,
    check_losses,
    close,
    coupled_samples,
    lend,
    prove_independent,
    refuse_checkpoints,
)
from ghostfunc._rules import BroadcastRule, FactorRule, Rule, lookup
from ghostfunc._rules._registry import REASONS, ArgName, op_name
from ghostfunc._rules.routed import MAY_REORDER, SCANS, reorders, sorted_dim
from ghostfunc._tracking import (
    CONSTANTS,
    CallArgs,
    Tracked,
    TrackingMode,
    constants,
    decomposed,
    differentiable,
    gradients,
    reads_attribute,
    traced_as,
    writes,
)
from ghostfunc._tree import ParamSpec, batch_size, flatten, take, tensors_of
from ghostfunc._types import ModelFn, PyTree, Randomness

Kind = Literal["use", "derived", "constant"]
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CallTrace:
    """One torch call on tracked tensors.

    Attributes:
        func: the op; `hits`: which of its flattened arguments are tracked.
        numbers: which tracked tensors they are; `grad_enabled`: whether gradients were taken.
        kind: "use" where samples are met, "derived" where not yet, "constant" where autograd
            sees no dependence.
        rule, names: for uses, the op's rule and its names for the tracked arguments.
        layouts: where samples lie in the flattened arguments that carry them.
        out, ndim, dtype: where samples lie in the output, its number of axes, and its dtype.
    """

    func: Callable[..., Any]
    hits: tuple[int, ...]
    numbers: tuple[int, ...]
    grad_enabled: bool
    kind: Kind
    rule: Rule | None = None
    names: tuple[ArgName, ...] = ()
    layouts: tuple[tuple[int, Layout], ...] = ()
    out: Layout = field(default=Layout(0))
    ndim: int = 0
    dtype: torch.dtype = torch.float32


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
            be.
    """

    funcs: tuple[Callable[..., Any], ...]
    calls: tuple[CallTrace, ...]
    uses: tuple[int, ...]
    patterns: tuple[Pattern | None, ...]
    reorders: bool
    statistics: bool


SWITCH: Any = torch._C._set_grad_enabled
"""Comes up wherever an error passes by; what it does is looked at where parameters are used."""

Pattern: TypeAlias = tuple[Any, ...]

_FOLDS: set[Callable[..., Any]] = {
    torch.reshape, Tensor.reshape, Tensor.view, torch.flatten, Tensor.flatten, torch.unflatten,
    Tensor.unflatten, Tensor.repeat, torch.tile, Tensor.tile, torch.cat, torch.concat,
    torch.concatenate, torch.stack, torch.vstack, torch.hstack,
}  # fmt: skip


_NUMBERS: set[Callable[..., Any]] = {
    Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.tolist,
}  # fmt: skip


def pattern(
    func: Callable[..., Any], inputs: Sequence[Shape | None], outs: Sequence[Shape | None]
) -> Pattern | None:
    """What tells two folds apart, however long their axes are; of the first argument."""
    if func not in _FOLDS:
        return None
    shapes = [x for x in inputs if x is not None][:2]
    return (
        *(tuple(2 if size > 1 else int(size) for size in x) for x in shapes),
        shapes[0] == outs[0],
    )


# --- recording --------------------------------------------------------------------------------


class _ShapeLog(Refusals):
    """Notes the shapes of every torch call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], list[Shape | None], list[Shape | None]]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        whole = decomposed(self, func, args, kwargs or {})
        if whole is not NotImplemented:
            return whole
        if func is SWITCH:
            return func(*args)
        entry = len(self.calls)
        inputs = shapes((args, kwargs or {}))
        self.calls.append((func, inputs, []))
        out = super().__torch_function__(func, types, args, kwargs)
        self.calls[entry] = (func, inputs, shapes(out))
        return out


def _rng_state(x: Tensor) -> Tensor:
    """The state of the generator that random numbers like `x` come from."""
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def shapes(tree: object) -> list[Shape | None]:
    return [tuple(x.shape) if isinstance(x, Tensor) else None for x in flatten(tree)[0]]


@dataclass
class _Seen:
    """A call on tracked tensors, with what is needed to classify it."""

    trace: CallTrace
    tracked: list[Tracked]
    y: Tensor | None
    folds: tuple[Fold, ...]


class _Recorder(TrackingMode):
    """Runs the grown batch beside the log of the smaller one."""

    def __init__(self, leaves: Sequence[Tracked], log: _ShapeLog, k: int, grown: int) -> None:
        super().__init__(leaves)
        self._log = log
        self._k, self._grown = k, grown
        self._entry = 0
        self._reordered_at: int | None = None
        self.statistics = False
        self._verdicts: dict[int, Tensor] = {}  # on all samples: for control flow, mostly
        self.seen: list[_Seen] = []

    @property
    def reorders(self) -> bool:
        """Whether samples meet parameters after they may have been reordered."""
        if self._reordered_at is None:
            return False
        return any(s.trace.kind == "use" for s in self.seen[self._reordered_at :])

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = decomposed(self, func, args, kwargs)
        if out is not NotImplemented:
            return out
        if func is SWITCH:
            return func(*args)
        self._entry += 1
        if self._entry > len(self._log.calls) or self._log.calls[self._entry - 1][0] != func:
            raise ControlFlowError(
                f"model_fn calls other ops for {self._grown} samples than for {self._k} (at "
                f"{op_name(func)}): its control flow depends on its data, so it cannot be traced. "
                + WAYS_OUT
            )
        if func is torch.randperm and self._reordered_at is None:
            self._reordered_at = len(self.seen)
        if func in MAY_REORDER or func in SCANS:
            before, now = self._log.calls[self._entry - 1][1][0], args[0].shape
            axes = [i for i, (a, b) in enumerate(zip(before or (), now, strict=False)) if a != b]
            if func in SCANS:
                self.statistics |= sorted_dim(func, args, kwargs) % args[0].ndim in axes
            elif self._reordered_at is None and any(
                reorders(func, args, kwargs, axis) for axis in axes
            ):
                self._reordered_at = len(self.seen)
        inputs, judged = shapes((args, kwargs)), self._verdicts_among(args, kwargs)
        out = self.elementary(func, args, kwargs)
        _, inputs_before, outs_before = self._log.calls[self._entry - 1]
        outs = shapes(out)
        if judged or (inputs != inputs_before and outs == outs_before):
            for x in tensors_of(out):
                if differentiable(x):
                    self.statistics = True
                else:
                    self._verdicts[id(x)] = x
            self.statistics |= judged and func in _NUMBERS
        self.statistics |= any(
            sum(a != b for a, b in zip(now or (), then or (), strict=False)) > 1
            for now, then in zip(outs, outs_before, strict=False)
        )
        return out

    def _verdicts_among(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return bool(self._verdicts) and any(
            id(x) in self._verdicts for x in tensors_of((args, kwargs))
        )

    def on_tracked(self, func: Callable[..., Any], call: CallArgs) -> Any:
        _, arg_shapes, out_shapes = self._log.calls[self._entry - 1]
        plain = self._called(func, call, "constant")
        if func in CONSTANTS or not torch.is_grad_enabled():
            out = call.run(func, call.consts())
            if any(s is not None for s in out_shapes):
                self.seen.append(_Seen(plain, [], None, ()))
            return out
        if writes(func, call.kwargs()) and call.leaves[0].shape == arg_shapes[0]:
            self.seen.append(_Seen(replace(plain, kind="derived"), [], None, ()))
            return self.derive(func, call)
        out = call.run(func, call.consts())
        outs = flatten(out)[0]
        if out is None and writes(func, call.kwargs()):
            outs, out_shapes = call.leaves[:1], arg_shapes[:1]
        if not any(s is not None for s in out_shapes):
            return out
        grew = [tuple(x.shape) != s for x, s in zip(outs, out_shapes, strict=True)]
        if not any(map(differentiable, outs)):
            self.seen.append(_Seen(plain, [], None, ()))
            return out
        if not any(grew):
            self.seen.append(_Seen(replace(plain, kind="derived"), [], None, ()))
            return self.derive(func, call)
        self.seen.append(self._use(func, call, out, arg_shapes, out_shapes))
        return out

    def _called(self, func: Callable[..., Any], call: CallArgs, kind: Kind) -> CallTrace:
        return CallTrace(func, tuple(call.hits), call.numbers(), torch.is_grad_enabled(), kind)

    def derive(self, func: Callable[..., Any], call: CallArgs) -> Any:
        x = call.tracked[0].const
        before = _rng_state(x)
        out = super().derive(func, call)
        if not torch.equal(before, _rng_state(x)):
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
    ) -> _Seen:
        rule = lookup(func)
        what = f"{op_name(func)} on parameter {', '.join(repr(t.name) for t in call.tracked)}"
        if rule is None or not isinstance(out, Tensor) or out_shapes[0] is None:
            reason = REASONS.get(func, "no ghost rule for this op")
            raise UnsupportedOpError(f"{what}: {reason}. {WAYS_OUT}")
        if any(x.is_complex() for x in call.consts()) and not isinstance(rule, BroadcastRule):
            raise UnsupportedOpError(f"{what}: no ghost rule for complex parameters. {WAYS_OUT}")
        if isinstance(rule, FactorRule) and rule.check is not None:
            args, kwargs = call.rebuild(call.leaves)
            rule.check(*args, **kwargs)
        axis, folds = self._axis(out_shapes[0], tuple(out.shape), what)
        layouts = []
        for i, x in enumerate(call.leaves):
            shape = arg_shapes[i]
            if isinstance(x, Tensor) and shape is not None and tuple(x.shape) != shape:
                arg_axis, arg_folds = self._axis(shape, tuple(x.shape), what)
                if len(arg_folds) > len(folds):
                    raise SampleAxisError(
                        f"{what}: argument {i} has shape {tuple(x.shape)} with several rows per "
                        f"sample, the output {tuple(out.shape)} with one. {WAYS_OUT}"
                    )
                layouts.append(
                    (i, Layout(arg_axis, "none" if arg_folds == ("none",) else folds[0]))
                )
        layout = Layout(axis, folds[0])
        names: tuple[ArgName, ...] = tuple("" for _ in call.tracked)
        if not isinstance(rule, BroadcastRule):
            names = self._try(rule, call, out, layout, dict(layouts), what)
        trace = replace(
            self._called(func, call, "use"),
            rule=rule,
            names=names,
            layouts=tuple(layouts),
            out=Layout(axis),
            ndim=out.ndim,
            dtype=out.dtype,
        )
        return _Seen(trace, call.tracked, out, folds)

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
            args, kwargs = call.rebuild(call.stacked(layouts, self._grown))
            factors = rule.fn(layout.stack(out, self._grown), *args, **kwargs)
            for name, tracked in zip(names, call.tracked, strict=True):
                if name not in factors:
                    raise UnsupportedOpError(f"{what}: its rule has no factor for {name!r}")
                factor = factors[name]()
                if wrong := misfit(factor, self._grown):
                    raise UnsupportedOpError(f"{what}: {wrong}")
                shape, wanted = factor.shape, tuple(tracked.const.shape)
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
            raise UnsupportedOpError(
                f"{what}: its rule cannot take this call ({type(error).__name__}: {error}). "
                + WAYS_OUT
            ) from error
        return names

    def _axis(self, small: Shape, grown: Shape, what: str) -> tuple[int, tuple[Fold, ...]]:
        """The axis that grew, and how samples may be folded on it."""
        if len(small) != len(grown):
            raise SampleAxisError(f"{what}: shape {small} became {grown} with one more sample.")
        axes = [i for i, (a, b) in enumerate(zip(small, grown, strict=True)) if a != b]
        if len(axes) != 1:
            raise SampleAxisError(
                f"{what}: with one more sample, shape {small} became {grown}. Samples must lie on "
                "exactly one axis: in a table of sample pairs, compute each sample's own entries "
                f"alone. {WAYS_OUT}"
            )
        (axis,) = axes
        k, positions = self._k, small[axis] // self._k
        if small[axis] % k or grown[axis] != self._grown * positions:
            raise SampleAxisError(
                f"{what}: axis {axis} has {small[axis]} rows for {k} samples and {grown[axis]} for "
                f"{self._grown}: not the same number for every sample. For transformers' experts, "
                'model.set_experts_implementation("batched_mm") keeps a sample\'s rows together. '
                + WAYS_OUT
            )
        return axis, ("none",) if positions == 1 else ("sample-major", "position-major")


class _Probe(torch.autograd.Function):
    """The identity on `y`, whose cotangent is also that of `tap`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, tap: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, b


class _TopLevelProbe(torch.autograd.Function):
    """`_Probe` outside transforms."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tap: Tensor) -> Tensor:
        return y.detach()  # a view may not be written to

    backward = staticmethod(_Probe.backward)


class _Prober(TrackingMode):
    """Runs the recorded calls on constants, with a probe on every use."""

    def __init__(
        self, leaves: Sequence[Tracked], seen: Sequence[_Seen], taps: Sequence[Tensor]
    ) -> None:
        super().__init__(leaves)
        self._seen = iter(seen)
        self._taps = iter(taps)
        self._expected = next(self._seen, None)

    def on_tracked(self, func: Callable[..., Any], call: CallArgs) -> Any:
        expected = self._expected
        if expected is None or (func, tuple(call.hits)) != (
            expected.trace.func,
            expected.trace.hits,
        ):
            out = call.run(func, call.consts())
            if isinstance(func, HigherOrderOperator):
                raise unseen_use(sorted({name for t in call.tracked for name in t.leaf_names()}))
            if tensors_of(out):
                raise ControlFlowError(
                    f"model_fn calls other ops when it is run again (at {op_name(func)}): its "
                    f"control flow depends on something besides its arguments. {WAYS_OUT}"
                )
            return out
        self._expected = next(self._seen, None)
        if expected.trace.kind == "derived":
            return self.derive(func, call)
        out = call.run(func, call.consts())
        if expected.trace.kind != "use":
            return out
        probe = _Probe if in_transform() else _TopLevelProbe
        return probe.apply(out, next(self._taps))


# --- the trace --------------------------------------------------------------------------------


def pairs_to_trace(
    model_fn: ModelFn, leaves: Sequence[Tensor], spec: ParamSpec, batch: PyTree
) -> Iterator[tuple[int, int]]:
    """Samples that may stand for the batch: the first two, and if those go another way through the
    program (none of them is padded, say), the first pair that goes the same. Two even of one: code
    may treat a batch of one in its own way."""
    n = batch_size(batch)
    yield 0, min(1, n - 1)

    def way(data: PyTree) -> list[Callable[..., Any]]:
        log = _ShapeLog()
        with log, torch.enable_grad():
            model_fn(spec.unflatten(lend(leaves)), data)
        return [func for func, _, _ in log.calls]

    whole = way(batch)
    for i in range(2, n):
        if way(take(batch, [0, i])) == whole:
            yield 0, i
            return


@torch.enable_grad()
def trace_model(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    randomness: Randomness,
    pair: tuple[int, int],
) -> Trace:
    """Trace `model_fn` on two samples of the batch."""
    prove_independent(model_fn, leaves, spec, batch, randomness)
    chosen = list(pair)
    small, grown = take(batch, chosen), take(batch, [*chosen, chosen[0]])
    k = len(chosen)

    log = _ShapeLog()
    params = spec.unflatten(lend(leaves))
    with log:
        plain = model_fn(params, small)
    plain = check_losses(plain, k).detach()
    tracked = constants(leaves, spec)
    recorder = _Recorder(tracked, log, k, k + 1)
    with recorder:
        losses = model_fn(spec.unflatten([t.shown for t in tracked]), grown)
    losses = check_losses(losses, k + 1)
    if randomness == "error" and not close(losses[:k], plain):
        raise InPlaceError(
            f"Losses are {plain.tolist()} in a plain run and {losses[:k].tolist()} in a traced "
            "one: model_fn writes in place to tensors that are views of others, or depends on "
            f"something besides its arguments. {WAYS_OUT}"
        )

    uses = [s for s in recorder.seen if s.trace.kind == "use"]
    cotangents = _probe(model_fn, leaves, spec, grown, recorder.seen, uses)
    calls = iter(
        _settle_layout(s, b, k + 1, randomness)
        for s, b in zip(uses, zip(*cotangents, strict=True), strict=True)
    )
    counts = [0] * len(leaves)
    for use in uses:
        for leaf in (leaf for tracked in use.tracked for leaf in tracked.leaves()):
            counts[leaf] += 1
    trace = Trace(
        tuple(traced_as(func) for func, _, _ in log.calls if not reads_attribute(func)),
        tuple(next(calls) if s.trace.kind == "use" else s.trace for s in recorder.seen),
        tuple(counts),
        tuple(pattern(*entry) for entry in log.calls if not reads_attribute(entry[0])),
        recorder.reorders,
        recorder.statistics,
    )
    return trace


def _probe(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    grown: PyTree,
    seen: Sequence[_Seen],
    uses: Sequence[_Seen],
) -> list[list[Tensor]]:
    """Cotangents of every use's output, for every sample's loss in turn."""
    taps = [_zero(s.y) for s in uses]

    def run(taps: list[Tensor], primals: list[Tensor]) -> Tensor:
        tracked = constants(leaves, spec)
        for leaf, primal in zip(tracked, primals, strict=True):
            leaf.grad = leaf.shown = primal
        with _Prober(tracked, seen, taps):
            return model_fn(spec.unflatten(primals), grown)

    if in_transform():
        losses, pullback = torch.func.vjp(run, taps, lend(leaves))[:2]
        pulled = [pullback(c, create_graph=False) for c in _each(losses)]
    else:  # plain autograd also runs functions that transforms do not
        inputs = [x.detach().requires_grad_() for x in (*taps, *leaves)]
        losses = run(inputs[: len(taps)], inputs[len(taps) :])
        refuse_checkpoints(losses)
        try:
            flats = [gradients(losses, inputs, c, again=True) for c in _each(losses)]
        except CheckpointError as error:
            raise TransformError(
                "model_fn calls torch.utils.checkpoint, which runs parts of it again where nobody "
                "sees it. Use gf.remat instead (gf.hf.enable_remat(model) in transformers), or "
                'mode="materialized" with vectorize=False.'
            ) from error
        # A path that is there counts as a use, even if its gradient happens to vanish.
        for name, g in zip(spec.names, flats[0][len(taps) :], strict=True):
            if g is not None:
                raise unseen_use([name])
        return [
            [torch.zeros_like(x) if g is None else g for x, g in zip(taps, flat, strict=False)]
            for flat in flats
        ]
    for _, unseen in pulled:
        for name, g in zip(spec.names, unseen, strict=True):
            if bool((g != 0).any()):
                raise unseen_use([name])
    return [cotangents for cotangents, _ in pulled]


def unseen_use(names: Sequence[str]) -> UntrackedUseError:
    listed = ", ".join(map(repr, names))
    return UntrackedUseError(
        f"The losses depend on parameter {listed} on a path ghostfunc does not see: a custom "
        f"autograd.Function, a write into a buffer, or code outside torch functions. {WAYS_OUT}"
    )


def _each(losses: Tensor) -> Tensor:
    """The cotangents that ask for one loss each."""
    return torch.eye(len(losses), dtype=losses.dtype, device=losses.device)


def _zero(y: Tensor | None) -> Tensor:
    assert y is not None
    return y.new_zeros(()).expand(y.shape)


def _settle_layout(
    seen: _Seen, cotangents: Sequence[Tensor], n: int, randomness: Randomness
) -> CallTrace:
    """Choose the folding that both the cotangents and the values of the output allow."""
    trace, y = seen.trace, seen.y
    assert y is not None
    owned = [
        f
        for f in seen.folds
        if all(_only(i, Layout(trace.out.axis, f).front(b, n)) for i, b in enumerate(cotangents))
    ]
    what = f"{op_name(trace.func)} on {', '.join(repr(t.name) for t in seen.tracked)}"
    if not owned:
        said = coupled_samples(f"at {what}, a sample's loss has a gradient at other samples' rows")
        raise CoupledSamplesError(
            f"{said} If those rows are its own, in an order that model_fn makes (it sorts samples "
            "by length, say), keep the samples in their order where parameters meet them. "
            + WAYS_OUT
        )
    if len(owned) > 1 and randomness == "error":
        owned = [f for f in owned if _copy_equal(Layout(trace.out.axis, f).front(y, n))] or owned
    if len(owned) > 1:
        raise SampleAxisError(
            f"At {what}, samples and positions share an axis, and neither values nor gradients "
            "tell which rows belong to which sample (are all values equal?). Call it once with a "
            "batch of ordinary values."
        )
    (fold,) = owned
    layouts = tuple(
        (i, lay if lay.fold == "none" else replace(lay, fold=fold)) for i, lay in trace.layouts
    )
    return replace(trace, out=Layout(trace.out.axis, fold), layouts=layouts)


def _only(i: int, b: Tensor) -> bool:
    """Whether only sample i has a cotangent; NaN is what zero times infinity is."""
    others = torch.cat([b[:i], b[i + 1 :]])
    return not bool(((others != 0) & ~others.isnan()).any())


def _copy_equal(y: Tensor) -> bool:
    return torch.allclose(y[-1], y[0], rtol=1e-3, atol=1e-5)
