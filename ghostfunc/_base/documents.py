"""Documents that share rows: a batch whose samples are documents, run packed.

`Documents` holds one document per sample, `[n, t, ...]`, so that whatever takes samples takes
documents. Only while the model runs do they lie side by side in rows, `[R, T, ...]`:

    row 0:   a a a a b b c c c .       rows()       [n, t, ...] -> [R, T, ...]
    row 1:   d d d d d d e e . .       from_rows()  [R, T, ...] -> [n, t, ...]

Where a document lies is known from `row` and `length` alone: the documents of a row follow each
other in their order in the batch. Any choice of documents is a batch again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ghostfunc._base.errors import BatchError, TransformError
from ghostfunc._base.torch_private import symbolic, without_torch_functions
from ghostfunc._base.trees import NAMESPACE
from ghostfunc._base.types import PyTree

FILL = {"labels": -100}
"""What stands behind the last document of a row, where it matters: for labels that are classes."""

GROUPS = 32
"""A group more of documents has to save this part of all positions, for the calls that it costs."""

NEARLY_FULL = 7 / 8
"""Share of a row's width from which on rows keep it: runs at one width share what is known."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Where documents lie in rows.

    Attributes:
        rows, width: R and T.
        index: the place of each document's positions in the flattened rows, `[n, t]`; behind its
            end, that of its last position.
        own: which of those are the document's, `[n, t]`.
        whole: whether all are.
        source: for every place of the flattened rows, which position of the flattened documents is
            there, `[R * T]`; behind the last document, that document's last one.
        free: the places where none is, `[R * T]`.
        row: each document's row, `[n]`.
        position_ids: `[R, T]`, 0, 1, 2, ... in every document, and 0 between them.
        several: whether a row has more than one document.
    """

    rows: int
    width: int
    index: Int[Tensor, "n t"]
    own: Bool[Tensor, "n t"]
    whole: bool
    source: Int[Tensor, " places"]
    free: Bool[Tensor, " places"]
    row: Int[Tensor, " n"]
    position_ids: Int[Tensor, "R T"]
    several: bool

    @functools.cached_property
    def layout(self) -> tuple[int | bool, ...]:
        """What documents are like in rows, as far as programs may treat some in another way: the
        powers of two that bound how many there are, how many a row has at most and how long they
        are, and whether a row is filled to its end."""
        most = int(self.row.bincount().max())
        bounds = [(x - 1).bit_length() for x in (len(self.row), most, self.own.shape[1])]
        full = bool((~self.free).view(self.rows, self.width)[:, -1].any())
        return *bounds, full

    @property
    def seamless(self) -> bool:
        """Whether documents of one length fill the rows: then they are a view of them."""
        return self.whole and self.index.numel() == self.rows * self.width

    @functools.cached_property
    def spans(self) -> list[slice]:
        """The stretch of each document in the flattened rows."""
        starts, lengths = self.index[:, 0].tolist(), self.own.sum(1).tolist()
        return [slice(a, a + size) for a, size in zip(starts, lengths, strict=True)]

    @functools.cached_property
    def document(self) -> Int[Tensor, " places"]:
        """Which document is at each place of the flattened rows; n where none is."""
        n = len(self.row)
        out = self.index.new_full((self.rows * self.width,), n)
        own = self.own
        numbers = torch.arange(n, device=out.device)[:, None].expand(own.shape)
        out[self.index[own]] = numbers[own]
        return out

    @functools.cached_property
    def groups(self) -> list[DocumentsAlike]:
        """The documents by length, so that few are filled up much."""
        lengths = np.asarray(self.own.sum(1).tolist())
        order = np.argsort(-lengths, kind="stable")
        bounds = itertools.pairwise(_cuts(lengths[order]))
        groups = [order[start:stop].tolist() for start, stop in bounds]
        return [
            DocumentsAlike(torch.tensor(g, device=self.row.device), self._some(g)) for g in groups
        ]

    def _some(self, chosen: list[int]) -> Packing:
        own = self.own[chosen]
        longest = int(own.sum(1).max())
        own = own[:, :longest]
        index, row = self.index[chosen, :longest], self.row[chosen]
        return replace(self, index=index, own=own, whole=bool(own.all()), row=row)

    @functools.cached_property
    def own_in_row(self) -> Bool[Tensor, "n T"]:
        """Which positions of its row are a document's."""
        n = len(self.row)
        places = torch.zeros(n, self.width, dtype=torch.bool, device=self.row.device)
        return places.scatter_(1, self.index % self.width, True)


