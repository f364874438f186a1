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
    asked = [(reading, _company(alone, reading)) for reading in read.readings]
    # Whole gradients are as large as the model: only pairs need two of them at a time.
    together = any(reading.pairs for reading in read.readings)
    for samples in [chosen] if together else [[i] for i in chosen]:
        grads = _gradients(alone, chosen, order, samples)
        if isinstance(grads, CoupledSamplesError):
            return grads
        index = torch.tensor(samples, device=read.losses.device)
        with unrounded(read.losses):
            for reading, company in asked:
                if isinstance(company, CoupledSamplesError):
                    return company
                wrong = _wrong(alone, reading, grads, company, index)
                if wrong is not None:
                    return wrong
        del grads
    return None


def _gradients(
    alone: Alone, chosen: list[int], order: list[int], samples: list[int]
) -> list[Tensor] | CoupledSamplesError:
    """The gradients of some of the `chosen` samples, `[s, *shape]` per parameter, beside others in
    a random `order`."""
    model = alone.model
    found: list[list[Tensor]] = []
    for i in samples:
        rows = list(range(model.n))
        if alone.randomness == "error":
            beside = chosen if model.packing is None else [i]
            rows = beside_others(beside, order, model.packing)
        weights = torch.zeros(len(rows), dtype=torch.float64)
        weights[rows.index(i)] = 1
        one = alone.gradient(rows, weights)
        if isinstance(one, CoupledSamplesError):
            return one
        found.append([g.detach() for g in one])
    if len(found) == 1:
        return [g[None] for g in found[0]]
    return [torch.stack(column) for column in zip(*found, strict=True)]


def _company(alone: Alone, reading: Reading) -> list[Tensor] | CoupledSamplesError | None:
    """The sum of the gradients that the reading is beside."""
    if reading.samples is None:
        return None
    rows = list(range(reading.samples, alone.model.n))
    weights = torch.ones(len(rows), dtype=torch.float64)
    if isinstance(reading.scale, Tensor):
        weights = reading.scale[rows].detach().double().cpu()
    total = alone.gradient(rows, weights)
    return total if isinstance(total, CoupledSamplesError) else [wide(x) for x in total]


def _chosen(read: Read, n: int, few: int, turn: int) -> list[int]:
    """The samples to be looked at."""
    if not read.readings:
        return []
    first = min(reading.samples or n for reading in read.readings)
    finite = read.losses[:first].isfinite().nonzero().flatten().tolist()
    return sorted(np.random.default_rng([n, turn]).permutation(finite)[:few].astype(int).tolist())


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
    noise = NOISE * torch.finfo(coarsest(model)).eps * loss_sizes(alone.losses[index])
    wrong = off_by(reading, grads, company, index, torch.maximum(reach, noise.to(reach)), tolerance)
    if not wrong:
        return None
    names = {i: repr(name) for i, name in enumerate(model.spec.names)}
    listed = ", ".join(names.get(i, "all of them") for i in list(wrong)[:5])
    worst = max(wrong.values())
    return Disproved(f"{NOT_THEIRS} at parameter {listed} ({reading.what} off by {worst:.1e})")
