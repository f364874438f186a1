"""The look at losses, and at what was made of directions, put off until a device has all it has to
do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostfunc._base.errors import ParamsError
from ghostfunc._base.purity import check_finite
from ghostfunc._base.torch_private import symbolic, wrapped
from ghostfunc._base.trees import ParamSpec


def refuse_not_finite(us: Sequence[Tensor], spec: ParamSpec, what: str) -> None:
    """Raise `ParamsError` if a direction has a NaN or infinite entry. It waits for the device; of
    tensors without values, and of those that a transform has wrapped, nobody knows."""
    for name, u in zip(spec.names, us, strict=True):
        if symbolic(u) or wrapped(u):
            continue
        bad = int((~u.isfinite()).sum())
        if bad:
            raise ParamsError(
                f"{what} leaf {name!r} has {bad} of {u.numel()} entries that are NaN or infinite: "
                "every score would be. Usual causes: a gradient that overflowed in half precision, "
                "the square root of zero, a loss scaled up too far."
            )


@dataclass
class FiniteLosses:
    """Losses that are to be looked at, all of them by one wait for the device, and values that are
    to be explained if they are not finite.

    Attributes:
        wanted: whether they are; the caller may check them himself.
    """

    wanted: bool = True
    _losses: list[Tensor] = field(default_factory=list)
    _doubted: list[tuple[Tensor, Callable[[], None]]] = field(default_factory=list)

    def add(self, losses: Tensor) -> None:
        """Have `losses [n]` looked at later."""
        if self.wanted and not symbolic(losses):
            self._losses.append(losses.detach())

    def doubt(self, values: Tensor, blame: Callable[[], None]) -> None:
        """Have `blame` called if `values` turn out not to be finite: it raises if what the caller
        gave is why."""
        if self.wanted and not symbolic(values) and not wrapped(values):
            self._doubted.append((values.detach(), blame))

    def look(self, unlikely: Tensor | None = None) -> bool:
        """Raise `NonFiniteLossError` if a loss is NaN or infinite, and what `blame` raises for
        values that are. Returns whether anything in `unlikely`, booleans, is true."""
        sums = [x.sum() for x in (*self._losses, *(values for values, _ in self._doubted))]
        if unlikely is not None:
            nothing = torch.zeros_like(unlikely, dtype=torch.float32)
            sums.append(nothing.masked_fill(unlikely, math.nan).sum())
        if not sums:
            return False
        total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
        losses, self._losses = self._losses, []
        doubted, self._doubted = self._doubted, []
        if math.isfinite(total.item()):
            return False
        for x in losses:
            check_finite(x)
        for values, blame in doubted:
            if not bool(values.isfinite().all()):
                blame()
        return unlikely is not None and bool(unlikely.any())
