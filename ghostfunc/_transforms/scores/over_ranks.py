"""Scores and steps whose samples lie on the ranks of a process group.

A sample's score is the business of the rank that has it. What the ranks share is two gradients,
each a mean over the samples of all of them: the validation gradient, which every score is a dot
product with, and the training gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.processes.pieces import refuse_group
from ghostfunc._base.processes.ranks import Exchange, Ranks
from ghostfunc._base.processes.same_weights import count_call, number_of, said_of_weights
from ghostfunc._base.program import Program
from ghostfunc._base.remembered import STRUCTURES, Recent, memory
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import PyTree
from ghostfunc._transforms.factored import FactoredGrads
from ghostfunc._transforms.scores.question import Question


@dataclass(frozen=True)
class _Orders:
    """The order that gradients of one model function came up in, by the number of parameters."""

    arrived: Recent[int, list[int]] = field(default_factory=lambda: Recent(STRUCTURES))


@dataclass(frozen=True)
class AskedOfAll:
    """A question about this rank's train samples, against directions of all ranks.

    Attributes:
        numbers: of train samples, rank by rank.
        order: that gradients come up in, the same on all ranks.
    """

    ranks: Ranks
    asked: Question
    numbers: list[int]
    order: list[int]

    @property
    def program(self) -> Program:
        return self.asked.program

    def scores(self) -> PyTree:
        """`Question.scores`."""
        with self.ranks.phase("computing the scores"):
            return self.asked.scores()

    def positions(self) -> PyTree:
        """`Question.positions`."""
        with self.ranks.phase("computing the scores"):
            return self.asked.positions()

    def step(self) -> tuple[Tensor, list[Tensor], PyTree]:
        """Losses and scores of this rank's samples, and the gradient of the mean over all."""
        leaves, own = self.asked.program.leaves, self.numbers[self.ranks.rank]
        with self.ranks.phase("exchanging the training gradient") as phase:
            exchange = phase.exchange(leaves, self.order, own / sum(self.numbers))
            losses, grads, scores = self.asked.step(exchange.give)
            exchange.give_rest(grads)
        _remember(self.asked, exchange)
        sums = exchange.sums()
        return losses, [x.to(leaf.dtype) for x, leaf in zip(sums, leaves, strict=True)], scores


def asked_of_all(group: Any, call: str, make: Callable[[], Question]) -> AskedOfAll:
    """The question that `make` validates, with validation batches replaced by the gradient of all
    ranks' samples.

    Raises:
        RankError: another rank failed, is gone, or was given something else.
    """
    ranks = Ranks(group, call)
    with ranks.phase("reading its arguments") as phase:
        asked = make()
        _check(asked, call)
        program = asked.program
        weights = said_of_weights(program.model_fn, program.spec.names, program.leaves)
        phase.alike = f"{_outline(asked)}, {weights}{_directions(asked)}"
        phase.number = batch_size(asked.train)
    count_call(program.model_fn, program.leaves)
    order = ranks.from_first(_order_of(asked), "agreeing on the order of gradients")
    numbers, targets = phase.numbers, asked.targets
    found = [_direction(ranks, asked, val, order) for val in targets.vals]
    targets = replace(targets, vals=(), directions=(*found, *targets.directions))
    return AskedOfAll(ranks, replace(asked, targets=targets), numbers, order)


def _order_of(asked: Question) -> list[int]:
    """The parameters in the order that their gradients came up in last time; at first, matrices
    before vectors, many of which wait for the end of a backward pass."""
    leaves = asked.program.leaves
    guess = sorted(range(len(leaves)), key=lambda i: (leaves[i].ndim < 2, -i))
    return memory(asked.program.model_fn, _Orders).arrived.get(len(leaves)) or guess


def _remember(asked: Question, exchange: Exchange) -> None:
    memory(asked.program.model_fn, _Orders).arrived.put(len(asked.program.leaves), exchange.arrived)


def _direction(ranks: Ranks, asked: Question, val: PyTree, order: list[int]) -> list[Tensor]:
    """The gradient of the mean (or the sum) of the losses of all ranks' samples, float32 or
    wider."""
    mean = asked.reduction == "mean"
    m = batch_size(val)
    with ranks.phase("exchanging the validation gradient") as phase:
        exchange = phase.exchange(asked.program.leaves, order, float(m) if mean else 1.0)
        phase.number = m
        exchange.give_rest(asked.direction_of(val, ready=exchange.give))
    sums = exchange.sums()
    return [x.div_(sum(phase.numbers)) for x in sums] if mean else sums


def _check(asked: Question, call: str) -> None:
    refuse_group(asked.program.model_fn, call)
    if asked.reduction == "none":
        raise OptionError(
            f'{call} got a group and reduction="none": the validation samples of other ranks are '
            'not here to tell apart. Use reduction="mean" or "sum"; or give every rank the same '
            "validation samples and leave out group=."
        )


def _directions(asked: Question) -> str:
    """What ranks with the same directions say alike: what is kept is of a rank's own samples."""
    given = [u for u in asked.targets.directions if not isinstance(u, FactoredGrads)]
    return f", directions {number_of([x for u in given for x in u]):x}" if given else ""


def _outline(asked: Question) -> str:
    """What has to be alike on all ranks: how many tensors travel, of which shapes."""
    leaves, targets = asked.program.leaves, asked.targets
    shapes = [(tuple(x.shape), str(x.dtype)) for x in leaves]
    known_by = hashlib.sha256(repr((asked.program.spec.names, shapes)).encode()).hexdigest()[:8]
    params = f"{len(leaves)} parameters of {sum(x.numel() for x in leaves)} elements ({known_by})"
    kept = sum(isinstance(u, FactoredGrads) for u in targets.directions)
    given = f"{len(targets.vals)} validation batches, {len(targets.directions) - kept} directions"
    kinds = f"{kept} kept gradients, named {targets.names}"
    return f"{params}, {given}, {kinds}, reduction={asked.reduction!r}"
