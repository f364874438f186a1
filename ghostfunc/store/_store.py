"""A store: projected gradients of a corpus, row by sample, checkpoint by checkpoint.

On disk it is a zarr 3 group, readable by anything that reads zarr:

    zarr.json                          the store's metadata; its presence makes the store
    checkpoints/<name>/zarr.json       a checkpoint's metadata; its presence makes the checkpoint
    checkpoints/<name>/rows            [N, k], in chunks of whole rows
    checkpoints/<name>/marks           [chunks, 44]: which rows of a chunk are done, and their sums
    checkpoints/<name>/recipe          what `project_dataset` made the rows with

Rows are written before they are marked as done, so a process may be killed at any moment. Chunks
are the unit of concurrency: any number of processes may write, no two of them to one chunk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_flags, check_type
from ghostfunc._base.types import PyTree
from ghostfunc.projection import Projection
from ghostfunc.store import _checkpoints, _dtypes, _meta
from ghostfunc.store._checkpoints import Checkpoint
from ghostfunc.store._errors import IncompatibleStoreError, StoreError
from ghostfunc.store._files import Files, files_at
from ghostfunc.store._fingerprint import fingerprint
from ghostfunc.store._meta import Meta
from ghostfunc.store._questions import Questions

CHUNK_BYTES = 8 << 20
"""About how large a chunk is, unless asked for."""


class Store(Questions):
    """Projected gradients of a corpus; made by `Store.create` or `Store.open`.

    Attributes:
        projection: the operator that made the rows.
        n_samples: number of samples; sample ids are `0 ... n_samples - 1`.
        dtype: "float32", "float16" or "bfloat16".
        chunk_rows: samples per chunk.
        tokenizer, notes: what was said at creation.
        checkpoints: names and learning rates.
    """

    def __init__(self, files: Files, meta: Meta, *, writable: bool) -> None:
        super().__init__(files, meta, writable=writable)
        self.tokenizer: str | None = meta.tokenizer
        self.notes: dict[str, Any] = meta.notes

    def __repr__(self) -> str:
        return (
            f"Store({self._files}, {self.n_samples} samples, {self.projection!r}, {self.dtype}, "
            f"checkpoints {self.checkpoint_names})"
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
            url: a local path, or a URL of any file system that fsspec knows (`s3://...`). Files
                are replaced as a whole on local disks and in object stores.
            projection: the operator that makes the rows.
            n_samples: how many samples the corpus has now; see `append`.
            dtype: "float32", "float16" or "bfloat16". Rows that overflow or vanish in it are
                refused; float16 has no digits below 6e-8.
            chunk_rows: samples per chunk, by default about 8 MiB of them. Work is shared and
                resumed chunk by chunk.
            tokenizer: name or hash of what made the samples, kept as it is.
            notes: anything else to keep, as JSON.
            storage_options: for fsspec.

        Raises:
            StoreError: there is a store already, or the place cannot be written to. OptionError: an
            unknown dtype, a bad size, or notes that are no JSON; nothing is written then.
        """
        _check_projection(projection)
        _dtypes.check_dtype(dtype)
        row_bytes = projection.k * _dtypes.BYTES[dtype]
        rows = max(1, min(4096, CHUNK_BYTES // row_bytes)) if chunk_rows is None else chunk_rows
        if tokenizer is not None and not isinstance(tokenizer, str):
            raise OptionError(f"tokenizer={tokenizer!r} must be a string, or None.")
        if notes is not None and not isinstance(notes, dict):
            raise OptionError(f"notes={notes!r} must be a dict, or None.")
        meta = Meta(
            projection=projection,
            n_samples=_meta.check_count("n_samples", n_samples),
            dtype=dtype,
            chunk_rows=_meta.check_count("chunk_rows", rows),
            tokenizer=tokenizer,
            notes=_meta.json_of("notes", notes or {}),
        )
        files = files_at(url, storage_options)
        if files.exists(_meta.ROOT):
            raise StoreError(
                f"there is a store at {files} already. Open it with Store.open, or choose another "
                "place."
            )
        left = [*_checkpoints.names(files), *_checkpoints.bereft(files)]
        if left:
            raise StoreError(
                f"{files} holds the checkpoints {left} of a store whose {_meta.ROOT} is not there. "
                "Put that file back from a copy, remove the folder, or choose another place."
            )
        _checkpoints.prepare(files)
        meta.write(files)  # last: its presence makes the store
        return cls(files, meta, writable=True)

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
        if projection is not None:
            _check_projection(projection)
        check_flags(writable=writable)
        files = files_at(url, storage_options)
        store = cls(files, Meta.read(files, projection), writable=writable)
        if projection is not None:
            store.check_projection(projection)
        return store

    def check_projection(self, projection: Projection) -> None:
        """Raise `IncompatibleStoreError` unless `projection` made the store's rows."""
        _check_projection(projection)
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

    def add_checkpoint(self, name: str, params: PyTree, *, lr: float | None = None) -> None:
        """Make room for the rows of one set of parameters; by one process.

        Killed before its last write, there is no such checkpoint, and it can be added again.

        Args:
            name: of the checkpoint; letters, digits, `.`, `_` and `-`.
            params: its parameters; their fingerprint is kept, and rows of others are refused.
            lr: learning rate at this checkpoint, for `weights="lr"` in queries (TracIn).

        Raises:
            OptionError: a bad name or learning rate. StoreError: there is such a checkpoint
            already, or rows of one that has lost its metadata.
        """
        self._need_writable()
        _checkpoints.check_name(name)
        rate = _checkpoints.check_rate(lr)
        checkpoint = Checkpoint(name, rate, fingerprint(params))
        _checkpoints.add(self._files, self._meta, checkpoint)

    def remove_checkpoint(self, name: str) -> None:
        """Remove a checkpoint with all its rows, or what is left of one.

        It is gone with the first thing that is removed; killed after that, call it again.
        """
        self._need_writable()
        self._opened.pop(name, None)
        _checkpoints.remove(self._files, name)

    def check_model(self, checkpoint: str, params: PyTree) -> None:
        """Raise `IncompatibleStoreError` unless the checkpoint is that of `params`."""
        ours = _checkpoints.read(self._files, checkpoint).model
        theirs = fingerprint(params)
        if ours != theirs:
            raise IncompatibleStoreError(
                f"checkpoint {checkpoint!r} holds rows of a model with fingerprint {ours[:12]}, "
                f"but these parameters have {theirs[:12]}. Rows of different models cannot be "
                "mixed: add a checkpoint of its own for each (store.add_checkpoint)."
            )

    def append(self, count: int) -> range:
        """Make room for `count` more samples; returns their ids. While nobody writes."""
        self._need_writable()
        grown = self._meta.grown(_meta.check_count("count", count))
        self.check_whole()  # a checkpoint that is left out could not be put back
        for name in self.checkpoint_names:
            _checkpoints.check_documents(self._files, self._meta, name)
            _checkpoints.write_documents(self._files, grown, name)
        # Last of all: killed before this, the store is as it was.
        grown.write(self._files)
        start, self._meta = self.n_samples, grown
        return range(start, self.n_samples)


def _check_projection(projection: object) -> None:
    """Raise `OptionError` unless it is a projection."""
    check_type(
        "projection", projection, Projection, "what gf.kronecker_projection(...) makes, not a name"
    )
