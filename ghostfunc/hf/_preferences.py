"""Losses of samples that own several rows: pairs of a chosen and a rejected answer, and rewards.

A pair is one sample: its rows lie beside each other, `[n, 2, T]`, the chosen one first. A trainer's
own `[2n, T]`, all chosen rows first, is `x.unflatten(0, (2, n)).transpose(0, 1)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc._base.module import check_module, from_module
from ghostfunc._base.options import check_not_negative, check_positive, one_of
from ghostfunc._base.types import ModelFn
from ghostfunc.hf._logits import IGNORED, token_losses
from ghostfunc.hf._losses import Batch, need, next_tokens

PairLoss: TypeAlias = Literal["sigmoid", "hinge", "ipo"]
AnswerTokens: TypeAlias = tuple[Tensor, ...]
"""Of the answers' tokens but the first of a row, each `[n, 2, T - 1]`: log-probabilities, zero
outside the answers, and, where it is asked for, `log sum_v p_v^2` of the distribution that a token
is drawn from, through which no gradient goes."""
PAIR_LOSSES = ("sigmoid", "hinge", "ipo")
SFT_SHARE = "sft_share"
"""By how much a chosen answer's tokens weigh in TRL's "sft": pairs over tokens of a batch."""
OF_LOSS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "margin", SFT_SHARE)
"""What a batch of pairs holds for the loss alone."""


def dpo(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    beta: float = 0.1,
    loss_type: PairLoss = "sigmoid",
) -> tuple[ModelFn, dict[str, Tensor]]:
    """Direct preference optimisation: one loss per pair.

        delta_i = (log p(chosen_i) - log p_ref(chosen_i)) - (log p(rejected_i) - log p_ref(...))
        losses[i] = -log sigmoid(beta delta_i)                      "sigmoid"
                    max(0, 1 - beta delta_i)                        "hinge"
                    (delta_i - 1 / (2 beta))^2, answers' mean per token     "ipo"

    Args:
        model: a `...ForCausalLM`, also within a `PeftModel`.
        reference: the model that does not move, its parameters frozen. None: the batch holds what
            it says, `reference_logps` of an earlier call.
        beta: how much moving away from the reference costs.
        loss_type: "sigmoid", "hinge" or "ipo", as in TRL.

    Returns:
        `(model_fn, params)`. The batch is `dict(input_ids [n, 2, T], completion_mask [n, 2, T],
        attention_mask [n, 2, T]?, ref_chosen_logps [n]?, ref_rejected_logps [n]?)`: the chosen
        answer first, and 1 in `completion_mask` where a token belongs to the answer.

    Raises:
        OptionError: the reference is the model, or has parameters that require a gradient.
        BatchError: columns that are missing, rows that are not two per sample.

    Reference:
        Rafailov et al., "Direct Preference Optimization", 2023.
    """
    one_of("loss_type", loss_type, PAIR_LOSSES)
    check_positive("beta", beta)
    if reference is not None:
        check_module(reference)
    if reference is model:
        raise OptionError(
            "reference is the model itself, which moves. Give a frozen copy; or, for a PeftModel, "
            "reference_logps(model, batch) within model.disable_adapter()."
        )
    if reference is not None and any(p.requires_grad for p in reference.parameters()):
        raise OptionError(
            f"The reference {type(reference).__name__} has parameters that require a gradient; it "
            "does not move. Freeze it: reference.requires_grad_(False)."
        )

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        if reference is not None:
            batch = {**batch, **reference_logps(reference, batch)}
        return dpo_losses(answer_logps(module, batch), batch, beta, loss_type)

    return from_module(model, loss)


def reference_logps(model: nn.Module, batch: Batch) -> Batch:
    """What a reference model says of a batch of pairs, without gradient.

    For `dpo` without a reference: `batch | reference_logps(model, batch)`, for a `PeftModel` within
    `model.disable_adapter()`.

    Returns:
        `dict(ref_chosen_logps [n], ref_rejected_logps [n])`: log-probabilities of the answers.
    """
    with torch.no_grad():
        chosen, rejected = answer_logps(model, batch).unbind(1)
    return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def dpo_losses(logps: Tensor, batch: Batch, beta: float, loss_type: PairLoss) -> Tensor:
    """One loss per pair, `[n]`, from log-probabilities of the answers, `[n, 2]`; the batch holds
    what the reference says."""
    names = ("ref_chosen_logps", "ref_rejected_logps")
    if any(name not in batch for name in names):
        raise BatchError(
            f"The batch has no {' or '.join(names)}; it has {sorted(batch)}. Give dpo a reference "
            "model, or the batch what one says: batch | gf.hf.reference_logps(reference, batch)."
        )
    for name in names:
        one_number_each(name, batch[name], len(logps))
    ref = torch.stack([wide(batch[name]) for name in names], dim=1)
    ratios = logps - ref
    if loss_type == "ipo":  # TRL counts the answer's first token too
        ratios = ratios / need(batch, "completion_mask").sum(-1).clamp(min=1)
    delta = ratios[:, 0] - ratios[:, 1]
    if loss_type == "sigmoid":
        return -F.logsigmoid(beta * delta)
    if loss_type == "hinge":
        return (1 - beta * delta).relu()
    return (delta - 1 / (2 * beta)).square()


def reward_pairs(
    model: nn.Module, *, center_rewards_coefficient: float = 0.0
) -> tuple[ModelFn, dict[str, Tensor]]:
    """A reward model: one loss per pair.

        losses[i] = -log sigmoid(r(chosen_i) - r(rejected_i) - margin_i)
                    + center_rewards_coefficient (r(chosen_i) + r(rejected_i))^2

    Args:
        model: a `...ForSequenceClassification` with `num_labels=1`.
        center_rewards_coefficient: of the term that keeps rewards about zero.

    Returns:
        `(model_fn, params)`. The batch is `dict(input_ids [n, 2, T], attention_mask [n, 2, T]?,
        margin [n]?)`, the chosen answer first.

    Raises:
        OptionError: `center_rewards_coefficient` is negative, or no number.
        BatchError: columns that are missing, rows that are not two per sample, a head of several
            outputs.

    Reference:
        Ouyang et al., "Training language models to follow instructions", 2022.
    """

    check_not_negative("center_rewards_coefficient", center_rewards_coefficient)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return reward_losses(module, batch, center_rewards_coefficient)

    return from_module(model, loss)


def reward_losses(module: nn.Module, batch: Batch, center: float) -> Tensor:
    """One loss per pair, `[n]`."""
    n, inputs = rows_of_pairs(batch)
    rewards = wide(cast(Any, module)(**inputs, use_cache=False).logits)
    if rewards.numel() != 2 * n:
        raise BatchError(
            f"A reward model says one number for every answer, [{2 * n}, 1]; the logits of "
            f"{type(module).__name__} are {list(rewards.shape)}. Use a "
            "...ForSequenceClassification with num_labels=1."
        )
    rewards = rewards.reshape(2, n)
    if "margin" in batch:
        one_number_each("margin", batch["margin"], n)
    chosen, rejected = rewards.unbind(0)
    gap = chosen - rejected
    losses = -F.logsigmoid(gap - batch["margin"] if "margin" in batch else gap)
    return losses + center * (chosen + rejected).square() if center else losses


def answer_logps(module: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities of the answers, `[n, 2]`."""
    logps, *_ = answer_tokens(module, batch)
    return logps.sum(2)


