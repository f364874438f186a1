"""An ordinary loop with scores trains as it would without them."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import assert_close
from problems import NanoGPT, TiedLM, next_token, tokens
from torch import nn

import ghostfunc as gf


def loss(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return next_token(module(ids), ids)


@pytest.mark.parametrize("module_class", [TiedLM, NanoGPT])
def test_fifty_steps_with_scores_are_fifty_plain_steps(module_class: type[nn.Module]) -> None:
    """float32, two micro-batches of unequal sizes, clipping, AdamW, a schedule, a frozen layer."""
    torch.manual_seed(0)
    plain = module_class()
    next(iter(plain.parameters())).requires_grad_(module_class is TiedLM)
    scored = copy.deepcopy(plain)
    start = copy.deepcopy(plain.state_dict())
    model_fn, params = gf.from_module(scored, loss)
    draw = tokens(9)
    state = gf.shapley.init()
    runs = []
    for module in (plain, scored):
        # Adam divides by the gradient's size: `eps` keeps it from dividing noise by noise.
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, eps=1e-4)
        runs.append((optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=50)))
    for step in range(50):
        generator = torch.Generator().manual_seed(step)
        batches, val = [draw(3, 6, generator), draw(2, 5, generator)], draw(2, 5, generator)
        for module, (optimizer, schedule) in zip((plain, scored), runs, strict=True):
            optimizer.zero_grad()
            for batch in batches:
                if module is plain:
                    (loss(plain, batch).sum() / 5).backward()
                else:
                    out = gf.shapley.step(
                        model_fn,
                        params,
                        batch,
                        {"val": val},
                        optimizer=gf.shapley.from_optimizer(optimizer, scored),
                        form="previous_state",
                        weight=1 / 5,
                    )
                    gf.accumulate_grads(scored, out.grads)
                    state = gf.shapley.update(state, range(len(batch)), out.values)
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            schedule.step()
    assert_close(scored.state_dict(), plain.state_dict(), 1e-6, floor=1.0)
    assert any((start[k] - v).abs().max() > 0.05 for k, v in plain.state_dict().items())
    assert int(gf.shapley.finalize(state).counts.sum()) == 250


def test_a_loss_scaler_and_its_skipped_step() -> None:
    torch.manual_seed(0)
    module = TiedLM()
    model_fn, params = gf.from_module(module, loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ids = tokens(9)(4, 5, torch.Generator().manual_seed(0))
    before = copy.deepcopy(module.state_dict())
    scaler.scale(torch.zeros(()))  # makes its state
    plain = gf.shapley.step(model_fn, params, ids, {"v": ids}, optimizer=gf.shapley.sgd(lr=0.1))
    for spoil in (True, False):
        scale = scaler.get_scale()
        out = gf.shapley.step(
            model_fn,
            params,
            ids,
            {"v": ids},
            optimizer=gf.shapley.sgd(lr=0.1),
            loss_scale=scale,
        )
        assert torch.equal(out.values, plain.values)
        gf.accumulate_grads(module, out.grads, weight=scale * (torch.inf if spoil else 1.0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (scaler.get_scale() < scale) == spoil
        moved = {k: v - before[k] for k, v in module.state_dict().items()}
        assert any(x.any() for x in moved.values()) != spoil
    named = dict(module.named_parameters())
    for name, grad in out.grads.items():
        assert_close(named[name].detach(), before[name] - 0.1 * grad, 1e-6)


def test_gradients_are_added_as_backward_adds_them() -> None:
    module = nn.Linear(3, 2)
    grads = {k: torch.ones_like(p) for k, p in module.named_parameters()}
    for _ in range(2):
        gf.accumulate_grads(module, grads, weight=0.5)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())
    gf.accumulate_grads(module, grads)
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in module.parameters())
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads.values())


def test_gradients_that_do_not_belong() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    grads = {k: torch.ones_like(p) for k, p in module.named_parameters()}
    module[0].requires_grad_(False)
    with pytest.raises(gf.ParamsError, match=r"not among them: \['0.bias', '0.weight'\]"):
        gf.accumulate_grads(module, grads)
    del grads["0.bias"], grads["0.weight"], grads["1.bias"]
    with pytest.raises(gf.ParamsError, match=r"Missing: \['1.bias'\]"):
        gf.accumulate_grads(module, grads)
    grads["1.bias"] = torch.ones(3)
    with pytest.raises(gf.ParamsError, match=r"'1.bias' has shape \(3,\); .* is \(2,\)"):
        gf.accumulate_grads(module, grads)
    assert all(p.grad is None for p in module.parameters())
