"""Parameters through residual chains: work is linear in the number of ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_quantity import Case, assert_right
from problems import energy, features, weights
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ghostfunc as gf

Chain = Callable[[Tensor], Tensor]


def residual(w: Tensor) -> Tensor:
    return w + 0.1 * torch.tanh(w)


def reflected(w: Tensor) -> Tensor:
    """A Householder reflection, as PEFT's HRA stacks them."""
    u = w[:, :1]
    return w - 0.1 * u @ (u.t() @ w)


def cayley(w: Tensor) -> Tensor:
    """A power series, as OFT approximates the Cayley transform with."""
    return w + 0.1 * w @ w


MOST = 10_000
"""Ops of a call on a chain of five steps; the longest needs half of that, proofs included."""

STEPS: list[Chain] = [residual, reflected, cayley]


def chained(step: Chain, times: int) -> Callable[[Any, Tensor], Tensor]:
    def model(p: Any, x: Tensor) -> Tensor:
        w = p["w"]
        for _ in range(times):
            w = step(w)
        return energy(x @ w)

    return model


def case_of(model: Callable[[Any, Tensor], Tensor]) -> Case:
    draw = features(4)
    batches = (draw(n, 1, Generator().manual_seed(n)) for n in (3, 2))
    return Case(model, weights(w=(4, 4)), *batches)


class Calls(TorchDispatchMode):
    """Counts ops, and gives up where there are far too many."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        assert self.count < MOST, "work is not linear"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_short_chains_are_right(step: Chain) -> None:
    assert_right(case_of(chained(step, 1)))


def test_a_longer_chain_is_right() -> None:
    assert_right(case_of(chained(residual, 3)))


ASKS: dict[str, Callable[[Case], Any]] = {
    "norm": lambda c: c.of(gf.ghost_norm),
    "gram": lambda c: c.of(gf.ghost_gram),
    "gram with others": lambda c: c.of(gf.ghost_gram, c.val),
    "pairs": lambda c: c.of(gf.ghost_dot_prod, c.val, reduction="none"),
    "mean": lambda c: c.of(gf.ghost_dot_prod, c.val),
    "direction": lambda c: c.of(gf.ghost_dot_prod, direction=c.u),
    "kept": lambda c: c.of(gf.factored_grads),
    "clipped": lambda c: c.of(gf.ghost_clipped_grad, max_norm=1.0),
    "positions": lambda c: gf.explain(c.model_fn, c.params, c.train, c.val),
}


def calls(step: Chain, times: int, ask: Callable[[Case], Any]) -> int:
    """Ops of a warm call."""
    case = case_of(chained(step, times))
    with Calls():
        ask(case)
    with Calls() as counted:
        ask(case)
    return counted.count


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_work_is_linear(step: Chain, ask: Callable[[Case], Any]) -> None:
    """Twice as many steps again cost as much more as the steps before: no path is walked twice."""
    one, two, four = (calls(step, times, ask) for times in (1, 3, 5))
    assert four - two <= 1.5 * (two - one) + 8, (one, two, four)
