"""The little of zarr that stores are built on: checksummed arrays, read and written by chunk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostfunc.store._errors import StoreError

try:
    import zarr
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.core.sync import sync
    from zarr.storage import FsspecStore, LocalStore
except ImportError as error:
    raise ImportError("ghostfunc.store needs zarr 3: pip install 'ghostfunc[store]'.") from error

Place = LocalStore | FsspecStore
_CONFIG: Any = {"write_empty_chunks": True}
_META, _SUM = "ghostfunc", "ghostfunc_sha256"


def place(url: str | Path, storage_options: dict[str, Any] | None, *, read_only: bool) -> Place:
    """A local directory, or whatever fsspec makes of a URL."""
    if str(url).startswith(("file://", "local://")):
        # Not by fsspec, which would write in place: a killed process would leave torn chunks.
        return LocalStore(Path(LocalFileSystem._strip_protocol(str(url))), read_only=read_only)
    if "://" in str(url):
        return FsspecStore.from_url(str(url), storage_options, read_only=read_only)
    return LocalStore(Path(url), read_only=read_only)


def create_group(where: Place, path: str, meta: dict[str, Any]) -> None:
    """A new group with metadata; `StoreError` if there is one."""
    try:
        group = zarr.create_group(where, path=path)
    except zarr.errors.ContainsGroupError as error:
        raise StoreError(
            f"there is a store at {where} already. Open it with Store.open, or choose another "
            "place."
        ) from error
    group.update_attributes(_signed(meta))


def read_meta(where: Place, path: str) -> dict[str, Any]:
    """The metadata of a group, as written; `StoreError` if any of it was changed."""
    try:
        attributes = dict(zarr.open_group(where, path=path, mode="r").attrs)
    except FileNotFoundError as error:
        raise StoreError(f"there is no store at {where}{'/' + path if path else ''}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"the metadata {path}/zarr.json at {where} is damaged: {error}") from error
    meta: Any = attributes.get(_META)
    if not isinstance(meta, dict) or attributes.get(_SUM) != _signed(meta)[_SUM]:
        raise StoreError(f"the metadata {path}/zarr.json at {where} is damaged: checksum mismatch.")
    return meta


def write_meta(where: Place, path: str, meta: dict[str, Any]) -> None:
    """Replace a group's metadata."""
    zarr.open_group(where, path=path, mode="r+").update_attributes(_signed(meta))


def groups(where: Place, path: str) -> list[str]:
    """Names of the groups below `path`."""
    try:
        return sorted(zarr.open_group(where, path=path, mode="r").group_keys())
    except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
        raise StoreError(f"metadata below {path} at {where} is damaged: {error}") from error


def _signed(meta: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(meta, sort_keys=True)
    return {_META: meta, _SUM: hashlib.sha256(text.encode()).hexdigest()}


class Damaged(Exception):
    """A chunk is not what was written; never leaves the package."""


class ChunkedArray:
    """An array cut along its first axis, one checksum per chunk."""

    def __init__(self, array: Any, chunk_rows: int) -> None:
        self._array = array
        self._chunk_rows = chunk_rows

    @classmethod
    def create(
        cls,
        where: Place,
        path: str,
        shape: tuple[int, ...],
        chunk_rows: int,
        dtype: str,
        fill: Any,
    ) -> ChunkedArray:
        array = zarr.create_array(
            where,
            name=path,
            shape=shape,
            chunks=(chunk_rows, *shape[1:]),
            dtype=dtype,
            fill_value=fill,
            serializer=BytesCodec(endian="little"),
            # Random numbers do not compress; the checksum is the only codec.
            compressors=[Crc32cCodec()],
            config=_CONFIG,
        )
        return cls(array, chunk_rows)

    @classmethod
    def open(
        cls, where: Place, path: str, shape: tuple[int, ...], chunk_rows: int, dtype: str, mode: str
    ) -> ChunkedArray:
        try:
            array: Any = zarr.open_array(where, path=path, mode=mode, config=_CONFIG)
        except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
            raise StoreError(f"the metadata {path}/zarr.json is damaged: {error}") from error
        found = (array.shape[1:], array.chunks, str(array.dtype))
        if found != (shape[1:], (chunk_rows, *shape[1:]), dtype) or array.shape[0] < shape[0]:
            raise StoreError(
                f"the metadata {path}/zarr.json is damaged: it describes {array.shape}, chunks "
                f"{array.chunks}, {array.dtype}, where {shape} of {dtype} is expected."
            )
        return cls(array, chunk_rows)

    def resize(self, rows: int) -> None:
        """Make the array `rows` long."""
        self._array.resize((rows, *self._array.shape[1:]))

    def read(self, rows: range) -> NDArray[Any]:
        """Rows of one chunk; `Damaged` if its checksum does not hold."""
        try:
            out: NDArray[Any] = np.asarray(self._array[rows.start : rows.stop])
        except (ValueError, RuntimeError, IndexError, OSError) as error:
            raise Damaged(str(error).splitlines()[0]) from error
        return out

    def write(self, rows: range, values: NDArray[Any]) -> None:
        """Write rows of one chunk; on a local disk the old chunk or the new one is seen."""
        self._sweep(rows)
        self._array[rows.start : rows.stop] = values

    def delete(self, rows: range) -> None:
        """Remove the chunk that holds `rows`."""
        sync((self._array.store_path / self._key(rows)).delete())

    def _key(self, rows: range) -> str:
        number = rows.start // self._chunk_rows
        return "/".join(["c", str(number), *("0" for _ in self._array.shape[1:])])

    def _sweep(self, rows: range) -> None:
        """Remove what a killed process left of this chunk; nobody else is writing to it."""
        place = self._array.store_path.store
        if isinstance(place, LocalStore):
            chunk = place.root / self._array.store_path.path / self._key(rows)
            for torn in chunk.parent.glob(f"{chunk.name}.*.partial"):
                torn.unlink()
