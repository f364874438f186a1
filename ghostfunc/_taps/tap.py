"""A tap: a zero input beside a tensor, which no value depends on; its cotangent is a quantity.

A use has one *tapped tensor*. It goes through a function that is the identity on it and takes the
taps as further inputs. The backward pass of that function gets the tensor's cotangent, and reads
quantities of the samples off it: dot products, norms, projections.

    an op with a rule     The tapped tensor is the op's output. The rule makes a factor, the compact
                          form of the per-sample gradients, of the output's cotangent and the op's
                          arguments (`Use.makers`, in `use.py`).
    an op that broadcasts The tapped tensor is a copy of the parameter, expanded to the samples,
                          which the op gets. Its cotangent is the per-sample gradient.

Readers read quantities off the factor, and form the training gradient where it is wanted
(`read_all`, in `read_factor.py`). The op, or the copy, takes the parameter as a constant, so
autograd computes the cotangents of activations alone. Where autograd itself forms the training
gradient (`Tracked.formed_by_autograd`), an op with a rule runs on `Tracked.primal`, and one that
broadcasts runs twice.

Two kinds of uses have taps:

    ReturningUse    inside transforms: every quantity has a tap of its own, and what is read is
                    returned as the cotangent of that tap
    SinkUse         elsewhere: what is read is put into `Sinks`. The one tap is the anchor, whose
                    cotangent nobody reads: since it wants a gradient, autograd runs the backward
                    pass

Beside the taps, the function takes `Tracked.primal` where a training gradient is to be returned:
that is the cotangent of the primal, as a quantity is that of its tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.torch_private import in_transform, unrounded
from ghostfunc._base.trees import flatten, unflatten
from ghostfunc._quantities.readers import PositionsReader
from ghostfunc._rules.registry import ArgName, TwoForms
from ghostfunc._taps.few_calls import FewCalls
from ghostfunc._taps.read_factor import read_all
from ghostfunc._taps.read_packed import PackedUse
from ghostfunc._taps.use import Use, merge_tensors, split_tensors
from ghostfunc._trace.tracked import ReaderKey, Tracked


@dataclass(eq=False, kw_only=True)
class ReturningUse(Use):
    """A use that returns what is read as the cotangents of its taps.

    Attributes:
        collect_tap: the tap whose cotangent is that of the tapped tensor, where that is kept.
    """

    collect_tap: Tensor | None = None

    def __post_init__(self) -> None:
        self.collected = self.collect_tap is not None
        leaves, self._reader_spec = flatten([t.readers_in_order() for _, t in self.targets])
        self._reader_tensors, self._reader_rest = split_tensors(leaves)
        self._n_args = len(self.arg_tensors)
        self.n_inputs = 0

    def tapped(self, y: Tensor, taps: dict[ReaderKey, Tensor]) -> Tensor:
        """The tapped tensor `y`, with its taps beside it. The backward pass reads all targets, and
        returns the values as cotangents of `taps` and the primals."""
        inputs: list[Tensor] = []
        for _, target in self.targets:
            inputs += [taps[key] for key in target.readers]
            if target.reads_grad:
                inputs.append(target.primal)
        if self.collect_tap is not None:
            inputs.append(self.collect_tap)
        self.n_inputs = len(inputs)
        if not inputs:
            return y
        function = _Returning if in_transform() else _ReturningAtTop
        return function.apply(y, self, *inputs, *self.arg_tensors, *self._reader_tensors)

    def read(self, b: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
        """The cotangents of the taps and primals, in the order of `tapped`."""
        args, tensors = saved[: self._n_args], saved[self._n_args :]
        readers = unflatten(self._reader_spec, merge_tensors(self._reader_rest, tensors))
        out: list[Tensor | None] = []
        with unrounded(b):
            for (name, target), own in zip(self.targets, readers, strict=True):
                if own or target.reads_grad:
                    by_position = any(isinstance(r, PositionsReader) for r in own)
                    factor = self.factor(name, target, b, args, by_position=by_position)
                    out += read_all(factor, target, own)
        if self.collect_tap is not None:
            out.append(b)
        return out


class _Returning(torch.autograd.Function):
    """The identity on `y`; its backward hands `y`'s cotangent to the use's readers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, use: ReturningUse, *tensors: Tensor) -> Tensor:
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, use, *tensors = inputs
        ctx.use = use
        ctx.save_for_backward(*tensors[use.n_inputs :])

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return (b, None, *ctx.use.read(b, saved), *(None for _ in saved))

    @staticmethod
    def jvp(ctx: Any, y_t: Tensor, *rest: object) -> Tensor:
        return y_t


