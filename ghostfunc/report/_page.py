"""Scores and rows to a page: the data as JSON, beside the script that shows them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any

from ghostfunc._base.errors import OptionError
from ghostfunc._base.whole_files import write_whole
from ghostfunc.data import Rows, Scores
from ghostfunc.data._table import HELPS
from ghostfunc.report._images import thumbnail

WHOLE = 20_000
"""Characters of a sample that are shown, of the best and the worst."""

BRIEF = 300
"""Characters of the others where there are many."""

MANY = 3_000
"""Samples beyond which texts are cut to `BRIEF`."""

ENDS = 100
"""Samples of either end that keep their texts."""


IMAGES = 1_000
"""Samples beyond which only the best and the worst have their images."""

LINES = 8
"""Lines of the chart over training time."""


NAME = 80
"""Characters of a role or a group."""

ASIDE = ("system", "developer")
"""Roles whose text many samples share: it is folded away, and cut first."""

FEW = 30
"""Characters that a message which was cut is found by."""


@dataclass(frozen=True)
class Heat:
    """The share of every token in a sample's score.

    Attributes:
        pieces: the texts of the tokens.
        shares: as many numbers; they sum to the score.
    """

    pieces: Sequence[str]
    shares: Sequence[float]


@dataclass(frozen=True)
class Timeline:
    """Values of samples over training time.

    Attributes:
        steps: the step at the end of every stretch of training.
        lines: by name, a number per stretch: the mean value of a sample in a step of it; None where
            no sample was met.
        label: what the numbers are.
    """

    steps: Sequence[int]
    lines: Mapping[str, Sequence[float | None]]
    label: str


def write_report(
    path: str | Path,
    scores: Scores,
    rows: Rows,
    *,
    title: str = "Which samples help?",
    group: str | None = None,
    heat: Mapping[int, Heat] | None = None,
    image: str | None = None,
    timeline: Timeline | None = None,
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
        image: a column of the rows with images: bytes, names of files within the folder of the
            rows, `data:` addresses, or what the `datasets` library stores. Shown small.
        timeline: values over training time, for a chart.

    Raises:
        OptionError: an id is no index of a row, no row has the column `group` or `image`, or an
            image cannot be read.
    """
    ids = [_row_number(i, len(rows)) for i in scores.ids]
    data = _data(scores, rows, ids, group, heat or {}, image)
    if image is not None:
        data["images"] = _images(scores, rows, ids, image)
    if timeline is not None:
        data["timeline"] = {
            "label": timeline.label,
            "steps": list(timeline.steps),
            "lines": [
                {"name": name, "values": [None if x is None else _short(x) for x in values]}
                for name, values in list(timeline.lines.items())[:LINES]
            ],
        }
    page = _filled(title, data)
    write_whole(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _row_number(id: object, count: int) -> int:
    if not isinstance(id, int) or not 0 <= id < count:
        raise OptionError(f"the id {id!r} is no row of {count:,}; expected an index.")
    return id


def _data(
    scores: Scores,
    rows: Rows,
    ids: list[int],
    group: str | None,
    heat: Mapping[int, Heat],
    image: str | None,
) -> dict[str, Any]:
    ranking = scores.ranking
    order = scores[ranking].argsort(descending=True, stable=True).tolist()
    whole = set(order) if len(ids) <= MANY else {*order[:ENDS], *order[-ENDS:]}
    texts, groups = [], []
    for at, row in enumerate(ids):
        found = {name: value for name, value in rows[row].items() if name != image}
        texts.append(_parts(found, WHOLE if at in whole else BRIEF))
        if group is not None:
            groups.append(str(found.get(group, ""))[:NAME])
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
        "aside": ASIDE,
        "facts": {name: str(value) for name, value in scores.facts.items()},
        "heat": {
            str(ids.index(row)): {
                "pieces": list(h.pieces),
                "shares": [_short(s) for s in h.shares],
                "said": _said_where(_parts(rows[row], WHOLE), h.pieces),
            }
            for row, h in heat.items()
        },
    }


def _images(scores: Scores, rows: Rows, ids: list[int], column: str) -> dict[str, str]:
    """Small images by place; of many samples those of either end."""
    order = scores[scores.ranking].argsort(descending=True, stable=True).tolist()
    shown = order if len(ids) <= IMAGES else dict.fromkeys([*order[:ENDS], *order[-ENDS:]])
    found = {str(at): thumbnail(rows, ids[at], column) for at in shown}
    images = {at: image for at, image in found.items() if image is not None}
    if not images:
        raise OptionError(f"no row has a column {column!r}; expected the name of a column.")
    return images


def _said_where(parts: list[list[str]], pieces: Sequence[str]) -> list[list[Any]]:
    """For every message whose text is found among the tokens: its first token, the one after its
    last, and its role."""
    ends = list(accumulate(map(len, pieces)))
    whole, at, found = "".join(pieces), 0, []
    for role, text in parts:
        text = text.strip()
        start = whole.find(text, at)
        if start < 0:  # cut at the end
            start = whole.find(text[:FEW], at)
        if not role or not text or start < 0:
            continue
        at = min(start + len(text), len(whole))
        first, last = bisect_right(ends, start), bisect_left(ends, at) + 1
        found.append([first, last, role])
    return found


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
    elif "text" in row:
        parts = [["", str(row["text"])]]
    else:
        parts = [[name, str(value)] for name, value in row.items()]
    left, cut = most, {}
    for k in sorted(range(len(parts)), key=lambda k: parts[k][0].lower() in ASIDE):
        if left <= 0:
            break
        role, text = parts[k]
        cut[k] = [role[:NAME], text if len(text) <= left else text[:left] + "…"]
        left -= len(text) + 1  # empty messages have an end, too
    return [cut[k] for k in sorted(cut)]


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
