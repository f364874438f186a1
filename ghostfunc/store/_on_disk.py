"""The rows of one checkpoint on disk: its chunk files and their marks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostfunc.store import _checkpoints, _chunk, _dtypes
from ghostfunc.store._checkpoints import Checkpoint
from ghostfunc.store._chunk import Mark
from ghostfunc.store._errors import Damaged, StoreError
from ghostfunc.store._files import Files
from ghostfunc.store._meta import Meta

CHUNK_NAME = re.compile(r"c\.(0|[1-9]\d{0,17})\.0")


class StoredChunks:
    """Chunk files and marks of one checkpoint.

    A chunk's rows are written before its mark, and removed after it: what is marked is there.

    Attributes:
        checkpoint: what the rows belong to.
    """

    def __init__(self, files: Files, meta: Meta, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files = files
        self._folder = _checkpoints.folder_of(checkpoint.name)
        self._owner = checkpoint.owner(meta)
        self._shape = (meta.chunk_rows, meta.projection.k)
        self._dtype = meta.dtype
        self._stored = np.dtype(_dtypes.STORED[meta.dtype]).newbyteorder("<")

    def key(self, part: str, number: int) -> str:
        """The file of a chunk's "rows" or "marks"."""
        return f"{self._folder}/{part}/c.{number}.0"

    def marked(self) -> NDArray[np.int64]:
        """Numbers of all chunks that have a mark, sorted; only names are read."""
        found = (CHUNK_NAME.fullmatch(name) for name in self._files.names(f"{self._folder}/marks"))
        return np.sort(np.fromiter((int(m[1]) for m in found if m), np.int64))

    def mark(self, number: int) -> Mark | None:
        """The mark of a chunk; None if it has none, `Damaged` if it is not the one written."""
        key = self.key("marks", number)
        data = self._read(key, _chunk.MARK_BYTES)
        if data is None:
            return None
        try:
            mark = Mark.from_bytes(data, self._owner, number)
            if not 1 <= mark.rows <= self._shape[0]:
                raise Damaged(f"marks {mark.rows} rows of {self._shape[0]}")
        except Damaged as damaged:
            raise Damaged(f"{self._files}/{key} {damaged}.") from damaged
        return mark

    def read(self, number: int) -> NDArray[Any]:
        """The rows of a chunk that are done, as stored: `[rows, k]`, none if it has no mark.

        Raises:
            Damaged: they are not the rows that were written.
        """
        mark = self.mark(number)
        while mark is not None:
            try:
                return self._rows(number, mark)
            except Damaged:
                # A chunk that is written over while it is read has another mark by now.
                before, mark = mark, self.mark(number)
                if before == mark:
                    raise
        return np.empty((0, self._shape[1]), self._stored)

    def _rows(self, number: int, mark: Mark) -> NDArray[Any]:
        key = self.key("rows", number)
        size = self._shape[0] * self._shape[1] * self._stored.itemsize
        data = self._read(key, size)
        if data is None:
            raise Damaged(f"{self._files}/{key} is not there.")
        try:
            whole = _chunk.unseal(data, size).view(self._stored).reshape(self._shape)
            rows: NDArray[Any] = whole[: mark.rows]
            # The file's own sum, which has just been checked, is that of all its rows.
            known = int.from_bytes(data[size:], "little") if len(rows) == len(whole) else None
            mark.check(rows, known)
            _chunk.check_finite(rows, self._dtype)
        except Damaged as damaged:
            raise Damaged(f"{self._files}/{key} {damaged}.") from damaged
        return rows

    def _read(self, key: str, size: int) -> bytearray | None:
        try:
            return self._files.read(key, size + _chunk.SUM_BYTES)
        except StoreError as error:
            raise Damaged(str(error)) from error

    def write(self, chunks: Iterable[tuple[int, NDArray[Any]]]) -> None:
        """Write the first rows of chunks, `[rows, k]` as stored, and then mark them: the rows of
        all of them stay before the first mark is there."""
        marks: list[tuple[str, bytes]] = []
        self._files.write_all(self._sealed(number, rows, marks) for number, rows in chunks)
        self._files.write_all(marks)

    def _sealed(
        self, number: int, rows: NDArray[Any], marks: list[tuple[str, bytes]]
    ) -> tuple[str, bytes]:
        """The file of a chunk's rows; its mark is added to `marks`."""
        whole = np.empty(self._shape, self._stored)
        whole[: len(rows)] = rows
        # What zarr calls the fill value, where there is no sample yet.
        whole[len(rows) :] = 0x7FC0 if self._dtype == "bfloat16" else np.nan
        new = Mark.of(whole[: len(rows)])
        try:
            old = self.mark(number)
            keeps = old is None or (
                old.rows <= len(rows) and Mark.of(whole[: old.rows]).crc == old.crc
            )
        except Damaged:
            keeps = False
        if not keeps:
            # Killed in between, the chunk is missing: never old marks beside new rows.
            self._files.delete(self.key("marks", number))
        marks.append((self.key("marks", number), new.to_bytes(self._owner, number)))
        return self.key("rows", number), _chunk.seal(whole)

    def discard(self, number: int) -> None:
        """Forget a chunk."""
        self._files.delete(self.key("marks", number))
        self._files.delete(self.key("rows", number))
