"""Losses of any scale: a wrong number is not taken for rounding noise, nor noise for a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import energy, weights
from torch import Generator, Tensor

import ghostfunc as gf
from ghostfunc._factors import pairs
from ghostfunc._rules.registry import RULES
from ghostfunc._taps.readings import DIRECTIONS, _direction

SCALES = [1e-30, 1e-12, 1e12]


def draw(n: int, t: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = Generator().manual_seed(n)
    return torch.randn(n, t, 4, generator=generator, dtype=torch.float64).to(dtype)


def scaled(scale: float) -> Callable[[Any, Tensor], Tensor]:
    return lambda p, x: scale * energy(torch.tanh(F.linear(x, p["w"], p["b"])))


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in weights(w=(5, 4), b=(5,)).items()}


def off_in_rule(patch: pytest.MonkeyPatch) -> None:
    rule = RULES[F.linear]
    fn = rule.fn
    wrong = replace(rule, fn=lambda b, *args, **kwargs: fn(1.0001 * b, *args, **kwargs))
    patch.setitem(RULES, F.linear, wrong)


def off_in_norms(patch: pytest.MonkeyPatch) -> None:
    right = pairs.sqnorms
    patch.setattr(pairs, "sqnorms", lambda *args, **options: 1.0001 * right(*args, **options))


ASKED: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "norms": lambda f, p, x: gf.ghost_norm(f, p, x),
    "steps": lambda f, p, x: gf.ghost_value_and_grad(f, p, x, x[:1]),
    "clipped": lambda f, p, x: gf.ghost_clipped_grad(f, p, x, max_norm=1.0),
    "kept": lambda f, p, x: gf.factored_grads(f, p, x).norms(),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("fault", "asked"),
    [*((off_in_rule, name) for name in ASKED), (off_in_norms, "kept"), (off_in_norms, "clipped")],
)
def test_a_fault_of_a_ten_thousandth(
    scale: float, fault: Callable[[pytest.MonkeyPatch], None], asked: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ASKED[asked](scaled(scale), parameters(), draw(7, 3))  # right without it
    fault(monkeypatch)
    with pytest.raises((gf.SampleAxisError, gf.VerificationError)):
        ASKED[asked](scaled(scale), parameters(), draw(7, 3))


@pytest.mark.parametrize("scale", SCALES)
def test_coupled_samples_at_any_scale(scale: float) -> None:
    def model(p: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x @ p["w"].t())
        return scale * energy(y - 1e-3 * y.mean(0) if x.shape[1] > 3 else y)

    gf.ghost_norm(model, parameters(), draw(8, 3))
    with pytest.raises((gf.CoupledSamplesError, gf.SampleAxisError)):
        gf.ghost_norm(model, parameters(), draw(8, 5))


@pytest.mark.parametrize("margin", [8.0, 14.0, 20.0])
@pytest.mark.parametrize("n", [2, 9])
def test_small_losses_that_are_differences_of_large_numbers(margin: float, n: int) -> None:
    """A fitted classifier in float32: losses and gradients are little more than rounding."""

    def model(p: Any, x: Tensor) -> Tensor:
        logits = F.linear(x, p["w"], p["b"])
        sure = margin * F.one_hot(torch.zeros(x.shape[:2], dtype=torch.long), 5)
        return F.cross_entropy(
            (logits + sure).mT, torch.zeros(x.shape[:2]).long(), reduction="none"
        ).mean(1)

    params = parameters(torch.float32)
    params["w"] = 0.1 * params["w"]
    for t in (1, 3, 16):
        x = draw(n, t, torch.float32)
        for ask in ASKED.values():
            ask(model, params, x)
        assert bool(gf.ghost_norm(model, params, x).isfinite().all())


@pytest.mark.parametrize("size", [1, 2, 4, 6])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_of_equal_elements_are_moved_along_themselves(size: int, sign: float) -> None:
    """What is compared along a gradient has to see how far rounding moves it there."""
    g = torch.full((3, size), sign, dtype=torch.float64)
    for k in range(DIRECTIONS):
        moved = _direction(k, g)
        torch.testing.assert_close(moved.norm(dim=1), torch.ones(3, dtype=torch.float64))
        assert float((moved * g).sum(1).abs().min()) > 0.01 * size**0.5


@pytest.mark.parametrize("seed", range(24))
def test_a_scale_that_a_norm_takes_out_again(seed: int) -> None:
    """Its gradients are as small as the norm's `eps`, and have few digits."""

    def model(p: Any, x: Tensor) -> Tensor:
        h = (x @ p["w"]) * p["s"]
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-13)
        return ((h - 1) @ p["v"]).square().sum(-1)

    generator = Generator().manual_seed(seed)
    shapes = {"w": (4, 6), "s": (), "v": (6, 3), "x": (5, 4)}
    params = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    x = params.pop("x")
    norms = gf.ghost_norm(model, params, x, per_param=True)
    exact = gf.ghost_norm(model, params, x, per_param=True, mode="materialized")
    for name in ("w", "v"):
        torch.testing.assert_close(norms[name], exact[name])
    assert float(norms["s"].max()) < 1e-5 < float(norms["w"].max())
