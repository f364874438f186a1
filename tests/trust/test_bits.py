"""Weights seen as other dtypes: what autograd holds constant counts for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import GHOST, Case, assert_refused, assert_right
from problems import energy, features, weights
from torch import Generator, Tensor

import ghostfunc as gf


def case_of(model: Callable[[Any, Tensor], Tensor], params: Any) -> Case:
    draw = features(4)
    batches = (draw(n, 1, Generator().manual_seed(n)) for n in (3, 2))
    return Case(model, params, *batches)


def halves_of_the_bits(p: Any, x: Tensor) -> Tensor:
    """Float64 as pairs of float32: finite, and of no derivative."""
    bits = p["w"].view(torch.float32)[..., 1::2].double()
    return energy(x @ (p["w"] + 0.5 * bits))


def signs(p: Any, x: Tensor) -> Tensor:
    negative = (p["w"].view(torch.int64) < 0).double()
    return energy(x @ (p["w"] * (1 - 2 * negative)))


def there_and_back(p: Any, x: Tensor) -> Tensor:
    again = p["w"].view(torch.int64).view(torch.float64)
    return energy(x @ (p["w"].tanh() + again))


def by_keyword(p: Any, x: Tensor) -> Tensor:
    bits = p["w"].view(dtype=torch.float32)[..., 1::2].double()
    return energy(x @ (p["w"] + bits))


def same_dtype(p: Any, x: Tensor) -> Tensor:
    return energy(x @ (p["w"] + p["w"].view(torch.float64)))


def of_a_derived_tensor(p: Any, x: Tensor) -> Tensor:
    bits = (2 * p["w"]).contiguous().view(torch.float32)[..., 1::2].double()
    return energy(F.linear(x, p["w"].t() + bits.t()))


@pytest.mark.parametrize(
    "model",
    [halves_of_the_bits, signs, there_and_back, by_keyword, same_dtype, of_a_derived_tensor],
    ids=lambda f: f.__name__,
)
def test_view_as_another_dtype(model: Callable[[Any, Tensor], Tensor]) -> None:
    assert_right(case_of(model, weights(w=(4, 6))))


def test_real_pairs_seen_as_complex_numbers() -> None:
    """This view autograd does know."""

    def model(p: Any, x: Tensor) -> Tensor:
        return energy(x @ torch.view_as_real(torch.view_as_complex(p["w"]) * 2j).flatten(1))

    assert_right(case_of(model, weights(w=(4, 3, 2))))


def test_complex_parameters_are_called_complex() -> None:
    params = {"w": torch.randn(4, 6, dtype=torch.complex128)}
    case = case_of(lambda p, x: energy((x.to(torch.complex128) @ p["w"]).abs()), params)
    assert_refused(case, gf.ParamsError, GHOST)
    with pytest.raises(gf.ParamsError, match="complex"):
        gf.ghost_dot_prod(case.model_fn, case.params, case.train, case.val)
