"""The loss that `transformers.Trainer` trains, sample by sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss import loss_utils
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
)
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils.generic import ModelOutput

from ghostfunc._base.documents import Documents
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc.hf._flattened import Samples, samples_of_row
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

    Where a collator puts n samples into one row, `[1, T]` with `position_ids` that begin anew
    (`DataCollatorWithFlattening`), both functions are given `gf.documents` of that row.
    """

    sums: Callable[[nn.Module, Batch], Tensor]
    counts: Callable[[Batch], Tensor]
    rows: int = 1

    def by_sample(self, batch: Mapping[str, Any], n: int) -> Samples:
        """The trainer's batch with one row per sample, or one document. What is None is left out;
        a single row beside those of samples (`position_ids` `[1, T]`) is every sample's.

        Raises:
            BatchError: a tensor has neither n nor `rows * n` rows.
        """
        given = {name: x for name, x in batch.items() if x is not None}
        docs = samples_of_row(given, n) if self.rows == 1 else None
        if docs is not None:
            return docs
        shapes = {x.shape for x in given.values() if isinstance(x, Tensor) and len(x.shape)}
        out: Batch = {}
        for name, x in given.items():
            if not isinstance(x, Tensor) or len(x.shape) == 0:
                raise BatchError(
                    f"{name!r} of the batch is no tensor with a row per sample, but "
                    f"{x!r:.80}. Leave it out of what the collator makes; what the model is to be "
                    "told besides goes into its config, or into sample_loss."
                )
            if len(x) == 1 and self._is_shared(x, n, shapes):
                x = x.expand(self.rows * n, *x.shape[1:])
            if len(x) == n:
                out[name] = x
            elif len(x) == self.rows * n:
                out[name] = x.unflatten(0, (self.rows, n)).transpose(0, 1)
            else:
                owned = "one row per sample" if self.rows == 1 else f"{self.rows} rows per sample"
                raise BatchError(
                    f"The collator made {len(x)} rows of {name!r} from {n} samples; the loss takes "
                    f"{owned}. Without packing there is one row per sample; where samples own k "
                    "rows, all samples' first rows first, say sample_loss=gf.hf.SampleLoss(sums, "
                    "counts, rows=k). Samples in one row [1, T] are told apart by position_ids "
                    "that begin anew, seq_idx or cu_seq_lens_q (DataCollatorWithFlattening)."
                )
        return out

    def _is_shared(self, x: Tensor, n: int, shapes: set[torch.Size]) -> bool:
        """Whether a single row is every sample's, among tensors of these shapes. That of a single
        sample, which owns several rows, is as long as they are."""
        if n == 1:
            return x.ndim > 1 and torch.Size([self.rows, *x.shape[1:]]) in shapes
        return not {n, self.rows * n}.isdisjoint(shape[0] for shape in shapes)


def one_item_each(loss: Callable[[nn.Module, Batch], Tensor]) -> SampleLoss:
    """A loss that is the mean over the samples of `loss(module, batch) -> [n]`."""

    def counts(batch: Batch) -> Tensor:
        first = next(iter(batch.values()))
        return torch.ones(len(first), device=first.device)

    return SampleLoss(loss, counts)


def trained_loss(
    model: nn.Module,
    smoothing: float,
    function: Any,
    of_token: Callable[[Tensor], Tensor] | None = None,
) -> SampleLoss:
    """The loss that `Trainer` trains a model of transformers (or a `PeftModel` of one) with.

    Args:
        model: the model.
        smoothing: `label_smoothing_factor`.
        function: `compute_loss_func`, or None.
        of_token: what is made of each token's loss, in place of smoothing.
    """
    base = unwrap_peft_model(model)
    own = _loss_function(base)
    shifted = own is loss_utils.ForCausalLMLoss and not base.config.is_encoder_decoder
    if function is not None:
        return _by_function(function, shifted=shifted)
    if own not in KINDS:
        raise OptionError(
            f"GhostTrainer does not know the loss of {type(base).__name__}; it knows the models "
            f"whose loss is {', '.join(f.__name__ for f in KINDS if f is not _classes)}, and "
            "those of multiple choice and next sentences. Pass sample_loss=f, "
            "f(module, batch) -> [n], one loss per sample, whose mean over the batch is the loss "
            "that the model returns; or gf.hf.SampleLoss(sums, counts) where items (tokens) weigh "
            "alike."
        )
    if own is loss_utils.ForCausalLMLoss and not shifted:
        loss = _tokens(seq2seq_logits, smoothing, shifted=False)
        return _with_decoder_inputs(loss, base) if smoothing else loss
    if own is loss_utils.ForQuestionAnsweringLoss:
        return SampleLoss(_span_sums, _span_counts)
    if smoothing and own is loss_utils.ForSequenceClassificationLoss:
        return _tokens(_classes, smoothing, shifted=False)
    logits_of = KINDS[own]
    if logits_of is None:
        return _heads(base)
    return _tokens(
        logits_of,
        smoothing,
        shifted=shifted,
        first_too=_has_virtual_tokens(model, base),
        of_token=of_token,
    )


def _loss_function(base: nn.Module) -> Any:
    """What a model of transformers makes its loss with. None for one with a loss of its own, whose
    `loss_function` is there but never asked."""
    if not isinstance(base, PreTrainedModel):
        return None
    names = {cls.__name__ for cls in type(base).__mro__}
    if names & CLASSIFIERS_OF_ROWS:
        return _classes
    own = base.loss_function
    if base.loss_type is not None or base.config.is_encoder_decoder:  # known by the class's name
        return own
    asked = "loss_function" in inspect.unwrap(type(base).forward).__code__.co_names
    return own if asked or names & CAUSAL else None


CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
CLASSIFIERS_OF_ROWS = {
    *MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values(),
    *MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES.values(),
}
"""Models whose logits are `[n, classes]` and whose loss is the mean cross-entropy of them."""


def _with_decoder_inputs(loss: SampleLoss, base: nn.Module) -> SampleLoss:
    """Trainer takes the labels away before it smooths: they do not make the decoder's input."""

    def counts(batch: Batch) -> Tensor:
        if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
            raise BatchError(
                "label_smoothing_factor: Trainer gives the model no labels then, of which "
                f"{type(base).__name__} makes its decoder's input. Have the collator add "
                "decoder_input_ids: DataCollatorForSeq2Seq(tokenizer, model=model)."
            )
        return loss.counts(batch)

    return loss._replace(counts=counts)


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
    loss_utils.ForQuestionAnsweringLoss: None,
    _classes: _classes,
}
"""By the loss function of a model of transformers: how its token logits are made; None for losses
that are no cross-entropy of tokens."""

SPAN = ("start_positions", "end_positions")
"""The labels of a model that answers with a span of its input."""


def _span_sums(module: nn.Module, batch: Batch) -> Tensor:
    """Half the cross-entropy of either end; a position behind the input does not count."""
    inputs = {name: x for name, x in batch.items() if name not in SPAN}
    outputs = cast(Any, module)(**inputs)
    losses = []
    for logits, name in zip((outputs.start_logits, outputs.end_logits), SPAN, strict=True):
        width = logits.shape[1]
        places = need(batch, name).flatten().clamp(0, width)
        losses.append(
            F.cross_entropy(wide(logits), places, ignore_index=width, reduction="none") / 2
        )
    return losses[0] + losses[1]


def _span_counts(batch: Batch) -> Tensor:
    width = need(batch, "input_ids").shape[1]
    return torch.stack([need(batch, name).flatten() < width for name in SPAN]).float().mean(0)


def _tokens(
    logits_of: Callable[[nn.Module, Batch], Tensor],
    smoothing: float,
    *,
    shifted: bool,
    first_too: bool = False,
    of_token: Callable[[Tensor], Tensor] | None = None,
) -> SampleLoss:
    """Cross-entropy of labelled tokens, smoothed as `LabelSmoother` does."""

    def sums(module: nn.Module, batch: Samples) -> Tensor:
        if isinstance(batch, Documents):
            logits = logits_of(module, batch.rows())
            labels = batch["labels"]
            labels = next_tokens(labels, labels.shape[1]) if shifted else labels
            return batch.sums(losses_of(logits, batch.to_rows(labels, fill=IGNORED)))
        logits = logits_of(module, batch)
        labels = need(batch, "labels").reshape(len(logits), -1)
        labels = next_tokens(labels, logits.shape[1]) if shifted else labels
        return losses_of(logits, labels).sum(1)

    def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
        losses = token_losses(logits, labels)
        if of_token is not None:
            return of_token(losses)
        if smoothing:
            others = -wide(logits).log_softmax(-1).mean(-1)
            others = others.masked_fill(labels == IGNORED, 0.0)
            losses = (1 - smoothing) * losses + smoothing * others
        return losses

    def counts(batch: Samples) -> Tensor:
        labels = _labels_by_sample(batch)
        return ((labels[:, 1:] if shifted and not first_too else labels) != IGNORED).sum(1)

    return SampleLoss(sums, counts)


def _heads(model: nn.Module) -> SampleLoss:
    """A classifier's own head."""

    def sums(module: nn.Module, batch: Batch) -> Tensor:
        return head_losses(head_of(model), _aligned(module, batch), need(batch, "labels"))

    return SampleLoss(sums, lambda batch: head_counts(head_of(model), need(batch, "labels")))


def _labels_by_sample(batch: Samples) -> Tensor:
    """Labels, `[n, T]`."""
    labels = batch["labels"] if isinstance(batch, Documents) else need(batch, "labels")
    return labels.reshape(len(labels), -1)


class AskedLoss(SampleLoss):
    """The loss of a `compute_loss_func`, which is asked about one sample at a time.

    With one item in the batch it says a sample's sum, if it divides by the number it is given. One
    that pays no heed to the number says the mean over a sample's items.
    """

    __slots__ = ()


def _by_function(function: Callable[..., Tensor], *, shifted: bool) -> AskedLoss:
    """`compute_loss_func(outputs, labels, num_items_in_batch)` of single samples."""

    def sums(module: nn.Module, batch: Samples) -> Tensor:
        if isinstance(batch, Documents):
            raise BatchError(
                "compute_loss_func is asked about one sample at a time, and the collator puts all "
                "samples into one row. Pass the same loss as sample_loss=gf.hf.SampleLoss(sums, "
                "counts), whose functions are given gf.documents; or let the collator pad."
            )
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

    def counts(batch: Samples) -> Tensor:  # as Trainer counts them
        labels = _labels_by_sample(batch)
        return ((labels[:, 1:] if shifted else labels) != IGNORED).sum(1)

    return AskedLoss(sums, counts)


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


class OtherOutputs(nn.Module):
    """A model that says random numbers in place of its own: losses that agree by chance, as those
    of a model that knows nothing yet, do not agree about them.

    Args:
        model: it decides the shapes of outputs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rebuild, tensors = _tensors_of(self.model(*args, **kwargs))
        generator = torch.Generator("cpu").manual_seed(0)
        return rebuild(
            [
                3 * torch.randn(x.shape, generator=generator, device="cpu").to(x)
                if x.is_floating_point()
                else x
                for x in tensors
            ]
        )
