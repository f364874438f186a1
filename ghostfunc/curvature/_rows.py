"""Rows in the eigenbasis of a curvature: a projection whose inner products are influences."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError
from ghostfunc._base.torch_private import _pytree
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import contract
from ghostfunc._factors.factor import Factor
from ghostfunc._quantities.readers import Push
from ghostfunc.curvature._blocks import Block
from ghostfunc.curvature._readers import rotated
from ghostfunc.projection import Block as Columns, Projection
from ghostfunc.projection._projection import OF_TENSORS, Recipe


class Part(NamedTuple):
    """The rows of one parameter: `scale * vec(left^T g_i right)[kept]`.

    Attributes:
        left, right: eigenvectors in columns, `[groups, rows, k]` and `[groups, columns, l]`; None
            is the identity.
        scale: `(L + damping)^-1/2` of the columns that are kept.
        kept: which they are, among `groups k l`; None for all.
    """

    left: Tensor | None
    right: Tensor | None
    scale: Float[Tensor, " kept"]
    kept: Int[Tensor, " kept"] | None


class RowReader(NamedTuple):
    """One parameter's columns, `[n, kept]`.

    Attributes:
        groups, rows, columns: the matrices that the gradient is seen as.
        part: what they become.
        transposed: factors are those of the parameter's transpose.
    """

    groups: int
    rows: int
    columns: int
    part: Part
    transposed: bool = False
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return wide(param.new_zeros(())).expand(n, len(self.part.scale))

    def read(self, factor: Factor) -> Float[Tensor, "n kept"]:
        if self.transposed:
            factor = contract.transpose(factor)
        left, right, scale, index = self.part
        x = rotated(factor, (self.groups, self.rows, self.columns), left, right).flatten(1)
        return (x if index is None else x[:, index]) * scale.to(x)

    def push(self, push: Push) -> RowReader | None:
        if push.derivation == "cast":
            return self
        if push.derivation == "transpose":
            return self._replace(transposed=not self.transposed)
        return None


class EigenRows(Projection):
    """`row_i = (L + damping)^-1/2 U^T g_i`, U the eigenbasis; made by `EKFAC.rows`.

    With all columns, `<row_i, row_j> = <g_i, (C + damping I)^-1 g_j>`: the influence.

    Attributes:
        size: number of columns if none were left out.
        share: of `trace(C (C + damping I)^-1)` that the kept columns hold: of the mean influence of
            a sample on itself, if C is the second moment of the gradients.
    """

    def __init__(
        self, kind: str, blocks: Sequence[Columns], seen: tuple[Block, ...], share: float
    ) -> None:
        super().__init__(kind, 0, blocks)
        self._seen, self.share = seen, share
        self.size = sum(math.prod(b.shape) for b in seen)
        self._parts: dict[str, Part] = {}

    def with_parts(self, parts: Sequence[Part]) -> EigenRows:
        """Holding these tensors, one part per block."""
        self._parts = {b.path: part for b, part in zip(self.blocks, parts, strict=True)}
        held = tuple(tuple(x is not None for x in part) for part in parts)
        self.recipe = Recipe(EigenRows, self.kind, self.blocks, self._seen, self.share, held)
        return self

    @property
    def approximation(self) -> str:
        """What inner products of rows are, in words."""
        if self.k == self.size:
            return "exact: <row_i, row_j> = <g_i, (C + damping I)^-1 g_j>"
        return (
            f"truncated: {self.k} of {self.size} eigendirections, those with the largest "
            f"L / (L + damping), which hold {self.share:.2%} of trace(C (C + damping I)^-1)"
        )

    def tensors(self) -> list[Tensor]:
        return [x for part in self._parts.values() for x in part if x is not None]

    def take_tensors(self, tensors: Sequence[Tensor]) -> None:
        rest, parts = iter(tensors), []
        for held in self.recipe.args[-1]:
            left, right, scale, index = (next(rest) if x else None for x in held)
            assert scale is not None
            parts.append(Part(left, right, scale, index))
        self.with_parts(parts)

    def reader(self, block: Columns, like: Tensor) -> RowReader:
        (seen,) = [b for b in self._seen if b.path == block.path]
        to = like.device, torch.promote_types(like.dtype, torch.float32)
        left, right, scale, index = self._parts[block.path]
        left, right = (None if x is None else x.to(*to) for x in (left, right))
        index = None if index is None else index.to(like.device)
        return RowReader(*seen.sizes, Part(left, right, scale.to(*to), index))

    def join_blocks(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1)

    @property
    def groups(self) -> dict[str, slice]:
        return {block.path: block.columns for block in self.blocks}

    def __repr__(self) -> str:
        return f"EigenRows(k={self.k}, {len(self.blocks)} parameters, {self.approximation})"


def eigen_rows(
    blocks: Sequence[Block],
    bases: Sequence[tuple[Tensor | None, Tensor | None, Tensor]],
    damped: Callable[[Tensor], Tensor],
    columns: object,
) -> EigenRows:
    """See `EKFAC.rows`; `damped` makes `(L + damping)^-1/2` of a parameter's eigenvalues."""
    scales = [damped(values).flatten() for *_, values in bases]
    values = [x.flatten() for *_, x in bases]
    held = [x * scale.square() for x, scale in zip(values, scales, strict=True)]
    kept = _largest(held, columns)
    parts, places, start, whole = [], [], 0, columns is None
    for block, (left, right, _), scale, index in zip(blocks, bases, scales, kept, strict=True):
        if len(index) == 0 < len(scale):
            continue
        parts.append(
            Part(left, right, scale, None)
            if len(index) == len(scale)
            else _reduced(block, left, right, scale, index)
        )
        size = math.prod(block.shape)
        places.append(Columns(block.path, block.shape, 1, size, 1, len(index), start))
        start += len(index)
    total = sum(float(x.double().sum()) for x in held)
    inside = sum(float(x.double()[i].sum()) for x, i in zip(held, kept, strict=True))
    share = 1.0 if whole or not total else inside / total
    digest = hashlib.sha256(repr([(b.path, b.sizes) for b in blocks]).encode())
    for part in parts:
        for x in part:
            if x is not None:
                digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    of = f"{start} of {sum(map(len, scales))} columns"
    kind = f"{OF_TENSORS}, {of}, {digest.hexdigest()[:16]}"
    return EigenRows(kind, places, tuple(blocks), share).with_parts(parts)


