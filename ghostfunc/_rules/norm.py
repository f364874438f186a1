"""Normalisation layers: scale and shift of what the op normalised.

`y = norm(x) * w + c` has `g_i^w = sum_t b_it * norm(x)_it` and `g_i^c = sum_t b_it`; `norm(x)` is
recomputed from `x` rather than kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import InPlaceError
from ghostfunc._base.refusals import refuse
from ghostfunc._factors.factor import Dense
from ghostfunc._rules.registry import FactorMakers, coupled, register_rule

# --- over the last axes -------------------------------------------------------------------------


def _of_last_axes(b: Tensor, normed: Callable[[], Tensor], shape: Any) -> FactorMakers:
    """Scale and shift with the shape of the last axes."""
    last = len(tuple(shape))

    def summed(x: Tensor) -> Dense:
        x = x[:, None].flatten(1, x.ndim - last)
        return Dense(x[:, 0] if x.shape[1] == 1 else x.sum(1))

    return {
        "weight": lambda: summed(wide(b) * normed()),
        "bias": lambda: summed(wide(b)),
    }


@register_rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    b: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> FactorMakers:
    def normed() -> Tensor:
        return F.layer_norm(wide(input), tuple(normalized_shape), eps=eps)

    return _of_last_axes(b, normed, normalized_shape)


def _default_eps_of_rms_norm(dtype: torch.dtype) -> float:
    """Releases of torch differ: the epsilon of the input's dtype, or of the one it computes in."""
    wide_eps = torch.finfo(torch.float32).eps
    x = torch.full((1,), wide_eps**0.5, dtype=dtype, device="cpu")
    return wide_eps if F.rms_norm(x, (1,)).item() > 0.5 else torch.finfo(dtype).eps


_RMS_EPS = {x: _default_eps_of_rms_norm(x) for x in (torch.bfloat16, torch.float16)}


@register_rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    b: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> FactorMakers:
    def normed() -> Tensor:
        default = _RMS_EPS.get(input.dtype) if eps is None else eps
        return F.rms_norm(wide(input), tuple(normalized_shape), eps=default)

    return _of_last_axes(b, normed, normalized_shape)


# --- over channels ------------------------------------------------------------------------------


def _of_channels(b: Tensor, normed: Callable[[], Tensor]) -> FactorMakers:
    """Scale and shift per channel; `b` is `[n, batch of the call, channels, ...]`."""

    def summed(x: Tensor) -> Dense:
        return Dense(x.flatten(3).sum((1, 3)) if x.ndim > 3 else x.sum(1))

    return {"weight": lambda: summed(wide(b) * normed()), "bias": lambda: summed(wide(b))}


@register_rule(F.group_norm, torch.group_norm)
def group_norm(
    b: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> FactorMakers:
    def normed() -> Tensor:
        return F.group_norm(wide(input).flatten(0, 1), num_groups, eps=eps).view(b.shape)

    return _of_channels(b, normed)


def _with_statistics(input: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """`input` normalised by given statistics, `[n, channels]` each."""
    shape = (len(input), 1, -1) + (1,) * (input.ndim - 3)
    mean, var = wide(mean).reshape(shape), wide(var).reshape(shape)
    return (wide(input) - mean) * (var + eps).rsqrt()


@register_rule(F.batch_norm)
def batch_norm(
    b: Tensor,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> FactorMakers:
    return _of_channels(b, lambda: _with_statistics(input, running_mean, running_var, eps))


@refuse(F.batch_norm)
def check_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if training or running_mean is None:
        raise coupled(
            "F.batch_norm in training mode normalises over the batch",
            "Call module.eval() (running statistics are then used), or replace the layer by "
            "GroupNorm or LayerNorm.",
        )


@register_rule(F.instance_norm)
def instance_norm(
    b: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> FactorMakers:
    def normed() -> Tensor:
        if running_mean is None or running_var is None:
            return F.instance_norm(wide(input).flatten(0, 1), eps=eps).view(b.shape)
        return _with_statistics(input, running_mean, running_var, eps)

    return _of_channels(b, normed)


@refuse(F.instance_norm)
def check_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if use_input_stats and running_mean is not None:
        raise InPlaceError(
            "F.instance_norm in training mode updates its running statistics, so the function is "
            "not pure. Call module.eval(), or set track_running_stats=False."
        )
