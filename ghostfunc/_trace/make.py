"""Tracing: where parameters meet samples, and where the sample axis lies there.

Guessing the sample axis from one shape is how silent errors are made, so the model is run three
times on a few samples, without keeping anything (`purity` has shown before that their losses do
not depend on each other):

1. on a few samples, 0 and 1 as a rule: the shapes of every torch call (`purity` makes this run);
2. on those and the first of them again: an axis that grew holds samples, and a tensor computed from
   parameters whose shape did not change is derived;
3. the same, with a zero tap at every use, pulled back from one loss at a time: rows with a
   cotangent are that sample's, which tells sample-major from position-major folding and shows
   once more that samples do not talk. A cotangent that reaches a parameter past the taps is a use
   that was not seen.

What is learnt is kept by structure, not by length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.documents import apart, packing_of
from ghostfunc._base.errors import (
    WAYS_OUT,
    GhostError,
    InPlaceError,
)
from ghostfunc._base.losses import check_losses, close
from ghostfunc._base.program import Program
from ghostfunc._base.purity import MODEL_FAILED, lend, prove_independent, unreached
from ghostfunc._base.trees import batch_size, take
from ghostfunc._base.types import PyTree
from ghostfunc._trace.probe import checkpoints_refused, probe_uses
from ghostfunc._trace.record import Recorder, ShapeLog
from ghostfunc._trace.sample_axis import allowed, settled
from ghostfunc._trace.trace import Trace, pattern
from ghostfunc._trace.tracked import constants
from ghostfunc._trace.watch import op_key, reads_attribute

PAIRS_TRIED = 32
"""Samples among which one is looked for that goes the way of the batch."""

SIZES_TRIED = (2, 3, 4, 5, 6, 8)
"""Numbers of samples that may go the way of the batch where two of them do not."""

WHOLE_TRIED = 16
"""Samples of a batch that may be traced as a whole."""


class Few(NamedTuple):
    """Samples that stand for a batch in a trace, and how many of them are there twice in the run
    that shows what grows."""

    rows: tuple[int, ...]
    more: int = 1

    @property
    def with_more(self) -> tuple[int, ...]:
        return *self.rows, *self.rows[: self.more]


def few_to_trace(program: Program, batch: PyTree) -> Iterator[Few]:
    """Samples that may stand for the batch: the first two, and if those go another way through the
    program (none of them is padded, say), pairs that call the same ops. Two even of one: code may
    treat a batch of one in its own way. Where the way depends on the number of samples, there are
    more of them, and one, two or as many again besides."""
    n = batch_size(batch)
    yield Few((0, min(1, n - 1)))

    def way(rows: tuple[int, ...]) -> list[Callable[..., Any]]:
        log = ShapeLog()
        data = batch if rows == tuple(range(n)) else apart(take(batch, list(rows)))
        with log, torch.enable_grad():
            program.losses(lend(program.leaves), data)
        return [func for func, _, _ in log.calls]

    whole = way(tuple(range(n)))

    @functools.cache
    def same(rows: tuple[int, ...]) -> bool:
        try:
            return way(rows) == whole
        except MODEL_FAILED:
            return False  # a number of samples that the model does not take

    pairs = [Few((0, i)) for i in range(2, min(n, PAIRS_TRIED))]
    sizes = *SIZES_TRIED, *([n] if 1 < n <= WHOLE_TRIED else [])
    more = [Few(tuple(i % n for i in range(k)), m) for k in sizes for m in (1, 2, k)]
    for few in dict.fromkeys((*pairs, *more[1:])):
        if same(few.rows) and same(few.with_more):
            yield few


@torch.enable_grad()
def trace_model(program: Program, batch: PyTree, few: Few) -> Trace:
    """Trace `model_fn` on a few samples of the batch.

    Documents are traced in rows of their own, where a row is a sample: what is found of rows holds
    for those that several documents share.

    Samples that depend on each other are looked for first. Whatever goes wrong later, they may be
    the reason: they are then looked for in the whole batch.
    """
    log = ShapeLog()
    packed = packing_of(batch) is not None  # the pair that is compared shares rows
    seen = prove_independent(program, batch, log=None if packed else log)
    plain = None if packed or seen is None or (0, seen[0]) != few.rows else seen[1]
    try:
        if plain is None:
            log, small = ShapeLog(), apart(take(batch, list(few.rows)))
            params = program.spec.unflatten(lend(program.leaves))
            with log:
                plain = program.model_fn(params, small)
            plain = check_losses(plain, len(few.rows)).detach()
        return _traced(program, batch, few, log, plain)
    except (GhostError, *MODEL_FAILED):
        prove_independent(program, batch)
        raise


def _traced(program: Program, batch: PyTree, few: Few, log: ShapeLog, plain: Tensor) -> Trace:
    """The trace, given the calls and the losses of a run on the few samples."""
    k, large = len(few.rows), apart(take(batch, list(few.with_more)))
    n = k + few.more
    tracked = constants(program.leaves, program.spec)
    recorder = Recorder(tracked, log, k, n, large)
    with checkpoints_refused(), recorder:
        losses = program.losses([t.shown for t in tracked], large)
    losses = check_losses(losses, n).detach()  # its graph need not outlive it
    recorder.release()
    if program.randomness == "error" and not close(losses[:k], plain):
        raise InPlaceError(
            f"Losses are {plain.tolist()} in a plain run and {losses[:k].tolist()} in a traced "
            "one: model_fn writes in place to tensors that are views of others, or depends on "
            f"something besides its arguments. {WAYS_OUT}"
        )

    uses = [s for s in recorder.recorded if s.trace.kind == "use"]
    marks = probe_uses(program, large, recorder.recorded, uses)
    if not uses and program.leaves:
        raise unreached()
    found = [
        allowed(s, m, k, n, program.randomness)
        for s, m in zip(uses, zip(*marks, strict=True), strict=True)
    ]
    calls = iter(settled(uses, found))
    counts = [0] * len(program.leaves)
    for use in uses:
        for leaf in (leaf for target in use.tracked for leaf in target.leaves()):
            counts[leaf] += 1
    trace = Trace(
        tuple(op_key(func) for func, _, _ in log.calls if not reads_attribute(func)),
        tuple(next(calls) if s.trace.kind == "use" else s.trace for s in recorder.recorded),
        tuple(counts),
        tuple(pattern(*entry) for entry in log.calls if not reads_attribute(entry[0])),
        recorder.reorders,
        recorder.statistics.seen,
        recorder.reads.seen or recorder.statistics.chosen,
        frozenset(recorder.reads.numbers),
        frozenset(recorder.dtypes),
        frozenset(recorder.orders.keeping),
        recorder.orders.by_values,
        any(len(own) > 1 for own in found),
    )
    return trace
