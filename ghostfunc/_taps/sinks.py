"""Sinks: the places where uses put the numbers that they read, outside transforms.

A quantity is the cotangent of a tap. Autograd would add the cotangents of a tap up over the uses of
a parameter, and would need a tap per parameter and quantity for it. Where no transform follows what
is read, all uses of a run share one tap, the *anchor*, for which autograd runs their backward
passes. Those add what they read to a sink themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.dense_gradients import give_dense
from ghostfunc._base.losses import FiniteLosses, check_shape, refuse_unseen
from ghostfunc._base.torch_private import unrounded
from ghostfunc._base.types import PyTree
from ghostfunc._factors.beside_total import RunningTotal
from ghostfunc._quantities.readers import PositionsReader, ValueReader
from ghostfunc._taps.few_calls import FewCalls
from ghostfunc._taps.mode import TapMode
from ghostfunc._taps.positions import recut_of
from ghostfunc._taps.tap import ANCHOR, Sinks, SinkUse
from ghostfunc._taps.use import Use
from ghostfunc._trace.fitting import TracedModel
from ghostfunc._trace.tracked import ReaderKey, constants
from ghostfunc._trace.watch import gradients

Ready: TypeAlias = Callable[[int, Tensor], None]
"""Gets the gradient of a parameter, by number, when it is whole."""


@dataclass(frozen=True)
class SinkRun:
    """What a backward pass into sinks leaves.

    Attributes:
        losses: `[n]`.
        grads: gradients of the parameters asked for, by number; None stands for zero.
        mode: the mode that watched the run; its `uses` have what is kept of them.
        sinks: with what was read; nothing for parameters that the losses do not depend on.
    """

    losses: Tensor
    grads: dict[int, Tensor | None]
    mode: TapMode
    sinks: Sinks

    def cotangent(self, use: SinkUse) -> Tensor:
        """That of a collected use's tapped tensor; zero where the losses do not depend on it."""
        b = self.sinks.cotangents.get(use.use_number)
        assert use.blank is not None
        return use.blank() if b is None else b


def run_into_sinks(
    model: TracedModel,
    readers: dict[ReaderKey, Any],
    *,
    grads: Collection[int],
    running: dict[int, RunningTotal],
    collect: Collection[int],
    cotangent: float | Tensor,
    summed: Collection[int],
    finite: FiniteLosses,
    ready: Ready | None = None,
    by_autograd: bool = False,
) -> SinkRun:
    """Run a model under taps, outside transforms, and pull its losses back by plain autograd.

    Args:
        readers: of every parameter that is read, one per quantity.
        grads: parameters whose training gradient is wanted; those of `running` are added up there.
        collect: parameters the cotangents of whose uses are kept.
        cotangent: of the losses.
        summed: quantities that are added up over parameters.
        finite: gets the losses, to look at them later.
        ready: gets gradients asked for as soon as they are whole, by number: most of them. Those of
            parameters that others derive from and that samples meet, too, come up at the end.
        by_autograd: autograd forms the training gradients, in its own order and dtypes.
    """
    leaves, spec = model.leaves, model.spec
    by_position = any(isinstance(reader, PositionsReader) for reader in readers.values())
    giving = [r for r in readers.values() if isinstance(r, ValueReader) and r.quantity.gives_total]
    few_calls = FewCalls(summed) if summed or giving else None
    sinks = Sinks(frozenset(collect), frozenset(summed), few_calls, by_position)
    anchor = leaves[0].new_empty(()).requires_grad_()
    guards = [x.detach().requires_grad_() for x in leaves]
    # A gradient that comes by way of derived tensors is autograd's to add up.
    primals = {
        i: leaves[i].detach().requires_grad_()
        for i in grads
        if i not in running or i in model.trace.derived_from
    }
    tracked = constants(leaves, spec, guards)
    for i, primal in primals.items():
        tracked[i].primal, tracked[i].formed_by_autograd = primal, by_autograd
    for i, total in running.items():
        tracked[i].running = total
    for key, reader in readers.items():
        tracked[key[1]].readers[key] = (reader, reader)
    taps = {ANCHOR: anchor}
    recut = None if model.packing is None else recut_of(model)
    mode = TapMode(
        model.trace, tracked, model.n, taps, {}, sinks=sinks, recut=recut, shapes=model.shapes
    )
    params: PyTree = spec.unflatten(guards)
    with torch.enable_grad(), mode:
        losses = model.model_fn(params, model.batch)
    mode.finish()
    check_shape(losses, model.n)
    if ready is not None:
        _send_when_whole(mode.uses, leaves, running, primals, ready)
    sinks.open = True  # until here, the model may have pulled something back itself
    with unrounded(losses):
        given = [*primals.values(), *guards, anchor]
        found = gradients(losses, given, as_cotangent(losses, cotangent))
        if sinks.few_calls is not None:
            sinks.few_calls.finish(sinks.add)
    finite.add(losses)
    refuse_unseen(spec, found[len(primals) : -1])
    out: dict[int, Tensor | None] = dict.fromkeys(grads)
    out.update(zip(primals, found, strict=False))
    for i, total in running.items():
        if total.value is not None:
            whole, of_derived = total.value.view_as(leaves[i]), out[i]
            out[i] = whole if of_derived is None else whole.add_(of_derived)
    return SinkRun(losses.detach(), out, mode, sinks)


def _send_when_whole(
    uses: Sequence[Use],
    leaves: Sequence[Tensor],
    running: dict[int, RunningTotal],
    primals: dict[int, Tensor],
    ready: Ready,
) -> None:
    """Have `ready` called during the backward pass that begins now."""
    for i, primal in primals.items():
        if i not in running:
            primal.register_hook(partial(give_dense, ready, i))
    for i, total in running.items():
        if i in primals:
            continue
        targets = (target for use in uses for _, target in use.targets)
        total.to_come = sum(target.running is total for target in targets)
        total.whole = partial(_viewed_to, ready, i, leaves[i])


def _viewed_to(ready: Ready, i: int, leaf: Tensor, total: Tensor) -> None:
    ready(i, total.view_as(leaf))


def as_cotangent(losses: Tensor, cotangent: float | Tensor) -> Tensor:
    """A cotangent of the losses, like them."""
    if isinstance(cotangent, Tensor):
        return cotangent.to(losses)
    return torch.full_like(losses, cotangent)
