"""Attention in which every sample is one query, beside learned keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import Case, assert_right
from problems import energy, features, weights
from torch import Generator, Tensor

attention = F.scaled_dot_product_attention


def learned_keys_and_values(p: Any, x: Tensor) -> Tensor:
    return energy(attention(x[None], p["k"][None], p["v"][None])[0])


def two_axes(p: Any, x: Tensor) -> Tensor:
    return energy(attention(x, p["k"], p["v"]))


def learned_values(p: Any, x: Tensor) -> Tensor:
    keys = torch.linspace(-1, 1, p["v"].numel(), dtype=x.dtype).view_as(p["v"])
    return energy(attention(x[None], keys[None], p["v"][None])[0])


def learned_keys(p: Any, x: Tensor) -> Tensor:
    values = torch.linspace(-1, 1, p["k"].numel(), dtype=x.dtype).view_as(p["k"])
    return energy(attention(x[None], p["k"][None], values[None])[0])


def with_heads(p: Any, x: Tensor) -> Tensor:
    heads = [y.unflatten(-1, (2, 2)).transpose(0, 1)[None] for y in (x, p["k"], p["v"])]
    return energy(attention(*heads)[0].transpose(0, 1))


def by_hand(p: Any, x: Tensor) -> Tensor:
    return energy(torch.softmax(x @ p["k"].t(), -1) @ p["v"])


def learned_mask(p: Any, x: Tensor) -> Tensor:
    return energy(attention(x[None], p["k"][None], p["v"][None], attn_mask=p["v"].sum(1))[0])


MODELS = [
    learned_keys_and_values, two_axes, learned_values, learned_keys, with_heads, by_hand,
    learned_mask,
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("slots", [1, 3])
def test_learned_slots(model: Callable[[Any, Tensor], Tensor], slots: int) -> None:
    draw = features(4)
    batches = (draw(n, 1, Generator().manual_seed(n)) for n in (3, 2))
    assert_right(Case(model, weights(k=(slots, 4), v=(slots, 4)), *batches))


@pytest.mark.parametrize("slots", [1, 3])
def test_samples_are_keys_of_nobody_else(slots: int) -> None:
    """Learned queries attend to every sample's own rows: samples in front."""

    def model(p: Any, x: Tensor) -> Tensor:
        q = p["q"].expand(len(x), -1, -1)
        return energy(attention(q, x[:, None] * p["s"], x[:, None]))

    draw = features(4)
    batches = (draw(n, 1, Generator().manual_seed(n)) for n in (3, 2))
    assert_right(Case(model, weights(q=(slots, 4), s=(2, 4)), *batches))
