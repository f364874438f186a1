"""Every quantity is in every problem: all public quantities, in all modes, over one list."""

from __future__ import annotations

import pytest
from every_quantity import GHOST, OTHER_MODES, Case, assert_right, judge
from problems import Problem

from ghostfunc import PositionAxisError

SHAPES = {"T_is_n": (3, 3, 2, 5), "one_sample_and_more": (1, 4, 4, 2)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def case(problem: Problem, request: pytest.FixtureRequest) -> Case:
    n, t, m, s = request.param
    return Case(problem.model_fn, problem.params, problem.batch(n, t), problem.batch(m, s, seed=1))


def test_in_ghost_mode(problem: Problem, case: Case) -> None:
    assert_right(case, GHOST, tolerance=problem.tolerance)


def test_in_other_modes(problem: Problem, case: Case) -> None:
    refusable = () if problem.forward_mode else ("dots_by_jvp",)
    assert_right(case, OTHER_MODES, tolerance=problem.tolerance, refusable=refusable)


def test_by_position(problem: Problem) -> None:
    """Where all parameters have positions, their shares add up to the score."""
    case = Case(problem.model_fn, problem.params, problem.batch(3, 4), problem.batch(2, 4, seed=1))
    verdict = judge(case, "dots_by_position", problem.tolerance)
    refused = verdict.status == "refused" and PositionAxisError.__name__ in verdict.said
    assert verdict.status == "right" or refused, str(verdict)


def test_inside_transforms(problem: Problem) -> None:
    case = Case(problem.model_fn, problem.params, problem.batch(3, 4), problem.batch(2, 4, seed=1))
    assert_right(case, ["vmap_over_directions"], tolerance=problem.tolerance)
