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
    than the budget has a group of its own. Every shape of a batch is proved once, at the price of
    several batches: the number of samples is a power of two, the same for all groups of a width.
    """
    groups: list[list[int]] = []
    most = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or len(groups[-1]) >= most:
            groups.append([])
            fitting = max(1, token_budget // width(lengths[i]))
            most = 1 << fitting.bit_length() - 1
            most = most if batch_size is None else min(most, batch_size)
        groups[-1].append(i)
    return groups


def width(longest: int) -> int:
    """One of few widths that holds so many tokens: 1, 2, 4, ..., 32, 64, 96, 128, 160, 192, 224,
    256, 320, 384, ...; of 128 tokens and more at most a quarter above."""
    power = 1 << (longest - 1).bit_length()  # the next power of two
    step = power if power <= NARROW else max(NARROW, power // 8)
    return -(-longest // step) * step


NARROW = 32
"""Tokens below which widths are powers of two."""


def batches(
    dataset: Dataset,
    *,
    collate: Collate,
    length: Length | None = None,
    token_budget: int = 1024,
    batch_size: int | None = None,
) -> Iterator[PyTree]:
    """The batches of a data set, for `gf.direction` and `score_dataset(val=...)`.

        samples of like length share a batch;  len(batch) * longest <= token_budget

    Of samples of one width (`padded`), a power of two share a batch: few shapes of batches appear,
    each of which is proved once.

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


def padded(pad_id: int, *, label_pad: int = -100, max_length: int | None = None) -> Collate:
    """A `collate` for token sequences of unequal lengths.

    Args:
        pad_id: what `input_ids` are padded with, on the right.
        label_pad: what `labels` are padded with.
        max_length: the most tokens that the model takes. Batches are then padded to one of few
            widths (..., 32, 64, 96, 128, 160, 192, 224, 256, 320, ...), none above this one:
            batches of few shapes need few proofs, and a proof takes several times what a batch
            takes. By default they are padded to their longest sample.

    Returns:
        A function from a list of samples, mappings of sequences of integers with `input_ids` among
        them, to a dict of tensors `[n, T]`: the same keys, and an `attention_mask`, 1 for every
        token of the sample. Other keys are padded with 0.

    Raises:
        BatchError: (by the function) there are no samples; a sample has other keys than the first,
            no tokens, sequences of unequal lengths, or more tokens than `max_length`.
    """

    check_whole("pad_id", pad_id, 0)
    check_whole("label_pad", label_pad, -(1 << 62))
    if max_length is not None:
        check_whole("max_length", max_length)

    def collate(samples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not samples:
            raise BatchError("there are no samples to make a batch of; expected at least one.")
        longest = max(_length_of(sample, samples[0]) for sample in samples)
        if max_length is not None:
            if longest > max_length:
                raise BatchError(f"a sample has {longest} tokens; max_length={max_length}.")
            longest = min(width(longest), max_length)
        pads = {"input_ids": pad_id, "labels": label_pad}
        out = {
            key: torch.full(
                (len(samples), longest), pads.get(key, 0), dtype=torch.long, device="cpu"
            )
            for key in samples[0]
        }
        mask = torch.zeros((len(samples), longest), dtype=torch.long, device="cpu")
        for i, sample in enumerate(samples):
            count = len(sample["input_ids"])
            for key, row in sample.items():
                out[key][i, :count] = torch.as_tensor(row, device="cpu")
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
