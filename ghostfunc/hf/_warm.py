"""One micro-batch through the taps, and what is done before the first of a kind."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ghostfunc._base.processes.pieces import in_step, on_any_rank
from ghostfunc._base.program import Program
from ghostfunc._base.remembered import structure
from ghostfunc._base.types import ModelFn
from ghostfunc._quantities.quantity import Quantity
from ghostfunc._taps.use_shapes import use_shapes
from ghostfunc._transforms.factored import kept_and_gradient
from ghostfunc._transforms.vjp import GhostVjp, ghost_vjp

Batch = dict[str, Any]


def one_pass(
    model_fn: ModelFn,
    params: dict[str, Tensor],
    batch: Batch,
    read: Mapping[str, Quantity],
    grads: Literal[True, "autograd"],
) -> GhostVjp:
    """Losses, gradient and values of a micro-batch."""
    return ghost_vjp(model_fn, params, batch, dict(read), grads=grads, randomness="different")


def keep_pass(model_fn: ModelFn, params: dict[str, Tensor], batch: Batch) -> Any:
    """Losses, factors and gradient of a micro-batch."""
    return kept_and_gradient(model_fn, params, batch)


def look_first(
    model_fn: ModelFn,
    params: dict[str, Tensor],
    batch: Batch,
    looked_at: set[Hashable],
) -> None:
    """Have the model traced and proved now, so that its own draws are all that is drawn in
    training: the same as without scores.

    A trace holds for all values of the parameters. It is made where none is zero as a whole, as one
    half of fresh adapters is: gradients that vanish with it do not tell whose rows are whose.
    """
    program = Program.of(model_fn, params, "different")
    key = structure(program, batch)
    place = "asking whether all processes have seen batches like theirs"
    with torch.random.fork_rng():
        if on_any_rank(model_fn, place, flag=key not in looked_at):
            moved = {
                k: x if bool(x.any()) else x + 0.02 * torch.randn_like(x) for k, x in params.items()
            }
            ghost_vjp(model_fn, moved, batch, {}, grads=True, randomness="different")
            looked_at.add(key)
        if in_step(model_fn) is None:
            use_shapes(program, batch, exact=True)
