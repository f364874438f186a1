"""Taps: zero inputs whose cotangents are quantities.

A *tap* is a zero input that leaves an op's output as it is; its cotangent is a quantity. The mode
below places one beside every op where a parameter meets samples. The op itself runs on a constant
copy of the parameter, so autograd computes only the cotangent of its input; the training gradient,
where it is wanted, is one more thing read off the factor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import optree
import torch
from torch import Tensor

from ghostfunc import _bundles, _factors
from ghostfunc._factors import Dense, Factor, OneHot, Outer
from ghostfunc._functorch import in_transform
from ghostfunc._layout import Layout, StaleLayout
from ghostfunc._quantities import BesideReader, DotReader, PositionsReader, Reader
from ghostfunc._rules import BroadcastRule
from ghostfunc._rules._registry import ArgName, ByPosition, op_name, rows
from ghostfunc._several import dots_and_total
from ghostfunc._trace import SWITCH, CallTrace, Trace, pattern
from ghostfunc._tracked import CallArgs, ReaderKey, Tracked, real, shaped
from ghostfunc._tracking import TrackingMode, reads_attribute, traced_as, writes
from ghostfunc._tree import flatten, tensors_of, unflatten


class _Tap(torch.autograd.Function):
    """The identity on `y`; its backward hands `y`'s cotangent to the use's readers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, use: Use, *tensors: Tensor) -> Tensor:
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, use, *tensors = inputs
        ctx.use = use
        ctx.save_for_backward(*tensors[use.n_taps :])

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return (b, None, *ctx.use.read(b, saved), *(None for _ in saved))

    @staticmethod
    def jvp(ctx: Any, y_t: Tensor, *rest: object) -> Tensor:
        return y_t


