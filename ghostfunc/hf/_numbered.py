"""Samples that carry a number through sampler, workers and collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ghostfunc._base.errors import BatchError

SAMPLE_ID = "ghost_sample_id"
"""The key of the numbers, in features and in batches."""

PLACE = "ghost_sample_place"
"""The batch key that says, for every document of the one row, which sample it belongs to."""


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
    """Collates without the numbers under `key`, and puts them beside the batch.

    Where `owned` says that samples own several documents of the batch's one row, there is a number
    for each document.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        key: str,
        owned: Callable[[Any], int] = lambda _: 1,
    ) -> None:
        self.collate, self.key, self.owned = collate, key, owned

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for feature in features:
            if self.key not in feature:
                raise BatchError(
                    f"A training sample has no {self.key!r} to be known by; it has "
                    f"{sorted(feature)}."
                )
        ids = torch.tensor([_whole(self.key, f[self.key]) for f in features], device="cpu")
        rest = [{k: v for k, v in feature.items() if k != self.key} for feature in features]
        batch = dict(self.collate(rest))  # its rows are looked at where the loss is known
        row = batch.get("input_ids")
        if not isinstance(row, Tensor) or row.ndim != 2 or len(row) != 1:
            return {**batch, SAMPLE_ID: ids}
        # In a row as well: loaders of iterable datasets cut all tensors to so many.
        owned = torch.tensor([self.owned(feature) for feature in rest], device="cpu")
        if bool((owned == 1).all()):
            return {**batch, SAMPLE_ID: ids[None]}
        places = torch.arange(len(ids), device="cpu").repeat_interleave(owned)
        return {**batch, SAMPLE_ID: ids[places][None], PLACE: places[None]}


def _whole(key: str, x: Any) -> int:
    """An id, as an integer."""
    try:
        number = int(x)
        whole = isinstance(x, str) or number == x
    except (TypeError, ValueError, OverflowError):
        number, whole = 0, False
    if not whole or number.bit_length() > 63:
        raise BatchError(
            f"A training sample has {key}={x!r:.60} to be known by; expected an integer of 64 "
            "bits. Number the samples; or leave id_column out, and they are known by their index "
            "in train_dataset."
        )
    return number


def taken_places(inputs: dict[str, Any]) -> Tensor | None:
    """Which sample each document of a batch belongs to, `[documents]`, taken out of the batch; None
    where samples and documents are the same."""
    places = inputs.pop(PLACE, None)
    return None if places is None else torch.as_tensor(places, device="cpu")[0]


def taken_ids(inputs: dict[str, Any], key: str | None) -> Tensor:
    """The numbers of a batch, which are taken out of it.

    Raises:
        BatchError: it has none: it comes from a loader of the user's own.
    """
    for name in (SAMPLE_ID, key):
        if name in inputs:
            ids = torch.as_tensor(inputs.pop(name), device="cpu")
            ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids  # those of one row
            if ids.ndim == 1 and not (ids.is_floating_point() or ids.is_complex()):
                return ids.long()
            raise BatchError(
                f"{name!r} of a training batch is {list(ids.shape)} of {ids.dtype}; expected an "
                "integer for each sample, [n]."
            )
    raise BatchError(
        "A training batch does not say which samples it has: it comes from a get_train_dataloader "
        "of the trainer's own, not from GhostMixin's. Give every sample an integer id, name its "
        f"column with id_column (now {key!r}) and let the batches carry it; or take the loader of "
        "super().get_train_dataloader(). Samplers alone go into _get_train_sampler."
    )
