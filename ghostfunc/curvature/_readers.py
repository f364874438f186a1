"""What reads sums of products off the factors of a parameter.

For one use `g_i = sum_t left_it right_it^T`, a tap can hand out

    sum_it left_it left_it^T,    sum_it right_it right_it^T        (positions one by one: "expand")
    sum_i l_i l_i^T,  l_i = sum_t left_it,  and likewise right     (positions summed: "reduce")

Positions without a part in the gradient (`left_it` or `right_it` is zero: padding) are left out.
Where there are no positions (a gradient that was pulled back through a derived tensor, or that is
as small as its factors), the rows and columns of `g_i` take their place: `sum_i g_i g_i^T` and
`sum_i g_i^T g_i`. What is read at several uses of a parameter adds up.

Second moments of the gradient itself need all uses together:

    sum_i g_i^T g_i    (a vector),        sum_i (left^T g_i right)^2    (in eigenbases, elementwise)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._factors import bundles, contract
from ghostfunc._factors.factor import Factor, Grouped, OneHot, Outer
from ghostfunc._factors.matmul import inner_products
from ghostfunc._quantities.readers import MomentReader, PositionsReader, Push
from ghostfunc.curvature._blocks import Block, Form

ELEMENTS = 1 << 22
"""Most elements of the gradients that are formed at one time; a single sample's may be more."""


class _OneParameter(PositionsReader):
    """Travels through casts and transposes; other derived tensors are pulled back."""

    transposed: bool

    def push(self, push: Push) -> _OneParameter | None:
        if push.derivation == "cast":
            return self
        if push.derivation == "transpose":
            return replace(self, transposed=not self.transposed)  # type: ignore[type-var]
        return None

    def _turned(self, factor: Factor) -> Factor:
        return contract.transpose(factor) if self.transposed else factor


@dataclass(frozen=True)
class FormReader(_OneParameter):
    """Notes what the factors look like, and reads zero."""

    forms: list[Form] = field(default_factory=list)
    transposed: bool = False

    def tap(self, param: Tensor, n: int) -> Tensor:
        return wide(param.new_zeros(()))

    def read(self, factor: Factor) -> Tensor:
        factor = self._turned(factor)
        self.forms.append(Form(type(factor).__name__, tuple(factor.shape)))
        return wide(bundles.values(factor)).new_zeros(())


@dataclass(frozen=True)
class SideReader(_OneParameter):
    """`sum_it x_it x_it^T` of the rows' side (left) or the columns' side: `[groups, k, k]`."""

    block: Block
    left: bool
    reduce: bool
    transposed: bool = False

    def tap(self, param: Tensor, n: int) -> Tensor:
        k = self.block.rows if self.left else self.block.columns
        return wide(param.new_zeros(())).expand(self.block.groups, k, k)

    def read(self, factor: Factor) -> Tensor:
        factor = self._turned(factor)
        _, rows, columns = self.block.sizes
        match factor:
            case Outer(left, right) if factor.shape == (rows, columns):
                return self._positions(wide(left)[:, None], wide(right)[:, None])
            case Grouped(left, right) if factor.shape == self.block.sizes:
                return self._positions(wide(left), wide(right))
            case OneHot(_, b, _) if factor.shape == (rows, columns) and not self.left:
                right = wide(b)[:, None]
                return self._positions(torch.ones_like(right[..., :1]), right)
        g = as_matrices(factor, self.block.sizes)
        return _gram(g.mT if self.left else g)

    def _positions(self, left: Tensor, right: Tensor) -> Tensor:
        """Of `[n, groups, t, p]` and `[n, groups, t, d]`."""
        x = left if self.left else right
        met = (left != 0).any(-1) & (right != 0).any(-1)
        x = x.masked_fill(~met[..., None], 0)
        return _gram(x.sum(2, keepdim=True) if self.reduce else x)


@dataclass(frozen=True)
class VectorReader(_OneParameter, MomentReader):
    """`sum_i g_i g_i^T` of a whole vector: `[1, k, k]`."""

    block: Block
    transposed: bool = False

    def tap(self, param: Tensor, n: int) -> Tensor:
        k = self.block.columns
        return wide(param.new_zeros(())).expand(1, k, k)

    def read(self, factor: Factor) -> Tensor:
        return self.read_all([factor])

    def read_all(self, factors: Sequence[Factor]) -> Tensor:
        return _gram(contract.add_up([as_matrices(f, self.block.sizes) for f in factors]))

    def define(self, g: Float[Tensor, "n ..."]) -> Tensor:
        x = g.reshape(len(g), self.block.columns)
        return torch.einsum("ni,nj->ij", x, x)[None]


