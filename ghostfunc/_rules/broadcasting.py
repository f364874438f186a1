"""Ops that broadcast a parameter against samples: scales, biases, masks, position tables."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._factors.factor import Dense
from ghostfunc._rules.registry import (
    FactorMakers,
    register_broadcasting,
    register_decomposition,
    register_rule,
    sum_to,
    unsupported,
)

register_broadcasting(
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__,
    torch.sub, Tensor.sub, Tensor.__sub__, torch.rsub, Tensor.__rsub__, Tensor.sub_,
    Tensor.__isub__, torch.subtract, Tensor.subtract, Tensor.subtract_,
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__,
    torch.multiply, Tensor.multiply, Tensor.multiply_,
    torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__rdiv__, Tensor.div_,
    Tensor.__itruediv__, torch.divide, Tensor.divide, Tensor.divide_, torch.true_divide,
    Tensor.true_divide, Tensor.true_divide_,
    torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__, Tensor.pow_, Tensor.__ipow__,
    torch.float_power, Tensor.float_power,
    torch.maximum, Tensor.maximum, torch.minimum, Tensor.minimum, torch.fmax, Tensor.fmax,
    torch.fmin, Tensor.fmin, torch.clamp, Tensor.clamp, Tensor.clamp_, torch.clip, Tensor.clip,
    Tensor.clip_, torch.clamp_min, Tensor.clamp_min, torch.clamp_max, Tensor.clamp_max,
    torch.addcmul, Tensor.addcmul, Tensor.addcmul_, torch.addcdiv, Tensor.addcdiv, Tensor.addcdiv_,
    torch.lerp, Tensor.lerp, Tensor.lerp_,
    torch.where, Tensor.where, Tensor.copy_,
    torch.atan2, Tensor.atan2, torch.hypot, Tensor.hypot, torch.copysign, Tensor.copysign,
    torch.fmod, Tensor.fmod, torch.remainder, Tensor.remainder, Tensor.__mod__,
    torch.logaddexp, Tensor.logaddexp, torch.logaddexp2, Tensor.logaddexp2,
    torch.xlogy, Tensor.xlogy, torch.special.xlogy, torch.special.xlog1py,
    torch.ldexp, Tensor.ldexp,
    F.scaled_dot_product_attention,
)  # fmt: skip


@register_rule(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to, multilinear=True)
def expand(b: Tensor, input: Tensor, *size: Any) -> FactorMakers:
    return {"input": lambda: Dense(sum_to(b, input.shape[1:]))}


@register_decomposition(Tensor.expand_as)
def expand_as(input: Tensor, other: Tensor) -> Tensor:
    return input.expand(other.shape)


# --- repeating ----------------------------------------------------------------------------------


@register_rule(Tensor.repeat, torch.tile, Tensor.tile, multilinear=True)
def repeat(
    b: Tensor, input: Tensor, *sizes: Any, dims: Any = None, repeats: Any = None
) -> FactorMakers:
    def of_input() -> Dense:
        shape = (1,) * (b.ndim - input.ndim) + tuple(input.shape[1:])
        pairs = [(out // size, size) for out, size in zip(b.shape[1:], shape, strict=True)]
        copies = wide(b).reshape(len(b), *(x for pair in pairs for x in pair))
        return Dense(copies.sum(tuple(range(1, 2 * len(pairs), 2))))

    return {"input": of_input}


@register_rule(torch.repeat_interleave, Tensor.repeat_interleave, multilinear=True)
def repeat_interleave(
    b: Tensor, input: Tensor, repeats: Any, dim: int | None = None, *, output_size: Any = None
) -> FactorMakers:
    def of_input() -> Dense:
        if dim is None or not isinstance(repeats, int):
            raise unsupported("repeat_interleave of a parameter without dim, or uneven", "Use dim.")
        axis = dim % (input.ndim - 1)
        size = input.shape[axis + 1]
        return Dense(wide(b).unflatten(axis + 1, (size, -1)).sum(axis + 2))

    return {"input": of_input}
