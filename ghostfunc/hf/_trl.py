"""TRL's trainers with scores: mixins for `SFTTrainer`, `DPOTrainer` and `RewardTrainer`.

class ScoringDPOTrainer(gf.hf.DPOMixin, trl.DPOTrainer): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers.trainer_utils import unwrap_peft_model

from ghostfunc._base.errors import OptionError
from ghostfunc.hf._asked_pairs import Weighted, asked_losses, refuse_mixed_pairs
from ghostfunc.hf._divisor import Divisor
from ghostfunc.hf._logits import IGNORED
from ghostfunc.hf._losses import Batch, need
from ghostfunc.hf._micro_batch import Pieces, Scoring
from ghostfunc.hf._mixin import GhostMixin
from ghostfunc.hf._preferences import (
    PAIR_LOSSES,
    SFT_SHARE,
    AnswerTokens,
    PairLoss,
    answer_tokens,
    dpo_losses,
    of_pairs,
    reward_losses,
    rows_of_pairs,
)
from ghostfunc.hf._score_sets import ScoreSet
from ghostfunc.hf._trained_loss import SampleLoss, trained_loss
from ghostfunc.hf._trl_head import head_log_probs, show_head

PairPart: TypeAlias = Callable[[AnswerTokens, Batch], Tensor]

MARK = "score: "
"""Before the names of score datasets among those that TRL prepares for evaluation."""


class TrlMixin(GhostMixin):
    """What TRL's trainers have in common: they prepare datasets, scored ones like those to evaluate
    on, and they gather metrics whenever a loss is computed."""

    several_processes = False

    def with_score_sets(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], sets: dict[str, ScoreSet]
    ) -> dict[str, Any]:
        given = kwargs.get("eval_dataset")
        named = given if isinstance(given, dict) else {} if given is None else {"eval": given}
        if not isinstance(given, dict | None):
            self._single = True
        marked = {MARK + name: dataset.dataset for name, dataset in sets.items()}
        return {**kwargs, "eval_dataset": {**named, **marked}}

    _single = False

    def prepared_score_sets(self, sets: dict[str, ScoreSet]) -> dict[str, ScoreSet]:
        prepared = dict(cast(Mapping[str, Any], self.eval_dataset))
        out = {name: ScoreSet(name, prepared.pop(MARK + name)) for name in sets}
        self.eval_dataset = prepared["eval"] if self._single else prepared or None
        return out

    def _fused(self) -> bool:
        """Have the model's head compute log-probabilities as TRL's own losses do, bit by bit, where
        it can be derived as often as scores take."""
        if self.score_order != 1 or self._compiled:
            return False
        return show_head(unwrap_peft_model(cast(nn.Module, self.model)))

    def _hold_against_trainer(
        self,
        scoring: Scoring,
        given: Batch,
        n: int,
        inputs: dict[str, Any],
        counted: Any,
        pieces: Pieces,
    ) -> Divisor:
        divisor = super()._hold_against_trainer(scoring, given, n, inputs, counted, pieces)
        cast(Any, self)._metrics["eval"].clear()  # what was computed here was no evaluation
        return divisor


class SFTMixin(TrlMixin):
    """Scores for `trl.SFTTrainer`: `class Mine(gf.hf.SFTMixin, trl.SFTTrainer): ...`.

    Arguments are the trainer's and those of `gf.hf.GhostTrainer`. `score_dataset` is a dataset as
    `train_dataset` is, and is prepared like it. The default settings (bf16, checkpoints of
    activations) are trained; entropy and token accuracy are not logged in training. With `packing`
    a sample is a row of `train_dataset` as TRL prepares it: its value is that of its documents,
    added up. `loss_type` is "nll" or "dft".

    Raises:
        OptionError: another `loss_type`.
        BatchError: a batch of packed rows has other documents than their `seq_lengths` say.
        VerificationError: a router's loss, which does not belong to samples.
    """

    def sample_loss(self) -> SampleLoss:
        args: Any = self.args
        if self._given_loss is not None or self.compute_loss_func is not None:
            return super().sample_loss()
        if args.loss_type not in OF_TOKEN:
            raise OptionError(
                f"SFTMixin does not know loss_type={args.loss_type!r}; it knows "
                f"{', '.join(OF_TOKEN)}. Pass the loss as sample_loss=gf.hf.SampleLoss(sums, "
                "counts)."
            )
        of_token = OF_TOKEN[args.loss_type]
        if self.label_smoother is not None and of_token is None:
            return super().sample_loss()
        loss = trained_loss(cast(nn.Module, self.model), 0.0, None, of_token)
        if cast(Any, self).padding_free or not self._fused():
            return loss
        return loss._replace(sums=partial(_token_sums, of_token))

    def documents_in(self, sample: Any) -> int:
        if not cast(Any, self).padding_free or "seq_lengths" not in sample:
            return 1
        return len(sample["seq_lengths"])


class DPOMixin(TrlMixin):
    """Scores for `trl.DPOTrainer`: `class Mine(gf.hf.DPOMixin, trl.DPOTrainer): ...`.

    A sample is a pair. What the reference says is computed before the pass, by the trainer. Losses
    other than "sigmoid", "hinge" and "ipo", and `use_weighting`, are TRL's own code, asked about
    one pair at a time; "sft" weighs a pair by its share of the batch's chosen tokens.

    Raises:
        OptionError: losses that mix pairs ("aot" sorts them, "sft" with `use_weighting`), which
            leave a pair no loss of its own.
    """

    def sample_loss(self) -> SampleLoss:
        if self._given_loss is not None:
            return super().sample_loss()
        trainer = cast(Any, self)
        tokens = (
            _answer_tokens
            if self._fused()
            else partial(answer_tokens, squares=trainer.use_weighting)
        )
        losses = list(zip(trainer.loss_types, trainer.loss_weights, strict=True))
        parts = _parts_of_loss(trainer, losses)

        def sums(module: nn.Module, batch: Batch) -> Tensor:
            said = tokens(module, batch)
            found = [part(said, batch) for part in parts]
            return torch.stack(found).sum(0) if len(found) > 1 else found[0]

        return SampleLoss(sums, _one_each, rows=2)

    def inputs_of(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        trainer = cast(Any, self)
        given = dict(inputs)
        if "ref_chosen_logps" not in given:
            reference = module if trainer.ref_model is None else trainer.ref_model
            chosen, rejected = trainer.compute_ref_log_probs(reference, dict(inputs))
            given |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        if "sft" in trainer.loss_types:
            mask = given["completion_mask"]
            n = len(mask) // 2
            given[SFT_SHARE] = (n / mask[:n, 1:].sum()).expand(n)
        return given


def _parts_of_loss(trainer: Any, losses: Weighted) -> list[PairPart]:
    """The functions whose sum is a DPO loss: each returns `[n]`."""
    asked = [(kind, weight) for kind, weight in losses if kind != "sft"]
    parts: list[PairPart] = [partial(_sft, weight) for kind, weight in losses if kind == "sft"]
    usual = trainer.ld_alpha is None and trainer.f_divergence_type == "reverse_kl"
    if usual and not trainer.use_weighting and {kind for kind, _ in asked} <= set(PAIR_LOSSES):
        return parts + [
            partial(_written, trainer, weight, cast(PairLoss, kind)) for kind, weight in asked
        ]
    if trainer.use_weighting and parts:
        raise OptionError(
            f"use_weighting=True with 'sft' in loss_type={[kind for kind, _ in losses]}: TRL "
            "multiplies the mean over the chosen tokens of all pairs by weights of each, so that a "
            "pair has no loss of its own. Leave one of the two out."
        )
    refuse_mixed_pairs(trainer, asked)
    return [*parts, partial(asked_losses, trainer, asked)] if asked else parts


def _sft(weight: float, said: AnswerTokens, batch: Batch) -> Tensor:
    return -weight * batch[SFT_SHARE] * said[0][:, 0].sum(1)


def _written(
    trainer: Any, weight: float, kind: PairLoss, said: AnswerTokens, batch: Batch
) -> Tensor:
    return weight * dpo_losses(said[0].sum(2), batch, trainer.beta, kind)


class RewardMixin(TrlMixin):
    """Scores for `trl.RewardTrainer`: `class Mine(gf.hf.RewardMixin, trl.RewardTrainer): ...`.

    A sample is a pair.
    """

    def sample_loss(self) -> SampleLoss:
        if self._given_loss is not None:
            return super().sample_loss()
        center = cast(Any, self.args).center_rewards_coefficient or 0.0
        return SampleLoss(
            lambda module, batch: reward_losses(module, batch, center), _one_each, rows=2
        )


def _weighed_by_probability(losses: Tensor) -> Tensor:
    """Dynamic fine-tuning, `loss_type="dft"`: each token's loss times its probability, as a number.

    Reference:
        Wu et al., "On the Generalization of SFT", 2025.
    """
    return losses * (-losses).exp().detach()


OF_TOKEN: dict[str, Callable[[Tensor], Tensor] | None] = {
    "nll": None,
    "dft": _weighed_by_probability,
}
"""By the loss type of `SFTTrainer`: what is made of each token's loss."""


def _token_sums(
    of_token: Callable[[Tensor], Tensor] | None, module: nn.Module, batch: Batch
) -> Tensor:
    """Each sample's summed token losses."""
    inputs = {**batch, "labels": need(batch, "labels")}
    losses = -head_log_probs(module, inputs)[0]
    return (losses if of_token is None else of_token(losses)).sum(1)


def _answer_tokens(module: nn.Module, batch: Batch) -> AnswerTokens:
    """What TRL's own head says of the answers' tokens."""
    n, inputs = rows_of_pairs(batch)
    mask = need(batch, "completion_mask").transpose(0, 1).flatten(0, 1)
    labels = inputs["input_ids"].masked_fill(mask == 0, IGNORED)
    said = head_log_probs(module, {**inputs, "labels": labels})
    return of_pairs(n, (x[:, 1 - mask.shape[1] :] for x in said))


def _one_each(batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    return torch.ones(len(ids), dtype=torch.int64, device=ids.device)
