"""A use: one place where parameters meet samples in one run of a model, and the factors there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor

from ghostfunc._base.documents import DocumentsAlike
from ghostfunc._base.trees import unflatten
from ghostfunc._factors import bundles
from ghostfunc._factors.factor import Dense, Factor
from ghostfunc._rules.registry import COPY, ArgName, BroadcastRule, FactorMakers, TwoForms
from ghostfunc._taps.known_way import KnownUse
from ghostfunc._taps.read_factor import as_param_shape
from ghostfunc._taps.recut import Recut, regrouped
from ghostfunc._trace.layout import stack_all
from ghostfunc._trace.trace import CallTrace
from ghostfunc._trace.tracked import Tracked, real


@dataclass(eq=False)
class Use:
    """One place where parameters meet samples, in one run of the model.

    Attributes:
        call: what the trace knows of it.
        n: samples in this run.
        targets: the tracked tensors that meet samples here, with the rule's names for them.
        arg_tensors: the tensors among the call's arguments; none where the op broadcasts.
        axis: where the samples lie in the tapped tensor: the op's output, or the expanded copy of
            a parameter where the op broadcasts.
        use_number: of this use in the run.
        rest, treedef: the call's arguments, flattened, with holes for the tensors.
        recut: lays packed rows out as documents, if these are the samples.
        call_number: of the call in the trace.
        known: of a use that was met before at these shapes, what stands for `rest` and `treedef`.
        collected: whether the cotangent of its tapped tensor is kept, for factors that outlive the
            run.
    """

    call: CallTrace
    n: int
    targets: list[tuple[ArgName, Tracked]]
    arg_tensors: list[Tensor]
    axis: int = 0
    use_number: int = 0
    rest: list[Any] = field(default_factory=list)
    treedef: optree.PyTreeSpec | None = None
    recut: Recut | None = None
    call_number: int = 0
    known: KnownUse | None = None
    collected: bool = False

    def release(self) -> None:
        """Let go of the arguments: what the backward pass needs of them, autograd has saved."""
        self.arg_tensors = []

    def makers(self, b: Tensor, args: Sequence[Tensor]) -> FactorMakers:
        """What makes the factors of all targets, by the rule's names for them, given the tapped
        tensor's cotangent. In packed rows, those of single positions, unless the rule broadcasts.
        """
        if self.known is not None:
            return self.known.makers(b, args, self.n, self.recut, self.call_number)
        layout, rule, recut, n = self.call.out, self.call.rule, self.recut, self.n
        if isinstance(rule, BroadcastRule):
            g = b.movedim(self.axis, 0) if self.axis else b
            const = self.targets[0][1].const
            if recut is not None:
                g = recut.broadcast(self.call_number, self.call, g, const)
            return {COPY: lambda: Dense(real(g.reshape(n, *const.shape)))}
        leaves = merge_tensors(self.rest, args)
        if recut is None:
            b, leaves = layout.stack(b, n), stack_all(leaves, self.call.layout_of, n)
        else:
            b = recut.cotangent(self.call_number, self.call, b)
            leaves = [
                recut.argument(self.call_number, self.call, i, x) if isinstance(x, Tensor) else x
                for i, x in enumerate(leaves)
            ]
        assert self.treedef is not None
        call_args, kwargs = unflatten(self.treedef, leaves)
        assert rule is not None  # tracing saw to it
        return rule.fn(b, *call_args, **kwargs)

    def factor(
        self,
        name: ArgName,
        target: Tracked,
        b: Tensor,
        args: Sequence[Tensor],
        *,
        by_position: bool = False,
    ) -> Factor:
        """The factor of one target, given the tapped tensor's cotangent; `by_position`, positions
        are kept apart even where the formed gradient would be smaller."""
        make = self.makers(b, args)[name]
        if by_position and isinstance(make, TwoForms):
            make = make.by_position
        return self.for_target(make(), target)

    def for_target(
        self, factor: Factor, target: Tracked, documents: DocumentsAlike | None = None
    ) -> Factor:
        """What the rule made, in the shape of the target; of packed rows the factor of all
        documents, or of some."""
        if isinstance(self.call.rule, BroadcastRule):
            return factor
        if documents is not None:
            factor = regrouped(factor, documents.packing)
        elif self.recut is not None:
            factor = regrouped(factor, self.recut.packing)
        return as_param_shape(factor, target)


def split_tensors(leaves: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """Tensors among `leaves`, and the rest with holes where the tensors were."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return tensors, [_HOLE if isinstance(x, Tensor) else x for x in leaves]


def merge_tensors(rest: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
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
        shape, axis, dtype, device: of its tapped tensor, and where the samples lie in it.
        targets: `(parameter, type of factor, shape of factor, positions, direct)`.
    """

    n: int
    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    device: torch.device
    targets: tuple[tuple[int, str, tuple[int, ...], int, bool], ...]

    def tap(self, n: int) -> Tensor:
        """A zero tap for `n` samples, whose cotangent is that of the tapped tensor."""
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
