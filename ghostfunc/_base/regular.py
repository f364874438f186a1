"""Files that are files: a FIFO in a file's place is waited for, and a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

# Without it, opening a FIFO waits for its other end.
AT_ONCE = os.O_NONBLOCK if os.name == "posix" else 0


def check_mode(mode: int, path: str | os.PathLike[str]) -> None:
    """Raise `OSError` unless this is the mode of a regular file."""
    for is_kind, kind in KINDS:
        if is_kind(mode):
            raise OSError(errno.EINVAL, f"it is {kind}, and no file", os.fspath(path))


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise `OSError` unless there is a regular file."""
    check_mode(os.stat(path).st_mode, path)


def check_absent(path: Path) -> None:
    """Raise `OSError` if something has the name of a folder and is none."""
    if path.exists() and not path.is_dir():
        raise OSError(errno.ENOTDIR, "it is no folder", os.fspath(path))


def open_regular(path: Path) -> FileIO:
    """A file, open for reading without a buffer; `OSError` at once for anything else."""
    try:
        file = path.open("rb", buffering=0) if not AT_ONCE else _opened(path)
    except OSError:
        check_regular(path)  # says what it is, where the system says only what cannot be done
        raise
    try:
        check_mode(os.fstat(file.fileno()).st_mode, path)
    except OSError:
        file.close()
        raise
    return file


def _opened(path: Path) -> FileIO:
    return open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | AT_ONCE))