def answer_tokens(module: nn.Module, batch: Batch, *, squares: bool = False) -> AnswerTokens:
    """What a model says of the answers' tokens."""
    n, inputs = rows_of_pairs(batch)
    mask = need(batch, "completion_mask").transpose(0, 1).flatten(0, 1)
    if mask.shape != inputs["input_ids"].shape:
        raise BatchError(
            f"completion_mask must be {list(batch['input_ids'].shape)} as input_ids is; got "
            f"{list(batch['completion_mask'].shape)}."
        )
    labels = inputs["input_ids"].masked_fill(mask == 0, IGNORED)
    labels = labels.masked_fill(torch.arange(labels.shape[1], device=labels.device) == 0, IGNORED)
    logits = cast(Any, module)(**inputs, use_cache=False).logits
    here = slice(-labels.shape[1], -1)
    said = [-token_losses(logits, next_tokens(labels, logits.shape[1]))[:, here]]
    if squares:
        z = wide(logits[:, here].detach())
        said.append((2 * z).logsumexp(-1) - 2 * z.logsumexp(-1))
    return of_pairs(n, said)


def of_pairs(n: int, of_rows: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Tensors of `rows_of_pairs`, `[2n, ...]`, as those of pairs, `[n, 2, ...]`."""
    return tuple(x.unflatten(0, (2, n)).transpose(0, 1) for x in of_rows)


def rows_of_pairs(batch: Batch) -> tuple[int, Batch]:
    """How many pairs there are, and the model's inputs of all their rows, `[2n, T]`, all chosen
    ones first: trainers' own order, in which sums over rows round."""
    ids = need(batch, "input_ids")
    if ids.ndim != 3 or ids.shape[1] != 2:
        raise BatchError(
            f"input_ids must be [n, 2, T], a chosen and a rejected row for every pair; got "
            f"{list(ids.shape)}. Of a trainer's [2n, T], all chosen rows first: "
            "x.unflatten(0, (2, n)).transpose(0, 1)."
        )
    inputs = {k: x.transpose(0, 1).flatten(0, 1) for k, x in batch.items() if k not in OF_LOSS}
    return len(ids), inputs


def one_number_each(name: str, x: Tensor, n: int) -> None:
    """Raise unless there is one number per sample."""
    if x.shape != (n,):
        raise BatchError(f"{name} must be [{n}], a number for each sample; got {list(x.shape)}.")
