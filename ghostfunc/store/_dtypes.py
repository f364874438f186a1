"""How rows are stored: float32, float16, or bfloat16 as its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghostfunc._base.dtypes import lengths
from ghostfunc._base.options import one_of
from ghostfunc.store._errors import StoreError

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
UNWRITTEN: dict[str, Any] = {"float32": "NaN", "float16": "NaN", "bfloat16": 0x7FC0}
"""NaN, as zarr writes it in the stored type: the fill value, of what is not written."""
ROUNDINGS = 16
"""How many units in the last place a row may be off, in its dtype or the model's."""


def check_dtype(dtype: str) -> None:
    """Raise `OptionError` for a dtype that cannot be stored."""
    one_of("dtype", dtype, tuple(TORCH))


def encode(rows: Tensor, dtype: str) -> NDArray[Any]:
    """Rows as they are stored; `StoreError` for rows that overflow or vanish in that dtype."""
    rows = rows.detach().cpu()
    cast = rows.to(TORCH[dtype])
    bad = (~torch.isfinite(cast)).any(1).nonzero().flatten().tolist()
    if bad:
        largest = float(rows[bad[0]].abs().max())
        raise StoreError(
            f"row {bad[0]} of {len(rows)} is not finite as {dtype} (largest entry {largest:g}). "
            + ("Store float32 or bfloat16." if dtype == "float16" else "Check the losses.")
        )
    _refuse_lost(rows, cast, dtype)
    if dtype == "bfloat16":
        return cast.contiguous().view(torch.int16).numpy().view(np.uint16)
    return cast.numpy()


def _refuse_lost(rows: Tensor, cast: Tensor, dtype: str) -> None:
    """Raise `StoreError` for rows of which the dtype keeps no digits, for they are too small."""
    if cast.dtype == rows.dtype or not rows.numel():
        return
    rows = rows.double()
    size, off = lengths(rows), lengths(cast.double() - rows)
    # A row that is rounding beside the others has no digits to lose.
    least = torch.finfo(torch.float32).eps * size.median()
    allowed = ROUNDINGS * torch.finfo(cast.dtype).eps * size.clamp(min=least)
    lost = (off > allowed).nonzero().flatten().tolist()
    if lost:
        largest = float(rows[lost[0]].abs().max())
        raise StoreError(
            f"row {lost[0]} of {len(rows)} is too small for {dtype} (largest entry {largest:g}): "
            f"rounding changes it by {float(off[lost[0]] / size[lost[0]]):.2g} of its length. "
            + ("Store float32 or bfloat16." if dtype == "float16" else "Scale the losses.")
        )


def decode(rows: NDArray[Any], dtype: str) -> Tensor:
    """The float32 values of stored rows."""
    if dtype == "bfloat16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(rows).float()
