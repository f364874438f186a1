"""`check_quantity` passes what is right and names what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import ghostfunc as gf
from ghostfunc.testing import check_quantity


@pytest.mark.parametrize(
    ("quantity", "definition"),
    [
        (gf.SqNorm(), lambda g: g.flatten(1).square().sum(1)),
        (gf.SampleGrad(), lambda g: g),
        (gf.Gram(), lambda g: g.flatten(1) @ g.flatten(1).mT),
        (gf.Gram(workspace=3), lambda g: g.flatten(1) @ g.flatten(1).mT),
    ],
)
def test_own_quantities(quantity: gf.Quantity, definition: Callable[[Tensor], Tensor]) -> None:
    check_quantity(quantity, definition)


class Largest(gf.Quantity):
    """`max |g_i|`, right as long as the factors of all uses come together."""

    degree = 2

    def shape(self, n: int, param: tuple[int, ...]) -> tuple[int, ...]:
        return (n,)

    def value(self, factors: Sequence[gf.Dense], param: tuple[int, ...]) -> Tensor:
        g = sum(gf.materialize(f).flatten(1) for f in factors)
        return g.abs().amax(1)


def largest(g: Tensor) -> Tensor:
    return g.flatten(1).abs().amax(1)


def test_a_quantity_of_ones_own() -> None:
    check_quantity(Largest(), largest)


class OneByOne(Largest):
    """Read use by use and added up: wrong for a parameter that is used twice."""

    degree = 1


class LinearPart(Largest):
    """The first of the uses alone."""

    def value(self, factors: Sequence[gf.Dense], param: tuple[int, ...]) -> Tensor:
        return super().value(factors[:1], param)


class WrongShape(Largest):
    """One number too many."""

    def shape(self, n: int, param: tuple[int, ...]) -> tuple[int, ...]:
        return (n, 1)

    def value(self, factors: Sequence[gf.Dense], param: tuple[int, ...]) -> Tensor:
        return super().value(factors, param)[:, None]


class FirstRow(gf.Quantity):
    """`sum_c g_i[0, c]`, which a transpose does not leave as it is, said to be left as it is."""

    degree = 1
    same_for_transpose = True

    def shape(self, n: int, param: tuple[int, ...]) -> tuple[int, ...]:
        return (n,)

    def value(self, factors: Sequence[gf.Dense], param: tuple[int, ...]) -> Tensor:
        return sum(
            gf.materialize(f).reshape(len(f[0]), f.shape[0], -1)[:, 0].sum(1) for f in factors
        )


@pytest.mark.parametrize(
    ("quantity", "definition", "said"),
    [
        (OneByOne(), largest, "tied, n = 1, parameter 'e'"),
        (OneByOne(), largest, "used twice"),
        (LinearPart(), largest, "off by"),
        (WrongShape(), largest, r"shape \(1, 1\), defined as \(1,\)"),
        (FirstRow(), lambda g: g.reshape(*g.shape[:2], -1)[:, 0].sum(1), "tied"),
    ],
)
def test_what_is_wrong_is_named(
    quantity: gf.Quantity, definition: Callable[[Tensor], Tensor], said: str
) -> None:
    with pytest.raises(gf.VerificationError, match=said):
        check_quantity(quantity, definition)


def test_a_class_that_lacks_a_method() -> None:
    class Nothing(gf.Quantity):
        degree = 1

    with pytest.raises(NotImplementedError, match=r"Nothing must define (shape|value)\("):
        gf.ghost_vjp(lambda p, x: x @ p, torch.ones(2), torch.ones(3, 2), Nothing())
