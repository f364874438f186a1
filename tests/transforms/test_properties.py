"""What must hold of dot products whatever the model, the batch and the direction."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import optree
import torch
from compare import assert_close, leaves_of, random_direction
from hypothesis import given, strategies as st
from problems import CASES, Problem
from torch import Tensor

import ghostfunc as gf

EXACT = [name for name in CASES if CASES[name]().tolerance <= 1e-10]


class Situation(NamedTuple):
    """A problem with batches of random sizes, and directions.

    Every call gets a fresh model function: what was learnt of one batch is no help with another.
    """

    case: str
    n: int
    t: int
    m: int
    seed: int
    factor: float = 1.0

    @property
    def problem(self) -> Problem:
        problem = CASES[self.case]()
        return replace(problem, model_fn=lambda p, b: self.factor * problem.model_fn(p, b))

    @property
    def train(self) -> object:
        return self.problem.batch(self.n, self.t, self.seed)

    @property
    def val(self) -> object:
        return self.problem.batch(self.m, self.t + 1, self.seed + 1)

    def direction(self, seed: int) -> object:
        return random_direction(self.problem.params, self.seed + seed)

    def scores(self, train: object = None, **options: object) -> Tensor:
        """Scores of `train` against `val`, or along `direction`."""
        train = self.train if train is None else train
        if "direction" not in options:
            options = {"val": self.val} | options
        return gf.ghost_dot_prod(self.problem.model_fn, self.problem.params, train, **options)


situations = st.builds(
    Situation,
    case=st.sampled_from(EXACT),
    n=st.integers(1, 5),
    t=st.integers(2, 6),
    m=st.integers(1, 4),
    seed=st.integers(0, 1000),
    factor=st.just(1.0),
)


def pick(batch: object, index: object) -> object:
    return optree.tree_map(lambda x: x[index], batch)


@given(situations, st.floats(-3, 3), st.floats(-3, 3))
def test_linear_in_the_direction(situation: Situation, a: float, b: float) -> None:
    u, v = situation.direction(1), situation.direction(2)
    both = optree.tree_map(lambda x, y: a * x + b * y, u, v)
    parts = a * situation.scores(direction=u), b * situation.scores(direction=v)
    # The parts may cancel: rounding is relative to them, not to what is left.
    scale = sum(x.abs().max() for x in parts)
    assert (situation.scores(direction=both) - sum(parts)).abs().max() <= 1e-10 * scale


@given(situations)
def test_validation_gradient_is_a_direction(situation: Situation) -> None:
    problem = situation.problem
    for reduction in ("mean", "sum"):
        u = gf.direction(problem.model_fn, problem.params, situation.val, reduction=reduction)
        assert_close(situation.scores(reduction=reduction), situation.scores(direction=u), 1e-9)


@given(situations)
def test_scores_sum_to_the_score_of_the_summed_gradient(situation: Situation) -> None:
    problem, u = situation.problem, situation.direction(1)
    total = gf.direction(problem.model_fn, problem.params, situation.train, reduction="sum")
    terms = [(g * x).sum() for g, x in zip(leaves_of(total), leaves_of(u), strict=True)]
    scores = situation.scores(direction=u)
    scale = scores.abs().sum() + sum(x.abs() for x in terms)
    assert abs(scores.sum() - sum(terms)) <= 1e-10 * scale


@given(situations, st.randoms(use_true_random=False))
def test_permuted_samples_have_permuted_scores(situation: Situation, random: object) -> None:
    order = list(range(situation.n))
    random.shuffle(order)
    scores = situation.scores(reduction="none")
    permuted = situation.scores(pick(situation.train, order), reduction="none")
    assert_close(permuted, scores[order], 1e-10)


@given(situations, st.integers(1, 5))
def test_company_does_not_matter(situation: Situation, more: int) -> None:
    scores = situation.scores()
    larger = optree.tree_map(
        lambda *x: torch.cat(x),
        situation.train,
        situation.problem.batch(more, situation.t, situation.seed + 7),
    )
    assert_close(situation.scores(larger)[: situation.n], scores, 1e-10)
    assert_close(situation.scores(pick(situation.train, slice(0, 1)))[0], scores[0], 1e-10)


@given(situations)
def test_reductions_agree(situation: Situation) -> None:
    pairs = situation.scores(reduction="none")
    assert pairs.shape == (situation.n, situation.m)
    scale = pairs.abs().max()
    assert_close(situation.scores(reduction="sum") / scale, pairs.sum(1) / scale, 1e-9)
    assert_close(situation.scores(reduction="mean") / scale, pairs.mean(1) / scale, 1e-9)


@given(situations, st.sampled_from(["mean", "none"]))
def test_parameters_sum_to_the_total(situation: Situation, reduction: str) -> None:
    per_param = situation.scores(reduction=reduction, per_param=True)
    assert optree.tree_structure(per_param) == optree.tree_structure(situation.problem.params)
    parts = torch.stack(leaves_of(per_param))
    total = situation.scores(reduction=reduction)
    assert (parts.sum(0) - total).abs().max() <= 1e-10 * parts.abs().sum(0).max()


@given(situations, st.floats(0.1, 10))
def test_scores_scale_with_the_losses(situation: Situation, factor: float) -> None:
    expected = factor**2 * situation.scores(reduction="none")
    assert_close(situation._replace(factor=factor).scores(reduction="none"), expected, 1e-10)


@given(situations)
def test_symmetric_between_the_two_batches(situation: Situation) -> None:
    problem = situation.problem
    forth = situation.scores(reduction="none")
    args = (problem.model_fn, problem.params, situation.val, situation.train)
    assert_close(gf.ghost_dot_prod(*args, reduction="none"), forth.mT, 1e-10)
    own = situation.scores(val=situation.train, reduction="none")
    assert (own.diagonal() >= 0).all()
