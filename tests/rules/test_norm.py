"""Normalisations, over the last axes and over channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.testing import Case, check_rule

sizes = st.integers(1, 4)
shapes = st.lists(sizes, min_size=0, max_size=2).map(tuple)


@given(shapes, st.lists(st.integers(2, 4), min_size=1, max_size=2).map(tuple), st.booleans())
def test_layer_norm(before: Any, normalized: Any, with_bias: bool) -> None:
    params = {"weight": normalized} | ({"bias": normalized} if with_bias else {})
    case = Case(
        lambda p, x: F.layer_norm(x["x"], normalized, **p, eps=1e-3),
        params,
        {"x": (*before, *normalized)},
    )
    check_rule(F.layer_norm, [case])


@given(shapes, st.lists(sizes, min_size=1, max_size=2).map(tuple), st.sampled_from([None, 0.1]))
def test_rms_norm(before: Any, normalized: Any, eps: float | None) -> None:
    case = Case(
        lambda p, x: F.rms_norm(x["x"], normalized, p["weight"], eps),
        {"weight": normalized},
        {"x": (*before, *normalized)},
    )
    check_rule(F.rms_norm, [case])


@given(st.integers(1, 3), st.integers(1, 3), st.lists(sizes, min_size=1, max_size=3).map(tuple))
def test_group_norm(groups: int, per_group: int, spatial: Any) -> None:
    channels = groups * per_group
    case = Case(
        lambda p, x: F.group_norm(x["x"], groups, p["w"], bias=p["b"]),
        {"w": (channels,), "b": (channels,)},
        {"x": (channels, 2, *spatial)},
    )
    check_rule(F.group_norm, [case])


@given(sizes, st.lists(sizes, min_size=0, max_size=3).map(tuple), st.booleans(), st.integers(0, 1))
def test_batch_norm_in_eval_mode(channels: int, spatial: Any, with_bias: bool, folded: int) -> None:
    mean, var = torch.randn(channels).double(), torch.rand(channels).double() + 0.5

    def call(p: Any, x: Any) -> Any:
        rows = x["x"].flatten(0, 1) if folded else x["x"]
        out = F.batch_norm(rows, mean, var, p["w"], p.get("b"))
        return out.unflatten(0, x["x"].shape[:2]) if folded else out

    params = {"w": (channels,)} | ({"b": (channels,)} if with_bias else {})
    shape = (3,) * folded + (channels, *spatial)
    check_rule(F.batch_norm, [Case(call, params, {"x": shape})])


@given(sizes, st.lists(sizes, min_size=0, max_size=2).map(tuple), st.booleans())
def test_instance_norm(channels: int, spatial: Any, running: bool) -> None:
    statistics = (torch.randn(channels).double(), torch.rand(channels).double() + 0.5)

    def call(p: Any, x: Any) -> Any:
        given = (*statistics, p["w"], p["b"], False) if running else (None, None, p["w"], p["b"])
        return F.instance_norm(x["x"], *given)

    params = {"w": (channels,), "b": (channels,)}
    check_rule(F.instance_norm, [Case(call, params, {"x": (channels, 2, *spatial)})])


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm1d(3).eval(), (3,)),
        (nn.BatchNorm2d(3).eval(), (3, 2, 2)),
        (nn.InstanceNorm1d(3, affine=True), (3, 5)),
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(), (3, 2, 2)),
        (nn.GroupNorm(2, 4), (4, 3)),
        (nn.LayerNorm((2, 3)), (4, 2, 3)),
        (nn.RMSNorm(3), (4, 3)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_modules(module: nn.Module, shape: Any) -> None:
    module.double()
    params = {k: tuple(p.shape) for k, p in module.named_parameters()}

    def call(p: Any, x: Any) -> Tensor:
        return torch.func.functional_call(module, p, (x["x"],))

    op = getattr(
        F,
        {
            "BatchNorm1d": "batch_norm",
            "BatchNorm2d": "batch_norm",
            "InstanceNorm1d": "instance_norm",
            "InstanceNorm2d": "instance_norm",
            "GroupNorm": "group_norm",
            "LayerNorm": "layer_norm",
            "RMSNorm": "rms_norm",
        }[type(module).__name__],
    )
    check_rule(op, [Case(call, params, {"x": shape})])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_default_eps_of_rms_norm_in_low_precision(dtype: torch.dtype, scale: float) -> None:
    """The op adds an epsilon that depends on a dtype; the rule must add the same one."""
    x = (scale * torch.randn(3, 5, 8)).to(dtype)
    w = torch.randn(8).to(dtype)

    def model_fn(p: Any, x: Any) -> Tensor:
        return F.rms_norm(x, (8,), p["w"]).float().square().sum((1, 2))

    grads = gf.per_sample_grads(model_fn, {"w": w}, x, mode="ghost")["w"]
    wide = x.double()
    eps = torch.finfo(torch.float32).eps
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    expected = (2 * w.double() * normed.square()).sum(1)
    error = (grads - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_training_mode_couples_samples() -> None:
    for module in (nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()):
        model_fn, params = gf.from_module(module, lambda m, x: m(x).square().sum(1))
        with pytest.raises(gf.CoupledSamplesError, match="batch_norm in training mode"):
            gf.per_sample_grads(model_fn, params, torch.randn(3, 3), mode="ghost")


def test_running_statistics_of_instance_norm_are_not_written() -> None:
    module = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    model_fn, params = gf.from_module(module, lambda m, x: m(x).square().sum((1, 2)))
    with pytest.raises(gf.InPlaceError, match="running statistics"):
        gf.per_sample_grads(model_fn, params, torch.randn(2, 3, 4), mode="ghost")
    assert module.running_mean is not None
    assert not module.running_mean.any()