def _cuts(lengths: np.ndarray) -> list[int]:
    """Where to cut lengths, the longest first, into groups: with the fewest positions when all of a
    group are filled up to its first, and a share of all positions for every group."""
    starts = np.unique(lengths, return_index=True)[1][::-1]  # of equal ones the first
    ends = np.append(starts[1:], len(lengths))
    cost, before = np.zeros(len(starts) + 1), np.zeros(len(starts) + 1, np.int64)
    for i, end in enumerate(ends):  # the last group ends here and begins at one of the starts
        filled = cost[: i + 1] + lengths[starts[: i + 1]] * (end - starts[: i + 1])
        before[i + 1] = filled.argmin()
        cost[i + 1] = filled.min() + lengths.sum() / GROUPS
    found = [len(starts)]
    while found[-1]:
        found.append(int(before[found[-1]]))
    return [*(int(starts[i]) for i in found[:0:-1]), len(lengths)]


class DocumentsAlike(NamedTuple):
    """Documents of about one length.

    Attributes:
        samples: which they are.
        packing: where they lie.
    """

    samples: Int[Tensor, " k"]
    packing: Packing


def to_rows(x: Float[Tensor, "n t ..."], packing: Packing, fill: float | None = None) -> Tensor:
    """Documents side by side, `[R, T, ...]`."""
    if has_torch_function((x,)):
        rows: Tensor = handle_torch_function(to_rows, (x,), x, packing, fill)
        return rows
    out = x.flatten(0, 1).index_select(0, packing.source)
    if fill is not None:
        out = out.masked_fill(packing.free.reshape(-1, *[1] * (out.ndim - 1)), fill)
    return out.unflatten(0, (packing.rows, packing.width))


def from_rows(x: Float[Tensor, "R T ..."], packing: Packing) -> Tensor:
    """The inverse of `to_rows`, `[n, t, ...]`; zero behind the end of a document."""
    if has_torch_function((x,)):
        documents: Tensor = handle_torch_function(from_rows, (x,), x, packing)
        return documents
    own = packing.own.reshape(*packing.own.shape, *[1] * (x.ndim - 2))
    out = x.flatten(0, 1).index_select(0, packing.index.flatten())
    out = out.unflatten(0, tuple(packing.index.shape))
    return out if packing.whole else out.masked_fill(~own, 0)


@dataclass(frozen=True, eq=False)
class Documents:
    """A batch whose samples are documents, packed into rows while the model runs.

    Made by `gf.documents`. Every function of this package takes one where it takes a batch: sample
    i is document i, in order of (row, place in the row). `model_fn` calls

        rows = docs.rows()                # dict of [R, T, ...], with position_ids
        losses = docs.sums(token_losses)  # [R, T] -> [n]

    Attributes:
        tensors: one document per sample, `[n, t, ...]`, zero behind its end.
        masks: masks of each document's own attention, `[n, heads, t, t]`.
        row, length: each document's row, and how many positions it has, `[n]`.
        width: of the rows it came in, `[n]`.
        spare: columns that rows have besides, `[n]`.
    """

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    row: Int[Tensor, " n"]
    length: Int[Tensor, " n"]
    width: Int[Tensor, " n"]
    spare: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor of all documents, `[n, t, ...]`."""
        if name not in self.tensors:
            raise BatchError(f"the documents have no {name!r}; they have {sorted(self.tensors)}.")
        return self.tensors[name]

    def __repr__(self) -> str:
        leaves: dict[str, Any] = dict(self.tensors)  # trees may hold other things for a while
        sizes = {k: list(x.shape) if isinstance(x, Tensor) else x for k, x in leaves.items()}
        shapes = ", ".join(f"{k}: {x}" for k, x in sizes.items())
        return f"Documents({shapes})"

    @property
    def packing(self) -> Packing:
        """Where the documents lie in rows."""
        if "_packing" not in self.__dict__:
            with without_torch_functions():  # no op of the model's
                object.__setattr__(self, "_packing", _pack(self))
        packing: Packing = self.__dict__["_packing"]
        return packing

    def rows(self) -> dict[str, Tensor]:
        """All tensors as rows, `[R, T, ...]`, and what a model tells documents apart by:
        `position_ids` `[R, T]`, which begin anew in every document, and the masks they came with,
        `[R, heads, T, T]`."""
        packing = self.packing
        fills = {k: None if x.is_floating_point() else FILL.get(k) for k, x in self.tensors.items()}
        rows = {k: self.to_rows(x, fill=fills[k]) for k, x in self.tensors.items()}
        rows |= {k: _mask_of_rows(x, packing) for k, x in self.masks.items()}
        return rows | {"position_ids": packing.position_ids}

    def to_rows(self, x: Tensor, *, fill: float | None = None) -> Tensor:
        """`[n, t, ...]` as rows, `[R, T, ...]`. Where no document is, `fill` stands, or what is at
        the last position before: values that the model takes."""
        if x.shape[:2] != self.packing.index.shape:
            n, t = self.packing.index.shape
            raise BatchError(
                f"to_rows got a tensor of shape {tuple(x.shape)}; these documents are [{n}, {t}, "
                "...]: a value per position, those behind the end of a document included."
            )
        return to_rows(x, self.packing, fill)

    def from_rows(self, x: Tensor) -> Tensor:
        """`[R, T, ...]` as documents, `[n, t, ...]`; zero behind the end of a document."""
        if x.shape[:2] != (self.packing.rows, self.packing.width):
            raise BatchError(
                f"from_rows got a tensor of shape {tuple(x.shape)}; the rows of these documents "
                f"are [{self.packing.rows}, {self.packing.width}, ...]."
            )
        return from_rows(x, self.packing)

    def sums(self, x: Tensor) -> Tensor:
        """Each document's sum over its own positions: `[R, T]` -> `[n]`."""
        return self.from_rows(x).sum(1)


