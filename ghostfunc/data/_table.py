"""`Scores`: a table with a row per sample, and what one asks of it."""

from __future__ import annotations

import html
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.whole_files import write_whole
from ghostfunc.select import top_k

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]
    import pyarrow as pa
    from matplotlib.axes import Axes

HELPS = "_higher_helps"
"""In the name of a column: training on samples with higher values lowers the target's loss."""

SHOWN = 5
"""Rows of either end in a notebook."""


@dataclass(frozen=True, repr=False)
class Scores:
    """One row per sample, in the order of the data set.

    A column whose name has `higher_helps` in it ranks samples: to first order, a gradient step on a
    sample with a positive value lowers the loss of the target. That is the sign of
    `gf.ghost_dot_prod`. (The data Shapley papers, and `gf.shapley`, count the change of the loss
    instead, where helpful samples are negative: `loss_change` converts.)

    Attributes:
        ids: of the samples.
        columns: name -> `[n]`.
        facts: what made the numbers: model, target, token budget, ...
    """

    ids: Sequence[Hashable]
    columns: Mapping[str, Float[Tensor, " n"]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, x in self.columns.items():
            if x.shape != (len(self.ids),):
                raise OptionError(
                    f"column {name!r} has shape {tuple(x.shape)}; there are {len(self.ids)} ids."
                )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, column: str) -> Float[Tensor, " n"]:
        if column not in self.columns:
            raise OptionError(f"there is no column {column!r}; there are {list(self.columns)}.")
        return self.columns[column]

    @property
    def ranking(self) -> str:
        """The first column that ranks samples."""
        for name in self.columns:
            if HELPS in name:
                return name
        raise OptionError(
            f"no column ranks samples (none has {HELPS!r} in its name): {list(self.columns)}. Name "
            "a column to go by."
        )

    def take(self, rows: Sequence[int]) -> Scores:
        """The table of some rows, in their order."""
        index = torch.as_tensor(list(rows), dtype=torch.long, device="cpu")
        columns = {name: x[index] for name, x in self.columns.items()}
        return Scores([self.ids[i] for i in index.tolist()], columns, self.facts)

    def top(self, k: int, by: str | None = None) -> Scores:
        """The k rows with the highest values, highest first; of equals the earlier row.

        Args:
            k: between 1 and n.
            by: a column; by default `ranking`.

        Raises:
            OptionError: there is no such column, or `k` is out of range.
        """
        return self.take(top_k(self[by or self.ranking].double(), k).tolist())

    def bottom(self, k: int, by: str | None = None) -> Scores:
        """The k rows with the lowest values, lowest first; of equals the earlier row."""
        return self.take(top_k(-self[by or self.ranking].double(), k).tolist())

    def loss_change(self, lr: float, by: str | None = None) -> Float[Tensor, " n"]:
        """To first order, what a step `-lr * g_i` adds to the target's mean loss: `-lr * <g_i, u>`.

        This is the sign of "Data Shapley in One Training Run" and of `gf.shapley`: negative values
        help.
        """
        by = by or self.ranking
        if not by.startswith("dot"):
            raise OptionError(f"the loss changes by dot products; {by!r} is no column of those.")
        return -lr * self[by]

    def to_arrow(self) -> pa.Table:
        """A `pyarrow.Table` of `id` and the columns; `facts` are in the schema's metadata, as JSON
        under "ghostfunc"."""
        import pyarrow as pa

        columns = {name: x.numpy() for name, x in self.columns.items()}
        table = pa.table({"id": pa.array(list(self.ids)), **columns})
        return table.replace_schema_metadata({"ghostfunc": json.dumps(dict(self.facts))})

    def to_pandas(self) -> pd.DataFrame:
        """A `pandas.DataFrame` of the columns, with the ids as its index."""
        return self.to_arrow().to_pandas().set_index("id")

    def to_parquet(self, path: str | Path) -> None:
        """Write `to_arrow()` to a Parquet file, whole or not at all."""
        import pyarrow.parquet as pq

        write_whole(Path(path), lambda temporary: pq.write_table(self.to_arrow(), temporary))

    def plot(self, by: str | None = None, axes: Axes | None = None) -> Axes:
        """A histogram of a column, zero marked, with matplotlib."""
        from ghostfunc.data._plot import histogram

        by = by or self.ranking
        return histogram(self[by], by, axes)

    def __repr__(self) -> str:
        if not len(self):
            return f"Scores(0 samples; {', '.join(self.columns)})"
        values = self[self.ranking]
        return (
            f"Scores({len(self):,} samples; {', '.join(self.columns)}; {self.ranking} from "
            f"{float(values.min()):.3g} to {float(values.max()):.3g})"
        )

    def _repr_html_(self) -> str:
        """A small table: the best and the worst rows."""
        if not len(self):
            return html.escape(repr(self))
        best = self.top(min(SHOWN, len(self)))
        worst = self.bottom(min(SHOWN, len(self) - len(best))) if len(self) > len(best) else None
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("id", *self.columns))
        gap = f"<tr><td colspan={len(self.columns) + 1}>...</td></tr>"
        rows = _rows(best) if worst is None else [*_rows(best), gap, *_rows(worst)[::-1]]
        return (
            f"<table><caption>{len(self):,} samples by {html.escape(self.ranking)}</caption>"
            f"<tr>{head}</tr>{''.join(rows)}</table>"
        )


def _rows(scores: Scores) -> list[str]:
    return [
        "<tr>"
        + f"<td>{html.escape(str(id))}</td>"
        + "".join(f"<td>{float(x[i]):.4g}</td>" for x in scores.columns.values())
        + "</tr>"
        for i, id in enumerate(scores.ids)
    ]
