"""Whether an op leaves every sample where it is, whatever the numbers are.

An op that works on each sample by itself takes samples in another order, and returns them in that
order. One that moves rows from sample to sample (a flip, a roll, an index along the samples) does
not. What it returns may be multiplied by zero at first, so that no value and no gradient tells.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.side_effects import Draws
from ghostfunc._base.torch_private import without_torch_functions
from ghostfunc._base.trees import flatten, unflatten
from ghostfunc._trace.trace import Shape

Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def moves_samples(
    func: Callable[..., Any],
    call: Call,
    given: Sequence[Shape | None],
    expected: Sequence[Shape | None],
    n: int,
    same: Container[int],
) -> bool:
    """Whether a call on n samples does not commute with an exchange of them.

    Args:
        given, expected: shapes of its arguments and of its results with fewer samples.
        same: tensors, by `id`, that are the same for samples in every order.
    """
    leaves, treedef = flatten(call)
    if len(leaves) != len(given):
        return True  # a list with something for every sample
    grown = [
        (i, _axis(x, shape))
        for i, (x, shape) in enumerate(zip(leaves, given, strict=True))
        if isinstance(x, Tensor) and tuple(x.shape) != shape and id(x) not in same
    ]
    if not grown or any(x.layout != torch.strided for x in leaves if isinstance(x, Tensor)):
        return False
    if any(axis is None for _, axis in grown):
        return False  # a table of pairs of samples, which is noted where it is made
    apart = [(i, axis) for i, axis in grown if axis is not None]
    with without_torch_functions(), Draws() as draws:
        try:
            told = _told_apart(leaves, apart, n)
            first = _results(func, unflatten(treedef, told))
        except (RuntimeError, IndexError, ValueError):  # the op has other demands on its numbers
            first, told = _results(func, unflatten(treedef, leaves)), leaves
        if draws.seen or len(first) != len(expected):
            return not draws.seen
        leaves = told
        for others in _exchanged(leaves, apart, n):
            try:
                second = _results(func, unflatten(treedef, others))
            except (RuntimeError, IndexError, ValueError):
                continue
            if all(map(_Alike(n), first, second, expected)):
                return False
    return True


def _results(func: Callable[..., Any], call: Call) -> list[Any]:
    args, kwargs = call
    leaves, treedef = flatten(args)
    args = unflatten(treedef, [x.clone() if isinstance(x, Tensor) else x for x in leaves])
    out = func(*args, **kwargs)
    return flatten(args[0] if out is None else out)[0]


def _axis(x: Tensor, before: Shape | None) -> int | None:
    """The axis that grew, if one did."""
    if before is None or x.ndim != len(before):
        return None
    axes = [i for i, (a, b) in enumerate(zip(x.shape, before, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 else None


def _folds(size: int, n: int) -> list[int]:
    """In how many stretches an axis may hold n samples: in each they follow each other."""
    count = 0 if size % n else size // n
    return [outer for outer in range(1, count + 1) if count % outer == 0]


def _exchange(x: Tensor, axis: int, n: int, fold: int) -> Tensor:
    """The tensor with its first two samples exchanged. A turn of all would commute with a roll."""
    parts = x.unflatten(axis, (fold, n, -1)).split((1, 1, n - 2), axis + 1)
    return torch.cat((parts[1], parts[0], parts[2]), axis + 1).flatten(axis, axis + 2)


def _exchange_is_seen(x: Tensor, axis: int, n: int) -> bool:
    """Whether the first two samples differ, however they are folded."""
    folded = (x.unflatten(axis, (fold, n, -1)) for fold in _folds(x.shape[axis], n))
    return not any(torch.equal(y.select(axis + 1, 0), y.select(axis + 1, 1)) for y in folded)


def _told_apart(leaves: Sequence[Any], grown: Sequence[tuple[int, int]], n: int) -> list[Any]:
    """The arguments, in which no two samples are alike: an exchange of equal rows shows nothing.

    Samples are alike where a batch of one sample is traced, and where rows are zero so far. Rows
    of floats are scaled by at most 1, so that they stay what the op takes: sorted, positive
    definite, a probability. Other rows are rolled along the other axes, and keep their values.
    """
    found = list(leaves)
    for i, axis in grown:
        x = leaves[i]
        if _exchange_is_seen(x, axis, n):
            continue
        if x.is_floating_point() or x.is_complex():
            scales = torch.linspace(1, 0.75, x.shape[axis], device=x.device).to(x.dtype)
            scales = scales.view(-1, *[1] * (x.ndim - 1 - axis))
            found[i] = x * scales if x.any() else scales.expand(x.shape)
        elif x.ndim > 1:
            rows = [row.flatten().roll(k).view(row.shape) for k, row in enumerate(x.unbind(axis))]
            found[i] = torch.stack(rows, axis)
    return found


def _exchanged(
    leaves: Sequence[Any], grown: Sequence[tuple[int, int]], n: int
) -> Iterator[list[Any]]:
    """The arguments with samples in another order; once for each way that they may be folded."""
    ways = [_folds(leaves[i].shape[axis], n) for i, axis in grown]
    for k in range(max(map(len, ways)) if all(ways) else 0):
        others = list(leaves)
        for (i, axis), own in zip(grown, ways, strict=True):
            others[i] = _exchange(leaves[i], axis, n, own[k % len(own)])
        yield others


class _Alike:
    """Whether results of samples in two orders are the same but for the order."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, first: Any, second: Any, before: Shape | None) -> bool:
        if not isinstance(first, Tensor) or tuple(first.shape) == before:
            return True  # made of all samples: that is noted elsewhere
        axis = _axis(first, before)
        if axis is None:
            return True
        if first.shape != second.shape:
            return False
        folds = _folds(first.shape[axis], self.n)
        return any(_close(_exchange(first, axis, self.n, fold), second) for fold in folds)


def _close(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):  # mostly, at a tenth of the cost
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    tolerance = max(1e-3, 8 * torch.finfo(a.dtype).eps)
    return torch.allclose(a, b, rtol=tolerance, atol=1e-5, equal_nan=True)
