"""From packed rows to documents: where each one begins and ends, read and checked once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.documents import Documents
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError, CoupledSamplesError

_BOUNDS = ("cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")
_SEGMENTS = ("segments", "seq_idx")
_LENGTHS = ("max_length", "max_length_q", "max_length_k")
_OURS = {*_BOUNDS, *_SEGMENTS, *_LENGTHS, "position_ids", "attention_mask"}
IGNORED = -100
"""The label of positions that do not count, as everywhere in Hugging Face."""


SCORES = 100.0
"""How much higher attention's score at a masked position may be: added masks lie below by more."""


class _Piece(NamedTuple):
    """One document: its row, and where it begins and ends there."""

    row: int
    start: int
    stop: int


def documents(
    batch: Mapping[str, Tensor],
    *,
    segments: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Documents:
    """Make a batch whose samples are documents, of rows that hold several of them each.

        g_k = sum over positions t of document k  d loss_t / d params

    Every function of this package takes the result where it takes a batch, and returns numbers per
    document, in order of (row, place in the row). The model still runs on packed rows: nothing is
    unpacked, and no row is longer than it was. Documents must not see each other. That is proved
    as the independence of samples is, and `CoupledSamplesError` says where it does not hold.

    Args:
        batch: packed rows, `[R, T, ...]` under every name (`input_ids`, `labels`, ...);
            padding-free ones have `R = 1`. Where documents begin and end is said by one of the
            following, in the batch or as an argument. If several say it, they must agree.

            - `segments` (or `seq_idx`): `[R, T]`, the number of the document at each position; any
              negative number is padding.
            - `position_ids`: `[R, T]`, 0, 1, 2, ... in every document: a 0 begins the next one.
            - `cu_seq_lens` (or `cu_seq_lens_q`): `[documents + 1]`, for one row: where documents
              begin, and last the number of positions.

            `attention_mask` `[R, T]` is 0 at padding. A mask `[R, heads, T, T]` is what each
            document's attention uses; it may let no document see another.
        segments, cu_seq_lens: the same.

    Returns:
        `Documents`: `tensors` `[n, t, ...]`, one document per sample.

    Raises:
        BatchError: nothing says where documents begin; a document comes back after another, or
            documents overlap or leave gaps (`cu_seq_lens`); two sources disagree; shapes do not
            match; a document has no label that counts.
        CoupledSamplesError: a mask `[R, heads, T, T]` lets a document see another: it is True
            there, or adds a number that does not make the softmax exactly zero.

    Example:
        >>> rows = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
        >>> docs = gf.documents(rows, segments=torch.tensor([[0, 0, 0, 1, 1]]))
        >>> docs["input_ids"]
        tensor([[5, 6, 7],
                [8, 9, 0]])
    """
    if isinstance(batch, Documents):
        raise BatchError("the batch is made of documents already: gf.documents takes packed rows.")
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"gf.documents got a {type(batch).__name__}; expected packed rows by name, "
            '{"input_ids": [R, T], ...}.'
        )
    given = dict(batch)
    for name, x in (("segments", segments), ("cu_seq_lens", cu_seq_lens)):
        if x is not None and name in given:
            raise BatchError(f"{name} is given twice: in the batch and as an argument.")
        if x is not None:
            given[name] = x
    shape = _shape_of_rows(given)
    table = _segments(given, shape)
    pieces = _pieces(table)
    _check_labels(given, pieces)
    device = next(x for name, x in given.items() if name not in _OURS).device
    t = max(p.stop - p.start for p in pieces)
    index = np.zeros((len(pieces), t), np.int64)
    own = np.zeros((len(pieces), t), bool)
    for k, (row, start, stop) in enumerate(pieces):
        index[k, : stop - start] = row * shape[1] + np.arange(start, stop)
        own[k, : stop - start] = True
    places, mine = torch.from_numpy(index).to(device), torch.from_numpy(own).to(device)

    def cut(name: str, x: Tensor) -> Tensor:
        out = x.flatten(0, 1)[places.to(x.device)]
        fill = IGNORED if name == "labels" and not x.is_floating_point() else 0
        outside = ~mine.to(x.device).reshape(*mine.shape, *[1] * (x.ndim - 2))
        return out.masked_fill(outside, fill)

    tensors = {name: cut(name, x) for name, x in given.items() if name not in _OURS}
    masks = {}
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 4:
        _check_mask(mask, table)
        masks["attention_mask"] = _cut_mask(mask, pieces, t)
    numbers = torch.tensor([[p.row, p.stop - p.start] for p in pieces], device=device)
    width = torch.full((len(pieces),), shape[1], device=device)
    return Documents(tensors, masks, numbers[:, 0], numbers[:, 1], width, torch.zeros_like(width))


