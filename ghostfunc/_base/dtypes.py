"""The dtype that contractions run in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype contractions run in: float32, or wider if `x` is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
