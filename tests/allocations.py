"""Bytes that ops allocate."""

from __future__ import annotations

import weakref
from typing import Any

import optree
import torch
from compare import leaves_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that ops have made and that are alive, at their peak."""

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.peak = self.largest = self.alive = 0
        self._sizes = {x.untyped_storage()._cdata: 0 for x in leaves_of(known)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in optree.tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = size
            self.alive += size
            self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)
