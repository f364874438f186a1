"""Group relative policy optimisation: the loss of a completion with its advantage."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ghostfunc._base.errors import BatchError
from ghostfunc._base.module import from_module
from ghostfunc._base.options import check_not_negative
from ghostfunc._base.types import ModelFn
from ghostfunc.hf._logits import IGNORED, token_losses
from ghostfunc.hf._losses import Batch, need
from ghostfunc.hf._preferences import one_number_each

OF_LOSS = ("completion_mask", "advantages", "old_per_token_logps", "ref_per_token_logps")


def grpo(
    model: nn.Module, *, beta: float = 0.0, epsilon: float = 0.2, epsilon_high: float | None = None
) -> tuple[ModelFn, dict[str, Tensor]]:
    """One loss per completion, its tokens' mean.

        r_t = exp(log p(y_t) - log p_old(y_t))
        k_t = exp(log p_ref(y_t) - log p(y_t)) - (log p_ref(y_t) - log p(y_t)) - 1
        losses[i] = -mean_t [ min(r_t A_i, clip(r_t, 1 - epsilon, 1 + epsilon_high) A_i)
                              - beta k_t ]

    The advantages `A_i` are constants: that they were made of a whole group's rewards does not
    couple samples. Without `old_per_token_logps` the policy is the one that sampled: `r_t` is 1
    and its gradient that of the log-probability.

    Args:
        model: a `...ForCausalLM`.
        beta: of the divergence from the reference.
        epsilon, epsilon_high: how far the ratio is followed below and above 1; the same by default.

    Returns:
        `(model_fn, params)`. The batch is `dict(input_ids [n, T], completion_mask [n, T],
        advantages [n], attention_mask [n, T]?, old_per_token_logps [n, T]?,
        ref_per_token_logps [n, T]?)`, log-probabilities at the position of their token. A
        completion without a token has no loss (`NonFiniteLossError`).

    Raises:
        OptionError: `epsilon`, `epsilon_high` or `beta` is negative, or no number.
        BatchError: a column is missing, or has another shape.

    Reference:
        Shao et al., "DeepSeekMath", 2024.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    for name, value in (("epsilon", epsilon), ("epsilon_high", high), ("beta", beta)):
        check_not_negative(name, value)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        ids, mask = need(batch, "input_ids"), need(batch, "completion_mask")
        for name in ("completion_mask", "old_per_token_logps", "ref_per_token_logps"):
            if name in batch and batch[name].shape != ids.shape:
                raise BatchError(
                    f"{name} must be {list(ids.shape)} as input_ids is; got "
                    f"{list(batch[name].shape)}."
                )
        inputs = {k: x for k, x in batch.items() if k not in OF_LOSS}
        mask = mask[:, 1:]
        labels = ids[:, 1:].masked_fill(mask == 0, IGNORED)
        logits = cast(Any, module)(**inputs, use_cache=False).logits
        logps = -token_losses(logits[:, :-1], labels)
        old = _at(batch, "old_per_token_logps", logps.detach())
        advantages = need(batch, "advantages")
        one_number_each("advantages", advantages, len(ids))
        advantages = advantages[:, None]
        ratio = (logps - old).exp()
        clipped = ratio.clamp(1 - epsilon, 1 + high)
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
        if beta:
            gap = _at(batch, "ref_per_token_logps", None) - logps
            losses = losses + beta * (gap.exp() - gap - 1)
        return (losses * mask).sum(1) / mask.sum(1)

    return from_module(model, loss)


def _at(batch: Batch, name: str, otherwise: Tensor | None) -> Tensor:
    """Log-probabilities of the tokens that are predicted, or what stands for them."""
    if name in batch or otherwise is None:
        return need(batch, name)[:, 1:]
    return otherwise
