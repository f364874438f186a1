"""Quantities: what a tap reads off a factor.

A quantity hands out one *reader* per parameter. A reader is a pytree of tensors with three methods:

    tap(param, n)      the zero tensor whose cotangent is what the reader reads
    read(factor)       that cotangent, from one use's factor
    push(...)          the reader of a tensor derived from the parameter, or None where the
                       per-sample gradient must be pulled back to the parameter instead

Readers that can be pushed can be added: `plus` reads the sum of both.

A tap adds up what is read at every use, which is right for what is linear in the gradient. The
readers of other quantities have a fourth method:

    read_all(factors)  the value, from the factors of all uses together

It is called after the backward pass, for the parameters that samples meet more than once.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ghostfunc import _bundles, _cost, _factors, _pairs
from ghostfunc._capture import node
from ghostfunc._errors import OptionError
from ghostfunc._factors import Dense, Factor
from ghostfunc._tree import ParamSpec, flatten_like
from ghostfunc._types import ContractDtype, PyTree

DeriveFn: TypeAlias = Callable[..., Tensor]
"""The computation of a derived tensor, of the tensors it derives from."""


class Reader(Protocol):
    """Reads one quantity of one parameter."""

    def tap(self, param: Tensor, n: int) -> Tensor: ...

    def read(self, factor: Factor) -> Tensor: ...

    def push(self, push: Push) -> Any: ...

    def plus(self, other: Any) -> Any: ...


class PositionsReader:
    """Base of readers that read the positions of a factor, not only the gradient they add up to."""


class Push(NamedTuple):
    """How directions travel from parameters to a tensor derived from them.

    Attributes:
        jvp: from a tangent of the tensor in question (the others' are zero) to that of the
            derived tensor.
        derivation: "transpose" or "cast" where the derived tensor is just that, else "general".
    """

    jvp: Callable[[Tensor], Tensor]
    derivation: str


class Quantity(ABC):
    """A number per sample (or several), made from its gradient.

    Attributes:
        degree: how the quantity scales with the gradient: 1 linear, 2 quadratic.
        pairs_samples: whether it relates the samples of a batch to each other; where not, its value
            for a batch is that of the batch's parts, one after the other.
        takes_contract_dtype: whether its readers heed `contract_dtype`.
        contract_dtype: what operands of its matrix products are rounded to; set by `contracting`.
    """

    degree: int
    pairs_samples: bool = False
    takes_contract_dtype: bool = False
    contract_dtype: ContractDtype = None

    @abstractmethod
    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[Any]:
        """One reader per parameter; None where the quantity has nothing to read."""

    def contracting(self, contract_dtype: ContractDtype) -> Quantity:
        """The same quantity, contracted in another dtype."""
        if contract_dtype is None:
            return self
        if not self.takes_contract_dtype:
            raise OptionError(
                f"{type(self).__name__} has no contract_dtype: what it reads is not a contraction "
                "that can be rounded. Ask for it in a call of its own."
            )
        other = copy.copy(self)
        other.contract_dtype = contract_dtype
        return other


# --- dot products -----------------------------------------------------------------------------


class DotReader(NamedTuple):
    """`<g_i, u>` with a dense direction: `[n]`."""

    u: Tensor
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, n)

    def read(self, factor: Factor) -> Tensor:
        return _factors.dot(factor, self.u.reshape(factor.shape), self.contract_dtype)

    def push(self, push: Push) -> DotReader:
        return self._replace(u=push.jvp(self.u))

    def plus(self, other: DotReader) -> DotReader:
        return self._replace(u=self.u + other.u)


class PairReader(NamedTuple):
    """`<g_i, g_j>` with gradients that stay factored: summed over j, `[n]`, or `[n, m]`."""

    factors: tuple[Factor, ...]
    each: bool
    m: int
    workspace: int = _cost.BLOCK_ELEMENTS
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, n, self.m) if self.each else _zeros(param, n)

    def read(self, factor: Factor) -> Tensor:
        if not self.factors:  # the validation losses do not depend on the parameter
            return self.tap(_bundles.values(factor), _bundles.samples([factor]))
        if self.each:
            return _pairs.gram(
                [factor],
                self.factors,
                workspace=self.workspace,
                contract_dtype=self.contract_dtype,
            )
        pairs = [
            _factors.pair_dots(factor, g, each=False, contract_dtype=self.contract_dtype)
            for g in self.factors
        ]
        return _factors.add_up(pairs)

    def push(self, push: Push) -> PairReader:
        if push.derivation == "cast" or not self.factors:
            return self
        if push.derivation == "transpose":
            return self._replace(factors=tuple(map(_factors.transpose, self.factors)))
        g = _factors.add_up([_factors.materialize(f) for f in self.factors])
        return self._replace(factors=(Dense(torch.vmap(push.jvp)(g)),))

    def plus(self, other: PairReader) -> PairReader:
        return self._replace(factors=self.factors + other.factors)


class BesideReader(NamedTuple):
    """`<g_i, sum_j g_j>`, i among the first n samples of a batch and j among all others: `[n]`.

    What reads the first samples is made of the others, when their gradient comes up. For a tensor
    derived from the parameter that takes the way to it and back, `J J^T sum_j g_j`. As it is not
    linear in the gradient, the uses of a parameter are to be taken together.

    Attributes:
        paths: the ways from the parameter to the tensor in question; what they lead to adds up.
        direct: whether that is the parameter itself, or a mere transpose or cast of it.
    """

    n: int
    contract_dtype: ContractDtype = None
    paths: tuple[tuple[DeriveFn, ...], ...] = ((),)
    direct: bool = True

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, self.n)

    def read(self, factor: Factor) -> Tensor:
        return self.opposite([factor], grads=False).read(_bundles.take(factor, slice(self.n)))

    def opposite(
        self,
        factors: Sequence[Factor],
        *,
        grads: bool,
        pull: DeriveFn = lambda total: total,
    ) -> DotReader | PairReader:
        """The reader for the first samples, in the form that is cheapest.

        `pull` leads from the tensor in question to the parameter. `grads` says whether the total of
        the first samples is formed, too.
        """
        theirs = [_bundles.take(f, slice(self.n, None)) for f in factors]
        if not self.direct:
            u = pull(_bundles.summed(theirs, self.contract_dtype))
            ends = [reduce(lambda x, step: step(x), path, u) for path in self.paths]
            return DotReader(_factors.add_up(ends), self.contract_dtype)
        ours = [_bundles.meeting(_bundles.take(f, slice(self.n))) for f in factors]
        met = list(map(_bundles.meeting, theirs))
        faster = _factors.speed(_bundles.values(factors[0]), self.contract_dtype)
        if _cost.keep_direction_factored(ours, met, grads=grads, speed=faster):
            m = _bundles.samples(theirs)
            return PairReader(tuple(theirs), False, m, contract_dtype=self.contract_dtype)
        return DotReader(_bundles.summed(theirs, self.contract_dtype), self.contract_dtype)

    def push(self, push: Push) -> BesideReader:
        paths = tuple((*path, push.jvp) for path in self.paths)
        direct = self.direct and push.derivation != "general"
        return self._replace(paths=paths, direct=direct)

    def plus(self, other: BesideReader) -> BesideReader:
        return self._replace(paths=self.paths + other.paths, direct=False)


class Turn(NamedTuple):
    """Per-sample gradients that are formed one at a time, when it is their turn.

    Attributes:
        factor: the factor of one use of a derived tensor.
        maps: the way from that tensor's gradient, one sample's, to where it is needed.
    """

    factor: Factor
    maps: tuple[DeriveFn, ...]

    def gradient(self, j: int) -> Tensor:
        """Sample j's gradient."""
        one: list[Any] = [x[j : j + 1] if isinstance(x, Tensor) else x for x in self.factor]
        g = _factors.materialize(type(self.factor)(*one))[0]
        for step in self.maps:
            g = step(g)
        return g


class TurnReader(NamedTuple):
    """`<g_i, g_j>`, `[n, m]`, where derived tensors stand between the samples and the parameter:
    no factor leads past them, so the m gradients are formed in turns."""

    turns: tuple[Turn, ...]
    m: int
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, n, self.m)

    def read(self, factor: Factor) -> Tensor:
        columns = []
        for j in range(self.m):
            u = _factors.add_up([turn.gradient(j) for turn in self.turns])
            columns.append(_factors.dot(factor, u.reshape(factor.shape), self.contract_dtype))
        return torch.stack(columns, dim=1)

    def push(self, push: Push) -> TurnReader:
        return self._replace(turns=tuple(Turn(t.factor, (*t.maps, push.jvp)) for t in self.turns))

    def plus(self, other: TurnReader) -> TurnReader:
        return self._replace(turns=self.turns + other.turns)