def _shape_of_rows(given: dict[str, Tensor]) -> tuple[int, int]:
    """R and T, which all tensors agree on."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, x in given.items():
        if name in _LENGTHS:
            continue
        if not isinstance(x, Tensor):
            raise BatchError(
                f"{name} is a {type(x).__name__}; packed rows are tensors, [R, T, ...] each."
            )
        if name not in (*_BOUNDS, "attention_mask"):
            shapes[name] = tuple(x.shape)
    content = [name for name in shapes if name not in _OURS]
    if not content:
        raise BatchError(f"the batch has no rows, only {sorted(given)}: it needs input_ids.")
    rows = shapes[content[0]][:2]
    for name, shape in shapes.items():
        if len(shape) < 2 or shape[:2] != rows or (name in _OURS and len(shape) != 2):
            raise BatchError(
                f"{name} has shape {list(shape)}, and {content[0]} has "
                f"{list(shapes[content[0]])}: packed rows agree on the first two axes, [R, T]."
            )
    if 0 in rows:
        raise BatchError(f"{content[0]} has shape {list(shapes[content[0]])}: it is empty.")
    mask = given.get("attention_mask")
    if mask is not None and mask.shape != rows and not _is_of_pairs(mask, rows):
        raise BatchError(
            f"attention_mask has shape {list(mask.shape)}; for rows of {list(rows)} it is "
            f"[{rows[0]}, {rows[1]}] or [{rows[0]}, heads, {rows[1]}, {rows[1]}]."
        )
    return rows[0], rows[1]


def _is_of_pairs(mask: Tensor, rows: tuple[int, ...]) -> bool:
    return mask.ndim == 4 and (mask.shape[0], *mask.shape[2:]) == (rows[0], rows[1], rows[1])


# --- where documents begin and end --------------------------------------------------------------


def _segments(given: dict[str, Tensor], shape: tuple[int, int]) -> np.ndarray:
    """The number of the document at each position, `[R, T]`, negative at padding."""
    padding = _padding(given, shape)
    tables: dict[str, np.ndarray] = {}
    for name in _SEGMENTS:
        if name in given:
            tables[name] = _whole_numbers(name, given[name])
    for name in _BOUNDS:
        if name in given:
            tables[name] = _from_bounds(name, _whole_numbers(name, given[name]), shape)
    hidden = padding.copy()
    for table in tables.values():
        hidden |= table < 0
    if "position_ids" in given:
        positions = _whole_numbers("position_ids", given["position_ids"])
        tables["position_ids"] = _from_positions(positions, hidden)
    if not tables:
        raise BatchError(
            "nothing says where documents begin: give segments [R, T] (the number of the document "
            "at each position), position_ids [R, T] that restart, or cu_seq_lens."
        )
    first, *others = tables
    table = np.where(hidden, -1, tables[first])
    for name in others:
        _agree(first, table, name, np.where(hidden, -1, tables[name]))
    _check_padding(given, padding, table)
    return table


def _whole_numbers(name: str, x: Tensor) -> np.ndarray:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise BatchError(f"{name} has dtype {x.dtype}; expected whole numbers (torch.int64).")
    return np.asarray(x.detach().cpu().numpy(), dtype=np.int64)


def _padding(given: dict[str, Tensor], shape: tuple[int, int]) -> np.ndarray:
    mask = given.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return np.zeros(shape, bool)
    values = mask.detach().to("cpu", torch.float64 if mask.is_floating_point() else None).numpy()
    strange = np.argwhere((values != 0) & (values != 1))
    if len(strange):
        r, c = strange[0].tolist()
        raise BatchError(
            f"attention_mask[{r}, {c}] is {values[r, c].item()}; a mask [R, T] is 1 at tokens and "
            "0 at padding. Numbers of documents go into segments."
        )
    return np.asarray(values == 0)


def _from_bounds(name: str, bounds: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, width = shape
    if rows != 1:
        raise BatchError(f"{name} is for one row, [1, T]; the batch has {rows}. Give segments.")
    if bounds.ndim != 1 or len(bounds) < 2:
        raise BatchError(f"{name} has shape {list(bounds.shape)}; expected [documents + 1].")
    if bounds[0] != 0 or bounds[-1] != width:
        raise BatchError(
            f"{name} goes from {bounds[0]} to {bounds[-1]} and leaves a gap: it begins with 0 and "
            f"ends with the number of positions, {width}."
        )
    wrong = np.flatnonzero(np.diff(bounds) <= 0)
    if len(wrong):
        i = int(wrong[0])
        raise BatchError(
            f"{name}[{i + 1}] is {bounds[i + 1]} after {bounds[i]}: documents overlap or are "
            "empty. It increases from each document to the next."
        )
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))[None]


def _from_positions(positions: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """Documents by positions that begin anew."""
    before = np.concatenate([np.full((len(positions), 1), -1), positions[:, :-1]], axis=1)
    fresh = np.concatenate([np.ones((len(padding), 1), bool), padding[:, :-1]], axis=1)
    wrong = (positions != 0) & ((positions != before + 1) | fresh) & ~padding
    if wrong.any():
        r, c = np.argwhere(wrong)[0].tolist()
        raise BatchError(
            f"position_ids[{r}, {c}] is {positions[r, c]}, where 0 begins a document"
            + ("." if c == 0 or fresh[r, c] else f" and {before[r, c] + 1} continues one.")
        )
    return np.asarray(np.cumsum(positions == 0, axis=1) - 1)


def _agree(first: str, table: np.ndarray, name: str, other: np.ndarray) -> None:
    """Raise unless two sources say the same of where documents begin."""
    begins = [_begins(x) for x in (table, other)]
    differs = begins[0] != begins[1]
    if differs.any():
        r, c = np.argwhere(differs)[0].tolist()
        begun = (first, name) if begins[0][r, c] else (name, first)
        raise BatchError(
            f"{first} and {name} disagree at position [{r}, {c}]: by {begun[0]} a document begins "
            f"there, by {begun[1]} none does."
        )


def _begins(table: np.ndarray) -> np.ndarray:
    before = np.concatenate([np.full((len(table), 1), -1), table[:, :-1]], axis=1)
    return np.asarray((table != before) & (table >= 0))


def _check_padding(given: dict[str, Tensor], padding: np.ndarray, table: np.ndarray) -> None:
    """Raise if what the mask calls padding lies inside a document."""
    if not padding.any():
        return
    for name in _SEGMENTS:
        if name not in given:
            continue
        numbers = np.asarray(given[name].detach().cpu().numpy())
        for r in range(len(table)):
            for number in np.unique(numbers[r][table[r] >= 0]).tolist():
                own = np.flatnonzero((numbers[r] == number) & (table[r] >= 0))
                holes = padding[r, own[0] : own[-1] + 1] & (
                    numbers[r, own[0] : own[-1] + 1] == number
                )
                if holes.any():
                    c = int(own[0] + np.flatnonzero(holes)[0])
                    raise BatchError(
                        f"attention_mask[{r}, {c}] is 0 inside document {number} of {name}: "
                        "a document leaves no gaps."
                    )


def _pieces(table: np.ndarray) -> list[_Piece]:
    """All documents, in order of (row, place); `BatchError` if one comes back."""
    pieces: list[_Piece] = []
    for r, row in enumerate(table):
        cuts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        met: dict[int, int] = {}
        for start, stop in itertools.pairwise(cuts):
            number = int(row[start])
            if number < 0:
                continue
            if number in met:
                raise BatchError(
                    f"segments[{r}] has document {number} up to position {met[number]} and again "
                    f"from position {start} on: a document is in one piece, so give what comes "
                    "after another document (or after padding) a number of its own."
                )
            met[number] = stop - 1
            pieces.append(_Piece(r, start, stop))
    if not pieces:
        raise BatchError("segments is negative everywhere: all positions are padding.")
    return pieces


# --- what documents must have -------------------------------------------------------------------


def _check_labels(given: dict[str, Tensor], pieces: list[_Piece]) -> None:
    labels = given.get("labels")
    if labels is None or labels.ndim != 2 or labels.is_floating_point():
        return
    counts = np.asarray((labels != IGNORED).detach().cpu().numpy())
    for r, start, stop in pieces:
        if not counts[r, start:stop].any():
            raise BatchError(
                f"labels[{r}, {start}:{stop}] are all {IGNORED}: that document has no loss. Make "
                "it padding (a negative number in segments)."
            )


def _check_mask(mask: Tensor, table: np.ndarray) -> None:
    """Raise `CoupledSamplesError` if a mask lets a document see another."""
    numbers = torch.from_numpy(table).to(mask.device)
    own = (numbers[:, :, None] == numbers[:, None, :])[:, None]
    least = math.nan
    if mask.dtype == torch.bool:
        seen = mask
    elif mask.is_floating_point():
        values = wide(mask.detach())
        limits = torch.finfo(values.dtype)
        if bool(values.isnan().any()):
            raise BatchError("attention_mask [R, heads, T, T] has NaN among its numbers.")
        highest = values.masked_fill(~own, -math.inf).amax(-1, keepdim=True)
        least = math.log(limits.tiny * limits.eps) - SCORES
        seen = values > highest + least
    else:
        raise BatchError(
            f"attention_mask [R, heads, T, T] has dtype {mask.dtype}; expected torch.bool (True "
            "where attention looks) or a floating-point one that is added to the scores."
        )
    bad = seen & ~own & (numbers >= 0)[:, None, :, None]
    if bool(bad.any()):
        r, head, query, key = bad.nonzero()[0].tolist()
        whose = f"another document (documents {table[r, query]} and {table[r, key]})"
        added = ""
        if mask.dtype != torch.bool:
            added = (
                f": it adds {float(mask[r, head, query, key]):.4g} there, and the softmax is "
                f"exactly zero at {least:.0f} beside what it adds within the document"
            )
        raise CoupledSamplesError(
            f"attention_mask[{r}] lets position {query} see position {key} of "
            f"{'padding' if table[r, key] < 0 else whose}{added}. A document's loss has to depend "
            "on its own positions alone. Use a block-diagonal mask: False or -inf between them."
        )


def _cut_mask(mask: Tensor, pieces: list[_Piece], t: int) -> Tensor:
    """Each document's own block, `[n, heads, t, t]`."""
    out = mask.new_zeros((len(pieces), mask.shape[1], t, t))
    for k, (r, start, stop) in enumerate(pieces):
        out[k, :, : stop - start, : stop - start] = mask[r, :, start:stop, start:stop]
    return out
