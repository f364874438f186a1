"""Every quantity is in every problem: all public quantities, in all modes, over one list."""

from __future__ import annotations

from every_quantity import GHOST, OTHER_MODES, Case, assert_right, judge
from problems import Problem

from ghostfunc import PositionAxisError

ONE_SAMPLE = ("dots_of_pairs", "gram_with_others", "clipped_sums", "projections_gaussian")


def case_of(problem: Problem, n: int, t: int, m: int, s: int) -> Case:
    return Case(problem.model_fn, problem.params, problem.batch(n, t), problem.batch(m, s, seed=1))


def test_in_ghost_mode(problem: Problem) -> None:
    assert_right(case_of(problem, 3, 3, 2, 5), GHOST, tolerance=problem.tolerance)


def test_of_one_sample(problem: Problem) -> None:
    assert_right(case_of(problem, 1, 4, 4, 2), ONE_SAMPLE, tolerance=problem.tolerance)


def test_in_other_modes(problem: Problem) -> None:
    refusable = () if problem.forward_mode else ("dots_by_jvp",)
    case = case_of(problem, 3, 3, 2, 5)
    assert_right(case, OTHER_MODES, tolerance=problem.tolerance, refusable=refusable)


def test_by_position(problem: Problem) -> None:
    """Where all parameters have positions, their shares add up to the score."""
    case = case_of(problem, 3, 4, 2, 4)
    verdict = judge(case, "dots_by_position", problem.tolerance)
    refused = verdict.status == "refused" and PositionAxisError.__name__ in verdict.said
    assert verdict.status == "right" or refused, str(verdict)


def test_inside_transforms(problem: Problem) -> None:
    case = case_of(problem, 3, 4, 2, 4)
    assert_right(case, ["vmap_over_directions"], tolerance=problem.tolerance)
