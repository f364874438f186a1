"""The stored rows of a corpus, by sample and checkpoint: read, written, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_type
from ghostfunc.store import _dtypes
from ghostfunc.store._errors import Damaged, DamagedRowsError, StoreError, text_of
from ghostfunc.store._presence import Presence, joined

AT_ONCE = 16
"""Chunks that share the flushes of their folders. A process that is killed loses no more."""


@dataclass(frozen=True)
class Damage:
    """Rows whose bytes are not those that were written."""

    checkpoint: str
    rows: range
    why: str


class StoredRows(Presence):
    """Rows by sample id and checkpoint."""

    def _stored(self, checkpoint: str, number: int) -> NDArray[Any]:
        """The rows of a chunk that are done, as stored."""
        try:
            rows = self._chunks_of(checkpoint).read(number)
            if len(rows) > len(self.chunk(number)):
                raise Damaged(f"{self._files}: {len(rows)} rows are marked.")
        except Damaged as damaged:
            raise DamagedRowsError(checkpoint, self.chunk(number), str(damaged)) from damaged
        return rows

    # --- rows -----------------------------------------------------------------------------

    def write(
        self, ids: Sequence[int] | NDArray[np.int64], rows: Float[Tensor, "m k"], checkpoint: str
    ) -> None:
        """Write rows by sample id.

        Every chunk that is touched must be complete afterwards, so that two processes never have a
        reason to write to the same one: hand over the rows of whole chunks (`store.chunk(i)`), or
        what is still missing of them. A row that is there may be replaced; a process that is killed
        meanwhile leaves its chunk missing.

        Args:
            ids: `[m]` sample ids, each once, in any order.
            rows: `[m, k]`.
            checkpoint: its name.

        Raises:
            OptionError: ids or rows that do not fit. StoreError: an incomplete chunk, rows that
            are not finite in the store's dtype or too small for it, or a disk that does not take
            them.
        """
        self._need_writable()
        where = self._checked(ids)
        check_type("rows", rows, Tensor, "a tensor [m, k]")
        if not rows.is_floating_point():
            raise OptionError(f"rows are of {rows.dtype}; expected floating-point numbers.")
        if rows.shape != (len(where), self.projection.k):
            raise OptionError(
                f"rows of shape {tuple(rows.shape)} for {len(where)} ids; expected "
                f"[{len(where)}, {self.projection.k}]."
            )
        if len(np.unique(where)) < len(where):
            raise OptionError("ids holds a sample more than once.")
        values = _dtypes.encode(rows, self.dtype)
        stored = self._chunks_of(checkpoint)
        parts = list(self._by_chunk(where))
        for number, inside in parts:
            self._beside(checkpoint, number, where[inside])  # before the first write
        for start in range(0, len(parts), AT_ONCE):
            stored.write(
                (number, self._whole(checkpoint, number, where[inside], values[inside]))
                for number, inside in parts[start : start + AT_ONCE]
            )

    def _beside(self, checkpoint: str, number: int, ids: NDArray[np.int64]) -> NDArray[Any] | None:
        """The rows of a chunk that are there, None if none is needed; `StoreError` where some would
        still be missing."""
        chunk = self.chunk(number)
        if len(ids) == len(chunk):
            return None
        there = self._stored(checkpoint, number)
        new = np.zeros(len(chunk), bool)
        new[ids - chunk.start] = new[: len(there)] = True
        if not new.all():
            lacking = joined(range(i, i + 1) for i in np.flatnonzero(~new) + chunk.start)
            raise StoreError(
                f"rows of a part of a chunk: samples {text_of(lacking)} of the chunk "
                f"{chunk.start}-{chunk.stop - 1} would still be missing. Write whole chunks "
                "(store.chunk(i) has their ids), all rows of a chunk from one process."
            )
        return there

    def _whole(
        self, checkpoint: str, number: int, ids: NDArray[np.int64], values: NDArray[Any]
    ) -> NDArray[Any]:
        """All rows of a chunk: those that are written now, and those that are there."""
        chunk, there = self.chunk(number), self._beside(checkpoint, number, ids)
        whole = np.empty((len(chunk), values.shape[1]), values.dtype)
        if there is not None:
            whole[: len(there)] = there
        whole[ids - chunk.start] = values
        return whole

    def read(self, ids: Sequence[int] | NDArray[np.int64], checkpoint: str) -> Float[Tensor, "m k"]:
        """Rows by sample id, in float32.

        Raises:
            IncompleteStoreError: some of them are missing. DamagedRowsError: some are damaged.
        """
        where = self._checked(ids)
        out: Tensor | None = None
        for number, inside in self._by_chunk(where):
            at = where[inside] - self.chunk(number).start
            rows = self._read_chunk(checkpoint, number, at)[torch.from_numpy(at)]
            if out is None:  # only now: a chunk of this width is really there
                out = rows.new_empty(len(where), self.projection.k)
            out[torch.from_numpy(inside)] = rows
        return (
            torch.empty(0, self.projection.k, dtype=torch.float32, device="cpu")
            if out is None
            else out
        )

    def _read_chunk(
        self, checkpoint: str, number: int, wanted: NDArray[np.int64] | None = None
    ) -> Tensor:
        rows = self._stored(checkpoint, number)
        chunk = self.chunk(number)
        last = len(chunk) if wanted is None else int(wanted.max()) + 1
        if len(rows) < last:
            self._raise_incomplete(checkpoint, [chunk[len(rows) :]])
        return _dtypes.decode(rows, self.dtype)

    def chunks(
        self, checkpoint: str, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[range, Float[Tensor, "rows k"]]]:
        """All rows, or those of some chunks, chunk by chunk, in float32; the next one is read
        meanwhile."""
        order = range(self.n_chunks) if numbers is None else numbers
        if not len(order):
            return
        pool = ThreadPoolExecutor(1)
        try:
            ahead = pool.submit(self._read_chunk, checkpoint, order[0])
            for i, number in enumerate(order):
                rows = ahead.result()
                if i + 1 < len(order):
                    ahead = pool.submit(self._read_chunk, checkpoint, order[i + 1])
                yield self.chunk(number), rows
        finally:
            # The garbage collector may come here, in a thread that holds locks of `threading`:
            # joining another thread would then wait for ever.
            pool.shutdown(wait=False, cancel_futures=True)

    def _checked(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        where = np.asarray(ids)
        if where.ndim != 1 or (len(where) and where.dtype.kind not in "iu"):
            raise OptionError(
                f"ids must be a sequence of whole numbers; got {where.dtype} of shape "
                f"{where.shape}."
            )
        where = where.astype(np.int64)
        if len(where) and not 0 <= where.min() <= where.max() < self.n_samples:
            raise OptionError(
                f"ids must lie in 0 ... {self.n_samples - 1}; got {where.min()} to {where.max()}."
            )
        return where

    def _by_chunk(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """`(chunk, places in ids)` for every chunk that has some of them."""
        if not len(ids):
            return
        numbers = ids // self.chunk_rows
        order = np.argsort(numbers, kind="stable")
        found, starts = np.unique(numbers[order], return_index=True)
        yield from zip(found.tolist(), np.split(order, starts[1:]), strict=True)

    # --- damage ---------------------------------------------------------------------------

    def check(self, checkpoint: str | None = None) -> list[Damage]:
        """Read everything back and list what is damaged; empty if all that is marked holds.

        Raises:
            StoreError: metadata is damaged, or a checkpoint has lost its own.
        """
        self.check_whole()
        out = []
        for name in self.checkpoint_names if checkpoint is None else [checkpoint]:
            for number in self.finished(name).tolist():
                try:
                    self._stored(name, number)
                except DamagedRowsError as error:
                    out.append(Damage(name, self.chunk(number), error.why))
        return out

    def discard(self, damage: Iterable[Damage]) -> None:
        """Forget damaged rows: they are missing again, and can be made again."""
        self._need_writable()
        for hit in damage:
            self._chunks_of(hit.checkpoint).discard(hit.rows.start // self.chunk_rows)
