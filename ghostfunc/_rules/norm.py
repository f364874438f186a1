"""Normalisation layers: scale and shift of what the op normalised.

`y = norm(x) * w + c` has `g_i^w = sum_t b_it * norm(x)_it` and `g_i^c = sum_t b_it`; `norm(x)` is
recomputed from `x` rather than kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._factors import Dense, wide
from ghostfunc._rules._registry import coupled, refuse, register_rule


def _sum_positions(x: Tensor, normalized_shape: tuple[int, ...]) -> Tensor:
    """`[n, ..., *normalized_shape]` summed over positions: `[n, *normalized_shape]`."""
    return x.reshape(x.shape[0], -1, *normalized_shape).sum(1)


@register_rule(F.layer_norm, torch.layer_norm)
def layer_norm(  # type: ignore[no-untyped-def]
    b, input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True
):
    b = wide(b)
    return {
        "weight": lambda: Dense(
            _sum_positions(
                b * F.layer_norm(wide(input), normalized_shape, eps=eps), normalized_shape
            )
        ),
        "bias": lambda: Dense(_sum_positions(b, normalized_shape)),
    }


@register_rule(F.rms_norm, torch.rms_norm)
def rms_norm(b, input, normalized_shape, weight=None, eps=None):  # type: ignore[no-untyped-def]
    def of_weight() -> Dense:
        normed = F.rms_norm(wide(input), normalized_shape, eps=_eps(input, eps))
        return Dense(_sum_positions(wide(b) * normed, normalized_shape))

    return {"weight": of_weight}


def _eps(input: Tensor, eps: float | None) -> float:
    """The default of `F.rms_norm` depends on the dtype the op itself ran in."""
    return torch.finfo(input.dtype).eps if eps is None else eps


@refuse(F.batch_norm)
def check_batch_norm(  # type: ignore[no-untyped-def]
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    if training or running_mean is None:
        raise coupled(
            "F.batch_norm in training mode normalises over the batch",
            "Call module.eval() (running statistics are then used), or replace the layer by "
            "GroupNorm or LayerNorm.",
        )
