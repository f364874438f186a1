"""What the compiler calls instead of a public function; see `compilable`. Loaded by it alone."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ghostfunc._base.documents import Documents
from ghostfunc._base.errors import TransformError
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.torch_private import _pytree, nonstrict_trace

_numbers = itertools.count()
_functions: dict[int, tuple[Callable[..., Any], weakref.ref[Any], _pytree.TreeSpec]] = {}
"""A function, the model's and the structure of the arguments, by number: that is what a recorded
program can hold."""


def capture(function: Callable[..., Any], model_fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Record a call of `function`. The compiler reads this function's source."""
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    if any(isinstance(x, Documents) for x in leaves):
        return _refuse_documents()
    flags: tuple[bool, ...] = ()
    state: dict[str, Any] = {}
    if isinstance(model_fn, ModuleFn):
        # What the compiler reads here, and passes on, it checks before every later call.
        flags = model_fn.training_flags()
        state = model_fn.closed_over(args[0] if args else kwargs["params"])
    number = _prepare(function, model_fn, flags, (spec,), *leaves)
    # The sum is an ordinary number, whose origin is not looked into.
    out = _record(number + 0, state, [_without_none(x) for x in leaves])
    return _pytree.tree_map(_result, out)


@torch.compiler.assume_constant_result
def _refuse_documents() -> None:
    raise TransformError(
        "torch.compile cannot record calls on packed documents: where they lie is read from the "
        "batch. Call the function uncompiled."
    )


# A recorded program can neither take nor return None. A string stands for it among the arguments,
# and a tensor of a dtype that no result has among the results.
_NONE = "nothing"


def _result(x: Any) -> Any:
    return None if isinstance(x, torch.Tensor) and x.dtype == torch.uint8 else x


def _without_none(x: Any) -> Any:
    return _NONE if x is None else x


def _with_none(x: Any) -> Any:
    return None if isinstance(x, str) and x == _NONE else x


@torch.compiler.assume_constant_result
def _prepare(
    function: Callable[..., Any],
    model_fn: Any,
    flags: tuple[bool, ...],
    spec: tuple[_pytree.TreeSpec],
    *leaves: Any,
) -> int:
    """Run the call on the real tensors, and give the functions a number: that of a program for
    these training `flags`."""
    del flags
    args, kwargs = _pytree.tree_unflatten(leaves, spec[0])
    if kwargs.get("group") is not None:
        raise TransformError(
            f"{function.__name__} got a group inside torch.compile, which cannot follow an "
            "exchange between processes. Call it outside."
        )
    if isinstance(model_fn, ModuleFn) and model_fn.sharding is not None:
        raise TransformError(
            f"{function.__name__} got a sharded module inside torch.compile, "
            "which cannot follow what its ranks exchange. Call it outside."
        )
    function(model_fn, *args, **kwargs)
    number = next(_numbers)
    forget = weakref.ref(model_fn, lambda _: _functions.pop(number, None))
    _functions[number] = (function, forget, spec[0])
    return number


@nonstrict_trace
def _record(number: int, state: dict[str, Any], leaves: list[Any]) -> Any:
    function, alive, spec = _functions[number]
    model_fn = alive()
    if model_fn is None:
        raise TransformError(
            "model_fn was deleted while the function that calls it was being compiled. Keep a "
            "reference to it."
        )
    if state:
        model_fn = model_fn.closing_over(state)
    args, kwargs = _pytree.tree_unflatten([_with_none(x) for x in leaves], spec)
    out = function(model_fn, *args, **kwargs)
    # Named tuples would not come through; the caller makes one of this again.
    out = tuple(out) if isinstance(out, tuple) else out
    return _pytree.tree_map(
        lambda x: torch.empty(0, dtype=torch.uint8, device="cpu") if x is None else x, out
    )