class _TopLevelTap(torch.autograd.Function):
    """`_Tap` outside transforms, where the separate `setup_context` would only cost time."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, use: Use, *tensors: Tensor) -> Tensor:
        _Tap.setup_context(ctx, (y, use, *tensors), y)
        return y.detach()  # y itself would count as a view, which in-place ops may not touch

    backward = staticmethod(_Tap.backward)


@dataclass(eq=False)
class Use:
    """One place where parameters meet samples, in one run of the model.

    Attributes:
        call: what the trace knows of it.
        n: samples in this run.
        targets: the tracked tensors that meet samples here, with the rule's names for them.
        args, treedef: the call's arguments, flattened, every tensor as `[n, ...]`.
        collect_tap: hands out the output's cotangent too, for factors that outlive the run.
    """

    call: CallTrace
    n: int
    targets: list[tuple[ArgName, Tracked]]
    args: list[Any]
    treedef: optree.PyTreeSpec
    collect_tap: Tensor | None = None

    def __post_init__(self) -> None:
        self.arg_tensors, self._rest = _split_tensors(self.args)
        readers = [[r for r, _ in target.readers.values()] for _, target in self.targets]
        reader_leaves, self._reader_spec = flatten(readers)
        self._reader_tensors, self._reader_rest = _split_tensors(reader_leaves)
        self.n_taps = 0
        self.n_args = len(self.arg_tensors)

    def release(self) -> None:
        """Let go of the arguments: what the backward pass needs of them, autograd has saved."""
        self.args, self.arg_tensors = [], []

    def tap(self, y: Tensor, taps: dict[ReaderKey, Tensor]) -> Tensor:
        """`y` with the taps of all targets beside it."""
        inputs: list[Tensor] = []
        for _, target in self.targets:
            inputs += [taps[key] for key in target.readers]
            if target.wants_grad:
                inputs.append(target.grad)
        if self.collect_tap is not None:
            inputs.append(self.collect_tap)
        self.n_taps = len(inputs)
        if not inputs:
            return y
        function = _Tap if in_transform() else _TopLevelTap
        return function.apply(y, self, *inputs, *self.arg_tensors, *self._reader_tensors)

    def read(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
        """The cotangents of all tap inputs, in the order of `tap`."""
        n_args = self.n_args
        readers = unflatten(self._reader_spec, _merge_tensors(self._reader_rest, saved[n_args:]))
        out: list[Tensor | None] = []
        for (name, target), own in zip(self.targets, readers, strict=True):
            if own or target.wants_grad:
                by_position = any(isinstance(r, PositionsReader) for r in own)
                factor = self.factor(name, target, b, saved[:n_args], by_position=by_position)
                out += _read_all(factor, target, own)
        if self.collect_tap is not None:
            out.append(b)
        return out

    def factor(
        self,
        name: ArgName,
        target: Tracked,
        b: Tensor,
        args: Sequence[Tensor],
        *,
        by_position: bool = False,
    ) -> Factor:
        """The factor of one target, given the output's cotangent; `by_position`, no rule may form
        the gradient because that is smaller."""
        layout = self.call.out
        if isinstance(self.call.rule, BroadcastRule):
            g = b.movedim(layout.sample_axis, 0)
            return Dense(real(g.reshape(self.n, *target.const.shape)))
        call_args, kwargs = unflatten(self.treedef, _merge_tensors(self._rest, args))
        assert self.call.rule is not None  # tracing saw to it
        factors = self.call.rule.fn(layout.stack(b, self.n), *call_args, **kwargs)
        make = factors[name]
        if by_position and isinstance(make, ByPosition):
            make = make.outer
        return fitted(make(), target)


def fitted(factor: Factor, target: Tracked) -> Factor:
    """The factor in a shape that fits the target: exactly its own if it is dense or the target is a
    matrix, which may be transposed; otherwise one with the same elements in the same order. All
    positions of a sample are on one axis."""
    shape = tuple(target.const.shape)
    match factor:
        case Outer(left, right) if left.ndim != 3:
            factor = Outer(rows(left), rows(right))
        case OneHot(ids, b, n_rows) if ids.ndim != 2:
            factor = OneHot(ids.reshape(len(ids), -1), rows(b), n_rows)
    if factor.shape == shape or (not isinstance(factor, Dense) and len(shape) != 2):
        return factor
    g = _factors.materialize(factor)
    return Dense(g.reshape(len(g), *shape))


def _read_all(factor: Factor, target: Tracked, readers: Sequence[Reader]) -> list[Tensor | None]:
    """What every reader of a target reads, and last the cotangent of its training gradient's input
    if there is one: None if the gradient was added to a running total."""
    if any(isinstance(r, BesideReader) for r in readers):  # then all are
        factor, readers = _beside(factor, target, readers)
    pulled: dict[int, Factor] | None = None
    out: list[Tensor | None] = []
    directions = [r for r in readers if isinstance(r, DotReader)]
    us = [r.u.reshape(factor.shape) for r in directions]
    contract_dtype = directions[0].contract_dtype if us else None  # one call has one
    grad: Tensor | None = None
    if target.running is not None:
        dots = target.running.add(factor, us, contract_dtype)
    else:
        dots, grad = dots_and_total(
            factor, us, with_total=target.wants_grad, contract_dtype=contract_dtype
        )
    read = iter(dots)
    for (key, (_, must_pull)), reader in zip(target.readers.items(), readers, strict=True):
        if isinstance(reader, DotReader):
            out.append(next(read))
        elif must_pull:
            pulled = pulled or leaf_factors(target, factor)
            out.append(reader.read(pulled[key[1]]))
        else:
            out.append(reader.read(factor))
    if target.wants_grad:
        out.append(None if grad is None else shaped(grad, target.const))
    return out


def _beside(factor: Factor, target: Tracked, readers: Sequence[Any]) -> tuple[Factor, list[Reader]]:
    """The factor of the first samples, and what reads it, made of the others."""

    def at_parameter(i: int, total: Tensor) -> Tensor:
        (g,) = _factors.materialize(leaf_factors(target, Dense(total[None]))[i])
        return g

    found: list[Reader] = []
    for (_, i), reader in zip(target.readers, readers, strict=True):
        pull = partial(at_parameter, i)
        found.append(reader.opposite([factor], grads=target.wants_grad, pull=pull))
    return _bundles.take(factor, slice(readers[0].n)), found


def leaf_factors(target: Tracked, factor: Factor) -> dict[int, Factor]:
    """One factor per parameter that `target` derives from."""
    out: dict[int, Factor] = {}
    for leaf, at_leaf in target.at_leaves(factor):
        if leaf in out:
            at_leaf = Dense(_factors.materialize(out[leaf]) + _factors.materialize(at_leaf))
        out[leaf] = at_leaf
    return out


def _split_tensors(leaves: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """Tensors among `leaves`, and the rest with holes where the tensors were."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return tensors, [_HOLE if isinstance(x, Tensor) else x for x in leaves]


