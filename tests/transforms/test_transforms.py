"""Inside torch.func transforms, and in two threads at once: the same numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import optree
import pytest
import torch
from compare import assert_close, gram, leaves_of, random_direction, sample_grads
from problems import CASES, Problem
from torch.nn.attention import SDPBackend, sdpa_kernel

import ghostfunc as gf

NESTED = [
    "mlp",
    "tied_lm",
    "nanogpt",
    "layer_called_three_times",
    "time_first",
    "packed_projection",
    "in_place_arithmetic",
    "lora",
    "nested_params",
]


@pytest.fixture(params=NESTED)
def nested(request: pytest.FixtureRequest) -> Iterator[Problem]:
    with sdpa_kernel(SDPBackend.MATH):  # the only attention torch can differentiate further
        yield CASES[request.param]()


def scores(problem: Problem, batch: Any, u: Any) -> torch.Tensor:
    return gf.ghost_dot_prod(problem.model_fn, problem.params, batch, direction=u)


def dots(problem: Problem, batch: Any, u: Any) -> torch.Tensor:
    values = gf.ghost_vjp(problem.model_fn, problem.params, batch, gf.Dot(u)).values
    return sum(leaves_of(values))


ways = pytest.mark.parametrize("way", [scores, dots])


@ways
def test_vmap_over_directions(nested: Problem, way: Any) -> None:
    batch = nested.batch(3)
    directions = [random_direction(nested.params, seed) for seed in range(5)]
    stacked = optree.tree_map(lambda *u: torch.stack(u), *directions)
    rows = torch.vmap(lambda u: way(nested, batch, u))(stacked)
    pairs = gram(sample_grads(nested, batch), leaves_of(stacked))
    assert_close(rows, sum(pairs).mT, 1e-10)


@ways
def test_jvp_along_u(nested: Problem, way: Any) -> None:
    batch = nested.batch(3)
    u, v = random_direction(nested.params, 0), random_direction(nested.params, 1)
    value, tangent = torch.func.jvp(lambda u: way(nested, batch, u), (u,), (v,))
    grads = sample_grads(nested, batch)
    for got, direction in ((value, u), (tangent, v)):
        pairs = gram(grads, [x[None] for x in leaves_of(direction)])
        assert_close(got, sum(pairs)[:, 0], 1e-10)


@ways
def test_grad_in_u(nested: Problem, way: Any) -> None:
    """`d <g_i, u> / du = g_i`."""
    batch, u = nested.batch(3), random_direction(nested.params)
    grads = sample_grads(nested, batch)
    total = torch.func.grad(lambda u: way(nested, batch, u).sum())(u)
    assert_close(total, [g.sum(0) for g in grads], 1e-10)
    (last,) = torch.func.vjp(lambda u: way(nested, batch, u), u)[1](
        torch.tensor([0.0, 0, 1]).double()
    )
    assert_close(last, [g[2] for g in grads], 1e-10)


def test_jacobian_in_u_is_the_per_sample_gradient(nested: Problem) -> None:
    batch, u = nested.batch(3), random_direction(nested.params)
    jacobian = torch.func.jacrev(lambda u: scores(nested, batch, u))(u)
    assert_close(jacobian, sample_grads(nested, batch), 1e-10)


def curvature(problem: Problem, batch: Any, u: Any) -> Any:
    """`d <sum_i g_i, u> / d params = H u`, of plain torch.

    Twice in reverse: the derivative of `layer_norm`'s forward-mode derivative is wrong in torch.
    """

    def along_u(params: Any) -> torch.Tensor:
        grads = torch.func.grad(lambda p: problem.model_fn(p, batch).sum())(params)
        return sum((g * x).sum() for g, x in zip(leaves_of(grads), leaves_of(u), strict=True))

    return torch.func.grad(along_u)(problem.params)


@pytest.mark.parametrize("case", ["mlp", "tied_lm", "layer_called_twice", "lora"])
def test_grad_in_params_is_the_hessian_times_u(case: str) -> None:
    problem = CASES[case]()
    batch, u = problem.batch(3), random_direction(problem.params)
    hvp = torch.func.grad(
        lambda p: gf.ghost_dot_prod(problem.model_fn, p, batch, direction=u).sum()
    )(problem.params)
    assert_close(hvp, curvature(problem, batch, u), 1e-10)


@pytest.mark.parametrize("case", ["mlp", "tied_lm", "packed_projection"])
def test_vmap_over_an_ensemble_is_refused(case: str) -> None:
    problem = CASES[case]()
    train, val = problem.batch(3), problem.batch(2, seed=1)
    members = [optree.tree_map(lambda x, c=c: c * x, problem.params) for c in (0.5, 1.0, 2.0)]
    stacked = optree.tree_map(lambda *x: torch.stack(x), *members)
    with pytest.raises(gf.TransformError, match="loop over an ensemble"):
        torch.vmap(lambda p: gf.ghost_dot_prod(problem.model_fn, p, train, val))(stacked)


@pytest.mark.parametrize("warm", [False, True], ids=["new", "warm"])
@pytest.mark.parametrize("mode", ["ghost", "jvp", "materialized"])
def test_vmap_over_batches_is_refused(mode: Any, warm: bool) -> None:
    problem = CASES["mlp"]()
    train, other = problem.batch(3), problem.batch(3, seed=1)
    both = optree.tree_map(lambda *x: torch.stack(x), train, other)

    def dots(batch: Any) -> torch.Tensor:
        return gf.ghost_dot_prod(problem.model_fn, problem.params, batch, train, mode=mode)

    def norms(batch: Any, params: Any = problem.params) -> torch.Tensor:
        return gf.ghost_norm(problem.model_fn, params, batch, mode=mode)

    def inside_grad(batch: Any) -> Any:
        return torch.func.grad(lambda p: norms(batch, p).sum())(problem.params)

    if warm:  # the trace of an earlier call fits
        dots(train)
    for ask in (dots,) if mode == "jvp" else (dots, norms, inside_grad):
        with pytest.raises(gf.TransformError, match="loop over an ensemble"):
            torch.vmap(ask)(both)


# --- threads ----------------------------------------------------------------------------------


def at_once(*jobs: Any) -> list[Any]:
    """Run jobs in a thread each, all starting at the same moment."""
    barrier = Barrier(len(jobs))

    def start(job: Any) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(start, job) for job in jobs]]


def many(problem: Problem, seed: int) -> list[torch.Tensor]:
    """Scores of many batches of different shapes, so that traces are made and reused."""
    out = []
    for i in range(20):
        train = problem.batch(2 + i % 3, 3 + i % 4, seed + i)
        val = problem.batch(1 + i % 2, 4, seed - i)
        step = gf.ghost_value_and_grad(problem.model_fn, problem.params, train, val)
        out += [step.losses, step.dot_prods, *leaves_of(step.grads)]
    return out


def test_threads_with_different_models() -> None:
    names = ["nanogpt", "time_first", "packed_projection"]
    # Models are built beforehand: torch's global random numbers are no matter of ours.
    alone, together = ([CASES[name]() for name in names] for _ in range(2))
    expected = [many(problem, seed) for seed, problem in enumerate(alone)]
    jobs = [functools.partial(many, problem, seed) for seed, problem in enumerate(together)]
    assert_close(at_once(*jobs), expected, 1e-12)


def test_threads_with_one_pure_function() -> None:
    """What is learnt of a function is shared; nothing of a running call is."""
    alone, shared = CASES["folded_time_major"](), CASES["folded_time_major"]()
    expected = [many(alone, seed) for seed in range(3)]
    got = at_once(*[functools.partial(many, shared, seed) for seed in range(3)])
    assert_close(got, expected, 1e-12)
