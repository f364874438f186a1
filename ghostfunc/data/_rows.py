"""Rows of files, by index: JSON lines, Parquet, and folders of the `datasets` library."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from ghostfunc._base.regular import check_regular
from ghostfunc.data._errors import Fault, RowsError

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

JSON_LINES = (".jsonl", ".ndjson")
UTF16 = (b"\xff\xfe", b"\xfe\xff")
BOM = b"\xef\xbb\xbf"


class Rows(ABC):
    """The rows of a file, dicts, by index; made by `Rows.open`. Rows are read when asked for."""

    path: Path

    @staticmethod
    def open(path: str | Path) -> Rows:
        """The rows of a file.

        Args:
            path: `.jsonl` or `.ndjson` (one JSON object per line, UTF-8), `.parquet`, or a folder
                that `Dataset.save_to_disk` of the `datasets` library wrote.

        Raises:
            RowsError: there is no such file, it is of another kind, empty or damaged.
        """
        path = Path(path)
        try:
            if path.is_dir():
                return _ArrowRows(path, _folder(path))
            if not path.exists():
                raise RowsError([Fault(str(path), -1, "there is no such file or folder.")])
            check_regular(path)
        except OSError as error:
            why = f"{error.strerror}; expected a file, or a folder: rows are read by place."
            raise RowsError([Fault(str(path), -1, why)]) from error
        if path.suffix in JSON_LINES:
            return _JsonLines(path)
        if path.suffix == ".parquet":
            return _ArrowRows(path, _parquet(path))
        raise RowsError(
            [
                Fault(
                    str(path),
                    -1,
                    f"the name ends with {path.suffix or 'nothing'!r}; expected .jsonl or .ndjson "
                    "(one JSON object per line), .parquet, or a folder of datasets.save_to_disk.",
                )
            ]
        )

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> dict[str, Any]:
        """A row; `RowsError` if it is damaged."""

    @abstractmethod
    def where(self, row: int) -> str:
        """The file and the line or row, for messages."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"Rows({str(self.path)!r}, {len(self):,} rows)"

    def fault(self, row: int, why: str) -> RowsError:
        """The error of one row."""
        return RowsError([Fault(self.where(row), row, why)])


def _stamp(file: IO[bytes]) -> tuple[int, int, int]:
    """What tells a file from what another program made of it."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


class _JsonLines(Rows):
    """Lines of JSON, found by their places in the file; lines of white space are no rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self._lines = array("q"), array("q")
        with path.open("rb") as file:
            if file.read(2) in UTF16:
                why = "the file begins like UTF-16; expected UTF-8. Convert it: iconv -t utf-8."
                raise RowsError([Fault(f"{path}, line 1", 0, why)])
            file.seek(0)
            self._stamp = _stamp(file)
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip() and line.strip() != BOM:
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)
        if not self._starts:
            raise RowsError([Fault(str(path), -1, "the file has no rows.")])

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, row: int) -> str:
        return f"{self.path}, line {self._lines[row]}"

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)  # ends a loop over rows
        with self.path.open("rb") as file:
            if _stamp(file) != self._stamp:
                raise self.fault(row, "the file has changed since it was opened. Start anew.")
            file.seek(self._starts[row])
            line = file.readline().removeprefix(BOM)
        try:
            found = json.loads(
                line.decode("utf-8"),
                object_pairs_hook=_object,
                parse_float=_finite,
                parse_constant=_finite,
            )
        except UnicodeDecodeError as error:
            raise self.fault(
                row,
                f"byte {error.start + 1} ({line[error.start]:#04x}) is not UTF-8; expected UTF-8.",
            ) from error
        except json.JSONDecodeError as error:
            raise self.fault(row, f"no valid JSON: {error.msg} at column {error.colno}.") from error
        except (RecursionError, ValueError) as error:
            raise self.fault(row, f"JSON that cannot be read: {error}.") from error
        if not isinstance(found, dict):
            raise self.fault(row, f"a JSON {type(found).__name__}; expected an object, {{...}}.")
        return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose values is lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _finite(text: str) -> float:
    """A number that JSON has: it is written again, and the next program reads it."""
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"the number {text[:20]} is not finite")
    return found


class _ArrowRows(Rows):
    """Rows of an Arrow table."""

    def __init__(self, path: Path, table: pa.Table) -> None:
        self.path = path
        self._table = table
        if not len(table):
            raise RowsError([Fault(str(path), -1, "the file has no rows.")])

    def __len__(self) -> int:
        return len(self._table)

    def where(self, row: int) -> str:
        return f"{self.path}, row {row}"

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        try:
            (found,) = self._table.slice(row, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise self.fault(row, f"a string that is not UTF-8: {error}.") from error
        except (ValueError, OverflowError) as error:  # dates that Python does not have
            raise self.fault(row, f"a value that cannot be read: {error}.") from error
        # Columns that other rows have: a missing value is a null in Arrow.
        return {key: value for key, value in found.items() if value is not None}


def _parquet(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise RowsError([Fault(str(path), -1, f"no readable Parquet file: {error}.")]) from error


def _folder(path: Path) -> pa.Table:
    """The table of a folder that `Dataset.save_to_disk` wrote."""
    import pyarrow as pa
    import pyarrow.ipc

    state = path / "state.json"
    if (path / "dataset_dict.json").exists():
        splits = _described(path / "dataset_dict.json", "splits", str)
        why = f"a DatasetDict with the splits {splits}; name the folder of one, {path / splits[0]}."
        raise RowsError([Fault(str(path), -1, why)])
    if not state.exists():
        why = "a folder without state.json; expected one that datasets.Dataset.save_to_disk wrote."
        raise RowsError([Fault(str(path), -1, why)])
    if _described(state, "_indices_data_files", dict, needed=False):
        why = "its rows are chosen by indices; call flatten_indices() before save_to_disk."
        raise RowsError([Fault(str(path), -1, why)])
    names = [str(file.get("filename")) for file in _described(state, "_data_files", dict)]
    files = [path / Path(name).name for name in names]
    try:
        return pa.concat_tables(
            pyarrow.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files
        )
    except (pa.ArrowException, OSError) as error:
        raise RowsError([Fault(str(path), -1, f"no readable Arrow files: {error}.")]) from error


def _described(path: Path, key: str, kind: type[T], *, needed: bool = True) -> list[T]:
    """A list that a document of a folder has under a key."""
    try:
        check_regular(path)
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RowsError([Fault(str(path), -1, f"cannot be read: {error}.")]) from error
    values = found.get(key) if isinstance(found, dict) else None
    if values is None and isinstance(found, dict) and not needed:
        return []
    if not isinstance(values, list) or (needed and not values):
        values = [None]  # is of no kind
    if not all(isinstance(x, kind) for x in values):
        why = f"has no {key!r}, a list; expected what datasets.Dataset.save_to_disk writes."
        raise RowsError([Fault(str(path), -1, why)])
    return values
