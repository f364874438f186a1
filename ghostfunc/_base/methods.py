"""Methods that modules have for a while, in place of their class's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn


class Override(NamedTuple):
    """A method of one module, to be called without the module."""

    module: nn.Module
    name: str
    method: _Method


class _Method(partial[Any]):
    """The type of such a method, by which it is told from what a module has of its own."""


def override(module: nn.Module, name: str, function: Any, *first: Any) -> Override:
    """The override that gives a module a method of this name: `function`, after its `first`
    arguments."""
    return Override(module, name, _Method(function, *first))


@contextmanager
def overridden(overrides: Iterable[Override]) -> Iterator[None]:
    """Give modules these methods. What a module has of its own stays."""
    with ExitStack() as stack:
        for module, name, method in overrides:
            own = vars(module)
            if name not in own:
                own[name] = method
                stack.callback(own.pop, name, None)
        yield


def overrides_now(modules: Iterable[nn.Module]) -> list[Override]:
    """The methods that modules have for a while at the moment."""
    return [
        Override(module, name, method)
        for module in modules
        for name, method in vars(module).items()
        if isinstance(method, _Method)
    ]
