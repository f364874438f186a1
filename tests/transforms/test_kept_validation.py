"""Validation gradients that are collected once and dotted with many batches."""

from __future__ import annotations

import pytest
from compare import assert_close, gram, random_direction, sample_grads
from problems import CASES, Problem

import ghostfunc as gf
from ghostfunc import OptionError


@pytest.mark.usefixtures("form")
def test_every_problem(problem: Problem) -> None:
    args, val = (problem.model_fn, problem.params), problem.batch(2, 5, seed=1)
    kept = gf.factored_grads(*args, val)
    for n, t in ((3, 4), (1, 5)):  # one validation set, many batches
        train = problem.batch(n, t)
        pairs = gram(sample_grads(problem, train), sample_grads(problem, val))
        for reduction, expected in (
            ("mean", [x.mean(1) for x in pairs]),
            ("sum", [x.sum(1) for x in pairs]),
            ("none", pairs),
        ):
            options = {"reduction": reduction, "direction": kept}
            scores = gf.ghost_dot_prod(*args, train, **options)
            assert_close(scores, sum(expected), problem.tolerance)
            step = gf.ghost_value_and_grad(*args, train, per_param=True, **options)
            assert_close(step.dot_prods, expected, problem.tolerance)
        plain = gf.ghost_value_and_grad(*args, train, val, normalize=True)
        step = gf.ghost_value_and_grad(*args, train, direction=kept, normalize=True)
        assert_close(
            [step.losses, step.grads, step.dot_prods],
            [plain.losses, plain.grads, plain.dot_prods],
            problem.tolerance,
        )


def test_among_others_and_in_chunks() -> None:
    problem = CASES["tied_lm"]()
    args, train = (problem.model_fn, problem.params), problem.batch(5)
    vals = {"a": problem.batch(2, 5, seed=1), "b": problem.batch(3, 4, seed=2)}
    u = random_direction(problem.params)
    given = {k: gf.factored_grads(*args, v) for k, v in vals.items()}
    scores = gf.ghost_dot_prod(*args, train, direction={**given, "u": u}, chunk_size=2)
    assert list(scores) == ["a", "b", "u"]
    assert_close([scores["a"], scores["b"]], gf.ghost_dot_prod(*args, train, vals), 1e-10)
    assert_close(scores["u"], gf.ghost_dot_prod(*args, train, direction=u), 1e-10)
    places = gf.ghost_dot_prod(*args, train, direction=given, per_position=True)
    assert_close({k: x.sum(1) for k, x in places.items()}, {k: scores[k] for k in "ab"}, 1e-10)


def test_what_is_refused() -> None:
    problem, other = CASES["tied_lm"](), CASES["mlp"]()
    args, train = (problem.model_fn, problem.params), problem.batch(3)
    kept = gf.factored_grads(*args, train)
    with pytest.raises(OptionError, match="need mode=\"ghost\"; got mode='jvp'"):
        gf.ghost_dot_prod(*args, train, direction=kept, mode="jvp")
    with pytest.raises(OptionError, match="per_position=True needs reduction"):
        gf.ghost_dot_prod(*args, train, direction=kept, per_position=True, reduction="none")
    with pytest.raises(OptionError, match="holds gradients of other parameters"):
        gf.ghost_dot_prod(other.model_fn, other.params, other.batch(3), direction=kept)
