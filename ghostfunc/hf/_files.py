"""Files that are written whole or not at all; the table of scores."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ghostfunc.shapley import Scores


def write_table(
    scores: Scores, names: Sequence[str], facts: Mapping[str, object], path: Path
) -> None:
    """A Parquet file with a row per sample: `sample_id`, `steps` and a column per validation set.

    `facts` are written into the metadata of the schema, as JSON under "ghostfunc".
    """
    columns = {"sample_id": scores.ids.numpy(), "steps": scores.counts.numpy()}
    columns |= {f"value_{k}": x.numpy() for k, x in zip(names, scores.values.T, strict=True)}
    table = pa.table(columns).replace_schema_metadata({"ghostfunc": json.dumps(facts)})
    atomically(path, lambda temporary: pq.write_table(table, temporary))


def write(content: Callable[[str], None], path: str) -> None:
    """All that is written here goes through this call."""
    content(path)


def atomically(path: Path, content: Callable[[str], None]) -> None:
    """Written to a file beside `path`, brought to the disk, and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(content, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can (Windows cannot open a folder)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
