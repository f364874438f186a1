"""Samples or rows in an order that their values decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from every_quantity import Case, assert_right_or_refused
from problems import weights
from torch import Generator, Tensor

import ghostfunc as gf

Order = Callable[[Tensor], Any]

REFUSALS = (gf.SampleAxisError, gf.ControlFlowError, gf.CoupledSamplesError)


def ragged(n: int, t: int, seed: int = 0, *, ordered: bool = False) -> dict[str, Tensor]:
    generator = Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (n,), generator=generator)
    lengths[0], lengths[-1] = t, 1
    if ordered:
        lengths = lengths.sort()[0]
    return {
        "x": torch.randn(n, t, 4, generator=generator, dtype=torch.float64),
        "lengths": lengths,
    }


def masked_energy(y: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.arange(y.shape[1]) < lengths[:, None]
    return ((y - 1).square().sum(-1) * mask).sum(1)


def by_numpy(lengths: Tensor) -> Any:
    return torch.from_numpy(np.argsort(np.asarray(lengths), kind="stable"))


def by_numpy_elsewhere(lengths: Tensor) -> Any:
    return np.argsort(lengths.detach().cpu().numpy() + 0.1 * np.arange(len(lengths))).tolist()


def by_python(lengths: Tensor) -> Any:
    return sorted(range(len(lengths)), key=lambda i: (int(lengths[i]), i))


def by_items(lengths: Tensor) -> Any:
    order = list(range(len(lengths)))
    for _ in order:
        for i in range(len(order) - 1):
            if lengths[order[i]] > lengths[order[i + 1]]:
                order[i], order[i + 1] = order[i + 1], order[i]
    return order


def by_search(lengths: Tensor) -> Any:
    keys = lengths.double() + 0.01 * torch.arange(len(lengths))
    rank = (keys[:, None] > keys).sum(1)
    return torch.zeros_like(rank).index_add(0, rank, torch.arange(len(rank)))


def by_counting(lengths: Tensor) -> Any:
    """Counting sort: places from `bincount` and `cumsum`."""
    starts = torch.bincount(lengths).cumsum(0) - torch.bincount(lengths)
    order = torch.empty_like(lengths)
    for i, length in enumerate(lengths):
        order[starts[length]] = i
        starts[length] += 1
    return order


def by_kthvalue(lengths: Tensor) -> Any:
    keys = lengths.double() + 0.01 * torch.arange(len(lengths))
    return torch.stack([keys.kthvalue(k + 1)[1] for k in range(len(keys))])


def by_sort(lengths: Tensor) -> Any:
    return lengths.sort(stable=True)[1]


ORDERS: list[Order] = [
    by_numpy, by_numpy_elsewhere, by_python, by_items, by_search, by_counting, by_kthvalue, by_sort,
]  # fmt: skip


@pytest.mark.parametrize("order_of", ORDERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("ordered_first", [True, False], ids=["ordered first", "in disorder"])
def test_samples(order_of: Order, ordered_first: bool) -> None:
    def model(p: Any, batch: Any) -> Tensor:
        x, lengths = batch["x"], batch["lengths"]
        order = torch.as_tensor(order_of(lengths))
        y = torch.tanh(x.index_select(0, order) @ p["w"])
        back = torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))
        return masked_energy(y.index_select(0, back), lengths)

    params = weights(w=(4, 7))
    first = [ragged(3, 3, ordered=True)] if ordered_first else []
    case = Case(model, params, ragged(5, 3, 1), ragged(3, 4, 2), first=first)
    assert_right_or_refused(case, *REFUSALS)


def by_matrix(p: Any, batch: Any) -> Tensor:
    """A permutation matrix: no index at all."""
    x, lengths = batch["x"], batch["lengths"]
    keys = lengths.double() + 0.01 * torch.arange(len(lengths))
    rank = (keys[:, None] > keys).sum(1)
    matrix = F.one_hot(rank, len(x)).to(x).t()
    y = torch.tanh((matrix @ x.flatten(1)).view_as(x) @ p["w"])
    return masked_energy((matrix.t() @ y.flatten(1)).view_as(y), lengths)


def packed_by_cumsum(p: Any, batch: Any) -> Tensor:
    """Dispatch by capacity: a row's place is how many came before it."""
    x, lengths = batch["x"], batch["lengths"]
    mask = (torch.arange(x.shape[1]) < lengths[:, None]).flatten()
    places = mask.cumsum(0) - 1
    rows = x.flatten(0, 1) * mask[:, None]
    buffer = torch.zeros_like(rows).index_add(0, places.clamp_min(0), rows)
    y = torch.tanh(buffer @ p["w"]).index_select(0, places.clamp_min(0))
    return masked_energy(y.unflatten(0, x.shape[:2]), lengths)


