"""Clipped sums against materialized gradients, and against samples made to break them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import assert_close, leaves_of, sample_grads
from problems import CASES, Problem
from torch import Tensor

import ghostfunc as gf
from ghostfunc import NonFiniteLossError, OptionError


def flat(g: Tensor) -> Tensor:
    return (g.float() if g.dtype == torch.bfloat16 else g).reshape(len(g), -1)


def clipped(
    grads: list[Tensor], bounds: list[float], weights: Tensor, *, flatly: bool, normalize: bool
) -> tuple[list[Tensor], Any]:
    """By definition: `sum_i w_i c_i g_i`, and what was compared with the bounds."""
    each = [flat(g).norm(dim=1) for g in grads]
    whole = torch.stack(each).norm(dim=0)
    sums = []
    for g, own, bound in zip(grads, each, bounds, strict=True):
        factor = bound / (whole if flatly else own)
        factor = factor.nan_to_num(0, 0, 0) if normalize else factor.clamp(max=1)
        sums.append(
            ((weights * factor).to(flat(g).dtype) @ flat(g)).reshape(g.shape[1:]).to(g.dtype)
        )
    return sums, whole if flatly else each


@pytest.mark.parametrize("mode", ["ghost", "materialized"])
@pytest.mark.parametrize("normalize", [False, True], ids=["clip", "normalize"])
@pytest.mark.parametrize("per_layer", [False, True], ids=["flat", "per_layer"])
def test_clipped_grad(problem: Problem, per_layer: bool, normalize: bool, mode: str) -> None:
    batch = problem.batch(4, t=4)
    grads = sample_grads(problem, batch)
    bound = float(torch.stack([flat(g).norm(dim=1) for g in grads]).norm(dim=0).median())
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    result = gf.ghost_clipped_grad(
        problem.model_fn,
        problem.params,
        batch,
        max_norm=bound,
        per_layer=per_layer,
        normalize=normalize,
        weights=weights,
        mode=mode,
        vectorize=False,
    )
    bounds = [bound / math.sqrt(len(grads)) if per_layer else bound] * len(grads)
    sums, norms = clipped(grads, bounds, weights, flatly=not per_layer, normalize=normalize)
    assert_close(result.norms, norms, problem.tolerance)
    # Scaled up by itself, a gradient that is zero but for rounding has any direction.
    noise = 1e-8 * max(float(flat(g).norm()) for g in grads)
    for got, want, g in zip(leaves_of(result.grads), sums, grads, strict=True):
        if not (per_layer and normalize and float(flat(g).norm(dim=1).min()) < noise):
            assert_close(got, want, max(problem.tolerance, 1e-9 if normalize else 0))
    for got, param in zip(leaves_of(result.grads), leaves_of(problem.params), strict=True):
        assert got.shape == param.shape
        assert got.dtype == param.dtype


# --- adversarial samples ----------------------------------------------------------------------


def scaled_losses(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Gradients as large as `scale` says, from losses that stay small where it is 1e30."""
    h = torch.tanh(batch["x"] @ p["w"].t()) @ p["v"]
    return torch.sin(batch["scale"] * h)


