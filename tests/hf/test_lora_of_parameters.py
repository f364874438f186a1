"""LoRA of single parameters (PEFT's `target_parameters`), as experts have them: a parametrization
that is registered, and removed, in every forward pass."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

import ghostfunc as gf
from tests.every_quantity import loop


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.w = nn.Linear(6, 3), nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ntd,edf,nte->ntf", x, self.w, self.router(x).softmax(-1))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("up", nn.Linear(4, 6))
    model.add_module("experts", Experts())
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.w"])
    model = peft.get_peft_model(model, config).double()
    for name, x in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(x)
    return model


@pytest.mark.parametrize("mode", ["ghost", "materialized"])
def test_scores(mode: Any) -> None:
    model_fn, params = gf.from_module(adapted(), lambda m, x: m(x).square().mean((1, 2)))
    x, v = (torch.randn(n, 5, 4, dtype=torch.float64) for n in (4, 2))
    rows, others = (torch.cat([g.flatten(1) for g in loop(model_fn, params, b)], 1) for b in (x, v))
    for _ in range(2):
        got = gf.ghost_dot_prod(model_fn, params, x, v, mode=mode)
        assert_close(got, rows @ others.mean(0), 1e-10)
    if mode == "ghost":
        assert_close(gf.ghost_norm(model_fn, params, x), rows.norm(dim=1), 1e-10)
        u = torch.cat([g.flatten() for g in gf.direction(model_fn, params, v).values()])
        assert_close(u, others.mean(0), 1e-10)


def test_a_write_of_other_memory_is_refused() -> None:
    """`set_` changes nothing only where it gives a tensor the memory that it has."""
    other = torch.randn(3, 4)

    def writes(params: dict[str, Tensor], x: Tensor) -> Tensor:
        x.set_(other)
        return (x @ params["w"]).square()

    with pytest.raises(gf.InPlaceError, match="its batch"):
        gf.ghost_norm(writes, {"w": torch.randn(4)}, torch.randn(3, 4))
