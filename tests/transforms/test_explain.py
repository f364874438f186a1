"""The plan says what will be done, and prints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import CASES, Problem

import ghostfunc as gf
from ghostfunc._factors import cost


@pytest.mark.parametrize("quantity", ["dot_prod", "norm", "gram", "clipped_grad"])
def test_every_problem_has_a_plan(problem: Problem, quantity: Any) -> None:
    batch = problem.batch(3, t=4)
    val = problem.batch(2, t=5, seed=1) if quantity == "dot_prod" else None
    plan = gf.explain(problem.model_fn, problem.params, batch, val, quantity=quantity)
    printed = str(plan)
    assert len(plan.rows) > 0
    for row in plan.rows:
        assert row.name in printed
        assert row.cost >= 0
        assert (row.representation == "unused") == (row.uses == "-")
    assert plan.cost == sum(row.cost for row in plan.rows)


def wide_mlp(d: int) -> tuple[Any, Any]:
    params = {"w": torch.randn(d, d), "b": torch.randn(d), "e": torch.randn(50, d)}

    def model_fn(p: Any, ids: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.embedding(ids, p["e"])
        return torch.tanh(h @ p["w"] + p["b"]).square().mean((1, 2))

    return model_fn, params


def rows(plan: gf.Plan) -> dict[str, Any]:
    return {row.name: row for row in plan.rows}


def test_the_choice_follows_the_shapes() -> None:
    few, many = torch.randint(50, (4, 3)), torch.randint(50, (4, 400))
    short = rows(gf.explain(*wide_mlp(64), few, quantity="norm"))
    assert short["w"].representation == "3 x 3 tokens"
    assert short["b"].representation == "g itself"
    assert short["w"].cost < short["w"].materialized
    long = rows(gf.explain(*wide_mlp(16), many, quantity="norm"))
    assert long["w"].representation == "rows of g"
    one = torch.randint(50, (1, 2))
    near = rows(gf.explain(*wide_mlp(64), few, one))
    assert near["w"].representation == "u factored"
    far = rows(gf.explain(*wide_mlp(16), many, many))
    assert far["w"].representation == "u dense"


def test_uses_are_counted() -> None:
    problem = CASES["tied_lm"]()
    plan = gf.explain(problem.model_fn, problem.params, problem.batch(3, 4), quantity="norm")
    (tied,) = (row for row in plan.rows if "+" in row.uses)
    assert "OneHot 4" in tied.uses
    assert "Outer" in tied.uses
    assert "kept" in tied.representation
    twice = CASES["layer_called_twice"]()
    plan = gf.explain(twice.model_fn, twice.params, twice.batch(3, 4), quantity="gram")
    assert any(row.uses.startswith("2 x") for row in plan.rows)


def test_options_that_do_not_exist() -> None:
    fn, params = wide_mlp(8)
    ids = torch.randint(50, (2, 3))
    with pytest.raises(gf.OptionError, match="quantity='speed' is not an option"):
        gf.explain(fn, params, ids, quantity="speed")
    with pytest.raises(gf.OptionError, match="needs val"):
        gf.explain(fn, params, ids)
    with pytest.raises(gf.OptionError, match="drop val"):
        gf.explain(fn, params, ids, ids, quantity="norm")


class Spy:
    """Notes the choices that a run makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.made: list[cost.Choice] = []
        choose = getattr(cost, name)

        def noted(*args: Any, **options: Any) -> cost.Choice:
            choice = choose(*args, **options)
            self.made.append(choice)
            return choice

        monkeypatch.setattr(cost, name, noted)


def test_the_plan_is_the_one_that_a_run_takes(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forms of validation gradients: the same choices, the same numbers, in the same order."""
    train, val = problem.batch(3, t=4), problem.batch(2, t=4, seed=1)
    for grads, call in ((False, gf.ghost_dot_prod), (True, gf.ghost_value_and_grad)):
        plan = gf.explain(problem.model_fn, problem.params, train, val, grads=grads)
        spy = Spy(monkeypatch, "direction_choice")
        call(problem.model_fn, problem.params, train, val, chunk_size=3)
        monkeypatch.undo()
        used = [c for c, row in zip(spy.made, plan.rows, strict=True) if row.uses != "-"]
        planned = [row for row in plan.rows if row.uses != "-"]
        assert [row.cost for row in planned] == [c.ops for c in used]
        assert [row.representation == "u factored" for row in planned] == [
            c.way == "factored" for c in used
        ]


@pytest.mark.parametrize("case", ["mlp", "tied_lm", "layer_called_twice"])
@pytest.mark.parametrize(("quantity", "choice"), [("norm", "norm_choice"), ("gram", "gram_choice")])
def test_norms_and_gram_matrices_take_their_plan(
    case: str, quantity: Any, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = CASES[case]()
    batch = problem.batch(3, t=4)
    plan = gf.explain(problem.model_fn, problem.params, batch, quantity=quantity)
    call = {"norm": gf.ghost_norm, "gram": gf.ghost_gram}[quantity]
    call(problem.model_fn, problem.params, batch)
    spy = Spy(monkeypatch, choice)
    call(problem.model_fn, problem.params, batch)
    scale = 3 if quantity == "norm" else 1
    contracted = ("tokens", "rows of g")
    factored = [
        row.cost for row in plan.rows if any(way in row.representation for way in contracted)
    ]
    assert sorted(factored) == sorted(
        scale * c.ops for c in spy.made if "tokens" in (c.way, *c.others)
    )


def test_the_reason_for_two_runs_is_printed() -> None:
    problem = CASES["tied_lm"]()
    args = problem.model_fn, problem.params
    train, val = problem.batch(8, 4), problem.batch(2, 4, seed=1)
    assert "runs                  1: train and val share" in str(gf.explain(*args, train, val))
    for batch, reason in (
        (problem.batch(3, 4), "at least 4 train samples per validation sample"),
        (problem.batch(2, 5), "the batches differ in length"),
    ):
        plan = gf.explain(*args, train, batch)
        assert plan.two_runs is not None
        assert reason in plan.two_runs
        assert f"runs                  2: {plan.two_runs}" in str(plan)
    twice = CASES["layer_called_twice"]()
    plan = gf.explain(twice.model_fn, twice.params, twice.batch(8, 4), twice.batch(2, 4))
    assert "several uses" in str(plan.two_runs)
