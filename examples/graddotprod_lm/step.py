"""One step's losses, gradient and scores: the place to change how they are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ghostfunc as gf
from examples.graddotprod_lm.world import World

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What a step computes.

    Attributes:
        losses: `[n]`, of this process's samples.
        grads: of the mean loss over all processes' samples.
        dot_prods: `[n]`, `<g_i, g_val>` with `g_val` the mean over all processes' validation
            samples; None for a training without scores.
    """

    losses: Tensor
    grads: dict[str, Tensor]
    dot_prods: Tensor | None


StepFn = Callable[[Batch, Batch], Step]


def make_step(
    model: nn.Module, method: str, dtype: str, world: World, *, compiled: bool = False
) -> StepFn:
    """The function of a training and a validation batch that `train.py` calls at every step.

    The model's parameters are read at every call, so an optimizer that writes to them is seen.

    Args:
        model: of this process; the same in all.
        method: "GradDotProd" or "Regular".
        dtype: "bfloat16" runs the model under autocast.
        world: whose gradients are averaged.
        compiled: run every call of ghostfunc as one compiled program.
    """
    losses_of, params = gf.hf.causal_lm(model)

    def model_fn(p: dict[str, Tensor], batch: Batch) -> Tensor:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return losses_of(p, batch)

    def alone(train: Batch, val: Batch) -> gf.GhostStep:
        return gf.ghost_value_and_grad(model_fn, params, train, val)

    def direction(val: Batch) -> dict[str, Tensor]:
        return gf.direction(model_fn, params, val)

    def along(train: Batch, u: dict[str, Tensor]) -> gf.GhostStep:
        return gf.ghost_value_and_grad(model_fn, params, train, direction=u)

    if compiled:
        alone, direction, along = (
            torch.compile(f, fullgraph=True) for f in (alone, direction, along)
        )

    def scored(train: Batch, val: Batch) -> Step:
        shared = world.size > 1
        result = along(train, world.mean(direction(val))) if shared else alone(train, val)
        return Step(result.losses, world.mean(result.grads), result.dot_prods)

    def regular(train: Batch, val: Batch) -> Step:
        leaves = dict(model.named_parameters())
        losses = model_fn(leaves, train)
        if not losses.isfinite().all():
            raise gf.NonFiniteLossError(f"losses of this step: {losses.tolist()}.")
        grads = torch.autograd.grad(losses.mean(), list(leaves.values()))
        return Step(losses.detach(), world.mean(dict(zip(leaves, grads, strict=True))), None)

    return {"GradDotProd": scored, "Regular": regular}[method]