def _merge_tensors(rest: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    it = iter(tensors)
    return [next(it) if x is _HOLE else x for x in rest]


class _Hole:
    """Stands where a tensor was."""


_HOLE = _Hole()


@dataclass(frozen=True)
class Site:
    """A use as a run on `n` samples saw it.

    Attributes:
        shape, axis, dtype, device: its output, and where the samples lie in it.
        targets: `(parameter, type of factor, shape of factor, positions, direct)`.
    """

    n: int
    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    device: torch.device
    targets: tuple[tuple[int, str, tuple[int, ...], int, bool], ...]

    def tap(self, n: int) -> Tensor:
        shape = list(self.shape)
        shape[self.axis] = shape[self.axis] // self.n * n
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)


class StaleSites(Exception):
    """Some outputs have other shapes than the remembered ones. Never leaves the package."""


def _site_of(use: Use, y: Tensor, axis: int) -> Site:
    targets = []
    for name, target in use.targets:
        factor = use.factor(name, target, y, use.arg_tensors)  # y stands in for its cotangent
        met = _bundles.meeting(factor)
        seen = met.kind, met.shape, met.positions, target.direct(factor)
        targets += [(leaf, *seen) for leaf in target.leaves()]
    return Site(use.n, tuple(y.shape), axis, y.dtype, y.device, tuple(targets))


