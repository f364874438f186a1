"""Composite functions of torch that reach torch functions whole, run by their own source.

`F.multi_head_attention_forward` and its like are Python functions of elementary ops, behind a door
that hands the whole call to whoever overrides torch functions. Run past that door, they are what
they always are, op by op.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._rules.registry import register_decomposition


def _nobody_overrides(*args: object) -> bool:
    return False


def body_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of torch without its dispatch to overrides; what it calls keeps its own."""
    assert isinstance(function, FunctionType)
    doors = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    inside = FunctionType(
        function.__code__,
        {**function.__globals__, **dict.fromkeys(doors, _nobody_overrides)},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    inside.__kwdefaults__ = function.__kwdefaults__
    return inside


for _function in (
    F.multi_head_attention_forward,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.gaussian_nll_loss,
    F.normalize,
):
    register_decomposition(_function)(body_of(_function))


@register_decomposition(torch.broadcast_tensors)
def broadcast_tensors(*tensors: Tensor) -> list[Tensor]:
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return [x.expand(shape) for x in tensors]


# --- what a tensor is asked for besides its values ----------------------------------------------


@register_decomposition(Tensor.to)
def to(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not args or not isinstance(args[0], Tensor):
        return NotImplemented
    return input.to(args[0].device, args[0].dtype, *args[1:], **kwargs)


@register_decomposition(Tensor.type_as)
def type_as(input: Tensor, other: Tensor) -> Tensor:
    return input.to(other.device, other.dtype)


@register_decomposition(Tensor.view_as)
def view_as(input: Tensor, other: Tensor) -> Tensor:
    return input.view(other.shape)


@register_decomposition(Tensor.reshape_as)
def reshape_as(input: Tensor, other: Tensor) -> Tensor:
    return input.reshape(other.shape)
