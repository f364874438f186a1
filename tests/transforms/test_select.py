"""Scores to indices and weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostfunc import OptionError, select


def vectors(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_top_k() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert select.top_k(scores, 3).tolist() == [1, 3, 2]


def test_greats_by_its_definition() -> None:
    g, u, step = vectors(7, 4), vectors(1, 4, seed=1)[0], 0.2
    chosen: list[int] = []
    for _ in range(4):
        total = g[chosen].sum(0)
        gains = {i: float(g[i] @ u - step * g[i] @ total) for i in range(7) if i not in chosen}
        chosen.append(max(gains, key=lambda i: gains[i]))
    assert select.greats(g @ u, g @ g.mT, 4, step=step).tolist() == chosen


def test_greats_without_interaction_is_top_k() -> None:
    g, u = vectors(9, 4), vectors(1, 4, seed=1)[0]
    greats = select.greats(g @ u, g @ g.mT, 5, step=1e-12)
    assert greats.tolist() == select.top_k(g @ u, 5).tolist()


def test_greats_does_not_choose_a_sample_and_its_copy() -> None:
    g = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    u = torch.tensor([1.0, 1.0])
    assert select.top_k(g @ u, 2).tolist() == [0, 1]
    assert select.greats(g @ u, g @ g.mT, 2, step=1.0).tolist() == [0, 2]


def test_greats_lowers_a_quadratic_more_than_top_k() -> None:
    """On `|w|^2 / 2`, whose Hessian is the identity; on average, for the choice is greedy."""
    greats = top = 0.0
    for seed in range(30):
        g, u, step = vectors(8, 3, seed), vectors(1, 3, 100 + seed)[0], 0.3

        def after(chosen: Tensor, g: Tensor = g, u: Tensor = u, step: float = step) -> float:
            return float((u - step * g[chosen].sum(0)).square().sum())

        mine = after(select.greats(g @ u, g @ g.mT, 3, step=step))
        best = min(after(torch.tensor(c)) for c in itertools.combinations(range(8), 3))
        assert mine >= best - 1e-12
        greats += mine
        top += after(select.top_k(g @ u, 3))
    assert greats < 0.9 * top


def test_choices_are_different_and_all_can_be_chosen() -> None:
    g, u = vectors(6, 3), vectors(1, 3, seed=1)[0]
    for chosen in (
        select.greats(g @ u, g @ g.mT, 6, step=1.0),
        select.top_k(g @ u, 6),
        select.sample_k(g @ u, 6),
    ):
        assert sorted(chosen.tolist()) == list(range(6))


def test_sample_k_draws_from_the_softmax() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    first = [int(select.sample_k(scores, 2, generator=generator)[0]) for _ in range(4000)]
    frequency = torch.bincount(torch.tensor(first), minlength=3) / 4000
    torch.testing.assert_close(frequency.double(), torch.softmax(scores, 0), atol=0.03, rtol=0)
    cold = select.sample_k(scores, 2, temperature=1e-6, generator=generator)
    assert cold.tolist() == [2, 1]


def test_softmax_weights() -> None:
    scores = torch.tensor([0.0, 2.0])
    weights = select.softmax_weights(scores, temperature=2.0)
    torch.testing.assert_close(weights, torch.softmax(torch.tensor([0.0, 1.0]), 0))
    assert weights.sum() == pytest.approx(1.0)


def test_uniform_weights() -> None:
    weights = select.uniform_weights(torch.tensor([3, 1]), 4)
    assert weights.tolist() == [0.0, 0.5, 0.0, 0.5]


def test_reducible_loss() -> None:
    score = select.reducible_loss(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 2.0]))
    assert score.tolist() == [1.5, -1.0]


FINE = torch.tensor([1.0, 2.0, 3.0])
WRONG: list[tuple[Any, str]] = [
    (lambda: select.top_k(FINE, 0), "k=0: choose between 1 and all 3"),
    (lambda: select.top_k(FINE, 4), "k=4: choose between 1 and all 3"),
    (lambda: select.top_k(FINE[None], 1), r"shape \[n\]; got \(1, 3\)"),
    (lambda: select.top_k([1.0], 1), "got list"),
    (lambda: select.top_k(torch.tensor([1, 2]), 1), "int64"),
    (lambda: select.top_k(FINE / 0, 1), r"finite; they are not for samples \[0, 1, 2\]"),
    (lambda: select.greats(FINE, torch.eye(2), 1, step=1.0), r"shape \[3, 3\]"),
    (lambda: select.greats(FINE, torch.eye(3) / 0, 1, step=1.0), "finite"),
    (lambda: select.greats(FINE, torch.eye(3), 1, step=0.0), "step=0.0 must be a positive"),
    (lambda: select.sample_k(FINE, 1, temperature=-1.0), "temperature=-1.0 must be a positive"),
    (lambda: select.softmax_weights(FINE, temperature=0.0), "temperature=0.0"),
    (lambda: select.reducible_loss(FINE, FINE[:2]), "3 and 2"),
    (lambda: select.uniform_weights(torch.tensor([1, 1]), 3), "twice"),
    (lambda: select.uniform_weights(torch.tensor([3]), 3), "indices of 3 samples"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_cannot_be_chosen(call: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-8, 1e30, 1e300])
def test_temperatures_of_any_size(temperature: float, dtype: torch.dtype) -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, -3e4]).to(dtype)
    weights = select.softmax_weights(scores, temperature=temperature)
    cold, hot = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]), torch.full((5,), 0.2)
    torch.testing.assert_close(weights, (cold if temperature < 1 else hot).to(dtype))
    generator = torch.Generator().manual_seed(0)
    drawn = [
        select.sample_k(scores, 5, temperature=temperature, generator=generator).tolist()
        for _ in range(200)
    ]
    assert all(sorted(x) == list(range(5)) for x in drawn)
    if temperature < 1:
        assert all({*x[:2]} == {1, 3} and x[2:] == [2, 0, 4] for x in drawn)
    else:
        assert min(sum(x[0] == i for x in drawn) for i in range(5)) > 15
    largest = torch.tensor([3e38, -3e38, 0.0])
    assert select.softmax_weights(largest, temperature=0.1).tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_greats_chooses_no_sample_twice(dtype: torch.dtype) -> None:
    """What is taken off is as large as the dtype holds, and sums of it are larger."""
    largest = torch.finfo(dtype).max
    scores, gram = torch.tensor([3.0, 2.0, 1.0]).to(dtype), torch.full((3, 3), largest).to(dtype)
    assert select.greats(scores, gram, 3, step=10.0).tolist() == [0, 1, 2]
    with pytest.raises(OptionError, match="times gram is not finite"):
        select.greats(scores, gram, 3, step=1e308)
    for other in (gram.long(), gram.to(torch.complex64)):
        with pytest.raises(OptionError, match="gram must be a finite floating-point tensor"):
            select.greats(scores, other, 2, step=0.1)


def test_indices_of_bytes_are_no_mask() -> None:
    chosen = torch.tensor([0, 2], dtype=torch.uint8)
    assert select.uniform_weights(chosen, 3).tolist() == [0.5, 0, 0.5]
