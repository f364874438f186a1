"""The rows that are there: checkpoints, chunks, and the samples that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ghostfunc._base.errors import OptionError
from ghostfunc.projection import Projection
from ghostfunc.store import _checkpoints, _recipe
from ghostfunc.store._errors import (
    Damaged,
    DamagedRowsError,
    IncompleteStoreError,
    StoreError,
    text_of,
)
from ghostfunc.store._files import Files
from ghostfunc.store._meta import Meta
from ghostfunc.store._on_disk import StoredChunks
from ghostfunc.store._recipe import Recipe

FEW = 64
"""Reading so many marks takes less time than listing the names of a large store."""


class Presence:
    """A store as its documents and the names of its marks describe it; no row is read.

    Attributes:
        projection: the operator that made the rows.
        n_samples: number of samples; sample ids are `0 ... n_samples - 1`.
        dtype: "float32", "float16" or "bfloat16".
        chunk_rows: samples per chunk.
        checkpoints: names and learning rates.
    """

    def __init__(self, files: Files, meta: Meta, *, writable: bool) -> None:
        self._files = files
        self._meta = meta
        self._writable = writable
        self._opened: dict[str, StoredChunks] = {}
        self.projection: Projection = meta.projection
        self.dtype: str = meta.dtype
        self.chunk_rows: int = meta.chunk_rows

    @property
    def n_samples(self) -> int:
        return self._meta.n_samples

    @property
    def checkpoints(self) -> dict[str, float | None]:
        """Names of the checkpoints and their learning rates.

        Raises:
            StoreError: a checkpoint's metadata is damaged, or it has rows and no metadata.
        """
        self.check_whole()
        return {name: _checkpoints.read(self._files, name).lr for name in self.checkpoint_names}

    @property
    def checkpoint_names(self) -> list[str]:
        """Names of the checkpoints, sorted; nothing else of them is read."""
        return _checkpoints.names(self._files)

    def learning_rate(self, checkpoint: str) -> float | None:
        """The learning rate that a checkpoint was added with."""
        return _checkpoints.read(self._files, checkpoint).lr

    def check_whole(self) -> None:
        """Raise `StoreError` if a checkpoint has rows but has lost its document."""
        lost = _checkpoints.bereft(self._files)
        if lost:
            key = f"{_checkpoints.folder_of(lost[0])}/{_checkpoints.DOCUMENT}"
            raise StoreError(
                f"{self._files}/{key} is not there, but rows of checkpoint {lost[0]!r} are: the "
                "file is lost, or a removal was interrupted. Put it back, or call "
                f"store.remove_checkpoint({lost[0]!r}). Until then, name the checkpoints to ask: "
                "query={checkpoint: [q, k]}."
            )

    def check_recipe(self, checkpoint: str, recipe: Recipe) -> Recipe | None:
        """The recipe on record, if any; `IncompatibleStoreError` if `recipe` makes other rows."""
        _checkpoints.read(self._files, checkpoint)
        return _recipe.check(self._files, checkpoint, recipe)

    def put_recipe(self, checkpoint: str, recipe: Recipe) -> None:
        """Put a recipe on record. The last one counts, so each process looks once more before its
        own first rows (`check_recipe`)."""
        self._need_writable()
        recipe.write(self._files, checkpoint)

    def _chunks_of(self, name: str) -> StoredChunks:
        if name not in self._opened:
            checkpoint = _checkpoints.read(self._files, name)
            _checkpoints.check_documents(self._files, self._meta, name)
            self._opened[name] = StoredChunks(self._files, self._meta, checkpoint)
        return self._opened[name]

    def _need_writable(self) -> None:
        if not self._writable:
            raise StoreError("the store was opened for reading; open it with writable=True.")

    # --- chunks ---------------------------------------------------------------------------

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.n_samples // self.chunk_rows)

    def chunk(self, number: int) -> range:
        """The sample ids of one chunk."""
        if not 0 <= number < self.n_chunks:
            raise OptionError(f"there is no chunk {number}; the store has {self.n_chunks}.")
        start = number * self.chunk_rows
        return range(start, min(start + self.chunk_rows, self.n_samples))

    def missing(self, checkpoint: str, chunks: Iterable[int] | None = None) -> list[range]:
        """The samples that have no row yet, as ranges of ids in order.

        Args:
            checkpoint: its name.
            chunks: numbers of the chunks to look at; None for all. Of a few, the marks are read; of
                more, the names of all marks, and marks only of chunks that an `append` cut.

        Raises:
            DamagedRowsError: a mark that was read is damaged.
        """
        numbers = None if chunks is None else self._numbers(chunks)
        if numbers is not None and len(numbers) <= FEW:
            return joined(self._undone(checkpoint, number) for number in numbers.tolist())
        marked = self.finished(checkpoint)
        if numbers is None:
            lacking = self._gaps(marked)
        else:
            lacking = [self.chunk(c) for c in np.setdiff1d(numbers, marked).tolist()]
            marked = np.intersect1d(numbers, marked)
        cut = {edge // self.chunk_rows for edge in self._meta.edges}
        parts = [self._undone(checkpoint, c) for c in cut.intersection(marked.tolist())]
        return joined(sorted([*lacking, *parts], key=lambda run: run.start))

    def _numbers(self, chunks: Iterable[int]) -> NDArray[np.int64]:
        """Numbers of chunks, sorted, each once; `OptionError` for one that is not there."""
        numbers = np.unique(np.fromiter(chunks, np.int64))
        for number in numbers[[0, -1]].tolist() if len(numbers) else ():
            self.chunk(number)
        return numbers

    def _gaps(self, marked: NDArray[np.int64]) -> list[range]:
        """The samples of all chunks but these."""
        ends = np.concatenate([[-1], marked, [self.n_chunks]])
        rows = self.chunk_rows
        return [
            range((int(ends[i]) + 1) * rows, min(int(ends[i + 1]) * rows, self.n_samples))
            for i in np.flatnonzero(np.diff(ends) > 1)
        ]

    def finished(self, checkpoint: str) -> NDArray[np.int64]:
        """Numbers of the chunks that have a mark, sorted; only names are read."""
        marked = self._chunks_of(checkpoint).marked()
        return marked[marked < self.n_chunks]

    def _undone(self, checkpoint: str, number: int) -> range:
        """The samples of one chunk that have no row yet: its last ones."""
        chunk = self.chunk(number)
        try:
            mark = self._chunks_of(checkpoint).mark(number)
        except Damaged as damaged:
            raise DamagedRowsError(checkpoint, chunk, str(damaged)) from damaged
        return chunk if mark is None else chunk[mark.rows :]

    def need(self, checkpoint: str, chunks: Sequence[int] | None) -> None:
        """Raise `IncompleteStoreError` unless all rows of these chunks are there; None for all."""
        lacking = self.missing(checkpoint, chunks)
        if lacking:
            self._raise_incomplete(checkpoint, lacking)

    def _raise_incomplete(self, checkpoint: str, lacking: list[range]) -> None:
        number = lacking[0].start // self.chunk_rows
        mark = self._chunks_of(checkpoint).key("marks", number)
        raise IncompleteStoreError(
            f"samples {text_of(lacking)} have no row in checkpoint {checkpoint!r} yet (their mark "
            f"{self._files}/{mark} is not there or says so). store.missing(checkpoint) lists all; "
            "project_dataset completes the store."
        )


def joined(runs: Iterable[range]) -> list[range]:
    """Ranges in order, those that touch made one, empty ones left out."""
    out: list[range] = []
    for run in runs:
        if not len(run):
            continue
        if out and out[-1].stop == run.start:
            out[-1] = range(out[-1].start, run.stop)
        else:
            out.append(run)
    return out
