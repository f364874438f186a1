"""Ways through the program that the trace did not go.

A call on one batch teaches the library a way; the batch of the case goes another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_quantity import Case, assert_right, assert_right_or_refused
from problems import energy, weights
from torch import Generator, Tensor

import ghostfunc as gf

Model = Callable[[Any, Any], Tensor]

REFUSALS = (gf.SampleAxisError, gf.ControlFlowError, gf.CoupledSamplesError)
"""What may be said where rows cannot be told apart by sample."""


def ragged(n: int, t: int, *, full: bool = False) -> dict[str, Tensor]:
    """Samples with `lengths` between 1 and t, or all of length t."""
    generator = Generator().manual_seed(10 * n + t)
    x = torch.randn(n, t, 4, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, t + 1, (n,), generator=generator)
    lengths[0] = t
    if full:
        lengths[:] = t
    return {"x": x, "mask": torch.arange(t) < lengths[:, None], "lengths": lengths}


def sorted_when_large(p: Any, batch: Any) -> Tensor:
    x, lengths = batch["x"], batch["lengths"]
    if len(x) <= 4:
        return energy(torch.tanh(x @ p["w"]))
    order = lengths.argsort(stable=True)
    y = torch.tanh(x[order] @ p["w"])
    return energy(y[order.argsort()])


def flipped_when_large(p: Any, batch: Any) -> Tensor:
    x = batch["x"]
    if len(x) <= 4:
        return energy(torch.tanh(x @ p["w"]))
    return energy(torch.tanh(x.flip(0) @ p["w"]).flip(0))


def halves_exchanged_when_large(p: Any, batch: Any) -> Tensor:
    x = batch["x"]
    if len(x) <= 4:
        return energy(torch.tanh(x * p["s"]))
    y = torch.cat([x[3:], x[:3]]) * p["s"]
    return energy(torch.tanh(torch.cat([y[-3:], y[:-3]])))


def longest_first(p: Any, batch: Any) -> Tensor:
    """A Python list decides the order: no torch op does."""
    x = batch["x"]
    keys = batch["lengths"].tolist()
    order = sorted(range(len(x)), key=lambda i: -keys[i])
    if order == list(range(len(x))):
        return energy(torch.tanh(x @ p["w"]))
    y = torch.tanh(torch.stack([x[i] for i in order]) @ p["w"])
    return energy(torch.stack([y[order.index(i)] for i in range(len(x))]))


@pytest.mark.parametrize(
    "model",
    [sorted_when_large, flipped_when_large, halves_exchanged_when_large, longest_first],
    ids=lambda f: f.__name__,
)
def test_reordered_in_large_batches(model: Model) -> None:
    first = ragged(3, 3, full=True)
    params = weights(w=(4, 5), s=(4,))
    case = Case(model, params, ragged(6, 3), ragged(2, 3, full=True), first=[first])
    assert_right_or_refused(case, *REFUSALS)


def unpadded_by_mask(p: Any, batch: Any) -> Tensor:
    x, mask = batch["x"], batch["mask"]
    if mask.all():
        y = x @ p["w"]
    else:
        y = x.new_zeros(*x.shape[:2], p["w"].shape[1])
        y[mask] = x[mask] @ p["w"]
    return ((y - 1).square().sum(-1) * mask).sum(1)


def unpadded_by_index(p: Any, batch: Any) -> Tensor:
    x, mask = batch["x"], batch["mask"]
    if bool(mask.all()):
        y = torch.tanh(x.flatten(0, 1) @ p["w"]).unflatten(0, x.shape[:2])
    else:
        at = mask.flatten().nonzero().flatten()
        rows = torch.tanh(x.flatten(0, 1)[at] @ p["w"])
        y = rows.new_zeros(mask.numel(), rows.shape[1]).index_copy(0, at, rows)
        y = y.unflatten(0, x.shape[:2])
    return ((y - 1).square().sum(-1) * mask).sum(1)


def scaled_without_padding(p: Any, batch: Any) -> Tensor:
    x, mask = batch["x"], batch["mask"]
    if mask.all():
        y = x * p["s"]
    else:
        y = torch.zeros_like(x)
        y[mask] = x[mask] * p["s"]
    return ((y - 1).square().sum(-1) * mask).sum(1)


@pytest.mark.parametrize(
    "model",
    [unpadded_by_mask, unpadded_by_index, scaled_without_padding],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("lengths", [[3, 1, 0, 0], [1, 1, 2, 0], [0, 4, 3, 1], [2, 2, 2, 2]])
def test_unpadded(model: Model, lengths: list[int]) -> None:
    """As many rows are left as there are samples, or twice as many."""
    train = ragged(4, 4)
    train["mask"] = torch.arange(4) < torch.tensor(lengths)[:, None]
    first, val = ragged(4, 4, full=True), ragged(2, 3, full=True)
    case = Case(model, weights(w=(4, 5), s=(4,)), train, val, first=[first])
    assert_right_or_refused(case, *REFUSALS, gf.UnsupportedOpError)


def in_order(n: int, t: int) -> dict[str, Tensor]:
    """Samples that a sort by length leaves where they are."""
    batch = ragged(n, t)
    lengths, order = batch["lengths"].sort(stable=True)
    return {"x": batch["x"][order], "mask": batch["mask"][order], "lengths": lengths}


def picked_when_large(p: Any, batch: Any) -> Tensor:
    """Ranks by comparison: no sort, and no index of a bool."""
    x, lengths = batch["x"], batch["lengths"]
    if len(x) <= 4:
        return energy(torch.tanh(x @ p["w"]))
    keys = lengths + torch.arange(len(x)) / (len(x) + 1)
    back = (keys[:, None] > keys).sum(1)
    order = torch.zeros_like(back).index_add(0, back, torch.arange(len(x)))
    return energy(torch.tanh(x[order] @ p["w"])[back])


@pytest.mark.parametrize("model", [sorted_when_large, picked_when_large], ids=lambda f: f.__name__)
def test_the_same_way_with_other_values(model: Model) -> None:
    """A way that no trace went was proved on samples in order; the next ones are in disorder."""
    first = [ragged(3, 3, full=True), in_order(6, 3)]
    params = weights(w=(4, 5), s=(4,))
    case = Case(model, params, ragged(6, 3), ragged(2, 3, full=True), first=first)
    assert_right_or_refused(case, *REFUSALS)


def test_the_same_rows_of_other_samples() -> None:
    """Two rows of two samples: one each, then both of the first."""
    one_each, both = ragged(2, 4), ragged(2, 4)
    one_each["mask"] = torch.arange(4) < torch.tensor([1, 1])[:, None]
    both["mask"] = torch.arange(4) < torch.tensor([2, 0])[:, None]
    first = [ragged(3, 4, full=True), one_each]
    case = Case(unpadded_by_mask, weights(w=(4, 5)), both, ragged(2, 3, full=True), first=first)
    assert_right_or_refused(case, *REFUSALS)


def by_length(combine: Callable[[Any, Tensor], Tensor]) -> Model:
    """Short samples batch-first, long ones time-first."""

    def model(p: Any, x: Tensor) -> Tensor:
        if x.shape[1] <= 3:
            return energy(torch.tanh(combine(p, x)))
        return energy(torch.tanh(combine(p, x.transpose(0, 1)).transpose(0, 1)))

    return model


def by_flip(combine: Callable[[Any, Tensor], Tensor]) -> Model:
    """Long samples upside down."""

    def model(p: Any, x: Tensor) -> Tensor:
        if x.shape[1] <= 3:
            return energy(torch.tanh(combine(p, x)))
        return energy(torch.tanh(combine(p, x.flip(0)).flip(0)))

    return model


COMBINE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "product": lambda p, x: x @ p["w"],
    "scale": lambda p, x: x * p["s"],
    "bias": lambda p, x: x + p["s"],
    "where": lambda p, x: torch.where(x > 0, p["s"], x),
    "power": lambda p, x: torch.addcmul(x, p["s"], x.sin()),
    "maximum": lambda p, x: torch.maximum(x, p["s"]) - torch.lerp(x, p["s"], 0.3),
}


@pytest.mark.parametrize("way", [by_length, by_flip], ids=lambda f: f.__name__)
@pytest.mark.parametrize("combine", COMBINE.values(), ids=COMBINE)
def test_axes_by_length(
    way: Callable[[Any], Model], combine: Callable[[Any, Tensor], Tensor]
) -> None:
    def draw(n: int, t: int) -> Tensor:
        generator = Generator().manual_seed(n + t)
        return torch.randn(n, t, 4, generator=generator, dtype=torch.float64)

    params = weights(w=(4, 5), s=(4,))
    case = Case(way(combine), params, draw(4, 4), draw(2, 2), first=[draw(3, 2)])
    if way is by_length:
        assert_right(case)
    else:
        assert_right_or_refused(case, *REFUSALS)


def test_the_same_ops_told_another_axis() -> None:
    """Positions are permuted in small batches, and samples in large ones, by the same ops."""

    def model(p: Any, batch: Any) -> Tensor:
        x, lengths = batch["x"], batch["lengths"]
        axis, keys = (1, torch.arange(x.shape[1])) if len(x) <= 4 else (0, lengths)
        order = keys.argsort(stable=True)
        y = torch.tanh(x.index_select(axis, order) @ p["w"])
        return energy(y.index_select(axis, order.argsort()))

    first = [ragged(3, 3), in_order(6, 3)]
    case = Case(model, weights(w=(4, 5)), ragged(6, 3), ragged(2, 3), first=first)
    assert_right_or_refused(case, *REFUSALS)
