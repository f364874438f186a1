"""Modules that a tensor parallel plan has placed: whether their ranks have the same samples, and
whether what they compute at whole parameters is what the plan computes.

The ranks of a plan share one batch. Each of them runs the module on all of it, at whole parameters,
made so unit by unit, and keeps its pieces of gradients: a plan saves memory, and no operations.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.documents import content
from ghostfunc._base.errors import OptionError, ParamsError, RankError
from ghostfunc._base.locks import alone_with
from ghostfunc._base.losses import close
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.processes.dtensors import is_dtensor
from ghostfunc._base.processes.same_weights import number_of
from ghostfunc._base.processes.sharding import Sharding, reshard
from ghostfunc._base.trees import tensors_of
from ghostfunc._base.types import PyTree, Randomness


def check_alike(sharding: Sharding, tree: PyTree, what: str) -> None:
    """Raise unless the ranks of a plan have the same tensors, to the bit: `what` says which."""
    if sharding.alike:
        with sharding.ranks.apart(f"reading {what}"):
            number = number_of(tensors_of(content(tree)))
        _compare(
            sharding,
            f"comparing {what}",
            number,
            f"{what} that differ: the ranks of a tensor parallel plan share one batch. Give all of "
            "them the same samples, in one order",
        )


def check_randomness(sharding: Sharding, randomness: Randomness) -> None:
    """Raise where samples draw random numbers: they would have others on every rank of a plan."""
    if sharding.alike and randomness != "error":
        raise OptionError(
            f"randomness={randomness!r} is not for modules that parallelize_module has placed: the "
            "ranks of a plan would draw other numbers for the same samples. Call module.eval(), or "
            "use one process with the whole model."
        )


def hold_against_plan(sharding: Sharding, model_fn: ModuleFn, batch: PyTree) -> None:
    """Raise unless a plan's module has, at whole parameters and run without its plan, the losses
    that it has by its plan. All ranks run both."""
    if not sharding.alike:
        return
    ranks, module = sharding.ranks, model_fn.module
    replicated = [
        x
        for name, x in sharding.pieces.items()
        if all(c.summed for c in sharding.shards[name].cuts)
    ]
    _compare(
        sharding,
        "comparing weights",
        number_of(replicated),
        "other weights where the plan cuts none: make them alike, by one seed or a checkpoint",
    )
    whole = copy.copy(model_fn)
    with ranks.in_step("making the module's own parameters whole"):
        whole.sharding = sharding.gathered((), ())[0]
    with ranks.apart("running the module at whole parameters"), torch.no_grad():
        ours: Tensor = whole({}, batch)
    del whole
    with ranks.apart("running the module by its plan"), torch.no_grad(), alone_with(module):
        found: Any = model_fn.loss(module, batch)
        theirs: Tensor = found.full_tensor() if is_dtensor(found) else found
        reshard(module)
        if not ours.isfinite().all():
            return  # said by whoever looks at losses
        if ours.shape != theirs.shape or not close(ours, theirs):
            raise ParamsError(
                f"{type(module).__name__} has losses {theirs.flatten()[:4].tolist()} by its tensor "
                f"parallel plan, and {ours.flatten()[:4].tolist()} at whole parameters without it. "
                "ghostfunc runs the module without its plan: where its code reckons with the sizes "
                "of one rank's part (n_heads // ranks), or a plan of your own computes something "
                "else, give from_module the module before parallelize_module."
            )


def _compare(sharding: Sharding, place: str, number: int, fault: str) -> None:
    """Raise unless the ranks of every plan say the same number."""
    ranks = sharding.ranks
    numbers = ranks.all(place, number)
    for row in sharding.alike:
        if len({numbers[r] for r in row}) > 1:
            listed = ", ".join(map(ranks.named, row))
            raise RankError(f"While {place}: {listed} have {fault}.")
