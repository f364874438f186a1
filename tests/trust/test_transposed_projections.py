"""Projections of what derives from a transpose of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import GHOST, Case, assert_right
from problems import energy, sequences, weights
from torch import Generator, Tensor, nn

import ghostfunc as gf

Model = Callable[[Any, Tensor], Tensor]


def scaled(p: Any, x: Tensor) -> Tensor:
    return energy(x @ (p["w"].t() * 0.5))


def squashed(p: Any, x: Tensor) -> Tensor:
    return energy(x @ p["w"].mT.tanh())


def sliced(p: Any, x: Tensor) -> Tensor:
    return energy(x[..., :3] @ p["w"].T[:3])


def joined(p: Any, x: Tensor) -> Tensor:
    return energy(x @ torch.cat([p["w"].t(), p["w"].swapaxes(0, 1)], dim=1))


def normalised(p: Any, x: Tensor) -> Tensor:
    return energy(x @ F.normalize(p["w"].transpose(0, 1), dim=0))


def turned_twice(p: Any, x: Tensor) -> Tensor:
    return energy(F.linear(x, (p["w"].t() + 1).t()))


def as_it_is_and_scaled(p: Any, x: Tensor) -> Tensor:
    return energy(F.linear(x, p["w"]) @ p["w"] + x @ (2 * p["w"].t()) @ p["w"])


def squared(p: Any, x: Tensor) -> Tensor:
    return energy(x[..., :4] @ (p["w"] @ p["w"].t()))


def penalised(p: Any, x: Tensor) -> Tensor:
    return energy(x @ p["w"].t()) + p["w"].t().square().sum()


MODELS: list[Model] = [
    scaled, squashed, sliced, joined, normalised, turned_twice, as_it_is_and_scaled, squared,
    penalised,
]  # fmt: skip


def case_of(model: Model, **shapes: tuple[int, ...]) -> Case:
    draw = sequences(6)
    batches = (draw(n, 3, Generator().manual_seed(n)) for n in (4, 2))
    return Case(model, weights(**shapes), *batches)


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
def test_of_one_parameter(model: Model) -> None:
    assert_right(case_of(model, w=(4, 6)))


def test_of_a_low_rank_product() -> None:
    def model(p: Any, x: Tensor) -> Tensor:
        return energy(x @ (p["a"].t() @ p["b"].t()))

    assert_right(case_of(model, a=(2, 6), b=(4, 2)))


def test_of_an_orthogonal_weight() -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(6, 4).double())
    model_fn, params = gf.from_module(layer, lambda module, x: energy(module(x)))
    draw = sequences(6)
    batches = (draw(n, 3, Generator().manual_seed(n)) for n in (4, 2))
    assert_right(Case(model_fn, params, *batches), GHOST)
