"""A trainer says once that its rows look like blocks of several documents."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_trainers import arguments, gpt2, texts
from torch import Tensor

import ghostfunc as gf
from ghostfunc.hf._blocks import warn_of_blocks

END = 2


def block(at: int, *, learned: bool = True) -> dict[str, Tensor]:
    """A row of two documents, the first of which ends at a position."""
    ids = torch.arange(10, 20)
    ids[at] = END
    labels = ids.clone()
    labels[at + 1 :] = labels[at + 1 :] if learned else -100
    return {"input_ids": ids, "labels": labels}


def test_a_trainer_says_so_once(tmp_path: Path) -> None:
    rows = [block(k % 5 + 2) for k in range(9)]
    trainer = gf.hf.GhostTrainer(
        gpt2(), arguments(tmp_path), train_dataset=rows, score_dataset=texts(3, 1)
    )
    with pytest.warns(
        UserWarning, match="blocks of several documents: the token that ends"
    ) as told:
        trainer.train()
    assert sum("blocks of several" in str(x.message) for x in told) == 1


ALONE: dict[str, Any] = {
    "one document": block(9),
    "what follows is padding": block(4, learned=False),
    "no labels": {"input_ids": block(4)["input_ids"]},
    "positions after padding": block(9) | {"position_ids": torch.tensor([0, 0, 0, *range(7)])},
    "no text": {"pixel_values": torch.zeros(3, 8, 8)},
}


@pytest.mark.parametrize("what", ALONE)
def test_rows_of_one_document_are_left_alone(what: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_blocks(gpt2(), {k: x[None] for k, x in ALONE[what].items()}, 1)


def test_positions_that_begin_anew() -> None:
    row = block(9) | {"position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5])}
    with pytest.warns(UserWarning, match="position_ids begin anew"):
        warn_of_blocks(gpt2(), {k: x[None] for k, x in row.items()}, 1)


def test_samples_of_one_row_are_told_apart() -> None:
    row = block(9) | {"position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_blocks(gpt2(), {k: x[None] for k, x in row.items()}, 2)
