"""Training with ghost steps is plain training, and no call leaves a trace behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_close, random_direction
from problems import CASES, NanoGPT, TiedLM, features, mlp, next_token, tokens
from torch import nn

import ghostfunc as gf

# Adam divides by the gradient's size: its `eps` keeps it from dividing noise by noise where the
# gradient is zero (key biases).
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-6),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("module_class", [TiedLM, NanoGPT])
def test_ten_steps(module_class: type[nn.Module], optimizer: str) -> None:
    torch.manual_seed(0)
    plain = module_class().double()
    ghost = copy.deepcopy(plain)
    model_fn, params = gf.from_module(ghost, lambda m, ids: next_token(m(ids), ids))
    plain_optimizer = OPTIMIZERS[optimizer](plain.parameters())
    ghost_optimizer = OPTIMIZERS[optimizer](ghost.parameters())
    start = copy.deepcopy(plain.state_dict())
    draw = tokens(9)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        train, val = draw(3 + step % 3, 4 + step % 4, generator), draw(2, 5, generator)

        plain_optimizer.zero_grad()
        losses = next_token(plain(train), train)
        losses.mean().backward()
        plain_optimizer.step()

        out = gf.ghost_value_and_grad(model_fn, params, train, val)
        assert_close(out.losses, losses.detach(), 1e-10)
        for name, p in ghost.named_parameters():
            p.grad = out.grads[name]
        ghost_optimizer.step()
    assert_close(ghost.state_dict(), plain.state_dict(), 1e-10)
    assert any((start[k] - v).abs().max() > 0.01 for k, v in plain.state_dict().items())


def test_params_follow_the_module() -> None:
    """`params` are the module's memory: after a step, the next call sees the new weights."""
    problem = mlp()
    module, (train, val) = problem.model_fn.module, (problem.batch(3), problem.batch(2, seed=1))
    before = gf.ghost_dot_prod(problem.model_fn, problem.params, train, val)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    after = gf.ghost_dot_prod(problem.model_fn, problem.params, train, val)
    fresh = gf.from_module(module, problem.model_fn._bound.loss)
    assert not torch.allclose(before, after)
    assert_close(after, gf.ghost_dot_prod(*fresh, train, val), 1e-12)


# --- nothing is left behind -------------------------------------------------------------------

Call = Callable[[Any, Any, Any, Any], Any]

CALLS: dict[str, Call] = {
    "dot_prod": gf.ghost_dot_prod,
    "dot_prod_none": lambda f, p, t, v: gf.ghost_dot_prod(f, p, t, v, reduction="none"),
    "dot_prod_jvp": lambda f, p, t, v: gf.ghost_dot_prod(f, p, t, v, mode="jvp"),
    "dot_prod_materialized": lambda f, p, t, v: gf.ghost_dot_prod(f, p, t, v, mode="materialized"),
    "value_and_grad": gf.ghost_value_and_grad,
    "per_sample_grads": lambda f, p, t, v: gf.per_sample_grads(f, p, t),
    "per_sample_grads_loop": lambda f, p, t, v: gf.per_sample_grads(f, p, t, vectorize=False),
    "per_sample_grads_ghost": lambda f, p, t, v: gf.per_sample_grads(f, p, t, mode="ghost"),
    "direction": lambda f, p, t, v: gf.direction(f, p, v),
    "ghost_vjp": lambda f, p, t, v: gf.ghost_vjp(f, p, t, gf.Dot(random_direction(p)), grads=True),
    "verify": gf.verify,
}


def footprint(module: nn.Module) -> list[Any]:
    """Everything a careless library might leave on a module."""
    return [
        (name, sorted(vars(m)), m.training, len(m._forward_hooks), len(m._backward_hooks))
        for name, m in module.named_modules()
    ] + [
        (name, id(p), p._version, p.requires_grad, p.grad is None, sorted(vars(p)))
        for name, p in module.named_parameters()
    ]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", ["tied_lm", "nanogpt", "frozen_first_layer", "buffers"])
def test_the_module_is_untouched(case: str, call: str) -> None:
    problem = CASES[case]()
    module, (train, val) = problem.model_fn.module, (problem.batch(3), problem.batch(2, seed=1))
    state, marks = copy.deepcopy(module.state_dict()), footprint(module)
    batches, rng = [train.clone(), val.clone()], torch.get_rng_state()
    modes = torch.is_grad_enabled(), torch._C._len_torch_function_stack()

    CALLS[call](problem.model_fn, problem.params, train, val)

    assert footprint(module) == marks
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip(batches, [train, val], strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert (torch.is_grad_enabled(), torch._C._len_torch_function_stack()) == modes


@pytest.mark.parametrize("call", CALLS)
def test_gradients_of_the_user_stay(call: str) -> None:
    problem = CASES["mlp"]()
    module, (train, val) = problem.model_fn.module, (problem.batch(3), problem.batch(2, seed=1))
    module(train).sum().backward()
    own = {name: p.grad.clone() for name, p in module.named_parameters()}
    CALLS[call](problem.model_fn, problem.params, train, val)
    assert all(torch.equal(p.grad, own[name]) for name, p in module.named_parameters())


def test_a_failed_call_leaves_nothing_behind() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    model_fn, params = gf.from_module(net, lambda m, x: m(x).square().mean(1))
    x = features(4)(4, 1, torch.Generator().manual_seed(0))
    marks, depth = footprint(net), torch._C._len_torch_function_stack()
    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_dot_prod(model_fn, params, x, x)
    assert footprint(net) == marks
    assert torch._C._len_torch_function_stack() == depth


@pytest.mark.parametrize("call", CALLS)
def test_inference_mode_is_refused(call: str) -> None:
    """Torch records nothing there, whatever is asked."""
    problem = CASES["tied_lm"]()
    train, val = problem.batch(3), problem.batch(2, seed=1)
    with torch.inference_mode(), pytest.raises(gf.TransformError, match="inference_mode"):
        CALLS[call](problem.model_fn, problem.params, train, val)


@pytest.mark.parametrize("call", CALLS)
def test_the_callers_grad_mode_does_not_matter(call: str) -> None:
    """Evaluation code runs under `no_grad`; what is asked for here is a derivative all the same."""

    outcomes = []
    for mode in (torch.no_grad, torch.enable_grad):
        problem = CASES["tied_lm"]()
        train, val = problem.batch(3), problem.batch(2, seed=1)
        with mode():
            outcomes.append(CALLS[call](problem.model_fn, problem.params, train, val))
    assert str(outcomes[0]) == str(outcomes[1])
