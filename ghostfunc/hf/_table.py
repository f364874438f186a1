"""The table of scores in a Parquet file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ghostfunc._base.whole_files import write_whole
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
    write_whole(path, lambda aside: pq.write_table(table, aside))
