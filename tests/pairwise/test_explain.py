"""The plan says what will be done, and prints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import CASES, Problem

import ghostfunc as gf


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
