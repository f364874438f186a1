"""What a run's scores were made of, as a hash: samples of a dataset, item by item."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def fingerprint(samples: Sequence[Any], length: int | None) -> str:
    """A hash of some samples of a dataset and of its length."""
    digest = hashlib.sha256(repr(length).encode())
    for sample in samples:
        _add(digest, sample)
    return digest.hexdigest()[:32]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Datasets may draw (augmentation): the same draws every time, and none from elsewhere."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def _add(digest: Any, x: Any) -> None:
    """Add a value to the hash, with its type and shape: no two values read alike."""
    digest.update(type(x).__name__.encode())
    if isinstance(x, Tensor):
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(x, np.ndarray | np.generic):
        array = np.ascontiguousarray(x)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    elif isinstance(x, Mapping):
        digest.update(f"{len(x)}".encode())
        for key in sorted(x, key=repr):
            _add(digest, key)
            _add(digest, x[key])
    elif isinstance(x, list | tuple):
        digest.update(f"{len(x)}".encode())
        for item in x:
            _add(digest, item)
    elif isinstance(x, str | bytes | int | float | bool | complex | None):
        digest.update(repr(x).encode())
    else:  # an image, say: by its pixels, as numpy reads them
        _add(digest, np.asarray(x))
