"""Samples that a collator puts into one row: every sample is a document of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_close
from hf_trainers import Recorded, arguments, gpt2, llama, same_training
from test_trained import by_items, lora
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

import ghostfunc as gf

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def ragged(n: int, seed: int) -> list[dict[str, list[int]]]:
    """Texts of unequal lengths, of which one has no label."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for size in torch.randint(4, 11, (n,), generator=generator).tolist():
        ids = torch.randint(3, 40, (size,), generator=generator).tolist()
        out.append({"input_ids": ids, "labels": [*[-100] * (len(out) % 3), *ids[len(out) % 3 :]]})
    out[2]["labels"] = [-100] * len(out[2]["labels"])
    return out


TRAIN, SCORE = ragged(8, 0), ragged(5, 1)
FLAT: dict[str, Any] = {
    "train_dataset": TRAIN,
    "score_dataset": SCORE,
    "data_collator": DataCollatorWithFlattening(),
}


ALL = {"return_seq_idx": True, "return_flash_attn_kwargs": True}


def expected(trainer: Any, score: list[Any]) -> Tensor:
    """`-lr <g_i, u>` of texts by themselves, in a loop."""
    model = trainer.model.eval()
    model.activation_checkpointing_disable()
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}

    def gradient(item: dict[str, list[int]], number: Tensor) -> list[Tensor]:
        inputs = {k: torch.tensor([x]) for k, x in item.items()}
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=number)
        return list(torch.autograd.grad(loss, list(named.values())))

    total = torch.zeros(len(TRAIN), 1, dtype=torch.float64)
    for seen in trainer.seen:
        model.load_state_dict(seen["weights"])
        chosen = [score[(4 * seen["step"] + j) % len(score)] for j in range(4)]
        items = torch.tensor(sum(y != -100 for x in chosen for y in x["labels"][1:]))
        parts = [gradient(x, items) for x in chosen]
        u = [torch.stack(row).sum(0) for row in zip(*parts, strict=True)]
        for i in seen["inputs"]["ghost_sample_id"].flatten().tolist():
            g = gradient(TRAIN[i], seen["counted"])
            rates = [seen["rates"][k] for k in named]
            dots = [-r * (a * b).sum().double() for r, a, b in zip(rates, g, u, strict=True)]
            total[i] += torch.stack(dots).sum()
    return total


@pytest.mark.parametrize("make", [gpt2, llama, lora()])
@pytest.mark.parametrize(
    "options", [{}, {"return_seq_idx": True, "return_flash_attn_kwargs": True}]
)
def test_every_sample_is_a_document(
    make: Callable[[], nn.Module], options: dict[str, bool], tmp_path: Path
) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1)
    data = {**FLAT, "data_collator": DataCollatorWithFlattening(**options)}
    trainer = same_training(make, args, 1e-6, **data)
    assert_close(trainer.scores.values, expected(trainer, SCORE), 1e-4)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"label_smoothing_factor": 0.1}, {}),
        ({"activation_checkpointing": True}, {}),
        ({}, {"score_form": "exact"}),
        ({}, {"score_order": 2}),
        ({}, {"log_gradients": True, "score_batch_size": 1}),
    ],
)
def test_values_are_those_of_padded_rows(
    given: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    def padded(features: list[Any]) -> dict[str, Tensor]:
        width = max(len(x["input_ids"]) for x in features)
        rows = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        out = {k: torch.full((len(features), width), fill) for k, fill in rows.items()}
        for i, x in enumerate(features):
            size = len(x["input_ids"])
            out["input_ids"][i, :size] = torch.tensor(x["input_ids"])
            out["labels"][i, :size] = torch.tensor(x["labels"])
            out["attention_mask"][i, :size] = 1
        return out

    values = []
    for collate in (padded, DataCollatorWithFlattening()):
        args = arguments(tmp_path, gradient_accumulation_steps=3, **given)
        trainer = Recorded(
            model=llama(), args=args, **{**FLAT, "data_collator": collate}, **options
        )
        trainer.train()
        values.append(trainer.scores.values)
    assert_close(values[1], values[0], 1e-4)


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The training texts, numbered."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({**x, "idx": i} for i, x in enumerate(TRAIN))


def test_an_iterable_dataset(tmp_path: Path) -> None:
    """Its loader cuts every tensor of a batch to the rows of the first."""
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    data = {**FLAT, "train_dataset": Stream(), "id_column": "idx"}
    trainer = Recorded(model=llama(), args=args, **data)
    trainer.train()
    assert trainer.scores.ids.tolist() == list(range(8))
    assert_close(trainer.scores.values, expected(trainer, SCORE), 1e-4)


def test_compiled_passes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(gf.OptionError, match=r"compile=True .* let the collator pad"):
        gf.hf.GhostTrainer(model=llama(), args=arguments(tmp_path), **FLAT, compile=True).train()


@pytest.mark.parametrize(
    ("collate", "options", "said"),
    [
        (
            lambda features: {
                k: torch.cat([torch.tensor(f[k]) for f in features])[None] for k in features[0]
            },
            {},
            r"made 1 rows of 'input_ids' from 3 samples.*DataCollatorWithFlattening",
        ),
        (
            lambda features: DataCollatorWithFlattening()(
                [{k: x[:2] for k, x in f.items()} for f in features] + features
            ),
            {},
            "one row of 3 samples, in which 6 documents begin",
        ),
        (
            DataCollatorWithFlattening(),
            {"compute_loss_func": by_items},
            r"asked about one sample at a time.*gf\.documents",
        ),
    ],
)
def test_what_is_refused(collate: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    trainer = gf.hf.GhostTrainer(
        model=llama(), args=arguments(tmp_path), **{**FLAT, "data_collator": collate}, **options
    )
    with pytest.raises(gf.BatchError, match=said):
        trainer.train()