def _largest(held: Sequence[Tensor], columns: object) -> list[Tensor]:
    """The columns to keep of every parameter, in order: those that hold most."""
    sizes = [len(x) for x in held]
    if columns is None:
        return [torch.arange(size, device=x.device) for size, x in zip(sizes, held, strict=True)]
    if isinstance(columns, bool) or not isinstance(columns, int) or not 1 <= columns <= sum(sizes):
        raise OptionError(
            f"columns={columns!r} must be a whole number from 1 to {sum(sizes)}, the number of "
            "parameters, or None for all of them."
        )
    ordered = torch.cat([x.double() for x in held]).sort(descending=True, stable=True).indices
    at = torch.zeros(sum(sizes), dtype=torch.bool, device=ordered.device)
    at[ordered[:columns]] = True
    return [x.nonzero()[:, 0] for x in at.split(sizes)]


def _reduced(
    block: Block, left: Tensor | None, right: Tensor | None, scale: Tensor, index: Tensor
) -> Part:
    """With those eigenvectors alone that a kept column needs, where all groups share them."""
    groups, _, columns = block.sizes
    scale = scale[index]
    if groups > 1:
        return Part(left, right, scale, index)
    i, j = index // columns, index % columns
    if left is not None:
        used, i = torch.unique(i, return_inverse=True)
        left = left[..., used]
    if right is not None:
        used, j = torch.unique(j, return_inverse=True)
        right = right[..., used]
    width = columns if right is None else right.shape[-1]
    return Part(left, right, scale, i * width + j)


def _flatten(rows: EigenRows) -> tuple[list[Tensor], Recipe]:
    return rows.tensors(), rows.recipe


def _unflatten(tensors: Iterable[Tensor], recipe: Recipe) -> EigenRows:
    rows = EigenRows(*recipe.args[:-1])
    rows.recipe = recipe
    rows.take_tensors(list(tensors))
    return rows


_pytree.register_pytree_node(EigenRows, _flatten, _unflatten)
