"""Micro-batching: a batch that does not fit into memory, a few samples at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ghostfunc._base.errors import NonFiniteLossError
from ghostfunc._base.options import check_chunk_size
from ghostfunc._base.trees import batch_size, map_tensors
from ghostfunc._base.types import PyTree

T = TypeVar("T")


def chunk_count(n: int, chunk_size: int | None) -> int:
    """How many chunks n samples make."""
    return 1 if chunk_size is None else -(-n // chunk_size)


def chunks(
    batch: PyTree, chunk_size: int | None, what: str = "batch", *, least: int = 1
) -> list[tuple[int, PyTree]]:
    """Where each chunk begins, and the chunk: views of the batch, of at most `chunk_size` samples
    and as equal as can be (a chunk of one sample would be traced by itself); `least` of them."""
    check_chunk_size(chunk_size)
    n = batch_size(batch, what)
    count = max(least, chunk_count(n, chunk_size))
    if count == 1:
        return [(0, batch)]
    bounds = [i * n // count for i in range(count + 1)]
    return [(a, _cut(batch, a, b)) for a, b in itertools.pairwise(bounds)]


def each(
    call: Callable[[PyTree], T],
    batch: PyTree,
    chunk_size: int | None,
    what: str = "batch",
    *,
    least: int = 1,
) -> Iterator[T]:
    """What `call` returns for every chunk, one at a time."""
    parts = chunks(batch, chunk_size, what, least=least)
    for start, chunk in parts:
        try:
            out = call(chunk)
        except NonFiniteLossError as error:
            if len(parts) == 1:
                raise
            raise NonFiniteLossError(
                f"Among the samples of {what} from number {start} on, counted from there: {error}"
            ) from None
        yield out
        del out  # it is the caller's alone while the next chunk runs


def joined(parts: Iterable[Sequence[Tensor]], axis: int = 0) -> list[Tensor]:
    """Lists of tensors, side by side along an axis."""
    columns = list(zip(*parts, strict=True))
    return [x[0] if len(x) == 1 else torch.cat(x, axis) for x in columns]


class Sums:
    """Sums of tensors over chunks, in float32 or wider until they are asked for."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._dtypes: list[torch.dtype] = []
        self._own = False

    def add(self, tensors: Sequence[Tensor]) -> None:
        if not self._dtypes:
            self._sums, self._dtypes = list(tensors), [x.dtype for x in tensors]
            return
        for i, x in enumerate(tensors):
            if self._own:
                self._sums[i].add_(x)
            else:  # the first chunk's belong to whoever made them
                wide = torch.promote_types(x.dtype, torch.float32)
                self._sums[i] = self._sums[i].to(wide) + x
        self._own = True

    def result(self) -> list[Tensor]:
        """The sums, in the dtypes of what was added."""
        return [x.to(dtype) for x, dtype in zip(self._sums, self._dtypes, strict=True)]


def _cut(batch: PyTree, start: int, stop: int) -> PyTree:
    """Some samples of a batch."""
    return map_tensors(lambda x: x[start:stop], batch)
