"""The loss of a model on batches of whatever form its `forward` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from examples.graddotprod_lm.world import World

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def call(model: nn.Module, inputs: Inputs, labels: Tensor) -> Any:
    """`model(X, labels=Y)`, `model(*X, labels=Y)` or `model(**X, labels=Y)`, by the type of X."""
    match inputs:
        case Tensor():
            return model(inputs, labels=labels)
        case Mapping():
            return model(**inputs, labels=labels)
        case tuple() | list():
            return model(*inputs, labels=labels)
    raise TypeError(f"a batch's X is a tensor, a tuple or a dict of tensors, not {type(inputs)}.")


@torch.no_grad()
def estimate_loss(
    model: nn.Module, batches: Iterable[tuple[Inputs, Tensor]], world: World, *, dtype: str
) -> float:
    """Mean loss per predicted token over the batches of all processes.

    Args:
        model: its output has `.loss`, a mean over the labels that are not -100, shifted by one.
        batches: pairs `(X, Y)`: X a tensor, a tuple or a dict (`model(**X, labels=Y)`).
        world: whose batches are averaged.
        dtype: "bfloat16" runs the model under autocast.

    Raises:
        ValueError: there is nothing to predict.
    """
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for inputs, labels in batches:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = call(model, inputs, labels).loss
        n = (labels[:, 1:] != -100).sum()
        total += torch.stack([loss.double() * n, n.double()])
    model.train(training)
    loss_sum, tokens = world.sum(total).tolist()
    if tokens == 0:
        raise ValueError("the batches have no label to predict.")
    return loss_sum / tokens
