"""The same ops with other arguments: axes and sizes that depend on the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_quantity import ESSENTIAL, Case, assert_right, assert_right_or_refused
from problems import energy, weights
from torch import Generator, Tensor

import ghostfunc as gf

Mix = Callable[[Any, Tensor], Tensor]
Model = Callable[[Any, Tensor], Tensor]


def draw(n: int, t: int) -> Tensor:
    generator = Generator().manual_seed(n + 10 * t)
    return torch.randn(n, t, 4, generator=generator, dtype=torch.float64)


def product(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["w"])


def scale(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(x * p["s"])


def transposed(mix: Mix) -> Model:
    def model(p: Any, x: Tensor) -> Tensor:
        k = int(x.shape[1] > 3)
        return energy(mix(p, x.transpose(0, k)).transpose(0, k))

    return model


def permuted(mix: Mix) -> Model:
    def model(p: Any, x: Tensor) -> Tensor:
        order = (1, 0, 2) if x.shape[1] > 3 else (0, 1, 2)
        return energy(mix(p, x.permute(order)).permute(order))

    return model


def moved(mix: Mix) -> Model:
    def model(p: Any, x: Tensor) -> Tensor:
        k = int(x.shape[1] > 3)
        return energy(mix(p, x.movedim(0, k)).movedim(k, 0))

    return model


def by_equation(mix: Mix) -> Model:
    def model(p: Any, x: Tensor) -> Tensor:
        equation = "ntd->tnd" if x.shape[1] > 3 else "ntd->ntd"
        back = "tnd->ntd" if x.shape[1] > 3 else "ntd->ntd"
        return energy(torch.einsum(back, mix(p, torch.einsum(equation, x))))

    return model


def restacked(mix: Mix) -> Model:
    def model(p: Any, x: Tensor) -> Tensor:
        k = int(x.shape[1] > 3)
        y = mix(p, torch.stack(x.unbind(k)))
        return energy(torch.stack(y.unbind(0), dim=k))

    return model


def raveled(mix: Mix) -> Model:
    """`ravel` folds two axes that `reshape` folds elsewhere."""

    def model(p: Any, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        if t > 3:
            rows = torch.ravel(x.transpose(0, 1)).view(-1, 4)
            return energy(mix(p, rows).view(t, n, -1).transpose(0, 1))
        rows = torch.reshape(x, (-1,)).view(-1, 4)
        return energy(mix(p, rows).view(n, t, -1).transpose(0, 0))

    return model


def viewed(mix: Mix) -> Model:
    """Both fold by `reshape`; a transpose comes before it, or none."""

    def model(p: Any, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        k = int(t > 3)
        rows = mix(p, x.transpose(0, k).reshape(n * t, 4))
        return energy(rows.reshape((*x.transpose(0, k).shape[:2], -1)).transpose(0, k))

    return model


def flattened(mix: Mix) -> Model:
    def model(p: Any, x: Tensor) -> Tensor:
        k = int(x.shape[1] > 3)
        turned = x.swapaxes(0, k)
        return energy(mix(p, turned.flatten(0, 1)).unflatten(0, turned.shape[:2]).swapaxes(0, k))

    return model


MODELS = [transposed, permuted, moved, by_equation, restacked, raveled, viewed, flattened]


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mix", [product, scale], ids=lambda f: f.__name__)
def test_axes_by_length(model: Callable[[Mix], Model], mix: Mix) -> None:
    """Right after short samples too, whatever the length: T = n and T = 2 n among them."""
    fn, params = model(mix), weights(w=(4, 5), s=(4,))
    for t, quantities in ((4, ESSENTIAL), (8, ("dots", "norms", "gram"))):
        case = Case(fn, params, draw(4, t), draw(2, 2), first=[draw(4, 3)])
        assert_right(case, quantities)


def rolled(p: Any, x: Tensor) -> Tensor:
    k = int(len(x) > 3)
    return energy(product(p, x.roll(k, 0)).roll(-k, 0))


def indexed(p: Any, x: Tensor) -> Tensor:
    order = torch.arange(len(x))
    order[: len(x) // 4 * 4] = order[: len(x) // 4 * 4].unflatten(0, (-1, 4)).flip(1).flatten()
    return energy(product(p, x[order])[order])


def halved(p: Any, x: Tensor) -> Tensor:
    parts = x.split(len(x) - 1 if len(x) > 3 else len(x))
    parts = parts[::-1]
    y = product(p, torch.cat(parts))
    sizes = [len(part) for part in parts]
    return energy(torch.cat(y.split(sizes)[::-1]))


@pytest.mark.parametrize("model", [rolled, indexed, halved], ids=lambda f: f.__name__)
def test_orders_by_number_of_samples(model: Model) -> None:
    params = weights(w=(4, 5))
    case = Case(model, params, draw(6, 2), draw(2, 2), first=[draw(3, 2)])
    assert_right_or_refused(case, gf.SampleAxisError, gf.CoupledSamplesError, gf.ControlFlowError)
