"""Calls that have no per-sample meaning, and the mode that refuses them."""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch.overrides import (
    resolve_name,
)

from ghostfunc._base.errors import CoupledSamplesError
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
