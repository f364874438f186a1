"""A store: projected gradients of a corpus, row by sample, checkpoint by checkpoint.

On disk it is a zarr 3 group, readable by anything that reads zarr:

    zarr.json                     metadata, with its own checksum
    checkpoints/<name>/rows       [N, k], in chunks of whole rows, each with a crc32c
    checkpoints/<name>/done       [N] uint8: which rows are written

Rows are written before they are marked as done, so a process may be killed at any moment. Chunks
are the unit of concurrency: any number of processes may write, no two of them to one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.types import PyTree
from ghostfunc.projection import Projection, projection_from_spec
from ghostfunc.store import _arrays, _dtypes, _faiss, _query
from ghostfunc.store._arrays import ChunkedArray, Damaged, Place
from ghostfunc.store._errors import (
    DamagedRowsError,
    IncompatibleStoreError,
    IncompleteStoreError,
    StoreError,
    ranges,
)
from ghostfunc.store._faiss import SearchIndex
from ghostfunc.store._fingerprint import fingerprint
from ghostfunc.store._query import Preconditioner, Query, TopK, Weights

CHUNK_BYTES = 8 << 20
"""About how large a chunk is, unless asked for."""


@dataclass(frozen=True)
class Damage:
    """Rows whose bytes are not those that were written."""

    checkpoint: str
    rows: range
    why: str


class Store:
    """Projected gradients of a corpus; made by `Store.create` or `Store.open`.

    Attributes:
        projection: the operator that made the rows.
        n_samples: number of samples; sample ids are `0 ... n_samples - 1`.
        dtype: "float32", "float16" or "bfloat16".
        chunk_rows: samples per chunk.
        tokenizer, notes: what was said at creation.
        checkpoints: names and learning rates.
    """

    def __init__(self, where: Place, meta: dict[str, Any], *, writable: bool) -> None:
        self._where = where
        self._meta = meta
        self._writable = writable
        self._arrays: dict[str, tuple[ChunkedArray, ChunkedArray]] = {}
        self.projection: Projection = projection_from_spec(meta["projection"])
        self.dtype: str = meta["dtype"]
        self.chunk_rows: int = meta["chunk_rows"]
        self.tokenizer: str | None = meta["tokenizer"]
        self.notes: dict[str, Any] = meta["notes"]

    @property
    def n_samples(self) -> int:
        return int(self._meta["n_samples"])

    def __repr__(self) -> str:
        return (
            f"Store({self._where}, {self.n_samples} samples, {self.projection!r}, {self.dtype}, "
            f"checkpoints {list(self.checkpoints)})"
        )

    # --- making and opening ---------------------------------------------------------------

    @classmethod
    def create(
        cls,
        url: str | Path,
        *,
        projection: Projection,
        n_samples: int,
        dtype: str,
        chunk_rows: int | None = None,
        tokenizer: str | None = None,
        notes: dict[str, Any] | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> Store:
        """Make an empty store, to be done by one process; the others `open` it.

        Args:
            url: a local path, or a URL of any file system that fsspec knows (`s3://...`). Chunks
                are replaced as a whole on local disks and in object stores.
            projection: the operator that makes the rows.
            n_samples: how many samples the corpus has now; see `append`.
            dtype: "float32", "float16" or "bfloat16".
            chunk_rows: samples per chunk, by default about 8 MiB of them. Work is shared and
                resumed chunk by chunk.
            tokenizer: name or hash of what made the samples, kept as it is.
            notes: anything else to keep, as JSON.
            storage_options: for fsspec.

        Raises:
            StoreError: there is a store already. OptionError: an unknown dtype or a bad size.
        """
        _dtypes.check_dtype(dtype)
        row_bytes = projection.k * np.dtype(_dtypes.STORED[dtype]).itemsize
        rows = max(1, min(4096, CHUNK_BYTES // row_bytes)) if chunk_rows is None else chunk_rows
        if rows < 1 or n_samples < 1:
            raise OptionError(f"chunk_rows={rows} and n_samples={n_samples} must be at least 1.")
        where = _arrays.place(url, storage_options, read_only=False)
        meta = {
            "format": 1,
            "ghostfunc": version("ghostfunc"),
            "projection": projection.spec(),
            "k": projection.k,
            "n_samples": n_samples,
            "dtype": dtype,
            "chunk_rows": rows,
            "tokenizer": tokenizer,
            "notes": notes or {},
        }
        _arrays.create_group(where, "", meta)
        _arrays.create_group(where, "checkpoints", {})
        return cls(where, meta, writable=True)

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        projection: Projection | None = None,
        writable: bool = False,
        storage_options: dict[str, Any] | None = None,
    ) -> Store:
        """Open a store that is there.

        Args:
            url: where it was created.
            projection: what its rows are expected to be made with; None takes what is there.
            writable: whether rows may be written.
            storage_options: for fsspec.

        Raises:
            StoreError: no store, one of another format, or damaged metadata.
            IncompatibleStoreError: the store is of another projection.
        """
        where = _arrays.place(url, storage_options, read_only=not writable)
        meta = _arrays.read_meta(where, "")
        if meta.get("format") != 1:
            raise StoreError(f"the store has format {meta.get('format')}; this version reads 1.")
        store = cls(where, meta, writable=writable)
        if projection is not None:
            store.check_projection(projection)
        return store

    def check_projection(self, projection: Projection) -> None:
        """Raise `IncompatibleStoreError` unless `projection` made the store's rows."""
        ours, theirs = self.projection.spec(), projection.spec()
        for key in ("kind", "seed", "compress", "blocks"):
            if ours[key] != theirs[key]:
                pairs = zip(ours["blocks"], theirs["blocks"], strict=False)
                first = next(((a, b) for a, b in pairs if a != b), None)
                detail = f"{ours[key]!r} and {theirs[key]!r}"
                if key == "blocks":
                    detail = (
                        f"{first[0]} and {first[1]}"
                        if first
                        else f"{len(ours[key])} and {len(theirs[key])} parameters"
                    )
                raise IncompatibleStoreError(
                    f"the store's projection and the given one differ in {key}: {detail}. Rows of "
                    "different projections cannot be compared: use the store's own "
                    "(store.projection), or another store."
                )

    # --- checkpoints and samples ----------------------------------------------------------

    @property
    def checkpoints(self) -> dict[str, float | None]:
        """Names of the checkpoints and their learning rates."""
        names = _arrays.groups(self._where, "checkpoints")
        return {name: self._checkpoint_meta(name)["lr"] for name in names}

    def add_checkpoint(self, name: str, params: PyTree, *, lr: float | None = None) -> None:
        """Make room for the rows of one set of parameters; by one process.

        Args:
            name: of the checkpoint; letters, digits, `.`, `_` and `-`.
            params: its parameters; their fingerprint is kept, and rows of others are refused.
            lr: learning rate at this checkpoint, for `weights="lr"` in queries (TracIn).
        """
        self._need_writable()
        if not name or not all(c.isalnum() or c in "._-" for c in name) or name[0] == ".":
            raise OptionError(
                f"a checkpoint cannot be called {name!r}: use letters, digits, '.', '_', '-'."
            )
        path = f"checkpoints/{name}"
        n, k = self.n_samples, self.projection.k
        meta = {"lr": lr, "model": fingerprint(params)}
        _arrays.create_group(self._where, path, meta)
        stored, fill = _dtypes.STORED[self.dtype], _dtypes.UNWRITTEN[self.dtype]
        ChunkedArray.create(self._where, f"{path}/rows", (n, k), self.chunk_rows, stored, fill)
        ChunkedArray.create(self._where, f"{path}/done", (n,), self.chunk_rows, "uint8", 0)

    def check_model(self, checkpoint: str, params: PyTree) -> None:
        """Raise `IncompatibleStoreError` unless the checkpoint is that of `params`."""
        ours, theirs = self._checkpoint_meta(checkpoint)["model"], fingerprint(params)
        if ours != theirs:
            raise IncompatibleStoreError(
                f"checkpoint {checkpoint!r} holds rows of a model with fingerprint {ours[:12]}, "
                f"but these parameters have {theirs[:12]}. Rows of different models cannot be "
                "mixed: add a checkpoint of its own for each (store.add_checkpoint)."
            )

    def append(self, count: int) -> range:
        """Make room for `count` more samples; returns their ids. While nobody writes."""
        self._need_writable()
        if count < 1:
            raise OptionError(f"count={count} must be at least 1.")
        start, stop = self.n_samples, self.n_samples + count
        for name in self.checkpoints:
            for array in self._open(name):
                array.resize(stop)
        # Last of all: killed before this, the store is as it was.
        self._meta = {**self._meta, "n_samples": stop}
        _arrays.write_meta(self._where, "", self._meta)
        self._arrays.clear()
        return range(start, stop)

    def _checkpoint_meta(self, name: str) -> dict[str, Any]:
        names = _arrays.groups(self._where, "checkpoints")
        if name not in names:
            raise OptionError(
                f"there is no checkpoint {name!r}; the store has {names or 'none'}. Make it with "
                "store.add_checkpoint."
            )
        return _arrays.read_meta(self._where, f"checkpoints/{name}")

    def _open(self, name: str) -> tuple[ChunkedArray, ChunkedArray]:
        if name not in self._arrays:
            self._checkpoint_meta(name)
            path, mode = f"checkpoints/{name}", "r+" if self._writable else "r"
            n, stored = self.n_samples, _dtypes.STORED[self.dtype]
            self._arrays[name] = (
                ChunkedArray.open(
                    self._where,
                    f"{path}/rows",
                    (n, self.projection.k),
                    self.chunk_rows,
                    stored,
                    mode,
                ),
                ChunkedArray.open(
                    self._where, f"{path}/done", (n,), self.chunk_rows, "uint8", mode
                ),
            )
        return self._arrays[name]

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
        start = number * self.chunk_rows
        return range(start, min(start + self.chunk_rows, self.n_samples))

    def missing(self, checkpoint: str, chunks: Iterable[int] | None = None) -> NDArray[np.int64]:
        """The ids of samples that have no row yet, sorted; in some chunks or in all."""
        out = [np.empty(0, np.int64)]
        for number in range(self.n_chunks) if chunks is None else chunks:
            ids = self.chunk(number)
            out.append(np.flatnonzero(~self._done(checkpoint, ids)) + ids.start)
        return np.concatenate(out)

    def _done(self, checkpoint: str, ids: range) -> NDArray[np.bool_]:
        try:
            marks = self._open(checkpoint)[1].read(ids)
        except Damaged as damaged:
            raise DamagedRowsError(checkpoint, ids, str(damaged)) from damaged
        return marks.astype(bool)

    def _stored(self, checkpoint: str, ids: range, done: NDArray[np.bool_]) -> NDArray[Any]:
        """A chunk's rows as they are stored; all that are done must be there."""
        try:
            rows = self._open(checkpoint)[0].read(ids)
        except Damaged as damaged:
            raise DamagedRowsError(checkpoint, ids, str(damaged)) from damaged
        # Written rows are finite: a NaN is the fill value of a chunk that has gone.
        if bool(torch.isnan(_dtypes.decode(rows[:, :1].copy(), self.dtype)[done]).any()):
            raise DamagedRowsError(checkpoint, ids, "the chunk is not there")
        return rows

    # --- rows -----------------------------------------------------------------------------

    def write(
        self, ids: Sequence[int] | NDArray[np.int64], rows: Float[Tensor, "m k"], checkpoint: str
    ) -> None:
        """Write rows by sample id.

        Every chunk that is touched must be complete afterwards, so that two processes never have a
        reason to write to the same one: hand over the rows of whole chunks (`store.chunk(i)`), or
        what is still missing of them.

        Args:
            ids: `[m]` sample ids, each once, in any order.
            rows: `[m, k]`.
            checkpoint: its name.

        Raises:
            OptionError: ids or rows that do not fit. StoreError: an incomplete chunk, or rows that
            are not finite in the store's dtype.
        """
        self._need_writable()
        where = np.asarray(ids, dtype=np.int64)
        if rows.shape != (len(where), self.projection.k):
            raise OptionError(
                f"rows of shape {tuple(rows.shape)} for {len(where)} ids; expected "
                f"[{len(where)}, {self.projection.k}]."
            )
        if len(np.unique(where)) < len(where):
            raise OptionError("ids holds a sample more than once.")
        if len(where) and not 0 <= where.min() <= where.max() < self.n_samples:
            raise OptionError(
                f"ids must lie in 0 ... {self.n_samples - 1}; got {where.min()} to {where.max()}."
            )
        values = _dtypes.encode(rows, self.dtype)
        for number in np.unique(where // self.chunk_rows).tolist():
            inside = where // self.chunk_rows == number
            self._write_chunk(checkpoint, self.chunk(number), where[inside], values[inside])

    def _write_chunk(
        self, checkpoint: str, chunk: range, ids: NDArray[np.int64], values: NDArray[Any]
    ) -> None:
        data, marks = self._open(checkpoint)
        at = ids - chunk.start
        whole = np.empty((len(chunk), values.shape[1]), values.dtype)
        if len(ids) < len(chunk):
            done = self._done(checkpoint, chunk)
            after = done.copy()
            after[at] = True
            if not after.all():
                lacking = (np.flatnonzero(~after) + chunk.start).tolist()
                raise StoreError(
                    f"rows of a part of a chunk: samples {ranges(lacking)} of the chunk "
                    f"{chunk.start}-{chunk.stop - 1} would still be missing. Write whole chunks "
                    "(store.chunk(i) has their ids), all rows of a chunk from one process."
                )
            whole[:] = self._stored(checkpoint, chunk, done)
        whole[at] = values
        data.write(chunk, whole)
        marks.write(chunk, np.ones(len(chunk), np.uint8))

    def read(self, ids: Sequence[int] | NDArray[np.int64], checkpoint: str) -> Float[Tensor, "m k"]:
        """Rows by sample id, in float32.

        Raises:
            IncompleteStoreError: some of them are missing. DamagedRowsError: some are damaged.
        """
        where = np.asarray(ids, dtype=np.int64)
        if len(where) and not 0 <= where.min() <= where.max() < self.n_samples:
            raise OptionError(f"ids must lie in 0 ... {self.n_samples - 1}.")
        out = torch.empty(len(where), self.projection.k)
        for number in np.unique(where // self.chunk_rows).tolist():
            inside = np.flatnonzero(where // self.chunk_rows == number)
            chunk = self.chunk(number)
            at = where[inside] - chunk.start
            out[torch.from_numpy(inside)] = self._read_chunk(checkpoint, chunk, at)[
                torch.from_numpy(at)
            ]
        return out

    def _read_chunk(
        self, checkpoint: str, chunk: range, wanted: NDArray[np.int64] | None = None
    ) -> Tensor:
        done = self._done(checkpoint, chunk)
        if not (done if wanted is None else done[wanted]).all():
            lacking = (np.flatnonzero(~done) + chunk.start).tolist()
            raise IncompleteStoreError(
                f"samples {ranges(lacking)} have no row in checkpoint {checkpoint!r} yet. "
                "store.missing(checkpoint) lists all; project_dataset completes the store."
            )
        return _dtypes.decode(self._stored(checkpoint, chunk, done), self.dtype)

    def chunks(self, checkpoint: str) -> Iterator[tuple[range, Float[Tensor, "rows k"]]]:
        """All rows, chunk by chunk, in float32; the next chunk is read meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._read_chunk, checkpoint, self.chunk(0))
            for number in range(self.n_chunks):
                rows = ahead.result()
                if number + 1 < self.n_chunks:
                    ahead = pool.submit(self._read_chunk, checkpoint, self.chunk(number + 1))
                yield self.chunk(number), rows

    # --- questions ------------------------------------------------------------------------

    def scores(
        self,
        query: Query,
        *,
        normalize: str = "none",
        layers: Sequence[str] | None = None,
        precondition: Preconditioner | dict[str, Preconditioner] | None = None,
        weights: Weights = None,
        per_block: bool = False,
    ) -> Float[Tensor, "q N ..."]:
        """How much every stored sample matters for every query.

            scores[j, i] = sum_c w_c q_cj^T A_c x_ci

        Args:
            query: `[q, k]` projected gradients of the queries (`ghost_project` with
                `store.projection`), or one such per checkpoint.
            normalize: "none", "cosine" (the formula divided by the norms of both), or "relative"
                (by that of the stored row alone: what is large everywhere counts less); norms are
                those of the metric, per checkpoint.
            layers: glob patterns of the parameters to count; None for all.
            precondition: the metric `A`, from `store.preconditioner`; None for the identity.
            weights: of the checkpoints: None for 1, "lr" for their learning rates (TracIn), or
                a dict.
            per_block: keep the parameters apart, each compared by itself: `[q, N, blocks]`.

        Returns:
            `[q, N]`, float32. The rows are streamed; only the scores are held. For a corpus whose
            scores are too many, see `topk`.

        Raises:
            OptionError: a query that does not fit. IncompleteStoreError, DamagedRowsError: rows are
            missing or damaged.

        References:
            Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent"
            (TracIn), 2020. Barshan et al., "RelatIF", 2020. Xia et al., "LESS", 2024.
        """
        stream = _query.iter_scores(
            self,
            query,
            normalize=normalize,
            layers=layers,
            precondition=precondition,
            weights=weights,
            per_block=per_block,
        )
        return torch.cat([s for _, s in stream], 1)

    def topk(
        self,
        query: Query,
        k: int,
        *,
        normalize: str = "none",
        layers: Sequence[str] | None = None,
        precondition: Preconditioner | dict[str, Preconditioner] | None = None,
        weights: Weights = None,
    ) -> TopK:
        """The k samples with the highest scores for every query, best first.

        Arguments and errors are those of `scores`; memory is that of one chunk, whatever the
        size of the store.

        Returns:
            `TopK(scores [q, k], ids [q, k])`.
        """
        stream = _query.iter_scores(
            self,
            query,
            normalize=normalize,
            layers=layers,
            precondition=precondition,
            weights=weights,
            per_block=False,
        )
        return _query.best(stream, k)

    def preconditioner(self, checkpoint: str, *, damping: float) -> Preconditioner:
        """The damped inverse second moment of a checkpoint's rows, per parameter.

            A_b = (1/N sum_i x_ib x_ib^T + lambda_b I)^-1,  lambda_b = damping * mean eigenvalue

        Args:
            checkpoint: its name.
            damping: relative to the mean eigenvalue of each block (LoGra: 0.1).
        """
        return _query.preconditioner(self, checkpoint, damping=damping)

    def index(
        self,
        checkpoint: str,
        *,
        factory: str,
        normalize: str = "cosine",
        layers: Sequence[str] | None = None,
        precondition: Preconditioner | None = None,
        train_rows: int = 100_000,
    ) -> SearchIndex:
        """An index for approximate search over one checkpoint (needs `ghostfunc[faiss]`).

        It holds the rows in memory in whatever form `factory` says. Ask `topk` as well for a few
        queries to see what the index misses.

        Args:
            checkpoint: its name.
            factory: as in `faiss.index_factory`: "Flat" (exact), "HNSW32,Flat", "IVF256,SQ8", ...
            normalize: "cosine" or "none", as in `scores`.
            layers, precondition: as in `scores`.
            train_rows: how many rows the index may train on.

        Returns:
            A `SearchIndex` with `.topk(query, k)`, and `.index`, the `faiss.Index`.

        Raises:
            ImportError: FAISS is not installed. OptionError: an unknown factory or option.
        """
        return _faiss.build(
            self,
            checkpoint,
            factory=factory,
            normalize=normalize,
            layers=layers,
            precondition=precondition,
            train_rows=train_rows,
        )

    # --- damage ---------------------------------------------------------------------------

    def check(self, checkpoint: str | None = None) -> list[Damage]:
        """Read everything back and list what is damaged; empty if all checksums hold."""
        out = []
        for name in self.checkpoints if checkpoint is None else [checkpoint]:
            for number in range(self.n_chunks):
                chunk = self.chunk(number)
                try:
                    self._stored(name, chunk, self._done(name, chunk))
                except DamagedRowsError as error:
                    out.append(Damage(name, chunk, str(error.__cause__ or error)))
        return out

    def discard(self, damage: Iterable[Damage]) -> None:
        """Forget damaged rows: they are missing again, and can be made again."""
        self._need_writable()
        for hit in damage:
            rows, done = self._open(hit.checkpoint)
            done.delete(hit.rows)
            rows.delete(hit.rows)
