"""A tap: the identity on an op's output, with further inputs that are zero. In the backward pass
the cotangent of such an input is a quantity of the samples: their dot products, norms, projections.

The op itself runs on a constant copy of the parameter, so autograd computes only the cotangent of
its input. The op's rule makes a factor, the compact form of the per-sample gradients, of the
output's cotangent and the op's arguments. Readers read quantities off the factor, and the training
gradient too, where it is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from ghostfunc._base.documents import Packing
from ghostfunc._base.torch_private import in_transform, unrounded
from ghostfunc._base.trees import flatten, unflatten
from ghostfunc._factors import bundles, contract
from ghostfunc._factors.beside_total import dots_and_total
from ghostfunc._factors.factor import Dense, Factor, OneHot, Outer, flat_positions
from ghostfunc._quantities.readers import (
    DotReader,
    OneRunReader,
    PositionsReader,
    Reader,
    ValueReader,
    by_sample,
)
from ghostfunc._rules.registry import ArgName, BroadcastRule, ByPosition, Factors
from ghostfunc._taps.recut import Recut, in_rows, regrouped
from ghostfunc._taps.steps import KnownUse
from ghostfunc._taps.straight import Straight
from ghostfunc._trace.layout import stack_all
from ghostfunc._trace.trace import CallTrace
from ghostfunc._trace.tracked import ReaderKey, Tracked, at_leaves, real, shaped


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


class _SinkTap(torch.autograd.Function):
    """A tap that puts what it reads into sinks."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, use: Use, n_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.use, ctx.n_inputs = use, n_inputs
        ctx.save_for_backward(*tensors[n_inputs:])
        return y.detach()  # y itself would count as a view, which in-place ops may not touch

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        out: list[Tensor | None] = [b, None, None, *[None] * (ctx.n_inputs + len(saved))]
        for i, grad in enumerate(ctx.use.read_into_sinks(b, saved)):
            out[3 + i] = grad
        return tuple(out)


class Beside(torch.autograd.Function):
    """The first of two tensors with the same values; both get its cotangent."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, beside: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, b


Blank: TypeAlias = Callable[[], Tensor]

ANCHOR: ReaderKey = (-1, -1)
"""A dummy input that all taps of a run with sinks share, so that autograd calls their backward."""


@dataclass
class Sinks:
    """Where the taps of one run put what they read.

    Attributes:
        collect: parameters, by number; the outputs' cotangents of all their uses are kept.
        summed: quantities that are added up over parameters.
        open: whether the backward pass has begun; until then taps read nothing.
        values: what was read, added up over uses.
        pieces: of quantities that are `summed`, what is to be added up.
        cotangents: of the outputs of uses, by number of the use.
        straight: reads biases and norms of many layers together, where something is `summed`.
        by_position: whether positions are read, so that no rule may form the gradient.
    """

    collect: frozenset[int]
    summed: frozenset[int]
    straight: Straight | None
    by_position: bool = False
    open: bool = False
    values: dict[ReaderKey, Tensor] = field(default_factory=dict)
    pieces: dict[int, list[Tensor]] = field(default_factory=dict)
    cotangents: dict[int, Tensor] = field(default_factory=dict)

    def add(self, key: ReaderKey, value: Tensor) -> None:
        """Add what one use has of a value."""
        if key[0] in self.summed:
            self.pieces.setdefault(key[0], []).append(value)
            return
        before = self.values.get(key)
        self.values[key] = value if before is None else before + value

    def collects(self, targets: Sequence[tuple[ArgName, Tracked]]) -> bool:
        """Whether the cotangent of a use's output is kept."""
        return bool(self.collect) and any(
            not self.collect.isdisjoint(target.leaves()) for _, target in targets
        )


