"""What a proof is about: a run, what is claimed of it, and what plain autograd says of the same
samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.definition import weighted_gradient
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import CoupledSamplesError
from ghostfunc._base.losses import close
from ghostfunc._base.purity import coupled_samples
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

NOISE = 16
"""Units in the last place of a loss, or of one, that a derivative of it may be rounded by."""

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
        dots: makes `<g_i^p, v^p>` with the run's trace, for a direction and values of the
            parameters.
        read: what the run read; asked for it `again`, what another run of this batch reads.
        asked: what tells what was read from other questions.
    """

    model: TracedModel
    way: WayTaken
    losses: Tensor
    dots: Callable[[TracedModel, Sequence[Tensor]], Dots]
    read: Callable[[bool], Read]
    asked: Callable[[], Hashable]

    def dots_by(
        self, model: TracedModel, v: Sequence[Tensor], seed: int, randomness: Randomness
    ) -> Dots:
        """`dots`; of a model that draws random numbers, as plain autograd will draw them."""
        if randomness == "different":
            torch.manual_seed(seed)
        return self.dots(model, v)

    def read_by(self, seed: int, randomness: Randomness) -> Read:
        """What the run read; of a model that draws random numbers, what another run reads that
        draws as plain autograd will."""
        if randomness == "error":
            return self.read(False)
        torch.manual_seed(seed)
        return self.read(True)


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

    def gradient(
        self, rows: list[int], weights: Tensor, own: list[bool] | None = None
    ) -> list[Tensor] | CoupledSamplesError:
        """`sum_i w_i g_i` of some rows, and whether the losses of those that are their `own` are
        the run's. Models that draw random numbers draw the same for all rows alone."""
        model = self.model
        if self.randomness == "different":
            torch.manual_seed(self.seed)
        batch = model.batch if rows == list(range(model.n)) else take(model.batch, rows)
        losses, grads = weighted_gradient(model, batch, weights)
        expected = self.losses[rows].detach()
        mask = torch.tensor(own or [True] * len(rows), device=losses.device)
        same = close(losses[mask], expected[mask], coarsest(model))
        if self.randomness == "error" and not same:
            return coupled_samples(
                f"in the batch, some samples have losses {expected[mask][:8].tolist()}; beside "
                f"other samples, they have {losses[mask][:8].tolist()}",
                model.batch,
            )
        return grads


def loss_sizes(losses: Tensor) -> Tensor:
    """What derivatives of losses are rounded by is in proportion to these."""
    return losses.detach().abs().clamp_min(1).double().cpu()


def coarsest(model: TracedModel) -> torch.dtype:
    """The dtype of the run with the fewest digits."""
    dtypes = {x.dtype for x in model.leaves} | model.trace.dtypes
    return max(dtypes & TOLERANCES.keys(), key=lambda x: torch.finfo(x).eps)


def tolerance_of(model: TracedModel, contract_dtype: ContractDtype) -> float:
    """The relative error that is rounding."""
    dtypes = [coarsest(model), *([] if contract_dtype is None else [contract_dtype])]
    return max(TOLERANCES[x] for x in dtypes)
