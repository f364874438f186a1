"""Projections of per-sample gradients: named linear operators `R^D -> R^k`."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import optree
import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.errors import OptionError, ParamsError
from ghostfunc._base.options import one_of
from ghostfunc._base.torch_private import _pytree, constant_at_compile_time
from ghostfunc._base.types import PyTree
from ghostfunc._factors import contract
from ghostfunc._factors.factor import Dense
from ghostfunc.projection import _random
from ghostfunc.projection._blocks import Block, select
from ghostfunc.projection._readers import KroneckerReader, SignsReader

OF_TENSORS = "eigenbasis"
"""How the kind begins of projections that no seed makes: those of a curvature."""


class Recipe:
    """What a projection is made of: `cls(*args)`. A constant of compiled programs."""

    def __init__(self, cls: type[Projection], *args: Any) -> None:
        self.cls, self.args = cls, args

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and (self.cls, self.args) == (other.cls, other.args)

    def __hash__(self) -> int:
        return hash((self.cls, self.args))


class Projection(ABC):
    """A linear operator from gradients to k numbers; made by `kronecker_projection`.

    Attributes:
        kind, seed: how its matrices are made.
        compress: what the columns of all parameters are hashed to, or None.
        blocks: the parameters it covers, in the order of `params`, and the columns of each.
        k: number of columns.
    """

    compress: int | None = None

    def __init__(self, kind: str, seed: int, blocks: Sequence[Block]) -> None:
        self.kind = kind
        self.seed = seed
        self.blocks = tuple(blocks)
        self.k = max(block.columns.stop for block in self.blocks)
        self.recipe = Recipe(type(self), kind, seed, self.blocks)

    def make(self) -> bool:
        """Make all tensors now that would be made when they are first wanted."""
        return True

    def tensors(self) -> list[Tensor]:
        """Those tensors. They are inputs of a compiled program."""
        return []

    def take_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Use `tensors` in their place."""
        del tensors  # there are none

    @abstractmethod
    def reader(self, block: Block, like: Tensor) -> Any:
        """Reads the block's columns off a factor; its tensors have `like`'s device and width."""

    @abstractmethod
    def join_blocks(self, parts: Sequence[Float[Tensor, "n k_block"]]) -> Float[Tensor, "n k"]:
        """One matrix of what was read per block."""

    @property
    @abstractmethod
    def groups(self) -> dict[str, slice]:
        """Columns that belong together, by name: one parameter's, or all."""

    def apply(self, grads: PyTree) -> Float[Tensor, "n k"]:
        """The projection of per-sample gradients that are at hand: its definition.

            out_i = concat_blocks vec(P_o g_i P_i^T)        (kind "dense": out_i = P concat g_i)

        Args:
            grads: pytree like `params` of `[n, *shape]`, as `per_sample_grads` returns.

        Returns:
            `[n, k]`, float32 or wider.

        Raises:
            ParamsError: a parameter of the projection is missing, has another shape or number of
                samples, or is not of floating-point numbers.
        """
        by_path = _by_path(grads)
        for path, g in by_path.items():
            if not g.is_floating_point():
                raise ParamsError(f"grads leaf {path!r} is of {g.dtype}; expected real numbers.")
        if len({len(g) for g in by_path.values()}) > 1:
            counts = {path: len(g) for path, g in by_path.items()}
            raise ParamsError(f"grads has leaves of different numbers of samples: {counts}.")
        self._check({path: tuple(g.shape[1:]) for path, g in by_path.items()})
        parts = []
        for block in self.blocks:
            g = by_path[block.path]
            parts.append(self.reader(block, g).read(Dense(g)))
        return self.join_blocks(parts)

    def readers(self, params: dict[str, Tensor]) -> list[Any]:
        """A reader for every one of the parameters; None where the projection has no block."""
        self._check({path: tuple(x.shape) for path, x in params.items()})
        blocks = {block.path: block for block in self.blocks}
        return [
            self.reader(blocks[path], x) if path in blocks else None for path, x in params.items()
        ]

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for block in self.blocks:
            if block.path not in shapes:
                raise ParamsError(
                    f"the projection covers parameter {block.path!r}, which is not there. There "
                    f"are: {', '.join(shapes)}."
                )
            if shapes[block.path] != block.shape:
                raise ParamsError(
                    f"the projection was made for parameter {block.path!r} of shape "
                    f"{block.shape}, but it has shape {shapes[block.path]} here."
                )

    def join(self, values: PyTree) -> Float[Tensor, "n k"]:
        """What `ghost_vjp` returns for `Project(projection)`, as one matrix `[n, k]`."""
        by_path = _by_path(values)
        return self.join_blocks([by_path[block.path] for block in self.blocks])

    def columns(self, layers: Sequence[str]) -> Tensor:
        """The columns of the groups whose names match one of the glob patterns `layers`."""
        chosen = select(list(self.groups), layers)
        return torch.cat(
            [torch.arange(self.groups[g].start, self.groups[g].stop, device="cpu") for g in chosen]
        )

    def spec(self) -> dict[str, Any]:
        """All that defines the projection, ready for JSON; `projection_from_spec` reads it."""
        return {
            "format": 1,
            "kind": self.kind,
            "seed": self.seed,
            "compress": self.compress,
            "blocks": [
                {"path": b.path, "shape": list(b.shape), "k_o": b.k_o, "k_i": b.k_i}
                for b in self.blocks
            ],
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the specification: equal for equal operators."""
        text = json.dumps(self.spec(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Projection) and self.spec() == other.spec()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return (
            f"Projection(kind={self.kind!r}, seed={self.seed}, k={self.k}, "
            f"{len(self.blocks)} parameters)"
        )


class KroneckerProjection(Projection):
    """Every parameter by itself, `P_o g P_i^T`: the blocks lie side by side."""

    def __init__(self, kind: str, seed: int, blocks: Sequence[Block]) -> None:
        super().__init__(kind, seed, blocks)
        self._made: dict[tuple[str, str], Tensor] = {}

    @constant_at_compile_time
    def make(self) -> bool:
        """Make all matrices now."""
        for block in self.blocks:
            self._transposed(block, "o")
            self._transposed(block, "i")
        return True

    def tensors(self) -> list[Tensor]:
        keys = [(block.path, side) for block in self.blocks for side in "oi"]
        return [self._made[key] for key in keys if key in self._made]

    def take_tensors(self, tensors: Sequence[Tensor]) -> None:
        keys = [(b.path, side) for b in self.blocks for side, n, k in b.sides() if n != k]
        self._made = dict(zip(keys, tensors, strict=True))

    def reader(self, block: Block, like: Tensor) -> KroneckerReader:
        return KroneckerReader(
            self._on(block, "o", like), self._on(block, "i", like), block.n_o, block.n_i
        )

    def join_blocks(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1)

    @property
    def groups(self) -> dict[str, slice]:
        return {block.path: block.columns for block in self.blocks}

    def matrix(self, path: str, side: str) -> Float[Tensor, "k n"]:
        """`P_o` (`side="o"`) or `P_i` (`side="i"`) of a parameter, in float32."""
        one_of("path", path, tuple(b.path for b in self.blocks))
        one_of("side", side, ("o", "i"))
        (block,) = [b for b in self.blocks if b.path == path]
        made = self._transposed(block, side)
        return (
            torch.eye(block.n_o if side == "o" else block.n_i, dtype=torch.float32, device="cpu")
            if made is None
            else made.mT
        )

    def _on(self, block: Block, side: str, like: Tensor) -> Tensor | None:
        made = self._transposed(block, side)
        return (
            None
            if made is None
            else made.to(like.device, torch.promote_types(like.dtype, torch.float32))
        )

    def _transposed(self, block: Block, side: str) -> Tensor | None:
        """`P^T [n, k]`, made once; None for the identity."""
        (n, k) = next((n, k) for name, n, k in block.sides() if name == side)
        if n == k:
            return None
        at = (block.path, side)
        if at not in self._made:
            key = _random.stream_key(self.seed, block.path, f"{self.kind} {side}")
            self._made[at] = torch.from_numpy(_random.MATRICES[self.kind](key, n, k))
        return self._made[at]


class CompressedProjection(KroneckerProjection):
    """A Kronecker projection whose columns are hashed together into `compress` of them (SJLT)."""

    def __init__(self, kind: str, seed: int, blocks: Sequence[Block], compress: int) -> None:
        super().__init__(kind, seed, blocks)
        self.k = self.compress = compress
        self.recipe = Recipe(type(self), kind, seed, self.blocks, compress)
        self._entries: tuple[Tensor, Tensor] | None = None

    @constant_at_compile_time
    def make(self) -> bool:
        self._nonzeros()
        return super().make()

    def tensors(self) -> list[Tensor]:
        entries = () if self._entries is None else self._entries
        return [*entries, *super().tensors()]

    def take_tensors(self, tensors: Sequence[Tensor]) -> None:
        columns, values, *matrices = tensors
        self._entries = columns, values
        super().take_tensors(matrices)

    def join_blocks(self, parts: Sequence[Tensor]) -> Tensor:
        x = torch.cat(list(parts), dim=1)
        columns, values = self._nonzeros()
        columns, values = columns.to(x.device), values.to(x.device, x.dtype)
        out = x.new_zeros(len(x), self.k)
        for j in range(columns.shape[1]):
            out = out.index_add(1, columns[:, j], x * values[:, j])
        return out

    def _nonzeros(self) -> tuple[Tensor, Tensor]:
        """Where every column goes, and with which sign: `[columns, s]` each; made once."""
        if self._entries is None:
            made = []
            for b in self.blocks:
                key = _random.stream_key(self.seed, b.path, "compress")
                made.append(_random.sparse_entries(key, 0, b.k, self.k))
            columns, values = (np.concatenate(x) for x in zip(*made, strict=True))
            self._entries = torch.from_numpy(columns), torch.from_numpy(values)
        return self._entries

    @property
    def groups(self) -> dict[str, slice]:
        return {"all": slice(0, self.k)}


class DenseProjection(Projection):
    """One Johnson-Lindenstrauss map over the concatenated gradient: the blocks add up.

    `P` has entries `+-1/sqrt(k)` and is never held: rows of it are made anew from the seed, a few
    at a time, whenever they are wanted.
    """

    def reader(self, block: Block, like: Tensor) -> SignsReader:
        return SignsReader(_random.stream_key(self.seed, block.path, self.kind), block.k)

    def join_blocks(self, parts: Sequence[Tensor]) -> Tensor:
        return contract.add_up(parts)

    @property
    def groups(self) -> dict[str, slice]:
        return {"all": slice(0, self.k)}


def _flatten(projection: Projection) -> tuple[list[Tensor], Recipe]:
    projection.make()
    return projection.tensors(), projection.recipe


def _unflatten(tensors: Iterable[Tensor], recipe: Recipe) -> Projection:
    projection: Projection = recipe.cls(*recipe.args)
    projection.take_tensors(list(tensors))
    return projection


_pytree.register_constant(Recipe)
for _cls in (KroneckerProjection, CompressedProjection, DenseProjection):
    _pytree.register_pytree_node(_cls, _flatten, _unflatten)


def _by_path(tree: PyTree) -> dict[str, Tensor]:
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    for x in leaves:
        if not isinstance(x, Tensor) or not x.ndim:
            found = "a tensor without axes" if isinstance(x, Tensor) else type(x).__name__
            raise ParamsError(
                f"grads has a leaf that is a {found}; expected a pytree of [n, *shape], as "
                "gf.per_sample_grads returns."
            )
    return {".".join(map(str, path)) or "params": x for path, x in zip(paths, leaves, strict=True)}


def check_kind(kind: str, seed: int) -> None:
    """Raise `OptionError` for a kind or a seed that does not exist."""
    one_of("kind", kind, KINDS)
    if type(seed) is not int:
        raise OptionError(f"seed={seed!r} must be an integer.")


KINDS = (*_random.MATRICES, "dense")
