"""Samples in other company: what is to be met again beside some of the others alone.

Documents that follow each other in a row are the likeliest to see each other. Every part has every
second document of a row, so that each of them is without its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ghostfunc._base.documents import Packing


class Part(NamedTuple):
    """Samples that are run together, and which of them count."""

    rows: list[int]
    own: list[bool]


def halves(samples: Iterable[int], packing: Packing | None) -> list[Part]:
    """Every sample once, in two parts of two samples at least: code may treat a batch of one in its
    own way. A document has a copy of itself for company, as another may be its neighbour."""
    order = list(samples)
    n = len(order)
    if packing is not None:
        of_row = _by_row(order, packing)
        order = [i for row in of_row for i in row]
        order = [*order[1::2], *order[::2]]
    if n == 1:
        return [Part(order, [True])]
    parts = []
    for own, rest in ((order[: n // 2], order[n // 2 :]), (order[n // 2 :], order[: n // 2])):
        others = (own if packing is not None or n == 2 else rest)[: max(0, 2 - len(own))]
        pairs = sorted([*((i, 0) for i in own), *((i, 1) for i in others)])
        parts.append(Part([i for i, _ in pairs], [other == 0 for _, other in pairs]))
    return parts


def beside_others(
    chosen: Sequence[int], order: Sequence[int], packing: Packing | None
) -> list[int]:
    """Some samples, and others to make two of them at least, the first in `order`. A document comes
    with every second one of its row, itself among them."""
    if packing is None:
        others = [i for i in order if i not in chosen]
        return [*chosen, *others[: max(0, 2 - len(chosen))]]
    (one,) = chosen
    (row,) = (row for row in _by_row(sorted(order), packing) if one in row)
    rows = row[row.index(one) % 2 :: 2]
    elsewhere = [i for i in order if i not in row]
    return sorted([*rows, *(elsewhere or [one])[: max(0, 2 - len(rows))]])


def neighbours(n: int, packing: Packing | None) -> list[int]:
    """Two samples; documents that follow each other in a row, if there are such."""
    rows = [] if packing is None else _by_row(range(n), packing)
    return next((row[:2] for row in rows if len(row) > 1), [0, min(1, n - 1)])


def _by_row(order: Iterable[int], packing: Packing) -> list[list[int]]:
    """Documents by row, in their places; rows as they come first."""
    numbers = packing.row.tolist()
    rows: dict[int, list[int]] = {}
    for i in order:
        rows.setdefault(numbers[i], []).append(i)
    return [sorted(row) for row in rows.values()]