@dataclass(eq=False)
class Use:
    """One place where parameters meet samples, in one run of the model.

    Attributes:
        call: what the trace knows of it.
        n: samples in this run.
        targets: the tracked tensors that meet samples here, with the rule's names for them.
        arg_tensors: the tensors among the call's arguments.
        axis: where the samples lie in the op's output.
        rest, treedef: the call's arguments, flattened, with holes for the tensors.
        collect_tap: hands out the output's cotangent too, for factors that outlive the run.
        number: of this use in the run.
        sinks: where to put what is read; None inside transforms, whose taps return it.
        collecting: makes a zero cotangent of the output, where that is kept.
        reading: whether something is read.
        recut: lays packed rows out as documents, if these are the samples.
        place: number of the call in the trace.
        known: of a use that was met before at these shapes, what stands for `rest` and `treedef`.
    """

    call: CallTrace
    n: int
    targets: list[tuple[ArgName, Tracked]]
    arg_tensors: list[Tensor]
    axis: int = 0
    rest: list[Any] = field(default_factory=list)
    treedef: optree.PyTreeSpec | None = None
    collect_tap: Tensor | None = None
    number: int = 0
    sinks: Sinks | None = None
    collecting: Blank | None = None
    reading: bool = False
    recut: Recut | None = None
    place: int = 0
    known: KnownUse | None = None

    def __post_init__(self) -> None:
        if self.sinks is not None or self.treedef is None:
            return
        readers = [
            [root if own is None else own for own, root in target.readers.values()]
            for _, target in self.targets
        ]
        reader_leaves, self._reader_spec = flatten(readers)
        self._reader_tensors, self._reader_rest = split_tensors(reader_leaves)
        self.n_taps = 0
        self.n_args = len(self.arg_tensors)

    def release(self) -> None:
        """Let go of the arguments: what the backward pass needs of them, autograd has saved."""
        self.arg_tensors = []

    def tap(self, y: Tensor, taps: dict[ReaderKey, Tensor]) -> Tensor:
        """`y` with the taps of all targets beside it."""
        if self.sinks is not None:
            return self._tap_into(y, taps)
        inputs: list[Tensor] = []
        for _, target in self.targets:
            inputs += [taps[key] for key in target.readers]
            if target.reads_grad:
                inputs.append(target.grad)
        if self.collect_tap is not None:
            inputs.append(self.collect_tap)
        self.n_taps = len(inputs)
        if not inputs:
            return y
        function = _Tap if in_transform() else _TopLevelTap
        return function.apply(y, self, *inputs, *self.arg_tensors, *self._reader_tensors)

    def _tap_into(self, y: Tensor, taps: dict[ReaderKey, Tensor]) -> Tensor:
        """`y` with a tap beside it whose inputs are the anchor, and what training gradients are
        read at that are autograd's to add up."""
        inputs = [target.grad for _, target in self.targets if target.pulls_grad]
        self.reading = any(target.readers or target.reads_grad for _, target in self.targets)
        if not self.reading and self.collecting is None:
            return y
        out: Tensor = _SinkTap.apply(
            y, self, len(inputs) + 1, *inputs, taps[ANCHOR], *self.arg_tensors
        )
        return out

    def read_into_sinks(self, b: Tensor, args: Sequence[Tensor]) -> list[Tensor | None]:
        """Put what is read into the sinks. Returns the training gradients that are autograd's to
        add up."""
        sinks = self.sinks
        assert sinks is not None
        out: list[Tensor | None] = []
        if not sinks.open:
            return out
        if self.collecting is not None:
            sinks.cotangents[self.number] = b
        if not self.reading:
            return out
        if self.recut is not None:
            return self._read_documents_into(b, args, sinks)
        factors = self.factors(b, args)
        for name, target in self.targets:
            if not target.readers and not target.reads_grad:
                continue
            factor = self.fitted(factors[name], target, by_position=sinks.by_position)
            straight = sinks.straight
            if straight is not None and straight.read(self.call, target, factor, sinks.add):
                continue
            readers = [root if own is None else own for own, root in target.readers.values()]
            found = _read_all(factor, target, readers)
            for key, value in zip(target.readers, found, strict=False):
                assert value is not None
                sinks.add(key, value)
            if target.pulls_grad:
                out.append(found[-1])
        return out

    def _read_documents_into(
        self, b: Tensor, args: Sequence[Tensor], sinks: Sinks
    ) -> list[Tensor | None]:
        """`read_into_sinks`, where samples are documents."""
        out: list[Tensor | None] = []
        read = ByDocument(self, b, args)
        for name, target in self.targets:
            if not target.readers and not target.reads_grad:
                continue
            readers = [root if own is None else own for own, root in target.readers.values()]
            found = read(name, target, readers, sinks)
            if found is None:
                continue
            for key, value in zip(target.readers, found, strict=False):
                assert value is not None
                sinks.add(key, value)
            if target.pulls_grad:
                out.append(found[-1])
        return out

    def factors(self, b: Tensor, args: Sequence[Tensor]) -> Factors:
        """What makes the factors of all targets, by the rule's names for them, given the output's
        cotangent. In packed rows, those of single positions, unless the rule broadcasts."""
        if self.known is not None:
            return self.known.factors(b, args, self.n)
        layout, rule, recut, n = self.call.out, self.call.rule, self.recut, self.n
        if isinstance(rule, BroadcastRule):
            g = b.movedim(self.axis, 0) if self.axis else b
            const = self.targets[0][1].const
            if recut is not None:
                g = recut.broadcast(self.place, self.call, g, const)
            return {"": lambda: Dense(real(g.reshape(n, *const.shape)))}
        leaves = _merge_tensors(self.rest, args)
        if recut is None:
            b, leaves = layout.stack(b, n), stack_all(leaves, self.call.places, n)
        else:
            b = recut.cotangent(self.place, self.call, b)
            leaves = recut.arguments(self.place, self.call, leaves)
        assert self.treedef is not None
        call_args, kwargs = unflatten(self.treedef, leaves)
        assert rule is not None  # tracing saw to it
        return rule.fn(b, *call_args, **kwargs)

    def read(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
        """The cotangents of all tap inputs, in the order of `tap`."""
        n_args = self.n_args
        readers = unflatten(self._reader_spec, _merge_tensors(self._reader_rest, saved[n_args:]))
        out: list[Tensor | None] = []
        with unrounded(b):
            for (name, target), own in zip(self.targets, readers, strict=True):
                if own or target.reads_grad:
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
        """The factor of one target, given the output's cotangent; `by_position`, positions are kept
        apart even where the formed gradient would be smaller."""
        return self.fitted(self.factors(b, args)[name], target, by_position=by_position)

    def fitted(self, make: Callable[[], Factor], target: Tracked, *, by_position: bool) -> Factor:
        if by_position and isinstance(make, ByPosition):
            make = make.outer
        if isinstance(self.call.rule, BroadcastRule):
            return make()
        factor = make()
        if self.recut is not None:
            factor = regrouped(factor, self.recut.packing)
        return as_param_shape(factor, target)


class ByDocument:
    """Reads one use where packed rows are shown and samples are documents."""

    def __init__(self, use: Use, b: Tensor, args: Sequence[Tensor]) -> None:
        assert use.recut is not None
        self._call, self._packing = use.call, use.recut.packing
        self._broadcasts = isinstance(use.call.rule, BroadcastRule)
        self._factors = use.factors(b, args)

    def __call__(
        self, name: ArgName, target: Tracked, readers: Sequence[Reader], sinks: Sinks
    ) -> list[Tensor | None] | None:
        """What every reader reads, and the training gradient, as `_read_all` returns them; None if
        the sinks have it."""
        packing, make = self._packing, self._factors[name]
        single = (make.outer if isinstance(make, ByPosition) else make)()
        if self._broadcasts or isinstance(single, Dense):
            factor = single if self._broadcasts else regrouped(single, packing)
            factor, straight = as_param_shape(factor, target), sinks.straight
            if straight is not None and straight.read(self._call, target, factor, sinks.add):
                return None
            return _read_all(factor, target, readers)
        here = all(own is not None for own, _ in target.readers.values())
        if here and all(isinstance(r, DotReader) for r in readers):
            packed = in_rows(single, packing)
            packed = None if packed is None else as_param_shape(packed, target)
            if isinstance(packed, (Outer, OneHot)):
                return _read_all(packed, target, readers, packing)
        apart = len(packing.groups) > 1 and not target.reads_grad
        if readers and apart and all(map(by_sample, readers)):
            parts = [
                _read_all(as_param_shape(regrouped(single, part), target), target, readers)
                for _, part in packing.groups
            ]
            order = torch.cat([index for index, _ in packing.groups]).argsort()
            columns = zip(*parts, strict=True)
            return [torch.cat([x for x in column if x is not None])[order] for column in columns]
        return _read_all(as_param_shape(regrouped(single, packing), target), target, readers)


def as_param_shape(factor: Factor, target: Tracked) -> Factor:
    """The factor in a shape that fits the target: exactly its own if it is dense or the target is a
    matrix, which may be transposed; otherwise one with the same elements in the same order. All
    positions of a sample are on one axis."""
    shape = tuple(target.const.shape)
    match factor:
        case Outer(left, right) if left.ndim != 3:
            factor = Outer(flat_positions(left), flat_positions(right))
        case OneHot(ids, b, n_rows) if ids.ndim != 2:
            factor = OneHot(ids[:, None].flatten(1), flat_positions(b), n_rows)
    if factor.shape == shape or (not isinstance(factor, Dense) and len(shape) != 2):
        return factor
    g = contract.materialize(factor)
    return Dense(g.reshape(len(g), *shape))


def _read_all(
    factor: Factor, target: Tracked, readers: Sequence[Reader], packing: Packing | None = None
) -> list[Tensor | None]:
    """What every reader of a target reads, and last the cotangent of its training gradient's input
    if there is one: None if the gradient was added to a running total. With a `packing`, the factor
    is one of packed rows, and all readers are `DotReader`s."""
    own = [reader is not None for reader, _ in target.readers.values()]
    pulled = {} if all(own) else leaf_factors(target, factor)
    at_leaf = [
        None if here else reader.read(pulled[i])
        for (_, i), here, reader in zip(target.readers, own, readers, strict=True)
    ]
    readers = [reader for here, reader in zip(own, readers, strict=True) if here]
    beside = [root for _, root in target.readers.values() if isinstance(root, OneRunReader)]
    if beside:  # if one reader is a `OneRunReader`, all are
        leaves = [i for (_, i), here in zip(target.readers, own, strict=True) if here]
        readers = _readers_for_train_rows(factor, target, leaves, readers)
        factor = bundles.take(factor, slice(beside[0].n))
    read, grad = _read_with_total(factor, target, readers, packing)
    here = iter(read)
    out: list[Tensor | None] = [next(here) if x is None else x for x in at_leaf]
    if target.reads_grad:
        out.append(None if grad is None else shaped(grad, target.const))
    return out


def _read_with_total(
    factor: Factor, target: Tracked, readers: Sequence[Reader], packing: Packing | None
) -> tuple[list[Tensor], Tensor | None]:
    """What readers at hand read, and the training gradient, formed beside them where it is wanted:
    None if it was added to a running total."""
    directions = [r for r in readers if isinstance(r, DotReader)]
    us = [r.u.reshape(factor.shape) for r in directions]
    contract_dtype = directions[0].contract_dtype if us else None  # one call has one
    giving = next((r for r in readers if isinstance(r, ValueReader) and r.gives_total), None)
    value: Tensor | None = None
    grad: Tensor | None = None
    if giving is not None and target.reads_grad:
        value, grad = giving.read_with_total([factor])
        dots, _ = dots_and_total(
            factor, us, with_total=False, contract_dtype=contract_dtype, packing=packing
        )
        if target.running is not None:
            target.running.put(grad)
            grad = None
    elif target.running is not None:
        dots = target.running.add(factor, us, contract_dtype, packing)
    else:
        dots, grad = dots_and_total(
            factor,
            us,
            with_total=target.reads_grad,
            contract_dtype=contract_dtype,
            packing=packing,
        )
    read: list[Tensor] = []
    dotted = iter(dots)
    for r in readers:
        if isinstance(r, DotReader):
            read.append(next(dotted))
        else:
            read.append(value if r is giving and value is not None else r.read(factor))
    return read, grad


def _readers_for_train_rows(
    factor: Factor, target: Tracked, leaves: Sequence[int], readers: Sequence[Any]
) -> list[Reader]:
    """Readers of the train samples, which come first, made of the validation samples' factors."""

    def at_parameter(i: int, total: Tensor) -> Tensor:
        (g,) = contract.materialize(leaf_factors(target, Dense(total[None]))[i])
        return g

    return [
        reader.for_train_rows([factor], grads=target.reads_grad, pull=partial(at_parameter, i))
        for i, reader in zip(leaves, readers, strict=True)
    ]


def leaf_factors(target: Tracked, factor: Factor) -> dict[int, Factor]:
    """One factor per parameter that `target` derives from."""
    out: dict[int, Factor] = {}
    for leaf, factors in at_leaves([(target, factor)]).items():
        out[leaf] = factors[0]
        if len(factors) > 1:
            whole = list(map(contract.materialize, factors))
            out[leaf] = Dense(contract.add_up([x.reshape(whole[0].shape) for x in whole]))
    return out


def split_tensors(leaves: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
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
class UseOutput:
    """A use as a run on `n` samples saw it.

    Attributes:
        n: the samples, or the rows that documents shared.
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


class StaleOutputs(Exception):
    """Some outputs have other shapes than the remembered ones. Never leaves the package."""


def output_of(use: Use, y: Tensor, axis: int, n: int) -> UseOutput:
    targets = []
    for name, target in use.targets:
        factor = use.factor(name, target, y, use.arg_tensors)  # y stands in for its cotangent
        met = bundles.use_shape(factor)
        seen = met.kind, met.shape, met.positions, target.direct(factor)
        targets += [(leaf, *seen) for leaf in target.leaves()]
    return UseOutput(n, tuple(y.shape), axis, y.dtype, y.device, tuple(targets))
