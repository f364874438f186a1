"""The numbers that a run read, held against their definition: those of a few samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.company import beside_others
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import CoupledSamplesError
from ghostfunc._base.torch_private import unrounded
from ghostfunc._base.types import Randomness
from ghostfunc._taps.claim import (
    FLOOR,
    NOISE,
    NOT_THEIRS,
    Alone,
    Claim,
    coarsest,
    loss_sizes,
    tolerance_of,
)
from ghostfunc._taps.readings import Read, Reading, off_by
from ghostfunc._trace.fitting import Disproved


def compare_numbers(
    claim: Claim, seed: int, randomness: Randomness, *, few: int, turn: int
) -> CoupledSamplesError | Disproved | None:
    """What is wrong with the numbers that were read of a few samples. Another `turn` draws others;
    another `seed` puts them beside others."""
    model = claim.model
    read = claim.read_by(seed, randomness)
    chosen = _chosen(read, model.n, few, turn)
    if not chosen:
        return None
    alone = Alone(model, read.losses, randomness, seed)
    order = np.random.default_rng([seed, turn]).permutation(model.n).tolist()
    found: list[list[Tensor]] = []
    for i in chosen:
        rows = list(range(model.n))
        if randomness == "error":
            beside = chosen if model.packing is None else [i]
            rows = beside_others(beside, order, model.packing)
        weights = torch.zeros(len(rows), dtype=torch.float64)
        weights[rows.index(i)] = 1
        one = alone.gradient(rows, weights)
        if isinstance(one, CoupledSamplesError):
            return one
        found.append(one)
    index = torch.tensor(chosen, device=read.losses.device)
    with unrounded(read.losses):
        grads = [torch.stack(column).detach() for column in zip(*found, strict=True)]
        for reading in read.readings:
            wrong = _wrong(alone, reading, grads, index)
            if wrong is not None:
                return wrong
    return None


def _chosen(read: Read, n: int, few: int, turn: int) -> list[int]:
    """The samples to be looked at."""
    if not read.readings:
        return []
    first = min(reading.samples or n for reading in read.readings)
    finite = read.losses[:first].isfinite().nonzero().flatten().tolist()
    return sorted(np.random.default_rng([n, turn]).permutation(finite)[:few].astype(int).tolist())


def _wrong(
    alone: Alone, reading: Reading, grads: Sequence[Tensor], index: Tensor
) -> CoupledSamplesError | Disproved | None:
    """What is wrong with one quantity of the samples `index`, whose gradients are
    `[s, *shape]`."""
    model, company = alone.model, None
    if reading.samples is not None:
        rows = list(range(reading.samples, model.n))
        weights = torch.ones(len(rows), dtype=torch.float64)
        if isinstance(reading.scale, Tensor):
            weights = reading.scale[rows].detach().double().cpu()
        total = alone.gradient(rows, weights)
        if isinstance(total, CoupledSamplesError):
            return total
        company = [wide(x) for x in total]
    tolerance = tolerance_of(model, reading.contract_dtype)
    norms = torch.stack([wide(g).reshape(len(g), g[0].numel()).norm(dim=1) for g in grads]).double()
    reach = tolerance * torch.maximum(norms, FLOOR * norms.max(0).values)
    noise = NOISE * torch.finfo(coarsest(model)).eps * loss_sizes(alone.losses[index])
    wrong = off_by(reading, grads, company, index, torch.maximum(reach, noise.to(reach)), tolerance)
    if not wrong:
        return None
    names = {i: repr(name) for i, name in enumerate(model.spec.names)}
    listed = ", ".join(names.get(i, "all of them") for i in list(wrong)[:5])
    worst = max(wrong.values())
    return Disproved(f"{NOT_THEIRS} at parameter {listed} ({reading.what} off by {worst:.1e})")
