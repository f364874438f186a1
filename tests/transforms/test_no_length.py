"""Sequences of no length, and parameters without elements: every quantity is what a loop says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from every_quantity import GHOST, OTHER_MODES, Case, assert_right
from torch import Tensor

Draw = Callable[[int, int, torch.Generator], Any]


class Model(NamedTuple):
    """`draw(n, t, generator)` makes a batch of n samples of length t."""

    call: Callable[[Any, Any], Tensor]
    shapes: dict[str, tuple[int, ...]]
    draw: Draw


def vectors(width: int) -> Draw:
    return lambda n, t, g: torch.randn(n, t, width, generator=g, dtype=torch.float64)


def ids(n: int, t: int, g: torch.Generator) -> Tensor:
    return torch.randint(6, (n, t), generator=g)


def both(n: int, t: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"x": vectors(4)(n, t, g), "y": vectors(4)(n, 1, g)[:, 0]}


def per_sample(x: Tensor) -> Tensor:
    return x.sin().flatten(1).sum(1)


MODELS = {
    "linear": Model(
        lambda p, x: per_sample(F.linear(x, p["w"], p["b"])), {"w": (5, 4), "b": (5,)}, vectors(4)
    ),
    "tied": Model(lambda p, i: per_sample(F.embedding(i, p["e"]) @ p["e"].mT), {"e": (6, 4)}, ids),
    "scale": Model(lambda p, x: per_sample(x * p["s"] + p["c"]), {"s": (4,), "c": ()}, vectors(4)),
    "groups": Model(
        lambda p, x: per_sample(torch.einsum("ntc,gdc->ngtd", x, p["w"])),
        {"w": (2, 3, 4)},
        vectors(4),
    ),
    "norm": Model(lambda p, x: per_sample(F.layer_norm(x, (4,), p["w"])), {"w": (4,)}, vectors(4)),
    "once with a length": Model(
        lambda p, b: per_sample(b["x"] @ p["w"] @ p["w"]) + per_sample(b["y"] @ p["w"]),
        {"w": (4, 4)},
        both,
    ),
    "no columns": Model(
        lambda p, x: per_sample(F.linear(x, p["w"], p["b"])), {"w": (5, 0), "b": (5,)}, vectors(0)
    ),
    "no rows": Model(
        lambda p, x: per_sample(F.linear(x, p["w"])) + per_sample(x @ p["v"]),
        {"w": (0, 4), "v": (4, 3)},
        vectors(4),
    ),
}


@pytest.mark.parametrize(("t", "s", "known"), [(0, 4, False), (4, 0, True), (0, 0, False)])
@pytest.mark.parametrize("name", MODELS)
def test_every_quantity(name: str, t: int, s: int, known: bool) -> None:
    """`known`: lengths above zero were met before."""
    model, g = MODELS[name], torch.Generator().manual_seed(0)
    params = {
        path: torch.randn(shape, generator=g, dtype=torch.float64)
        for path, shape in model.shapes.items()
    }
    first = (model.draw(3, 5, g),) if known else ()
    case = Case(model.call, params, model.draw(3, t, g), model.draw(2, s, g), first=first)
    assert_right(case, (*GHOST, *OTHER_MODES, "vmap_over_directions"))


def test_a_length_after_none() -> None:
    """What is remembered of sequences of no length fits those of any."""
    model, g = MODELS["linear"], torch.Generator().manual_seed(0)
    params = {
        path: torch.randn(shape, generator=g, dtype=torch.float64)
        for path, shape in model.shapes.items()
    }
    case = Case(
        model.call,
        params,
        model.draw(3, 6, g),
        model.draw(2, 3, g),
        first=[model.draw(3, 0, g), model.draw(3, 2, g)],
    )
    assert_right(case, GHOST)
