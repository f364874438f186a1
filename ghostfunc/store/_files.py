"""Files of a store by key, on a local disk or wherever fsspec reaches: whole, or not there.

All writes of stores go through the functions of `os` that this file calls, or through fsspec.
"""

from __future__ import annotations

import errno
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_path, check_type
from ghostfunc._base.regular import AT_ONCE, check_absent, check_mode, open_regular
from ghostfunc._base.whole_files import flush_folder
from ghostfunc.store._errors import StoreError

try:
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError("ghostfunc.store needs fsspec: pip install 'ghostfunc[store]'.") from error

PARTIAL = ".partial"

LONGEST_NAME = 255
"""Bytes of the name of a file or a folder, on all common file systems."""


class Files(ABC):
    """Bytes by key; keys are relative paths with slashes."""

    @abstractmethod
    def read(self, key: str, most: int) -> bytearray | None:
        """The bytes of a file, None if there is none; `StoreError` if they are more than `most`.

        The size is looked at before memory is taken.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is such a file. Anything else of its name counts: reading it says so."""

    @abstractmethod
    def names(self, folder: str) -> Iterator[str]:
        """Names of what lies in a folder, in no order; nothing for a folder that is not there."""

    @abstractmethod
    def write(self, key: str, data: bytes, *, shared: bool = False) -> None:
        """Replace a file: the old one or the new one is seen, and the new one stays.

        `shared`: several processes may write this key at once, and the last one counts.
        """

    def write_all(self, items: Iterable[tuple[str, bytes]]) -> None:
        """Replace files as `write` does; when it returns, all of them stay. One is in memory at a
        time."""
        for key, data in items:
            self.write(key, data)

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a file if it is there, for good."""

    @abstractmethod
    def delete_tree(self, folder: str) -> None:
        """Remove a folder with all in it, if it is there."""


class LocalFiles(Files):
    """A folder of a local file system.

    A file is written under another name, flushed to the disk and renamed; then its folder is
    flushed. So a file that is seen is whole, after a power cut too, and what was written earlier
    is there whenever what was written later is.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def read(self, key: str, most: int) -> bytearray | None:
        with self._told(key):
            try:
                file = open_regular(self._root / key)
            except (FileNotFoundError, NotADirectoryError):
                return None
            with file:
                data = bytearray(_at_most(os.fstat(file.fileno()).st_size, most, f"{self}/{key}"))
                view, read = memoryview(data), 0
                while read < len(data):
                    count = file.readinto(view[read:])
                    if not count:
                        raise StoreError(f"{self}/{key} became shorter while it was read.")
                    read += count
                return data

    def exists(self, key: str) -> bool:
        with self._told(key):
            return (self._root / key).exists()

    def names(self, folder: str) -> Iterator[str]:
        with self._told(folder):
            try:
                entries = os.scandir(self._root / folder)
            except FileNotFoundError:
                return
            except NotADirectoryError:
                check_absent(self._root / folder)
                return
            with entries:
                for entry in entries:
                    yield entry.name

    def write(self, key: str, data: bytes, *, shared: bool = False) -> None:
        folder = self._replace(key, data, shared=shared)
        with self._told(key):
            flush_folder(folder)

    def write_all(self, items: Iterable[tuple[str, bytes]]) -> None:
        # Bytes are flushed file by file, names once for each folder.
        folders = {self._replace(key, data): key for key, data in items}
        for folder, key in folders.items():
            with self._told(key):
                flush_folder(folder)

    def _replace(self, key: str, data: bytes, *, shared: bool = False) -> Path:
        """Replace a file, whose name may not stay yet; returns the folder that is to be flushed."""
        path = self._root / key
        # One name for each file: what a killed process left is written over, not looked for.
        partial = path.with_name(path.name + (f".{uuid.uuid4().hex}" if shared else "") + PARTIAL)
        with self._told(key):
            self._make_folder(path.parent)
            try:
                _write_flushed(partial, data)
                os.replace(partial, path)
            except FileNotFoundError:  # the other process has taken it away
                raise
            except OSError:
                with suppress(OSError):
                    os.unlink(partial)
                raise
        return path.parent

    def delete(self, key: str) -> None:
        path = self._root / key
        with self._told(key):
            try:
                os.unlink(path)
            except FileNotFoundError:
                return
            flush_folder(path.parent)

    def delete_tree(self, folder: str) -> None:
        top = self._root / folder
        with self._told(folder):
            if not top.is_dir():
                return
            for at, folders, files in os.walk(top, topdown=False):
                for name in files:
                    os.unlink(os.path.join(at, name))
                for name in folders:
                    os.rmdir(os.path.join(at, name))
            os.rmdir(top)
            flush_folder(top.parent)

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        with suppress(FileExistsError):  # by another process
            os.mkdir(folder)
        flush_folder(folder.parent)

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """`StoreError` with the file's name for what the operating system says. What is not there
        to be read is no error, so a name that is missing was taken away in the meantime."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY):
                raise StoreError(
                    f"{self}/{key} was changed by another process at the same time. One process "
                    "creates a store, adds a checkpoint, removes one or appends, and the others "
                    "open the store afterwards; several processes write rows, each to chunks of "
                    "its own."
                ) from error
            raise StoreError(f"{self}/{key}: {error.strerror or error}.") from error


def _at_most(size: int, most: int, name: str) -> int:
    if size > most:
        raise StoreError(f"{name} has {size} bytes, more than the {most} that it can have.")
    return size


def _write_flushed(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | AT_ONCE, 0o666)
    try:
        check_mode(os.fstat(handle).st_mode, path)
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


class RemoteFiles(Files):
    """A file system of fsspec. What its `pipe_file` promises is promised here: object stores
    replace an object as a whole, and keep it."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return str(self._fs.unstrip_protocol(self._root))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def read(self, key: str, most: int) -> bytearray | None:
        with self._told(key):
            try:
                data = self._fs.cat_file(self._path(key), start=0, end=most + 1)
            except FileNotFoundError:
                return None
            _at_most(len(data), most, f"{self}/{key}")
            return bytearray(data)

    def exists(self, key: str) -> bool:
        with self._told(key):
            self._fs.invalidate_cache(self._path(key))
            return bool(self._fs.isfile(self._path(key)))

    def names(self, folder: str) -> Iterator[str]:
        with self._told(folder):
            self._fs.invalidate_cache(self._path(folder))
            try:
                paths = self._fs.ls(self._path(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return
            for path in paths:
                yield path.rstrip("/").rpartition("/")[2]

    def write(self, key: str, data: bytes, *, shared: bool = False) -> None:
        with self._told(key):
            path = self._path(key)
            # Object stores have no folders, and need none.
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)

    def delete(self, key: str) -> None:
        with self._told(key), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def delete_tree(self, folder: str) -> None:
        with self._told(folder), suppress(FileNotFoundError):
            self._fs.invalidate_cache(self._path(folder))
            self._fs.rm(self._path(folder), recursive=True)

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self}/{key}: {error}.") from error


