"""Quantities: numbers of per-sample gradients, which readers read off factors.

A quantity hands out one *reader* per parameter. A reader is a pytree of tensors with three methods:

    tap(param, n)      the zero tensor whose cotangent is what the reader reads
    read(factor)       that cotangent, from one use's factor
    push(...)          the reader of a tensor derived from the parameter, or None where the
                       per-sample gradient must be pulled back to the parameter instead

Readers that are linear in a direction can be added: `plus` reads the sum of both.

A tap adds up what is read at every use, which is right for what is linear in the gradient. The
readers of other quantities have a fourth method:

    read_all(factors)  the value, from the factors of all uses together

It is called after the backward pass, for the parameters that samples meet more than once.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.compilable import node
from ghostfunc._base.errors import OptionError
from ghostfunc._base.losses import refuse_not_finite
from ghostfunc._base.torch_private import known
from ghostfunc._base.trees import ParamSpec, flatten, flatten_like
from ghostfunc._base.types import ContractDtype, PyTree
from ghostfunc._factors import bundles, contract, cost, pairs
from ghostfunc._factors.factor import Factor
from ghostfunc._factors.parts import Part, order
from ghostfunc._factors.spread import SpreadAndTotal, spread_of_formed, spread_of_parts
from ghostfunc._quantities.readers import DotReader, ValueReader


class Quantity:
    """A number per sample (or several), made from its gradient. Subclass it for one of your own.

    A subclass says what it makes of the factors of one parameter, whose sum is `g_i`, and of which
    shape that is:

        shape(n, param)         for n samples and a parameter of the shape `param`
        value(factors, param)   from the factors of all uses of the parameter

    Factors are `gf.Outer`, `gf.OneHot`, `gf.Grouped` or `gf.Dense`; `gf.materialize` makes a
    gradient of any of them. `docs/adding_a_quantity.md` has a worked example, and
    `gf.testing.check_quantity` holds a quantity against its definition.

    Attributes:
        degree: 1 if the value is linear in the gradient, so that the uses of a parameter may be
            read one by one and added up; 2 if it is not, so that `value` needs them together.
        pairs_samples: whether it relates the samples of a batch to each other; where not, its value
            for a batch is that of the batch's parts, one after the other.
        same_for_transpose: whether the value is the same for the transposed gradient, as a norm is:
            a weight that is used as `w.t()` is then read where it is used.
        gives_total: whether `value_and_total` has the training gradient, too: it is then not formed
            once more.
        takes_parts: whether it relates samples that come in parts, by `value_of_parts`.
        takes_contract_dtype: whether it heeds `contract_dtype`.
        contract_dtype: what operands of its matrix products are rounded to; set by `contracting`.
        of_directions: whether it is told of `params` to compare directions with them. Others are
            told of whole parameters, where `params` are a rank's pieces.
    """

    degree: int
    pairs_samples: bool = False
    same_for_transpose: bool = False
    gives_total: bool = False
    takes_parts: bool = False
    takes_contract_dtype: bool = False
    contract_dtype: ContractDtype = None
    of_directions: bool = False

    def shape(self, n: int, param: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one parameter's value."""
        raise NotImplementedError(f"{type(self).__name__} must define shape(n, param).")

    def value(self, factors: Sequence[Factor], param: tuple[int, ...]) -> Tensor:
        """One parameter's value, from the factors of its uses, in float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} must define value(factors, param).")

    def value_of_parts(self, parts: Sequence[Part], param: tuple[int, ...]) -> Tensor:
        """`value` of samples in parts, each with the factors of its uses, in order of samples."""
        raise NotImplementedError(f"{type(self).__name__} does not take parts.")

    def value_and_total(self, parts: Sequence[Part]) -> SpreadAndTotal:
        """`value_of_parts`, and `sum_j g_j` in the shape of the first factor, never rounded."""
        raise NotImplementedError(f"{type(self).__name__} does not give the total.")

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[Any]:
        """One reader per parameter; None where the quantity has nothing to read."""
        return [ValueReader(self, tuple(x.shape)) for x in leaves]

    def check_finite(self, leaves: Sequence[Tensor], spec: ParamSpec) -> None:
        """Raise if what the quantity was made of is not finite; asked where its values are not."""

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


@node("direction")
class Dot(Quantity):
    """`<g_i, u>` for a direction `u`, a pytree like `params`: `[n]` per parameter."""

    degree = 1
    takes_contract_dtype = True
    of_directions = True

    def __init__(self, direction: PyTree) -> None:
        self.direction = direction

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[DotReader]:
        us = flatten_like(self.direction, leaves, spec, "direction")
        return [DotReader(u, self.contract_dtype) for u in us]

    def check_finite(self, leaves: Sequence[Tensor], spec: ParamSpec) -> None:
        us = flatten_like(self.direction, leaves, spec, "direction")
        refuse_not_finite(us, spec, "direction")


class Prepared(Quantity):
    """A quantity whose readers were made beforehand, one per parameter."""

    def __init__(self, readers: Sequence[Any], degree: int) -> None:
        self._readers = list(readers)
        self.degree = degree

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[Any]:
        return self._readers


@node()
class SqNorm(Quantity):
    """`||g_i||^2`, the squared norm of every sample's gradient: `[n]` per parameter.

    The squares add up: the norm of the whole gradient is the root of the sum over parameters.
    """

    degree = 2
    same_for_transpose = True
    takes_contract_dtype = True

    def shape(self, n: int, param: tuple[int, ...]) -> tuple[int, ...]:
        return (n,)

    def value(self, factors: Sequence[Factor], param: tuple[int, ...]) -> Tensor:
        return pairs.sqnorms(factors, contract_dtype=self.contract_dtype)


@node("workspace")
class Gram(Quantity):
    """`<g_i, g_j>`, the inner products of all pairs of samples of a batch: `[n, n]` per parameter.

    Args:
        workspace: most elements of a temporary block; the numbers do not depend on it.
    """

    degree = 2
    pairs_samples = True
    same_for_transpose = True
    takes_parts = True
    takes_contract_dtype = True

    def __init__(self, *, workspace: int = cost.BLOCK_ELEMENTS) -> None:
        self.workspace = workspace

    def shape(self, n: int, param: tuple[int, ...]) -> tuple[int, ...]:
        return (n, n)

    def value(self, factors: Sequence[Factor], param: tuple[int, ...]) -> Tensor:
        return self.value_of_parts([Part(None, factors)], param)

    def value_of_parts(self, parts: Sequence[Part], param: tuple[int, ...]) -> Tensor:
        grams = pairs.gram_of_parts(
            [part.bundle for part in parts],
            workspace=self.workspace,
            contract_dtype=self.contract_dtype,
        )
        index = order(parts)
        return grams if index is None else grams[index][:, index]


@node()
class Spread(Quantity):
    """How every sample's gradient lies to the sum of all: `||g_i||^2` and `<g_i, sum_j g_j>`, side
    by side, `[n, 2]` per parameter. Both add up over parameters.

    Everything that `gf.health` says is made of these. Where the training gradient is asked for
    beside it (`gf.ghost_vjp(..., gf.Spread(), grads=True)`), both come out of the same blocks of
    the gradients, whose products are those of the training gradient and no more.
    """

    degree = 2
    pairs_samples = True
    same_for_transpose = True
    gives_total = True
    takes_parts = True
    takes_contract_dtype = True

    def shape(self, n: int, param: tuple[int, ...]) -> tuple[int, ...]:
        return (n, 2)

    def value(self, factors: Sequence[Factor], param: tuple[int, ...]) -> Tensor:
        return self.value_of_parts([Part(None, factors)], param)

    def value_of_parts(self, parts: Sequence[Part], param: tuple[int, ...]) -> Tensor:
        return self.value_and_total(parts).table

    def value_and_total(self, parts: Sequence[Part]) -> SpreadAndTotal:
        table, total = spread_of_parts([part.bundle for part in parts], self.contract_dtype)
        index = order(parts)
        return SpreadAndTotal(table if index is None else table[index], total)

    def values_and_totals(self, g: Tensor) -> SpreadAndTotal:
        """`value_and_total` of parameters of one size, given the gradients `[k, n, elements]`."""
        return spread_of_formed(g)


@node()
class SampleGrad(Quantity):
    """The per-sample gradient, materialised from its factors: `[n, *shape]` per parameter.

    As large as n models: for verification, and for models that vmap cannot run.
    """

    degree = 1

    def shape(self, n: int, param: tuple[int, ...]) -> tuple[int, ...]:
        return (n, *param)

    def value(self, factors: Sequence[Factor], param: tuple[int, ...]) -> Tensor:
        n = bundles.samples(factors)
        return contract.add_up([contract.materialize(f).reshape(n, *param) for f in factors])


def kind_of(readers: Any) -> Hashable:
    """What tells readers, a list of them for every quantity, from others that would go another way
    through this package."""
    kinds: dict[int, Hashable] = {}  # one reader may be that of many parameters
    for reader in chain.from_iterable(readers):
        if id(reader) not in kinds:
            leaves, treedef = flatten(reader)
            kinds[id(reader)] = treedef, tuple(map(_kind, leaves))
    return tuple([tuple([kinds[id(x)] for x in row]) for row in readers])


def _kind(x: Any) -> Hashable:
    match x:
        case Tensor():
            return x.dtype, tuple(map(known, x.shape))
        case Quantity():
            return type(x), x.contract_dtype
        case None | bool() | int() | str() | torch.dtype():
            return x
    return type(x).__module__, type(x).__qualname__
