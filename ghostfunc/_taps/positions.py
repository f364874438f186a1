"""Which axis holds the positions where parameters meet packed rows.

It is seen, not guessed: the model runs twice on two documents in rows of their own, the second time
on rows that are one position longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.documents import apart
from ghostfunc._base.errors import SampleAxisError
from ghostfunc._base.refusals import op_name
from ghostfunc._base.remembered import STRUCTURES, Recent, memory
from ghostfunc._base.trees import take
from ghostfunc._taps.mode import TapMode, unfold_all
from ghostfunc._taps.recut import Positions, Recut
from ghostfunc._trace.fitting import TracedModel
from ghostfunc._trace.layout import StaleLayout
from ghostfunc._trace.trace import CallTrace, Shape, Trace
from ghostfunc._trace.tracked import CallArgs, constants

_Sizes: TypeAlias = tuple[str, Shape, dict[int, Shape]]
"""What a call is, the shape of its output and those of its arguments, the samples in front."""


@dataclass(frozen=True)
class Found:
    """What was found of one model function, by trace."""

    positions: Recent[Trace, list[Positions | None]] = field(
        default_factory=lambda: Recent(STRUCTURES)
    )


def recut_of(model: TracedModel) -> Recut | None:
    """How the rows of a run become documents; None where its samples are ordinary ones."""
    if model.packing is None:
        return None
    found = memory(model.model_fn, Found).positions
    return Recut(model.packing, found.made(model.trace, lambda: _find(model)))


def _find(model: TracedModel) -> list[Positions | None]:
    few = take(model.batch, [0, min(1, model.n - 1)])
    (short, width), (long, _) = (_sizes(model, apart(few, spare)) for spare in (1, 2))
    return [
        None if x is None or y is None else _positions(x, y, width)
        for x, y in zip(short, long, strict=True)
    ]


def _sizes(model: TracedModel, batch: Any) -> tuple[list[_Sizes | None], int]:
    """The shapes at every call, and the number of positions."""
    few = replace(model, batch=batch, n=len(batch), packing=None)
    mode = _ShapeMode(few)
    with mode, torch.enable_grad():
        model.model_fn(mode.params, batch)
    mode.finish()
    return mode.seen, batch.packing.width


def _positions(short: _Sizes, long: _Sizes, width: int) -> Positions:
    what = short[0]
    out = _axis(short[1], long[1], width, what)
    if out is None:
        raise SampleAxisError(
            f"{what}: its output {list(short[1])} has no axis of a row's positions. Parameters "
            "must meet packed documents in rows, [R, T, ...]: what they make of a whole row "
            "belongs to no document, and what they make of documents laid apart (after "
            "docs.from_rows, or from docs[name]) is not supported. Apply a linear head to all "
            "positions of docs.rows() and take what you need of its output, or pass documents as "
            "ordinary padded samples, [n, t, ...]."
        )
    args = {i: _axis(shape, long[2][i], width, what) for i, shape in short[2].items()}
    return Positions(out, args)


def _axis(short: Shape, long: Shape, width: int, what: str) -> int | None:
    """The axis that got longer."""
    axes = [i for i, (a, b) in enumerate(zip(short, long, strict=True)) if a != b]
    if not axes:
        return None
    if len(axes) > 1 or (short[axes[0]], long[axes[0]]) != (width, width + 1):
        raise SampleAxisError(
            f"{what}: with rows of {width} positions it has shape {list(short)}, with rows of "
            f"{width + 1} {list(long)}. Parameters must meet documents with all positions of a row "
            "on one axis, [R, T, ...], and nothing else on it."
        )
    return axes[0]


class _ShapeMode(TapMode):
    """Runs a traced model and notes the shapes at every call where parameters meet samples."""

    def __init__(self, model: TracedModel) -> None:
        tracked = constants(model.leaves, model.spec)
        super().__init__(model.trace, tracked, model.n, {}, {})
        self.params = model.spec.unflatten([t.shown for t in tracked])
        self.seen: list[_Sizes | None] = []

    def fork(self, *args: Any, **kwargs: Any) -> TapMode:
        other = super().fork(*args, **kwargs)
        other.seen = list(self.seen)  # type: ignore[attr-defined]
        return other

    def on_tracked(self, func: Callable[..., Any], call: CallArgs) -> Any:
        before = self._n_calls
        self._place: _Sizes | None = None
        out = super().on_tracked(func, call)
        if self._n_calls > before:
            self.seen.append(self._place)
        return out

    def _run_with_rule(
        self, func: Callable[..., Any], call: CallArgs, expected: CallTrace
    ) -> Tensor:
        y = call.run(func, call.consts())
        shapes = {}
        for i, layout in expected.layouts:
            layout.check(call.leaves[i], self._n_rows)
            shapes[i] = tuple(layout.stack(call.leaves[i], self._n_rows).shape)
        self._check_layout(expected.out, y)
        self._place = (_what(func, call), tuple(expected.out.stack(y, self._n_rows).shape), shapes)
        return y

    def _run_broadcast(
        self, func: Callable[..., Any], call: CallArgs, expected: CallTrace
    ) -> Tensor:
        layout = expected.out
        args = unfold_all(call, expected, self._n_rows)
        for i, tracked in zip(call.hits, call.tracked, strict=True):
            args[i] = layout.pad(tracked.const, expected.ndim)
        call_args, kwargs = call.rebuild(args)
        out: Tensor = func(*call_args, **kwargs)
        front = out.movedim(layout.sample_axis, 0)
        self._place = (_what(func, call), tuple(front.shape), {})
        merged = layout.merge(out)
        return merged if merged.dtype == expected.dtype else merged.to(expected.dtype)

    def _apart(self, func: Callable[..., Any], call: CallArgs, expected: CallTrace) -> Tensor:
        raise StaleLayout(f"{op_name(func)} mixes positions")


def _what(func: Callable[..., Any], call: CallArgs) -> str:
    return f"{op_name(func)} on parameter {', '.join(repr(t.name) for t in call.tracked)}"
