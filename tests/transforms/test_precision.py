"""Half precision, autocast, and scaled losses, against float64."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from precision import (
    HALF,
    SETTINGS,
    SUMS,
    Setting,
    exact_language_model,
    language_model,
    relative,
    tokens,
)
from torch import Tensor

import ghostfunc as gf

# The models' own passes limit these: float16 has 8 times the digits of bfloat16.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@functools.cache
def truth(setting: Setting) -> tuple[Tensor, Tensor]:
    """Scores and norms in float64, of the same rounded parameters."""
    x = exact_language_model(setting)
    train, val = tokens(6, 0), tokens(3, 1)
    grads = gf.per_sample_grads(*x, train, vectorize=False)
    u = gf.direction(*x, val)
    dots = sum((g.flatten(1) @ u[k].flatten() for k, g in grads.items()), torch.zeros(6).double())
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    return dots, norms


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_language_model(setting: Setting) -> None:
    x = language_model(setting)
    train, val = tokens(6, 0), tokens(3, 1)
    dots, norms = truth(setting)
    tolerance = TOLERANCE[setting.autocast or setting.parameters]
    got = {
        "ghost": gf.ghost_dot_prod(*x, train, val),
        "pairs": gf.ghost_dot_prod(*x, train, val, reduction="none").mean(1),
        "step": gf.ghost_value_and_grad(*x, train, val).dot_prods,
        "jvp": gf.ghost_dot_prod(*x, train, val, mode="jvp"),
    }
    wide = torch.float64 if setting.parameters == torch.float64 else torch.float32
    for way, found in got.items():
        assert found.dtype == wide, way
        assert relative(found, dots) < tolerance, way
    assert relative(gf.ghost_norm(*x, train), norms) < tolerance


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", SUMS)
def test_sums_run_in_float32(name: str, dtype: torch.dtype) -> None:
    """Of exact half-precision factors, 512 positions a sample: nothing but float32's rounding."""
    case = SUMS[name]
    params = case.params(dtype)
    train, val = case.batch(4, dtype, 0), case.batch(3, dtype, 1)
    g, g_val = (case.grads(x).flatten(1) for x in (train, val))
    x = case.model_fn, params
    errors = {
        "dot": relative(gf.ghost_dot_prod(*x, train, val), g @ g_val.mean(0)),
        "pairs": relative(gf.ghost_dot_prod(*x, train, val, reduction="none"), g @ g_val.mT),
        "norm": relative(gf.ghost_norm(*x, train), g.norm(dim=1)),
        "gram": relative(gf.ghost_gram(*x, train), g @ g.mT),
    }
    # Where a parameter is broadcast, autograd sums over positions, in float32, and rounds once.
    limit = 2 * torch.finfo(dtype).eps if name in ("scale", "bias") else 2e-6
    assert max(errors.values()) < limit, errors


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_scaled_losses_are_undone_exactly(setting: Setting) -> None:
    """A power of two moves exponents and rounds nothing: s for one batch, s^2 for both."""
    scale = 2.0**5
    plain, scaled = language_model(setting), language_model(setting, scale)
    train, val = tokens(4, 0), tokens(3, 1)
    u = gf.direction(*plain, val)
    once = gf.ghost_dot_prod(*scaled, train, direction=u)
    both = gf.ghost_dot_prod(*scaled, train, val)
    norms = gf.ghost_norm(*scaled, train)
    if torch.float16 in (setting.parameters, setting.autocast):
        # unscaled, its smallest cotangents are subnormal: the scaled ones have more digits
        close = functools.partial(torch.testing.assert_close, rtol=1e-2, atol=1e-2 * scale)
    else:
        close = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    close(once / scale, gf.ghost_dot_prod(*plain, train, direction=u))
    close(both / scale**2, gf.ghost_dot_prod(*plain, train, val))
    close(norms / scale, gf.ghost_norm(*plain, train))
    step = gf.ghost_value_and_grad(*scaled, train, val)
    unscaled = gf.ghost_value_and_grad(*plain, train, val)
    close(step.dot_prods / scale**2, unscaled.dot_prods)
    for name, grad in unscaled.grads.items():
        close(step.grads[name] / scale, grad)


def test_other_scales_are_undone_to_rounding() -> None:
    x, scaled = (language_model(Setting(torch.float64), s) for s in (1.0, 3.7))
    train, val = tokens(4, 0), tokens(3, 1)
    got, want = gf.ghost_dot_prod(*scaled, train, val), gf.ghost_dot_prod(*x, train, val)
    torch.testing.assert_close(got / 3.7**2, want, rtol=1e-13, atol=0)


def test_scaling_saves_what_float16_would_lose() -> None:
    """Losses so small that their cotangents vanish in float16."""
    setting, small = Setting(torch.float16), 2.0**-14
    train, val = tokens(6, 0), tokens(3, 1)
    dots, _ = truth(setting)

    def error(scale: float) -> float:
        got = gf.ghost_dot_prod(*language_model(setting, scale * small), train, val)
        return relative(got.double() / scale**2, dots * small**2)

    assert error(1.0) > 0.1
    assert error(2.0**16) < TOLERANCE[torch.float16]


def test_the_page_lists_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs/precision.md").read_text()
    listed: list[Any] = [line.split(" | ")[0].strip("| ") for line in page.splitlines()]
    for setting in SETTINGS:
        assert listed.count(str(setting)) == 1
    for name in SUMS:
        assert listed.count(name) == 1
