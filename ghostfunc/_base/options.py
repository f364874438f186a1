"""Checks of options: one function for every option that several calls share."""

from __future__ import annotations

import torch
from torch import nn

from ghostfunc._base.errors import OptionError


def check_contract_dtype(contract_dtype: object, mode: str = "ghost") -> None:
    """Raise `OptionError` unless contractions of this mode can run in `contract_dtype`."""
    if contract_dtype is None:
        return
    if contract_dtype not in (torch.bfloat16, torch.float16):
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


def check_model_fn(model_fn: object) -> None:
    """Raise `OptionError` unless it may be a function of parameters and a batch."""
    if isinstance(model_fn, nn.Module):
        raise OptionError(
            f"model_fn is a {type(model_fn).__name__}, a module: expected a pure function "
            "model_fn(params, batch) -> losses [n]. Make one of it by "
            "model_fn, params = gf.from_module(module, loss)."
        )
    if not callable(model_fn):
        raise OptionError(
            f"model_fn is a {type(model_fn).__name__}; expected a function "
            "model_fn(params, batch) -> losses [n]."
        )


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `OptionError` unless `value` is one of `allowed`."""
    if value not in allowed:
        options = ", ".join(repr(a) for a in allowed)
        raise OptionError(f"{name}={value!r} is not an option. Use one of: {options}.")


def check_chunk_size(chunk_size: object) -> None:
    """Raise unless it is None or a positive integer."""
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and (not whole or chunk_size < 1):  # type: ignore[operator]
        raise OptionError(
            f"chunk_size must be a positive integer, the most samples to run at one time, or None "
            f"for all of them; got {chunk_size!r}."
        )
