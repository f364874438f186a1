"""What `Trainer` divides the losses of a micro-batch by, found by asking it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from ghostfunc._base.errors import VerificationError

TOLERANCE = {"no": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
"""The largest relative difference of two ways to one loss, by mixed precision."""


class Divisor(NamedTuple):
    """What the summed losses of a micro-batch are divided by.

    Attributes:
        counted: by `num_items_in_batch`, the items of all micro-batches of the step. Otherwise by
            the micro-batch's own items: a mean over the micro-batch.
        averaged: by the number of micro-batches of the step as well.
        times: the number of processes that Trainer multiplies by, before it averages over them.
    """

    counted: bool
    averaged: bool
    times: int = 1

    def items(self, own: Tensor, counted: Any) -> Tensor:
        """The items that a micro-batch with `own` ones is divided by."""
        own = own.float()
        items = torch.as_tensor(counted, device=own.device).float() if self.counted else own
        return items / self.times

    def shares(self, micro_batches: int) -> int:
        """The micro-batches that the loss of one is divided by as well."""
        return micro_batches if self.averaged else 1


def divisor_of(
    trainer: Trainer, loss_with: Callable[[Any], float], counted: Any, tolerance: float
) -> Divisor:
    """Find out what a trainer divides by.

    Heads that are told `num_items_in_batch` need not use it: a loss that is halved when the number
    is doubled does, one that stays as it is does not.

    Args:
        trainer: whose settings say what is done with the loss of a micro-batch.
        loss_with: the trainer's loss of one micro-batch, as a function of the number it is told.
        counted: that number, None where the trainer counts nothing.
        tolerance: relative.
    """
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        told = trainer.model_accepts_loss_kwargs and counted is not None
        scaled = bool(told) or trainer.compute_loss_func is not None
    if counted is None:
        return Divisor(counted=False, averaged=not scaled)
    one, two = loss_with(counted), loss_with(2 * counted)
    if abs(one - two) <= tolerance * abs(one):
        return Divisor(counted=False, averaged=not scaled)
    if abs(one / 2 - two) <= tolerance * abs(one):
        return Divisor(counted=True, averaged=not scaled)
    raise VerificationError(
        f"The loss that would be trained is {one:.6g} with num_items_in_batch={int(counted)} and "
        f"{two:.6g} with twice as many: it is neither a sum over items divided by that number nor "
        "a mean of its own. A part of it may not belong to samples: a router's load balancing "
        "loss (set config.output_router_logits=False or its coefficient to 0), or a penalty on "
        "weights (weight_decay trains one; AdaLoRA's cannot be switched off)."
    )


def compare(ours: float, theirs: float, tolerance: float, where: str) -> None:
    """Raise unless the samples' losses add up to the trainer's."""
    if abs(ours - theirs) <= tolerance * abs(theirs):
        return
    raise VerificationError(
        f"The losses of the samples add up to {ours:.6g}, but Trainer's loss of {where} is "
        f"{theirs:.6g}: weights or scores would be others. Pass sample_loss=f with "
        "f(module, batch) -> [n] whose mean over a batch is the loss that the model returns, or "
        "gf.hf.SampleLoss(sums, counts) whose sums are divided by the number of items (tokens) of "
        "the batch."
    )


def loss_of(trainer: Trainer, model: nn.Module, inputs: Mapping[str, Any], counted: Any) -> float:
    """The trainer's own loss of a batch."""
    if counted is not None:
        counted = torch.as_tensor(counted)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=counted)
    return float(cast(Tensor, loss))
