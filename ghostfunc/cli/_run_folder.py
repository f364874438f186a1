"""The folder of a run of GhostTrainer: its values over training time, for the page."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from ghostfunc.cli._errors import CommandError
from ghostfunc.data import Rows
from ghostfunc.report import Timeline
from ghostfunc.report._page import LINES

TABLE = "scores.parquet"
LABEL = "shapley value (loss)"


class Point(NamedTuple):
    """What every sample's values and steps had added up to at one step of the run."""

    step: int
    values: dict[int, float]
    counts: dict[int, int]


def read_timeline(folder: Path, rows: Rows, group: str | None) -> Timeline | None:
    """Mean values of samples between one checkpoint and the next; None without checkpoints.

    Positive values help, as in the columns of the page; of several validation sets the first
    counts.

    Args:
        folder: `output_dir` of the run: checkpoints, and `scores.parquet`.
        rows: the samples that were trained on.
        group: a column of the rows: a line for each of its most frequent values.

    Raises:
        CommandError: a checkpoint is not of this run.
        OptionError: a checkpoint's values are damaged.
    """
    points = [*_checkpoints(folder)]
    last = _last(folder / TABLE)
    points = [point for point in points if point.step < last.step] + [last]
    if len(points) < 2:
        return None
    groups = {i: _group(rows, i, group) for i in last.values}
    names = [name for name, _ in Counter(groups.values()).most_common(LINES)]
    lines: dict[str, list[float | None]] = {name: [] for name in names}
    before = Point(0, {}, {})
    for point in points:
        values, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for i, count in point.counts.items():
            more = count - before.counts.get(i, 0)
            if more < 0 or i not in groups:
                raise CommandError(
                    f"{folder}: the checkpoint of step {before.step} has steps of sample {i} that "
                    f"step {point.step} has not: it belongs to another run. Move it elsewhere."
                )
            if groups[i] in lines:
                values[groups[i]] -= point.values[i] - before.values.get(i, 0.0)
                counts[groups[i]] += more
        for name in names:
            lines[name].append(values[name] / counts[name] if counts[name] else None)
        before = point
    return Timeline([point.step for point in points], lines, LABEL)


def _group(rows: Rows, i: int, group: str | None) -> str:
    return "all samples" if group is None else str(rows[i].get(group, ""))


def _checkpoints(folder: Path) -> Iterator[Point]:
    """In order of steps."""
    from ghostfunc.hf._state import STATE_FILE, load_state
    from ghostfunc.shapley import finalize

    found = {
        int(match[1]): path / STATE_FILE
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step, path in sorted(found.items()):
        if path.exists():
            scores = finalize(load_state(path).state)
            ids = scores.ids.tolist()
            values = dict(zip(ids, scores.values[:, 0].tolist(), strict=True))
            yield Point(step, values, dict(zip(ids, scores.counts.tolist(), strict=True)))


def _last(path: Path) -> Point:
    """The table that the run wrote at its end."""
    table = pq.read_table(path)
    facts = json.loads((table.schema.metadata or {}).get(b"ghostfunc", b"{}"))
    first = next((name for name in table.column_names if name.startswith("value_")), None)
    if first is None or "global_step" not in facts:
        raise CommandError(f"{path} is no table of GhostTrainer; expected a run's folder.")
    ids = table["sample_id"].to_pylist()
    values = dict(zip(ids, table[first].to_pylist(), strict=True))
    counts = dict(zip(ids, table["steps"].to_pylist(), strict=True))
    return Point(int(facts["global_step"]), values, counts)
