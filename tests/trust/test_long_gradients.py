"""float32 keeps its digits in inner products of gradients of millions of elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ghostfunc as gf

Tensors = dict[str, Tensor]
ERROR = 2e-6
"""Of a few roundings. Terms that are added up one after the other leave 1e-4 and more."""


def model_fn(params: Tensors, x: Tensor) -> Tensor:
    return (x @ params["weight"].mT).tanh().square().mean((1, 2))


def problem(dtype: torch.dtype, samples: int = 3, positions: int = 16) -> tuple[Tensors, Tensor]:
    """A weight of 2.4 million elements, and samples whose gradients are alike."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(3072, 768, generator=generator) / 768
    x = torch.rand(samples, positions, 768, generator=generator)
    return {"weight": weight.to(dtype)}, x.to(dtype)


def _kept(params: Tensors, x: Tensor) -> gf.FactoredGrads:
    return gf.factored_grads(model_fn, params, x)


def _direction(params: Tensors, x: Tensor) -> Any:
    return gf.direction(model_fn, params, x[:1])


ASKED: dict[str, Callable[[Tensors, Tensor, Any], Tensor]] = {
    "scores": lambda p, x, mode: gf.ghost_dot_prod(model_fn, p, x, x[:1], mode=mode),
    "matrix": lambda p, x, mode: gf.ghost_dot_prod(
        model_fn, p, x, x[:2], mode=mode, reduction="none"
    ),
    "direction": lambda p, x, mode: gf.ghost_dot_prod(
        model_fn, p, x, direction=_direction(p, x), mode=mode
    ),
    "step": lambda p, x, mode: gf.ghost_value_and_grad(model_fn, p, x, x[:1], mode=mode).dot_prods,
    "cosine": lambda p, x, mode: gf.ghost_cosine(model_fn, p, x, x[:1], mode=mode),
    "norm": lambda p, x, mode: gf.ghost_norm(model_fn, p, x, mode=mode),
    "clipped": lambda p, x, mode: (
        gf.ghost_clipped_grad(model_fn, p, x, max_norm=1e-3, mode=mode).norms
    ),
    "gram": lambda p, x, mode: gf.ghost_gram(model_fn, p, x, mode=mode),
    "gram beside others": lambda p, x, mode: gf.ghost_gram(model_fn, p, x, x[:2], mode=mode),
    "health": lambda p, x, mode: gf.ghost_health(model_fn, p, x).spread["weight"],
    "kept": lambda p, x, mode: gf.ghost_dot_prod(model_fn, p, x, direction=_kept(p, x[:1])),
    "kept gram": lambda p, x, mode: _kept(p, x).gram(),
}


ONE_MODE = {"health", "kept", "kept gram"}


@pytest.mark.parametrize(
    ("asked", "mode"),
    [(x, mode) for x in ASKED for mode in ("ghost", *["materialized"] * (x not in ONE_MODE))],
)
def test_sums_over_a_gradient_keep_their_digits(asked: str, mode: str) -> None:
    found, right = (ASKED[asked](*problem(x), mode) for x in (torch.float32, torch.float64))
    assert (found.double() - right).abs().max() <= ERROR * right.abs().max()


@pytest.mark.parametrize(("samples", "positions"), [(12, 16), (4, 300), (4, 1)])
@pytest.mark.parametrize("asked", ["step", "gram", "health"])
def test_they_do_so_in_every_way(asked: str, samples: int, positions: int) -> None:
    """Formed, by positions, many at one time."""
    sizes = samples, positions
    found, right = (
        ASKED[asked](*problem(x, *sizes), "ghost") for x in (torch.float32, torch.float64)
    )
    assert (found.double() - right).abs().max() <= ERROR * right.abs().max()
