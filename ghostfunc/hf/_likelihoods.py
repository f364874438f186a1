"""The likelihoods of the losses of this package, for curvatures that draw labels."""

from __future__ import annotations

from torch import Tensor, nn

from ghostfunc._base.module import from_module
from ghostfunc.curvature import Likelihood, softmax
from ghostfunc.hf._logits import IGNORED
from ghostfunc.hf._losses import Batch, without_labels


def causal_lm_likelihood(model: nn.Module) -> Likelihood:
    """How `gf.hf.causal_lm` makes its losses of logits: for `gf.curvature.ekfac` and `ggn`.

    Args:
        model: the model that `causal_lm` was given. Batches are those of `causal_lm`.

    Returns:
        A `Likelihood`: next tokens are drawn at every labelled position by itself, given the text
        as it is.
    """

    def labels(batch: Batch) -> Tensor:
        own = batch.get("labels")
        if own is None:
            own = batch["input_ids"]
            if "attention_mask" in batch:
                own = own.masked_fill(batch["attention_mask"] == 0, IGNORED)
        return own[:, 1:]

    def logits(module: nn.Module, batch: Batch) -> Tensor:
        out: Tensor = module(**without_labels(batch), use_cache=False).logits[:, :-1]
        return out

    return softmax(from_module(model, logits)[0], labels, ignore_index=IGNORED)


def masked_lm_likelihood(model: nn.Module) -> Likelihood:
    """How `gf.hf.masked_lm` makes its losses of logits.

    Args:
        model: the model that `masked_lm` was given. Batches are those of `masked_lm`.
    """
    return softmax(from_module(model, _logits)[0], lambda b: b["labels"], ignore_index=IGNORED)


def classification_likelihood(model: nn.Module) -> Likelihood:
    """How `gf.hf.sequence_classification` and `image_classification` make losses of logits.

    Args:
        model: the model that they were given. Labels are integers; for targets of a regression use
            `gf.curvature.gaussian(..., reduction="mean")`.
    """
    return softmax(from_module(model, _logits)[0], lambda b: b["labels"])


def _logits(module: nn.Module, batch: Batch) -> Tensor:
    out: Tensor = module(**without_labels(batch)).logits
    return out