class _ReturningAtTop(torch.autograd.Function):
    """`_Returning` outside transforms, where a `setup_context` by itself would only cost time."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, use: ReturningUse, *tensors: Tensor) -> Tensor:
        _Returning.setup_context(ctx, (y, use, *tensors), y)
        return y.detach()  # y itself would count as a view, which in-place ops may not touch

    backward = staticmethod(_Returning.backward)


ANCHOR: ReaderKey = (-1, -1)
"""The key of the one tap that all uses of a run with sinks share; nobody reads its cotangent."""

Blank: TypeAlias = Callable[[], Tensor]


@dataclass
class Sinks:
    """Where the uses of one run put what they read.

    Attributes:
        collect: parameters, by number; the tapped tensors' cotangents of all uses are kept.
        summed: quantities that are added up over parameters, by number.
        open: whether the run's backward pass has begun; until then uses read nothing.
        values: what was read, added up over uses.
        pieces: of quantities that are `summed`, what is to be added up.
        cotangents: of tapped tensors, by number of the use.
        few_calls: reads small gradients of many layers in one table, and both batches of one run
            at a matrix; of quantities that are `summed`, or read with the training gradient.
        by_position: whether positions are read, so that no rule may form the gradient.
    """

    collect: frozenset[int]
    summed: frozenset[int]
    few_calls: FewCalls | None
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
        """Whether the cotangent of a use's tapped tensor is kept."""
        for _, target in targets:  # noqa: SIM110 (a generator is felt in every use)
            if not target.leaves().isdisjoint(self.collect):
                return True
        return False


@dataclass(eq=False, kw_only=True)
class SinkUse(Use):
    """A use that puts what it reads into sinks.

    Attributes:
        blank: makes a zero cotangent of the tapped tensor, where the cotangent is kept.
        reading: whether something is read.
        once: whether the use is read once. Unless it is collected, it then lets go of its targets,
            and parameters that were gathered from several ranks are freed.
    """

    sinks: Sinks
    blank: Blank | None = None
    reading: bool = False
    once: bool = False

    def tapped(self, y: Tensor, taps: dict[ReaderKey, Tensor]) -> Tensor:
        """The tapped tensor `y`, with the anchor beside it. The backward pass puts what it reads
        into the sinks. Training gradients that autograd adds up it returns, as cotangents of the
        primals."""
        inputs = [target.primal for _, target in self.targets if target.grad_is_returned]
        self.reading = any(target.readers or target.reads_grad for _, target in self.targets)
        if not self.reading and not self.collected:
            return y
        out: Tensor = _IntoSinks.apply(
            y, self, len(inputs) + 1, *inputs, taps[ANCHOR], *self.arg_tensors
        )
        return out

    def read(self, b: Tensor, args: Sequence[Tensor]) -> list[Tensor | None]:
        """Put what is read into the sinks. Returns the training gradients that are autograd's to
        add up."""
        try:
            return self._read_into_sinks(b, args)
        finally:
            if self.once and not self.collected:
                self.targets = []

    def _read_into_sinks(self, b: Tensor, args: Sequence[Tensor]) -> list[Tensor | None]:
        sinks = self.sinks
        out: list[Tensor | None] = []
        if not sinks.open:
            # The model pulls something back itself, which may lead through a use; the run opens
            # the sinks after it. The model holds no primal, so it misses none of their gradients.
            return out
        if self.collected:
            sinks.cotangents[self.use_number] = b
        if not self.reading:
            return out
        makers = self.makers(b, args)
        packed = None
        if self.recut is not None:
            packed = PackedUse(self.call, makers, self.recut.packing, sinks.few_calls, sinks.add)
        for name, target in self.targets:
            if not target.readers and not target.reads_grad:
                continue
            if packed is not None:
                found = packed.read(name, target)
            else:
                make = makers[name]
                if sinks.by_position and isinstance(make, TwoForms):
                    make = make.by_position
                factor = self.for_target(make(), target)
                few_calls = sinks.few_calls
                if few_calls is not None and few_calls.read(self.call, target, factor, sinks.add):
                    continue  # it takes no target whose gradient is one of `out`
                found = read_all(factor, target, target.readers_in_order())
            if found is None:  # of a packed use, `few_calls` has it
                continue
            # One value per reader, and the training gradient last, if there is one.
            for key, value in zip(target.readers, found, strict=False):
                assert value is not None
                sinks.add(key, value)
            if target.grad_is_returned:
                out.append(found[-1])
        return out


class TwinOutput(torch.autograd.Function):
    """The first of two tensors with the same values; both get its cotangent. The first is the
    program's, the second was computed of tapped copies (`TapMode` runs the op twice)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, twin: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, b


class _IntoSinks(torch.autograd.Function):
    """The identity on `y`; its backward has the use put what it reads into its sinks."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, use: SinkUse, n_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.use, ctx.n_inputs = use, n_inputs
        ctx.save_for_backward(*tensors[n_inputs:])
        return y.detach()  # y itself would count as a view, which in-place ops may not touch

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        out: list[Tensor | None] = [b, None, None, *[None] * (ctx.n_inputs + len(saved))]
        for i, grad in enumerate(ctx.use.read(b, saved)):
            out[3 + i] = grad
        return tuple(out)
