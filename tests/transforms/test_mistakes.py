"""Calls that are always a mistake raise, and say which argument is meant and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf


def loss(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().sum(1)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


BATCH = torch.randn(4, 3)

CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "scores": lambda fn, p: gf.ghost_dot_prod(fn, p, BATCH, BATCH),
    "a step": lambda fn, p: gf.ghost_value_and_grad(fn, p, BATCH, BATCH),
    "norms": lambda fn, p: gf.ghost_norm(fn, p, BATCH),
    "gram": lambda fn, p: gf.ghost_gram(fn, p, BATCH),
    "clipped": lambda fn, p: gf.ghost_clipped_grad(fn, p, BATCH, max_norm=1.0),
    "a direction": lambda fn, p: gf.direction(fn, p, BATCH),
    "materialized": lambda fn, p: gf.ghost_norm(fn, p, BATCH, mode="materialized"),
    "jvp": lambda fn, p: gf.ghost_dot_prod(fn, p, BATCH, BATCH, mode="jvp"),
    "factors": lambda fn, p: gf.factored_grads(fn, p, BATCH),
}


def under_no_grad(p: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(x, p["weight"], p["bias"]).square().sum(1)


UNREACHED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no_grad": under_no_grad,
    "detached": lambda p, x: F.linear(x, p["weight"]).square().sum(1).detach(),
    "not used": lambda p, x: x.square().sum(1),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", UNREACHED)
def test_losses_that_no_parameter_reaches(net: nn.Module, model: str, call: str) -> None:
    params = {name: p.detach() for name, p in net.named_parameters()}
    with pytest.raises(gf.UntrackedUseError, match="No parameter reaches the losses"):
        CALLS[call](UNREACHED[model], params)


def test_one_parameter_that_is_reached_is_enough(net: nn.Module) -> None:
    params = {name: p.detach() for name, p in net.named_parameters()}
    norms = gf.ghost_norm(lambda p, x: (x @ p["weight"].mT).sum(1), params, BATCH, per_param=True)
    assert torch.equal(norms["bias"], torch.zeros(4))


@pytest.mark.parametrize("call", CALLS)
def test_a_module_in_place_of_a_function(net: nn.Module, call: str) -> None:
    with pytest.raises(gf.OptionError, match=r"Linear, a module: .* gf\.from_module"):
        CALLS[call](net, dict(net.named_parameters()))
    with pytest.raises(gf.OptionError, match="model_fn is a str"):
        CALLS[call]("net", dict(net.named_parameters()))


@pytest.mark.parametrize("call", CALLS)
def test_params_of_another_kind(net: nn.Module, call: str) -> None:
    model_fn, params = gf.from_module(net, loss)
    with pytest.raises(gf.ParamsError, match=r"params is a list; .* dict from the names of Linear"):
        CALLS[call](model_fn, list(params.values()))
    with pytest.raises(gf.ParamsError, match=r"names that Linear does not: \['head'\]"):
        CALLS[call](model_fn, {**params, "head": torch.ones(2)})


def test_an_integer_direction(net: nn.Module) -> None:
    model_fn, params = gf.from_module(net, loss)
    u = {name: torch.ones(x.shape, dtype=torch.int64) for name, x in params.items()}
    with pytest.raises(gf.ParamsError, match=r"direction leaf 'bias' has dtype torch\.int64"):
        gf.ghost_dot_prod(model_fn, params, BATCH, direction={**params, "bias": u["bias"]})
    with pytest.raises(gf.ParamsError, match="expected a floating-point dtype"):
        gf.ghost_vjp(model_fn, params, BATCH, gf.Dot(u))


def test_a_step_in_place_of_its_gradient(net: nn.Module) -> None:
    model_fn, params = gf.from_module(net, loss)
    step = gf.ghost_value_and_grad(model_fn, params, BATCH, BATCH)
    with pytest.raises(gf.ParamsError, match=r"grads is a GhostStep; .* the field grads"):
        gf.accumulate_grads(net, step)
    assert net.weight.grad is None


def test_a_projection_by_its_name(net: nn.Module) -> None:
    model_fn, params = gf.from_module(net, loss)
    with pytest.raises(gf.OptionError, match=r"kronecker_projection\(\.\.\.\) makes, not a str"):
        gf.ghost_project(model_fn, params, BATCH, "gaussian")
