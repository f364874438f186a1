"""Ops that depend on strides, on weights and directions of other strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import GHOST, Case, assert_right
from problems import energy, features, weights
from torch import Generator, Tensor

import ghostfunc as gf

Model = Callable[[Any, Tensor], Tensor]


def rearranged(p: Any, x: Tensor) -> Tensor:
    """As vLLM and Llama conversions pack heads."""
    w = p["w"].view(2, 2, 6).permute(1, 0, 2).contiguous().view(4, 6)
    return energy(x @ w)


def rearranged_twice(p: Any, x: Tensor) -> Tensor:
    w = p["w"].view(2, 2, 6).transpose(0, 1).contiguous().view(4, 6)
    return energy(x @ w.t().contiguous().view(6, 4).t())


def cloned_then_viewed(p: Any, x: Tensor) -> Tensor:
    w = p["w"].t().clone(memory_format=torch.contiguous_format).view(3, 8)
    return energy(x[:, :3] @ w)


def flattened(p: Any, x: Tensor) -> Tensor:
    w = p["w"].t().contiguous().view(-1)
    return energy(x @ w.view(6, 4).t())


def scaled_then_viewed(p: Any, x: Tensor) -> Tensor:
    w = (2 * p["w"].t()).contiguous().view(24)
    return energy(x @ w.view(4, 6))


def unfolded(p: Any, x: Tensor) -> Tensor:
    w = p["w"].t().contiguous().unfold(0, 2, 2).contiguous().view(3, 8)
    return energy(x[:, :3] @ w)


def split_then_viewed(p: Any, x: Tensor) -> Tensor:
    a, b = p["w"].chunk(2, dim=1)
    return energy(x @ a.contiguous().view(3, 4).t() + x @ b.contiguous().view(4, 3))


def strided(p: Any, x: Tensor) -> Tensor:
    w = p["w"].as_strided((4, 6), (1, 4))
    return energy(x @ w)


MODELS: list[Model] = [
    rearranged, rearranged_twice, cloned_then_viewed, flattened, scaled_then_viewed, unfolded,
    split_then_viewed, strided,
]  # fmt: skip


def case_of(model: Model, params: Any) -> Case:
    draw = features(4)
    batches = (draw(n, 1, Generator().manual_seed(n)) for n in (3, 2))
    return Case(model, params, *batches)


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
def test_weights(model: Model) -> None:
    assert_right(case_of(model, weights(w=(4, 6))))


@pytest.mark.parametrize("model", [rearranged, scaled_then_viewed], ids=lambda f: f.__name__)
def test_directions_of_other_strides(model: Model) -> None:
    case = case_of(model, weights(w=(4, 6)))
    turned = {"w": case.u["w"].t().contiguous().t()}
    assert turned["w"].stride() != case.u["w"].stride()
    want = case.of(gf.ghost_dot_prod, direction=case.u, mode="jvp")
    for direction in (turned, {"w": case.u["w"].repeat(1, 2)[:, :6]}):
        got = case.of(gf.ghost_dot_prod, direction=direction)
        torch.testing.assert_close(got, want)


def of_planes(p: Any, x: Tensor) -> Tensor:
    images = x.view(len(x), 1, 2, 2).expand(-1, 3, -1, -1)
    return energy(F.conv2d(images, p["k"].view(6, -1).view(6, 3, 2, 2)))


def of_planes_rearranged(p: Any, x: Tensor) -> Tensor:
    k = p["k"].view(2, 3, 3, 4).transpose(0, 1).contiguous().view(6, 3, 2, 2)
    images = x.view(len(x), 1, 2, 2).expand(-1, 3, -1, -1)
    return energy(F.conv2d(images, k)) + 0.1 * p["k"].square().sum()


@pytest.mark.parametrize("model", [of_planes, of_planes_rearranged], ids=lambda f: f.__name__)
def test_channels_last(model: Model) -> None:
    case = case_of(model, weights(k=(6, 3, 2, 2)))
    want = case.of(gf.ghost_dot_prod, direction=case.u, mode="jvp")
    last = {"k": case.u["k"].to(memory_format=torch.channels_last)}
    torch.testing.assert_close(case.of(gf.ghost_dot_prod, direction=last), want)
    assert_right(case, GHOST)
