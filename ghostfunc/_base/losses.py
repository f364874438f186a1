"""What losses have to be: one finite float per sample, on which parameters act where it is seen.

`FiniteLosses` puts the look at them off until a device has all that it has to do, and looks at what
was made of directions at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostfunc._base.dtypes import digits_of
from ghostfunc._base.errors import (
    WAYS_OUT,
    LossShapeError,
    NonFiniteLossError,
    ParamsError,
    TransformError,
    UntrackedUseError,
)
from ghostfunc._base.torch_private import batched_within, symbolic, wrapped
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


def check_losses(losses: object, n: int) -> Tensor:
    """`losses`, if they are one finite float per sample."""
    checked = check_shape(losses, n)
    check_finite(checked)
    return checked


def check_shape(losses: object, n: int) -> Tensor:
    """`losses`, if they are one float per sample, finite or not."""
    if not isinstance(losses, Tensor):
        raise LossShapeError(
            f"model_fn returned a {type(losses).__name__}; expected a tensor of per-sample losses, "
            f"shape [{n}]."
        )
    if losses.shape != (n,) or not losses.is_floating_point():
        raise LossShapeError(
            f"model_fn returned shape {tuple(losses.shape)} of {losses.dtype} for {n} samples; "
            f"expected one floating-point loss per sample, shape [{n}]. Do not reduce over "
            'samples (use reduction="none", then average over each sample\'s own positions).'
        )
    return losses


def check_finite(losses: Tensor) -> None:
    """Raise `NonFiniteLossError` if a loss is NaN or infinite. A compiled program does not look:
    what it returns is not finite either."""
    if symbolic(losses):
        return
    if batched_within(losses):
        raise TransformError(
            "torch.vmap over what model_fn closes over is not supported: a model has to be looked "
            "at with values. Loop over it; vmap over directions works."
        )
    if math.isfinite(losses.detach().sum().item()):
        return  # losses in order take this one wait for the device; an error message takes more
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(f"losses[{i}] = {losses[i].item()}" for i in bad[:5])
        raise NonFiniteLossError(
            f"{len(bad)} of {len(losses)} losses are not finite: {shown}. Check the inputs and the "
            "parameters; a sample without a single labelled position has a mean loss of 0/0."
        )


def close(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether losses agree to the digits of their dtype, or of another one they came through.

    Each is compared to itself: a large one hides no other. What is smaller than one, and than the
    largest, is compared to that: a loss near zero is a difference of larger numbers.
    """
    eps = torch.finfo(digits_of(a.dtype) if dtype is None else dtype).eps
    tolerance = min(0.1, 64 * (eps if eps > 1e-4 else eps**0.8))
    largest = min(1.0, float(a.detach().abs().max()) if a.numel() else 0.0)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest + eps)


def refuse_unseen(spec: ParamSpec, cotangents: Sequence[Tensor | None]) -> None:
    """Raise `UntrackedUseError` if a cotangent reached a parameter past the taps."""
    unseen = [name for name, g in zip(spec.names, cotangents, strict=True) if g is not None]
    if unseen:
        raise unseen_use(unseen)


def unseen_use(names: Sequence[str]) -> UntrackedUseError:
    listed = ", ".join(map(repr, names))
    return UntrackedUseError(
        f"The losses depend on parameter {listed} on a path ghostfunc does not see: a custom "
        f"autograd.Function, a write into a buffer, or code outside torch functions. {WAYS_OUT}"
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
