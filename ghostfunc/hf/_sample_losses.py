"""The losses that `transformers.Trainer` trains, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss import loss_utils

from ghostfunc._base.errors import OptionError
from ghostfunc.hf._logits import IGNORED
from ghostfunc.hf._losses import Batch


class SampleLoss(NamedTuple):
    """A batch loss written as `sum_i sums[i] / N`, N the number of items of the whole batch.

    Attributes:
        sums: `sums(module, batch) -> [n]`: each sample's loss, summed over its items.
        items: `items(batch) -> [n]`: how many items (labelled tokens, say) a sample has.
    """

    sums: Callable[[nn.Module, Batch], Tensor]
    items: Callable[[Batch], Tensor]


def one_item_each(loss: Callable[[nn.Module, Batch], Tensor]) -> SampleLoss:
    """A loss that is the mean over the samples of `loss(module, batch) -> [n]`."""

    def items(batch: Batch) -> Tensor:
        first = next(iter(batch.values()))
        return torch.ones(len(first), device=first.device)

    return SampleLoss(loss, items)


def sample_loss_of(model: nn.Module | None) -> SampleLoss:
    """The loss of a model of transformers."""
    function = model.loss_function if isinstance(model, PreTrainedModel) else None
    if function not in SAMPLE_LOSSES:
        raise OptionError(
            f"GhostTrainer does not know the loss of {type(model).__name__}; it knows the models "
            f"whose loss is {', '.join(f.__name__ for f in SAMPLE_LOSSES)}. Pass sample_loss=f, "
            "f(module, batch) -> [n], one loss per sample, whose mean over the batch is the loss "
            "that the model returns."
        )
    return SAMPLE_LOSSES[function]


def _causal(module: nn.Module, batch: Batch) -> Tensor:
    logits = module(**_without_labels(batch), use_cache=False).logits
    return _token_sums(logits[:, :-1], batch["labels"][:, 1:])


def _aligned(module: nn.Module, batch: Batch) -> Tensor:
    return _token_sums(module(**_without_labels(batch)).logits, batch["labels"])


def _token_sums(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.view(labels.shape).sum(1)


def _classes(module: nn.Module, batch: Batch) -> Tensor:
    logits, labels = module(**_without_labels(batch)).logits, batch["labels"]
    if labels.is_floating_point():
        raise OptionError(
            "GhostTrainer trains classifiers with integer labels; these are floating-point. Pass "
            "sample_loss=f with f(module, batch) -> [n], whose mean is the loss you train."
        )
    return F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=IGNORED)


def _without_labels(batch: Batch) -> Batch:
    return {k: x for k, x in batch.items() if k != "labels"}


def _labelled(labels: Tensor) -> Tensor:
    return (labels.reshape(len(labels), -1) != IGNORED).sum(1)


_CLASSES = SampleLoss(_classes, lambda batch: _labelled(batch["labels"]))
_ALIGNED = SampleLoss(_aligned, lambda batch: _labelled(batch["labels"]))

SAMPLE_LOSSES: dict[Any, SampleLoss] = {
    loss_utils.ForCausalLMLoss: SampleLoss(
        _causal, lambda batch: _labelled(batch["labels"][:, 1:])
    ),
    loss_utils.ForMaskedLMLoss: _ALIGNED,
    loss_utils.ForTokenClassification: _ALIGNED,
    loss_utils.ForSequenceClassificationLoss: _CLASSES,
}
"""By the loss function of a model of transformers."""
