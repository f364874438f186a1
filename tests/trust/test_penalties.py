"""Weights that an op sees as a matrix, and a penalty, a norm or another op as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import Case, assert_right
from problems import energy, weights
from torch import Generator, Tensor

Model = Callable[[Any, Tensor], Tensor]


def penalty(*tensors: Tensor) -> Tensor:
    return 0.1 * sum(x.square().sum() for x in tensors)


def conv(p: Any, x: Tensor) -> Tensor:
    return energy(F.conv1d(x, p["k"], p["b"], padding=1)) + penalty(p["k"], p["b"])


def grouped_conv(p: Any, x: Tensor) -> Tensor:
    return energy(F.conv1d(x, p["grouped"], groups=2)) + penalty(p["grouped"])


def transposed_conv(p: Any, x: Tensor) -> Tensor:
    return energy(F.conv_transpose1d(x, p["k"])) + penalty(p["k"])


def conv_of_planes(p: Any, x: Tensor) -> Tensor:
    return energy(F.conv2d(x[:, None], p["planes"])) + penalty(p["planes"])


def bilinear(p: Any, x: Tensor) -> Tensor:
    return energy(F.bilinear(x[..., 0], x[..., 1], p["bi"])) + penalty(p["bi"])


def conv_twice(p: Any, x: Tensor) -> Tensor:
    y = F.conv1d(x, p["k"], padding=1)
    return energy(F.conv1d(torch.tanh(y), p["k"], padding=1)) + penalty(p["k"])


def conv_and_scale(p: Any, x: Tensor) -> Tensor:
    """The kernel is multiplied with samples as it is, too."""
    y = F.conv1d(x, p["k"], padding=1)
    return energy(y) + energy(x[:, None, :, :3] * p["k"])


def conv_and_product(p: Any, x: Tensor) -> Tensor:
    y = F.conv1d(x, p["k"], padding=1)
    return energy(y) + energy(x[:, None, :, :3] @ p["k"].mT)


def conv_of_a_standardised_kernel(p: Any, x: Tensor) -> Tensor:
    k = p["k"]
    k = (k - k.mean((1, 2), keepdim=True)) / (1e-3 + k.std((1, 2), keepdim=True))
    return energy(F.conv1d(x, k)) + penalty(p["k"])


def bilinear_and_its_matrix(p: Any, x: Tensor) -> Tensor:
    y = F.bilinear(x[..., 0], x[..., 1], p["bi"])
    return energy(y) + energy(x[..., 0] @ p["bi"][0])


MODELS: list[Model] = [
    conv, grouped_conv, transposed_conv, conv_of_planes, bilinear, conv_twice, conv_and_scale,
    conv_and_product, conv_of_a_standardised_kernel, bilinear_and_its_matrix,
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
def test_penalised(model: Model) -> None:
    params = weights(k=(4, 4, 3), b=(4,), grouped=(4, 2, 3), planes=(3, 1, 2, 2), bi=(3, 4, 4))

    def draw(n: int) -> Tensor:
        return torch.randn(n, 4, 5, generator=Generator().manual_seed(n), dtype=torch.float64)

    assert_right(Case(model, params, draw(4), draw(2)))