@dataclass(frozen=True)
class EigenvalueReader(_OneParameter, MomentReader):
    """`sum_i (left^T g_i right)^2`, elementwise: `[groups, rows, columns]`.

    `left` and `right` are eigenbases `[groups, k, k]`, vectors in columns; None is the identity.
    """

    block: Block
    left: Float[Tensor, "g p p"] | None
    right: Float[Tensor, "g d d"] | None
    transposed: bool = False

    def tap(self, param: Tensor, n: int) -> Tensor:
        return wide(param.new_zeros(())).expand(self.block.sizes)

    def read(self, factor: Factor) -> Tensor:
        return self.read_all([self._turned(factor)])

    def read_all(self, factors: Sequence[Factor]) -> Tensor:
        fits = [f.shape == (self.block.rows, self.block.columns) for f in factors]
        if all(fits) and self.block.groups == 1:
            if (
                len(factors) == 1
                and isinstance(factors[0], Outer)
                and factors[0].left.shape[1] == 1
            ):
                return self._rank_one(factors[0])[None]
            if all(isinstance(f, OneHot) for f in factors) and self.left is None:
                return self._look_ups(factors)[None]
        n = bundles.samples(factors)
        parts = [
            contract.add_up([self._of(bundles.take(f, some)) for f in factors]).square().sum(0)
            for some in _slices(n, max(1, ELEMENTS // max(1, _numel(self.block))))
        ]
        return contract.add_up(parts)

    def define(self, g: Float[Tensor, "n ..."]) -> Tensor:
        x = g.reshape(len(g), *self.block.sizes)
        x = x if self.left is None else torch.einsum("ngpd,gpk->ngkd", x, self.left.to(x))
        x = x if self.right is None else torch.einsum("ngpd,gdl->ngpl", x, self.right.to(x))
        return x.square().sum(0)

    def _of(self, factor: Factor) -> Float[Tensor, "n g p d"]:
        return rotated(factor, self.block.sizes, self.left, self.right)

    def _rank_one(self, factor: Outer) -> Tensor:
        """One position per sample: `(l r^T)^2 = l^2 (r^2)^T`."""
        left, right = (wide(x)[:, 0] for x in factor)
        left = left if self.left is None else left @ self.left[0].to(left)
        right = right if self.right is None else right @ self.right[0].to(right)
        return left.square().mT @ right.square()

    def _look_ups(self, factors: Sequence[Factor]) -> Tensor:
        """Rows of a table: those that a sample looks up several times add up first."""
        rows = self.block.rows
        ids, b = [], []
        for f in factors:
            assert isinstance(f, OneHot)
            start = rows * torch.arange(len(f.ids), device=f.ids.device)
            ids.append((f.ids + start[:, None]).flatten())
            b.append(wide(f.b).flatten(0, 1))
        places, inverse = torch.unique(torch.cat(ids), return_inverse=True)
        x = torch.cat(b)
        x = x if self.right is None else x @ self.right[0].to(x)
        g = x.new_zeros(len(places), x.shape[1]).index_add(0, inverse, x)
        return x.new_zeros(rows, x.shape[1]).index_add(0, places % rows, g.square())


def rotated(
    factor: Factor,
    sizes: tuple[int, int, int],
    left: Float[Tensor, "g p k"] | None,
    right: Float[Tensor, "g d l"] | None,
) -> Float[Tensor, "n g k l"]:
    """`left^T g_i right` in every group; None is the identity."""
    match factor:
        case Outer() | OneHot() if factor.shape == sizes[1:] and sizes[0] == 1:
            like = wide(bundles.values(factor))
            one_left, one_right = (None if u is None else u[0].to(like) for u in (left, right))
            return contract.project(factor, one_left, one_right)[:, None]
        case Grouped(a, b) if factor.shape == sizes:
            a, b = wide(a), wide(b)
            a = a if left is None else a @ left.to(a)
            b = b if right is None else b @ right.to(b)
            return a.mT @ b
    g = as_matrices(factor, sizes)
    g = g if left is None else left.mT.to(g) @ g
    return g if right is None else g @ right.to(g)


def as_matrices(factor: Factor, sizes: tuple[int, int, int]) -> Float[Tensor, "n g p d"]:
    """The gradients themselves, as a block of these sizes sees them."""
    g = contract.materialize(factor)
    return g.reshape(len(g), *sizes)


def _gram(x: Float[Tensor, "n g t k"]) -> Float[Tensor, "g k k"]:
    """`sum_it x_it x_it^T` in every group."""
    flat = x.transpose(0, 1).flatten(1, 2)
    return inner_products(flat.mT, flat.mT)


def _numel(block: Block) -> int:
    groups, rows, columns = block.sizes
    return groups * rows * columns


def _slices(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
