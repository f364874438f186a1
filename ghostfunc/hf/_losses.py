"""Per-sample losses for the usual heads of Hugging Face models.

Every function takes a model that maps a batch's tensors to `.logits`, and returns
`(model_fn, params)` as `from_module` does. The batch is a dict of tensors: `labels`, and whatever
the model's `forward` takes. The model's own loss, which averages over the batch, is not used.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ghostfunc._base.documents import Documents
from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc._base.module import from_module
from ghostfunc._base.types import ModelFn
from ghostfunc.hf._heads import head_counts, head_losses, head_of
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
        `attention_mask` is 0. Rows that hold several documents each become a batch of documents by
        `gf.documents`; the losses are then those of documents. A sample without a labelled token
        has no loss and is refused (`NonFiniteLossError`). Mind the scale: a token of a short sample
        weighs more than one of a long sample, unlike in a loss averaged over all tokens of a batch.

    Raises:
        OptionError: `logit_chunks` is no positive integer, or the model does more between its
            hidden states and its logits than to apply its output embeddings (scaling, a soft cap);
            the model is an encoder-decoder (`gf.hf.seq2seq_lm`); `logit_chunks` for documents.
        BatchError: the batch has `segments` of which nobody made documents; labels are not one per
            token of the input.
    """
    if _is_encoder_decoder(model):
        raise OptionError(
            f"{type(model).__name__} is an encoder-decoder model: its labels are targets of the "
            "decoder, not the input shifted by one. Use gf.hf.seq2seq_lm(model)."
        )
    if logit_chunks is not None:
        check_head(model, logit_chunks)

    def loss(module: nn.Module, batch: Batch | Documents) -> Tensor:
        if isinstance(batch, Documents):
            if logit_chunks is not None:
                raise OptionError(
                    "logit_chunks cuts rows into pieces of positions, which documents do not "
                    "survive. Leave it out for packed documents, or use chunk_size."
                )
            return _document_means(module, batch)
        refuse_segments(batch)
        inputs = dict(batch)
        labels = inputs.pop("labels", None)
        if labels is None:
            labels = need(inputs, "input_ids")
            if "attention_mask" in inputs:
                labels = labels.masked_fill(inputs["attention_mask"] == 0, IGNORED)
        _check_labels(inputs, labels)
        if logit_chunks is not None:
            return chunked_token_means(module, inputs, labels, logit_chunks)
        logits = module(**inputs, use_cache=False).logits
        return token_means(logits, next_tokens(labels, logits.shape[1]))

    return from_module(model, loss)


def _document_means(module: nn.Module, docs: Documents) -> Tensor:
    """Each document's mean over its own labelled tokens, `[n]`, of a run on packed rows."""
    rows = docs.rows()
    rows.pop("labels", None)
    labels = docs.tensors.get("labels")
    if labels is None:
        labels = docs["input_ids"].masked_fill(~docs.packing.own, IGNORED)
    targets = next_tokens(labels, labels.shape[1])
    losses = token_losses(
        cast(Any, module)(**rows, use_cache=False).logits, docs.to_rows(targets, fill=IGNORED)
    )
    return docs.sums(losses) / (targets != IGNORED).sum(1)


def _check_labels(inputs: Batch, labels: Tensor) -> None:
    """Raise unless there is a label for every token: fewer would pass for those behind virtual
    tokens."""
    tokens = {k: inputs[k].shape[:2] for k in ("input_ids", "inputs_embeds") if k in inputs}
    for name, shape in tokens.items():
        if labels.shape != shape:
            raise BatchError(
                f"labels must be {list(shape)}, one for every token of {name} (-100 where nothing "
                f"is to be predicted); got {list(labels.shape)}. The model shifts them itself."
            )


def refuse_segments(batch: Batch) -> None:
    """Raise for packed rows of which nobody made documents."""
    if "segments" in batch:
        raise BatchError(
            "the batch has segments: its rows hold several documents each. Make the documents "
            "samples first, gf.documents(batch), and pass those."
        )


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