class TapMode(TrackingMode):
    """Runs a traced model with a tap at every use.

    `taps` are the taps of the readers; `collect` maps the number of a use to its collecting tap.
    `note_sites` fills `sites`, for shapes and costs.
    """

    def __init__(
        self,
        trace: Trace,
        leaves: Sequence[Tracked],
        n: int,
        taps: dict[ReaderKey, Tensor],
        collect: dict[int, Tensor],
        *,
        note_sites: bool = False,
    ) -> None:
        super().__init__(leaves)
        self._note_sites = note_sites
        self._trace = trace
        self._entry = 0
        self._as_traced = True
        self._n_calls = 0
        self._elsewhere: list[Any] = []
        self._n = n
        self.taps = taps
        self.collect = collect
        self._tapping = True
        self.uses: list[Use] = []
        self.sites: list[Site] = []

    @property
    def _expected(self) -> CallTrace | None:
        """The next traced call."""
        calls = self._trace.calls
        return calls[self._n_calls] if self._n_calls < len(calls) else None

    def fork(
        self,
        grads: Mapping[int, Tensor] = MappingProxyType({}),
        taps: Mapping[ReaderKey, Tensor] = MappingProxyType({}),
        collect: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> TapMode:
        """Another mode in the state of this one, to watch the same part of the program again.

        Args:
            grads: by identity of tracked tensors, what their training gradients are read at.
            taps, collect: taps to use instead.
        """
        other = copy.copy(self)
        other._tracked = {
            key: (x, replace(t, grad=grads[key], running=None) if key in grads else t)
            for key, (x, t) in self._tracked.items()
        }
        other.taps, other.collect = {**self.taps, **taps}, {**self.collect, **collect}
        other.uses, other.sites = list(self.uses), list(self.sites)
        other._stale, other._elsewhere = dict(self._stale), list(self._elsewhere)
        return other

    @contextmanager
    def without_taps(self) -> Iterator[None]:
        """Only watch: what is computed stays constant."""
        self._tapping = False
        try:
            yield
        finally:
            self._tapping = True

    def elementary(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is SWITCH:
            return func(*args)
        if reads_attribute(func):
            return super().elementary(func, args, kwargs)
        entry, funcs = self._entry, self._trace.funcs
        self._entry += 1
        self._as_traced = self._as_traced and entry < len(funcs) and funcs[entry] == traced_as(func)
        expected = self._trace.patterns[entry] if self._as_traced and self._n > 1 else None
        out = super().elementary(func, args, kwargs)
        if expected is not None:
            given = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
            inputs = [x.shape for x in given if isinstance(x, Tensor)]
            self._as_traced = pattern(func, inputs, [out.shape]) == expected
        if not self._as_traced:
            self._elsewhere.append((entry, traced_as(func)))
        return out

    @property
    def route(self) -> Hashable:
        """None if all calls were those of the trace, else what tells these from others."""
        if self._as_traced and self._entry == len(self._trace.funcs):
            return None
        return self._entry, hash(tuple(self._elsewhere))

    def _check_layout(self, layout: Layout, x: Tensor) -> None:
        """The samples must lie where they lay in the trace. Where the shape would allow other
        places, the way to this call must have been that of the trace, op by op."""
        layout.check(x, self._n)
        if not self._as_traced and layout.ambiguous(x, self._n):
            raise StaleLayout(f"a tensor of shape {tuple(x.shape)} was come by in another way")

    def on_tracked(self, func: Callable[..., Any], call: CallArgs) -> Any:
        expected = self._expected
        if expected is None or traced_as(func) != traced_as(expected.func):
            return self._read_attribute(func, call)
        if (tuple(call.hits), call.numbers()) != (expected.hits, expected.numbers):
            raise StaleLayout(f"{op_name(func)} got other parameters")
        if torch.is_grad_enabled() != expected.grad_enabled:
            raise StaleLayout(f"{op_name(func)} was called with gradients switched on or off")
        self._n_calls += 1
        if expected.kind == "derived":
            return self.derive(func, call)
        if expected.kind == "constant":
            return call.run(func, call.consts())
        if isinstance(expected.rule, BroadcastRule):
            return self._broadcast(func, call, expected)
        return self._factor(func, call, expected)

    def finish(self) -> None:
        """Raise `StaleLayout` unless every traced call was made."""
        if self._expected is not None:
            raise StaleLayout(f"{op_name(self._expected.func)} was not called")

    def _read_attribute(self, func: Callable[..., Any], call: CallArgs) -> Any:
        """Calls that return no tensor, such as reads of shapes, are not traced."""
        out = call.run(func, call.consts())
        if tensors_of(out) or writes(func, call.kwargs()):
            wanted = self._expected and op_name(self._expected.func)
            raise StaleLayout(f"{op_name(func)} was called where {wanted} was expected")
        return out

    def _site(
        self,
        y: Tensor,
        axis: int,
        call: CallTrace,
        targets: list[tuple[ArgName, Tracked]],
        args: list[Any],
        treedef: optree.PyTreeSpec,
    ) -> Tensor:
        tap = self.collect.get(len(self.uses))
        if tap is not None and tap.shape != y.shape:
            raise StaleSites
        use = Use(call, self._n, targets, args, treedef, tap)
        self.uses.append(use)
        if self._note_sites:
            self.sites.append(_site_of(use, y, axis))
        if self._tapping:
            y = use.tap(y, self.taps)
        if tap is None:
            use.release()
        return y

    def _factor(self, func: Callable[..., Any], call: CallArgs, expected: CallTrace) -> Tensor:
        y = call.run(func, call.consts())
        self._check_layout(expected.out, y)
        for i, layout in expected.layouts:
            self._check_layout(layout, call.leaves[i])
        args = call.stacked(dict(expected.layouts), self._n)
        targets = list(zip(expected.names, call.tracked, strict=True))
        return self._site(y, expected.out.axis, expected, targets, args, call.treedef)

    def _broadcast(self, func: Callable[..., Any], call: CallArgs, expected: CallTrace) -> Tensor:
        layout = expected.out
        args = unfold_all(call, expected, self._n)
        for i, tracked in zip(call.hits, call.tracked, strict=True):
            padded = layout.pad(tracked.const, expected.ndim)
            shape = list(padded.shape)
            shape[layout.sample_axis] = self._n
            copy = padded.expand(shape)
            if in_transform():
                copy = copy.contiguous()  # forward mode writes tangents into its like
            args[i] = self._site(
                copy, layout.sample_axis, expected, [("", tracked)], [], call.treedef
            )
        call_args, kwargs = call.rebuild(args)
        out = layout.merge(func(*call_args, **kwargs))
        # A scalar does not take part in the promotion of dtypes, and its copies do.
        return out if out.dtype == expected.dtype else out.to(expected.dtype)


def unfold_all(call: CallArgs, expected: CallTrace, n: int) -> list[Any]:
    """The arguments, the folded sample axis as two axes in all of them."""
    args = list(call.leaves)
    layouts = dict(expected.layouts)
    from_right = expected.ndim - expected.out.axis
    for i, x in enumerate(args):
        if i in layouts:
            layouts[i].check(x, n)
            args[i] = layouts[i].split(x, n)
        elif expected.out.fold != "none" and isinstance(x, Tensor) and x.ndim >= from_right:
            args[i] = x.unsqueeze(x.ndim - from_right)
    return args
