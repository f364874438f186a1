"""Gradients that are kept are those of the batch and the parameters they were made of, whatever is
written there afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from every_quantity import (
    Case,
    Held,
    held_norms,
    held_pairs,
    held_sum,
    leaves_of,
)
from problems import energy, weights
from torch import Generator, Tensor

import ghostfunc as gf

Model = Callable[[Any, Any], Tensor]


def linear(p: Any, batch: Any) -> Tensor:
    return energy(torch.tanh(batch["x"] @ p["w"]))


def table(p: Any, batch: Any) -> Tensor:
    return energy(F.embedding(batch["ids"], p["e"]).tanh() @ p["w"])


def scaled(p: Any, batch: Any) -> Tensor:
    return energy(batch["x"] * p["s"]) + energy(batch["x"] @ p["w"])


def merged(p: Any, batch: Any) -> Tensor:
    """Derived weights: what leads back to the parameters goes through their values."""
    return energy(batch["x"] @ (p["w"] * p["v"]).tanh())


def normalised(p: Any, batch: Any) -> Tensor:
    return energy(F.layer_norm(batch["x"], (4,), p["s"], p["b"]) @ p["w"])


def outer(p: Any, batch: Any) -> Tensor:
    """A parameter is the other operand of a parameter's product."""
    return energy(torch.einsum("nd,dp,d->np", batch["x"][:, 0], p["w"], p["s"]))


MODELS: list[Model] = [linear, table, scaled, merged, normalised, outer]
SHAPES = {"w": (4, 6), "v": (4, 6), "s": (4,), "b": (4,), "e": (7, 4)}


def draw(n: int) -> dict[str, Tensor]:
    generator = Generator().manual_seed(n)
    return {
        "x": torch.randn(n, 3, 4, generator=generator, dtype=torch.float64),
        "ids": torch.randint(7, (n, 3), generator=generator),
    }


def overwrite(tree: Any) -> None:
    """What a loader does to its pinned buffers, and an optimizer to its parameters."""
    for x in leaves_of(tree):
        if x.is_floating_point():
            x.add_(1.5)
        else:
            x.copy_(x.flip(0))


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("written", ["batch", "params"])
def test_factored_grads(model: Model, written: str) -> None:
    case = Case(model, weights(**SHAPES), draw(3), draw(2))
    g, v = case.g, case.v
    train = optree.tree_map(torch.clone, case.train)
    kept = gf.factored_grads(model, case.params, train)
    theirs = gf.factored_grads(model, case.params, case.val)
    overwrite(train if written == "batch" else case.params)
    w = torch.tensor([0.5, -1.0, 2.0]).double()
    _hold(held_norms("norms", kept.norms(), g, per_param=False))
    _hold(held_pairs("gram", kept.gram(), g, g, "none", per_param=False))
    _hold(held_pairs("gram", kept.gram(theirs), g, v, "none", per_param=False))
    _hold(held_pairs("dots", kept.dot_prods(case.u), g, case.directions, "sum", per_param=False))
    _hold(held_sum("sum", kept.weighted_sum(w), g, w))


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_as_a_direction(model: Model, reduction: str) -> None:
    case = Case(model, weights(**SHAPES), draw(3), draw(2))
    g, v = case.g, case.v
    val = optree.tree_map(torch.clone, case.val)
    kept = gf.factored_grads(model, case.params, val)
    overwrite(val)
    got = case.of(gf.ghost_dot_prod, direction=kept, reduction=reduction)
    _hold(held_pairs(reduction, got, g, v, reduction, per_param=False))


def test_a_frozen_input_that_is_written_to() -> None:
    """Positions that a closure keeps, and reuses for the next batch."""
    positions = torch.randn(3, 4, dtype=torch.float64)

    def model(p: Any, batch: Any) -> Tensor:
        return energy((batch["x"] + positions @ p["v"][:, :4].t()[:4, :4]) @ p["w"])

    case = Case(model, weights(w=(4, 6), v=(4, 6)), draw(3), draw(2))
    g = case.g
    kept = gf.factored_grads(model, case.params, case.train)
    positions.add_(1)
    _hold(held_norms("norms", kept.norms(per_param=True), g, per_param=True))


def _hold(numbers: Any) -> None:
    for held in numbers:
        assert isinstance(held, Held)
        error = float(((held.got - held.want).abs() / held.scale).max())
        assert error < 1e-9, f"{held.what} is off by {error:.1e}"
