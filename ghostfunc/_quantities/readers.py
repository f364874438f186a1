"""Readers: each reads one quantity of one parameter off a factor.

Readers travel: `push` gives the reader of a tensor derived from the parameter. Those that are
linear in the direction can be added: `plus` gives the reader of a tensor that derives from the
parameter in two ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import bundles, contract, cost, pairs
from ghostfunc._factors.contract import transpose
from ghostfunc._factors.factor import Dense, Factor
from ghostfunc._factors.matmul import speed
from ghostfunc._factors.parts import Part, in_order

DeriveFn: TypeAlias = Callable[..., Tensor]
"""The computation of a derived tensor, of the tensors it derives from."""


class Reader(Protocol):
    """Reads one quantity of one parameter."""

    def tap(self, param: Tensor, n: int) -> Tensor: ...

    def read(self, factor: Factor) -> Tensor: ...

    def push(self, push: Push) -> Any: ...


@runtime_checkable
class LinearReader(Reader, Protocol):
    """A reader that can be added to another one of its kind."""

    def plus(self, other: Any) -> Any: ...


class PositionsReader:
    """Base of readers that read the positions of a factor, not only the gradient they add up to."""


class MomentReader(PositionsReader):
    """Base of readers of `sum_i f(g_i)`, f a function of whole gradients with `f(0) = 0`."""

    def define(self, g: Float[Tensor, "n ..."]) -> Tensor:
        """The sum by its definition, of gradients that are at hand."""
        raise NotImplementedError

    def read_all(self, factors: Sequence[Factor]) -> Tensor:
        """The sum, of the factors of all uses of a parameter."""
        raise NotImplementedError


class Push(NamedTuple):
    """How directions travel from parameters to a tensor derived from them.

    Attributes:
        jvp: from a tangent of the tensor in question (the others' are zero) to that of the
            derived tensor.
        derivation: "transpose" or "cast" where the derived tensor is just that, else "general".
        shape: of tangents of the tensor in question, in real numbers.
        gathers: whether the tensor is made whole of the ranks' pieces. Directions are pieces, too,
            and are gathered when they are first read. Factors are of the whole, here and there.
    """

    jvp: Callable[[Tensor], Tensor]
    derivation: str
    shape: tuple[int, ...]
    gathers: bool = False


class DotReader(NamedTuple):
    """`<g_i, u>` with a dense direction: `[n]`."""

    u: Tensor
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, n)

    def read(self, factor: Factor) -> Tensor:
        return contract.dot(factor, self.u.reshape(factor.shape), self.contract_dtype)

    def push(self, push: Push) -> DotReader:
        if push.gathers:
            return PushedLater(push, self)
        return DotReader(push.jvp(self.u), self.contract_dtype)

    def plus(self, other: DotReader) -> DotReader:
        return DotReader(self.u + other.u, self.contract_dtype)


class PushedLater(DotReader):
    """`DotReader` with a direction that is pushed, once, when it is first read."""

    def __new__(cls, push: Push, source: DotReader) -> PushedLater:
        return super().__new__(cls, source.u, source.contract_dtype)

    def __init__(self, push: Push, source: DotReader) -> None:
        self._push = push
        self._pushed: Tensor | None = None

    @property
    def u(self) -> Tensor:
        if self._pushed is None:
            self._pushed = self._push.jvp(self[0])
        return self._pushed


class PairReader(NamedTuple):
    """`<g_i, g_j>` with gradients that stay factored: summed over j, `[n]`, or `[n, m]`."""

    factors: tuple[Factor, ...]
    each: bool
    m: int
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, n, self.m) if self.each else _zeros(param, n)

    def read(self, factor: Factor) -> Tensor:
        if not self.factors:  # the validation losses do not depend on the parameter
            return self.tap(bundles.values(factor), bundles.samples([factor]))
        if self.each:
            return pairs.gram([factor], self.factors, contract_dtype=self.contract_dtype)
        dots = [pairs.pair_dots(factor, g, self.contract_dtype) for g in self.factors]
        return contract.add_up(dots)

    def push(self, push: Push) -> PairReader:
        if push.derivation == "cast" or not self.factors:
            return self
        if push.derivation == "transpose":
            return self._replace(factors=tuple(map(transpose, self.factors)))
        whole = [contract.materialize(f) for f in self.factors]
        g = contract.add_up([x.reshape(self.m, *push.shape) for x in whole])
        return self._replace(factors=(Dense(torch.vmap(push.jvp)(g)),))

    def plus(self, other: PairReader) -> PairReader:
        return self._replace(factors=self.factors + other.factors)


@dataclass(frozen=True, eq=False)
class Way:
    """How directions of a parameter travel to a tensor derived from it; no steps, no way to go.

    Attributes:
        steps: from tensors that come before, the last step and the way to them: what they lead to
            adds up. One tensor may lie on many ways, so the whole is taken tensor by tensor.
        length: of the longest way.
    """

    steps: tuple[tuple[DeriveFn, Way], ...] = ()
    length: int = 0

    def then(self, step: DeriveFn) -> Way:
        """This way and one step more."""
        return Way(((step, self),), self.length + 1)

    def beside(self, other: Way) -> Way:
        """Both ways, which lead to one tensor."""
        return Way(self.steps + other.steps, max(self.length, other.length))

    def __call__(self, u: Tensor) -> Tensor:
        """Where a direction of the parameter leads."""
        reached: dict[int, Tensor] = {}
        for way in sorted(self._tensors(), key=lambda way: way.length):
            ends = [step(reached[id(source)]) for step, source in way.steps]
            reached[id(way)] = contract.add_up(ends) if ends else u
        return reached[id(self)]

    def _tensors(self) -> list[Way]:
        """The ways to all tensors on this one."""
        found, todo = {id(self): self}, [self]
        while todo:
            for _, source in todo.pop().steps:
                if id(source) not in found:
                    found[id(source)] = source
                    todo.append(source)
        return list(found.values())


class OneRunReader(NamedTuple):
    """`<g_i, sum_j g_j>`, i among the first n samples of a batch and j among all others: `[n]`.

    What reads the first samples is made of the others, when their gradient comes up. For a tensor
    derived from the parameter that takes the way to it and back, `J J^T sum_j g_j`. As it is not
    linear in the gradient, the uses of a parameter are to be taken together.

    Attributes:
        way: from the parameter to the tensor in question.
        direct: whether that is the parameter itself, or a mere transpose or cast of it.
        sum_up: makes `sum_j g_j` of this process's samples that of all ranks' samples, where they
            have others.
    """

    n: int
    contract_dtype: ContractDtype = None
    way: Way = Way()
    direct: bool = True
    sum_up: DeriveFn | None = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, self.n)

    def read(self, factor: Factor) -> Tensor:
        return self.for_train_rows([factor], grads=False).read(bundles.take(factor, slice(self.n)))

    def for_train_rows(
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
        theirs = [bundles.take(f, slice(self.n, None)) for f in factors]
        if not self.direct or self.sum_up is not None:
            u = bundles.summed(theirs, self.contract_dtype)
            u = u if self.direct else pull(u)
            u = u if self.sum_up is None else self.sum_up(u)
            return DotReader(u if self.direct else self.way(u), self.contract_dtype)
        ours = [bundles.use_shape(bundles.take(f, slice(self.n))) for f in factors]
        met = list(map(bundles.use_shape, theirs))
        faster = speed(bundles.values(factors[0]), self.contract_dtype)
        if cost.keep_direction_factored(ours, met, grads=grads, speed=faster):
            m = bundles.samples(theirs)
            return PairReader(tuple(theirs), False, m, contract_dtype=self.contract_dtype)
        return DotReader(bundles.summed(theirs, self.contract_dtype), self.contract_dtype)

    def push(self, push: Push) -> OneRunReader:
        if push.gathers:
            return self
        direct = self.direct and push.derivation != "general"
        return self._replace(way=self.way.then(push.jvp), direct=direct)

    def plus(self, other: OneRunReader) -> OneRunReader:
        return self._replace(way=self.way.beside(other.way), direct=False)


class DeferredGradients(NamedTuple):
    """A parameter's per-sample gradients, formed one at a time, when it is their turn.

    Attributes:
        factors: of the uses of tensors derived from it.
        pull: makes of them the parameter's gradients, `[n, *shape]`.
    """

    factors: tuple[Factor, ...]
    pull: Callable[[Sequence[Factor]], Tensor]

    def gradient(self, j: int) -> Tensor:
        """Sample j's gradient."""
        return self.pull([bundles.take(f, slice(j, j + 1)) for f in self.factors])[0]


class DeferredReader(NamedTuple):
    """`<g_i, g_j>`, `[n, m]`, where derived tensors stand between the samples and the parameter:
    no factor leads past them, so the m gradients are formed in turns."""

    deferred: DeferredGradients
    m: int
    contract_dtype: ContractDtype = None
    way: Way = Way()

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, n, self.m)

    def read(self, factor: Factor) -> Tensor:
        columns = []
        for j in range(self.m):
            u = self.way(self.deferred.gradient(j))
            columns.append(contract.dot(factor, u.reshape(factor.shape), self.contract_dtype))
        return torch.stack(columns, dim=1)

    def push(self, push: Push) -> DeferredReader:
        return self._replace(way=self.way.then(push.jvp))

    def plus(self, other: DeferredReader) -> DeferredReader:
        return self._replace(way=self.way.beside(other.way))


