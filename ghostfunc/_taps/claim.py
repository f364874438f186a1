"""What a proof is about: a run, what is claimed of it, and what plain autograd says of the same
samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.company import Part
from ghostfunc._base.definition import weighted_gradient, weighted_gradients
from ghostfunc._base.dtypes import coarsest_of, wide
from ghostfunc._base.errors import CoupledSamplesError
from ghostfunc._base.losses import close
from ghostfunc._base.purity import coupled_samples, taken_in_any_company
from ghostfunc._base.trees import take
from ghostfunc._base.types import ContractDtype, Randomness
from ghostfunc._taps.readings import Read
from ghostfunc._trace.fitting import TracedModel
from ghostfunc._trace.trace import WayTaken

TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 2e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.1,
}
"""Relative errors that are rounding, by the coarsest dtype of a run."""

FLOOR = 0.02
"""Share of the largest parameter's numbers below which a parameter's may be rounding noise."""

NOT_THEIRS = "The numbers of ghost mode are not those of plain autograd"


class Dots(NamedTuple):
    """What a run read along one direction.

    Attributes:
        dots: `<g_i^p, v^p>`, `[n]` for every parameter.
    """

    losses: Tensor
    dots: Sequence[Tensor]
    way: WayTaken

    @property
    def table(self) -> Tensor:
        """The dots, `[P, n]`, in float64."""
        return torch.stack([wide(x).detach().double().cpu() for x in self.dots])


@dataclass(frozen=True)
class Claim:
    """A run, and what is claimed of it.

    Attributes:
        way: what tells its way through the program from others.
        losses: `[n]`.
        dots: makes `<g_i^p, v^p>` with the run's trace, for values of the parameters, a direction,
            and factors that the losses are multiplied by on the way.
        read: what the run read; asked for it `again`, what another run of this batch reads.
        asked: what tells what was read from other questions.
    """

    model: TracedModel
    way: WayTaken
    losses: Tensor
    dots: Callable[[TracedModel, Sequence[Tensor], Tensor], Dots]
    read: Callable[[bool], Read]
    asked: Callable[[], Hashable]

    def dots_by(
        self,
        model: TracedModel,
        v: Sequence[Tensor],
        factors: Tensor,
        seed: int,
        randomness: Randomness,
    ) -> Dots:
        """`dots`; of a model that draws random numbers, as plain autograd will draw them."""
        if randomness == "different":
            torch.manual_seed(seed)
        return self.dots(model, v, factors)

    def read_by(self, seed: int, randomness: Randomness) -> Read:
        """What the run read; of a model that draws random numbers, what another run reads that
        draws as plain autograd will."""
        if randomness == "error":
            return self.read(False)
        torch.manual_seed(seed)
        return self.read(True)


class Coupling(NamedTuple):
    """Samples that have another loss in other company."""

    samples: list[int]
    error: CoupledSamplesError


Use = Callable[[list[Tensor]], None]
"""Takes what a backward pass made, parameter by parameter."""


@dataclass(frozen=True)
class Alone:
    """Plain autograd on some samples of a run.

    Attributes:
        losses: the run's, `[n]`, which are to be met again in other company.
    """

    model: TracedModel
    losses: Tensor
    randomness: Randomness
    seed: int

    def run(self, part: Part, passes: Sequence[tuple[Tensor, Use]]) -> Coupling | None:
        """One forward pass of a part's samples, and backward passes of weighted sums of their
        losses; whether the losses of those that are its own are the run's. Models that draw random
        numbers draw the same for all samples alone."""
        model = self.model
        if self.randomness == "different":
            torch.manual_seed(self.seed)
        rows = part.rows
        batch = model.batch if rows == list(range(model.n)) else take(model.batch, rows)
        weights = [w for w, _ in passes]
        uses = iter([use for _, use in passes])
        with taken_in_any_company(self._whole, model.n):
            losses = weighted_gradients(
                model, batch, weights, lambda grads: next(uses)(grads), watched=True
            )
        own = [k for k, counts in enumerate(part.own) if counts]
        found, expected = losses[own], self.losses[rows].detach()[own]
        dtype = coarsest(model)
        if self.randomness != "error" or close(found, expected, dtype):
            return None
        pairs = enumerate(zip(found.split(1), expected.split(1), strict=True))
        off = [k for k, (x, y) in pairs if not close(x, y, dtype)]
        error = coupled_samples(
            f"in the batch, some samples have losses {expected[:8].tolist()}; beside "
            f"other samples, they have {found[:8].tolist()}",
            model.batch,
        )
        return Coupling([rows[own[k]] for k in off or range(len(own))], error)

    def _whole(self) -> None:
        model = self.model
        weighted_gradient(model, model.batch, torch.ones(model.n, device="cpu"))

    def gradient(self, part: Part, weights: Tensor) -> list[Tensor] | Coupling:
        """`sum_i w_i g_i` of a part's samples."""
        found: list[list[Tensor]] = []
        return self.run(part, [(weights, found.append)]) or found[0]


def coarsest(model: TracedModel) -> torch.dtype:
    """The dtype of the run with the fewest digits, products counted."""
    return coarsest_of({x.dtype for x in model.leaves} | model.trace.dtypes)


def tolerance_of(model: TracedModel, contract_dtype: ContractDtype) -> float:
    """The relative error that is rounding."""
    dtypes = [coarsest(model), *([] if contract_dtype is None else [contract_dtype])]
    return max(TOLERANCES[x] for x in dtypes)
