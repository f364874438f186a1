"""Ways through a program that depend on the number of samples: traced with as many as go that
way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import ESSENTIAL, Case, assert_refused, assert_right
from torch import Tensor

import ghostfunc as gf

CONDITIONS: dict[str, Callable[[int, int], bool]] = {
    "many": lambda n, t: n > 3,
    "even": lambda n, t: n % 2 == 0,
    "fours": lambda n, t: n % 4 == 0,
    "odd and many": lambda n, t: n % 2 == 1 and n > 2,
}


def by_number(takes: Callable[[int, int], bool]) -> Callable[..., Tensor]:
    """One layer, on positions first and folded for some numbers of samples."""

    def model(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        n, t = x.shape[:2]
        if takes(n, t):
            rows = torch.addmm(p["b"], x.transpose(0, 1).reshape(t * n, -1), p["w"])
            h = rows.view(t, n, -1).transpose(0, 1)
        else:
            h = F.linear(x, p["w"].t(), p["b"])
        return (h.tanh() - 1).square().flatten(1).mean(1)

    return model


def case(takes: Callable[[int, int], bool], n: int, t: int) -> Case:
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = {"w": draw(4, 6), "b": draw(6)}
    return Case(by_number(takes), params, {"x": draw(n, t, 4)}, {"x": draw(2, t, 4)})


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_numbers_of_samples_that_go_their_own_way(kind: str, n: int) -> None:
    few = ESSENTIAL if n == 4 else ("dots", "norms")
    assert_right(case(CONDITIONS[kind], n, 4), few)


@pytest.mark.parametrize("n", [17, 20])
def test_more_samples_than_are_traced(n: int) -> None:
    assert_right(case(CONDITIONS["fours"], n, 3), ("dots", "norms"))


def test_one_number_alone_cannot_be_traced() -> None:
    """Nothing grows where no other number of samples goes that way."""
    assert_refused(case(lambda n, t: n == 5, 5, 2), gf.ControlFlowError, ("norms", "clipped_sums"))


def test_a_model_that_takes_even_numbers_alone() -> None:
    """Errors of the model's own, for numbers of samples that are tried, are no errors of a call."""

    def model(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        n = len(batch["x"])
        if n > 6:
            raise ValueError("too many")
        return by_number(CONDITIONS["many"])(p, batch)

    one = case(CONDITIONS["many"], 4, 2)
    one.model_fn = model
    assert_right(one, ("norms", "gram_with_others"))


def test_verify_compares_what_a_call_returns() -> None:
    """A call looks for another trace where the one at hand fits by shapes alone, and so does
    `verify`."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        where = int(x.shape[1] > 3)
        y = (p["w"].t() @ x.movedim(0, where).mT).mT.movedim(where, 0)
        return (y - 1).square().flatten(1).mean(1)

    params = {"w": torch.randn(4, 4, dtype=torch.float64)}
    for train, val in (((1, 1), (3, 1)), ((4, 4), (3, 2))):
        batches = (torch.randn(*shape, 4, dtype=torch.float64) for shape in (train, val))
        report = gf.verify(model_fn, params, *batches)
        assert report.ok, str(report)