def dispatched_to_experts(p: Any, batch: Any) -> Tensor:
    """Two experts with room for every row; rows are numbered by `cumsum` of one-hot choices."""
    x, lengths = batch["x"], batch["lengths"]
    rows = x.flatten(0, 1)
    choice = F.one_hot((rows.sum(-1) > 0).long(), 2)
    places = (choice.cumsum(0) - 1).gather(1, choice.argmax(1, keepdim=True)).flatten()
    at = choice.argmax(1) * len(rows) + places
    buffer = rows.new_zeros(2 * len(rows), 4).index_add(0, at, rows).unflatten(0, (2, -1))
    y = torch.bmm(buffer, p["experts"]).flatten(0, 1).index_select(0, at)
    return masked_energy(torch.tanh(y).unflatten(0, x.shape[:2]), lengths)


def scattered(p: Any, batch: Any) -> Tensor:
    """Rows that count are moved to the front by `scatter`, in an order `gather` undoes."""
    x, lengths = batch["x"], batch["lengths"]
    rank = lengths.argsort(stable=True).argsort()[:, None, None].expand_as(x)
    y = torch.tanh(torch.zeros_like(x).scatter(0, rank, x) @ p["w"])
    return masked_energy(y.gather(0, rank[..., :1].expand_as(y)), lengths)


def by_scalar_loop(p: Any, batch: Any) -> Tensor:
    """Samples are split in two groups by a number that `item` reads."""
    x, lengths = batch["x"], batch["lengths"]
    short = [i for i in range(len(x)) if lengths[i].item() < 3]
    order = short + [i for i in range(len(x)) if i not in short]
    y = torch.tanh(torch.cat([x[i : i + 1] for i in order]) @ p["w"])
    return masked_energy(torch.stack([y[order.index(i)] for i in range(len(x))]), lengths)


@pytest.mark.parametrize(
    "model",
    [by_matrix, packed_by_cumsum, dispatched_to_experts, scattered, by_scalar_loop],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("ordered_first", [True, False], ids=["ordered first", "in disorder"])
def test_rows(model: Callable[[Any, Any], Tensor], ordered_first: bool) -> None:
    params = weights(w=(4, 7), experts=(2, 4, 6))
    first = ragged(3, 3, ordered=True)
    first["lengths"] = torch.full_like(first["lengths"], 3)
    asked_first = [first] if ordered_first else []
    case = Case(model, params, ragged(5, 3, 1), ragged(3, 4, 2), first=asked_first)
    assert_right_or_refused(case, *REFUSALS)


def test_the_same_shapes_in_another_order() -> None:
    """What was proved of one batch does not hold for the next one of its shapes."""

    def model(p: Any, batch: Any) -> Tensor:
        x, lengths = batch["x"], batch["lengths"]
        order = by_numpy(lengths)
        y = torch.tanh(x[order] * p["s"])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return masked_energy(y[back], lengths)

    ordered = ragged(4, 3, ordered=True)
    for seed in range(3):
        case = Case(model, weights(s=(4,)), ragged(4, 3, seed), ordered, first=[ordered])
        assert_right_or_refused(case, *REFUSALS)


@pytest.mark.parametrize("multiple", [1.0001, 2.0, 0.5, 4.0, 0.25, 8.0, 1 / 8])
def test_samples_that_are_alike_and_exchanged(multiple: float) -> None:
    """Gradients that differ by less than the tolerance of float32, or that are multiples of each
    other, do not hide whose they are."""

    def model_fn(p: Any, b: Any) -> Tensor:
        order = by_search(b["lengths"])
        y = (b["x"] @ p["w"]).index_select(0, order)
        y = torch.where(y > 0, p["c"], y).index_select(0, order.argsort())
        return b["weights"] * (y - 1).square().flatten(1).mean(1)

    generator = Generator().manual_seed(0)
    params = {k: torch.randn(*s, generator=generator) for k, s in (("w", (4, 6)), ("c", (6,)))}
    x = torch.randn(5, 2, 4, generator=generator)
    x[4] = x[3]
    batch = {"x": x, "weights": torch.tensor([1, 1, 1, 1, multiple])}
    batch["lengths"] = torch.ones(5, dtype=torch.long)
    assert gf.ghost_norm(model_fn, params, batch).shape == (5,)
    batch["lengths"] = torch.tensor([1, 1, 1, 2, 1])
    with pytest.raises(REFUSALS):
        gf.ghost_norm(model_fn, params, batch)
