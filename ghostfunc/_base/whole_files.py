"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

Write = Callable[[Path], object]


def write_whole(path: Path, write: Write) -> None:
    """`write` a file beside `path`, bring it to the disk, and give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two writers of one path do not share a file, and writers that look at suffixes see its own.
    writer = f"{os.getpid()}-{threading.get_ident()}"
    aside = path.with_name(_aside(path.name, writer))
    try:
        put(write, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    flush_folder(path.parent)


def half_written(pattern: str) -> str:
    """The pattern of half-written files: a writer that dies leaves one beside a file whose name
    matches `pattern`."""
    return _aside(pattern, "*")


def _aside(name: str, writer: str) -> str:
    return f".{Path(name).stem}.{writer}{Path(name).suffix}"


def put(write: Write, aside: Path) -> None:
    """The one call that writes: tests let processes die before, in the middle of and after it."""
    write(aside)


def flush_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can (Windows cannot open a folder)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