def root_losses(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Finite losses whose gradient is infinite, or NaN, where x is zero."""
    return (batch["x"] @ p["w"].t()).square().sum(1).sqrt() + 0 * p["v"].sum()


def steep_losses(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Finite losses whose gradient at v is infinite where scale is zero."""
    shifted = p["v"] - p["v"].detach() + batch["scale"][:, None]
    return (batch["x"] @ p["w"].t()).square().sum(1) + shifted.sqrt().sum(1)


def setting(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    params = {
        "w": torch.randn(3, 4, generator=g).to(dtype),
        "v": torch.randn(3, generator=g).to(dtype),
    }
    batch = {
        "x": torch.randn(5, 4, generator=g).to(dtype),
        "scale": torch.ones(5, dtype=dtype),
    }
    return params, batch


def without(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {k: torch.cat([x[:i], x[i + 1 :]]) for k, x in batch.items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Euclidean distance of two sums."""
    return float(torch.stack([(a[k].double() - b[k].double()).norm() for k in a]).norm())


@pytest.mark.parametrize("normalize", [False, True], ids=["clip", "normalize"])
@pytest.mark.parametrize("per_layer", [False, True], ids=["flat", "per_layer"])
@pytest.mark.parametrize("scale", [1.0, 1e10, 1e25, 1e36, 1e-20, 0.0], ids=str)
def test_one_sample_moves_the_sum_by_at_most_its_bound(
    scale: float, per_layer: bool, normalize: bool
) -> None:
    """Whatever the adversary puts into sample 2, membership shows by at most `max_norm`."""
    params, batch = setting(torch.float32)
    batch["scale"][2] = scale
    options: Any = {"max_norm": 0.1, "per_layer": per_layer, "normalize": normalize}
    with_it = gf.ghost_clipped_grad(scaled_losses, params, batch, **options)
    without_it = gf.ghost_clipped_grad(scaled_losses, params, without(batch, 2), **options)
    moved = distance(with_it.grads, without_it.grads)
    assert moved <= 0.1 * (1 + 1e-5)
    if scale >= 1 or (normalize and scale):
        assert moved == pytest.approx(0.1, rel=1e-4)
    oracle = gf.ghost_clipped_grad(scaled_losses, params, batch, mode="materialized", **options)
    assert distance(with_it.grads, oracle.grads) <= 1e-5


@pytest.mark.parametrize("scale", [1e10, 1e25, 1e36, 1e-20], ids=str)
def test_norms_of_extreme_gradients(scale: float) -> None:
    params, batch = setting(torch.float32)
    batch["scale"][2] = scale
    wide = [{k: v.double() for k, v in tree.items()} for tree in (params, batch)]
    exact = gf.ghost_norm(scaled_losses, *wide, mode="materialized")
    # The phase of the sine is lost at such scales: take it from the narrow computation.
    for mode in ("ghost", "materialized"):
        norms = gf.ghost_norm(scaled_losses, params, batch, mode=mode)
        assert norms.isfinite().all()
        keep = torch.tensor([0, 1, 3, 4])
        torch.testing.assert_close(norms[keep].double(), exact[keep], rtol=1e-4, atol=0)
    ghost = gf.ghost_norm(scaled_losses, params, batch)
    formed = gf.ghost_norm(scaled_losses, params, batch, mode="materialized")
    torch.testing.assert_close(ghost, formed, rtol=1e-5, atol=0)
    assert ghost[2] > 0


@pytest.mark.parametrize("normalize", [False, True], ids=["clip", "normalize"])
@pytest.mark.parametrize("mode", ["ghost", "materialized"])
@pytest.mark.parametrize("per_layer", [False, True], ids=["flat", "per_layer"])
@pytest.mark.parametrize("where", ["x", "v"], ids=["nan", "inf"])
def test_gradients_that_are_not_finite_contribute_nothing(
    where: str, per_layer: bool, mode: str, normalize: bool
) -> None:
    """Not even through parameters whose own gradient is finite."""
    params, batch = setting(torch.float64)
    model_fn = root_losses
    if where == "x":
        batch["x"][2] = 0
    else:
        model_fn = steep_losses
        batch["scale"][2] = 0
    weights = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    options: Any = {
        "max_norm": 0.5, "per_layer": per_layer, "mode": mode, "normalize": normalize
    }  # fmt: skip
    result = gf.ghost_clipped_grad(model_fn, params, batch, weights=weights, **options)
    rest = gf.ghost_clipped_grad(
        model_fn, params, without(batch, 2), weights=weights[[0, 1, 3, 4]], **options
    )
    norms = result.norms[{"x": "w", "v": "v"}[where]] if per_layer else result.norms
    assert not norms[2].isfinite()
    g = gf.per_sample_grads(model_fn, params, batch)
    assert g["w"][2].isnan().any() if where == "x" else g["v"][2].isposinf().all()
    assert norms[[0, 1, 3, 4]].isfinite().all()
    assert distance(result.grads, rest.grads) <= 1e-12
    assert all(x.isfinite().all() for x in result.grads.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_raise(value: float) -> None:
    params, batch = setting(torch.float64)
    batch["x"][3, 0] = value
    with pytest.raises(NonFiniteLossError, match=r"losses\[3\]"):
        gf.ghost_clipped_grad(root_losses, params, batch, max_norm=1.0)


def test_zero_gradients() -> None:
    params, batch = setting(torch.float32)
    batch["scale"][:] = 0.0
    for normalize in (False, True):
        result = gf.ghost_clipped_grad(
            scaled_losses, params, batch, max_norm=1.0, normalize=normalize
        )
        assert not result.norms.any()
        assert not any(x.any() for x in result.grads.values())


def test_bounds_of_zero_and_infinity() -> None:
    params, batch = setting(torch.float64)
    nothing = gf.ghost_clipped_grad(scaled_losses, params, batch, max_norm=0.0)
    assert not any(x.any() for x in nothing.grads.values())
    plain = gf.ghost_clipped_grad(scaled_losses, params, batch, max_norm=math.inf)
    summed = gf.per_sample_grads(scaled_losses, params, batch)
    assert_close(plain.grads, {k: g.sum(0) for k, g in summed.items()}, 1e-12)


def test_bounds_of_every_parameter() -> None:
    params, batch = setting(torch.float64)
    bounds = {"w": 0.2, "v": 0.05}
    result = gf.ghost_clipped_grad(scaled_losses, params, batch, max_norm=bounds, per_layer=True)
    grads = gf.per_sample_grads(scaled_losses, params, batch)
    names = sorted(params)
    sums, norms = clipped(
        [grads[k] for k in names],
        [bounds[k] for k in names],
        torch.ones(5, dtype=torch.float64),
        flatly=False,
        normalize=False,
    )
    assert_close([result.grads[k] for k in names], sums, 1e-12)
    assert_close([result.norms[k] for k in names], norms, 1e-12)


def test_sums_of_parts_add_up() -> None:
    params, batch = setting(torch.float64)
    whole = gf.ghost_clipped_grad(scaled_losses, params, batch, max_norm=0.1)
    parts = [
        gf.ghost_clipped_grad(
            scaled_losses, params, {k: x[s] for k, x in batch.items()}, max_norm=0.1
        )
        for s in (slice(0, 2), slice(2, 5))
    ]
    assert_close(whole.grads, {k: sum(p.grads[k] for p in parts) for k in params}, 1e-12)
    assert_close(whole.norms, torch.cat([p.norms for p in parts]), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": -1.0}, "must not be negative"),
        ({"max_norm": math.nan}, "must not be negative"),
        ({"max_norm": math.inf, "normalize": True}, "finite"),
        ({"max_norm": {"w": 1.0, "v": 1.0}}, "per_layer=True"),
        ({"max_norm": {"w": 1.0}, "per_layer": True}, "pytree like params"),
        ({"max_norm": {"w": 1.0, "v": "a"}, "per_layer": True}, "pytree like params"),
        ({"max_norm": 1.0, "weights": torch.ones(4)}, r"shape \[5\]"),
        ({"max_norm": 1.0, "weights": [1.0] * 5}, r"shape \[5\].*list"),
        ({"max_norm": 1.0, "weights": torch.full((5,), math.nan)}, "finite"),
        ({"max_norm": 1.0, "mode": "jvp"}, "mode='jvp' is not an option"),
        ({"max_norm": 1.0, "randomness": "same"}, "randomness"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    params, batch = setting(torch.float64)
    with pytest.raises(OptionError, match=message):
        gf.ghost_clipped_grad(scaled_losses, params, batch, **options)


@pytest.mark.parametrize("options", [{}, {"per_layer": True}, {"normalize": True}])
@pytest.mark.parametrize("mode", ["ghost", "materialized"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunks_change_nothing(size: int, mode: Any, options: dict[str, Any]) -> None:
    problem = CASES["tied_lm"]()
    batch = problem.batch(5, 4)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    args = problem.model_fn, problem.params, batch
    whole = gf.ghost_clipped_grad(*args, max_norm=0.3, weights=weights, mode=mode, **options)
    parts = gf.ghost_clipped_grad(
        *args, max_norm=0.3, weights=weights, mode=mode, chunk_size=size, **options
    )
    assert_close([parts.grads, parts.norms], [whole.grads, whole.norms], 1e-12)
    with pytest.raises(gf.OptionError, match="chunk_size must be a positive integer"):
        gf.ghost_clipped_grad(*args, max_norm=1.0, chunk_size=0)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float64, 2.0**-548), (torch.float32, 2.0**-73)], ids=str
)
def test_norms_whose_squares_are_zero(dtype: torch.dtype, scale: float) -> None:
    """Powers of two scale gradients exactly: all numbers but squares are those of scale 1."""
    model_fn, params, batch = of_dtype(dtype)

    def tiny(p: Any, x: Any) -> Tensor:
        return model_fn(p, x) * scale

    norms = gf.ghost_norm(model_fn, params, batch)
    bound = float(norms.mean())
    want = gf.ghost_clipped_grad(model_fn, params, batch, max_norm=bound)
    got = gf.ghost_clipped_grad(tiny, params, batch, max_norm=bound * scale)
    kept = gf.factored_grads(tiny, params, batch)
    for found in (got.norms, gf.ghost_norm(tiny, params, batch), kept.norms()):
        torch.testing.assert_close(found / scale, norms)
    for a, b in zip(got.grads.values(), want.grads.values(), strict=True):
        torch.testing.assert_close(a / scale, b)
    assert gf.ghost_cosine(tiny, params, batch, batch).isnan().all()  # dot products are zero, too


def of_dtype(dtype: torch.dtype) -> tuple[Any, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = {
        "w": torch.randn(4, 3, generator=generator, dtype=dtype),
        "b": torch.randn(3, generator=generator, dtype=dtype),
    }

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return ((x @ p["w"] + p["b"]).tanh() - 1).square().flatten(1).mean(1)

    return model_fn, params, torch.randn(4, 5, 4, generator=generator, dtype=dtype)
