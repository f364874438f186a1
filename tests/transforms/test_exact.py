"""Ghost, jvp and materialized numbers equal the definition, parameter by parameter."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close, gram, leaves_of, random_direction, sample_grads
from problems import Problem

import ghostfunc as gf

SHAPES = {
    # n, t, m, s: train samples and positions, validation samples and positions
    "T_is_n": (3, 3, 7, 5),
    "T_is_a_multiple_of_n": (2, 6, 3, 3),
    "one_sample": (1, 4, 1, 4),
    "many_against_one": (5, 2, 1, 8),
}

Shape = tuple[int, int, int, int]
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def reduced(pairs: list[torch.Tensor], reduction: str) -> list[torch.Tensor]:
    return {
        "none": pairs,
        "sum": [x.sum(1) for x in pairs],
        "mean": [x.mean(1) for x in pairs],
    }[reduction]


def modes_of(problem: Problem) -> list[str]:
    return ["ghost", "materialized"] + ["jvp"] * problem.forward_mode


@shapes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dot_products(problem: Problem, shape: Shape, reduction: str) -> None:
    n, t, m, s = shape
    train, val = problem.batch(n, t), problem.batch(m, s, seed=1)
    expected = reduced(gram(sample_grads(problem, train), sample_grads(problem, val)), reduction)
    for mode in modes_of(problem):
        dots = gf.ghost_dot_prod(
            problem.model_fn,
            problem.params,
            train,
            val,
            mode=mode,
            reduction=reduction,
            per_param=True,
        )
        assert_close(dots, expected, problem.tolerance)


def test_one_function_serves_all_shapes(problem: Problem) -> None:
    """What a call learns of a model must not mislead the next one."""
    for n, t, m, s in [*SHAPES.values(), (4, 4, 4, 4), (4, 12, 2, 4)]:
        train, val = problem.batch(n, t), problem.batch(m, s, seed=1)
        dots = gf.ghost_dot_prod(problem.model_fn, problem.params, train, val, per_param=True)
        pairs = gram(sample_grads(problem, train), sample_grads(problem, val))
        assert_close(dots, reduced(pairs, "mean"), problem.tolerance)


def test_a_given_direction(problem: Problem) -> None:
    train, u = problem.batch(4, 4), random_direction(problem.params)
    rows = [x[None] for x in leaves_of(u)]
    expected = [x[:, 0] for x in gram(sample_grads(problem, train), rows)]
    for mode in modes_of(problem):
        dots = gf.ghost_dot_prod(
            problem.model_fn, problem.params, train, direction=u, mode=mode, per_param=True
        )
        assert_close(dots, expected, problem.tolerance)


def test_direction_is_the_validation_gradient(problem: Problem) -> None:
    val = problem.batch(3, 5)
    grads = sample_grads(problem, val)
    for reduction, expected in {
        "mean": [g.mean(0) for g in grads],
        "sum": [g.sum(0) for g in grads],
    }.items():
        u = gf.direction(problem.model_fn, problem.params, val, reduction=reduction)
        assert_close(u, expected, problem.tolerance)


@pytest.mark.parametrize(
    "options",
    [{"mode": "ghost"}, {"vectorize": True}, {"vectorize": False}],
    ids=["ghost", "vmap", "loop"],
)
@pytest.mark.parametrize("n", [1, 4])
def test_per_sample_grads(problem: Problem, n: int, options: dict[str, object]) -> None:
    batch = problem.batch(n, 4)
    grads = gf.per_sample_grads(problem.model_fn, problem.params, batch, **options)
    assert_close(grads, sample_grads(problem, batch), problem.tolerance)


@shapes
def test_value_and_grad(problem: Problem, shape: Shape) -> None:
    n, t, m, s = shape
    model_fn, params = problem.model_fn, problem.params
    train, val = problem.batch(n, t), problem.batch(m, s, seed=1)
    losses = model_fn(params, train)
    grads = torch.func.grad(lambda p: model_fn(p, train).mean())(params)
    for reduction in ("mean", "none"):
        expected = gf.ghost_dot_prod(model_fn, params, train, val, reduction=reduction)
        for mode in modes_of(problem):
            step = gf.ghost_value_and_grad(
                model_fn, params, train, val, mode=mode, reduction=reduction
            )
            assert_close(step.losses, losses, problem.tolerance)
            assert_close(step.grads, grads, problem.tolerance)
            assert_close(step.dot_prods, expected, problem.tolerance)
    dtypes = [[x.dtype for x in leaves_of(tree)] for tree in (step.grads, params)]
    assert dtypes[0] == dtypes[1]


def test_value_and_grad_per_param_along_a_direction(problem: Problem) -> None:
    train, u = problem.batch(4, 4), random_direction(problem.params)
    args = (problem.model_fn, problem.params, train)
    step = gf.ghost_value_and_grad(*args, direction=u, per_param=True)
    scores = gf.ghost_dot_prod(*args, direction=u, per_param=True)
    assert_close(step.dot_prods, scores, min(problem.tolerance, 1e-6))  # added up in float32


def test_quantities_share_one_pass(problem: Problem) -> None:
    batch, u = problem.batch(3, 4), random_direction(problem.params)
    args = (problem.model_fn, problem.params, batch)
    quantities = {"dots": gf.Dot(u), "grads": gf.SampleGrad()}
    losses, values, total = gf.ghost_vjp(*args, quantities, grads=True)
    expected = sample_grads(problem, batch)
    assert_close(losses, problem.model_fn(problem.params, batch), problem.tolerance)
    assert_close(values["grads"], expected, problem.tolerance)
    assert_close(values["dots"], gf.ghost_vjp(*args, gf.Dot(u)).values, problem.tolerance)
    assert_close(total, [g.sum(0) for g in expected], problem.tolerance)
    assert gf.ghost_vjp(*args, gf.Dot(u)).grads is None


def test_verify(problem: Problem) -> None:
    train, val = problem.batch(3, 4), problem.batch(2, 5, seed=1)
    report = gf.verify(problem.model_fn, problem.params, train, val, check=True)
    assert report.ok
    assert report.max_error <= report.tolerance
    assert len(report.rows) == len(leaves_of(problem.params))
    assert all(row.name in str(report) for row in report.rows)
