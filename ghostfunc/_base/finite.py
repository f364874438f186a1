"""The look at losses, put off until a device has all it has to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostfunc._base.purity import check_finite
from ghostfunc._base.torch_private import symbolic


@dataclass
class FiniteLosses:
    """Losses that are to be looked at, all of them by one wait for the device.

    Attributes:
        wanted: whether they are; the caller may check them himself.
    """

    wanted: bool = True
    _losses: list[Tensor] = field(default_factory=list)

    def add(self, losses: Tensor) -> None:
        """Have `losses [n]` looked at later."""
        if self.wanted and not symbolic(losses):
            self._losses.append(losses.detach())

    def look(self, unlikely: Tensor | None = None) -> bool:
        """Raise `NonFiniteLossError` if a loss is NaN or infinite. Returns whether anything in
        `unlikely`, booleans, is true."""
        sums = [x.sum() for x in self._losses]
        if unlikely is not None:
            nothing = torch.zeros_like(unlikely, dtype=torch.float32)
            sums.append(nothing.masked_fill(unlikely, math.nan).sum())
        if not sums:
            return False
        total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
        losses, self._losses = self._losses, []
        if math.isfinite(total.item()):
            return False
        for x in losses:
            check_finite(x)
        return unlikely is not None and bool(unlikely.any())
