"""Shards: a parameter of which every rank holds a part, and the op that makes it whole.

    gather:    W = [W_1; ...; W_R]                 every rank gets the whole parameter
    pushed:    u = [u_1; ...; u_R]                 a direction, sharded like it, is gathered
    pulled:    dL/dW_r = sum_ranks (dL/dW)[r]      a gradient is summed over ranks, and scattered

`gather` is an op of the program as torch functions see it, and linear: what it makes of a parameter
is an ordinary derived tensor. A sample's gradient is one of the whole parameter, and its rank alone
knows it: factors are handed on as a cast hands them on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True)
class Cut:
    """How parameters are cut, as this rank sees it.

    Attributes:
        group: the ranks that hold the pieces of one copy of the model.
        rank, size: of this process in it, and how many pieces there are.
        copies: the ranks that hold this rank's piece in other copies; None if there is one copy.
    """

    group: Any
    rank: int
    size: int
    copies: Any = None


@dataclass(frozen=True, eq=False)
class Shards:
    """How one parameter lies on the ranks.

    Attributes:
        name: the parameter's.
        shape: of the whole.
        dim: the axis it is cut along, in pieces as `torch.chunk` makes them: the last ones may be
            smaller, or empty.
        ranks: all that hold a piece, of any copy.
        whole: whether every rank has all of it for now, so that there is nothing to gather.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    ranks: InStep
    cut: Cut
    whole: bool = False

    def held_whole(self) -> Shards:
        """The same where every rank has all of it."""
        return replace(self, whole=True)

    @property
    def _most(self) -> int:
        """Rows of the largest piece."""
        return -(-self.shape[self.dim] // self.cut.size)

    def rows(self, rank: int) -> int:
        """Rows of one rank's piece."""
        start = min(rank * self._most, self.shape[self.dim])
        return min(self._most, self.shape[self.dim] - start)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of this rank's piece."""
        shape = list(self.shape)
        shape[self.dim] = self.rows(self.cut.rank)
        return tuple(shape)

    def like(self, x: Tensor) -> Tensor:
        """A tensor of zeros like the whole, without its memory."""
        return x.new_zeros(()).expand(self.shape)

    def all_gather(self, x: Tensor) -> Tensor:
        """The whole, of every rank's piece."""
        rest = [*self.shape[: self.dim], *self.shape[self.dim + 1 :]]
        with without_torch_functions():  # what is done here is no op of the program
            padded = _padded(x.detach().movedim(self.dim, 0), self._most)
            out = x.new_empty(self.cut.size * self._most, *rest)
            self._communicate("gathering", all_gather, out, padded)
            return out[: self.shape[self.dim]].movedim(0, self.dim).contiguous()

    def reduce_scatter(self, g: Tensor) -> Tensor:
        """This rank's piece of the sum over ranks."""
        with without_torch_functions():
            padded = _padded(g.detach().movedim(self.dim, 0), self.cut.size * self._most)
            out = g.new_empty(self._most, *padded.shape[1:])
            self._communicate("reducing", reduce_scatter, out, padded)
            copies = self.cut.copies
            if copies is not None:
                self._guarded("reducing", lambda: torch.distributed.all_reduce(out, group=copies))
            return out[: self.rows(self.cut.rank)].movedim(0, self.dim).contiguous()

    def _communicate(self, what: str, collective: Callable[..., Any], *tensors: Tensor) -> None:
        self.ranks.meet(f"{what} {self.name!r} ({tensors[0].dtype})")
        self._guarded(what, lambda: collective(*tensors, group=self.cut.group))

    def _guarded(self, what: str, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise self.ranks.lost(f"{what} {self.name!r}", error) from error


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
