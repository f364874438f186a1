"""Per-sample losses for the usual heads of Hugging Face models.

Every function takes a model that maps a batch's tensors to `.logits`, and returns
`(model_fn, params)` as `from_module` does. The batch is a dict of tensors: `labels`, and whatever
the model's `forward` takes. The model's own loss, which averages over the batch, is not used.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError
from ghostfunc._base.module import from_module
from ghostfunc._base.types import ModelFn
from ghostfunc.hf._logits import IGNORED, check_head, chunked_token_means, token_losses

Batch = dict[str, Tensor]


def causal_lm(
    model: nn.Module, *, logit_chunks: int | None = None
) -> tuple[ModelFn, dict[str, Tensor]]:
    """Next-token prediction: each sample's mean over its own labelled tokens.

        losses[i] = sum_t [y_it != -100] CE(logits_i(t-1), y_it) / sum_t [y_it != -100],  t >= 1

    Args:
        model: a `...ForCausalLM` / `...LMHeadModel`.
        logit_chunks: compute logits and losses in that many pieces along the positions, and again
            in the backward pass, so that the `[n, T, V]` logits never exist as a whole. Numbers do
            not change. Where gradients of the head are kept as factors (norms and Gram matrices,
            a validation batch of few tokens), the logits' cotangents are kept with them, in pieces.

    Returns:
        `(model_fn, params)`. The batch is `dict(input_ids [n, T], attention_mask [n, T]?,
        labels [n, T]?, ...)`. Without `labels` the input ids are the labels, except where
        `attention_mask` is 0. A sample without a labelled token has no loss and is refused
        (`NonFiniteLossError`). Mind the scale: a token of a short sample weighs more than one of a
        long sample, unlike in a loss averaged over all tokens of a batch.

    Raises:
        OptionError: `logit_chunks` is no positive integer, or the model does more between its
            hidden states and its logits than to apply its output embeddings (scaling, a soft cap).
    """
    if logit_chunks is not None:
        check_head(model, logit_chunks)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        inputs = dict(batch)
        labels = inputs.pop("labels", None)
        if labels is None:
            labels = _need(inputs, "input_ids")
            if "attention_mask" in inputs:
                labels = labels.masked_fill(inputs["attention_mask"] == 0, IGNORED)
        if logit_chunks is not None:
            return chunked_token_means(module, inputs, labels, logit_chunks)
        logits = module(**inputs, use_cache=False).logits
        # The labels are shifted, not the logits: a slice of those is copied, forward and backward.
        return token_means(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED))

    return from_module(model, loss)


def masked_lm(model: nn.Module) -> tuple[ModelFn, dict[str, Tensor]]:
    """Masked-token prediction: each sample's mean over its own labelled tokens.

    Args:
        model: a `...ForMaskedLM`.

    Returns:
        `(model_fn, params)`. The batch is `dict(input_ids [n, T], labels [n, T],
        attention_mask?, ...)`, labels -100 wherever nothing is to be predicted.
    """

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        inputs = dict(batch)
        labels = _pop_labels(inputs)
        return token_means(module(**inputs).logits, labels)

    return from_module(model, loss)


def sequence_classification(model: nn.Module) -> tuple[ModelFn, dict[str, Tensor]]:
    """Cross-entropy of one label per sequence; squared error for a single regression output.

    Args:
        model: a `...ForSequenceClassification`.

    Returns:
        `(model_fn, params)`. The batch is `dict(input_ids [n, T], labels [n], ...)`; integer labels
        are classes, floating-point labels targets of a regression (mean over its outputs).
    """
    return _classification(model)


def image_classification(model: nn.Module) -> tuple[ModelFn, dict[str, Tensor]]:
    """Cross-entropy of one label per image.

    Args:
        model: a `...ForImageClassification`.

    Returns:
        `(model_fn, params)`. The batch is `dict(pixel_values [n, C, H, W], labels [n])`.
    """
    return _classification(model)


def _classification(model: nn.Module) -> tuple[ModelFn, dict[str, Tensor]]:
    def loss(module: nn.Module, batch: Batch) -> Tensor:
        inputs = dict(batch)
        labels = _pop_labels(inputs)
        logits = module(**inputs).logits
        if labels.is_floating_point():
            return (logits - labels.reshape(logits.shape)).square().mean(1)
        return F.cross_entropy(wide(logits), labels, reduction="none")

    return from_module(model, loss)


def token_means(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy `[n]`: each sample's mean over its own labelled positions.

    Args:
        logits: `[n, T, V]`.
        labels: `[n, T]`, -100 where nothing is to be predicted.
    """
    return token_losses(logits, labels).sum(1) / (labels != IGNORED).sum(1)


def _pop_labels(inputs: Batch) -> Tensor:
    labels = _need(inputs, "labels")
    del inputs["labels"]
    return labels


def _need(inputs: Batch, name: str) -> Tensor:
    if name not in inputs:
        raise BatchError(f"the batch has no {name!r}; it has {sorted(inputs)}.")
    return inputs[name]
