"""The four forms that a factor of a per-sample gradient has.

A *factor* is one use's per-sample gradient `g_i` of a parameter, in as few numbers as it takes. The
first axis holds the samples. Groups come next, where there are any, and then positions:

    Outer(left [n, t, p], right [n, t, d])   g_i = sum_t left_it right_it^T          shape [p, d]
    OneHot(ids [n, t], b [n, t, d], rows)    g_i = sum_t onehot(ids_it) b_it^T       shape [rows, d]
    Grouped(left [n, g, t, p], right)        an outer-product factor per group       shape [g, p, d]
    Dense(g [n, *shape])                     g_i itself: of biases, say, nothing is smaller
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._base.dtypes import wide


def flat_positions(x: Tensor) -> Tensor:
    """`[n, ..., d]` as `[n, t, d]`: all positions of a sample on one axis (t = 1 if none)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def over_positions(x: Tensor) -> Tensor:
    """`[n, ..., d]` added up over all positions, float32 or wider; a single one as it is."""
    x = wide(x).reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    return x[:, 0] if x.shape[1] == 1 else x.sum(1)


class Outer(NamedTuple):
    """`g_i = sum_t left_it right_it^T`, shape `[p, d]`."""

    left: Float[Tensor, "n t p"]
    right: Float[Tensor, "n t d"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[-1], self.right.shape[-1])


class OneHot(NamedTuple):
    """`g_i = sum_t onehot(ids_it) b_it^T`, shape `[rows, d]`."""

    ids: Int[Tensor, "n t"]
    b: Float[Tensor, "n t d"]
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.b.shape[-1])


class Grouped(NamedTuple):
    """`g_i[j] = sum_t left_ijt right_ijt^T` for every group j, shape `[g, p, d]`."""

    left: Float[Tensor, "n g t p"]
    right: Float[Tensor, "n g t d"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[1], self.left.shape[-1], self.right.shape[-1])

    def groups(self) -> list[Outer]:
        """The groups, one factor each."""
        return [Outer(x, y) for x, y in zip(self.left.unbind(1), self.right.unbind(1), strict=True)]


class Dense(NamedTuple):
    """`g_i` itself, `[n, *shape]`."""

    g: Float[Tensor, "n ..."]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.g.shape[1:])


Factor: TypeAlias = Outer | OneHot | Grouped | Dense


def unknown_factor(factor: object) -> TypeError:
    return TypeError(
        f"{type(factor).__name__} is not a factor: expected Outer, OneHot, Grouped or Dense."
    )


def misfit(factor: Factor, n: int) -> str:
    """What is wrong with the sizes of a factor for n samples; "" if nothing."""
    match factor:
        case Outer(left, right) | Grouped(left, right):
            sizes = {"left": left.shape[:-1], "right": right.shape[:-1]}
        case OneHot(ids, b, _):
            sizes = {"ids": ids.shape, "b": b.shape[:-1]}
        case Dense(g):
            sizes = {"g": g.shape[:1]}
        case _:
            raise unknown_factor(factor)
    (first, *rest) = sizes.values()
    if first[:1] == (n,) and all(size == first for size in rest):
        return ""
    shapes = ", ".join(f"{k} {tuple(x.shape)}" for k, x in factor._asdict().items() if k in sizes)
    return (
        f"its rule makes a factor {type(factor).__name__}({shapes}); all of it must have the {n} "
        "samples first, and then the same positions"
    )


def times(factor: Factor, c: float) -> Factor:
    """The factor of `c * g_i`, in float32 or wider."""
    match factor:
        case Outer(left, right):
            return Outer(wide(left) * c, right)
        case OneHot(ids, b, rows):
            return OneHot(ids, wide(b) * c, rows)
        case Grouped(left, right):
            return Grouped(wide(left) * c, right)
        case Dense(g):
            return Dense(wide(g) * c)
        case _:
            raise unknown_factor(factor)
