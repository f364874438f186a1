"""What GhostTrainer trains is what Trainer trains, and its scores are those of that loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from hf_trainers import (
    DEFAULTS,
    arguments,
    bert,
    class_of,
    gpt2,
    images,
    in_order,
    labelled,
    llama,
    mixtral,
    rating_of,
    same_training,
    scores_by_definition,
    several_of,
    t5,
    texts,
    vit,
)
from torch import Tensor, nn
from transformers import (
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
)

import ghostfunc as gf

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # peft asks by the name that transformers 5.23 gives up.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
]


def tokens(sample: dict[str, Tensor]) -> int:
    return int((sample["labels"][:, 1:] != -100).sum())


def aligned_tokens(sample: dict[str, Tensor]) -> int:
    return int((sample["labels"] != -100).sum())


def one(sample: dict[str, Tensor]) -> int:
    return 1


@dataclass
class Case:
    """A setting, what it divides by, and what is left to say."""

    make: Callable[[], nn.Module]
    data: Callable[[int, int], list[Any]] = texts
    counts: Callable[[dict[str, Tensor]], int] = tokens
    counted: bool = True
    averaged: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)


def classes(n: int, seed: int) -> list[Any]:
    return labelled(n, seed, class_of)


def pairs(n: int, seed: int) -> list[Any]:
    return [{**x, "labels": x["labels"][2:]} for x in texts(n, seed)]


def smoothed_pairs(n: int, seed: int) -> list[Any]:
    """Trainer takes the labels away before a smoothed loss: the decoder's input is given."""
    shift = t5().prepare_decoder_input_ids_from_labels
    return [{**x, "decoder_input_ids": shift(x["labels"][None])[0]} for x in pairs(n, seed)]


