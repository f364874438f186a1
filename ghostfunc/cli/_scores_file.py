"""Files of scores, of `ghostfunc score --scores` or of GhostTrainer, to one table with one sign."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ghostfunc.cli._data import content_of
from ghostfunc.cli._errors import CommandError
from ghostfunc.data import Rows, Scores
from ghostfunc.data._table import HELPS

POOL_CONTENT = "pool_content"
"""The fact of a file of scores that says which rows it is about: a hash of the pool."""

VALUE = "value_"
"""Begins a column of GhostTrainer: what a sample changed a validation loss by, negative: it
helped."""


def read_scores(path: Path, pool: Path) -> tuple[Rows, Scores]:
    """The rows of a pool, and their scores from a Parquet file.

    GhostTrainer's values change their sign, and their name says so: `shapley_higher_helps/name`.

    Raises:
        CommandError: no such file, other columns, or scores of other rows.
    """
    rows = Rows.open(pool)
    if not path.exists():
        raise CommandError(
            f"{path}: there is no such file. score --scores writes one, and a run of GhostTrainer "
            "writes scores.parquet at its end."
        )
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise CommandError(f"{path}: no readable Parquet file: {error}.") from error
    names = {"id", "sample_id"} & set(table.column_names)
    if not names:
        raise CommandError(
            f"{path} has the columns {table.column_names}; expected those that --scores writes "
            "(id) or GhostTrainer (sample_id)."
        )
    (name,) = names
    ids = table[name].to_pylist()
    if not ids:
        raise CommandError(f"{path} has no rows.")
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < len(rows)]
    if wrong:
        raise CommandError(
            f"{path} has the id {wrong[0]!r}; {pool} has rows 0 to {len(rows) - 1}. Are these the "
            "rows that were scored?"
        )
    if len(set(ids)) < len(ids):
        twice = next(i for i, count in Counter(ids).items() if count > 1)
        raise CommandError(f"{path} has the id {twice} twice; expected one score for a row.")
    columns = dict(
        _column(path, column, table[column]) for column in table.column_names if column != name
    )
    facts = _facts(path, table.schema.metadata or {})
    if facts.get(POOL_CONTENT, found := content_of(pool)) != found:
        raise CommandError(
            f"{pool} does not hold the rows that were scored: {path} was made of a file with other "
            "content. Give that one."
        )
    return rows, Scores(ids, columns, facts)


def _facts(path: Path, metadata: dict[bytes, bytes]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(b"ghostfunc", b"{}"))
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path}: its metadata 'ghostfunc' are damaged: {error}.") from error
    if not isinstance(found, dict):
        raise CommandError(f"{path}: its metadata 'ghostfunc' are no object of facts.")
    return found


def _column(path: Path, name: str, values: pa.ChunkedArray) -> tuple[str, Tensor]:
    kind = values.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)) or values.null_count:
        what = f"{values.null_count:,} nulls" if values.null_count else f"the type {kind}"
        raise CommandError(f"{path}: the column {name!r} has {what}; expected a number for a row.")
    column = torch.tensor(values.to_pylist(), dtype=torch.float64, device="cpu")
    if name.startswith(VALUE):
        return f"shapley{HELPS}/{name.removeprefix(VALUE)}", -column
    return name, column
