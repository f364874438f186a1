"""Rows that hold several documents: a trainer's sample is then a block, and so is its score."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model


def warn_of_blocks(module: nn.Module, batch: Mapping[str, Any], n: int) -> None:
    """Say so where rows of a trainer's batch are blocks of documents: positions begin anew within
    a row, or a token that is learned follows the one that ends texts. A row of n samples is none:
    they are told apart."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != n:
        return
    sign = _positions(batch.get("position_ids"), ids) or _ends(module, batch, ids)
    if sign:
        warnings.warn(
            f"Rows of the first micro-batch look like blocks of several documents: {sign}. Values "
            "are of rows, then: a row's is what its documents do together. To score documents, "
            "train with a row for each, or ask gf.ghost_dot_prod for scores of "
            "gf.documents(rows). Conversations, with that token after each turn, are samples as "
            "they are.",
            stacklevel=2,
        )


def _positions(positions: Any, ids: Tensor) -> str:
    if not isinstance(positions, Tensor) or positions.shape != ids.shape:
        return ""
    anew = (positions[:, 1:] == 0) & (positions[:, :-1] > 0)
    return "position_ids begin anew within rows" if bool(anew.any()) else ""


def _ends(module: nn.Module, batch: Mapping[str, Any], ids: Tensor) -> str:
    labels = batch.get("labels")
    base = unwrap_peft_model(module)
    if not isinstance(base, PreTrainedModel) or not isinstance(labels, Tensor):
        return ""
    end = base.config.to_dict().get("eos_token_id")
    if labels.shape != ids.shape or labels.is_floating_point() or end is None:
        return ""
    ends = torch.tensor(end, device=ids.device).flatten()
    learned = ids[:, 1:] == labels[:, 1:]
    within = torch.isin(ids[:, :-1], ends) & learned & ~torch.isin(ids[:, 1:], ends)
    return f"the token that ends texts ({end}) is followed by others" if bool(within.any()) else ""