@node("direction")
class Dot(Quantity):
    """`<g_i, u>` for a direction `u`, a pytree like `params`: `[n]` per parameter."""

    degree = 1
    takes_contract_dtype = True

    def __init__(self, direction: PyTree) -> None:
        self.direction = direction

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[DotReader]:
        us = flatten_like(self.direction, leaves, spec, "direction")
        return [DotReader(u, self.contract_dtype) for u in us]


class Prepared(Quantity):
    """A quantity whose readers were made beforehand, one per parameter."""

    def __init__(self, readers: Sequence[Any], degree: int) -> None:
        self._readers = list(readers)
        self.degree = degree

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[Any]:
        return self._readers


# --- norms and Gram matrices ------------------------------------------------------------------


class SqNormReader(NamedTuple):
    """`||g_i||^2`, `[n]`."""

    contract_dtype: ContractDtype

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, n)

    def read(self, factor: Factor) -> Tensor:
        return self.read_all([factor])

    def read_all(self, factors: Sequence[Factor]) -> Tensor:
        return _pairs.sqnorms(factors, contract_dtype=self.contract_dtype)

    def push(self, push: Push) -> SqNormReader | None:
        return None if push.derivation == "general" else self

    def plus(self, other: SqNormReader) -> SqNormReader:
        return self


