"""Samples that carry a number through sampler, workers and collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ghostfunc._base.errors import BatchError

SAMPLE_ID = "ghost_sample_id"
"""The key of the numbers, in features and in batches."""


class Numbered(Dataset[dict[str, Any]]):
    """A map-style dataset whose items know their index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._numbered(self.dataset[index], index)

    def _numbered(self, item: Any, index: int) -> dict[str, Any]:
        if not isinstance(item, Mapping):
            raise BatchError(
                f"train_dataset[{index}] is a {type(item).__name__}; GhostTrainer needs a dict "
                "from the names of the model's inputs to their values."
            )
        return {**item, SAMPLE_ID: int(index)}


class NumberedCollator:
    """Collates without the numbers under `key`, and puts them beside the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any], key: str) -> None:
        self.collate, self.key = collate, key

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for feature in features:
            if self.key not in feature:
                raise BatchError(
                    f"A training sample has no {self.key!r} to be known by; it has "
                    f"{sorted(feature)}."
                )
        ids = torch.tensor([int(feature[self.key]) for feature in features], device="cpu")
        rest = [{k: v for k, v in feature.items() if k != self.key} for feature in features]
        batch = dict(self.collate(rest))  # its rows are looked at where the loss is known
        return {**batch, SAMPLE_ID: ids}
