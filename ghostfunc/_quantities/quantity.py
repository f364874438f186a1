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
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ghostfunc._base.compilable import node
from ghostfunc._base.errors import OptionError
from ghostfunc._base.trees import ParamSpec, flatten_like
from ghostfunc._base.types import ContractDtype, PyTree
from ghostfunc._factors import cost
from ghostfunc._quantities.readers import DotReader, GramReader, SampleGradReader, SqNormReader


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


@node()
class SqNorm(Quantity):
    """`||g_i||^2`, the squared norm of every sample's gradient: `[n]` per parameter.

    The squares add up: the norm of the whole gradient is the root of the sum over parameters.
    """

    degree = 2
    takes_contract_dtype = True

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[SqNormReader]:
        return [SqNormReader(self.contract_dtype) for _ in leaves]


@node("workspace")
class Gram(Quantity):
    """`<g_i, g_j>`, the inner products of all pairs of samples of a batch: `[n, n]` per parameter.

    Args:
        workspace: most elements of a temporary block; the numbers do not depend on it.
    """

    degree = 2
    pairs_samples = True
    takes_contract_dtype = True

    def __init__(self, *, workspace: int = cost.BLOCK_ELEMENTS) -> None:
        self.workspace = workspace

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[GramReader]:
        return [GramReader(self.workspace, self.contract_dtype) for _ in leaves]


@node()
class SampleGrad(Quantity):
    """The per-sample gradient, materialised from its factors: `[n, *shape]` per parameter.

    As large as n models: for verification, and for models that vmap cannot run.
    """

    degree = 1

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[SampleGradReader]:
        return [SampleGradReader(tuple(x.shape)) for x in leaves]
