"""Scores on disk, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc.shapley import Scores


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """A state of `gf.shapley`, for `load_state`."""
    _atomically(path, lambda temporary: torch.save(dict(state), temporary))


def load_state(path: Path, num_sets: int) -> dict[str, Tensor]:
    """What `save_state` wrote."""
    if not path.is_file():
        raise OptionError(
            f"There are no scores in this checkpoint: {path} does not exist. It was written by "
            "another Trainer; scores cannot be resumed from it. Start a new run from its weights."
        )
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    if state["values"].shape[1] != num_sets:
        raise OptionError(
            f"{path} holds scores for {state['values'].shape[1]} score datasets; {num_sets} are "
            "given. Resume with the score datasets the run was started with."
        )
    return state


def write_table(
    scores: Scores, names: Sequence[str], facts: Mapping[str, object], path: Path
) -> None:
    """A Parquet file with a row per sample: `sample_id`, `steps` and a column per validation set.

    `facts` are written into the metadata of the schema, as JSON under "ghostfunc".
    """
    columns = {"sample_id": scores.ids.numpy(), "steps": scores.counts.numpy()}
    columns |= {f"value_{k}": x.numpy() for k, x in zip(names, scores.values.T, strict=True)}
    table = pa.table(columns).replace_schema_metadata({"ghostfunc": json.dumps(facts)})
    _atomically(path, lambda temporary: pq.write_table(table, temporary))


def _atomically(path: Path, write: Callable[[str], None]) -> None:
    """Written to a file beside `path`, brought to the disk, and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
