"""Tiny models and data for trainers, and scores by their definition from the trainer's own loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import assert_close
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import ghostfunc as gf

Inputs = dict[str, Tensor]


def gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 24}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **drops, **special, **options}))


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, **options}))


def mixtral(**options: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return MixtralForCausalLM(
        MixtralConfig(**{**sizes, **heads, "num_local_experts": 4, **options})
    )


def bert(**options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    drops = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return BertForSequenceClassification(
        BertConfig(**{**sizes, **drops, "num_attention_heads": 2, "num_labels": 3, **options})
    )


def vit(**options: Any) -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**{**sizes, **layers, **options}))


def t5(**options: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    special = {"num_heads": 2, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2}
    config = T5Config(**{**sizes, **special, "decoder_start_token_id": 0, **options})
    return T5ForConditionalGeneration(config)


def texts(n: int, seed: int, length: int = 12) -> list[Inputs]:
    """Samples of equal length, of which unequal numbers of tokens are labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (n, length), generator=generator)
    skipped = torch.randint(0, length - 4, (n, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(length) < skipped, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def labelled(n: int, seed: int, label: Callable[[Tensor], Any]) -> list[dict[str, Any]]:
    """Texts with a label made of their tokens."""
    return [
        {"input_ids": item["input_ids"], "labels": label(item["input_ids"])}
        for item in texts(n, seed)
    ]


def images(n: int, seed: int, label: Callable[[Tensor], Any]) -> list[dict[str, Any]]:
    pixels = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": x, "labels": label(x)} for x in pixels]


def class_of(x: Tensor) -> int:
    return int(x.abs().sum() * 7) % 3


def several_of(x: Tensor) -> Tensor:
    return torch.tensor([float(int(x.abs().sum() * k) % 2) for k in (3, 5, 7)])


def rating_of(x: Tensor) -> float:
    return float(x.float().mean()) / 20 - 1


def arguments(path: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(path), **{**DEFAULTS, **options})


DEFAULTS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    # Adam divides by the gradient's size: `eps` keeps it from dividing noise by noise.
    "adam_epsilon": 1e-3,
    "weight_decay": 0.1,
    "save_strategy": "no",
    "logging_steps": 100,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


class Recording:
    """Before a GhostTrainer class: keeps every micro-batch with the weights it was trained at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, Any]] = []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        module = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model
        groups = self.optimizer.param_groups
        rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
        self.seen.append(
            {
                "inputs": {k: copy.deepcopy(x) for k, x in inputs.items()},
                "weights": {k: x.detach().clone() for k, x in module.state_dict().items()},
                "rates": {k: rate_of.get(id(p), 0.0) for k, p in module.named_parameters()},
                "counted": num_items_in_batch,
                "micro_batches": self.current_gradient_accumulation_steps,
                "step": self.state.global_step,
            }
        )
        return super().training_step(model, inputs, num_items_in_batch)


class Recorded(Recording, gf.hf.GhostTrainer):
    """A GhostTrainer that is held against the definition."""


def rows_of(inputs: Inputs, i: int, n: int) -> Inputs:
    """What sample i owns of a collated batch: rows i, n + i, ..."""
    return {k: x[i::n] for k, x in inputs.items() if k != "ghost_sample_id"}


def scores_by_definition(
    trainer: Any,
    score_batches: Callable[[int], list[Inputs]],
    counts: Callable[[Inputs], int],
    *,
    counted: bool,
    averaged: bool,
) -> Tensor:
    """`-lr <gradient of sample i's share, u>` by the trainer's own loss of one sample at a time.

    Args:
        trainer: a trained `Recorded` trainer.
        score_batches: the collated batches that a step is scored against.
        counts: the number of items of one sample.
        counted, averaged: whether the loss is divided by all items of a step, and by the number of
            micro-batches.
    """
    model, args = trainer.model.eval(), trainer.args
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    model.activation_checkpointing_disable()

    def gradient(inputs: Inputs, number: Any = None) -> list[Tensor]:
        loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=number)
        return list(torch.autograd.grad(loss, list(named.values())))

    total = torch.zeros(len(trainer.train_dataset), len(score_batches(0)), dtype=torch.float64)
    for seen in trainer.seen:
        model.load_state_dict(seen["weights"])
        us = [gradient(batch) for batch in score_batches(seen["step"])]
        ids = seen["inputs"]["ghost_sample_id"].flatten().tolist()
        samples = [rows_of(seen["inputs"], i, len(ids)) for i in range(len(ids))]
        own = sum(map(counts, samples))
        rates = [seen["rates"][k] for k in named]
        for i, sample in zip(ids, samples, strict=True):
            share = 1.0 if counted else counts(sample) / own
            share = share / seen["micro_batches"] if averaged else share
            g = gradient(sample, seen["counted"] if counted else None)
            for column, u in enumerate(us):
                dots = [-r * (a * b).sum() for r, a, b in zip(rates, g, u, strict=True)]
                total[i, column] += share * torch.stack(dots).double().sum()
    assert args.per_device_train_batch_size > 1
    return total


def in_order(dataset: list[Inputs], size: int) -> Callable[[int], list[Inputs]]:
    """The score batch of a step: `size` samples in order and over again, stacked."""

    def batches(step: int) -> list[Inputs]:
        width = min(size, len(dataset))
        chosen = [dataset[(step * width + j) % len(dataset)] for j in range(width)]
        return [{k: torch.stack([torch.as_tensor(x[k]) for x in chosen]) for k in chosen[0]}]

    return batches


def same_training(
    make: Callable[[], nn.Module], args: Any, tolerance: float, **options: Any
) -> Any:
    """Train with scores and without; the weights are the same. Returns the scoring trainer."""
    plain_options = {k: x for k, x in options.items() if not k.startswith(("score", "sample_"))}
    plain = make()
    Trainer(model=plain, args=args, **plain_options).train()
    trainer = Recorded(model=make(), args=args, **options)
    trainer.train()
    start = make().state_dict()
    assert any((start[k] - x).abs().max() > 1e-3 for k, x in plain.state_dict().items())
    assert_close(trainer.model.state_dict(), plain.state_dict(), tolerance, floor=1.0)
    return trainer
