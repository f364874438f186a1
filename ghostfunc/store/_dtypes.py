"""How rows are stored: float32, float16, or bfloat16 as its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghostfunc._base.options import one_of
from ghostfunc.store._errors import StoreError

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
UNWRITTEN: dict[str, Any] = {"float32": float("nan"), "float16": float("nan"), "bfloat16": 0x7FC0}
"""NaN, in the stored type: what a chunk that is not there reads as."""


def check_dtype(dtype: str) -> None:
    """Raise `OptionError` for a dtype that cannot be stored."""
    one_of("dtype", dtype, tuple(TORCH))


def encode(rows: Tensor, dtype: str) -> NDArray[Any]:
    """Rows as they are stored; `StoreError` for rows that are not finite in that dtype."""
    rows = rows.detach().cpu()
    cast = rows.to(TORCH[dtype])
    bad = (~torch.isfinite(cast)).any(1).nonzero().flatten().tolist()
    if bad:
        largest = float(rows[bad[0]].abs().max())
        raise StoreError(
            f"row {bad[0]} of {len(rows)} is not finite as {dtype} (largest entry {largest:g}). "
            + ("Store float32 or bfloat16." if dtype == "float16" else "Check the losses.")
        )
    if dtype == "bfloat16":
        return cast.contiguous().view(torch.int16).numpy().view(np.uint16)
    return cast.numpy()


def decode(rows: NDArray[Any], dtype: str) -> Tensor:
    """The float32 values of stored rows."""
    if dtype == "bfloat16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(rows).float()
