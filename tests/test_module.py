"""A module lends its parameters and has them back; what cannot lend them is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ghostfunc as gf


class Twice(nn.Module):
    """One layer under two names, in a list as well, and a dict of parameters shared by two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.norm = nn.BatchNorm1d(3)
        self.layers = nn.ModuleList([self.first, self.norm, self.norm])
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(3))})
        self.shared = nn.Module()
        self.shared.scales = self.scales

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).tanh()) * self.shared.scales["a"]
        return self.layers[2](self.layers[0](y)) * self.scales["a"]


def loss(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().sum(1)


def test_a_layer_under_several_names_has_its_own_parameters_back() -> None:
    module = Twice().double().eval()
    held = [*module.named_parameters(), *module.named_buffers()]
    model_fn, params = gf.from_module(module, loss)
    x = torch.randn(4, 3, dtype=torch.float64)
    norms = gf.ghost_norm(model_fn, params, x)
    again = [*module.named_parameters(), *module.named_buffers()]
    assert [k for k, _ in again] == [k for k, _ in held]
    assert all(a is b for (_, a), (_, b) in zip(again, held, strict=True))
    for i in range(4):
        grads = torch.autograd.grad(loss(module, x[i : i + 1]).sum(), list(module.parameters()))
        expected = torch.cat([g.flatten() for g in grads]).norm()
        torch.testing.assert_close(norms[i], expected)


def test_what_an_optimizer_holds_is_trained() -> None:
    module = Twice().eval()
    model_fn, params = gf.from_module(module, loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(4, 3)
    before = model_fn(params, x)
    step = gf.ghost_value_and_grad(model_fn, params, x, x)
    gf.accumulate_grads(module, step.grads)
    optimizer.step()
    assert (model_fn(params, x) - before).abs().min() > 1e-4
    torch.testing.assert_close(model_fn(params, x), loss(module, x))


def compiled_in_place() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].compile()
    return module


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.compile(nn.Linear(3, 3)), r"compiled\._orig_mod"),
        (lambda: nn.Sequential(torch.compile(nn.Linear(3, 3))), "'0' in Sequential has been"),
        (compiled_in_place, "'1' in Sequential has been compiled"),
    ],
)
def test_compiled_modules_are_refused_at_once(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(gf.ParamsError, match=said):
        gf.from_module(make(), loss)