def _local(root: Path) -> LocalFiles:
    """The files of a folder; `OptionError` for a path that cannot be one."""
    longest = max((len(os.fsencode(x)) for x in root.parts), default=0)
    if longest > LONGEST_NAME:
        raise StoreError(
            f"url={str(root)!r} has a name of {longest} bytes in it; file systems take "
            f"{LONGEST_NAME}. Choose a shorter one."
        )
    try:
        # What is there is looked at second: another thread may just be making the folder.
        fault = "is a file" if os.path.lexists(root) and not root.is_dir() else None
        part = next((x for x in root.parents if os.path.lexists(x) and not x.is_dir()), None)
    except (OSError, ValueError) as error:
        raise OptionError(f"url={str(root)!r} cannot be the folder of a store: {error}.") from error
    if part is not None:
        fault = f"lies below {str(part)!r}, which is a file"
    if fault is not None:
        raise StoreError(f"url={str(root)!r} {fault}. A store is a folder: choose another place.")
    return LocalFiles(root)


def files_at(url: str | Path, storage_options: dict[str, Any] | None) -> Files:
    """The files below a local path, or below whatever fsspec makes of a URL."""
    check_path("url", url)
    if storage_options is not None:
        check_type("storage_options", storage_options, dict, "a dict for fsspec, or None")
    if not str(url):
        raise OptionError(f"url={url!r} must be a path or a URL.")
    text = str(url)
    if "://" not in text:
        return _local(Path(url))
    try:
        fs, path = url_to_fs(text, **(storage_options or {}))
    except (ValueError, ImportError) as error:
        raise OptionError(f"url={text!r} cannot be reached by fsspec: {error}") from error
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    # A local path is written by `LocalFiles`: fsspec writes in place, which can be torn.
    return _local(Path(path)) if "file" in protocols else RemoteFiles(fs, path)
