"""Samples in other company: what is to be met again beside some of the others alone.

Documents that follow each other in a row are the likeliest to see each other. Every part has every
second document of a row, so that each of them is without its neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ghostfunc._base.documents import Packing


class Part(NamedTuple):
    """Samples that are run together, and which of them count."""

    rows: list[int]
    own: list[bool]


PARTS = 4
"""Parts that a batch is cut into: two samples are seldom in the same one."""


def in_parts(
    samples: Iterable[int],
    packing: Packing | None,
    first: Sequence[int] = (),
    apart: Sequence[int] = (),
) -> list[Part]:
    """Every sample once, in parts that are cut from this order. The samples `first` are in parts
    without others, as far as there are parts enough; those `apart` are by themselves.

    A part of one sample has a copy of it for company: code may treat a batch of one in its own way.
    Samples of a part stay in the order of the batch, which some programs have sorted.
    """
    every = list(samples)
    rest = [i for i in every if i not in (*first, *apart)]
    first = [i for i in first if i not in apart]
    if len(every) == 1:
        return [Part(every, [True])]
    if packing is not None:
        groups = _of_documents([*first, *rest], packing, first)
    elif len(first) + len(rest) >= 2 * PARTS and len(first) > 1:
        groups = [list(first), *_cut(rest, PARTS - 1)]
    else:
        groups = _cut([*first, *rest], PARTS)
    return [_filled(sorted(group)) for group in (*([i] for i in apart), *groups)]


def _cut(order: Sequence[int], parts: int) -> list[list[int]]:
    """Pieces of about the same size, the smaller ones first."""
    n, parts = len(order), min(parts, len(order))
    ends = [n * k // max(parts, 1) for k in range(parts + 1)]
    return [list(order[a:b]) for a, b in itertools.pairwise(ends)]


def _of_documents(order: Sequence[int], packing: Packing, first: Sequence[int]) -> list[list[int]]:
    """Every second document of a row is in another part than the others of it."""
    own: list[list[int]] = []
    others: list[list[int]] = [[], []]
    for number, row in enumerate(_by_row(order, packing)):
        for parity in (0, 1):
            group = row[parity::2]
            if any(i in first for i in group):
                own.append(group)
            else:
                others[(number + parity) % 2] += group
    return [group for group in (*own, *others) if group]


def _filled(group: list[int]) -> Part:
    alone = len(group) == 1
    return Part(group * 2 if alone else group, [True, False] if alone else [True] * len(group))


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
