"""A chunk of rows as a file, and the mark that says what the file holds.

    rows:  little-endian numbers [chunk_rows, k], then their crc32c          (zarr's own codecs)
    mark:  number of rows done (8 bytes), crc32c of these rows (4), SHA-256 (32); then a crc32c

The mark's SHA-256 is of the chunk's number, of what its checkpoint is, and of the two entries: a
file in another's place does not fit. Its crc32c is of the first rows alone, so that rows which are
added to a chunk leave the old mark true until the new one replaces it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghostfunc.store import _dtypes
from ghostfunc.store._errors import Damaged

try:
    import google_crc32c
except ImportError as error:
    raise ImportError(
        "ghostfunc.store needs google-crc32c: pip install 'ghostfunc[store]'."
    ) from error

SUM_BYTES = 4
ENTRIES = struct.Struct("<QI")
MARK_BYTES = ENTRIES.size + hashlib.sha256().digest_size


def crc(data: NDArray[Any]) -> int:
    """crc32c of an array's bytes."""
    return int(google_crc32c.value(np.ascontiguousarray(data).reshape(-1).view(np.uint8)))


def seal(data: NDArray[Any]) -> bytes:
    """A chunk file: the bytes and their crc32c."""
    return data.tobytes() + struct.pack("<I", crc(data))


def unseal(data: bytearray, size: int) -> NDArray[np.uint8]:
    """The `size` bytes of a chunk file; `Damaged` unless they are those that were written."""
    if len(data) != size + SUM_BYTES:
        raise Damaged(f"has {len(data)} bytes instead of {size + SUM_BYTES}")
    content = np.frombuffer(data, np.uint8)[:size]
    if struct.pack("<I", crc(content)) != data[size:]:
        raise Damaged("does not have the checksum it was written with")
    return content


@dataclass(frozen=True)
class Mark:
    """A record of the rows of a chunk that are written.

    Attributes:
        rows: how many of its rows, from its start.
        crc: their crc32c.
    """

    rows: int
    crc: int

    @classmethod
    def of(cls, rows: NDArray[Any]) -> Mark:
        return cls(len(rows), crc(rows))

    def to_bytes(self, owner: str, number: int) -> bytes:
        """The mark's file, for chunk `number` of the checkpoint `owner`."""
        entries = ENTRIES.pack(self.rows, self.crc)
        return seal(np.frombuffer(entries + _sha(owner, number, entries), np.uint8))

    @classmethod
    def from_bytes(cls, data: bytearray, owner: str, number: int) -> Mark:
        """The mark in a file; `Damaged` unless it was written for this chunk."""
        content = unseal(data, MARK_BYTES).tobytes()
        entries = content[: ENTRIES.size]
        if content[ENTRIES.size :] != _sha(owner, number, entries):
            raise Damaged("is that of another chunk, or of another checkpoint")
        return cls(*ENTRIES.unpack(entries))

    def check(self, rows: NDArray[Any], known: int | None) -> None:
        """`Damaged` unless `rows`, those that are done, are the ones that were marked.

        `known`: their crc32c, where it has been computed.
        """
        if (crc(rows) if known is None else known) != self.crc:
            raise Damaged("holds other rows than were marked as done")


def _sha(owner: str, number: int, entries: bytes) -> bytes:
    return hashlib.sha256(f"{owner}\0{number}\0".encode() + entries).digest()


def check_finite(rows: NDArray[Any], dtype: str) -> None:
    """`Damaged` for numbers that are not finite, which are never written."""
    x = _dtypes.decode(rows, dtype)
    # A sum is finite only if all are, and is a thirtieth of the work.
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).any(1).nonzero()[0])
        raise Damaged(f"holds a number that is not finite, in row {bad} of the chunk")
