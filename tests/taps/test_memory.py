"""Scoring never forms a gradient of every sample, nor anything as large as that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from compare import leaves_of
from problems import NanoGPT, Problem, TiedLM, energy, language_model, sequences, weights
from torch import Tensor, nn

import ghostfunc as gf


def wide_mlp() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["v"]))

    return Problem(model_fn, weights(w=(128, 64), b=(128,), v=(64, 128)), sequences(64))


def one_layer_three_times() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(x @ p["w"])
        return energy(x)

    return Problem(model_fn, weights(w=(128, 128)), sequences(128))


def derived_weights() -> Problem:
    """A packed projection, a masked weight and a LoRA merge: samples meet derived tensors."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        q, k = p["packed"].chunk(2)
        x = F.linear(x, q) * F.linear(x, k)
        return energy(F.linear(x @ (p["masked"] * 2), p["base"] + p["b"] @ p["a"]))

    shapes = {"packed": (128, 64), "masked": (64, 64), "base": (64, 64), "b": (64, 4), "a": (4, 64)}
    return Problem(model_fn, weights(**shapes), sequences(64))


MODELS: dict[str, Callable[[], Problem]] = {
    "mlp": wide_mlp,
    "tied_lm": lambda: language_model(TiedLM(vocabulary=256, d=64), 256),
    "nanogpt": lambda: language_model(NanoGPT(vocabulary=64, d=64), 64),
    "one_layer_three_times": one_layer_three_times,
    "derived_weights": derived_weights,
}
CALLS: dict[str, Callable[..., Any]] = {
    "mean": gf.ghost_dot_prod,
    "none": lambda *args: gf.ghost_dot_prod(*args, reduction="none"),
    "per_param": lambda *args: gf.ghost_dot_prod(*args, per_param=True),
    "along_a_direction": lambda f, p, train, val: gf.ghost_dot_prod(f, p, train, direction=p),
    "value_and_grad": gf.ghost_value_and_grad,
    "value_and_grad_none": lambda *args: gf.ghost_value_and_grad(*args, reduction="none"),
}


def growth(problem: Problem, call: Callable[..., Any]) -> tuple[float, float]:
    """Peak memory one more sample takes, and the largest tensor, in sizes of the model."""
    model = sum(x.nbytes for x in leaves_of(problem.params))
    peaks = {}
    for n in (4, 20):
        train, val = problem.batch(n, 2), problem.batch(n, 2, seed=1)
        # A first call traces the model: on the same few samples whatever n.
        call(problem.model_fn, problem.params, train, val)
        with Allocations(problem.params, train, val) as log:
            call(problem.model_fn, problem.params, train, val)
        peaks[n] = log.peak
    return (peaks[20] - peaks[4]) / 16 / model, log.largest / model


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", MODELS)
def test_ghost_mode_forms_no_gradient_per_sample(model: str, call: str) -> None:
    per_sample, largest = growth(MODELS[model](), CALLS[call])
    assert per_sample < 0.25
    assert largest <= 1


@pytest.mark.parametrize("model", MODELS)
def test_the_measurement_sees_materialized_gradients(model: str) -> None:
    per_sample, largest = growth(
        MODELS[model](), lambda *args: gf.ghost_dot_prod(*args, mode="materialized")
    )
    assert per_sample > 1
    assert largest > 4


def test_the_measurement_counts_what_is_alive() -> None:
    with Allocations() as log:
        for _ in range(3):
            x = torch.ones(100)  # at most two at a time: the old one and the new
        del x
        held = [torch.ones(50).double(), torch.ones(50)[:10]]
    assert log.alive == 50 * 8 + 50 * 4
    assert log.largest == 400
    assert log.peak == 800
    assert len(held) == 2


@pytest.mark.parametrize("call", ["scores", "norms", "clipped"])
def test_a_first_call_holds_few_gradients_as_large_as_the_model(call: str) -> None:
    """It traces and proves: whole gradients are compared one after the other, in pieces."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40_000, 32, generator=generator)
    ids = torch.randint(40_000, (8, 3), generator=generator)

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return F.embedding(x, p["table"]).tanh().square().sum((1, 2))

    params = {"table": table}
    calls: dict[str, Callable[[], Any]] = {
        "scores": lambda: gf.ghost_dot_prod(model_fn, params, ids[:6], ids[6:]),
        "norms": lambda: gf.ghost_norm(model_fn, params, ids),
        "clipped": lambda: gf.ghost_clipped_grad(model_fn, params, ids, max_norm=1.0),
    }
    with Allocations(params, ids) as memory:
        calls[call]()
    models = memory.peak / (table.numel() * table.element_size())
    assert models < 6


def test_a_trace_takes_little_more_than_a_plain_step() -> None:
    """Three of four samples run three times: what a run has made is gone when the next begins."""
    net = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(16, 16), nn.GELU())])
    model_fn, params = gf.from_module(net, lambda module, x: module(x).square().mean((1, 2)))
    x = torch.randn(4, 2000, 16)
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with Allocations(x, params) as plain:
        torch.autograd.grad(model_fn(leaves, x).sum(), list(leaves.values()))
    with Allocations(x, params) as first:
        gf.ghost_norm(model_fn, params, x)
    assert first.peak < 1.25 * plain.peak
