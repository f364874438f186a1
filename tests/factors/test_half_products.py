"""Products of factors in half precision, as a GPU makes them; a stand-in for it here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghostfunc._factors import contract, matmul, pairs
from ghostfunc._factors.factor import OneHot, Outer

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A device that adds products of half-precision numbers up in float32; what it was given."""
    given: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def product(x: Tensor, y: Tensor) -> Tensor:
        assert x.dtype is y.dtype
        assert x.dtype in HALVES
        given.append((tuple(x.shape), tuple(y.shape)))
        return x.float() @ y.float()

    monkeypatch.setattr(matmul, "_has_wide_sums", lambda x: True)
    monkeypatch.setattr(matmul, "_mm", product)
    monkeypatch.setattr(matmul, "_bmm", product)
    return given


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("left", "right", "met"),
    [
        ((4, 5), (5, 6), ((4, 5), (5, 6))),
        ((2, 4, 5), (2, 5, 6), ((2, 4, 5), (2, 5, 6))),
        ((2, 4, 5), (5, 6), ((8, 5), (5, 6))),
    ],
)
def test_halves_are_multiplied_as_they_are(
    multiplied: list[Any], dtype: torch.dtype, left: Any, right: Any, met: Any
) -> None:
    x, y = torch.randn(left).to(dtype), torch.randn(right).to(dtype)
    out = matmul.matmul(x, y)
    assert multiplied == [met]
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, x.float() @ y.float())


def test_other_operands_are_widened(multiplied: list[Any]) -> None:
    half, single = torch.randn(4, 4).bfloat16(), torch.randn(4, 4)
    for x, y in ((half, single), (single, half), (single, single), (half, half.half())):
        torch.testing.assert_close(matmul.matmul(x, y), x.float() @ y.float())
    matmul.matmul(half.requires_grad_(), half)  # a derivative is wanted, which torch has not
    assert multiplied == []


def test_contractions_of_factors_hand_over_halves(multiplied: list[Any]) -> None:
    left, right = (torch.randn(3, 4, size).bfloat16() for size in (5, 6))
    f, g = Outer(left, right), Outer(left[:2].float(), right[:2].float())
    whole = Outer(left.float(), right.float())
    torch.testing.assert_close(contract.total(f), contract.total(whole))
    into = torch.ones(5, 6)
    contract.add_total(f, into)
    torch.testing.assert_close(into, contract.total(whole) + 1)
    torch.testing.assert_close(contract.materialize(f), contract.materialize(whole))
    assert multiplied == [((5, 12), (12, 6)), ((5, 12), (12, 6)), ((3, 5, 4), (3, 4, 6))]
    halves = Outer(left[:2], right[:2])
    torch.testing.assert_close(pairs.pair_dots(f, halves), pairs.pair_dots(whole, g))
    assert multiplied[3:] == [((12, 5), (5, 8)), ((12, 6), (6, 8))]
    ids = torch.randint(5, (3, 4))
    pairs.pair_dots(OneHot(ids, right, 5), OneHot(ids, right, 5))
    assert len(multiplied) == 6


def test_processors_widen() -> None:
    x = torch.randn(4, 4).bfloat16()
    assert not matmul._as_they_are(x, x)