@node()
class SqNorm(Quantity):
    """`||g_i||^2`, the squared norm of every sample's gradient: `[n]` per parameter.

    The squares add up: the norm of the whole gradient is the root of the sum over parameters.
    """

    degree = 2
    takes_contract_dtype = True

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[SqNormReader]:
        return [SqNormReader(self.contract_dtype) for _ in leaves]


class GramReader(NamedTuple):
    """`<g_i, g_j>` within one batch, `[n, n]`."""

    workspace: int
    contract_dtype: ContractDtype

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, n, n)

    def read(self, factor: Factor) -> Tensor:
        return self.read_all([factor])

    def read_all(self, factors: Sequence[Factor]) -> Tensor:
        return _pairs.gram(factors, workspace=self.workspace, contract_dtype=self.contract_dtype)

    def push(self, push: Push) -> GramReader | None:
        return None if push.derivation == "general" else self

    def plus(self, other: GramReader) -> GramReader:
        return self


@node("workspace")
class Gram(Quantity):
    """`<g_i, g_j>`, the inner products of all pairs of samples of a batch: `[n, n]` per parameter.

    Args:
        workspace: most elements of a temporary block; the numbers do not depend on it.
    """

    degree = 2
    pairs_samples = True
    takes_contract_dtype = True

    def __init__(self, *, workspace: int = _cost.BLOCK_ELEMENTS) -> None:
        self.workspace = workspace

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[GramReader]:
        return [GramReader(self.workspace, self.contract_dtype) for _ in leaves]


# --- the gradient itself ----------------------------------------------------------------------


class SampleGradReader(NamedTuple):
    """`g_i` itself, `[n, *shape]`."""

    shape: tuple[int, ...]

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, n, *self.shape)

    def read(self, factor: Factor) -> Tensor:
        return _factors.materialize(factor).reshape(-1, *self.shape)

    def push(self, push: Push) -> None:
        return None

    def plus(self, other: SampleGradReader) -> SampleGradReader:
        return self


@node()
class SampleGrad(Quantity):
    """The per-sample gradient, materialised from its factors: `[n, *shape]` per parameter.

    As large as n models: for verification, and for models that vmap cannot run.
    """

    degree = 1

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[SampleGradReader]:
        return [SampleGradReader(tuple(x.shape)) for x in leaves]


class TotalReader(NamedTuple):
    """`sum_i g_i` in float32 or wider, `[*shape]`: a direction. (A training gradient, whose
    products are never rounded, is the cotangent of the parameter itself.)"""

    shape: tuple[int, ...]
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, *self.shape)

    def read(self, factor: Factor) -> Tensor:
        return _factors.total(factor, self.contract_dtype).reshape(self.shape)

    def push(self, push: Push) -> None:
        return None

    def plus(self, other: TotalReader) -> TotalReader:
        return self


def _zeros(param: Tensor, *shape: int) -> Tensor:
    """A zero tap: float32 or wider, one stored element whatever its shape."""
    return _factors.wide(param.new_zeros(())).expand(shape)
