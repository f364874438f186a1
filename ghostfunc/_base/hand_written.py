"""Torch functions for the products of PEFT's adapters whose gradients PEFT wrote by hand.

LoHa and RandLoRA put a few products into a `torch.autograd.Function`, which keeps less for the
backward pass and hides what it does with a parameter. While a model function runs under taps or
transforms, their layers make the same products of torch functions: values and gradients are the
same, and taps see them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ghostfunc._base.methods import Override, override
from ghostfunc._base.torch_private import function_modes, watched


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
"""Our functions, by the names that PEFT's have where a method calls them. The keys are the file and
the name of that method.

C3A and LoHa's kernels of convolutions are not among them: the gradients that PEFT wrote of C3A's
inputs and of LoHa's `w1a` are not those of their values."""


def hand_written(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules whose methods call a function of `_STAND_INS`."""
    modules = list(modules)
    kinds = {kind for kind in set(map(type, modules)) if _methods(kind)}
    return [module for module in modules if type(module) in kinds]


def shown(adapters: Sequence[nn.Module]) -> list[Override]:
    """Methods of `hand_written` layers that make their products of torch functions where more than
    plain autograd looks on."""
    methods = {kind: _methods(kind) for kind in set(map(type, adapters))}
    return [
        override(module, name, _called, *both, module)
        for module in adapters
        for name, both in methods[type(module)].items()
    ]


def _called(theirs: Callable[..., Any], ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PEFT's own method for plain autograd: a checkpoint of torch runs it again by that."""
    plain = not (function_modes() or watched() or torch.compiler.is_compiling())
    return (theirs if plain else ours)(*args, **kwargs)


def _methods(kind: type) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """The methods of a class that call a function of `_STAND_INS`: PEFT's own one, and a copy that
    calls ours in its place."""
    members = {name: x for base in reversed(kind.__mro__) for name, x in vars(base).items()}
    called = {(x.__module__, name): x for name, x in members.items() if isinstance(x, FunctionType)}
    return {
        place[1]: (called[place], _with(called[place], stand_ins))
        for place, stand_ins in _STAND_INS.items()
        if place in called
    }


def _with(method: FunctionType, stand_ins: dict[str, Any]) -> Callable[..., Any]:
    """The same code with other globals."""
    known = {**method.__globals__, **stand_ins}
    parts = (method.__name__, method.__defaults__, method.__closure__)
    clone = FunctionType(method.__code__, known, *parts)
    clone.__kwdefaults__ = method.__kwdefaults__
    return clone
