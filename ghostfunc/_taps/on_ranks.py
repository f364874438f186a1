"""A run that several ranks make together, each of its own samples, with one sharded model.

A run communicates wherever a parameter is made whole, so all ranks have to make it equally often.
What it takes besides follows from a rank's own samples: a trace where their structure is new, a
proof where their way is. There every rank is given the whole parameters and is by itself; whether
there is need of it on any rank, all of them are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from torch import Tensor

from ghostfunc._base.errors import WAYS_OUT, ControlFlowError
from ghostfunc._base.processes.in_step import InStep, OtherRankRetries
from ghostfunc._base.processes.pieces import held_whole, refuse_other_samples, whole_likes
from ghostfunc._base.program import Program
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import Check, PyTree
from ghostfunc._taps.proof import gradients_unproved
from ghostfunc._trace.fitting import TracedModel, known_trace
from ghostfunc._trace.layout import StaleLayout
from ghostfunc._trace.trace import Trace, WayTaken

ATTEMPTS = 4
"""How often ranks look at a batch again before its way through the program counts as unsteady."""


class Went(Protocol):
    """What is asked of the result of a run."""

    @property
    def losses(self) -> Tensor: ...

    @property
    def way(self) -> WayTaken: ...


R = TypeVar("R", bound=Went)

Look = Callable[[Program], object]
"""Traces and proves a program at whole parameters on this rank's batch."""


@dataclass(frozen=True)
class Together:
    """A run of one batch per rank.

    Attributes:
        ranks: that make it.
        look: what a rank does by itself where something is new to it.
    """

    ranks: InStep
    program: Program
    batch: PyTree
    look: Look
    check: Check

    def run(self, asked: Callable[[TracedModel], R]) -> tuple[TracedModel, R]:
        """What is `asked` of the model with a trace that fits this rank's batch."""
        refuse_other_samples(self.program, self.batch)
        looked, n = False, batch_size(self.batch)
        trace = self._known()
        for _ in range(ATTEMPTS):
            looked |= self._look(trace is None, "asking whether all ranks have a trace")
            trace = self._known() if trace is None else trace
            assert trace is not None
            model = TracedModel.on(self.program, self.batch, n, trace)
            try:
                with self.ranks.in_step("running the model", retries=(StaleLayout,)):
                    taken = asked(model)
            except StaleLayout:
                trace = None
                continue
            except OtherRankRetries:
                continue
            unproved = not looked and gradients_unproved(
                replace(model, leaves=self._likes()), taken.way, self.check
            )
            self._look(unproved, "asking whether all ranks have a proof")
            return model, taken
        raise ControlFlowError(
            "model_fn does not call the same ops each time it runs on this rank's batch, or on "
            f"another's: its control flow depends on its data. {WAYS_OUT}"
        )

    def _known(self) -> Trace | None:
        return known_trace(self.program, self.batch)

    def _look(self, new: bool, place: str) -> bool:
        """Look at the batch where it is new; the whole parameters come from all ranks."""
        if not self.ranks.any(place, new):
            return False
        whole = held_whole(self.program, self.batch)
        with self.ranks.apart("looking at a new batch"):
            if new:
                self.look(whole)
        return new

    def _likes(self) -> list[Tensor]:
        """The shapes of the whole parameters, of which proofs are."""
        return list(whole_likes(self.program))
