"""Ops that broadcast a parameter against samples: scales, biases, masks, position tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._factors import Dense
from ghostfunc._rules._registry import register_broadcasting, register_rule
from ghostfunc._rules.linear import sum_to

register_broadcasting(
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__,
    torch.sub, Tensor.sub, Tensor.__sub__, torch.rsub, Tensor.__rsub__, Tensor.sub_,
    Tensor.__isub__, torch.subtract, Tensor.subtract,
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__,
    torch.multiply, Tensor.multiply,
    torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__, Tensor.div_,
    Tensor.__itruediv__, torch.divide, Tensor.divide, torch.true_divide, Tensor.true_divide,
    torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__,
    torch.maximum, Tensor.maximum, torch.minimum, Tensor.minimum,
    torch.addcmul, Tensor.addcmul, torch.lerp, Tensor.lerp,
    torch.where, Tensor.where,
    F.scaled_dot_product_attention,
)  # fmt: skip


@register_rule(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to)
def expand(b, input, *size):  # type: ignore[no-untyped-def]
    return {"input": lambda: Dense(sum_to(b, input.shape) if input.ndim else b.flatten(1).sum(1))}


@register_rule(Tensor.expand_as)
def expand_as(b, input, other):  # type: ignore[no-untyped-def]
    return expand(b, input)
