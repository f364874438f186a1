"""Adapters of PEFT whose gradient is written by hand, as torch functions.

LoHa and RandLoRA put a few products into a `torch.autograd.Function`, which keeps less for the
backward pass and hides what it does with a parameter. While a model function runs, their layers
make the same products of torch functions: values and gradients are the same, and taps see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ghostfunc._base.methods import Override, override


def hadamard(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, scale: Tensor) -> Tensor:
    """LoHa's weight: a product of two low-rank matrices, element by element."""
    return (w1a @ w1b) * (w2a @ w2b) * scale


class ScaledBases:
    """RandLoRA's base `[k, 1, j]`, scaled by `rows` `[k, v]` and `columns` `[v, j]`."""

    @staticmethod
    def apply(base: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return rows[:, :, None] * base * columns[None]


_STAND_INS: dict[tuple[str, str], dict[str, Any]] = {
    ("peft.tuners.loha.layer", "get_delta_weight"): {"make_weight": hadamard},
    ("peft.tuners.randlora.layer", "get_scaled_bases"): {"UniqueBaseGrad": ScaledBases},
}
"""By the file and the name of a method that calls what is written by hand: what stands for it.

C3A and LoHa's kernels of convolutions are not among them: the gradients that PEFT wrote of C3A's
inputs and of LoHa's `w1a` are not those of their values."""


def shown(modules: Iterable[nn.Module]) -> list[Override]:
    """Methods of the adapters among `modules` that make their products of torch functions."""
    modules = list(modules)
    methods = {kind: _methods(kind) for kind in set(map(type, modules))}
    return [
        override(module, name, method, module)
        for module in modules
        for name, method in methods[type(module)].items()
    ]


def _methods(kind: type) -> dict[str, Callable[..., Any]]:
    """The methods of a class that call what is written by hand, with what stands for it."""
    members = {name: x for base in reversed(kind.__mro__) for name, x in vars(base).items()}
    return {
        name: _with(members[name], stand_ins)
        for (file, name), stand_ins in _STAND_INS.items()
        if name in members and members[name].__module__ == file
    }


def _with(method: FunctionType, stand_ins: dict[str, Any]) -> Callable[..., Any]:
    """The same code with other globals."""
    known = {**method.__globals__, **stand_ins}
    parts = (method.__name__, method.__defaults__, method.__closure__)
    clone = FunctionType(method.__code__, known, *parts)
    clone.__kwdefaults__ = method.__kwdefaults__
    return clone
