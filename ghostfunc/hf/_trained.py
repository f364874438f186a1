"""The loss that `transformers.Trainer` trains, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss import loss_utils
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.generic import ModelOutput

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc.hf._heads import head_counts, head_losses, head_of
from ghostfunc.hf._logits import IGNORED, token_losses
from ghostfunc.hf._losses import Batch, need, next_tokens, seq2seq_logits, without_labels


class SampleLoss(NamedTuple):
    """A batch loss written as a sum over samples: `sum_i sums[i] / N`.

    N is the trainer's: the number of items of all micro-batches of a step where the model is told
    it (`num_items_in_batch`), the items of the micro-batch itself where it is not. For a score set
    it is the number of its own items.

    Attributes:
        sums: `sums(module, batch) -> [n]`: each sample's loss, summed over its items.
        counts: `counts(batch) -> [n]`: how many items (labelled tokens, say) a sample has.
        rows: how many rows of the trainer's batch a sample owns. Tensors of `rows * n` rows, all
            samples' first rows first (TRL's preference pairs: chosen, then rejected), reach `sums`
            and `counts` as `[n, rows, ...]`.
    """

    sums: Callable[[nn.Module, Batch], Tensor]
    counts: Callable[[Batch], Tensor]
    rows: int = 1

    def by_sample(self, batch: Mapping[str, Any], n: int) -> Batch:
        """The trainer's batch with one row per sample.

        Raises:
            BatchError: a tensor has neither n nor `rows * n` rows.
        """
        out: Batch = {}
        for name, x in batch.items():
            if not isinstance(x, Tensor) or len(x.shape) == 0:
                raise BatchError(
                    f"{name!r} of the batch is no tensor with a row per sample, but "
                    f"{x!r:.80}. Per-sample scores need one row per sample: no packing, no "
                    "flattening (padding_free)."
                )
            if len(x) == n:
                out[name] = x
            elif len(x) == self.rows * n:
                out[name] = x.unflatten(0, (self.rows, n)).transpose(0, 1)
            else:
                owned = "one row per sample" if self.rows == 1 else f"{self.rows} rows per sample"
                raise BatchError(
                    f"The collator made {len(x)} rows of {name!r} from {n} samples; the loss takes "
                    f"{owned}. Without packing and flattening there is one row per sample; where "
                    "samples own k rows, all samples' first rows first, say "
                    "sample_loss=gf.hf.SampleLoss(sums, counts, rows=k)."
                )
        return out


def one_item_each(loss: Callable[[nn.Module, Batch], Tensor]) -> SampleLoss:
    """A loss that is the mean over the samples of `loss(module, batch) -> [n]`."""

    def counts(batch: Batch) -> Tensor:
        first = next(iter(batch.values()))
        return torch.ones(len(first), device=first.device)

    return SampleLoss(loss, counts)


def trained_loss(model: nn.Module, smoothing: float, function: Any) -> SampleLoss:
    """The loss that `Trainer` trains a model of transformers (or a `PeftModel` of one) with.

    Args:
        model: the model.
        smoothing: `label_smoothing_factor`.
        function: `compute_loss_func`, or None.
    """
    base = unwrap_peft_model(model)
    own = base.loss_function if isinstance(base, PreTrainedModel) else None
    shifted = own is loss_utils.ForCausalLMLoss and not base.config.is_encoder_decoder
    if function is not None:
        return _by_function(function, shifted=shifted)
    if own not in KINDS:
        raise OptionError(
            f"GhostTrainer does not know the loss of {type(base).__name__}; it knows the models "
            f"whose loss is {', '.join(f.__name__ for f in KINDS)}. Pass sample_loss=f, "
            "f(module, batch) -> [n], one loss per sample, whose mean over the batch is the loss "
            "that the model returns; or gf.hf.SampleLoss(sums, counts) where items (tokens) weigh "
            "alike."
        )
    if own is loss_utils.ForCausalLMLoss and not shifted:
        return _tokens(seq2seq_logits, smoothing, shifted=False)
    if smoothing and own is loss_utils.ForSequenceClassificationLoss:
        return _tokens(_classes, smoothing, shifted=False)
    logits_of = KINDS[own]
    if logits_of is None:
        return _heads(base)
    return _tokens(
        logits_of, smoothing, shifted=shifted, first_too=_has_virtual_tokens(model, base)
    )


def _has_virtual_tokens(model: nn.Module, base: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens before the input: the last of them predicts its first."""
    if base is model:
        return False
    config = cast(Any, model).active_peft_config
    in_front = config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE")
    return bool(config.is_prompt_learning and in_front)


