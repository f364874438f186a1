"""Unmodified Hugging Face models in float32, and what their losses mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from compare import assert_close
from torch import Tensor, nn

import ghostfunc as gf

VOCABULARY, CLASSES = 40, 3
Batch = dict[str, Tensor]


def seeded(model_class: type, config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()


def gpt2(model_class: type = hf.GPT2LMHeadModel, **options: Any) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return seeded(model_class, hf.GPT2Config(**sizes, **special, **options))


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def llama(*, tied: bool) -> nn.Module:
    """Grouped-query attention: four heads share two keys and values."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    return seeded(hf.LlamaForCausalLM, hf.LlamaConfig(**SMALL, **heads))


def bert(model_class: type, **options: Any) -> nn.Module:
    return seeded(model_class, hf.BertConfig(**SMALL, num_attention_heads=2, **options))


def t5_encoder_decoder() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    special = {"eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
    config = hf.T5Config(vocab_size=VOCABULARY, num_labels=CLASSES, **sizes, **special)
    return seeded(hf.T5ForSequenceClassification, config)


def vit() -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.ViTConfig(**sizes, **layers, num_labels=CLASSES)
    return seeded(hf.ViTForImageClassification, config)


def text(n: int, t: int, seed: int, padding: str = "none") -> Batch:
    """Token ids; with padding, samples of different lengths and their `attention_mask`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (n, t), generator=generator)
    if padding == "none":
        return {"input_ids": ids}
    lengths = torch.randint(t // 2, t + 1, (n, 1), generator=generator)
    mask = (torch.arange(t) < lengths).long()
    mask = mask.flip(1) if padding == "left" else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


def masked_text(n: int, t: int, seed: int, padding: str) -> Batch:
    batch = text(n, t, seed, padding)
    return batch | {"labels": batch["input_ids"].where(torch.arange(t) % 3 == 1, -100)}


def classified_text(n: int, t: int, seed: int, padding: str) -> Batch:
    return text(n, t, seed, padding) | {"labels": (torch.arange(n) + seed) % CLASSES}


def rated_text(n: int, t: int, seed: int, padding: str) -> Batch:
    return text(n, t, seed, padding) | {"labels": torch.linspace(-1, 1, n)}


def ended_text(n: int, t: int, seed: int, padding: str) -> Batch:
    batch = classified_text(n, t, seed, padding)
    batch["input_ids"][:, -1] = 2
    return batch


def images(n: int, t: int, seed: int, padding: str) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(n, 3, 8, 8, generator=generator),
        "labels": (torch.arange(n) + seed) % CLASSES,
    }


Make = Callable[[], tuple[nn.Module, Callable[[nn.Module], Any], Callable[..., Batch]]]

MODELS: dict[str, Make] = {
    "gpt2": lambda: (gpt2(), gf.hf.causal_lm, text),
    "llama": lambda: (llama(tied=False), gf.hf.causal_lm, text),
    "llama_tied": lambda: (llama(tied=True), gf.hf.causal_lm, text),
    "bert_masked": lambda: (bert(hf.BertForMaskedLM), gf.hf.masked_lm, masked_text),
    "bert_classes": lambda: (
        bert(hf.BertForSequenceClassification, num_labels=CLASSES),
        gf.hf.sequence_classification,
        classified_text,
    ),
    "bert_regression": lambda: (
        bert(hf.BertForSequenceClassification, num_labels=1),
        gf.hf.sequence_classification,
        rated_text,
    ),
    "gpt2_classes": lambda: (
        gpt2(hf.GPT2ForSequenceClassification, num_labels=CLASSES),
        gf.hf.sequence_classification,
        classified_text,
    ),
    "t5_classes": lambda: (t5_encoder_decoder(), gf.hf.sequence_classification, ended_text),
    "vit": lambda: (vit(), gf.hf.image_classification, images),
}

CAUSAL = ("gpt2", "llama", "llama_tied")


@pytest.mark.parametrize(
    ("name", "padding"),
    [(name, padding) for name in CAUSAL for padding in ("none", "left", "right")]
    + [(name, "right") for name in MODELS if name not in CAUSAL and name != "t5_classes"]
    + [("t5_classes", "none")],
)
def test_unmodified_models(name: str, padding: str) -> None:
    model, adapt, draw = MODELS[name]()
    model_fn, params = adapt(model)
    train, val = draw(4, 7, 0, padding), draw(3, 9, 1, padding)
    ghost, jvp, materialized = (
        gf.ghost_dot_prod(
            model_fn, params, train, val, mode=mode, vectorize=False, reduction="none"
        )
        for mode in ("ghost", "jvp", "materialized")
    )
    assert_close(ghost, materialized, 1e-5)
    assert_close(ghost, jvp, 1e-5)
    per_param = [
        gf.ghost_dot_prod(model_fn, params, train, val, mode=mode, vectorize=False, per_param=True)
        for mode in ("ghost", "materialized")
    ]
    # float32 noise of the whole model on parameters that hardly matter (key biases, not at all)
    assert_close(*per_param, 1e-5, floor=0.1)
    step = gf.ghost_value_and_grad(model_fn, params, train, val)
    assert_close(step.dot_prods, materialized.mean(1), 1e-5)
    assert_close(
        step.grads, torch.func.grad(lambda p: model_fn(p, train).mean())(params), 1e-5, floor=0.1
    )


@pytest.mark.parametrize("padded", [[5], [2, 5], [0], [0, 1]])
@pytest.mark.parametrize("model", [gpt2, lambda: llama(tied=True)], ids=["gpt2", "llama"])
def test_padding_in_some_samples_alone(model: Callable[[], nn.Module], padded: list[int]) -> None:
    """Without padding these models build no mask: the first two samples do not tell the way."""
    module = model().double()
    model_fn, params = gf.hf.causal_lm(module)
    train, val = text(8, 6, seed=1), text(2, 6, seed=2)
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[padded, :3] = 0
    for batch in (
        {**train, "attention_mask": mask},
        {**train, "attention_mask": torch.ones_like(mask)},
        {**train, "attention_mask": mask},
    ):
        beside = {**val, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
        exact = gf.ghost_value_and_grad(
            model_fn, params, batch, beside, mode="materialized", vectorize=False
        )
        for options in ({}, {"chunk_size": 8}, {"reduction": "sum"}):
            step = gf.ghost_value_and_grad(model_fn, params, batch, beside, **options)
            scale = 2 if "reduction" in options else 1
            assert_close(list(step)[:2], list(exact)[:2], 1e-10)
            assert_close(step.dot_prods, scale * exact.dot_prods, 1e-10)
        norms = gf.ghost_norm(model_fn, params, batch, mode="materialized", vectorize=False)
        assert_close(gf.ghost_norm(model_fn, params, batch), norms, 1e-10)


ONE_RUN: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], Callable[..., Batch]]] = {
    "gpt2": (gpt2, gf.hf.causal_lm, text),
    "llama": (lambda: llama(tied=True), gf.hf.causal_lm, text),
    "vit": (vit, gf.hf.image_classification, lambda n, t, seed: images(n, t, seed, "none")),
}


@pytest.mark.parametrize("name", ONE_RUN)
def test_train_and_validation_samples_share_a_run(name: str) -> None:
    make, loss, draw = ONE_RUN[name]
    module = make()
    module.config.pad_token_id = None  # GPT-2 looks for it in the ids, to warn
    sizes: list[int] = []
    forward = module.forward

    def counted(**batch: Tensor) -> Any:
        sizes.append(len(next(iter(batch.values()))))
        return forward(**batch)

    module.forward = counted
    model_fn, params = loss(module)
    train, val = draw(4, 6, seed=1), draw(1, 6, seed=2)
    gf.ghost_value_and_grad(model_fn, params, train, val)
    sizes.clear()
    gf.ghost_value_and_grad(model_fn, params, train, val)
    assert sizes == [5]


def test_tied_parameters_appear_once() -> None:
    assert "lm_head.weight" not in gf.hf.causal_lm(llama(tied=True))[1]
    assert "lm_head.weight" in gf.hf.causal_lm(llama(tied=False))[1]


# --- what the losses mean ---------------------------------------------------------------------


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Each sample's mean over its own labelled tokens, written out."""
    losses = []
    for sample, target in zip(logits, labels, strict=True):
        nll = [-sample[t].log_softmax(-1)[y] for t, y in enumerate(target.tolist()) if y != -100]
        losses.append(torch.stack(nll).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_causal_lm_loss(padding: str) -> None:
    model, batch = gpt2(), text(3, 8, 0, padding)
    model_fn, params = gf.hf.causal_lm(model)
    logits = model(**batch).logits[:, :-1]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    expected = token_losses(logits, labels[:, 1:])
    torch.testing.assert_close(model_fn(params, batch), expected)
    torch.testing.assert_close(model_fn(params, batch | {"labels": labels}), expected)

    prompts_ignored = labels.masked_fill(torch.arange(8) < torch.tensor([[2], [1], [3]]), -100)
    torch.testing.assert_close(
        model_fn(params, batch | {"labels": prompts_ignored}),
        token_losses(logits, prompts_ignored[:, 1:]),
    )


def test_one_sample_has_the_loss_of_the_model_itself() -> None:
    batch = text(1, 8, 0)
    for model in (gpt2(), llama(tied=True)):
        model_fn, params = gf.hf.causal_lm(model)
        own = model(**batch, labels=batch["input_ids"]).loss
        torch.testing.assert_close(model_fn(params, batch), own[None])


def test_masked_lm_loss() -> None:
    model, batch = bert(hf.BertForMaskedLM), masked_text(3, 7, 0, "right")
    model_fn, params = gf.hf.masked_lm(model)
    labels = batch["labels"].clone()
    labels[0, :4] = -100
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    torch.testing.assert_close(
        model_fn(params, inputs | {"labels": labels}), token_losses(model(**inputs).logits, labels)
    )


def test_classification_losses() -> None:
    for name in ("bert_classes", "vit"):
        model, adapt, draw = MODELS[name]()
        batch = draw(4, 7, 0, "right")
        model_fn, params = adapt(model)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        expected = F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")
        torch.testing.assert_close(model_fn(params, batch), expected)


def test_regression_loss() -> None:
    model, adapt, draw = MODELS["bert_regression"]()
    batch = draw(4, 7, 0, "right")
    model_fn, params = adapt(model)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    expected = (model(**inputs).logits[:, 0] - batch["labels"]) ** 2
    torch.testing.assert_close(model_fn(params, batch), expected)


def test_a_sample_without_labels_is_refused() -> None:
    model_fn, params = gf.hf.causal_lm(gpt2())
    batch = text(3, 6, 0)
    labels = batch["input_ids"].clone()
    labels[2] = -100
    with pytest.raises(
        gf.NonFiniteLossError, match=r"losses\[2\] = nan.*without a single labelled"
    ):
        gf.ghost_dot_prod(model_fn, params, batch | {"labels": labels}, batch | {"labels": labels})


def test_a_batch_without_labels_is_refused() -> None:
    model_fn, params = gf.hf.masked_lm(bert(hf.BertForMaskedLM))
    with pytest.raises(gf.BatchError, match=r"no 'labels'; it has .*input_ids"):
        gf.ghost_dot_prod(model_fn, params, text(2, 5, 0), text(2, 5, 0))


@pytest.mark.parametrize("width", [3, 5, 7])
@pytest.mark.parametrize("chunks", [None, 2])
def test_labels_are_one_for_every_token(width: int, chunks: int | None) -> None:
    """Fewer were taken for labels behind virtual tokens, in silence."""
    model_fn, params = gf.hf.causal_lm(gpt2(), logit_chunks=chunks)
    batch = text(3, 6, 0) | {"labels": torch.zeros(3, width, dtype=torch.int64)}
    with pytest.raises(gf.BatchError, match=rf"labels must be \[3, 6\].*got \[3, {width}\]"):
        model_fn(params, batch)
    model_fn, params = gf.hf.masked_lm(bert(hf.BertForMaskedLM))
    with pytest.raises(gf.BatchError, match=rf"labels must be \[3, 6\].*got \[3, {width}\]"):
        model_fn(params, batch)
