"""Fingerprints of tensors and of functions: what made the rows of a store."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ghostfunc._base.fingerprint import fingerprint as of_tensors
from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import PyTree


def fingerprint(params: PyTree) -> str:
    """SHA-256 of the names, shapes, dtypes and values of all parameters, in order of names."""
    leaves, spec = flatten_params(params)
    return of_tensors(spec.names, leaves)


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The fingerprint of every tensor by itself: its shape, dtype and values."""
    return {name: of_tensors([""], [x])[:32] for name, x in tensors.items()}


def description(function: Callable[..., Any]) -> str:
    """A function as text: its name, and a hash of its code where Python has it.

    It tells two functions apart for a message. Equal ones may be described differently, by another
    version of Python say, and different ones alike if they differ in what they close over.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, types.MethodType):
        function = function.__func__
    if isinstance(function, types.FunctionType):
        code = _code(function.__code__)
        return f"{function.__module__}.{function.__qualname__} (code {code})"
    return f"{type(function).__module__}.{type(function).__qualname__}"


def _code(code: types.CodeType) -> str:
    digest = hashlib.sha256(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        inner = _code(constant) if isinstance(constant, types.CodeType) else repr(constant)
        digest.update(inner.encode())
    return digest.hexdigest()[:8]
