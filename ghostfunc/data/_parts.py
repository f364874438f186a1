"""A run on disk: what it is made of, and the parts that are done."""

from __future__ import annotations

import hashlib
import json
import textwrap
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostfunc._base.fingerprint import fingerprint
from ghostfunc._base.regular import check_regular
from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import PyTree
from ghostfunc._base.whole_files import write_whole
from ghostfunc.data._errors import ResumeError

Columns = dict[str, NDArray[Any]]

RECIPE = "recipe"
"""The array of a part that says which run it belongs to."""


class Parts:
    """A folder of a run: `run.json`, and one file per part, each written whole.

    The recipe says all that decides the numbers. A folder with another recipe is refused. A part
    that another recipe left there (a folder may have been removed in part) counts as not done.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        self.folder = folder
        path = folder / "run.json"
        text = json.dumps(dict(recipe), indent=1, sort_keys=True)
        self._recipe = hashlib.sha256(text.encode()).hexdigest()
        with naming(path):
            if not path.exists():
                write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
                return
        before = read_recipe(folder)
        now = json.loads(json.dumps(dict(recipe)))
        if before != now:
            differing = sorted(k for k in before | now if before.get(k) != now.get(k))
            told = "; ".join(
                f"{k}: {_short(before.get(k))} then, {_short(now.get(k))} now" for k in differing
            )
            raise ResumeError(
                f"{folder} holds another run, which differs in {told}. Resume it with what it was "
                "started with, or choose another folder."
            )

    def load(self, part: int) -> Columns | None:
        """The columns of a part; None if it is not done."""
        path = self._path(part)
        if not path.exists():
            return None
        try:
            check_regular(path)
            with np.load(path, allow_pickle=False) as file:  # checks its checksums
                columns = {name: file[name] for name in file.files}
        except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
            raise ResumeError(
                f"{path} is damaged ({error}). Delete this file: its samples are scored again."
            ) from error
        return columns if str(columns.pop(RECIPE, "")) == self._recipe else None

    def save(self, part: int, columns: Columns) -> None:
        """Write a part."""
        columns = {**columns, RECIPE: np.array(self._recipe)}
        path = self._path(part)
        with naming(path):
            write_whole(path, lambda temporary: np.savez(temporary, allow_pickle=False, **columns))

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.npz"


def _short(x: object) -> str:
    return textwrap.shorten(repr(x), 100, placeholder=" ...")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """`ResumeError` with the file's name for what the operating system says."""
    try:
        yield
    except OSError as error:
        raise ResumeError(
            f"{path}: {error.strerror or error}. resume= is a folder that this run can write to: "
            "make room there, or choose another."
        ) from error


def has_recipe(folder: Path) -> bool:
    """Whether a folder says which run it holds."""
    with naming(folder):
        return (folder / "run.json").exists()


def read_recipe(folder: Path) -> dict[str, Any]:
    """What `run.json` of a folder says."""
    path = folder / "run.json"
    try:
        with naming(path):
            check_regular(path)
            recipe = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged ({error}). Choose another folder.") from error
    if not isinstance(recipe, dict):
        raise ResumeError(f"{path} does not describe a run. Choose another folder.")
    return recipe


def digest(tree: PyTree) -> str:
    """SHA-256 of the names, shapes, dtypes and values of a pytree of tensors."""
    leaves, spec = flatten_params(tree)
    return fingerprint(spec.names, leaves)
