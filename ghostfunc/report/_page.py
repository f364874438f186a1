"""Scores and rows to a page: the data as JSON, beside the script that shows them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ghostfunc._base.errors import OptionError
from ghostfunc.data import Rows, Scores
from ghostfunc.data._files import write_whole
from ghostfunc.data._scores import HELPS

WHOLE = 20_000
"""Characters of a sample that are shown, of the best and the worst."""

BRIEF = 300
"""Characters of the others where there are many."""

MANY = 3_000
"""Samples beyond which texts are cut to `BRIEF`."""

ENDS = 100
"""Samples of either end that keep their texts."""


@dataclass(frozen=True)
class Heat:
    """The share of every token in a sample's score.

    Attributes:
        pieces: the texts of the tokens.
        shares: as many numbers; they sum to the score.
    """

    pieces: Sequence[str]
    shares: Sequence[float]


def write_report(
    path: str | Path,
    scores: Scores,
    rows: Rows,
    *,
    title: str = "Which samples help?",
    group: str | None = None,
    heat: Mapping[int, Heat] | None = None,
) -> None:
    """Write a page to look at: best and worst samples, a table to search, filter and sort.

    The page is one file. It loads nothing, and its policy (Content-Security-Policy) lets no script
    run but its own: what texts hold is shown, never run.

    Args:
        path: an `.html` file, written whole or not at all.
        scores: its ids are indices of `rows`.
        rows: the samples.
        title: of the page.
        group: a column of the rows whose values make groups.
        heat: for some ids, the share of every token.

    Raises:
        OptionError: an id is no index of a row, or no row has the column `group`.
    """
    ids = [_row_number(i, len(rows)) for i in scores.ids]
    data = _data(scores, rows, ids, group, heat or {})
    page = _filled(title, data)
    write_whole(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _row_number(id: object, count: int) -> int:
    if not isinstance(id, int) or not 0 <= id < count:
        raise OptionError(f"the id {id!r} is no row of {count:,}; expected an index.")
    return id


def _data(
    scores: Scores, rows: Rows, ids: list[int], group: str | None, heat: Mapping[int, Heat]
) -> dict[str, Any]:
    ranking = scores.ranking
    order = scores[ranking].argsort(descending=True, stable=True).tolist()
    whole = set(order) if len(ids) <= MANY else {*order[:ENDS], *order[-ENDS:]}
    texts, groups = [], []
    for at, row in enumerate(ids):
        found = rows[row]
        texts.append(_parts(found, WHOLE if at in whole else BRIEF))
        if group is not None:
            groups.append(str(found.get(group, "")))
    if group is not None and not any(groups):
        raise OptionError(f"no row has a column {group!r}; expected the name of a column.")
    return {
        "ranking": ranking,
        "columns": [
            {"name": name, "label": _label(name), "values": [_short(v) for v in x.tolist()]}
            for name, x in scores.columns.items()
        ],
        "ids": ids,
        "texts": texts,
        "groups": groups,
        "group": group,
        "facts": {name: str(value) for name, value in scores.facts.items()},
        "heat": {
            str(ids.index(row)): {"pieces": list(h.pieces), "shares": [_short(s) for s in h.shares]}
            for row, h in heat.items()
        },
    }


def _label(name: str) -> str:
    base, _, rest = name.partition(HELPS)
    base = {"dot": "dot product"}.get(base, base)
    return f"{base}{rest}".replace("_", " ").replace("/", ": ")


def _short(x: float) -> float:
    """Five digits: more are not shown, and take room."""
    return float(f"{x:.5g}")


def _parts(row: Mapping[str, Any], most: int) -> list[list[str]]:
    """A sample as pairs of a role and a text, cut after a number of characters."""
    if isinstance(row.get("messages"), list):
        parts = [[str(m.get("role", "")), str(m.get("content", ""))] for m in row["messages"]]
    elif "prompt" in row and "completion" in row:
        parts = _said("prompt", row["prompt"]) + _said("completion", row["completion"])
    else:
        parts = [["", str(row.get("text", json.dumps(row, default=str)))]]
    left, cut = most, []
    for role, text in parts:
        if left <= 0:
            break
        cut.append([role, text if len(text) <= left else text[:left] + "…"])
        left -= len(text)
    return cut


def _said(role: str, value: object) -> list[list[str]]:
    if isinstance(value, list):
        return [[str(m.get("role", "")), str(m.get("content", ""))] for m in value]
    return [[role, str(value)]]


def _filled(title: str, data: Mapping[str, Any]) -> str:
    """The page with its parts in place."""
    files = resources.files("ghostfunc.report")
    script = (files / "page.js").read_text(encoding="utf-8")
    style = (files / "page.css").read_text(encoding="utf-8")
    # "<" cannot end the element; halves of surrogate pairs, which UTF-8 has not, are escaped too.
    content = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(title),
        "policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{allowed}'",
        "style": style,
        "script": script,
        "data": content,
    }
    page = (files / "page.html").read_text(encoding="utf-8")
    # In one pass: what stands in a part is not filled in.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)