def seq2seq_lm(model: nn.Module) -> tuple[ModelFn, dict[str, Tensor]]:
    """Encoder-decoder models: each sample's mean over its own labelled target tokens.

        losses[i] = sum_t [y_it != -100] CE(logits_it, y_it) / sum_t [y_it != -100]

    Args:
        model: a `...ForConditionalGeneration` of text (T5, BART, ...).

    Returns:
        `(model_fn, params)`. The batch is `dict(input_ids [n, S], labels [n, T],
        attention_mask [n, S]?, decoder_input_ids [n, T]?, ...)`, labels -100 where nothing is to be
        predicted. Without `decoder_input_ids` they are the labels shifted by one, as in the model.

    Raises:
        OptionError: the model is no encoder-decoder.
    """
    if not _is_encoder_decoder(model):
        raise OptionError(
            f"{type(model).__name__} is no encoder-decoder model (config.is_encoder_decoder is not "
            "True). Use gf.hf.causal_lm or gf.hf.masked_lm."
        )

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        labels = need(batch, "labels")
        return token_means(seq2seq_logits(module, batch), labels)

    return from_module(model, loss)


def seq2seq_logits(module: nn.Module, batch: Batch) -> Tensor:
    """The decoder's logits `[n, T, V]`, aligned with the labels of the batch."""
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        try:
            shifted = cast(Any, module).prepare_decoder_input_ids_from_labels
        except AttributeError:  # the model shifts them itself, on its way to a loss of its own
            return cast(Any, module)(**batch, use_cache=False).logits
        inputs["decoder_input_ids"] = shifted(need(batch, "labels"))
    return cast(Any, module)(**inputs, use_cache=False).logits


def sequence_classification(model: nn.Module) -> tuple[ModelFn, dict[str, Tensor]]:
    """The loss of a sequence classifier's own head, sample by sample.

    As in the model: `config.problem_type` decides, and where it is None `num_labels` and the dtype
    of the labels do.

    | problem | chosen for | loss of sample i | labels |
    | --- | --- | --- | --- |
    | `regression` | `num_labels=1` | mean squared error over outputs | `[n]` `[n, 1]` `[n, L]` |
    | `single_label_classification` | integer labels | cross-entropy | `[n]` `[n, 1]` |
    | `multi_label_classification` | other labels | mean of binary CE over labels | `[n, L]` |

    Args:
        model: a `...ForSequenceClassification`.

    Returns:
        `(model_fn, params)`. The batch is `dict(input_ids [n, T], labels, ...)`. A sample whose
        label is -100 has no loss and is refused (`NonFiniteLossError`).

    Raises:
        BatchError: labels that the head's own loss refuses (their shape, their dtype).
        OptionError: a `problem_type` that does not exist.
    """
    return _classification(model)


def image_classification(model: nn.Module) -> tuple[ModelFn, dict[str, Tensor]]:
    """The loss of an image classifier's own head, as in `sequence_classification`.

    Args:
        model: a `...ForImageClassification`.

    Returns:
        `(model_fn, params)`. The batch is `dict(pixel_values [n, C, H, W], labels)`.
    """
    return _classification(model)


def _classification(model: nn.Module) -> tuple[ModelFn, dict[str, Tensor]]:
    head_of(model)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        inputs = dict(batch)
        labels = _pop_labels(inputs)
        head = head_of(model)
        return head_losses(head, module(**inputs).logits, labels) / head_counts(head, labels)

    return from_module(model, loss)


def token_means(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy `[n]`: each sample's mean over its own labelled positions.

    Args:
        logits: `[n, T, V]`.
        labels: `[n, T]`, -100 where nothing is to be predicted.
    """
    return token_losses(logits, labels).sum(1) / (labels != IGNORED).sum(1)


def next_tokens(labels: Tensor, positions: int) -> Tensor:
    """What each of `positions` logits is to predict, `[n, positions]`.

    The labels are shifted, not the logits: a slice of those is copied, forward and backward. Where
    there are more positions than labels, the first ones are virtual tokens (PEFT's prompt tuning),
    the last of which predicts the first label.
    """
    virtual = positions - labels.shape[1]
    if virtual:
        return F.pad(labels, (virtual - 1, 1), value=IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _is_encoder_decoder(model: nn.Module) -> bool:
    try:
        return bool(cast(Any, model).config.is_encoder_decoder)
    except AttributeError:  # no config, or that of something else
        return False


def _pop_labels(inputs: Batch) -> Tensor:
    labels = need(inputs, "labels")
    del inputs["labels"]
    return labels


def need(inputs: Batch, name: str) -> Tensor:
    """A tensor of the batch, by name."""
    if name not in inputs:
        raise BatchError(f"the batch has no {name!r}; it has {sorted(inputs)}.")
    return inputs[name]


def without_labels(batch: Batch) -> Batch:
    """What the model itself is given, so that it computes no loss of its own."""
    return {name: x for name, x in batch.items() if name != "labels"}
