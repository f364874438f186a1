"""Fingerprints of tensors: what a file of results was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def fingerprint(names: Sequence[str], tensors: Sequence[Tensor]) -> str:
    """SHA-256 of the names, shapes, dtypes and values of tensors, in order of names."""
    digest = hashlib.sha256()
    for name, x in sorted(zip(names, tensors, strict=True), key=lambda pair: pair[0]):
        digest.update(f"{name}\0{tuple(x.shape)}\0{x.dtype}\0".encode())
        values = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()
