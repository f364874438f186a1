"""In-place ops that write a parameter's values into samples, as writes of what a pure op returns.

The tap lies beside what the pure op returns, so the program may go on with the op's result or with
the tensor it wrote to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ghostfunc._rules.registry import constant, register_decomposition


def _adds(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def add_(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        added = product(a, b)
        return (x if beta == 1 else x.mul_(beta)).add_(added, alpha=alpha)

    return add_


register_decomposition(Tensor.addmm_, Tensor.addmv_, Tensor.baddbmm_)(_adds(torch.matmul))
register_decomposition(Tensor.addbmm_)(_adds(lambda a, b: torch.bmm(a, b).sum(0)))
register_decomposition(Tensor.addr_)(_adds(torch.outer))


@register_decomposition(Tensor.__setitem__)
def setitem(x: Tensor, index: Any, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return _write_where(x, index, value)
    part = constant(x)[index]
    if value.ndim > part.ndim:
        return NotImplemented
    return write_part_(x, index, value if value.shape == part.shape else value.expand(part.shape))


def write_part_(x: Tensor, index: Any, value: Tensor) -> None:
    """`x[index] = value`, for a value of the shape of `x[index]`."""
    if has_torch_function((x, value)):
        handle_torch_function(write_part_, (x, value), x, index, value)
    else:
        x[index] = value


def _write_where(x: Tensor, mask: Tensor, value: Tensor) -> Any:
    """`x[mask] = value`: how many places the mask has is nobody's business if they all get one."""
    rest = x.ndim - mask.ndim
    if value.ndim > rest:  # a value of its own for every place
        return NotImplemented
    mask = mask.reshape(*mask.shape, *(1 for _ in range(rest)))
    x.copy_(torch.where(mask, value.to(x.dtype), x))
    return None


@register_decomposition(torch.masked_fill, Tensor.masked_fill)
def masked_fill(input: Tensor, mask: Tensor, value: Any) -> Any:
    return torch.where(mask, value, input) if isinstance(value, Tensor) else NotImplemented


@register_decomposition(Tensor.masked_fill_)
def masked_fill_(input: Tensor, mask: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return NotImplemented
    return input.copy_(torch.where(mask, value.to(input.dtype), input))
