"""Fingerprints of tensors: what a file of results was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ghostfunc._base.module import ModuleFn
from ghostfunc._base.types import ModelFn, PyTree


def fingerprint(names: Sequence[str], tensors: Sequence[Tensor]) -> str:
    """SHA-256 of the names, shapes, dtypes and values of tensors, in order of names."""
    digest = hashlib.sha256()
    for name, x in sorted(zip(names, tensors, strict=True), key=lambda pair: pair[0]):
        digest.update(f"{name}\0{tuple(x.shape)}\0{x.dtype}\0".encode())
        values = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()


def frozen(model_fn: ModelFn, params: PyTree) -> str:
    """The fingerprint of a module's frozen parameters and buffers; "" for other functions, whose
    constants nobody can see."""
    if not isinstance(model_fn, ModuleFn):
        return ""
    state = model_fn.closed_over(params)
    return fingerprint(list(state), list(state.values()))