def token_sums(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = module(input_ids=batch["input_ids"]).logits[:, :-1]
    losses = F.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none")
    return losses.sum(1)


TOKENS = gf.hf.SampleLoss(token_sums, lambda batch: (batch["labels"][:, 1:] != -100).sum(1))


def adapted(config: peft.PeftConfig, make: Callable[[], nn.Module] = gpt2) -> nn.Module:
    torch.manual_seed(1)
    model = peft.get_peft_model(make(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at first: then lora_A has no gradient
            nn.init.normal_(p, std=0.1)
    return model


def small(kind: type[nn.Module]) -> nn.Module:
    """A BERT with another head."""
    config = bert(num_labels=2).config
    torch.manual_seed(0)
    return kind(config)


LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
LM = {"task_type": "CAUSAL_LM"}


def lora(make: Callable[[], nn.Module] = gpt2, **options: Any) -> Callable[[], nn.Module]:
    return lambda: adapted(peft.LoraConfig(**{**LORA, **LM, **options}), make)


def by_items(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return loss / count


def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    losses = F.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def token_mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def spans(n: int, seed: int) -> list[Any]:
    """The last start and the first end are behind the input: neither counts."""
    items = [
        {"input_ids": x["input_ids"], "start_positions": i % 12, "end_positions": i * 5 % 12}
        for i, x in enumerate(texts(n, seed))
    ]
    items[-1]["start_positions"] = items[-1]["end_positions"] = 40
    return items


def choices(n: int, seed: int) -> list[Any]:
    return [
        {"input_ids": torch.stack([x["input_ids"], x["input_ids"].flip(0)]), "labels": i % 2}
        for i, x in enumerate(texts(n, seed))
    ]


def span(item: dict[str, Tensor]) -> int:
    return int(item["start_positions"] < 12)


OWN_MEAN = {"counts": one, "counted": False}
"""A head that is told the number of items and does not use it: micro-batches' means add up."""

CASES: dict[str, Case] = {
    "causal lm": Case(gpt2),
    "routed experts": Case(mixtral),
    "seq2seq lm": Case(t5, pairs, aligned_tokens, counted=False),
    "classes": Case(bert, classes, **OWN_MEAN),
    "classes of images": Case(vit, lambda n, s: images(n, s, class_of), one),
    "several labels": Case(
        lambda: bert(problem_type="multi_label_classification"),
        lambda n, s: labelled(n, s, several_of),
        **OWN_MEAN,
    ),
    "ratings": Case(lambda: bert(num_labels=1), lambda n, s: labelled(n, s, rating_of), **OWN_MEAN),
    "smoothed": Case(gpt2, args={"label_smoothing_factor": 0.1}),
    "smoothed classes": Case(bert, classes, one, args={"label_smoothing_factor": 0.2}),
    "smoothed targets": Case(
        t5, smoothed_pairs, aligned_tokens,
        args={"label_smoothing_factor": 0.1},
    ),
    "compute_loss_func": Case(gpt2, options={"compute_loss_func": by_items}),
    "compute_loss_func, a mean": Case(
        bert, classes, **OWN_MEAN, options={"compute_loss_func": focal}
    ),
    "compute_loss_func, a mean over tokens": Case(
        gpt2, counted=False, options={"compute_loss_func": token_mean}
    ),
    "spans": Case(
        lambda: small(BertForQuestionAnswering), spans, span, counted=False, averaged=True
    ),
    "choices": Case(lambda: small(BertForMultipleChoice), choices, **OWN_MEAN),
    "next sentences": Case(
        lambda: small(BertForNextSentencePrediction),
        lambda n, s: labelled(n, s, lambda x: class_of(x) % 2),
        **OWN_MEAN,
    ),
    "sums and counts": Case(gpt2, options={"sample_loss": TOKENS}),
    "lora": Case(lora()),
    "dora": Case(lora(use_dora=True)),
    "dora, checkpoints": Case(lora(use_dora=True), args={"activation_checkpointing": True}),
    "dora, checkpoints, Llama": Case(
        lambda: adapted(
            peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True, **LM), llama
        ),
        args={"activation_checkpointing": True},
    ),
    "lora, head saved": Case(
        lora(partial(gpt2, tie_word_embeddings=False), modules_to_save=["lm_head"])
    ),
    "lora, some tokens": Case(lora(trainable_token_indices=[3, 5, 7])),
    "lora, embeddings": Case(lora(target_modules=["wte", "c_attn"])),
    "lora, sums and counts": Case(lora(), options={"sample_loss": TOKENS}),
    "lora, classes": Case(
        lambda: adapted(
            peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), bert
        ),
        classes,
        **OWN_MEAN,
    ),
    "ia3": Case(
        lambda: adapted(
            peft.IA3Config(
                target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], **LM
            ),
            llama,
        )
    ),
    "loha": Case(
        lambda: adapted(
            peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "down_proj"], **LM), llama
        )
    ),
    "loha, checkpoints": Case(
        lambda: adapted(peft.LoHaConfig(r=2, target_modules=["q_proj"], **LM), llama),
        args={"activation_checkpointing": True},
    ),
    "randlora": Case(
        lambda: adapted(peft.RandLoraConfig(r=2, target_modules=["q_proj", "up_proj"], **LM), llama)
    ),
    "prompt tuning": Case(
        lambda: adapted(peft.PromptTuningConfig(num_virtual_tokens=3, **LM)),
        args={"learning_rate": 0.1},
    ),
    "prefix tuning": Case(
        lambda: adapted(peft.PrefixTuningConfig(num_virtual_tokens=3, **LM), llama),
        args={"learning_rate": 0.1},
    ),
}  # fmt: skip
"""Two micro-batches a step, of unequal numbers of items; an odd last one."""


@pytest.mark.parametrize("name", CASES)
def test_weights_and_scores(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    args = arguments(
        tmp_path, **{"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, **case.args}
    )
    train, score = case.data(8, 0), case.data(5, 1)
    data = {"train_dataset": train, "score_dataset": score}
    trainer = same_training(case.make, args, 1e-6, **data, **case.options)
    expected = scores_by_definition(
        trainer,
        in_order(score, DEFAULTS["per_device_eval_batch_size"]),
        case.counts,
        counted=case.counted,
        averaged=case.averaged,
    )
    assert_close(trainer.scores.values, expected, 1e-4)
