"""Shards: a parameter of which every rank holds a part, and the op that makes it whole.

    gather:    W = [W_1; ...; W_R]                 every rank gets the whole parameter
    pushed:    u = [u_1; ...; u_R]                 a direction, sharded like it, is gathered
    pulled:    dL/dW_r = sum_ranks (dL/dW)[r]      a gradient is summed over ranks, and scattered

A tensor parallel plan cuts as well, and its ranks have the same samples: there a gradient is cut,
and not summed.

`gather` is an op of the program as torch functions see it, and linear: what it makes of a parameter
is an ordinary derived tensor. A sample's gradient is one of the whole parameter, and its rank alone
knows it: factors are handed on as a cast hands them on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ghostfunc._base.errors import TransformError
from ghostfunc._base.processes.in_step import InStep
from ghostfunc._base.torch_private import (
    all_gather,
    in_transform,
    reduce_scatter,
    without_torch_functions,
)

Exchange: TypeAlias = Callable[[Callable[[], Any]], None]
"""Makes a collective, once all ranks have come to it."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One cut of a tensor along an axis, as this rank sees it.

    Attributes:
        shape: of what is cut.
        dim: the axis, in pieces as `torch.chunk` makes them: the last may be smaller, or empty.
        group: the ranks that hold the pieces.
        rank, size: of this process in it, and how many pieces there are.
        summed: whether these ranks have samples of their own, so that a gradient is summed over
            them. Those of a tensor parallel plan have the same samples, and the same gradient.
        copies: the ranks that hold this rank's piece for other samples; None if there is one copy.
    """

    shape: tuple[int, ...]
    dim: int
    group: Any
    rank: int
    size: int
    summed: bool = True
    copies: Any = None

    @property
    def most(self) -> int:
        """Rows of the largest piece."""
        return -(-self.shape[self.dim] // self.size)

    @property
    def start(self) -> int:
        """The first row of this rank's piece."""
        return min(self.rank * self.most, self.shape[self.dim])

    @property
    def rows(self) -> int:
        """Rows of this rank's piece."""
        return min(self.most, self.shape[self.dim] - self.start)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of this rank's piece."""
        return (*self.shape[: self.dim], self.rows, *self.shape[self.dim + 1 :])

    def put_together(self, x: Tensor, exchange: Exchange) -> Tensor:
        """What was cut, of every rank's piece."""
        rest = [*self.shape[: self.dim], *self.shape[self.dim + 1 :]]
        padded = _padded(x.movedim(self.dim, 0), self.most)
        out = x.new_empty(self.size * self.most, *rest)
        exchange(lambda: all_gather(out, padded, group=self.group))
        return out[: self.shape[self.dim]].movedim(0, self.dim).contiguous()

    def cut(self, g: Tensor, exchange: Exchange) -> Tensor:
        """This rank's piece of a gradient: of its sum, where ranks have samples of their own."""
        if not self.summed:
            return g.narrow(self.dim, self.start, self.rows).contiguous()
        padded = _padded(g.movedim(self.dim, 0), self.size * self.most)
        out = g.new_empty(self.most, *padded.shape[1:])
        exchange(lambda: reduce_scatter(out, padded, group=self.group))
        if self.copies is not None:
            exchange(lambda: torch.distributed.all_reduce(out, group=self.copies))
        return out[: self.rows].movedim(0, self.dim).contiguous()


@dataclass(frozen=True, eq=False)
class Shards:
    """How one parameter lies on the ranks.

    Attributes:
        name: the parameter's.
        shape: of the whole.
        cuts: from the whole to a rank's piece, one after the other.
        ranks: all that hold a piece, of any copy.
        whole: whether every rank has all of it, for now or always: there is nothing to gather.
    """

    name: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    ranks: InStep
    whole: bool = False

    def held_whole(self) -> Shards:
        """The same where every rank has all of it."""
        return replace(self, whole=True)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of this rank's piece."""
        return self.cuts[-1].local_shape if self.cuts else self.shape

    @property
    def holders(self) -> int:
        """How many of the ranks hold this rank's very piece."""
        return self.ranks.size // math.prod(cut.size for cut in self.cuts)

    def like(self, x: Tensor) -> Tensor:
        """A tensor of zeros like the whole, without its memory."""
        return x.new_zeros(()).expand(self.shape)

    def all_gather(self, x: Tensor) -> Tensor:
        """The whole, of every rank's piece."""
        with without_torch_functions():  # what is done here is no op of the program
            x = x.detach()
            exchange = partial(self._exchange, f"gathering {self.name!r}", x.dtype)
            for cut in reversed(self.cuts):
                x = cut.put_together(x, exchange)
            return x

    def reduce_scatter(self, g: Tensor) -> Tensor:
        """This rank's piece of the sum over ranks."""
        with without_torch_functions():
            g = g.detach()
            exchange = partial(self._exchange, f"reducing {self.name!r}", g.dtype)
            for cut in self.cuts:
                g = cut.cut(g, exchange)
            return g

    def _exchange(self, what: str, dtype: torch.dtype, collective: Callable[[], Any]) -> None:
        self.ranks.meet(f"{what} ({dtype})")
        try:
            collective()
        except RuntimeError as error:
            raise self.ranks.lost(what, error) from error


def _padded(x: Tensor, rows: int) -> Tensor:
    """`x` with rows of zeros added, in memory without gaps."""
    if len(x) == rows:
        return x.contiguous()
    out = x.new_zeros(rows, *x.shape[1:])
    out[: len(x)] = x
    return out


class _Gathered(torch.autograd.Function):
    """The whole, of a piece; its cotangent is summed over ranks and cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.shards.reduce_scatter(g), None, None


class _Shown(torch.autograd.Function):
    """The whole, which no gradient may reach: where one does, nothing is communicated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor) -> Tensor:
        ctx.shape = x.shape
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.new_zeros(ctx.shape), None


def gather(x: Tensor, shards: Shards) -> Tensor:
    """The whole parameter, of this rank's piece."""
    if has_torch_function((x,)):
        seen: Tensor = handle_torch_function(gather, (x,), x, shards)
        return seen
    if shards.whole:
        return x.view_as(x)
    if in_transform():
        raise TransformError(
            f"Parameter {shards.name!r} is spread over ranks, and torch.func transforms (grad, "
            "jvp, vmap) do not communicate. Call ghostfunc outside of them, or give it the whole "
            "model."
        )
    out: Tensor = attached(x, shards.all_gather(x), shards)
    return out


def attached(x: Tensor, whole: Tensor, shards: Shards) -> Tensor:
    """`whole`, which was gathered before, as it depends on the piece `x`."""
    out: Tensor = _Gathered.apply(x, whole, shards)
    return out


def shown(x: Tensor, whole: Tensor) -> Tensor:
    """`whole`, as the program gets it: the dependence on `x` is only noticed."""
    out: Tensor = _Shown.apply(x, whole)
    return out
