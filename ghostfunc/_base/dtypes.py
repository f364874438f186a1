"""The dtype that contractions run in, norms that no dtype overflows, and random numbers like a
tensor's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

PIECE = 1 << 18
"""Numbers that are in float64 at one time."""

SMALL = 2.0**-480
"""The squares of smaller lengths lose digits in float64."""

_REAL = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
"""The dtypes that have digits to compare, unlike those of integers and masks."""


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype contractions run in: float32, or wider if `x` is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def digits_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype with as many digits as products of `dtype` have: of float32, TF32 or bfloat16 where
    torch may round to it (`torch.set_float32_matmul_precision`). TF32 has those of float16."""
    if dtype is not torch.float32:
        return dtype
    if torch.__version__ >= "2.9":  # since then each library has a setting of its own
        backends: tuple[Any, ...] = torch.backends.mkldnn, torch.backends.cuda
        words = {x.matmul.fp32_precision for x in backends}
    else:
        words = {torch.get_float32_matmul_precision()}
    if words & {"bf16", "medium"}:
        return torch.bfloat16
    return torch.float16 if words & {"tf32", "high"} else dtype


def coarsest_of(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The real dtype among these whose products have the fewest digits."""
    known = {*map(digits_of, dtypes)} & _REAL
    return max(known, key=lambda x: torch.finfo(x).eps)


def normal_like(generator: np.random.Generator, x: Tensor) -> Tensor:
    """Normal random numbers like `x`. NumPy draws them: torch draws none inside vmap."""
    dtype = np.float64 if x.dtype == torch.float64 else np.float32
    return torch.from_numpy(generator.standard_normal(x.shape, dtype)).to(x)


def squared_norms(
    x: Float[Tensor, "s ..."], y: Float[Tensor, "s ..."] | None = None
) -> Float[Tensor, " s"]:
    """`||x_i - y_i||^2`, or `||x_i||^2`, in float64; no copy of `x` is made."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    pieces, others = _pieces(x), None if y is None else _pieces(y)
    for number, piece in enumerate(pieces):
        part = piece.double()
        if others is not None:
            part = part - others[number].double()
        total = total + part.square().sum(1)
    return total


def lengths(x: Float[Tensor, "s ..."]) -> Float[Tensor, " s"]:
    """`||x_i||` in float64, with all digits where the squares underflow, too."""
    found = squared_norms(x).sqrt()
    (small,) = (found < SMALL).nonzero(as_tuple=True)
    if len(small):
        found = found.index_copy(0, small, squared_norms(x[small].double() / SMALL).sqrt() * SMALL)
    return found


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    flat = x.reshape(len(x), x[0].numel())
    return flat.split(max(1, PIECE // len(x)), dim=1)
