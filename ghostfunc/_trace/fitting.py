"""The trace that fits a batch: one that is remembered, or a new one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ghostfunc._base.documents import Packing, packing_of
from ghostfunc._base.errors import (
    WAYS_OUT,
    ControlFlowError,
    SampleAxisError,
    UnsupportedOpError,
)
from ghostfunc._base.program import Program
from ghostfunc._base.purity import not_captured, prove_independent
from ghostfunc._base.remembered import SHAPES, STRUCTURES, Recent, memory, shapes_key, structure
from ghostfunc._base.torch_private import any_symbolic, wrapped
from ghostfunc._base.trees import batch_size, tensors_of
from ghostfunc._base.types import PyTree
from ghostfunc._trace.layout import StaleLayout
from ghostfunc._trace.make import few_to_trace, trace_model
from ghostfunc._trace.trace import Trace

T = TypeVar("T")


MAX_TRACES = 32
"""Traces of one structure that are remembered."""

FAILED_TRACES = 2
"""How many traces are made of one batch, each of other samples, before the call is given up because
they were disproved, or could not be made."""


@dataclass(frozen=True)
class Traces:
    """The traces of one model function.

    Attributes:
        traces: by structure, the latest first.
        fitting: by structure and shapes, the one that fitted last.
    """

    traces: Recent[Hashable, list[Trace]] = field(default_factory=lambda: Recent(STRUCTURES))
    fitting: Recent[Hashable, Trace] = field(default_factory=lambda: Recent(SHAPES))


@dataclass(frozen=True, eq=False)
class TracedModel(Program):
    """A program with its trace, ready to be run on one batch. Made by `with_trace`.

    Attributes:
        packing: how the samples share rows, if they are documents.
    """

    batch: PyTree
    n: int
    trace: Trace
    packing: Packing | None

    @staticmethod
    def on(program: Program, batch: PyTree, trace: Trace) -> TracedModel:
        """The program, which followed `trace` on a batch like this one."""
        own = program.model_fn, program.leaves, program.spec, program.randomness
        return TracedModel(*own, batch, batch_size(batch), trace, packing_of(batch))

    @property
    def rows(self) -> int:
        """What the model takes for samples: they, or the rows that documents share."""
        return self.n if self.packing is None else self.packing.rows

    @functools.cached_property
    def shapes(self) -> Hashable:
        """The exact shapes of the batch and of the parameters."""
        return shapes_key((self.batch, self.leaves))


def with_trace(
    use: Callable[[TracedModel], T], program: Program, batch: PyTree
) -> tuple[TracedModel, T]:
    """`use` a trace that fits this batch: one of those remembered, or a new one."""
    program = plain(program)
    batch_size(batch)  # raises for what is no batch
    remembered = memory(program.model_fn, Traces)
    own = structure(program, batch)
    traces = remembered.traces.made(own, list)
    fitting, shapes = remembered.fitting, (own, shapes_key(batch))
    first = fitting.get(shapes)
    unproved = ""
    for trace in [*([first] if first in traces else []), *(x for x in traces if x is not first)]:
        model = TracedModel.on(program, batch, trace)
        try:
            result = use(model)
        except StaleLayout as stale:
            unproved = str(stale) if isinstance(stale, Disproved) else ""
            continue  # control flow went another way: perhaps one that was traced before
        _remember(traces, fitting, trace, shapes)
        return model, result
    if any_symbolic(tensors_of(batch)):
        raise not_captured()
    observed, refused = "", None
    for number, few in enumerate(few_to_trace(program, batch)):
        if (unproved or refused) and number >= FAILED_TRACES:
            break
        try:
            trace = trace_model(program, batch, few)
        except (ControlFlowError, SampleAxisError, UnsupportedOpError) as error:
            if error.__cause__ is not None:
                raise  # torch raised first: an operator that no mode sees into, in any number
            refused = refused or error  # other samples may go another way, and the batch's own
            continue
        model = TracedModel.on(program, batch, trace)
        try:
            result = use(model)
        except StaleLayout as stale:
            observed = str(stale)
            unproved = observed if isinstance(stale, Disproved) else ""
            continue
        _remember(traces, fitting, trace, shapes)
        return model, result
    prove_independent(program, batch)
    if refused is not None:
        raise refused
    if unproved:
        raise not_proved(unproved)
    raise ControlFlowError(
        "model_fn does not call the same ops each time it runs on this batch "
        f"({observed}): its control flow depends on its data, or on how many samples there are. "
        + WAYS_OUT
    )


def _remember(
    traces: list[Trace], fitting: Recent[Hashable, Trace], trace: Trace, shapes: Hashable
) -> None:
    """Put the trace of the last run first, and try it first at these shapes. Other threads may do
    so at the same time."""
    traces[:] = [trace, *(x for x in list(traces) if x is not trace)][:MAX_TRACES]
    fitting.put(shapes, trace)


class Disproved(StaleLayout):
    """A trace does not fit, though all shapes do. Leaves the package as `SampleAxisError`, if no
    other trace fits either."""


def not_proved(observed: str) -> SampleAxisError:
    """What the caller is told where no trace could be proved."""
    return SampleAxisError(
        f"{observed}. Either rows are ascribed to the wrong samples (model_fn reorders samples by "
        "their values: it sorts them, packs sequences, or routes rows to experts), or an op's rule "
        "or gradient is wrong. Keep the samples in their order where parameters meet them. "
        f"{WAYS_OUT}"
    )


def trace_of(program: Program, batch: PyTree) -> Trace:
    """A trace of the model, made now if there is none."""
    return with_trace(lambda model: model.trace, program, batch)[1]


def known_trace(program: Program, batch: PyTree) -> Trace | None:
    """The trace that fitted the last batch of these shapes; None if there was none."""
    remembered = memory(program.model_fn, Traces)
    own = structure(program, batch)
    found = remembered.fitting.get((own, shapes_key(batch)))
    return found if found in (remembered.traces.get(own) or ()) else None


def plain(program: Program) -> Program:
    """The program at its parameters without the caller's autograd history, but inside the caller's
    transforms."""
    leaves = [x.detach() if x.requires_grad and not wrapped(x) else x for x in program.leaves]
    return replace(program, leaves=leaves)
