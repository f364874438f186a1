"""The head of a language model as TRL computes it: log-probabilities of labels, logits in tiles.

TRL gives a model's `forward` a way that ends in a `torch.autograd.Function`, which rounds in places
of its own: under autocast its gradients are other ones than those of the model's own logits. Here
the same Function is an op that taps see, with a rule, so that training goes on bit by bit.
"""

from __future__ import annotations

import functools
import importlib
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from ghostfunc._base.dtypes import wide
from ghostfunc._factors.factor import Dense, Outer
from ghostfunc._rules.registry import FactorMakers, register_rule
from ghostfunc.hf._losses import Batch

FUNCTION = "_ChunkedLogProbFunction"
"""What TRL's `forward` calls it."""

SQUARES = "log_sum_sq_probs"
"""TRL's name of `log sum_v p_v^2` of a position's distribution."""

FOR_TAPS = "ghost_samples"
"""The keyword argument with which `forward` calls an op instead."""


def head_log_probs(module: nn.Module, inputs: Batch) -> tuple[Tensor, ...]:
    """Of the next labels, `[n, T - 1]`, zero where nothing is to be predicted: log-probabilities,
    and `log sum_v p_v^2` without a gradient, where TRL's head was told to give it."""
    options = {"use_cache": False, "fused_lm_head": True, FOR_TAPS: True}
    out = cast(Any, module)(**inputs, **options)
    return tuple(x for x in (out.log_probs, out.log_sum_sq_probs) if x is not None)


def show_head(model: nn.Module) -> bool:
    """Have `head_log_probs` call the op, if TRL has given the model its own head."""
    bound = model.forward
    theirs = bound.__func__ if isinstance(bound, MethodType) else bound
    if isinstance(theirs, _Forward):
        return True
    if not isinstance(theirs, FunctionType) or FUNCTION not in theirs.__code__.co_names:
        return False
    model.forward = MethodType(_Forward(theirs), model)
    return True


class _Forward:
    """TRL's `forward`, and the same with the op in it."""

    def __init__(self, theirs: FunctionType) -> None:
        self.theirs = theirs
        self.inside = FunctionType(
            theirs.__code__,
            {**theirs.__globals__, FUNCTION: _Shown, "_use_triton": _all_positions},
            theirs.__name__,
            theirs.__defaults__,
            theirs.__closure__,
        )
        self.inside.__kwdefaults__ = theirs.__kwdefaults__
        functools.update_wrapper(self, theirs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.inside if kwargs.pop(FOR_TAPS, False) else self.theirs
        return function(*args, **kwargs)


def _all_positions(device: torch.device) -> bool:
    """Whether positions without a label are left out first: rows would no longer be samples'."""
    return False


class _Shown:
    """Stands for TRL's Function in its `forward`."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
    ) -> tuple[Tensor | None, ...]:
        *rest, wanted = options
        device = hidden.device.type
        rounded = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if rounded else hidden.dtype
        squares = SQUARES in wanted
        out = chunked_log_probs(hidden, weight, bias, targets, *rest, dtype, squares)
        return out[:, 0], None, out[:, 1].detach() if squares else None, None, None


@wrap_torch_function(lambda hidden, weight, bias, *_: (hidden, weight))
def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
    squares: bool,
) -> Tensor:
    """`log softmax` of logits `[N, V]` at the targets by TRL's Function, `[N, 1]`, with `squares`
    `[N, 2]`: beside it `log sum_v p_v^2`, through which no gradient goes."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    wanted = ("log_probs", *[SQUARES] * squares)
    options = (temperature, chunk_size, softcap, scale, wanted)
    out = function.apply(hidden, weight, bias, targets, *options)
    return torch.stack([out[0], out[2]] if squares else [out[0]], dim=1)


@register_rule(chunked_log_probs)
def _rule(
    b: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
    squares: bool,
) -> FactorMakers:
    def of_logits() -> Tensor:
        logits = hidden.to(dtype) @ weight[0].to(dtype).mT
        if bias is not None:
            logits = logits + bias[0].to(dtype)
        z = logits.float() * scale
        slope: Tensor | float = scale / temperature
        if softcap is not None:
            bent = torch.tanh(z / softcap)
            z, slope = softcap * bent, slope * (1 - bent * bent)
        g = -torch.softmax(z / temperature, -1)
        g.scatter_add_(-1, targets[..., None], torch.ones_like(g[..., :1]))
        return (b[..., :1].float() * g * slope).to(dtype)

    return {
        "weight": lambda: Outer(of_logits(), hidden.to(dtype)),
        "bias": lambda: Dense(wide(of_logits()).sum(1)),
    }
