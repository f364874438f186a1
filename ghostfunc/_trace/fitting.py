"""The trace that fits a batch: one that is remembered, or a new one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ghostfunc._base.documents import Documents, Packing
from ghostfunc._base.errors import (
    WAYS_OUT,
    ControlFlowError,
    SampleAxisError,
    UnsupportedAlwaysError,
    UnsupportedOpError,
)
from ghostfunc._base.program import Program
from ghostfunc._base.purity import not_captured, prove_independent, refuse_batched
from ghostfunc._base.remembered import SHAPES, STRUCTURES, Recent, memory, shapes_key, structure
from ghostfunc._base.torch_private import any_symbolic, followed, wrapped
from ghostfunc._base.trees import batch_size, tensors_of
from ghostfunc._base.types import Check, PyTree
from ghostfunc._trace.layout import StaleLayout
from ghostfunc._trace.make import few_to_trace, trace_model
from ghostfunc._trace.trace import Trace, WayTaken

T = TypeVar("T")


MAX_TRACES = 32
"""Traces of one structure that are remembered."""

REMEMBERED = 4096
"""Proofs that are remembered of a model function. The oldest are forgotten, and made again."""

FAILED_TRACES = 2
"""How many traces are made of one batch, each of other samples, before the call is given up because
they were disproved, or could not be made."""


class Proofs(Recent[Hashable, bool]):
    """What has been proved and disproved of one model function: see `_taps/proof.py`."""

    def __init__(self) -> None:
        super().__init__(REMEMBERED)
        self._turns = itertools.count(1)

    def turn(self) -> int:
        """A number that nobody was given before."""
        return next(self._turns)


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
    """A program with its trace, ready to be run on one batch. Made by `with_trace` and `traced`.

    Whoever has one hands it on in place of the program: its trace is not looked up again.

    Attributes:
        packing: how the samples share rows, if they are documents.
    """

    batch: PyTree
    n: int
    trace: Trace
    packing: Packing | None

    @staticmethod
    def on(program: Program, batch: PyTree, n: int, trace: Trace) -> TracedModel:
        """The program, which followed `trace` on a batch like this one, of n samples."""
        own = program.model_fn, program.leaves, program.spec, program.randomness
        packing = batch.packing if isinstance(batch, Documents) else None
        return TracedModel(*own, batch, n, trace, packing)

    @property
    def rows(self) -> int:
        """What the model takes for samples: they, or the rows that documents share."""
        return self.n if self.packing is None else self.packing.rows

    @functools.cached_property
    def shapes(self) -> Hashable:
        """The exact shapes of the batch and of the parameters."""
        return shapes_key((self.batch, self.leaves))

    @property
    def proofs(self) -> Proofs:
        return memory(self.model_fn, Proofs)

    def proof_key(self, way: WayTaken) -> Hashable:
        """What a proof of a run's gradients holds for."""
        layout = None if self.packing is None else self.packing.layout
        return self.trace, way, self.shapes, layout

    def needs_proof_every_run(self, way: WayTaken) -> bool:
        """Whether a proof does not hold for the next run at the same shapes. Other values may have
        the program mix or reorder samples in another way. A layout that was guessed may be wrong
        for them, and so may calls that no trace has seen."""
        if self.trace.statistics or self.trace.guessed:
            return True
        return self.n > 1 and (self.trace.reorders or not way.seen)

    def is_proved(self, way: WayTaken, asked: Hashable) -> bool:
        """Whether nothing is left to prove of a run, and of what was `asked` of it."""
        proofs, key = self.proofs, self.proof_key(way)
        known = proofs.get(key) and proofs.get((key, asked))
        return bool(known) and not self.needs_proof_every_run(way)