def _flatten(docs: Any) -> tuple[tuple[Any, ...], None, tuple[str, ...]]:
    names = ("tensors", "masks", "row", "length", "width", "spare")
    return tuple(getattr(docs, name) for name in names), None, names


def _unflatten(_: Any, children: Iterable[Any]) -> Any:
    return Documents(*children)


_node: type[Any] = Documents  # optree's types are for collections alone
optree.register_pytree_node(_node, _flatten, _unflatten, namespace=NAMESPACE)


def packing_of(batch: PyTree) -> Packing | None:
    """Where the documents of a batch lie; None for a batch of ordinary samples."""
    return batch.packing if isinstance(batch, Documents) else None


def apart(batch: PyTree, spare: int = 1) -> PyTree:
    """Every document in a row of its own, with spare columns at its end: then rows are samples.
    Other batches as they are."""
    if not isinstance(batch, Documents):
        return batch
    return replace(
        batch,
        row=torch.arange(len(batch), device=batch.row.device),
        width=torch.zeros_like(batch.width),
        spare=torch.full_like(batch.spare, spare),
    )


def content(batch: PyTree) -> PyTree:
    """What samples differ in, wherever they lie."""
    if not isinstance(batch, Documents):
        return batch
    return batch.tensors, batch.masks, batch.length


def _pack(docs: Documents) -> Packing:
    geometry = (docs.row, docs.length, docs.width, docs.spare)
    if any(map(symbolic, geometry)):
        raise TransformError(
            "torch.compile cannot record calls on packed documents: where they lie is read from "
            "the batch. Call the function uncompiled."
        )
    row, length, width, spare = (np.asarray(x.tolist(), dtype=np.int64) for x in geometry)
    n, t = len(row), next(iter(docs.tensors.values())).shape[1]
    rows, start = np.empty(n, np.int64), np.empty(n, np.int64)
    numbers: dict[int, int] = {}
    fill: list[int] = []
    for i, (own, size) in enumerate(zip(row.tolist(), length.tolist(), strict=True)):
        number = numbers.setdefault(own, len(numbers))
        if number == len(fill):
            fill.append(0)
        rows[i], start[i] = number, fill[number]
        fill[number] += size
    longest = max(fill)
    columns = int(width.max())
    if not NEARLY_FULL * columns < longest <= columns:
        columns = longest
    columns += int(spare.max())
    places = np.arange(t)[None]
    own_places = places < length[:, None]
    index = (rows * columns + start)[:, None] + np.minimum(places, length[:, None] - 1)
    flat = np.arange(n * t).reshape(n, t)
    source = np.full(len(fill) * columns, -1)
    source[index[own_places]] = flat[own_places]
    free = source < 0
    last = np.zeros(len(fill), np.int64)
    last[rows] = flat[np.arange(n), length - 1]  # of several, the last one's
    source = np.where(free, np.repeat(last, columns), source)
    ids = np.zeros(len(fill) * columns, np.int64)
    ids[index[own_places]] = np.broadcast_to(places, (n, t))[own_places]
    device = docs.row.device

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    return Packing(
        rows=len(fill),
        width=columns,
        index=tensor(index),
        own=tensor(own_places),
        whole=bool(own_places.all()),
        source=tensor(source),
        free=tensor(free),
        row=tensor(rows),
        position_ids=tensor(ids).view(len(fill), columns),
        several=n > len(fill),
    )


def _mask_of_rows(x: Tensor, packing: Packing) -> Tensor:
    """Attention masks of documents, `[n, heads, t, t]`, as one of rows, `[R, heads, T, T]`: the
    places between documents see themselves alone."""
    if has_torch_function((x,)):
        mask: Tensor = handle_torch_function(_mask_of_rows, (x,), x, packing)
        return mask
    seen, unseen = (True, False) if x.dtype == torch.bool else (0.0, torch.finfo(x.dtype).min)
    rows, width, heads = packing.rows, packing.width, x.shape[1]
    out = torch.full((rows * width, heads, width), unseen, dtype=x.dtype, device=x.device)
    places = torch.arange(rows * width, device=x.device)
    out[places, :, places % width] = torch.tensor(seen, dtype=x.dtype, device=x.device)
    document, query, key = (packing.own[:, :, None] & packing.own[:, None, :]).nonzero().unbind(1)
    values = x[document, :, query, key]
    keys = packing.index[document, key] % width
    out[packing.index[document, query], :, keys] = values
    return out.unflatten(0, (rows, width)).movedim(2, 1)
