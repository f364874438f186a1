"""Gradients in ordinary layout: torch makes sparse ones for look-ups that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SPARSE: dict[Callable[..., Any], tuple[str, int | None]] = {
    F.embedding: ("sparse", 6),
    F.embedding_bag: ("sparse", 7),
    torch.gather: ("sparse_grad", None),
    Tensor.gather: ("sparse_grad", None),
}
"""Ops that make sparse gradients on request: the argument's name, and its position if it has one"""


def makes_sparse(func: Callable[..., Any]) -> bool:
    """Whether an op makes sparse gradients on request."""
    return func in _SPARSE


def dense_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the same values and an ordinary gradient."""
    if func not in _SPARSE:
        return args, kwargs
    name, position = _SPARSE[func]
    if kwargs.get(name):
        return args, {**kwargs, name: False}
    if position is not None and len(args) > position and args[position]:
        return (*args[:position], False, *args[position + 1 :]), kwargs
    return args, kwargs


def dense(x: Tensor) -> Tensor:
    """`x`, in ordinary layout."""
    return x if x.layout == torch.strided else x.to_dense()


def give_dense(ready: Callable[[int, Tensor], None], i: int, grad: Tensor) -> None:
    """Hand out the gradient of parameter `i`: a hook, once the first two arguments are bound."""
    ready(i, dense(grad))


class DenseGradients(TorchFunctionMode):
    """Has look-ups make ordinary gradients."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = dense_call(func, args, kwargs or {})
        return func(*args, **kwargs)
