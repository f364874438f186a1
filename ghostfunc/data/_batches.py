"""Samples to batches: those of like length together, no batch above a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc._base.options import check_callable, check_dataset, check_whole
from ghostfunc._base.types import PyTree


class Dataset(Protocol):
    """A map-style data set: a list, a `torch.utils.data.Dataset`, a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Collate = Callable[[list[Any]], PyTree]
Length = Callable[[Any], int]


def group(lengths: Sequence[int], token_budget: int, batch_size: int | None) -> list[list[int]]:
    """Indices of samples in groups of like length, of at most `token_budget` padded tokens each.

    The longest come first: what does not fit into memory fails at once. A sample that is longer
    than the budget has a group of its own.
    """
    groups: list[list[int]] = []
    widest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = not groups or (batch_size is not None and len(groups[-1]) >= batch_size)
        if full or (len(groups[-1]) + 1) * widest > token_budget:
            groups.append([])
            widest = lengths[i]
        groups[-1].append(i)
    return groups


def batches(
    dataset: Dataset,
    *,
    collate: Collate,
    length: Length | None = None,
    token_budget: int = 4096,
    batch_size: int | None = None,
) -> Iterator[PyTree]:
    """The batches of a data set, for `gf.direction` and `score_dataset(val=...)`.

        samples of like length share a batch;  len(batch) * longest <= token_budget

    Args:
        dataset: map-style.
        collate: makes a batch, a pytree of tensors `[n, ...]`, of a list of samples.
        length: tokens of a sample; 1 by default.
        token_budget: the most tokens of a batch, padding included. A longer sample goes alone.
        batch_size: the most samples of a batch.

    Yields:
        Every sample once, the longest first.

    Raises:
        BatchError: the data set is empty.
        OptionError: a limit is not positive.

    Example:
        u = gf.direction(model_fn, params, batches(targets, collate=padded(0), length=len))
    """
    check_limits(token_budget, batch_size)
    check_whole("token_budget", token_budget)
    check_dataset(dataset)
    check_functions(collate, length)
    check_callable("collate", collate, "from a list of samples to a batch")
    if not len(dataset):
        raise BatchError(f"the data set ({type(dataset).__name__}) is empty; expected samples.")
    lengths = [1 if length is None else length(dataset[i]) for i in range(len(dataset))]
    for indices in group(lengths, token_budget, batch_size):
        yield collate([dataset[i] for i in indices])


def check_functions(collate: object, length: object) -> None:
    """Raise `OptionError` unless both are functions, or None."""
    if collate is not None:
        check_callable("collate", collate, "from a list of samples to a batch")
    if length is not None:
        check_callable("length", length, "from a sample to its number of tokens")


def check_limits(token_budget: object, batch_size: object) -> None:
    """Raise `OptionError` unless the limits are positive integers, or None."""
    for name, value in (("token_budget", token_budget), ("batch_size", batch_size)):
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise OptionError(f"{name}={value!r} must be a positive integer or None.")


def padded(pad_id: int, *, label_pad: int = -100) -> Collate:
    """A `collate` for token sequences of unequal lengths.

    Args:
        pad_id: what `input_ids` are padded with, on the right.
        label_pad: what `labels` are padded with.

    Returns:
        A function from a list of samples, mappings of sequences of integers with `input_ids` among
        them, to a dict of tensors `[n, T]`: the same keys, and an `attention_mask`, 1 for every
        token of the sample. Other keys are padded with 0.

    Raises:
        BatchError: (by the function) a sample has other keys than the first, no tokens, or
            sequences of unequal lengths.
    """

    check_whole("pad_id", pad_id, 0)
    check_whole("label_pad", label_pad, -(1 << 62))

    def collate(samples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(_length_of(sample, samples[0]) for sample in samples)
        pads = {"input_ids": pad_id, "labels": label_pad}
        out = {
            key: torch.full((len(samples), longest), pads.get(key, 0), dtype=torch.long)
            for key in samples[0]
        }
        mask = torch.zeros((len(samples), longest), dtype=torch.long)
        for i, sample in enumerate(samples):
            count = len(sample["input_ids"])
            for key, row in sample.items():
                out[key][i, :count] = torch.as_tensor(row)
            mask[i, :count] = 1
        return {"attention_mask": mask} | out

    return collate


def _length_of(sample: Mapping[str, Any], first: Mapping[str, Any]) -> int:
    if sample.keys() != first.keys() or "input_ids" not in sample:
        raise BatchError(
            f"a sample has the keys {sorted(sample)}, the first of its batch {sorted(first)}; "
            "expected the same keys in all, input_ids among them."
        )
    counts = {key: len(row) for key, row in sample.items()}
    if len(set(counts.values())) != 1 or not counts["input_ids"]:
        raise BatchError(
            f"the sequences of a sample have the lengths {counts}; expected one length above zero."
        )
    return counts["input_ids"]
