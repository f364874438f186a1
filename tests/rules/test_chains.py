"""Tensors derived from parameters along many ways: residual chains, products of reflections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_close, gram, sample_grads
from problems import Problem, energy, features, weights
from torch import Tensor

import ghostfunc as gf
from ghostfunc._trace.tracked import Tracked

QUANTITIES = ("norm", "gram", "mean", "none", "kept", "project", "clipped")


def residual(p: Any, x: Tensor, *, ops: int) -> Tensor:
    w = p["w"]
    for _ in range(ops):
        w = w + 0.1 * w.tanh()
    return energy(x @ w)


def reflected(p: Any, x: Tensor, *, ops: int) -> Tensor:
    """A product of Householder reflections, as PEFT's HRA makes it."""
    w = p["w"]
    for i in range(ops):
        u = p["u"][i % len(p["u"])]
        w = w - 2 * torch.outer(w @ u, u) / (u @ u)
    return energy(x @ w)


def turned(p: Any, x: Tensor, *, ops: int) -> Tensor:
    w = p["w"]
    for _ in range(ops):
        w = (w + w.t().clone()).t() * 0.5
    return energy(x @ w)


def used_on_the_way(p: Any, x: Tensor, *, ops: int) -> Tensor:
    w, out = p["w"], x
    for _ in range(ops):
        w = w + 0.1 * w.tanh()
        out = torch.tanh(out @ w)
    return energy(out)


CHAINS: list[Callable[..., Tensor]] = [residual, reflected, turned, used_on_the_way]
chains = pytest.mark.parametrize("chain", CHAINS, ids=lambda f: f.__name__)


def problem_of(chain: Callable[..., Tensor], ops: int) -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return chain(p, x, ops=ops)

    shapes = {"w": (4, 4), "u": (3, 4)} if chain is reflected else {"w": (4, 4)}
    return Problem(model_fn, weights(**shapes), features(4))


def ask(problem: Problem, what: str, train: Any, val: Any) -> Any:
    model_fn, params = problem.model_fn, problem.params
    match what:
        case "norm":
            return gf.ghost_norm(model_fn, params, train)
        case "gram":
            return gf.ghost_gram(model_fn, params, train, val)
        case "kept":
            kept = gf.factored_grads(model_fn, params, val)
            return gf.ghost_dot_prod(model_fn, params, train, direction=kept, reduction="none")
        case "project":
            return gf.ghost_project(model_fn, params, train, projection_of(params))
        case "clipped":
            return gf.ghost_clipped_grad(model_fn, params, train, max_norm=1.0).grads
        case _:
            return gf.ghost_dot_prod(model_fn, params, train, val, reduction=what)


def projection_of(params: Any) -> Any:
    return gf.kronecker_projection(params, rank_total=4, rank_min=2, kind="gaussian", seed=0)


def expected(problem: Problem, what: str, train: Any, val: Any) -> Any:
    g, v = sample_grads(problem, train), sample_grads(problem, val)
    norms = sum(x.flatten(1).square().sum(1) for x in g).sqrt()
    tree = dict(zip(sorted(problem.params), g, strict=True))
    clip = (1 / norms).clamp(max=1)
    return {
        "norm": norms,
        "mean": sum(gram(g, v)).mean(1),
        "project": projection_of(problem.params).apply(tree),
        "clipped": {k: torch.einsum("n,n...->...", clip, x) for k, x in tree.items()},
    }.get(what, sum(gram(g, v)))


@chains
def test_every_quantity_is_right(chain: Callable[..., Tensor]) -> None:
    problem = problem_of(chain, 3)
    train, val = problem.batch(9), problem.batch(2, seed=1)
    for what in QUANTITIES:
        want = expected(problem, what, train, val)
        assert_close(ask(problem, what, train, val), want, problem.tolerance)


@chains
@pytest.mark.parametrize("what", QUANTITIES)
def test_work_is_linear_in_ops(
    chain: Callable[..., Tensor], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor on `2^k` ways to the parameter is pulled back as often as one on a single way."""
    pulled: list[str] = []
    pull = Tracked.pulled

    def counted(self: Tracked, factors: Any) -> Any:
        pulled.append(self.name)
        return pull(self, factors)

    def count(ops: int) -> int:
        problem = problem_of(chain, ops)
        train, val = problem.batch(3), problem.batch(2, seed=1)
        ask(problem, what, train, val)
        pulled.clear()
        ask(problem, what, train, val)
        return len(pulled)

    monkeypatch.setattr(Tracked, "pulled", counted)
    few, more = count(3), count(6)
    again = chain is used_on_the_way and what in ("none", "project")  # for every use
    assert more <= (4 if again else 2) * few + 6
    assert max(map(len, pulled), default=0) <= 80
