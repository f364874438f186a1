"""Where the sample axis of a tensor lies, and how to bring it to the front.

A tensor that carries samples has them on an axis of their own (`[n, T, d]`, `[T, n, d]`), or folded
together with positions, sample-major (`[n*T, d]`), position-major (`[T*n, d]`) or between two axes
of positions (`[A*n*B, d]`). A `Layout` says which it is. `sample_axis.py` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from ghostfunc._base.errors import SampleAxisError

Fold = Literal["none", "sample-major", "position-major", "between"]


@dataclass(frozen=True)
class Layout:
    """The sample axis of one tensor: its position, and what it is folded with.

    Attributes:
        axis: of the tensor, where samples and positions are folded together, if they are.
        outer, inner: how many positions there are before and after the samples where they lie
            between. The shape of another batch tells `outer * inner` alone, so a layout fits only
            batches with these very numbers.
    """

    axis: int
    fold: Fold = "none"
    outer: int = 1
    inner: int = 1

    @property
    def extra_axes(self) -> int:
        """How many axes `split` adds."""
        return {"none": 0, "between": 2}.get(self.fold, 1)

    def folded_like(self, other: Layout) -> Layout:
        """This axis, folded as another layout's is."""
        return replace(self, fold=other.fold, outer=other.outer, inner=other.inner)

    def check(self, x: Tensor, n: int) -> None:
        """Raise `StaleLayout` unless `x` can have n samples in this layout."""
        size = x.shape[self.axis] if self.axis < x.ndim else -1
        fixed = {"none": n, "between": self.outer * n * self.inner}.get(self.fold, size)
        if size % n or size != fixed:
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
        return self.axis + (self.fold in ("position-major", "between"))

    def split(self, x: Tensor, n: int) -> Tensor:
        """`x` with the sample axis on its own, in place; a view."""
        if self.fold == "none":
            return x
        if self.fold == "between":
            return x.unflatten(self.axis, (self.outer, n, self.inner))
        sizes = (n, -1) if self.fold == "sample-major" else (-1, n)
        return x.unflatten(self.axis, sizes)

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x.flatten(self.axis, self.axis + self.extra_axes) if self.extra_axes else x

    def front(self, x: Tensor, n: int) -> Tensor:
        """`x` as `[n, ...]`, positions on one axis; a view where that can be."""
        x = self.split(x, n)
        x = x.movedim(self.sample_axis, 0) if self.sample_axis else x
        return x.flatten(self.axis + 1, self.axis + 2) if self.fold == "between" else x

    def stack(self, x: Tensor, n: int) -> Tensor:
        """`x` as `[n, *shape]`, where `shape` is what a call with one sample would have; a view
        where that can be."""
        if self.fold != "none":
            return self.front(x, n)
        x = x.movedim(self.axis, 0) if self.axis else x
        return x.unsqueeze(self.axis + 1)

    def unstack(self, x: Tensor) -> Tensor:
        """The inverse of `stack`."""
        if self.fold == "none":
            return x.squeeze(self.axis + 1).movedim(0, self.axis)
        if self.fold == "between":
            x = x.unflatten(self.axis + 1, (self.outer, self.inner))
        return self.merge(x.movedim(0, self.sample_axis))

    def pad(self, w: Tensor, ndim: int) -> Tensor:
        """A tensor without samples, shaped to broadcast against a split one of `ndim` axes
        before the split: it has size 1 on the sample axis."""
        w = w.reshape((1,) * (ndim - w.ndim) + tuple(w.shape))
        if w.shape[self.axis] != 1:
            raise SampleAxisError(
                f"A parameter of shape {tuple(w.shape)} spans the axis that holds the samples "
                f"(axis {self.axis}): each sample would have a parameter of its own."
            )
        for _ in range(self.extra_axes):
            w = w.unsqueeze(self.axis)
        return w


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
