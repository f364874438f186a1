"""Faults that are planted in what a curvature reads: its second moments are proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from ghostfunc.curvature import _readers
from ghostfunc.curvature._readers import EigenvalueReader, VectorReader

Params = dict[str, Tensor]
Patch = pytest.MonkeyPatch


def energy(out: Tensor) -> Tensor:
    return (out.flatten(1) - 1).square().mean(1)


def plain(p: Params, x: Tensor) -> Tensor:
    return energy(torch.tanh(F.linear(x, p["w"], p["b"])))


def looked_up(p: Params, ids: Tensor) -> Tensor:
    return energy(torch.tanh(F.embedding(ids, p["w"]).cumsum(1)))


def twice(p: Params, x: Tensor) -> Tensor:
    return energy(F.linear(torch.tanh(F.linear(x, p["w"])), p["w"]))


def second(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Off by a percent."""
    return lambda *args, **kwargs: 1.01 * read(*args, **kwargs)


def use_by_use(self: EigenvalueReader, factors: Any) -> Tensor:
    """Squares of the uses, which are not those of their sum."""
    total: Tensor = sum(RIGHT(self, [f]) for f in factors)  # type: ignore[assignment]
    return total


def place_by_place(self: EigenvalueReader, factors: Any) -> Tensor:
    """Squares of every look-up, which are not those of a row that is looked up twice."""
    (f,) = factors
    x = f.b.flatten(0, 1) @ self.right[0]  # type: ignore[index]
    return x.new_zeros(self.block.rows, x.shape[1]).index_add(0, f.ids.flatten(), x.square())


RIGHT = EigenvalueReader.read_all
FAULTS: dict[str, tuple[Callable[[Patch], None], Any, tuple[int, ...], Tensor]] = {
    "a wrong vector": (
        lambda m: m.setattr(VectorReader, "read_all", second(VectorReader.read_all)),
        plain, (3, 4), torch.randn(7, 4).double(),
    ),
    "a wrong eigenvalue": (
        lambda m: m.setattr(EigenvalueReader, "_rank_one", second(EigenvalueReader._rank_one)),
        plain, (3, 4), torch.randn(7, 4).double(),
    ),
    "a wrong rotation": (
        lambda m: m.setattr(_readers, "rotated", second(_readers.rotated)),
        plain, (3, 4), torch.randn(7, 5, 4).double(),
    ),
    "uses that do not meet": (
        lambda m: m.setattr(EigenvalueReader, "read_all", use_by_use),
        twice, (4, 4), torch.randn(7, 4).double(),
    ),
    "look-ups that do not meet": (
        lambda m: m.setattr(EigenvalueReader, "_look_ups", place_by_place),
        looked_up, (4, 3), torch.randint(4, (7, 6)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, monkeypatch: Patch) -> None:
    plant, model, shape, batch = FAULTS[name]
    params = {"w": torch.randn(shape).double()}
    if model is plain:
        params["b"] = torch.randn(shape[0]).double()

    def fresh(p: Params, x: Tensor) -> Tensor:
        return model(p, x)  # type: ignore[no-any-return]

    gf.curvature.ekfac(fresh, params, [batch], fisher="empirical")

    def another(p: Params, x: Tensor) -> Tensor:
        return model(p, x)  # type: ignore[no-any-return]

    plant(monkeypatch)
    with pytest.raises(gf.GhostError, match="moments off by"):
        gf.curvature.ekfac(another, params, [batch], fisher="empirical")
