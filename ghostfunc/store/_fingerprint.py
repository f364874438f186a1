"""Which model rows belong to."""

from __future__ import annotations

import hashlib

import torch

from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import PyTree


def fingerprint(params: PyTree) -> str:
    """SHA-256 of the names, shapes, dtypes and values of all parameters, in order of names."""
    leaves, spec = flatten_params(params)
    digest = hashlib.sha256()
    for name, x in sorted(zip(spec.names, leaves, strict=True), key=lambda pair: pair[0]):
        digest.update(f"{name}\0{tuple(x.shape)}\0{x.dtype}\0".encode())
        values = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
