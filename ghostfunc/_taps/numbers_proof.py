"""The numbers that a run read, held against their definition: those of a few samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.company import Part
from ghostfunc._base.dtypes import wide
from ghostfunc._base.torch_private import unrounded
from ghostfunc._taps import rounding
from ghostfunc._taps.claim import (
    FLOOR,
    NOT_THEIRS,
    Alone,
    Coupling,
    coarsest,
    tolerance_of,
)
from ghostfunc._taps.readings import Read, Reading, off_by
from ghostfunc._trace.fitting import Disproved


@dataclass
class FewSamples:
    """What a run read of a few samples, held against whole gradients as they come up.

    Attributes:
        alone: plain autograd on samples of the run.
        chosen: the samples.
        others: the samples that those are beside, where a reading is of a batch and another one.
        wrong: what is wrong with what the run read.
    """

    alone: Alone
    read: Read
    chosen: list[int]
    others: list[int]
    wrong: Disproved | None = None
    _company: list[Tensor] | None = None
    _waiting: dict[int, list[Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(alone: Alone, read: Read, few: int, turn: int) -> FewSamples:
        """Another `turn` draws other samples."""
        n = alone.model.n
        beside = [x.samples for x in read.readings if x.samples is not None]
        first = min(beside, default=n)
        finite = read.losses[:first].isfinite().nonzero().flatten().tolist()
        drawn = np.random.default_rng([n, turn]).permutation(finite)[:few].astype(int)
        chosen = sorted(drawn.tolist()) if read.readings else []
        return FewSamples(alone, read, chosen, list(range(first, n)) if chosen else [])

    def weights_of_others(self, rows: list[int]) -> Tensor:
        """What the losses of samples that others are beside are multiplied by."""
        scale = next(x.scale for x in self.read.readings if x.samples is not None)
        if isinstance(scale, Tensor):
            return scale[rows].detach().double().cpu()
        return torch.ones(len(rows), dtype=torch.float64, device="cpu")

    def add_others(self, grads: list[Tensor]) -> None:
        """Take the gradient of the samples that others are beside."""
        grads = [wide(g) for g in grads]
        if self._company is not None:
            grads = [x + y for x, y in zip(self._company, grads, strict=True)]
        self._company = grads

    def add(self, i: int, grads: list[Tensor]) -> None:
        """Take a sample's gradient. Whole gradients are as large as the model: only pairs need two
        of them at a time."""
        self._waiting[i] = [g.detach() for g in grads]
        if any(reading.pairs for reading in self.read.readings) and len(self._waiting) < len(
            self.chosen
        ):
            return
        samples = sorted(self._waiting)
        found = [self._waiting.pop(k) for k in samples]
        stacked = [g[None] for g in found[0]]
        if len(found) > 1:
            stacked = [torch.stack(column) for column in zip(*found, strict=True)]
        index = torch.tensor(samples, device=self.read.losses.device)
        with unrounded(self.read.losses):
            for reading in self.read.readings:
                company = self._company if reading.samples is not None else None
                self.wrong = self.wrong or _wrong(self.alone, reading, stacked, company, index)


def _wrong(
    alone: Alone,
    reading: Reading,
    grads: Sequence[Tensor],
    company: Sequence[Tensor] | None,
    index: Tensor,
) -> Disproved | None:
    """What is wrong with one quantity of the samples `index`, whose gradients are
    `[s, *shape]`."""
    model = alone.model
    tolerance = tolerance_of(model, reading.contract_dtype)
    norms = torch.stack([wide(g).reshape(len(g), g[0].numel()).norm(dim=1) for g in grads]).double()
    reach = tolerance * torch.maximum(norms, FLOOR * norms.max(0).values)

    def off(noise: Tensor) -> dict[int, float]:
        return off_by(
            reading, grads, company, index, torch.maximum(reach, noise.to(reach)), tolerance
        )

    unit = rounding.NOISE * torch.finfo(coarsest(model)).eps
    noise, most = (
        (unit * rounding.loss_sizes(alone.losses, at_most=x))[index.cpu()] for x in (False, True)
    )
    wrong = off(noise)
    if wrong and bool((noise < most).any()) and not (wrong := off(most)):
        found = _seen(alone, index.tolist())
        if isinstance(found, Coupling):
            return Disproved(str(found.error))
        wrong = off(torch.maximum(noise, torch.minimum(found, most)))
    if not wrong:
        return None
    names = {i: repr(name) for i, name in enumerate(model.spec.names)}
    listed = ", ".join(names.get(i, "all of them") for i in list(wrong)[:5])
    worst = max(wrong.values())
    return Disproved(f"{NOT_THEIRS} at parameter {listed} ({reading.what} off by {worst:.1e})")


def _seen(alone: Alone, samples: list[int]) -> Tensor | Coupling:
    """The rounding noise of samples' gradients, `[P, s]`."""
    found = []
    for i in samples:
        rows = [i, i] if alone.randomness == "error" else list(range(alone.model.n))
        weights = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        weights[rows.index(i)] = 1
        noise = rounding.seen(alone, Part(rows, [False] * len(rows)), weights)
        if isinstance(noise, Coupling):
            return noise
        found.append(noise)
    return torch.stack(found, 1)
