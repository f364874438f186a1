"""Score datasets: which samples a step is scored against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ghostfunc._base.errors import BatchError, OptionError

Collate = Callable[[list[Any]], Any]


class ScoreSet:
    """The samples of a score dataset, in order and over again.

    A dataset with a length is indexed; an iterable one is read on, and begun again at its end.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.dataset = name, dataset
        self._stream: Iterator[Any] | None = None
        self._position = 0
        if self.length == 0:
            raise self._empty()

    @property
    def length(self) -> int | None:
        """Its number of samples; None if it is iterable alone."""
        if isinstance(self.dataset, IterableDataset):
            return None
        if isinstance(self.dataset, Sized):
            return len(self.dataset)
        if isinstance(self.dataset, Iterable) and not isinstance(self.dataset, Iterator):
            return None
        raise OptionError(
            f"score_dataset {self.name!r} is a {type(self.dataset).__name__}. Give a dataset with "
            "a length and samples by index (a list, say), or an IterableDataset."
        )

    def samples(self, step: int, size: int) -> list[Any]:
        """The `size` samples that step number `step` is scored against; all if there are fewer."""
        length = self.length
        if length is not None:
            size = min(size, length)
            return [self.dataset[(step * size + j) % length] for j in range(size)]
        if self._stream is None or self._position != step * size:
            self._stream, self._position = iter(self.dataset), 0
            for _ in range(step * size):
                self._next()
        return [self._next() for _ in range(size)]

    def first(self, count: int) -> list[Any]:
        """A few samples from all over it, to know it by; of an iterable, its first ones."""
        length = self.length
        if length is None:
            stream = iter(self.dataset)
            return [x for x, _ in zip(stream, range(count), strict=False)]
        count = min(count, length)
        return [self.dataset[j * length // count] for j in range(count)]

    def _next(self) -> Any:
        assert self._stream is not None
        self._position += 1
        for item in self._stream:
            return item
        self._stream = iter(self.dataset)
        for item in self._stream:
            return item
        raise self._empty()

    def _empty(self) -> OptionError:
        return OptionError(
            f"score_dataset is empty ({self.name!r}); scores need at least one sample."
        )


def collated(
    samples: Sequence[Any],
    collate: Collate,
    seed: int,
    together: int | None,
    name: str,
    owned: Callable[[Any], int],
) -> list[tuple[Any, int]]:
    """Samples as batches of `together` (all of them by default), each with its size: a sample
    counts as often as `owned` says."""
    width = len(samples) if together is None else together
    pieces = []
    with torch.random.fork_rng():
        # Collators may draw (masked tokens): the same draws in a resumed run.
        torch.manual_seed(seed)
        for start in range(0, len(samples), width):
            piece = list(samples[start : start + width])
            try:
                pieces.append((collate(piece), sum(map(owned, piece))))
            except (RuntimeError, ValueError) as error:
                raise BatchError(
                    f"The collator cannot make one batch of {len(piece)} samples of score_dataset "
                    f"{name!r}. If they differ in length, give a data_collator that pads, or "
                    f"score_batch_size=1. It said: {str(error).splitlines()[0]}"
                ) from error
    return pieces


def score_sets(given: Any) -> dict[str, ScoreSet]:
    """One set under the name "score", or those of a dict."""
    named = given if isinstance(given, dict) else {"score": given}
    if not named:
        raise OptionError("score_dataset is empty; scores need at least one sample.")
    return {name: ScoreSet(str(name), dataset) for name, dataset in named.items()}