def with_trace(
    run: Callable[[TracedModel], T], program: Program, batch: PyTree
) -> tuple[TracedModel, T]:
    """`run` the program with a trace that fits this batch: a remembered one, or else a new one. Of
    a program that has its trace for this very batch, from `with_trace` or `traced`, nothing is
    looked up."""
    tried, unproved = None, ""
    if isinstance(program, TracedModel) and program.batch is batch:
        try:
            return program, run(program)
        except StaleLayout as stale:
            tried, unproved = program.trace, _disproved(stale)
    program = plain(program)
    if followed():
        refuse_batched(program.leaves, batch)
    n = batch_size(batch)
    known = _look_up(program, batch)
    for trace in known.in_order():
        if trace is tried:
            continue
        model = TracedModel.on(program, batch, n, trace)
        try:
            result = run(model)
        except StaleLayout as stale:
            unproved = _disproved(stale)
            continue  # control flow went another way: perhaps one that was traced before
        known.remember(trace)
        return model, result
    if any_symbolic(tensors_of(batch)):
        raise not_captured()
    model, result = _with_new_trace(run, program, batch, unproved)
    known.remember(model.trace)
    return model, result


@dataclass(frozen=True)
class _Known:
    """The traces that are remembered of batches like one.

    Attributes:
        traces: of its structure, the latest first.
        fitting: by structure and shapes, the one that fitted last.
        shapes: its structure and shapes.
    """

    traces: list[Trace]
    fitting: Recent[Hashable, Trace]
    shapes: Hashable

    @property
    def last_fitting(self) -> Trace | None:
        """The trace that fitted the last batch of these shapes; None if there was none."""
        found = self.fitting.get(self.shapes)
        return found if found in self.traces else None

    def in_order(self) -> list[Trace]:
        """The traces, the likeliest first, without those that were guessed: this batch may tell
        what others left open."""
        first = self.last_fitting
        every = self.traces if first is None else [first, *_without(self.traces, first)]
        return [x for x in list(every) if not x.guessed]

    def remember(self, trace: Trace) -> None:
        """Put the trace of the last run first, and try it first at these shapes. Other threads may
        do so at the same time."""
        others = [x for x in _without(self.traces, trace) if not x.guessed]
        self.traces[:] = [trace, *others][:MAX_TRACES]
        self.fitting.put(self.shapes, trace)


def _without(traces: Sequence[Trace], one: Trace) -> list[Trace]:
    return [x for x in list(traces) if x is not one]


def _look_up(program: Program, batch: PyTree) -> _Known:
    remembered, own = memory(program.model_fn, Traces), structure(program, batch)
    traces = remembered.traces.made(own, list)
    return _Known(traces, remembered.fitting, (own, shapes_key(batch)))


def _with_new_trace(
    run: Callable[[TracedModel], T], program: Program, batch: PyTree, unproved: str
) -> tuple[TracedModel, T]:
    """`with_trace` of a trace that is made now. `unproved` is what was wrong with a known one."""
    observed, refused = "", None
    for number, few in enumerate(few_to_trace(program, batch)):
        if (unproved or refused) and number >= FAILED_TRACES:
            break
        try:
            trace = trace_model(program, batch, few)
        except UnsupportedAlwaysError:
            raise
        except (ControlFlowError, SampleAxisError, UnsupportedOpError) as error:
            refused = refused or error  # other samples may go another way, and the batch's own
            continue
        model = TracedModel.on(program, batch, batch_size(batch), trace)
        try:
            return model, run(model)
        except StaleLayout as stale:
            observed, unproved = str(stale), _disproved(stale)
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


def _disproved(stale: StaleLayout) -> str:
    return str(stale) if isinstance(stale, Disproved) else ""


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


def traced(program: Program, batch: PyTree) -> TracedModel:
    """The program with a trace that fits this batch, made now if there is none."""
    return with_trace(lambda model: None, program, batch)[0]


def known_trace(program: Program, batch: PyTree) -> Trace | None:
    """The trace that fitted the last batch of these shapes; None if there was none."""
    return _look_up(program, batch).last_fitting


def prove_plain(program: Program, batch: PyTree, check: Check = "new") -> None:
    """`prove_independent`, before a pass that needs no trace. Where a trace of such batches says
    that samples of the next one may depend on each other, every batch is proved."""
    traces = [] if check == "never" else list(_look_up(program, batch).traces)
    prove_independent(program, batch, anew=any(x.statistics or x.reorders for x in traces))


def plain(program: Program) -> Program:
    """The program at its parameters without the caller's autograd history, but inside the caller's
    transforms."""
    leaves = [x.detach() if x.requires_grad and not wrapped(x) else x for x in program.leaves]
    return replace(program, leaves=leaves)