def _causal(module: nn.Module, batch: Batch) -> Tensor:
    return cast(Any, module)(**without_labels(batch), use_cache=False).logits


def _aligned(module: nn.Module, batch: Batch) -> Tensor:
    return cast(Any, module)(**without_labels(batch)).logits


def _classes(module: nn.Module, batch: Batch) -> Tensor:
    return _aligned(module, batch)[:, None]


KINDS: dict[Any, Callable[[nn.Module, Batch], Tensor] | None] = {
    loss_utils.ForCausalLMLoss: _causal,
    loss_utils.ForMaskedLMLoss: _aligned,
    loss_utils.ForTokenClassification: _aligned,
    loss_utils.ForSequenceClassificationLoss: None,
}
"""By the loss function of a model of transformers: how its token logits are made."""


def _tokens(
    logits_of: Callable[[nn.Module, Batch], Tensor],
    smoothing: float,
    *,
    shifted: bool,
    first_too: bool = False,
) -> SampleLoss:
    """Cross-entropy of labelled tokens, smoothed as `LabelSmoother` does."""

    def sums(module: nn.Module, batch: Batch) -> Tensor:
        logits = logits_of(module, batch)
        labels = need(batch, "labels").reshape(len(logits), -1)
        labels = next_tokens(labels, logits.shape[1]) if shifted else labels
        losses = token_losses(logits, labels)
        if smoothing:
            others = -wide(logits).log_softmax(-1).mean(-1)
            others = others.masked_fill(labels == IGNORED, 0.0)
            losses = (1 - smoothing) * losses + smoothing * others
        return losses.sum(1)

    def counts(batch: Batch) -> Tensor:
        labels = need(batch, "labels")
        labels = labels.reshape(len(labels), -1)
        return ((labels[:, 1:] if shifted and not first_too else labels) != IGNORED).sum(1)

    return SampleLoss(sums, counts)


def _heads(model: nn.Module) -> SampleLoss:
    """A classifier's own head."""

    def sums(module: nn.Module, batch: Batch) -> Tensor:
        return head_losses(head_of(model), _aligned(module, batch), need(batch, "labels"))

    return SampleLoss(sums, lambda batch: head_counts(head_of(model), need(batch, "labels")))


def _by_function(function: Callable[..., Tensor], *, shifted: bool) -> SampleLoss:
    """`compute_loss_func(outputs, labels, num_items_in_batch)`, asked about one sample at a time.

    With one item in the batch it says a sample's sum, if it divides by the number it is given.
    """

    def sums(module: nn.Module, batch: Batch) -> Tensor:
        labels = need(batch, "labels")
        outputs = cast(Any, module)(**without_labels(batch))
        rebuild, tensors = _tensors_of(outputs)
        one = torch.ones((), dtype=torch.int64, device=labels.device)

        def loss(tensors: list[Tensor], labels: Tensor) -> Tensor:
            sample = rebuild([x[None] for x in tensors])
            return function(sample, labels[None], num_items_in_batch=one)

        try:
            out: Tensor = torch.vmap(loss, randomness="different")(tensors, labels)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise OptionError(
                "compute_loss_func cannot be asked about one sample at a time by torch.vmap; pass "
                "the same loss as sample_loss=gf.hf.SampleLoss(sums, counts) too. torch said: "
                f"{str(error).splitlines()[0]}"
            ) from error
        return out

    def counts(batch: Batch) -> Tensor:  # as Trainer counts them
        labels = need(batch, "labels")
        labels = labels.reshape(len(labels), -1)
        return ((labels[:, 1:] if shifted else labels) != IGNORED).sum(1)

    return SampleLoss(sums, counts)


def _tensors_of(outputs: Any) -> tuple[Callable[[list[Tensor]], Any], list[Tensor]]:
    """The tensors of a model's outputs, and the same outputs made of others."""
    if not isinstance(outputs, ModelOutput):
        return (lambda tensors: tuple(tensors)), list(outputs)
    names = [k for k, x in outputs.items() if isinstance(x, Tensor)]
    kind = type(outputs)
    return (
        lambda tensors: kind(**dict(zip(names, tensors, strict=True))),
        [outputs[k] for k in names],
    )
