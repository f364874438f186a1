"""`torch.compile` around the public functions.

The compiler meets a decorated function in two ways. While it reads the caller's program it cannot
follow this package (modes, identities, graphs of autograd), so it hands the call over as a whole,
after `prepare` has run it once on the real tensors: that is when the model is traced and proven,
which takes values. Then it runs the same Python again on tensors without values and records the
torch ops, forward and backward, that come of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ghostfunc._base.options import check_model_fn
from ghostfunc._base.torch_private import _pytree
from ghostfunc._base.torch_words import in_our_words

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


def compilable(returns: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Let `torch.compile` capture a function `f(model_fn, *args, **kwargs)` of this package.

    Its arguments and results are torch pytrees of tensors, numbers and strings, or of types that
    are declared by `node` or `register_constant`; `returns` is its result's type if that is a named
    tuple.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def captured(model_fn: Any, *args: Any, **kwargs: Any) -> Any:
            check_model_fn(model_fn)
            if torch.compiler.is_dynamo_compiling():
                # Imported here since it loads the compiler; nobody else pays for that.
                from ghostfunc._base import captured as compiler

                out = compiler.capture(function, model_fn, *args, **kwargs)
                return out if returns is None else returns(*out)
            try:
                return function(model_fn, *args, **kwargs)
            except RuntimeError as error:
                if (ours := in_our_words(error)) is not None:
                    raise ours from error
                raise

        return captured  # type: ignore[return-value]

    return decorate


def node(*fields: str) -> Callable[[C], C]:
    """Declare a class, made of these keyword arguments and with attributes of the same names, to be
    a torch pytree of them."""

    def declare(cls: C) -> C:
        _pytree.register_pytree_node(
            cls,
            lambda x: ([getattr(x, field) for field in fields], None),
            lambda children, _: cls(**dict(zip(fields, children, strict=True))),
        )
        return cls

    return declare
