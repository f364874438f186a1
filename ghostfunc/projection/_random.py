"""Random matrices addressed by name: the same on every machine, rank and run.

Every stream is a counter-based Philox generator keyed by the SHA-256 of `(seed, path, role)`. Row c
of a matrix (one per *input* coordinate) is a function of the key and of c alone, so any range of
rows can be made without the others, and no global generator is touched. Only raw bits are taken
from numpy, whose streams of raw bits never change; its distributions may.

All functions return `P^T`, `[count, k]`, scaled so that `E[P^T P] = I`: inner products are
unbiased.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

NONZEROS = 4
"""Nonzeros per input coordinate of a sparse projection."""

_PER_COUNTER = 4  # 64-bit words that Philox makes of one counter value


def stream_key(seed: int, path: str, role: str) -> int:
    """The 128-bit key of a stream."""
    text = "\0".join(["ghostfunc projection 1", str(seed), role, path])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def _words(key: int, start: int, count: int, per_row: int) -> NDArray[np.uint64]:
    """Raw words of rows `start` to `start + count`, `[count, at least per_row]`."""
    counters = -(-per_row // _PER_COUNTER)
    stream = np.random.Philox(key=key, counter=start * counters)
    return stream.random_raw(count * counters * _PER_COUNTER).reshape(count, -1)


def rademacher(key: int, start: int, count: int, k: int) -> NDArray[np.float32]:
    """Entries `+-1/sqrt(k)`."""
    words = _words(key, start, count, -(-k // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), axis=1, bitorder="little")[:, :k]
    scale = np.float32(1 / math.sqrt(k))
    return np.array([-scale, scale], dtype=np.float32)[bits]


def gaussian(key: int, start: int, count: int, k: int) -> NDArray[np.float32]:
    """Entries `N(0, 1/k)`, by Box and Muller."""
    return (_normals(key, start, count, k) / math.sqrt(k)).astype(np.float32)


def sparse(key: int, start: int, count: int, k: int) -> NDArray[np.float32]:
    """`s = min(4, k)` nonzeros `+-1/sqrt(s)` per row, one in each of s groups of columns (SJLT)."""
    columns, values = sparse_entries(key, start, count, k)
    out = np.zeros((count, k), np.float32)
    np.put_along_axis(out, columns, values, axis=1)
    return out


def sparse_entries(
    key: int, start: int, count: int, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Columns and values of the nonzeros of `sparse`, `[count, s]` each."""
    s = min(NONZEROS, k)
    words = _words(key, start, count, s)[:, :s]
    edges = np.arange(s + 1) * k // s
    widths = np.diff(edges).astype(np.uint64)
    columns = edges[:-1] + ((words >> np.uint64(11)) % widths).astype(np.int64)
    signs = 1 - 2 * (words & np.uint64(1)).astype(np.float32)
    return columns, signs / np.float32(math.sqrt(s))


def orthonormal(key: int, n: int, k: int) -> NDArray[np.float32]:
    """k orthonormal directions in n dimensions, uniformly distributed, times `sqrt(n/k)`."""
    q, r = np.linalg.qr(_normals(key, 0, n, k))
    return (q * np.sign(np.diag(r)) * math.sqrt(n / k)).astype(np.float32)


def _normals(key: int, start: int, count: int, k: int) -> NDArray[np.float64]:
    pairs = -(-k // 2)
    words = _words(key, start, count, 2 * pairs)
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniform[:, :pairs]))
    angle = 2 * np.pi * uniform[:, pairs : 2 * pairs]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :k]


MATRICES: dict[str, Callable[[int, int, int], NDArray[np.float32]]] = {
    "gaussian": lambda key, n, k: gaussian(key, 0, n, k),
    "rademacher": lambda key, n, k: rademacher(key, 0, n, k),
    "orthonormal": orthonormal,
    "sparse": lambda key, n, k: sparse(key, 0, n, k),
}
"""Whole matrices `P^T [n, k]` by kind."""
