"""Faults at every single write of a store: deaths, errors of the disk, power cuts.

All writes go through the functions of `os` that `ghostfunc.store._files` calls. A `Faulty` stands
in their place: it counts them, and at one of them something happens.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghostfunc._base import whole_files
from ghostfunc.store import _files

OPERATIONS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir")
WHENS = ("before", "middle", "after")
DIED = 9


class Faulty:
    """The module `os`, with something happening at one of its writes.

    Attributes:
        at: number of the operation at which it happens; None counts only.
        when: before it, in the middle of it (a write of half the bytes), or after it.
        happen: what happens.
        done: the operations so far.
    """

    def __init__(
        self, at: int | None = None, when: str = "before", happen: Callable[[], Any] = bool
    ) -> None:
        self.at, self.when, self.happen = at, when, happen
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def operation(*args: Any) -> Any:
            here = len(self.done) == self.at
            self.done.append(name)
            if here and self.when == "before":
                self.happen()
            if here and self.when == "middle" and name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            if here and self.when == "middle":
                self.happen()
            out = real(*args)
            if here and self.when == "after":
                self.happen()
            return out

        return operation


@contextmanager
def through(stand_in: Any) -> Iterator[None]:
    """Let all writes of stores go through something else than `os`."""
    modules: list[Any] = [_files, whole_files]
    for module in modules:
        module.os = stand_in
    try:
        yield
    finally:
        for module in modules:
            module.os = os


def die() -> None:
    """As `kill -9`: nothing is tidied up."""
    os._exit(DIED)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_a_child(act: Callable[[], None]) -> int:
    """Run something in a forked child; how it ended: 0, or `DIED`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- power cuts -------------------------------------------------------------------------------


@dataclass
class File:
    """A file's bytes, and those of them that have been flushed."""

    now: bytes = b""
    flushed: bytes = b""


Folder = dict[str, "File | Folder"]


@dataclass
class Disk:
    """A folder as it may be after a power cut: bytes last if their file was flushed. Names do if
    their folder was, and else by chance: those of no folder, of every folder, or of any one.

    Attributes:
        root: the folder.
        now: its content as processes see it.
        flushed: by folder, the names that a flush has made last.
        moments: all there may be after each operation, without repetitions.
    """

    root: Path
    now: Folder = field(default_factory=dict)
    flushed: dict[int, Folder] = field(default_factory=dict)
    moments: list[dict[str, bytes | None]] = field(default_factory=list)
    _handles: dict[int, tuple[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.now = self._loaded(self.root)

    def _loaded(self, folder: Path) -> Folder:
        """A folder's content at the start, all of it flushed."""
        content: Folder = {}
        for path in folder.iterdir():
            if path.is_dir():
                content[path.name] = self._loaded(path)
            else:
                content[path.name] = File(path.read_bytes(), path.read_bytes())
        self.flushed[id(content)] = dict(content)
        return content

    def _parent(self, path: Any) -> tuple[Folder, str]:
        folder: Any = self.now
        *parents, name = Path(path).relative_to(self.root).parts
        for part in parents:
            folder = folder[part]
        return folder, name

    def _entry(self, path: Any) -> Any:
        if Path(path) == self.root:
            return self.now
        folder, name = self._parent(path)
        return folder[name]

    def note(self) -> None:
        """Add all that there may be now."""
        unflushed = [folder for folder in self._folders(self.now) if self._is_dirty(folder)]
        ids = [id(folder) for folder in unflushed]
        for lasting in [set[int](), set(ids), *({i} for i in ids)]:
            files = self.survivors(lasting)
            if files not in self.moments:
                self.moments.append(files)

    def _folders(self, folder: Folder) -> Iterator[Folder]:
        yield folder
        for entry in folder.values():
            if not isinstance(entry, File):
                yield from self._folders(entry)

    def _is_dirty(self, folder: Folder) -> bool:
        flushed = self.flushed[id(folder)]
        return {n: id(x) for n, x in folder.items()} != {n: id(x) for n, x in flushed.items()}

    def survivors(self, lasting: set[int]) -> dict[str, bytes | None]:
        """Files (and folders, None) after a cut, with all names of the folders `lasting`."""
        out: dict[str, bytes | None] = {}

        def walk(folder: Folder, prefix: str) -> None:
            seen = folder if id(folder) in lasting else self.flushed[id(folder)]
            for name, entry in seen.items():
                if isinstance(entry, File):
                    out[prefix + name] = entry.flushed
                else:
                    out[prefix + name] = None
                    walk(entry, f"{prefix}{name}/")

        walk(self.now, "")
        return out

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in (*OPERATIONS, "close"):
            return real

        def operation(*args: Any) -> Any:
            out = real(*args)
            if name == "close":
                self._handles.pop(args[0], None)
                return out
            getattr(self, f"_{name}")(out, *args)
            self.note()
            return out

        return operation

    def _open(self, handle: int, path: Any, flags: int, *mode: int) -> None:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            folder, name = self._parent(path)
            if name not in folder or flags & os.O_TRUNC:
                folder[name] = File()
        self._handles[handle] = ("file", self._entry(path))

    def _write(self, count: int, handle: int, data: Any) -> None:
        entry = self._handles[handle][1]
        entry.now += bytes(data[:count])

    def _fsync(self, out: None, handle: int) -> None:
        entry = self._handles[handle][1]
        if isinstance(entry, File):
            entry.flushed = entry.now
        else:
            self.flushed[id(entry)] = dict(entry)

    def _replace(self, out: None, source: Any, target: Any) -> None:
        here, name = self._parent(source)
        there, new = self._parent(target)
        there[new] = here.pop(name)

    def _unlink(self, out: None, path: Any) -> None:
        folder, name = self._parent(path)
        del folder[name]

    _rmdir = _unlink

    def _mkdir(self, out: None, path: Any) -> None:
        folder, name = self._parent(path)
        made: Folder = {}
        folder[name] = made
        self.flushed[id(made)] = {}
