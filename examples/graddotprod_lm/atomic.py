"""Files that are whole or not there, whenever the process is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name, flush it to disk, and give it its name."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: Any) -> None:
    write(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))


def remove_partial(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for path in folder.rglob("*" + PARTIAL):
        path.unlink()
