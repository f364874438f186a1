"""How much memory a computation takes, measured on a few samples."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ghostfunc._base.torch_private import TorchDispatchMode
from ghostfunc._base.trees import tensors_of


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it, as long as they live.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # What came from outside is not ours, though views of it will be seen.
        self._known.update(_storages((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    """The memory of tensors; of sparse ones, that of their parts is met where those are made."""
    return [x.untyped_storage() for x in tensors_of(tree) if x.layout == torch.strided]


@dataclass(frozen=True)
class Linear:
    """Bytes as a linear function of the number of samples."""

    fixed: int
    per_sample: int

    def __call__(self, n: int) -> int:
        return self.fixed + n * self.per_sample


def line_through(one: int, two: int) -> Linear:
    """The line through the bytes for one and for two samples."""
    slope = max(0, two - one)
    return Linear(max(0, one - slope), slope)