class ValueReader(NamedTuple):
    """Reads a quantity that is a function of a parameter's factors: `Quantity.value`.

    Attributes:
        quantity: the quantity; its tensors are constants.
        shape: of the parameter.
    """

    quantity: Any
    shape: tuple[int, ...]

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, *self.quantity.shape(n, self.shape))

    def read(self, factor: Factor) -> Tensor:
        return self.read_all([factor])

    @property
    def gives_total(self) -> bool:
        """Whether `read_with_total` has the training gradient, too."""
        return bool(self.quantity.gives_total)

    def read_with_total(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """The value, and `sum_i g_i` in the shape of the first factor."""
        value, total = self.quantity.value_and_total(parts)
        return value, total

    def read_side_by_side(self, g: Float[Tensor, "k n elements"]) -> tuple[Tensor, Tensor]:
        """Values and sums of k parameters of one size, given their gradients."""
        values, totals = self.quantity.values_and_totals(g)
        return values, totals

    def read_all(self, factors: Sequence[Factor]) -> Tensor:
        value: Tensor = self.quantity.value(factors, self.shape)
        return value

    def push(self, push: Push) -> ValueReader | None:
        same = push.derivation == "cast"
        if self.quantity.same_for_transpose:
            same |= push.derivation == "transpose"
        return self if same else None


class TotalReader(NamedTuple):
    """`sum_i g_i` in float32 or wider, `[*shape]`: a direction. (A training gradient, whose
    products are never rounded, is the cotangent of the parameter itself.)"""

    shape: tuple[int, ...]
    contract_dtype: ContractDtype = None

    def tap(self, param: Tensor, n: int) -> Tensor:
        return _zeros(param, *self.shape)

    def read(self, factor: Factor) -> Tensor:
        return contract.total(factor, self.contract_dtype).reshape(self.shape)

    def push(self, push: Push) -> None:
        return None


def takes_parts(reader: Reader) -> bool:
    """Whether a batch may be read in parts, by `read_parts`."""
    match reader:
        case ValueReader(quantity):
            return quantity.takes_parts or not quantity.pairs_samples
        case DotReader() | PairReader() | DeferredReader():
            return True
        case _:
            return False


def read_parts(reader: Any, parts: Sequence[Part]) -> Tensor:
    """The values that a reader reads of the samples of all parts, in the order of samples."""
    if isinstance(reader, ValueReader) and reader.quantity.takes_parts:
        value: Tensor = reader.quantity.value_of_parts(parts, reader.shape)
        return value
    if isinstance(reader, (ValueReader, MomentReader)):
        return in_order([(samples, reader.read_all(bundle)) for samples, bundle in parts])
    return in_order([(samples, reader.read(*bundle)) for samples, bundle in parts])


def _zeros(param: Tensor, *shape: int) -> Tensor:
    """A zero tap: float32 or wider, one stored element whatever its shape."""
    return wide(param.new_zeros(())).expand(shape)
