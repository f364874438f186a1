"""What reads a projection off a factor, and the quantity that hands the readers out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import TransformError
from ghostfunc._base.torch_private import symbolic
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import bundles, contract
from ghostfunc._factors.factor import Dense, Factor, OneHot, Outer
from ghostfunc._factors.matmul import inner_products
from ghostfunc._quantities.readers import Push
from ghostfunc.projection import _random

CHUNK = 1 << 22
"""Most elements of a dense projection that exist at one time."""


class KroneckerReader(NamedTuple):
    """`vec(P_o g_i P_i^T)`, `[n, k_o k_i]`.

    Attributes:
        left, right: `P_o^T [n_o, k_o]` and `P_i^T [n_i, k_i]`; None is the identity.
        n_o, n_i: the matrix that the parameter is seen as.
        transposed: factors are those of the parameter's transpose.
    """

    left: Tensor | None
    right: Tensor | None
    n_o: int
    n_i: int
    transposed: bool = False
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        k_o = self.n_o if self.left is None else self.left.shape[1]
        k_i = self.n_i if self.right is None else self.right.shape[1]
        return wide(param.new_zeros(())).expand(n, k_o * k_i)

    def read(self, factor: Factor) -> Float[Tensor, "n k"]:
        if self.transposed:
            seen = _as_matrix(factor, self.n_i, self.n_o)
            turned = contract.project(seen, self.right, self.left, self.contract_dtype)
            return turned.mT.flatten(1)
        seen = _as_matrix(factor, self.n_o, self.n_i)
        return contract.project(seen, self.left, self.right, self.contract_dtype).flatten(1)

    def push(self, push: Push) -> KroneckerReader | None:
        if push.derivation == "cast":
            return self
        if push.derivation == "transpose":
            return self._replace(transposed=not self.transposed)
        return None


def _as_matrix(factor: Factor, p: int, d: int) -> Factor:
    """Ops may see one parameter in another shape than `[p, d]`."""
    if factor.shape == (p, d):
        return factor
    return Dense(contract.materialize(factor).reshape(len(factor[0]), p, d))


class SignsReader(NamedTuple):
    """`P g_i`, `[n, k]`, with a matrix of random signs that is made as it is used.

    Attributes:
        key: of the parameter's stream.
        k: number of columns.
    """

    key: int
    k: int
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return wide(param.new_zeros(())).expand(n, self.k)

    def read(self, factor: Factor) -> Float[Tensor, "n k"]:
        if symbolic(bundles.values(factor)):
            raise TransformError(
                'A projection of kind "dense" is made piece by piece while it is used, which '
                "torch.compile cannot record. Call ghost_project uncompiled, or use another kind."
            )
        like = bundles.values(factor)
        parts = [wide(like.new_zeros(())).expand(len(like), self.k)]
        for start, g in _pieces(factor, max(1, CHUNK // self.k)):
            signs = torch.from_numpy(_random.rademacher(self.key, start, g.shape[1], self.k))
            parts.append(inner_products(g, signs.to(g.device, g.dtype).mT, self.contract_dtype))
        return contract.add_up(parts)

    def push(self, push: Push) -> SignsReader | None:
        return self if push.derivation == "cast" else None


def _pieces(factor: Factor, most: int) -> Iterator[tuple[int, Float[Tensor, "n size"]]]:
    """The flattened gradients in pieces of at most `most` coordinates, and where each starts."""
    match factor:
        case Outer(left, right):
            d = right.shape[-1]
            step = max(1, most // d)
            for row in range(0, left.shape[-1], step):
                g = contract.materialize(Outer(left[..., row : row + step], right))
                yield from _cut(row * d, g.flatten(1), most)
        case OneHot(ids, b, _):
            d = b.shape[-1]
            rows, local = torch.unique(ids, return_inverse=True)
            step = max(1, most // d)
            for at in range(0, len(rows), step):
                inside = (local >= at) & (local < at + step)
                few = OneHot(
                    (local - at).masked_fill(~inside, 0),
                    b.masked_fill(~inside[..., None], 0),
                    min(step, len(rows) - at),
                )
                g = contract.materialize(few)
                for j, row in enumerate(rows[at : at + step].tolist()):
                    yield from _cut(row * d, g[:, j], most)
        case _:
            g = contract.materialize(factor)
            yield from _cut(0, g[:, None].flatten(1), most)


def _cut(start: int, g: Tensor, most: int) -> Iterator[tuple[int, Tensor]]:
    for at in range(0, g.shape[1], most):
        yield start + at, g[:, at : at + most]
