"""Derivatives of norms, Gram matrices and clipped sums with respect to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch
from compare import leaves_of, random_direction
from problems import CASES, Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ghostfunc as gf

Scalar = Callable[[Problem, Any, Any], Tensor]


@pytest.fixture(
    params=["mlp", "tied_lm", "nanogpt", "layer_called_three_times", "packed_projection", "lora"]
)
def nested(request: pytest.FixtureRequest) -> Iterator[Problem]:
    with sdpa_kernel(SDPBackend.MATH):  # the only attention torch can differentiate further
        yield CASES[request.param]()


def norm(problem: Problem, params: Any, batch: Any) -> Tensor:
    return gf.ghost_norm(problem.model_fn, params, batch).sum()


def gram(problem: Problem, params: Any, batch: Any) -> Tensor:
    return gf.ghost_gram(problem.model_fn, params, batch).square().sum()


def cosine(problem: Problem, params: Any, batch: Any) -> Tensor:
    u = random_direction(params)
    return gf.ghost_cosine(problem.model_fn, params, batch, direction=u).sum()


def clipped(problem: Problem, params: Any, batch: Any) -> Tensor:
    grads = gf.ghost_clipped_grad(problem.model_fn, params, batch, max_norm=0.1).grads
    return sum(x.square().sum() for x in leaves_of(grads))


def book(problem: Problem, params: Any, batch: Any) -> Tensor:
    kept = gf.factored_grads(problem.model_fn, params, batch)
    return kept.norms().sum() + kept.gram().sum()


@pytest.mark.parametrize("scalar", [norm, gram, cosine, clipped, book])
def test_derivative(nested: Problem, scalar: Scalar) -> None:
    batch = nested.batch(3)
    gradient = torch.func.grad(lambda p: scalar(nested, p, batch))(nested.params)
    v = random_direction(nested.params, seed=7)
    slope = sum((g * d).sum() for g, d in zip(leaves_of(gradient), leaves_of(v), strict=True))

    def along(step: float) -> Tensor:
        moved = optree.tree_map(lambda p, d: p + step * d, nested.params, v)
        return scalar(nested, moved, batch)

    h = 1e-4
    # Of fourth order: the error of two points alone would hide small mistakes.
    difference = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-8)
