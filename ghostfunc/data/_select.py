"""Chosen rows to a file."""

from __future__ import annotations

import base64
import datetime
import json
import math
from pathlib import Path
from typing import IO, Any

from ghostfunc._base.errors import OptionError
from ghostfunc._base.whole_files import write_whole
from ghostfunc.data._rows import JSON_LINES, Rows
from ghostfunc.data._table import Scores

KEY = "ghostfunc"
"""What is added to a row under this key."""


def write_rows(path: str | Path, rows: Rows, scores: Scores) -> None:
    """Write the rows of a table of scores, in its order, as JSON lines; whole or not at all.

    Every line is the row as it was, with a key `ghostfunc` added: its `rank` in the table from 1,
    its `row` in the file from 0, and the columns of scores. Of Parquet files, dates become ISO 8601
    strings, bytes base64, and numbers that are not finite null.

    Args:
        path: a `.jsonl` file.
        rows: where the ids of `scores` are indices.
        scores: such as `scores.top(100)`.

    Raises:
        OptionError: the file has another ending, or a row has a key `ghostfunc` already.
    """
    path = Path(path)
    if path.suffix not in JSON_LINES:
        raise OptionError(f"{path}: expected a name that ends with {' or '.join(JSON_LINES)}.")

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for rank, row in enumerate(scores.ids, 1):
                _write_row(file, rows, scores, rank, int(str(row)))

    write_whole(path, write)


def _write_row(file: IO[str], rows: Rows, scores: Scores, rank: int, row: int) -> None:
    found = rows[row]
    if KEY in found:
        raise OptionError(
            f"{rows.where(row)} has a key {KEY!r} already: it was chosen by an earlier run. "
            "Remove the key, or choose from the first file."
        )
    numbers = {name: float(x[rank - 1]) for name, x in scores.columns.items()}
    found[KEY] = {"rank": rank, "row": row, **numbers}
    found = _finite(found)
    line = json.dumps(found, ensure_ascii=False, allow_nan=False, default=_as_json)
    if any("\ud800" <= c <= "\udfff" for c in line):  # halves of pairs, which UTF-8 has not
        line = json.dumps(found, allow_nan=False, default=_as_json)
    file.write(line + "\n")


def _finite(value: Any) -> Any:
    """With null in the place of NaN and infinity, which Parquet has and JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_json(value: object) -> str:
    """Values that Parquet has and JSON has not: dates as ISO 8601, bytes as base64."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)
