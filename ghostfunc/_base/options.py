"""Checks of options: one function for every option that several calls share."""

from __future__ import annotations

import math
import os
from collections.abc import Sized
from numbers import Integral, Real

import torch
from torch import nn

from ghostfunc._base.errors import OptionError


def check_contract_dtype(contract_dtype: object, mode: str = "ghost") -> None:
    """Raise `OptionError` unless contractions of this mode can run in `contract_dtype`."""
    if contract_dtype is None:
        return
    allowed = (torch.bfloat16, torch.float16)
    if not isinstance(contract_dtype, torch.dtype) or contract_dtype not in allowed:
        raise OptionError(
            f"contract_dtype={contract_dtype!r} is not an option. Use one of: None (float32 or "
            "wider), torch.bfloat16, torch.float16."
        )
    if mode != "ghost":
        raise OptionError(
            f"contract_dtype={contract_dtype} is about the contraction of factors, and "
            f'mode={mode!r} contracts none. Drop it, or use mode="ghost".'
        )


CHECKS = ("new", "always", "never")
"""What `check` may be: see `_taps/proof.py`."""


def check_model_fn(model_fn: object, name: str = "model_fn") -> None:
    """Raise `OptionError` unless it may be a function of parameters and a batch."""
    if isinstance(model_fn, nn.Module):
        raise OptionError(
            f"{name} is a {type(model_fn).__name__}, a module: expected a pure function "
            "model_fn(params, batch) -> losses [n]. Make one of it by "
            "model_fn, params = gf.from_module(module, loss)."
        )
    if not callable(model_fn):
        raise OptionError(
            f"{name} is a {type(model_fn).__name__}; expected a function "
            "model_fn(params, batch) -> losses [n]."
        )


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `OptionError` unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        options = ", ".join(repr(a) for a in allowed)
        raise OptionError(f"{name}={value!r} is not an option. Use one of: {options}.")


def check_flags(**flags: object) -> None:
    """Raise `OptionError` unless all of them are True or False: what else is true for Python may
    have been meant to be false, such as "no"."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name}={value!r} must be True or False.")


def check_vectorize(vectorize: object) -> None:
    """Raise `OptionError` unless it is True, False or None."""
    if vectorize is not None and not isinstance(vectorize, bool):
        raise OptionError(
            f"vectorize={vectorize!r} must be True (vmap), False (a loop over samples), or None "
            "(the loop where vmap cannot run the model)."
        )


def check_type(name: str, value: object, types: type | tuple[type, ...], expected: str) -> None:
    """Raise `OptionError` unless it is of one of these types."""
    if not isinstance(value, types):
        raise OptionError(f"{name} is a {type(value).__name__}; expected {expected}.")


def check_callable(name: str, value: object, expected: str) -> None:
    """Raise `OptionError` unless it is a function."""
    if not callable(value):
        raise OptionError(f"{name} is a {type(value).__name__}; expected a function {expected}.")


def check_path(name: str, value: object) -> None:
    """Raise `OptionError` unless it is a path."""
    check_type(name, value, (str, os.PathLike), "a path, a str or a pathlib.Path")
    if "\0" in str(value):
        raise OptionError(f"{name}={value!r} has a null byte in it, which no path can have.")


def check_dataset(dataset: object) -> None:
    """Raise `OptionError` unless samples can be taken from it by their numbers."""
    if not isinstance(dataset, Sized) or isinstance(dataset, (str, bytes)):
        raise OptionError(
            f"dataset is a {type(dataset).__name__}; expected a map-style data set, with "
            "len(dataset) and dataset[i]."
        )


def check_whole(name: str, value: object, least: int = 1) -> int:
    """`value`, if it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(f"{name}={value!r} must be an integer, {least} or more.")
    return int(value)


def check_number(name: str, value: object, but: str = "") -> float:
    """`value`, if it is a finite number; `but` says what else it has to be."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise OptionError(f"{name}={value!r} must be a finite number{but}.")
    return float(value)


def check_not_negative(name: str, value: object) -> float:
    """`value`, if it is a finite number that is not negative."""
    if (found := check_number(name, value, ", not negative")) < 0:
        raise OptionError(f"{name}={value!r} must not be negative.")
    return found


def check_positive(name: str, value: object, *, infinite: bool = False) -> float:
    """`value`, if it is a number above zero, and finite unless it may be `infinite`."""
    if infinite and isinstance(value, float) and value == math.inf:
        return value
    if (found := check_number(name, value, ", a positive one")) <= 0:
        raise OptionError(f"{name}={value!r} must be a positive number.")
    return found


def check_betas(betas: object) -> None:
    """Raise `OptionError` unless it is Adam's pair of decay rates."""
    match betas:
        case (first, second) if all(0 <= check_number("betas", b) < 1 for b in (first, second)):
            return
    raise OptionError(f"betas={betas!r} must be a pair of numbers from 0 to 1, without 1.")


def check_chunk_size(chunk_size: object) -> None:
    """Raise unless it is None or a positive integer."""
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and (not whole or chunk_size < 1):  # type: ignore[operator]
        raise OptionError(
            f"chunk_size must be a positive integer, the most samples to run at one time, or None "
            f"for all of them; got {chunk_size!r}."
        )
