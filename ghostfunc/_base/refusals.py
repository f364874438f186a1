"""Calls that have no per-sample meaning, and the mode that refuses them. Those of single ops stand
with the ops' rules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from ghostfunc._base.errors import CoupledSamplesError, TransformError
from ghostfunc._base.modes import Mode

COLLECTIVES = {"c10d", "_c10d_functional", "_c10d_functional_autograd"}
"""Namespaces of the ops by which processes communicate."""

REFUSED: dict[Callable[..., Any], Callable[..., None]] = {}


def refuse(*ops: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a check, with the op's signature, that raises for calls with no per-sample
    meaning. It is asked before the op runs, whether a parameter is involved or not."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        REFUSED.update(dict.fromkeys(ops, check))
        return check

    return decorate


def op_name(op: Callable[..., Any]) -> str:
    """What an op is called in errors: `torch.nn.functional.linear`, `torch.Tensor.mul`."""
    named = resolve_name(op)
    if named is None and isinstance(op, FunctionType):
        return f"{op.__module__}.{op.__qualname__}"
    if named is None and isinstance(op, BuiltinFunctionType):
        return f"{op.__module__ or 'torch'}.{op.__name__}"
    return named or repr(op)


def refuse_collective(name: str) -> None:
    """Raise for what brings samples of other ranks into a loss."""
    raise CoupledSamplesError(
        f"model_fn calls {name}: what other processes send becomes part of this sample's loss, and "
        "theirs of it, so the loss of one sample depends on others. Leave it out of the forward "
        "pass, and communicate before or after the call; gradients of all ranks' samples come by "
        "group=..., scores by gf.distributed.gather. Of a sharded module, "
        "give gf.from_module the module itself, and use its parameters inside of their unit."
    )


class Refusals(Mode):
    """Raises for calls that have no per-sample meaning."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in REFUSED:
            REFUSED[func](*args, **kwargs)
        return func(*args, **kwargs)


@refuse(Tensor.register_hook)
def check_hook(input: Tensor, hook: Any) -> None:
    raise TransformError(
        "model_fn registers a hook on a tensor, which may change gradients where no transform sees "
        "it. Register no hook in model_fn; write a change of gradients as a function, such as "
        "x * c + (x * (1 - c)).detach()."
    )


def check_collective(name: str, *args: Any, **kwargs: Any) -> None:
    refuse_collective(f"torch.distributed.{name}")


_COLLECTIVES = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "gather",
    "scatter", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single",
    "send", "recv", "isend", "irecv",
)  # fmt: skip
"""First runs see their ops; later ones, whose way may have changed, see the functions."""

if torch.distributed.is_available():
    REFUSED.update(
        {getattr(torch.distributed, name): partial(check_collective, name) for name in _COLLECTIVES}
    )
