"""A claim beside plain autograd, which runs the batch in parts: one pass over its samples.

Every part has its losses, which have to be the run's: samples are in other company there. The few
samples whose whole gradients are wanted are a part by themselves, with a backward pass each; of the
others, one backward pass takes the gradient of their weighted sum. A validation batch that shares a
run is a part as well, as its gradient is that of the batch by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.company import Part, beside_others, in_parts
from ghostfunc._base.purity import prove_independent
from ghostfunc._base.types import Randomness
from ghostfunc._taps.claim import Alone, Claim, Coupling, Use
from ghostfunc._taps.gradients_proof import AlongOneDirection
from ghostfunc._taps.numbers_proof import FewSamples
from ghostfunc._trace.fitting import Disproved


class Asked(NamedTuple):
    """What is to be proved.

    Attributes:
        gradients: whether the run's gradients are.
        few: of how many samples the numbers that were read are.
        turn: tells which samples those are, and which parts.
        apart: samples that are looked at by themselves.
    """

    gradients: bool
    few: int
    turn: int
    apart: tuple[int, ...] = ()


class Wrong(NamedTuple):
    """What is wrong with either, if anything is."""

    gradients: Disproved | None
    numbers: Disproved | None


def compare(claim: Claim, seed: int, randomness: Randomness, asked: Asked) -> Coupling | Wrong:
    """What is wrong with the claim, seen with the random numbers of a seed."""
    model, along = claim.model, None
    if asked.gradients:
        along = AlongOneDirection.of(claim, seed, randomness)
        if along is None:  # losses are all there is to compare
            prove_independent(model, model.batch)
    read = claim.read_by(seed, randomness)
    alone = Alone(model, read.losses, randomness, seed)
    numbers = FewSamples.of(alone, read, asked.few, asked.turn)
    order = np.random.default_rng([seed, asked.turn]).permutation(model.n).tolist()
    plans: list[tuple[Alone, list[Part], AlongOneDirection | None, FewSamples | None]] = []
    if along is not None and not along.filled:
        plans = [(along.alone, _parts(along, numbers, order, asked), along, numbers)]
    else:
        if along is not None:
            plans = [(along.alone, _parts(along, None, order, asked), along, None)]
        plans.append((alone, _of_few(numbers, order, asked), None, numbers))
    left = {*numbers.chosen, *numbers.others}
    for by, parts, of_gradients, of_numbers in plans:
        for part in parts:
            coupling = by.run(part, _passes(part, left, of_gradients, of_numbers))
            if coupling is not None:
                return coupling
    found = None if along is None else along.wrong() or along.wrong_sums(read, alone)
    return found if isinstance(found, Coupling) else Wrong(found, numbers.wrong)


def _parts(
    along: AlongOneDirection, numbers: FewSamples | None, order: list[int], asked: Asked
) -> list[Part]:
    """The samples to be compared, in parts; those that others are beside come first."""
    chosen, others = ([], []) if numbers is None else (numbers.chosen, numbers.others)
    model, finite = along.alone.model, {*along.finite, *chosen, *others}
    rows = [i for i in order if i in finite]
    if along.alone.randomness != "error":
        return [Part(sorted(rows), [True] * len(rows))]
    rest = [i for i in rows if i not in others]
    return [*_by_themselves(others), *in_parts(rest, model.packing, chosen, asked.apart)]


def _of_few(numbers: FewSamples, order: list[int], asked: Asked) -> list[Part]:
    """The chosen samples, and those that they are beside."""
    model, chosen = numbers.alone.model, numbers.chosen
    if not chosen:
        return []
    if numbers.alone.randomness != "error":
        return [Part(list(range(model.n)), [True] * model.n)]
    apart = [i for i in chosen if i in asked.apart]
    rest = [i for i in chosen if i not in apart]
    groups = [[i] for i in rest] if model.packing is not None else [rest] if rest else []
    rows = [beside_others(group, order, model.packing) for group in groups]
    parts = [Part(x, [True] * len(x)) for x in rows]
    return [*_by_themselves(numbers.others), *in_parts(apart, None, apart=apart), *parts]


def _by_themselves(others: list[int]) -> list[Part]:
    """A batch that shares a run, in two parts if each has two samples."""
    half = len(others) // 2 if len(others) >= 4 else len(others)
    return [Part(x, [True] * len(x)) for x in (others[:half], others[half:]) if x]


def _passes(
    part: Part, left: set[int], along: AlongOneDirection | None, numbers: FewSamples | None
) -> list[tuple[Tensor, Use]]:
    """The backward passes of a part. Of the samples `left`, it takes those that it has."""
    rows, passes = part.rows, list[tuple[Tensor, Use]]()
    c = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    if along is not None:
        c = torch.where(torch.tensor(part.own, device="cpu"), along.weights[rows], c)

    def add(use: Callable[[list[Tensor]], None] | None, weights: Tensor) -> None:
        """A pass of these weights, which is part of the sum as well if it is of one sample."""
        (met,) = weights.nonzero(as_tuple=True)
        share = float(c[met] / weights[met]) if len(met) == 1 else 0.0
        c[met if share else []] = 0

        def both(grads: list[Tensor]) -> None:
            if use is not None:
                use(grads)
            if along is not None and share:
                along.add(grads, share)

        passes.append((weights, both))

    if numbers is not None:
        others = torch.tensor([i in numbers.others and i in left for i in rows], device="cpu")
        if bool(others.any()):
            left.difference_update({*numbers.others} & {*rows})
            weights = torch.where(others, numbers.weights_of_others(rows), 0)
            add(numbers.add_others, weights)
        for i in [i for i in numbers.chosen if i in left and i in rows]:
            left.discard(i)
            weights = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
            weights[rows.index(i)] = 1
            add(partial(numbers.add, i), weights)
    if along is not None and bool(c.any()):
        passes.append((c, along.add))
    return passes
