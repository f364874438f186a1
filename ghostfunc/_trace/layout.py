"""Where the sample axis of a tensor lies, and how to bring it to the front.

A tensor that carries samples has them on an axis of their own (`[n, T, d]`, `[T, n, d]`), or folded
together with positions, sample-major (`[n*T, d]`) or position-major (`[T*n, d]`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ghostfunc._base.errors import SampleAxisError

Fold = Literal["none", "sample-major", "position-major"]


@dataclass(frozen=True)
class Layout:
    """The sample axis of one tensor: its position, and what it is folded with."""

    axis: int
    fold: Fold = "none"

    def check(self, x: Tensor, n: int) -> None:
        """Raise `StaleLayout` unless `x` can have n samples in this layout."""
        size = x.shape[self.axis] if self.axis < x.ndim else -1
        if size % n or (self.fold == "none" and size != n):
            raise StaleLayout(
                f"a tensor of shape {tuple(x.shape)} does not hold {n} samples on axis "
                f"{self.axis} ({self.fold} folding)"
            )

    def ambiguous(self, x: Tensor, n: int) -> bool:
        """Whether, going by its shape, `x` might as well have its samples elsewhere."""
        others = [s for i, s in enumerate(x.shape) if i != self.axis]
        return n > 1 and (self.fold != "none" or n in others)

    @property
    def sample_axis(self) -> int:
        """Index of the sample axis after `split`."""
        return self.axis + (self.fold == "position-major")

    def split(self, x: Tensor, n: int) -> Tensor:
        """`x` with the sample axis on its own, in place; a view."""
        if self.fold == "none":
            return x
        sizes = (n, -1) if self.fold == "sample-major" else (-1, n)
        return x.unflatten(self.axis, sizes)

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x if self.fold == "none" else x.flatten(self.axis, self.axis + 1)

    def front(self, x: Tensor, n: int) -> Tensor:
        """`x` as `[n, ...]`; a view."""
        x = self.split(x, n)
        return x.movedim(self.sample_axis, 0) if self.sample_axis else x

    def stack(self, x: Tensor, n: int) -> Tensor:
        """`x` as `[n, *shape]`, where `shape` is what a call with one sample would have; a view."""
        x = self.front(x, n)
        return x.unsqueeze(self.axis + 1) if self.fold == "none" else x

    def pad(self, w: Tensor, ndim: int) -> Tensor:
        """A tensor without samples, shaped to broadcast against a split one of `ndim` axes
        before the split: it has size 1 on the sample axis."""
        w = w.reshape((1,) * (ndim - w.ndim) + tuple(w.shape))
        if w.shape[self.axis] != 1:
            raise SampleAxisError(
                f"A parameter of shape {tuple(w.shape)} spans the axis that holds the samples "
                f"(axis {self.axis}): each sample would have a parameter of its own."
            )
        return w if self.fold == "none" else w.unsqueeze(self.axis)


def stack_all(leaves: Sequence[Any], layouts: Mapping[int, Layout], n: int) -> list[Any]:
    """Every tensor among `leaves` as `[n, *shape]`, `shape` being what a call with one sample would
    have; those that carry no samples (have no layout) are expanded."""
    out = list(leaves)
    for i, x in enumerate(leaves):
        if i in layouts:
            layouts[i].check(x, n)
            out[i] = layouts[i].stack(x, n)
        elif isinstance(x, Tensor):
            out[i] = x.expand(n, *x.shape)
    return out


class StaleLayout(Exception):
    """A cached layout does not fit; the model must be traced again. Never leaves the package."""
